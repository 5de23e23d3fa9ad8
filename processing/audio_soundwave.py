"""Recordings to features: load, cut into windows, mel frames.

Letters: `M` mel bins, `T` mel frames (10 ms), `W` mel frames of a full window (3,000 for Whisper), `n` samples.
"""

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch

from .decoding_soundwave import open_audio
from .frontends_soundwave import HOP, window_features, window_frames
from .limits_soundwave import AudioLimits, EmptyAudioError

FRAME_MULTIPLE = 4  # mel frames in one aligned frame (the encoder halves, the adapter stacks two): 40 ms
OVERLAP = Fraction(1, 6)  # of a window, shared by two neighbours


def load_audio(source: Any, sampling_rate: float | None = None, limits: AudioLimits | None = None) -> np.ndarray:
    """Decode any recording to mono float32 at 16 kHz, (n,): the blocks of `open_audio` in one.

    Args:
        source: A path, an http(s) URL, a `data:` URI, the bytes of an audio file, a binary file object, a waveform as
            NumPy array, torch tensor or list of floats ((n,), (C, n) or (n, C); integers of 8, 16 and 32 bits are
            divided by the range of their type), or a `datasets` audio value: `{"bytes", "path"}`,
            `{"array", "sampling_rate"}` or its decoder object.
        sampling_rate: Rate of a waveform in Hz. Files carry their own and do not need it.
        limits: Bounds of duration, size and time, and which URLs are allowed; `None`: the defaults.

    Raises:
        AudioError: Nothing to decode, not decodable, cut off, no samples, NaN or infinite ones, a waveform without a
            rate, a refused URL, or too much of it: one kind of `AudioError` each.
    """
    samples = bytearray()  # grows in place: a list of blocks would be held twice when it is joined
    for block in open_audio(source, sampling_rate, limits):
        samples += np.ascontiguousarray(block).data
    return np.frombuffer(samples, dtype=np.float32)


def recordings_list(audio: Any) -> list[Any]:
    """One recording, a list of them or a list of lists of them as a flat list; a list of numbers is one waveform."""

    def several(value: Any) -> bool:
        return isinstance(value, list | tuple) and not (value and isinstance(value[0], Real))

    rows = [] if audio is None else audio if several(audio) else [audio]
    return [recording for row in rows for recording in (row if several(row) else [row])]


def window_offsets(frames: int, window: int) -> list[int]:
    """Starts of the windows that cover a recording, in mel frames.

    Neighbours overlap by a sixth of the window; only the last one may be shorter than `window`.

    Args:
        frames: Length of the recording in mel frames.
        window: Length of a window in mel frames.
    """
    step = _window_step(window)
    return [0, *range(step, frames - window + step, step)]


def _window_step(window: int) -> int:
    return int(window * (1 - OVERLAP)) // FRAME_MULTIPLE * FRAME_MULTIPLE


def mel_frames(samples: int) -> int:
    """Mel frames of a recording: enough for whole aligned frames."""
    return -(-samples // (HOP * FRAME_MULTIPLE)) * FRAME_MULTIPLE


def log_mel_windows(waveforms: Sequence[np.ndarray], feature_extractor: Any, padding: str) -> dict[str, torch.Tensor]:
    """Cut recordings into windows and compute each window's features.

    Args:
        waveforms: Mono recordings at 16 kHz, (n,) each.
        feature_extractor: The encoder's, see `frontends_soundwave`.
        padding: `"max_length"`: windows padded with silence to `W` frames, as Whisper was trained. `"longest"`:
            windows padded with zero features to the longest one; an item's features do not depend on its neighbours.

    Returns:
        `input_features` (n_windows, M, T), `input_features_mask` (n_windows, T) bool, `window_offsets` (n_windows,) in
        mel frames, `windows_per_audio` (n_audios,).
    """
    window = window_frames(feature_extractor)
    offsets: list[int] = []
    counts: list[int] = []
    features: list[torch.Tensor] = []
    lengths: list[int] = []
    for waveform in waveforms:
        frames = mel_frames(len(waveform))
        starts = window_offsets(frames, window)
        offsets += starts
        counts.append(len(starts))
        for start in starts:
            length = min(window, frames - start)
            lengths.append(length)
            samples = waveform[start * HOP : (start + window) * HOP]
            features.append(window_features(samples, length, feature_extractor, padding))
    longest = window if padding == "max_length" else max(lengths)
    input_features = torch.zeros(len(features), features[0].shape[0], longest)  # (n_windows, M, T)
    for row, mel in zip(input_features, features, strict=True):
        row[:, : mel.shape[1]] = mel
    return {
        "input_features": input_features,
        "input_features_mask": torch.arange(longest) < torch.tensor(lengths)[:, None],
        "window_offsets": torch.tensor(offsets),
        "windows_per_audio": torch.tensor(counts),
    }


class Window(NamedTuple):
    """One window of a recording that is read as a stream."""

    features: torch.Tensor
    """(M, frames) where windows are padded to the "longest", (M, W) for "max_length"."""
    frames: int
    """Valid mel frames."""
    offset: int
    """Start in the recording, in mel frames."""
    last: bool
    """Whether the recording ends with this window."""


def stream_windows(blocks: Iterable[np.ndarray], feature_extractor: Any, padding: str) -> Iterator[Window]:
    """The windows of `log_mel_windows`, each as soon as the recording is known to go on or to end.

    Holds the samples of two windows at most, beside the block in hand.

    Args:
        blocks: Mono samples at 16 kHz, (n,) float32 each, of any lengths: what `open_audio` yields.
        feature_extractor: The encoder's, see `frontends_soundwave`.
        padding: `"max_length"` or `"longest"`, as for `log_mel_windows`.

    Raises:
        EmptyAudioError: The blocks hold no sample.
    """
    window = window_frames(feature_extractor)
    step = _window_step(window)
    held = np.zeros(0, dtype=np.float32)  # from the start of the next window on
    offset = 0
    for block in blocks:
        for start in range(0, len(block), window * HOP):
            held = np.concatenate([held, block[start : start + window * HOP]])
            while len(held) > window * HOP:
                features = window_features(held[: window * HOP], window, feature_extractor, padding)
                yield Window(features, window, offset, last=False)
                held, offset = held[step * HOP :], offset + step
    if not len(held):
        raise EmptyAudioError("The stream has no samples; expected at least one. Leave this recording out.")
    frames = mel_frames(len(held))
    yield Window(window_features(held, frames, feature_extractor, padding), frames, offset, last=True)
