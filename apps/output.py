"""What `soundwave transcribe` writes: one JSON line per recording, in a file that survives a kill.

    {"file": "a.wav", "text": ..., "duration": ..., "segments": [{"text", "start", "end", "words"}, ...]}
    {"file": "b.wav", "error": ...}
    {"data": "rows.jsonl", "id": "1", "text": ...}            a row of a data set, by its id

`FILE.settings.json` beside it holds the settings that its texts depend on. Several processes write a part each,
`FILE.rank0`, `FILE.rank1`, ..., which are merged when all are done, or by the next run.
"""

import fcntl
import glob
import json
import os
import time
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import IO, Any

from soundwave.apps.inputs import Job
from soundwave.modeling_soundwave.writers_soundwave import to_srt, to_textgrid, to_verbose_json, to_vtt

# --timestamps -> suffix, and what the file holds.
FORMATS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "srt": (".srt", to_srt),
    "vtt": (".vtt", to_vtt),
    "json": (".json", lambda transcript: json.dumps(to_verbose_json(transcript), ensure_ascii=False) + "\n"),
    "textgrid": (".TextGrid", to_textgrid),
}
PATIENCE_S = 2  # a run that was killed may take a moment to go
Key = tuple[str, str]  # the data set, "" for a file; the name


def claim(output: Path) -> IO[str]:
    """The file with the settings of an output, open and locked: two runs at once would undo each other's work.

    Raises:
        ValueError: another run has it.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    sidecar = open(output.with_name(f"{output.name}.settings.json"), "a+", encoding="utf-8")
    patience = time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.flock(sidecar, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < patience:
                time.sleep(0.05)
                continue
            sidecar.close()
            raise ValueError(f"another run is writing {output}; wait for its end, or give another --output") from None
        except OSError:  # a file system without locks
            pass
        return sidecar


def resume(output: Path, sidecar: IO[str], settings: dict[str, Any], wanted: Set[Key]) -> set[Key]:
    """Make an output ready to be written on, whatever state it was left in.

    Args:
        output: file of JSON lines, there or not.
        sidecar: from `claim`.
        settings: what its texts depend on.
        wanted: recordings of this run; what failed among them is dropped, to be tried again.

    Returns:
        The recordings that are done.

    Raises:
        ValueError: the output was made with other settings, or is none of ours.
    """
    if any(part.stat().st_size for part in _parts(output)):
        sidecar.seek(0)
        try:
            made_with = json.load(sidecar)
        except ValueError as error:
            raise ValueError(
                f"{output} exists, but {sidecar.name} does not say how it was made ({error}); give another --output, "
                "or delete this one"
            ) from error
        changed = [name for name, value in settings.items() if made_with.get(name) != value]
        if changed:
            what = ", ".join(f"{name} {made_with.get(name)!r}, now {settings[name]!r}" for name in changed)
            raise ValueError(f"{output} was made with other settings ({what}); give another --output, or delete it")
    else:
        sidecar.truncate(0)
        sidecar.write(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        sidecar.flush()
    return merge(output, retried=wanted)


def merge(output: Path, retried: Set[Key] = frozenset()) -> set[Key]:
    """Bring an output and its parts into one file of whole lines, one per recording.

    A result counts more than an error, of which the last one stays.

    Args:
        output: file of JSON lines, there or not.
        retried: recordings whose errors are dropped.

    Returns:
        The recordings that have a result.
    """
    chosen: dict[Key, tuple[int, int]] = {}  # which line of which part
    done: set[Key] = set()
    parts = _parts(output)
    lines = 0
    for place, line in _lines(parts):
        lines += 1
        if not line.endswith(b"\n"):  # the process was killed in the middle of it
            continue
        record = _record(line, parts[place[0]], place[1])
        key = ("", record["file"]) if "file" in record else (record["data"], record["id"])
        if key in done or ("error" in record and key in retried):
            continue
        chosen[key] = place
        if "error" not in record:
            done.add(key)
    if parts not in ([], [output]) or lines != len(chosen):
        kept = set(chosen.values())
        temporary = output.with_name(f"{output.name}.tmp")
        with open(temporary, "wb") as file:
            file.writelines(line for place, line in _lines(parts) if place in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(output)
        for part in parts:
            if part != output:
                part.unlink()
    return done


class TranscriptLog:
    """Appends lines to an output, each handed to the system whole."""

    def __init__(self, path: Path):
        # Names that are no Unicode: a backslash escape of half a surrogate pair is what JSON has for it.
        self._file = open(path, "a", encoding="utf-8", errors="backslashreplace")

    def append(self, job: Job, values: dict[str, Any]) -> None:
        """Write what is known about a recording."""
        named = {"file": job.name} if job.table is None else {"data": job.table, "id": job.name}
        self._file.write(json.dumps(named | values, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def part_of(output: Path, rank: int, processes: int) -> Path:
    """The file that one of several processes writes."""
    return output if processes == 1 else output.with_name(f"{output.name}.rank{rank}")


def values_of(transcript: Any) -> dict[str, Any]:
    """What a line says about a transcript: text and times, not the single tokens."""
    values: dict[str, Any] = {"text": transcript.text, "duration": _rounded(transcript.duration)}
    for name in ("language", "no_speech_prob", "compression"):
        if getattr(transcript, name) is not None:
            values[name] = _rounded(getattr(transcript, name))
    if transcript.cut:
        values["cut"] = True
    values["segments"] = []
    for segment in transcript.segments:
        heard = {name: _rounded(getattr(segment, name)) for name in ("text", "start", "end")}
        if segment.words:
            heard["words"] = [{name: _rounded(value) for name, value in vars(word).items()} for word in segment.words]
        values["segments"].append(heard)
    return values


def write_timed(path: Path, transcript: Any, format: str) -> None:
    """Write a transcript with its times.

    Args:
        path: of the file, without its suffix.
        transcript: a `Transcript`.
        format: one of `FORMATS`.
    """
    suffix, written = FORMATS[format]
    # Not with_suffix: the name of the recording may hold dots.
    write_whole(path.with_name(path.name + suffix), written(transcript))


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _rounded(value: Any) -> Any:
    """Times to the millisecond; the last digits of a confidence depend on the batch."""
    return round(value, 3) if isinstance(value, float) else value


def _parts(output: Path) -> list[Path]:
    ranks = sorted(Path(name) for name in glob.glob(f"{glob.escape(str(output))}.rank*"))
    return [path for path in (output, *ranks) if path.is_file()]


def _lines(parts: list[Path]) -> Iterator[tuple[tuple[int, int], bytes]]:
    for number, part in enumerate(parts):
        with open(part, "rb") as file:
            for line_number, line in enumerate(file):
                yield (number, line_number), line


def _record(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number + 1}: not JSON ({error}); give another --output") from None
    if not isinstance(record, dict) or not ("file" in record or {"data", "id"} <= set(record)):
        raise ValueError(f"{path}, line {number + 1}: no line of a transcript; give another --output")
    return record
