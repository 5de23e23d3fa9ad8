"""Int8 weights of the LLM by torchao, on the CPU: the LLM alone, saved and loaded; what is said stays the same."""

import pytest
import torch
from transformers import AutoModelForCTC

from soundwave import SoundwaveForConditionalGeneration, SoundwaveForCTC, SoundwaveProcessor
from soundwave.assets import TINY
from soundwave.eval.scoring import score_texts
from soundwave.modeling_soundwave.weights_soundwave import WeightsError
from tests.test_compatibility import spoken
from tests.test_modeling import batch_of, mel
from tests.tiny_models import tiny_model

pytest.importorskip("torchao")

from torchao.quantization import Int8WeightOnlyConfig
from transformers import TorchAoConfig


def int8(**fields) -> TorchAoConfig:
    return TorchAoConfig(Int8WeightOnlyConfig(), **fields)


def quantized_names(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if type(parameter.data).__name__ == "Int8Tensor"}


@pytest.fixture(scope="module")
def tiny_int8():
    return SoundwaveForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32, quantization_config=int8())


@pytest.fixture(scope="module")
def processor():
    return SoundwaveProcessor.from_pretrained(TINY)


def answers(model, processor, waveforms) -> list[str]:
    inputs = processor(audio=waveforms, sampling_rate=16_000)
    ids = model.generate(**inputs, max_new_tokens=48)[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]


def test_all_linear_layers_of_the_llm_and_nothing_else(tiny_int8):
    linear = {
        f"{name}.weight"
        for name, module in tiny_int8.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("language_model.model.")
    }
    assert len(linear) == 21  # seven in each of three layers; the output layer stays
    assert quantized_names(tiny_int8) == linear


def test_the_model_says_what_it_said(tiny_int8, processor):
    texts, waveforms = spoken(24)
    plain = answers(SoundwaveForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32), processor, waveforms)
    said = answers(tiny_int8, processor, waveforms)
    assert score_texts("wer", plain, said).value <= 0.02
    assert score_texts("wer", texts, said).value <= score_texts("wer", texts, plain).value + 0.02


def test_modules_that_the_caller_names_stay_too(tmp_path):
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    config = int8(modules_to_not_convert=["language_model.model.layers.0"])
    model = SoundwaveForConditionalGeneration.from_pretrained(tmp_path, quantization_config=config)
    found = quantized_names(model)
    assert "language_model.lm_head.weight" in found  # the caller's list takes the place of the default
    assert all(name.startswith(("language_model.model.layers.1.", "language_model.lm_head.")) for name in found)
    assert config.modules_to_not_convert == ["language_model.model.layers.0"]  # the caller's object is as it was


@pytest.mark.parametrize("pinned", [False, True])
def test_a_quantized_model_is_saved_whole_and_comes_back(tmp_path, pinned):
    plain = tiny_model(dtype=torch.float32)
    if pinned:  # a stage repository without its LLM
        plain.language_model.save_pretrained(tmp_path / "llm")
        plain.config.text_model_id, plain.config.text_model_revision = str(tmp_path / "llm"), "0123abc"
    plain.save_pretrained(tmp_path / "plain")
    load = SoundwaveForConditionalGeneration.from_pretrained
    model = load(tmp_path / "plain", quantization_config=int8())
    assert model.config.text_model_revision is None  # what is quantized is not that commit any more
    model.save_pretrained(tmp_path / "int8")
    again = load(tmp_path / "int8")
    assert quantized_names(again) == quantized_names(model) != set()
    batch = batch_of([[3, mel(60, 1).float(), 5], [4, 6]])
    assert torch.equal(again.generate(**batch, max_new_tokens=6), model.generate(**batch, max_new_tokens=6))
    if not pinned:
        size = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("plain", "int8")}
        assert size["int8"] < size["plain"]
    reader = AutoModelForCTC.from_pretrained(tmp_path / "int8")
    audio = {name: batch[name] for name in model.AUDIO_FEATURES if name in batch}
    assert type(reader) is SoundwaveForCTC and reader.transcribe_ids(**audio) == model.transcribe_ids(**audio)


def test_what_cannot_be_quantized_says_so(tmp_path):
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="no LLM to quantize"):
        SoundwaveForCTC.from_pretrained(tmp_path, quantization_config=int8())
    with pytest.raises(WeightsError, match="dict has no list of modules .* use TorchAoConfig"):
        SoundwaveForConditionalGeneration.from_pretrained(tmp_path, quantization_config={"quant_method": "torchao"})
