"""Any recording as a stream of mono blocks at 16 kHz: open, decode, mix, check and resample within bounds.

Letters: `n` samples, `C` channels.
"""

import ctypes
import io
import os
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import IO, Any

import numpy as np
import torch

from .fetching_soundwave import CHUNK, IN_MEMORY, decode_data_uri, fetch, file_url_path, is_url
from .limits_soundwave import (
    AudioError,
    AudioFormatError,
    AudioLimitError,
    AudioLimits,
    AudioValueError,
    EmptyAudioError,
    TruncatedAudioError,
    describe,
)
from .mp3_soundwave import xing_frame
from .resampling_soundwave import check_rate, resample_blocks
from .truncation_soundwave import truncation, wav_data

MAX_CHANNELS = 64
BLOCK = 2**20  # samples of all channels that are decoded at once, at most
BLOCK_S = 30.0  # seconds, at most: samples at a low rate become many
LOUDEST = 1e9  # full scale is 1: beyond this the power of a frame overflows, and nothing recorded is
MP3_FRAME = 1152  # samples
UNKNOWN_LENGTH = 2**63 - 1  # samples, of a FLAC file that was written into a pipe
TORCHCODEC_STEP_S = 30.0
# How the files begin that are handed to FFmpeg: MP4 and M4A, WebM and Matroska, WMA, AAC, AMR, FLV. A playlist is a
# file as well, and FFmpeg would open what it names.
CONTAINERS = re.compile(rb"....ftyp|\x1aE\xdf\xa3|0&\xb2u|\xff[\xf0\xf1\xf8\xf9]|#!AMR|FLV", re.DOTALL)
_quiet_lock = threading.Lock()
_quiet_depth = 0


def open_audio(
    source: Any, sampling_rate: float | None = None, limits: AudioLimits | None = None
) -> Iterator[np.ndarray]:
    """Blocks (n,) of mono float32 samples at 16 kHz, decoded as they are asked for.

    Memory is bounded by some megabytes whatever the length of a file.

    Args:
        source: What `load_audio` takes, or an iterator of waveforms: the chunks of one recording as they arrive.
        sampling_rate: Rate of a waveform or of chunks in Hz. Files carry their own and do not need it.
        limits: Bounds; `None`: the defaults.

    Raises:
        AudioError: One of its kinds, here or while the blocks are read: a damaged file is known at its end.
    """
    limits = limits or AudioLimits()
    name = describe(source)
    if isinstance(source, dict):
        # An empty path beside the bytes is common in datasets: the bytes win.
        given = [source[key] for key in ("array", "bytes", "path") if source.get(key) is not None]
        if not given:
            raise AudioFormatError(
                f"The audio dictionary has the keys {sorted(map(str, source))}, all of them empty or unknown; "
                'expected {"bytes": ...}, {"path": ...} or {"array": ..., "sampling_rate": ...}. Fill one of them.'
            )
        source, sampling_rate = given[0], source.get("sampling_rate") or sampling_rate
        name = describe(source)
    if hasattr(source, "get_samples_played_in_range"):  # a decoded column of datasets (torchcodec's decoder)
        rate, blocks = check_rate(source.metadata.sample_rate, name), _torchcodec_blocks(source, name)
    elif isinstance(source, np.ndarray | torch.Tensor | list | tuple):
        rate = check_rate(sampling_rate, name)
        blocks = _waveform_blocks(_waveform(source, name), rate)
    elif isinstance(source, Iterator) and not hasattr(source, "read"):
        rate = check_rate(sampling_rate, name)
        blocks = (block for chunk in source for block in _waveform_blocks(_waveform(chunk, describe(chunk)), rate))
    else:
        rate, blocks = _open_file(source, name, limits)
    return resample_blocks(_mono_blocks(blocks, rate, name, limits), rate, name)


