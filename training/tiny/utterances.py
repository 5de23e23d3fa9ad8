"""One utterance from its parts: sentences in one voice, pauses, sounds, a channel and noise; a label per frame."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from soundwave.training.tiny.sounds import SAMPLING_RATE, SOUNDS, make_sound
from soundwave.training.tiny.synthesizer import SYNTHESIZER_RATE, synthesizer

FRAME = 320  # samples of an encoder frame, 20 ms
CLIP = 640  # samples of an aligned frame, 40 ms: clips are padded to a multiple of it before the log-mel
SILENCE = "sil"


@dataclass(frozen=True)
class Job:
    """What to say and how: `parts` are sentences and `<sound>` labels in order; the rest follows from `seed`."""

    id: str
    parts: tuple[str, ...]
    voice: str
    seed: int
    training: bool = True

    @property
    def transcript(self) -> str:
        """What is heard, with sounds as labels."""
        return " ".join(self.parts)


@dataclass(frozen=True)
class Spoken:
    """Samples (n,) float32 at 16 kHz, and (start, name) of phonemes and words in seconds; sounds are in both."""

    samples: np.ndarray
    phonemes: list[tuple[float, str]]
    words: list[tuple[float, str]]


def speak(job: Job) -> Spoken:
    """Return the utterance of a job. Training utterances vary in formants (resampling) and channel as well."""
    rng = np.random.default_rng(job.seed)
    rate, pitch, pitch_range = int(rng.integers(160, 236)), int(rng.integers(35, 66)), int(rng.integers(30, 71))
    shift = rng.uniform(0.92, 1.09) if job.training and rng.random() < 0.5 else 1.0
    gain = rng.uniform(0.3, 0.9)
    pieces: list[np.ndarray] = []
    phonemes: list[tuple[float, str]] = [(0.0, SILENCE)]
    words: list[tuple[float, str]] = [(0.0, SILENCE)]
    length = 0

    def pause(shortest: float, longest: float) -> None:
        nonlocal length
        pieces.append(np.zeros(int(rng.uniform(shortest, longest) * SAMPLING_RATE), np.float32))
        length += len(pieces[-1])

    pause(0.0, 0.15)
    for index, part in enumerate(job.parts):
        start = length / SAMPLING_RATE
        if part.startswith("<"):
            piece = make_sound(part[1:-1], rng)
            phonemes.append((start, part))
            words.append((start, part))
        else:
            spoken = synthesizer().speak(part, job.voice, rate, pitch, pitch_range)
            piece = gain * _resample(spoken.samples, SYNTHESIZER_RATE * shift)
            phonemes += [(start + t / shift, name or SILENCE) for t, name in spoken.phonemes]
            words += [(start + t / shift, word) for t, word in spoken.words]
            # Speech ends with its last phoneme event (an unnamed one); words have no end of their own.
            words.append((phonemes[-1][0], SILENCE))
        pieces.append(piece)
        length += len(piece)
        phonemes.append((length / SAMPLING_RATE, SILENCE))
        words.append((length / SAMPLING_RATE, SILENCE))
        if index + 1 < len(job.parts):
            pause(0.05, 0.2) if "<" in part + job.parts[index + 1] else pause(0.15, 0.6)
    pause(0.0, 0.15)
    samples = np.concatenate(pieces)
    if job.training and rng.random() < 0.5:
        samples[1:] += rng.uniform(-0.35, 0.35) * samples[:-1]  # a duller or a brighter microphone
    noise = np.exp(rng.uniform(np.log(1e-4), np.log(5e-3)))
    samples = samples + noise * rng.standard_normal(length).astype(np.float32)
    return Spoken(np.clip(samples, -1, 1), phonemes, words)


def _resample(samples: np.ndarray, rate: float) -> np.ndarray:
    import soxr

    return soxr.resample(samples, rate, SAMPLING_RATE, quality="LQ")


def frame_count(samples: int) -> int:
    """Return the encoder frames E of a clip: two for every 640 samples begun."""
    return 2 * -(-samples // CLIP)


def frame_names(segments: list[tuple[float, str]], frames: int) -> list[str]:
    """Return the name of each frame: that of the last segment begun at its centre."""
    starts = np.array([start for start, _ in segments])
    centres = (np.arange(frames) + 0.5) * FRAME / SAMPLING_RATE
    order = np.searchsorted(starts, centres, side="right") - 1
    return [segments[max(index, 0)][1] for index in order]


def write_utterance(job: Job, folder: Path) -> tuple[str, int, list[str], list[str]]:
    """Write the WAV file of a job; return its id, samples, and the phoneme and word of each encoder frame."""
    import soundfile

    spoken = speak(job)
    soundfile.write(folder / f"{job.id}.wav", spoken.samples, SAMPLING_RATE, subtype="PCM_16")
    frames = frame_count(len(spoken.samples))
    return job.id, len(spoken.samples), frame_names(spoken.phonemes, frames), frame_names(spoken.words, frames)


def sound_label(name: str) -> str:
    """Return how a sound is written in a transcript."""
    return f"<{name}>"


SOUND_LABELS = tuple(sound_label(name) for name in SOUNDS)
