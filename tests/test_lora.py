"""LoRA on the LLM: injected, saved under plain names, merged or taken up again."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from soundwave import SoundwaveForConditionalGeneration
from soundwave.training.lora import add_lora, is_lora, restore_lora
from soundwave.training.stages import ConfigError

TARGETS = ["q_proj", "v_proj"]


@pytest.fixture
def model(tiny_model):
    """A model with a LoRA that changes something."""
    model = copy.deepcopy(tiny_model)
    add_lora(model, 4, 8, TARGETS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_lora(name):
                parameter.normal_(std=0.2)
    return model.eval()


def logits(model):
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def test_a_new_lora_changes_nothing_and_is_noted(tiny_model):
    model = copy.deepcopy(tiny_model)
    add_lora(model, 4, 8, TARGETS)
    assert torch.equal(logits(model), logits(tiny_model))
    assert model.config.lora == {"r": 4, "alpha": 8, "target_modules": TARGETS}
    names = {name for name, _ in model.named_parameters() if is_lora(name)}
    assert len(names) == 2 * 2 * 2 and all(name.startswith("language_model.") for name in names)


def test_saved_lora_loads_merged_or_goes_on(model, tmp_path):
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert any(key.endswith("q_proj.lora_A.weight") for key in keys)
    assert not any("base_layer" in key or "default" in key for key in keys)
    merged = SoundwaveForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    assert not any(is_lora(name) for name, _ in merged.named_parameters())
    assert torch.allclose(logits(merged), logits(model), atol=1e-5)
    again = SoundwaveForConditionalGeneration.from_pretrained(tmp_path, merge_lora=False, dtype=torch.float32)
    assert not torch.allclose(logits(again), logits(model), atol=1e-3)
    restore_lora(again, str(tmp_path))
    assert again.config.lora == model.config.lora
    assert torch.equal(logits(again), logits(model))
    ours, theirs = again.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_does_not_fit_is_named(model, tiny_model, tiny_ctc, tmp_path):
    with pytest.raises(ConfigError, match="has LoRA already"):
        add_lora(model, 4, 8, TARGETS)
    with pytest.raises(ConfigError, match="no linear layers called wq; it has .*q_proj"):
        add_lora(copy.deepcopy(tiny_model), 4, 8, ["wq"])
    with pytest.raises(ConfigError, match="SoundwaveForCTC has no LLM"):
        add_lora(copy.deepcopy(tiny_ctc), 4, 8, TARGETS)
    tiny_model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no LoRA to go on with"):
        restore_lora(copy.deepcopy(tiny_model), str(tmp_path))
