"""Recordings to features: decode, mix to mono, resample to 16 kHz, cut into windows, log-mel.

Letters: `M` mel bins, `T` mel frames (10 ms), `W` mel frames of a full window (3,000 for Whisper), `n` samples,
`C` channels.
"""

import base64
import binascii
import io
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from http.client import HTTPException
from numbers import Real
from typing import Any
from urllib.parse import unquote_to_bytes
from urllib.request import Request, urlopen

import numpy as np
import torch

SAMPLING_RATE = 16_000  # Hz
FRAME_MULTIPLE = 4  # mel frames in one aligned frame (the encoder halves, the adapter stacks two): 40 ms
OVERLAP = Fraction(1, 6)  # of a window, shared by two neighbours
MAX_DOWNLOAD_BYTES = 512 * 2**20
DOWNLOAD_TIMEOUT = 30.0  # seconds without an answer
MAX_CHANNELS = 64
MP3_FRAME = 1152  # samples
STDERR = 2  # the file descriptor that C libraries write to
_decoding = threading.Lock()


class AudioError(ValueError):
    """A recording that cannot be used: says what was given, what is expected and what to do."""


def load_audio(source: Any, sampling_rate: int | None = None) -> np.ndarray:
    """Decode any recording to mono float32 at 16 kHz, (n,).

    Args:
        source: A path, an http(s) URL, a `data:` URI, the bytes of an audio file, a binary file object, a waveform as
            NumPy array, torch tensor or list of floats ((n,), (C, n) or (n, C); integers of 8, 16 and 32 bits are
            divided by the range of their type), or a `datasets` audio value: `{"bytes", "path"}`,
            `{"array", "sampling_rate"}` or its decoder object.
        sampling_rate: Rate of a waveform in Hz. Files carry their own and do not need it.

    Raises:
        AudioError: Nothing to decode, not decodable, no samples, NaN or infinite ones, or a waveform without a rate.
    """
    name = describe(source)
    if isinstance(source, dict):
        if source.get("array") is not None:
            return load_audio(source["array"], source.get("sampling_rate") or sampling_rate)
        # An empty path beside the bytes is common in datasets: the bytes win.
        inner = source["bytes"] if source.get("bytes") is not None else source.get("path")
        if inner is None:
            raise AudioError(
                f"The audio dictionary has the keys {sorted(source)}, all of them empty or unknown; "
                'expected {"bytes": ...}, {"path": ...} or {"array": ..., "sampling_rate": ...}.'
            )
        return load_audio(inner)
    if hasattr(source, "get_all_samples"):  # a decoded column of datasets (torchcodec's decoder)
        samples = source.get_all_samples()
        return load_audio(samples.data, samples.sample_rate)
    if isinstance(source, np.ndarray | torch.Tensor | list | tuple):
        if sampling_rate is None:
            raise AudioError(
                f"Given {name} without its sampling rate; pass sampling_rate= in Hz "
                f"({SAMPLING_RATE} if it was already resampled for this model)."
            )
        waveform, rate = _to_float(source, name), sampling_rate
    else:
        waveform, rate = _decode(source, name)
    waveform = _to_mono(waveform, name)
    if waveform.size == 0:
        raise AudioError(f"{name} has no samples; expected at least one. Leave this recording out.")
    if not np.isfinite(waveform).all():
        bad = int(np.count_nonzero(~np.isfinite(waveform)))
        raise AudioError(
            f"{name} has NaN or infinite values in {bad} of {waveform.size} samples; expected finite ones. "
            "Look for a division by zero where the recording was made."
        )
    return _resample(waveform, rate, name)


def describe(source: Any) -> str:
    """A short name of a recording for messages."""
    if isinstance(source, np.ndarray | torch.Tensor):
        return f"a {type(source).__name__} of shape {tuple(source.shape)} and type {source.dtype}"
    if isinstance(source, list | tuple):
        return f"a {type(source).__name__} of {len(source)} values"
    if isinstance(source, bytes | bytearray | memoryview):
        return f"a recording of {len(source)} bytes"
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        return f"'{text if len(text) <= 120 else text[:100] + '...'}'"
    return f"a {type(source).__name__}"


