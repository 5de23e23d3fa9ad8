"""The trained tiny model and synthesized speech for it."""

import functools
import random

import numpy as np
import pytest
import torch

from soundwave import SoundwaveForConditionalGeneration, SoundwaveProcessor
from soundwave.assets import TINY
from soundwave.training.tiny.utterances import Job, Spoken, speak


@functools.cache
def trained() -> tuple[SoundwaveForConditionalGeneration, SoundwaveProcessor]:
    """The model that comes with the package, fp32. Copy it before changing it."""
    model = SoundwaveForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    return model, SoundwaveProcessor.from_pretrained(TINY)


def say(*parts: str, voice: str = "en-us+m4", seed: int = 0) -> Spoken:
    """Sentences in a voice that the model never heard, with pauses between them."""
    pytest.importorskip("espeakng_loader", reason="speech is synthesized with espeak-ng")
    return speak(Job(f"spoken-{seed}", parts, voice, seed, training=False))


def sentences(count: int, seed: int) -> list[str]:
    """Held-out sentences of the grammar."""
    from soundwave.training.tiny.grammar import draw_split

    return [sentence.text for sentence in draw_split(random.Random(seed), "test", count, distinct=True)]


def speech(seconds: float, seed: int = 0) -> np.ndarray:
    """Held-out sentences one after the other, (n,) at 16 kHz: at least so many seconds of them, then cut."""
    said, length = [], 0
    for index, text in enumerate(sentences(int(seconds) + 2, seed)):
        said.append(say(text, seed=seed + index).samples)
        length += len(said[-1])
        if length >= seconds * 16_000:
            break
    return np.concatenate(said)[: round(seconds * 16_000)]
