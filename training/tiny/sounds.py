"""Four sounds made with numpy: laughter, a cough, a sigh and a whistle, as float32 samples at 16 kHz."""

from collections.abc import Callable

import numpy as np

SAMPLING_RATE = 16_000  # Hz


def _noise_band(rng: np.random.Generator, length: int, low_hz: float, high_hz: float) -> np.ndarray:
    """Return white noise between two frequencies, (n,), with a peak of one."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    frequencies = np.fft.rfftfreq(length, 1 / SAMPLING_RATE)
    spectrum[(frequencies < low_hz) | (frequencies > high_hz)] = 0
    band = np.fft.irfft(spectrum, length)
    return band / (np.abs(band).max() + 1e-9)


def _hump(length: int, power: float = 1.0) -> np.ndarray:
    """Return a half sine, (n,); clipped, as a power of sin(pi) = -1e-16 would be NaN."""
    return np.clip(np.sin(np.linspace(0, np.pi, length)), 0, None) ** power


def laughter(rng: np.random.Generator) -> np.ndarray:
    """Return a row of short voiced bursts that fall in pitch."""
    pitch, bursts = rng.uniform(160, 330), int(rng.integers(3, 6))
    parts = []
    for index in range(bursts):
        n = int(rng.uniform(0.07, 0.1) * SAMPLING_RATE)
        t = np.arange(n) / SAMPLING_RATE
        tone = sum(np.sin(2 * np.pi * pitch * (0.94**index) * h * t + h) / h for h in range(1, 9))
        burst = (0.25 * tone + 0.3 * _noise_band(rng, n, 400, 3000)) * _hump(n, 0.7)
        parts += [burst, np.zeros(int(rng.uniform(0.03, 0.05) * SAMPLING_RATE))]
    return np.concatenate(parts)


def cough(rng: np.random.Generator) -> np.ndarray:
    """Return one or two bursts of noise with a sharp start."""
    parts = []
    for _ in range(int(rng.integers(1, 3))):
        n = int(rng.uniform(0.15, 0.24) * SAMPLING_RATE)
        decay = np.exp(-np.linspace(0, rng.uniform(4, 7), n))
        parts += [_noise_band(rng, n, 250, rng.uniform(3000, 5500)) * decay, np.zeros(SAMPLING_RATE // 20)]
    return np.concatenate(parts)


def sigh(rng: np.random.Generator) -> np.ndarray:
    """Return a long soft breath that swells and fades."""
    n = int(rng.uniform(0.45, 0.65) * SAMPLING_RATE)
    return 0.5 * _noise_band(rng, n, 250, rng.uniform(1200, 2200)) * _hump(n, 1.5)


def whistle(rng: np.random.Generator) -> np.ndarray:
    """Return a pure tone that glides from one pitch to another."""
    n = int(rng.uniform(0.4, 0.6) * SAMPLING_RATE)
    pitch = np.linspace(rng.uniform(900, 1900), rng.uniform(900, 1900), n)
    return 0.5 * np.sin(2 * np.pi * np.cumsum(pitch) / SAMPLING_RATE) * _hump(n, 0.5)


SOUNDS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "laughter": laughter,
    "cough": cough,
    "sigh": sigh,
    "whistle": whistle,
}


def make_sound(name: str, rng: np.random.Generator) -> np.ndarray:
    """Return one sound, (n,) float32, at a random level.

    Raises:
        ValueError: if there is no sound of that name.
    """
    if name not in SOUNDS:
        raise ValueError(f"no sound is called {name!r}; there are {', '.join(SOUNDS)}")
    return (SOUNDS[name](rng) * rng.uniform(0.25, 0.8)).astype(np.float32)