def _mono_blocks(blocks: Iterable[np.ndarray], rate: float, name: str, limits: AudioLimits) -> Iterator[np.ndarray]:
    """Count, mix and check: (n, C) of any type -> (n,) float32."""
    taken = 0
    for block in blocks:
        taken += len(block)
        limits.check_length(taken, block.shape[1], rate, name)
        with np.errstate(over="ignore", invalid="ignore"):  # what comes out is checked
            mono = _scaled(block, name).mean(axis=1, dtype=np.float32)
        if mono.size and not np.abs(mono).max() <= LOUDEST:
            bad = int(np.count_nonzero(~(np.abs(mono) <= LOUDEST)))
            raise AudioValueError(
                f"{name} has NaN, infinite or senseless values in {bad} of {len(mono)} samples up to second "
                f"{taken / rate:.1f}; expected finite ones, -1 to 1. Look for a division by zero where it was made."
            )
        if mono.size:
            yield mono
    if not taken:
        raise EmptyAudioError(f"{name} has no samples; expected at least one. Leave this recording out.")


# Waveforms


def _waveform(source: Any, name: str) -> np.ndarray:
    """A waveform given as (n,), (C, n) or (n, C): (n, C), the channels being the shorter axis."""
    try:
        if isinstance(source, torch.Tensor):
            source = source.detach().cpu()
            source = source.float() if source.is_floating_point() else source  # NumPy has no bfloat16
        samples = np.asarray(source)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise AudioFormatError(
            f"Given {name} of unequal lengths or without numbers ({str(error)[:100]}); expected an array of floats or "
            "integers. Pass one recording at a time."
        ) from error
    if samples.ndim == 1 or (samples.ndim == 2 and samples.size == 0):
        return samples.reshape(-1, 1)
    if samples.ndim != 2 or min(samples.shape) > MAX_CHANNELS:
        raise AudioFormatError(
            f"{name} holds samples of shape {samples.shape}; expected (n,), (channels, n) or (n, channels) "
            f"with at most {MAX_CHANNELS} channels. Pass several recordings as a list."
        )
    return samples if samples.shape[1] <= samples.shape[0] else samples.T


def _waveform_blocks(samples: np.ndarray, rate: float) -> Iterator[np.ndarray]:
    step = _step(samples.shape[1], rate)
    return (samples[start : start + step] for start in range(0, max(1, len(samples)), step))


