"""Tones, noise and encoded recordings for the tests of audio."""

import io

import numpy as np
import soundfile
import torch

from soundwave.processing import SAMPLING_RATE


def tone(seconds: float, rate: int = SAMPLING_RATE, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def peak_hertz(waveform: np.ndarray) -> float:
    return float(np.argmax(np.abs(np.fft.rfft(waveform))) * SAMPLING_RATE / len(waveform))


def encoded(waveform: np.ndarray, rate: int = SAMPLING_RATE, **kwargs) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, waveform, rate, **{"format": "WAV", **kwargs})
    return file.getvalue()


class Decoder:
    """What a decoded column of `datasets` yields: torchcodec's decoder."""

    begin_stream_seconds, sample_rate = 0.0, SAMPLING_RATE

    def __init__(self, waveform: np.ndarray):
        self.metadata, self.data = self, torch.from_numpy(waveform)[None]

    def get_samples_played_in_range(self, start: float, stop: float):
        data = self.data[:, round(start * SAMPLING_RATE) : round(stop * SAMPLING_RATE)]
        if not data.shape[1]:
            raise RuntimeError("No audio frames were decoded.")
        return Decoder(data[0].numpy())
