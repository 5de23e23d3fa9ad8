"""Recordings to features: load, cut into windows, log-mel.

Letters: `M` mel bins, `T` mel frames (10 ms), `W` mel frames of a full window (3,000 for Whisper), `n` samples.
"""

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch

from .decoding_soundwave import open_audio
from .limits_soundwave import AudioLimits, EmptyAudioError
from .resampling_soundwave import SAMPLING_RATE

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


def _mel_frames(samples: int, hop: int) -> int:
    """Mel frames of a recording: enough for whole aligned frames."""
    return -(-samples // (hop * FRAME_MULTIPLE)) * FRAME_MULTIPLE


def log_mel_windows(waveforms: Sequence[np.ndarray], feature_extractor: Any, padding: str) -> dict[str, torch.Tensor]:
    """Cut recordings into windows and compute each window's log-mel features.

    Args:
        waveforms: Mono recordings at 16 kHz, (n,) each.
        feature_extractor: A `WhisperFeatureExtractor`.
        padding: `"max_length"`: windows padded with silence to `W` frames, as Whisper was trained. `"longest"`:
            windows padded with zero features to the longest one; an item's features do not depend on its neighbours.

    Returns:
        `input_features` (n_windows, M, T), `input_features_mask` (n_windows, T) bool, `window_offsets` (n_windows,) in
        mel frames, `windows_per_audio` (n_audios,).
    """
    hop, window = feature_extractor.hop_length, feature_extractor.nb_max_frames
    offsets: list[int] = []
    counts: list[int] = []
    features: list[torch.Tensor] = []
    lengths: list[int] = []
    for waveform in waveforms:
        frames = _mel_frames(len(waveform), hop)
        starts = window_offsets(frames, window)
        offsets += starts
        counts.append(len(starts))
        for start in starts:
            length = min(window, frames - start)
            lengths.append(length)
            features.append(
                _log_mel(waveform[start * hop : (start + window) * hop], length, feature_extractor, padding)
            )
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
        feature_extractor: A `WhisperFeatureExtractor`.
        padding: `"max_length"` or `"longest"`, as for `log_mel_windows`.

    Raises:
        EmptyAudioError: The blocks hold no sample.
    """
    hop, window = feature_extractor.hop_length, feature_extractor.nb_max_frames
    step = _window_step(window)
    held = np.zeros(0, dtype=np.float32)  # from the start of the next window on
    offset = 0
    for block in blocks:
        for start in range(0, len(block), window * hop):
            held = np.concatenate([held, block[start : start + window * hop]])
            while len(held) > window * hop:
                features = _log_mel(held[: window * hop], window, feature_extractor, padding)
                yield Window(features, window, offset, last=False)
                held, offset = held[step * hop :], offset + step
    if not len(held):
        raise EmptyAudioError("The stream has no samples; expected at least one. Leave this recording out.")
    frames = _mel_frames(len(held), hop)
    yield Window(_log_mel(held, frames, feature_extractor, padding), frames, offset, last=True)


def _log_mel(samples: np.ndarray, length: int, feature_extractor: Any, padding: str) -> torch.Tensor:
    """Log-mel of one window, (M, length) for "longest" and (M, W) for "max_length"."""
    hop, window, n_fft = feature_extractor.hop_length, feature_extractor.nb_max_frames, feature_extractor.n_fft
    # Zeros after the clip: the transform of its last frames looks half an FFT window ahead and would otherwise reflect
    # the clip. Two FFT windows, so that the last frame is one of pure silence.
    padded = np.zeros(length * hop + 2 * n_fft, dtype=np.float32)
    if padding == "max_length" and len(padded) > feature_extractor.n_samples:
        padded = np.zeros(feature_extractor.n_samples, dtype=np.float32)
    padded[: len(samples)] = samples
    output = feature_extractor(
        padded, padding="do_not_pad", truncation=False, sampling_rate=SAMPLING_RATE, return_tensors="pt"
    )
    mel = output["input_features"][0]  # (M, frames)
    if padding == "longest":
        return mel[:, :length]
    # All frames of padding are equal: repeating one gives what 30 s of zeros would, at the price of the clip alone.
    silence = mel[:, -1:].expand(-1, max(0, window - mel.shape[1]))
    return torch.cat([mel[:, :window], silence], dim=1)