def _decode(source: Any, name: str) -> tuple[np.ndarray, int]:
    """Decode a file, given by name, content or file object: mono samples (n,) and rate."""
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if isinstance(source, str):
        if source.startswith(("http://", "https://")):
            file: Any = io.BytesIO(_download(source, name))
        elif source.startswith("data:"):
            file = io.BytesIO(_data_uri(source, name))
        elif os.path.isfile(source):
            file = source
        else:
            raise AudioError(f"{name} is not a file; expected a path, an http(s) URL or a data: URI. Check the path.")
    elif isinstance(source, bytes | bytearray | memoryview):
        file = io.BytesIO(source)
    elif hasattr(source, "read"):
        content = source.read()
        if not isinstance(content, bytes):
            raise AudioError(f"{name} yields {type(content).__name__}, not bytes; open it in binary mode ('rb').")
        file = io.BytesIO(content)
    else:
        raise AudioError(
            f"Cannot read audio from {name}; expected a path, URL, bytes, file object, array or datasets audio value."
        )
    try:
        import soundfile
    except Exception as error:
        raise AudioError(
            f"Decoding {name} needs the package soundfile, which cannot be imported here ({error}); "
            "run `pip install soundfile`, or pass the decoded samples with sampling_rate=."
        ) from error
    try:
        with _quiet_stderr(), soundfile.SoundFile(file) as reader:
            announced, rate, kind = reader.frames, reader.samplerate, reader.format
            samples = reader.read(dtype="float32", always_2d=True)
    except Exception as error:
        raise AudioError(
            f"{name} cannot be decoded ({error}); expected WAV, FLAC, OGG or MP3. "
            "Convert it, e.g. `ffmpeg -i INPUT OUTPUT.wav`."
        ) from error
    # A cut MP3 ends without an error. Encoders do not agree on whether the header is a frame: one more is allowed.
    missing = announced - len(samples)
    if kind == "MP3" and missing > max(announced // 100, MP3_FRAME) and _has_frame_count(file):
        raise AudioError(
            f"{name} ends after {len(samples)} of the {announced} samples that its header announces; expected all of "
            "them. The file is cut off or damaged: fetch or encode it again."
        )
    # Here, where the layout is known: a clip may have fewer samples than channels.
    return samples.mean(axis=1, dtype=np.float32), rate


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Lead file descriptor 2 nowhere: libmpg123 reports every damaged frame there, and the caller gets an error."""
    with _decoding:  # the descriptor belongs to the whole process: threads decode one after the other
        saved: int | None = None
        with suppress(OSError):  # a service may have closed it
            saved = os.dup(STDERR)
        if saved is None:
            yield
            return
        try:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), STDERR)
            yield
        finally:
            os.dup2(saved, STDERR)
            os.close(saved)


def _has_frame_count(file: str | io.BytesIO) -> bool:
    """Whether an MP3 says how long it is; without it the length is a guess from the first frame's bit rate."""
    if isinstance(file, str):
        with open(file, "rb") as opened:
            content = opened.read()
    else:
        content = file.getvalue()
    return any(mark in content for mark in (b"Xing", b"Info", b"VBRI"))


def recordings_list(audio: Any) -> list[Any]:
    """One recording, a list of them or a list of lists of them as a flat list; a list of numbers is one waveform."""
    if audio is None:
        return []
    if not isinstance(audio, list | tuple) or (audio and isinstance(audio[0], Real)):
        return [audio]
    return [recording for item in audio for recording in recordings_list(item)]


def _download(url: str, name: str) -> bytes:
    try:
        with urlopen(Request(url, headers={"User-Agent": "soundwave"}), timeout=DOWNLOAD_TIMEOUT) as response:
            content = response.read(MAX_DOWNLOAD_BYTES + 1)
    except (OSError, ValueError, HTTPException) as error:
        raise AudioError(f"{name} cannot be downloaded ({error}); check the address, or pass a local file.") from error
    if len(content) > MAX_DOWNLOAD_BYTES:
        raise AudioError(
            f"{name} is larger than {MAX_DOWNLOAD_BYTES // 2**20} MiB; download it yourself and pass the path."
        )
    return content


def _data_uri(uri: str, name: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma:
        raise AudioError(f"{name} is no data: URI; expected data:audio/wav;base64,<content>.")
    if not header.endswith(";base64"):
        return unquote_to_bytes(payload)
    try:
        return base64.b64decode(unquote_to_bytes(payload), validate=True)
    except binascii.Error as error:
        raise AudioError(f"{name} holds invalid base64 ({error}); encode the bytes of the file as base64.") from error


def _to_float(source: Any, name: str) -> np.ndarray:
    """A waveform as float32; integers are divided by the range of their type."""
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy()
    try:
        samples = np.asarray(source)
    except ValueError as error:
        raise AudioError(f"Given {name} of unequal lengths; pass one recording at a time, each an array.") from error
    if samples.dtype.kind == "f":
        return samples.astype(np.float32, copy=False)
    if samples.dtype == np.uint8:  # 8-bit WAV is the one unsigned format: silence at 128
        return (samples.astype(np.float32) - 128.0) / 128.0
    # 64-bit integers are what Python's numbers become: nobody records with their range.
    if samples.dtype.kind == "i" and samples.dtype.itemsize <= 4:
        return (samples / float(-int(np.iinfo(samples.dtype).min))).astype(np.float32)
    raise AudioError(f"Given {name}; expected floats in -1..1 or integers of 8, 16 or 32 bits. Convert the samples.")


def _to_mono(samples: np.ndarray, name: str) -> np.ndarray:
    """Mean over the channels, which are the shorter axis: (n,), (C, n) or (n, C) -> (n,)."""
    if samples.ndim == 1 or samples.size == 0:
        return samples.reshape(-1)
    if samples.ndim != 2 or min(samples.shape) > MAX_CHANNELS:
        raise AudioError(
            f"{name} holds samples of shape {samples.shape}; expected (n,), (channels, n) or (n, channels) "
            f"with at most {MAX_CHANNELS} channels. Pass several recordings as a list."
        )
    return samples.mean(axis=int(samples.shape[1] <= samples.shape[0]), dtype=np.float32)


def _resample(waveform: np.ndarray, rate: float, name: str) -> np.ndarray:
    """(n,) at any rate -> (n',) float32 at 16 kHz."""
    if not rate > 0:
        raise AudioError(f"{name} has a sampling rate of {rate}; expected a positive number of samples per second.")
    if rate == SAMPLING_RATE:
        return np.ascontiguousarray(waveform, dtype=np.float32)
    try:
        from torchaudio.functional import resample
    except Exception:  # torchaudio that does not fit torch raises more than ImportError
        resample = None
    if resample is not None:
        # Its filter bank has a row per phase: 44,101 Hz taken literally would need gigabytes. A rate that is off by
        # less than a thousandth is not heard.
        ratio = (Fraction(SAMPLING_RATE) / Fraction(rate)).limit_denominator(1000)
        if ratio.numerator > 0:
            tensor = torch.from_numpy(np.ascontiguousarray(waveform, dtype=np.float32))
            return resample(tensor, ratio.denominator, ratio.numerator).numpy()
    try:
        import soxr
    except Exception as error:
        raise AudioError(
            f"{name} has {rate} Hz; resampling it to {SAMPLING_RATE} Hz needs torchaudio or soxr, and neither can be "
            "imported. Run `pip install soxr`, or pass audio that already has that rate."
        ) from error
    resampled = soxr.resample(waveform, rate, SAMPLING_RATE).astype(np.float32)
    # A handful of samples at a high rate can come out as none: keep one, so that the recording keeps its place.
    return resampled if resampled.size else waveform[:1].astype(np.float32)


def window_offsets(frames: int, window: int) -> list[int]:
    """Starts of the windows that cover a recording, in mel frames.

    Neighbours overlap by a sixth of the window; only the last one may be shorter than `window`.

    Args:
        frames: Length of the recording in mel frames.
        window: Length of a window in mel frames.
    """
    step = int(window * (1 - OVERLAP)) // FRAME_MULTIPLE * FRAME_MULTIPLE
    return [0, *range(step, frames - window + step, step)]


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
        frames = -(-len(waveform) // (hop * FRAME_MULTIPLE)) * FRAME_MULTIPLE
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
