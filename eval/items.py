"""What a benchmark asks: items with their recordings, read when they are needed and not before.

Clip -> read() (samples,) float32, mono, 16 kHz
Item -> id, instruction, clips, reference, group, fields
"""

import os
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np

# PyTorch and libsndfile are imported where a recording is opened: listing the benchmarks needs neither.


class CutAnswer(str):
    """An answer that ended because it reached ``max_new_tokens``; models return it in place of a plain ``str``."""


class Clip(Protocol):
    """A recording of an item."""

    @property
    def name(self) -> str:
        """File name for ``answers.jsonl``, never a folder of the machine."""

    @property
    def duration_s(self) -> float | None:
        """Length in seconds as far as it is known without decoding; ``None`` also for what cannot be read."""

    def read(self) -> np.ndarray:
        """The samples, (samples,) float32, mono, 16 kHz.

        Raises:
            AudioError: Missing, broken or empty: one of its kinds each.
        """


@dataclass(frozen=True)
class FileClip:
    """A file of audio, or the segment of it from ``start_s`` to ``end_s`` (seconds; ``None``: its end)."""

    path: str | Path
    start_s: float = 0.0
    end_s: float | None = None

    @property
    def name(self) -> str:
        """The file's name."""
        return Path(self.path).name

    @cached_property
    def duration_s(self) -> float | None:
        """By the segment's ends, or the file's header."""
        end = _header_duration(str(self.path)) if self.end_s is None else self.end_s
        return None if end is None else max(0.0, end - self.start_s)

    def read(self) -> np.ndarray:
        """The samples, (samples,) float32, mono, 16 kHz; of a segment, no more is decoded than it holds."""
        from soundwave.processing.audio_soundwave import load_audio
        from soundwave.processing.limits_soundwave import AudioError

        if not os.path.isfile(self.path):  # by its name: a path that is too long for one line loses its end
            raise AudioError(f"{self.name} is not there; expected a file of audio. Look for it in the source.")
        if not self.start_s and self.end_s is None:
            return load_audio(str(self.path))
        samples, rate = self._segment()
        return load_audio(samples, sampling_rate=rate)

    def _segment(self) -> tuple[np.ndarray, int]:
        """(samples (n,), rate in Hz)."""
        import soundfile

        from soundwave.processing.limits_soundwave import AudioError, EmptyAudioError

        try:
            with soundfile.SoundFile(self.path) as file:
                rate = file.samplerate
                start = round(self.start_s * rate)
                stop = len(file) if self.end_s is None else min(round(self.end_s * rate), len(file))
                if start >= stop:
                    raise EmptyAudioError(
                        f"{self.name} lasts {len(file) / rate:.2f} s, so its segment from {self.start_s:g} s to "
                        f"{'its end' if self.end_s is None else f'{self.end_s:g} s'} holds no samples."
                    )
                file.seek(start)
                samples = file.read(stop - start, dtype="float32", always_2d=True)  # (n, channels)
        except soundfile.LibsndfileError as error:
            raise AudioError(f"{self.name} cannot be read: {error.error_string}") from error
        return samples.mean(axis=1), rate


class CellClip:
    """A recording as ``datasets`` keeps it undecoded: ``{"bytes", "path"}``, where the bytes win."""

    def __init__(self, cell: dict[str, Any] | None, name: str = "audio") -> None:
        self._cell, self._place = cell, name

    @cached_property
    def name(self) -> str:
        """The name of the file that the cell came from, or the cell's place."""
        return self._head[0]

    @cached_property
    def duration_s(self) -> float | None:
        """By the header of the cell's file."""
        return self._head[1]

    @cached_property
    def _head(self) -> tuple[str, float | None]:
        from soundwave.eval.provenance import portable_address

        cell = self.cell()  # once for both: it may have to be read from disk
        path, data = cell.get("path") or "", cell.get("bytes")
        name = Path(portable_address(path)).name if path and not path.startswith("data:") else self._place
        return name, _header_duration(BytesIO(data) if data else path)

    def cell(self) -> dict[str, Any]:
        """The recording, undecoded."""
        return self._cell or {}

    def read(self) -> np.ndarray:
        """The samples, (samples,) float32, mono, 16 kHz."""
        from soundwave.processing.audio_soundwave import load_audio

        return load_audio(self.cell())


class TableClip(CellClip):
    """A cell of a ``datasets.Dataset``, in a column ``Audio(decode=False)``, read from disk when it is asked for."""

    def __init__(self, dataset: Any, row: int, column: str) -> None:
        super().__init__(None, f"{column}-{row}")
        self.dataset, self.row, self.column = dataset, row, column

    def cell(self) -> dict[str, Any]:
        """The recording, undecoded."""
        return self.dataset[self.column][self.row] or {}  # in this order the row's other columns are not read


def _header_duration(source: Any) -> float | None:
    import soundfile

    # A recording that cannot be opened is named when it is read: here it only has no length.
    try:
        info = soundfile.info(source)
    except (soundfile.LibsndfileError, OSError, TypeError):
        return None
    return info.frames / info.samplerate


@dataclass
class Item:
    """One question of a benchmark.

    Attributes:
        id: Unique within the benchmark.
        instruction: Text of the user's turn, after the recordings; ``None``: the recordings alone.
        clips: Recordings in order; none for a question in text.
        reference: What is right; ``None`` only where a judge needs none.
        group: Scored apart and averaged where a benchmark asks for it, such as AIR-Bench's ``task_name``.
        fields: JSON-able extras, copied to the answer row: choices, ``source`` and what a judge must know. Under
            ``"error"``: why this item is broken; it is then not asked, counted as a failure and named.
        messages: A conversation of several turns in place of the instruction, up to the user's last one; its audio
            items take the clips in order.
    """

    id: str
    instruction: str | None
    clips: list[Clip]
    reference: str | None
    group: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, Any]] | None = None

    @property
    def duration_s(self) -> float | None:
        """Of all recordings together, in seconds; ``None`` if there are none, or one of unknown length."""
        lengths = [clip.duration_s for clip in self.clips]
        known = [length for length in lengths if length is not None]
        return sum(known) if known and len(known) == len(lengths) else None


__all__ = ["CellClip", "Clip", "CutAnswer", "FileClip", "Item", "TableClip"]
