"""The library's any-to-any pipeline over a saved model: what it answers is what `generate` answers."""

import numpy as np
import pytest
from transformers import pipeline

QUESTION = "What is said?"
NEW_TOKENS = 4


@pytest.fixture(scope="module")
def pipe(tiny_model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return pipeline("any-to-any", model=str(folder), trust_remote_code=True)


@pytest.fixture(scope="module")
def waveform() -> np.ndarray:
    return (0.1 * np.random.default_rng(0).standard_normal(20_000)).astype(np.float32)


def messages(waveform: np.ndarray) -> list[dict]:
    audio = {"type": "audio", "audio": waveform, "sampling_rate": 16_000}
    return [{"role": "user", "content": [audio, {"type": "text", "text": QUESTION}]}]


@pytest.fixture(scope="module")
def expected(tiny_model, processor, waveform) -> str:
    inputs = processor.apply_chat_template(messages(waveform))
    ids = tiny_model.generate(**inputs, max_new_tokens=NEW_TOKENS)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_chat(pipe, waveform, expected):
    answer = pipe(text=messages(waveform), max_new_tokens=NEW_TOKENS)
    assert answer[0]["generated_text"][-1] == {"role": "assistant", "content": expected}


def test_text_and_audio(pipe, processor, waveform, expected):
    text = processor.apply_chat_template(messages(waveform), tokenize=False)
    answer = pipe(text=text, audio=waveform, sampling_rate=16_000, max_new_tokens=NEW_TOKENS, return_full_text=False)
    assert answer[0]["generated_text"] == expected
