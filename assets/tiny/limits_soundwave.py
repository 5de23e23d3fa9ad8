"""What may be wrong with a recording, one exception for each kind, and the bounds of what is read."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


class AudioError(ValueError):
    """A recording that cannot be used: says what was given, what is expected and what to do."""


class EmptyAudioError(AudioError):
    """A recording without a single sample."""


class AudioValueError(AudioError):
    """Samples that are not finite, or so large that they cannot be sound."""


class TruncatedAudioError(AudioError):
    """A file that ends, or breaks off, before the end that it announces."""


class AudioFormatError(AudioError):
    """Not a recording, one in a container that cannot be decoded here, or a waveform of the wrong type or shape."""


class SamplingRateError(AudioError):
    """A sampling rate that is missing or impossible."""


class AudioLimitError(AudioError):
    """A recording beyond one of the `AudioLimits`."""


class AudioFetchError(AudioError):
    """A URL that is refused or cannot be fetched."""


@dataclass(frozen=True)
class AudioLimits:
    """Bounds of one recording, checked while it is read: what a header announces may be a lie.

    Args:
        max_duration_s: Longest recording in seconds. `load_audio` holds 64 kB per second of it, 2.8 GB for 12 hours;
            streams hold some megabytes whatever the length.
        max_decoded_bytes: Largest total of decoded float32 samples, all channels, in bytes: 12 hours of 48 kHz stereo.
            They are never held at once; this bounds the work a small compressed file can cause.
        max_file_bytes: Largest file in bytes.
        max_download_bytes: Largest file behind a URL in bytes.
        download_timeout_s: Longest time in seconds that a download may take as a whole.
        allow_file_urls: Whether `file:` URLs are read. Plain paths always are.
        allow_private_addresses: Whether URLs may lead to this machine or its private network.
    """

    max_duration_s: float = 12 * 3600.0
    max_decoded_bytes: int = 16 * 2**30
    max_file_bytes: int = 8 * 2**30
    max_download_bytes: int = 512 * 2**20
    download_timeout_s: float = 300.0
    allow_file_urls: bool = False
    allow_private_addresses: bool = False

    def check_size(self, size: int, name: str) -> None:
        """Raise `AudioLimitError` for a file of more than `max_file_bytes`."""
        if size > self.max_file_bytes:
            raise AudioLimitError(
                f"{name} has {size} bytes; expected at most {self.max_file_bytes}. "
                "Cut it, or raise AudioLimits.max_file_bytes."
            )

    def check_length(self, frames: int, channels: int, rate: float, name: str) -> None:
        """Raise `AudioLimitError` for more sound than `max_duration_s` or `max_decoded_bytes`."""
        if frames > self.max_duration_s * rate:
            raise AudioLimitError(
                f"{name} lasts {frames / rate:.1f} s or more; expected at most {self.max_duration_s:g} s. "
                "Cut it, or raise AudioLimits.max_duration_s."
            )
        decoded = frames * channels * np.dtype(np.float32).itemsize
        if decoded > self.max_decoded_bytes:
            raise AudioLimitError(
                f"{name} decodes to {decoded} bytes of samples or more; expected at most {self.max_decoded_bytes}. "
                "Cut it, lower its rate, or raise AudioLimits.max_decoded_bytes."
            )


def describe(source: Any) -> str:
    """A short name of a recording for messages."""
    if isinstance(source, np.ndarray | torch.Tensor):
        return f"a {type(source).__name__} of shape {tuple(source.shape)} and type {source.dtype}"
    if isinstance(source, list | tuple):
        return f"a {type(source).__name__} of {len(source)} values"
    if isinstance(source, bytes | bytearray | memoryview):
        return f"a recording of {memoryview(source).nbytes} bytes"
    if isinstance(source, str | os.PathLike):
        text = os.fsdecode(source).encode(errors="backslashreplace").decode()  # printable, lone surrogates too
        return f"'{text if len(text) <= 120 else text[:100] + '...'}'"
    return f"a {type(source).__name__}"