def _step(channels: int, rate: float) -> int:
    """Samples of one channel in a block."""
    return max(1, min(BLOCK // channels, int(BLOCK_S * rate)))


def _scaled(samples: np.ndarray, name: str) -> np.ndarray:
    """Samples as float32; integers are divided by the range of their type."""
    if samples.dtype.kind == "f":
        return samples.astype(np.float32, copy=False)
    if samples.dtype == np.uint8:  # 8-bit WAV is the one unsigned format: silence at 128
        return (samples.astype(np.float32) - 128.0) / 128.0
    # 64-bit integers are what Python's numbers become: nobody records with their range.
    if samples.dtype.kind == "i" and samples.dtype.itemsize <= 4:
        return (samples / float(-int(np.iinfo(samples.dtype).min))).astype(np.float32)
    raise AudioFormatError(
        f"Given {name} of type {samples.dtype}; expected floats in -1..1 or integers of 8, 16 or 32 bits. "
        "Convert the samples."
    )


# Files


def _open_file(source: Any, name: str, limits: AudioLimits) -> tuple[float, Iterator[np.ndarray]]:
    """Rate and blocks (n, C) of an encoded recording."""
    try:
        import soundfile
    except Exception as error:
        raise AudioFormatError(
            f"Decoding {name} needs the package soundfile, which cannot be imported here ({error}); "
            "run `pip install soundfile`, or pass the decoded samples with sampling_rate=."
        ) from error
    with ExitStack() as opened:
        file = _file(source, name, limits)
        if file is not source:
            opened.callback(file.close)
        try:
            limits.check_size(file.seek(0, os.SEEK_END), name)
            file.seek(0)
        except OSError as error:
            raise AudioFormatError(f"{name} cannot be read ({error}); expected a file. Check it.") from error
        try:
            with _quiet_codec():
                reader = opened.enter_context(soundfile.SoundFile(file))
                position = file.tell()
                corrected = _with_length(file, reader.format)
                file.seek(position)  # where the reader takes it to be
                if corrected is not None:
                    opened.callback(corrected.close)
                    reader = opened.enter_context(soundfile.SoundFile(corrected))
        except Exception as error:
            decoder = _torchcodec_decoder(file, name, error)
            rate, blocks = check_rate(decoder.metadata.sample_rate, name), _torchcodec_blocks(decoder, name)
        else:
            if reader.channels > MAX_CHANNELS:
                raise AudioLimitError(
                    f"{name} has {reader.channels} channels; expected at most {MAX_CHANNELS}. Mix it down before."
                )
            rate = check_rate(reader.samplerate, name)
            if reader.frames != UNKNOWN_LENGTH:
                limits.check_length(reader.frames, reader.channels, rate, name)
            blocks = _file_blocks(reader, file, name)
        return rate, _then_close(blocks, opened.pop_all())


def _then_close(blocks: Iterator[np.ndarray], opened: ExitStack) -> Iterator[np.ndarray]:
    with opened:
        yield from blocks


def _file(source: Any, name: str, limits: AudioLimits) -> IO[bytes]:
    """A seekable binary file of what was given."""
    if isinstance(source, str) and source[:5].lower() == "data:":
        return io.BytesIO(decode_data_uri(source, name, limits))
    if isinstance(source, str) and is_url(source):
        path = file_url_path(source, name, limits)
        if path is None:
            return fetch(source, name, limits)
        source = path
    if isinstance(source, str | os.PathLike):
        if not os.path.isfile(source):
            raise AudioFormatError(
                f"{name} is not a file; expected a path, an http(s) URL or a data: URI. Check the path."
            )
        try:
            return open(source, "rb")
        except OSError as error:
            raise AudioFormatError(
                f"{name} cannot be opened ({error}); check the path and its permissions."
            ) from error
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    if not hasattr(source, "read"):
        raise AudioFormatError(
            f"Cannot read audio from {name}; expected a path, URL, bytes, file object, array or datasets audio value."
        )
    return _seekable(source, name, limits)


def _seekable(source: Any, name: str, limits: AudioLimits) -> IO[bytes]:
    """A file object as it is, or what is left of it copied to a temporary file."""
    try:
        if not isinstance(source.read(0), bytes):
            raise AudioFormatError(f"{name} yields text; expected bytes. Open it in binary mode ('rb').")
        if isinstance(source, io.IOBase) and source.seekable() and source.tell() == 0:
            return source  # type: ignore[return-value]
        copy = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)
        size = 0
        while chunk := source.read(CHUNK):
            size += copy.write(chunk)
            limits.check_size(size, name)
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, AudioError):
            raise
        raise AudioFormatError(f"{name} cannot be read ({error}); expected an open binary file.") from error
    return copy  # type: ignore[return-value]


def _with_length(file: IO[bytes], kind: str) -> IO[bytes] | None:
    """A copy that announces its length, of a file that libsndfile would read only in part; `None` for others."""
    if kind == "MP3":
        head, start = xing_frame(file)
        return _copy(file, head, start) if head else None
    if kind in ("WAV", "WAVEX"):  # from a pipe it may announce no samples, and libsndfile believes it
        file.seek(0)
        whole, announced = wav_data(file)
        start, size = file.tell(), file.seek(0, os.SEEK_END)
        closed = start < 8 + whole <= size  # then the samples are indeed none, and other chunks follow
        if not announced and start < size and not closed:
            copy = _copy(file, b"", 0)
            copy.seek(start - 4)
            copy.write(b"\xff" * 4)
            copy.seek(0)
            return copy
    return None


def _copy(file: IO[bytes], head: bytes, start: int) -> IO[bytes]:
    """`head` and what the file holds from `start` on, as a temporary file."""
    copy = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)
    copy.write(head)
    file.seek(start)
    while chunk := file.read(CHUNK):
        copy.write(chunk)
    copy.seek(0)
    return copy  # type: ignore[return-value]


