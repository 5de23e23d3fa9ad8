"""A processor per LLM family of `tests/tokenizers.py`, with windows of 2 s, and messages to give them."""

import numpy as np
from transformers import WhisperFeatureExtractor

from soundwave.processing import SAMPLING_RATE, SoundwaveProcessor
from tests.tokenizers import FAMILIES, make_tokenizer

ANSWER = "the red boxes"
USER = {"role": "user", "content": "What is said?"}
ASSISTANT = {"role": "assistant", "content": ANSWER}


def make_processor(family: str, **fields) -> SoundwaveProcessor:
    return SoundwaveProcessor(WhisperFeatureExtractor(chunk_length=2), make_tokenizer(family), **fields)


# What a template writes behind an answer, up to its last control token.
CLOSINGS = {
    "llama3": ["<|eot_id|>"],
    "qwen3": ["<|im_end|>"],
    "gemma": ["<end_of_turn>"],
    "mistral": ["</s>"],
    "phi3": ["<|end|>", "\n", "<|endoftext|>"],
    "words": ["<eot>"],
}
PROCESSORS = {family: make_processor(family) for family in FAMILIES}


def closing_ids(processor: SoundwaveProcessor) -> list[int]:
    family = next(family for family, known in PROCESSORS.items() if known.chat_template == processor.chat_template)
    return [processor.tokenizer.encode(name, add_special_tokens=False)[0] for name in CLOSINGS[family]]


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def audio_item(samples: int = 8000, seed: int = 0) -> dict:
    return {"type": "audio", "audio": noise(samples, seed), "sampling_rate": SAMPLING_RATE}


def user(*items) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": x} if isinstance(x, str) else x for x in items]}
