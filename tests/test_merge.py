"""A standalone folder answers as the stage did, and its LLM stands alone."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from soundwave import SoundwaveForConditionalGeneration, SoundwaveProcessor
from soundwave.apps.merge import merge
from tests.conftest import tone
from tests.test_loading import inject_lora, names


def test_merged_model_answers_alike(tmp_path, tiny_model, processor):
    model = SoundwaveForConditionalGeneration(tiny_model.config)
    model.load_state_dict(tiny_model.state_dict())
    model.eval()
    inject_lora(model)
    model.save_pretrained(tmp_path / "stage")
    processor.save_pretrained(tmp_path / "stage")
    folder = merge(str(tmp_path / "stage"), tmp_path / "merged")
    assert not any("lora_" in name for name in names(folder))
    inputs = SoundwaveProcessor.from_pretrained(folder)(audio=tone(1.0), sampling_rate=16_000)
    merged = SoundwaveForConditionalGeneration.from_pretrained(folder)
    torch.testing.assert_close(merged(**inputs).logits, model(**inputs).logits, atol=1e-4, rtol=1e-4)

    llm = AutoModelForCausalLM.from_pretrained(folder / "language_model")
    ids = AutoTokenizer.from_pretrained(folder / "language_model")("hello", return_tensors="pt").input_ids
    torch.testing.assert_close(llm(ids).logits, merged.language_model(ids).logits)
    with pytest.raises(ValueError, match="not empty"):
        merge(str(tmp_path / "stage"), tmp_path / "merged")