def _file_blocks(reader: Any, file: IO[bytes], name: str) -> Iterator[np.ndarray]:
    """Decode block by block, (n, C) float32, and find out at the end whether it is the end."""
    announced, rate, kind = reader.frames, reader.samplerate, reader.format
    # soundfile would seek after every block, which spoils the next one of an MP3.
    reader.seekable = lambda: False
    step, taken, reason = _step(reader.channels, rate), 0, ""
    while taken < announced:  # some decoders stumble over what stands behind the recording
        try:
            with _quiet_codec(kind == "MP3"):
                block = reader.read(min(step, announced - taken), dtype="float32", always_2d=True)
        except Exception as error:
            reason = f"the decoder stops there ({error})"
            break
        if not len(block):
            break
        taken += len(block)
        yield block
    # Encoders of MP3 do not agree on whether the header is a frame: one more is allowed.
    allowed = max(announced // 100, MP3_FRAME) if kind == "MP3" else 0
    if announced != UNKNOWN_LENGTH and announced - taken > allowed:
        reason = reason or f"its header announces {announced}"
    reason = reason or truncation(file, kind)
    if reason:
        raise TruncatedAudioError(
            f"{name} ends after {taken} samples, {taken / rate:.1f} s: {reason}; expected all of it. "
            "The file is cut off or damaged: fetch or encode it again."
        )


@contextmanager
def _quiet_codec(active: bool = True) -> Iterator[None]:
    """Keep libmpg123 from reporting damaged frames on C's standard error: the caller gets an error.

    C's stream is led nowhere, not file descriptor 2: what Python's threads write meanwhile is still heard.
    """
    global _quiet_depth
    streams = _c_streams() if active else None
    if streams is None:
        yield
        return
    current, nowhere, original = streams
    with _quiet_lock:
        _quiet_depth += 1
        current.value = nowhere
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_depth -= 1
            if not _quiet_depth:
                current.value = original


@cache
def _c_streams() -> tuple[ctypes.c_void_p, int, int] | None:
    """C's variable `stderr`, a stream that leads nowhere and the one of the process; `None` where C is not glibc."""
    try:
        libc = ctypes.CDLL(None)
        libc.fopen.restype = ctypes.c_void_p
        original = ctypes.addressof(ctypes.c_char.in_dll(libc, "_IO_2_1_stderr_"))
        current, nowhere = ctypes.c_void_p.in_dll(libc, "stderr"), libc.fopen(os.devnull.encode(), b"w")
    except (OSError, ValueError, AttributeError):
        return None
    return (current, nowhere, original) if nowhere else None


def _torchcodec_decoder(file: IO[bytes], name: str, reason: Exception) -> Any:
    """A decoder of containers that libsndfile does not know, for which it gave `reason`."""
    file.seek(0)
    known = CONTAINERS.match(file.read(16))
    file.seek(0)
    message = str(reason).replace(repr(file), "it")
    if known:
        try:
            from torchcodec.decoders import AudioDecoder

            return AudioDecoder(file)
        except Exception as error:  # FFmpeg's libraries are looked for when it is imported
            message = f"torchcodec: {str(error).strip()[:100]}"
    raise AudioFormatError(
        f"{name} cannot be decoded ({message}); expected WAV, FLAC, OGG or MP3. "
        + ("For this container install FFmpeg and `pip install torchcodec`, or convert" if known else "Convert")
        + " it, e.g. `ffmpeg -i INPUT OUTPUT.wav`."
    ) from reason


def _torchcodec_blocks(decoder: Any, name: str) -> Iterator[np.ndarray]:
    """Blocks (n, C) of a torchcodec decoder."""
    start = decoder.metadata.begin_stream_seconds or 0.0
    while True:
        try:
            samples = decoder.get_samples_played_in_range(start, start + TORCHCODEC_STEP_S).data  # (C, n)
        except RuntimeError as error:
            if "No audio frames" in str(error):  # its way to say that this is the end
                return
            raise TruncatedAudioError(
                f"{name} cannot be decoded beyond second {start:.1f} ({str(error).strip()[:200]}); expected all of "
                "it. The file is damaged: fetch or encode it again."
            ) from error
        if not samples.shape[1]:
            return
        yield samples.numpy().T
        start += TORCHCODEC_STEP_S
