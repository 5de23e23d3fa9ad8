"""Recorded clips made into utterances: read, trimmed, augmented and strung together, with the times of what is heard.

Waveforms are float32 (n,) mono at 16 kHz everywhere; every function that draws at random takes the generator.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from soundwave.training.tiny.manifest import Clip
from soundwave.training.tiny.sounds import SAMPLING_RATE
from soundwave.training.tiny.utterances import SILENCE, Spoken, sound_label

TRIM_FRAME = 160  # samples per energy frame: 10 ms
TRIM_FLOOR_DB = -38.0  # a frame this far below the loudest one is outside the word
SOUND_FLOOR_DB = 30.0  # below the loudest frame of a sound it is not heard
LEVEL_DB = -23.0  # of words and sounds, before everything is brought to one level
TRIM_MARGIN = 2  # frames kept around a trimmed word: stops and fricatives begin below the floor

# Sounds of the words that labelled collections of single words nearly always hold, in the symbols that the synthesizer
# gives them in American English: recorded and synthesized speech share their frame classes.
PRONUNCIATIONS = {
    "zero": "z iə ɹ oʊ",
    "one": "w ʌ n",
    "two": "t u",
    "three": "θ ɹ i",
    "four": "f ɔɹ",
    "five": "f aɪ v",
    "six": "s ɪ k s",
    "seven": "s ɛ v ə n",
    "eight": "eɪ t",
    "nine": "n aɪ n",
    "yes": "j ɛ s",
    "no": "n oʊ",
}
VOWEL = re.compile(r"[aeiouæɑɒɔəɚɛɜɪʊʌ]")
VOWEL_WEIGHT = 2.0  # a vowel lasts about twice as long as a consonant

Event = tuple[float, str]  # start in seconds, name


@dataclass(frozen=True)
class Augmentation:
    """How far recordings are bent, so that a few speakers and microphones sound like many."""

    speed: tuple[float, float] = (0.88, 1.14)  # resampling: tempo, pitch and formants together, one per utterance
    word_speed: float = 0.03  # +- on top of it, per word
    level_db: float = 4.0  # +- per word
    equalizer_db: float = 5.0  # +- of a random smooth frequency curve
    band_probability: float = 0.2  # of a telephone band
    echo_probability: float = 0.1
    noise_db: tuple[float, float] = (20.0, 50.0)  # signal to noise


def symbols(word: str) -> list[str]:
    """Speech sounds of a word in order; letters stand in for the sounds of a word that is not in the table."""
    known = PRONUNCIATIONS.get(word.lower())
    return known.split() if known else [c for c in word.lower() if c.isalpha()]


def read_clip(path: Path) -> np.ndarray:
    """Waveform (n,) of any sound file: mixed to mono, resampled to 16 kHz."""
    wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    mono = wave.mean(axis=1)
    return mono if rate == SAMPLING_RATE else soxr.resample(mono, rate, SAMPLING_RATE).astype(np.float32)


def frame_energy_db(wave: np.ndarray) -> np.ndarray:
    """Energy (n // 160,) in dB of each 10 ms frame."""
    frames = wave[: len(wave) // TRIM_FRAME * TRIM_FRAME].reshape(-1, TRIM_FRAME)
    return 10 * np.log10((frames.astype(np.float64) ** 2).mean(axis=1) + 1e-10)


def trim(wave: np.ndarray) -> np.ndarray:
    """The waveform without the quiet at its two ends."""
    energy = frame_energy_db(wave)
    if len(energy) == 0:
        return wave
    loud = np.flatnonzero(energy > energy.max() + TRIM_FLOOR_DB)
    return wave[max(loud[0] - TRIM_MARGIN, 0) * TRIM_FRAME : (loud[-1] + 1 + TRIM_MARGIN) * TRIM_FRAME]


def crop_sound(wave: np.ndarray, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """A stretch of about `seconds` in which something is heard: collections pad short sounds with silence."""
    n = int(seconds * SAMPLING_RATE)
    if len(wave) <= n:
        return wave
    energy = frame_energy_db(wave)
    loud = np.flatnonzero(energy > energy.max() - 20.0)
    centre = int(rng.choice(loud)) * TRIM_FRAME
    start = int(np.clip(centre - rng.integers(n // 4, 3 * n // 4 + 1), 0, len(wave) - n))
    return wave[start : start + n]


def change_speed(wave: np.ndarray, factor: float) -> np.ndarray:
    """The waveform played `factor` times as fast: higher and shorter above one, lower and longer below."""
    if abs(factor - 1) < 1e-3 or len(wave) == 0:
        return wave
    return soxr.resample(wave, SAMPLING_RATE * factor, SAMPLING_RATE, quality="LQ").astype(np.float32)


def to_level(wave: np.ndarray, level_db: float, loudest: bool = False) -> np.ndarray:
    """The waveform at a mean level in dB below full scale; digital silence stays as it is.

    `loudest` measures the loudest quarter alone: a single bark in quiet would otherwise be raised far above speech.
    """
    energy = np.sort(frame_energy_db(wave))
    if loudest:
        energy = energy[-max(len(energy) // 4, 1) :]
    if len(energy) == 0 or energy[-1] < -90:
        return wave
    mean_db = 10 * np.log10((10 ** (energy / 10)).mean())
    return (wave * 10 ** ((level_db - mean_db) / 20)).astype(np.float32)


def spread(word: str, start: float, end: float) -> list[Event]:
    """The sounds of a word laid evenly over its recording, vowels longer: [(start, symbol), ...]."""
    sounds = symbols(word)
    weights = np.array([VOWEL_WEIGHT if VOWEL.search(s) else 1.0 for s in sounds])
    edges = start + (end - start) * np.concatenate([[0.0], np.cumsum(weights) / max(weights.sum(), 1e-9)])
    return [(float(edge), name) for edge, name in zip(edges, sounds, strict=False)]


def heard_parts(wave: np.ndarray, label: str, start: float) -> list[Event]:
    """Where in a crop a sound is heard; its quiet parts (between two barks) are events without a name: not known."""
    energy = frame_energy_db(wave)
    if len(energy) == 0:
        return []
    loud = energy > energy.max() - SOUND_FLOOR_DB
    # Shorter gaps than 100 ms belong to the sound.
    loud = np.convolve(loud, np.ones(11), mode="same") > 0
    turns = np.flatnonzero(np.diff(loud.astype(int), prepend=-1))
    return [(start + int(i) * TRIM_FRAME / SAMPLING_RATE, label if loud[i] else "") for i in turns]


def string_together(
    pieces: Sequence[tuple[Clip, np.ndarray]],
    rng: np.random.Generator,
    augmentation: Augmentation | None = None,
    pause: tuple[float, float] = (0.04, 0.35),
) -> Spoken:
    """One utterance of several clips, and when what is heard in it.

    Args:
        pieces: The clips in the order they are heard, each with its trimmed or cropped waveform.
        rng: Draws pauses, levels and everything of `augmentation`.
        augmentation: `None` leaves the recordings as they are, except for pauses and levels (tests).
        pause: Seconds between two clips.
    """
    speed = float(rng.uniform(*augmentation.speed)) if augmentation else 1.0
    parts: list[np.ndarray] = []
    phonemes: list[Event] = [(0.0, SILENCE)]
    words: list[Event] = [(0.0, SILENCE)]
    n = 0

    def quiet(shortest: float, longest: float) -> None:
        nonlocal n
        parts.append(np.zeros(int(rng.uniform(shortest, longest) * SAMPLING_RATE), np.float32))
        n += len(parts[-1])

    quiet(0.02, 0.25)
    for i, (clip, wave) in enumerate(pieces):
        level = LEVEL_DB + float(rng.uniform(-3.0, 3.0))
        if augmentation:
            wave = change_speed(wave, speed * float(1 + rng.uniform(-1, 1) * augmentation.word_speed))
            level += float(rng.uniform(-augmentation.level_db, augmentation.level_db))
        begin, end = n / SAMPLING_RATE, (n + len(wave)) / SAMPLING_RATE
        if clip.kind == "sound":
            wave = to_level(wave, level, loudest=True)
            heard = heard_parts(wave, label_of(clip.text), begin)
            phonemes += heard
            words += heard
        else:
            wave = to_level(wave, level)
            phonemes += spread(clip.text, begin, end)
            words.append((begin, clip.text))
        phonemes.append((end, SILENCE))
        words.append((end, SILENCE))
        parts.append(wave)
        n += len(wave)
        quiet(*((0.02, 0.2) if i == len(pieces) - 1 else pause))
    samples = np.concatenate(parts)
    if augmentation:
        samples = augment(samples, rng, augmentation)
    else:
        samples = samples + 1e-4 * rng.standard_normal(n).astype(np.float32)
    return Spoken(limit(samples), phonemes, words)


def label_of(sound: str) -> str:
    """How a sound is written in a transcript, as one word: `dog barking` -> `<dog_barking>`."""
    return sound_label(re.sub(r"[^a-z]+", "_", sound.lower()).strip("_"))


def limit(wave: np.ndarray) -> np.ndarray:
    """The waveform turned down where it would be clipped."""
    return (wave * min(1.0, 0.98 / max(float(np.abs(wave).max()), 1e-9))).astype(np.float32)


def augment(wave: np.ndarray, rng: np.random.Generator, settings: Augmentation) -> np.ndarray:
    """The waveform through another room, microphone and line: echo, equalizer, telephone band, noise and level."""
    # Padded to a multiple of 4096: the transform of a length with a large prime factor is many times slower.
    n = -(-(len(wave) + SAMPLING_RATE // 4) // 4096) * 4096
    spectrum = np.fft.rfft(wave, n)
    frequency = np.fft.rfftfreq(n, 1 / SAMPLING_RATE)
    octave = np.log2(np.maximum(frequency, 60.0) / 60.0)  # 0 at 60 Hz, 7.06 at 8 kHz
    knots = rng.uniform(-settings.equalizer_db, settings.equalizer_db, 7)
    gain = 10 ** (np.interp(octave, np.linspace(0, octave[-1], 7), knots) / 20)
    if rng.random() < settings.band_probability:
        low, high = rng.uniform(150, 350), rng.uniform(2900, 3800)
        gain = gain / np.sqrt(1 + (low / np.maximum(frequency, 1.0)) ** 6) / np.sqrt(1 + (frequency / high) ** 16)
    spectrum = spectrum * gain
    if rng.random() < settings.echo_probability:
        tail = int(0.25 * SAMPLING_RATE)
        decay = np.exp(-np.arange(tail) / (rng.uniform(0.02, 0.08) * SAMPLING_RATE))
        response = rng.normal(0.0, 1.0, tail) * decay
        response *= rng.uniform(0.15, 0.6) / np.sqrt((response**2).sum())
        response[0] = 1.0
        spectrum = spectrum * np.fft.rfft(response, n)
    out = np.fft.irfft(spectrum, n)[: len(wave)]
    rms = np.sqrt((out**2).mean()) + 1e-9
    noise = rng.normal(0.0, 1.0, len(wave) + 1)
    colour = rng.uniform(0.0, 0.95)  # 0: white; towards 1: fewer high frequencies
    noise = noise[1:] + colour * noise[:-1]
    out = out + noise * (rms / noise.std() * 10 ** (-rng.uniform(*settings.noise_db) / 20))
    return to_level(out.astype(np.float32), float(rng.uniform(-33.0, -17.0)))
