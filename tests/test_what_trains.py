"""What a run may train by configuration alone, two steps each: what moved, what was saved, how it loads.

Also where a run ends: at the best of a metric, or early.
"""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from soundwave import SoundwaveForConditionalGeneration, SoundwaveForCTC
from soundwave.training.building import build_model
from soundwave.training.checkpoints import LOG, checkpoints
from soundwave.training.lora import is_lora
from soundwave.training.stages import ConfigError, StageConfig, load_config
from soundwave.training.train import train_stage
from tests.training_rows import write_rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with rows, spoken and all."""
    folder = tmp_path_factory.mktemp("data")
    lines = write_rows(folder, spoken=6, written=2, longest_s=1.5).read_text().splitlines()
    (folder / "spoken.jsonl").write_text("\n".join(line for line in lines if json.loads(line)["audio"]))
    return folder


@pytest.fixture(scope="module")
def settings(data, encoder_folder, llm_folder):
    """Settings that every run here shares: two steps from the two components."""
    return {
        "audio_model": encoder_folder,
        "text_model": llm_folder,
        "model": {"audio_padding": "longest"},
        "data_root": str(data),
        "data": ["spoken.jsonl"],
        "global_batch": 3,
        "per_device_batch": 3,
        "steps": 2,
        "warmup_steps": 0,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "lora_r": 4,
        "encoder_lora_r": 2,
        "eval_generate_rows": 0,
        "report_to": [],
        "device": "cpu",
        "progress": False,
    }


def train(stage: str, settings: dict, output, **changed):
    """The trained model, and the settings it was trained with."""
    config = StageConfig.for_stage(stage, **settings | {"output_dir": str(output)} | changed)
    return train_stage(config).model.eval(), config


def after(config: StageConfig, settings: dict) -> dict:
    """The shared settings of a run that goes on from another's result."""
    components = ("audio_model", "text_model", "model")
    return {name: value for name, value in settings.items() if name not in components} | {"start": config.output_dir}


def moved(model, config: StageConfig) -> set[str]:
    """Which parameters differ from those the run began with; quantized ones, which cannot, are passed over."""
    torch.manual_seed(config.seed)
    begun = dict(build_model(config)[0].named_parameters())
    plain = {name: p for name, p in model.named_parameters() if type(p) is torch.nn.Parameter}
    return {name for name, parameter in plain.items() if not torch.equal(parameter, begun[name])}


@torch.no_grad()
def aligned(model) -> torch.Tensor:
    """What the speech side makes of noise, encoder included."""
    generator = torch.Generator().manual_seed(0)
    mel = torch.randn(2, model.config.audio_config.num_mel_bins, 120, generator=generator)
    return model.align(mel, torch.ones(2, 120, dtype=torch.long)).frames


@torch.no_grad()
def logits(model) -> torch.Tensor:
    ids = torch.arange(3, 12)[None]
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def test_lora_in_the_encoder_goes_through_all_stages(settings, tmp_path):
    kinds = ["alignment_adapter", "encoder_lora"]
    one, config = train("align", settings, tmp_path / "one", trains=kinds)
    assert {name.partition(".")[0] for name in moved(one, config)} == {"audio_tower", "alignment_adapter"}
    assert all(is_lora(n, "encoder_lora") for n in moved(one, config) if n.startswith("audio_tower"))
    assert one.config.encoder_lora == {"r": 2, "alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    saved = load_file(tmp_path / "one" / "model.safetensors")
    assert "audio_tower.layers.0.self_attn.q_proj.lora_A.weight" in saved
    assert not any("base_layer" in name or "default" in name for name in saved)
    merged = SoundwaveForCTC.from_pretrained(tmp_path / "one", dtype=torch.float32)
    assert merged.config.encoder_lora is None and not any(is_lora(name) for name, _ in merged.named_parameters())
    assert torch.allclose(aligned(merged), aligned(one), atol=1e-5)

    # Stage II goes on with it, and has its own in the LLM. What goes on keeps its sizes, whatever is set.
    going_on = after(config, settings) | {"text_model": settings["text_model"], "encoder_lora_r": 7}
    two, config = train("shrink", going_on, tmp_path / "two", trains=[*kinds, "lora"])
    assert two.config.encoder_lora["r"] == 2 and two.config.lora["r"] == 4
    assert load_config(tmp_path / "two" / "stage_config.yaml").encoder_lora_r == 2
    found = moved(two, config)
    assert any(is_lora(n, "encoder_lora") for n in found) and any(is_lora(n, "lora") for n in found)
    # Stage III keeps the encoder's as it is: apart, though only the LLM's trains.
    three, _ = train("instruct", after(config, settings), tmp_path / "three", trains=["lora"])
    ends = [load_file(tmp_path / name / "model.safetensors") for name in ("two", "three")]
    same = {name: torch.equal(ends[0][name], ends[1][name]) for name in ends[0]}
    assert all(same[name] == name.startswith("audio_tower.") for name in same if ".lora_" in name)
    loaded = SoundwaveForConditionalGeneration.from_pretrained(tmp_path / "three", dtype=torch.float32)
    assert torch.allclose(aligned(loaded), aligned(three), atol=1e-5)
    assert torch.allclose(logits(loaded), logits(three), atol=1e-5)
    # Without the LLM, the encoder's LoRA still counts.
    reader = SoundwaveForCTC.from_pretrained(tmp_path / "three", dtype=torch.float32)
    assert torch.allclose(aligned(reader), aligned(three), atol=1e-5)


def test_a_pinned_encoder_stays_pinned_under_lora_and_is_saved_once_it_trains(settings, tmp_path):
    config = StageConfig.for_stage("align", **settings | {"trains": ["encoder_lora"]})
    model, _ = build_model(config)
    model.config.audio_model_id, model.config.audio_model_revision = settings["audio_model"], "0123abc"
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {name for name in saved if name.startswith("audio_tower.")} == {
        f"audio_tower.layers.{k}.self_attn.{part}_proj.lora_{half}.weight"
        for k in (0, 1)
        for part in "qv"
        for half in "AB"
    }
    assert SoundwaveForCTC.from_pretrained(tmp_path, merge_lora=False).config.audio_model_revision == "0123abc"
    assert SoundwaveForCTC.from_pretrained(tmp_path).config.audio_model_revision is None


@pytest.mark.parametrize(
    ("stage", "part"),
    [("align", "audio_tower.layers.1"), ("shrink", "audio_tower"), ("instruct", "language_model")],
)
def test_an_unfrozen_component_is_saved_with_ours(stage, part, settings, tmp_path):
    model, config = train(stage, settings, tmp_path, trains=["alignment_adapter", part])
    found = {name for name in moved(model, config) if not name.startswith("alignment_adapter.")}
    assert found and all(name.startswith(part + ".") for name in found)
    kind = SoundwaveForCTC if stage == "align" else SoundwaveForConditionalGeneration
    loaded = kind.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(aligned(loaded), aligned(model))
    if stage != "align":
        assert torch.equal(logits(loaded), logits(model))
    rounded = StageConfig.for_stage(stage, **after(config, settings) | {"trains": config.trains})
    again = dict(build_model(rounded, torch.bfloat16)[0].named_parameters())
    assert all(torch.equal(again[name], parameter) for name, parameter in model.named_parameters() if name in found)


@pytest.fixture(scope="module")
def wide_llm(tmp_path_factory, llm_folder) -> str:
    """The tiny LLM with widths that the 4 bit kernels take."""
    folder = tmp_path_factory.mktemp("wide")
    widths = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig.from_pretrained(llm_folder, **widths)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(llm_folder).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_lora_on_a_quantized_llm(quantization, settings, wide_llm, tmp_path):
    pytest.importorskip({"int8": "torchao", "nf4": "bitsandbytes"}[quantization])
    settings = settings | {"text_model": wide_llm}
    trains = ["shrinking_adapter", "lora"]
    two, config = train("shrink", settings, tmp_path / "two", trains=trains, quantization=quantization)
    layer = two.language_model.model.layers[0]
    kind = {"int8": "Int8Tensor", "nf4": "Params4bit"}[quantization]
    assert type(layer.mlp.up_proj.weight).__name__ == type(layer.self_attn.q_proj.base_layer.weight).__name__ == kind
    assert two.language_model.lm_head.weight.dtype == torch.float32
    with_gradient = {name for name, parameter in two.named_parameters() if parameter.requires_grad}
    assert all(name.startswith("shrinking_adapter.") or is_lora(name, "lora") for name in with_gradient)
    assert {name for name in with_gradient if is_lora(name)} <= moved(two, config)
    # The file holds the LLM as it was, and loads in any type: there LoRA is on the exact matrices.
    saved = load_file(tmp_path / "two" / "model.safetensors")
    plain = load_file(f"{settings['text_model']}/model.safetensors")
    assert all(torch.equal(saved[f"language_model.{name}"], tensor) for name, tensor in plain.items())
    assert not any("absmax" in name or "base_layer" in name for name in saved)
    assert "quantization_config" not in (tmp_path / "two" / "config.json").read_text()
    close = {"int8": 0.02, "nf4": 0.2}[quantization]
    for dtype, merge_lora in ((torch.float32, True), (torch.bfloat16, True), (torch.float32, False)):
        loaded = SoundwaveForConditionalGeneration.from_pretrained(
            tmp_path / "two", dtype=dtype, merge_lora=merge_lora
        )
        difference = (logits(loaded).float() - logits(two)).abs().max() / logits(two).abs().max()
        assert (difference < close) == merge_lora, (dtype, difference)
    # And training goes on from it, quantized again.
    three, _ = train("instruct", after(config, settings), tmp_path / "three", trains=trains, quantization=quantization)
    ends = [load_file(tmp_path / name / "model.safetensors") for name in ("two", "three")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][n], ends[1][n]) != (".lora_" in n) for n in ends[0] if n.startswith("language"))


def test_a_missing_quantizer_is_named_before_anything_is_loaded(settings):
    if importlib.util.find_spec("bitsandbytes") is not None:
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(ConfigError, match="nf4, which needs bitsandbytes: pip install bitsandbytes"):
        build_model(StageConfig.for_stage("shrink", **settings | {"quantization": "nf4", "text_model": "/none"}))


def validated(log) -> dict[int, float]:
    """CTC loss of each validation, by step."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    return {entry["step"]: entry["eval_ctc_loss"] for entry in entries if "eval_ctc_loss" in entry}


def test_the_result_is_the_best_checkpoint(settings, tmp_path):
    steps = {"eval_steps": 1, "save_steps": 1, "save_total_limit": 2, "steps": 4, "eval_data": ["spoken.jsonl"]}
    steps |= {"trains": ["alignment_adapter", "encoder_lora"], "best_metric": "eval_ctc_loss"}
    model, _ = train("align", settings, tmp_path, **steps | {"learning_rate": 3.0})  # up and down
    losses = validated(tmp_path / LOG)
    best = min(losses, key=lambda step: losses[step])
    assert len(losses) == 4 and best != 4
    assert {path.name for path in checkpoints(tmp_path)} == {f"checkpoint-{best}", "checkpoint-4"}  # not rotated away
    kept, result = (load_file(f / "model.safetensors") for f in (tmp_path / f"checkpoint-{best}", tmp_path))
    assert kept.keys() == result.keys() and all(torch.equal(kept[name], result[name]) for name in kept)
    loaded = SoundwaveForCTC.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.allclose(aligned(loaded), aligned(model), atol=1e-2)  # of values around 5


def test_a_run_stops_early(settings, tmp_path):
    steps = {"eval_steps": 1, "save_steps": 1, "steps": 9, "eval_data": ["spoken.jsonl"], "learning_rate": 0.0}
    steps |= {"best_metric": "eval_ctc_loss", "early_stopping_patience": 2}
    train("align", settings, tmp_path, **steps)
    losses = validated(tmp_path / LOG)
    assert list(losses) == [1, 2, 3] and len(set(losses.values())) == 1  # two more, and no better
    train("align", settings, tmp_path, **steps | {"resume": True})
    assert list(validated(tmp_path / LOG)) == [1, 2, 3]  # it had ended


def test_a_metric_that_validation_does_not_report_is_refused_before_training(settings, tmp_path):
    steps = {"eval_steps": 1, "save_steps": 1, "eval_data": ["spoken.jsonl"], "eval_generate_rows": 4}
    for stage, metric, known in (
        ("align", "eval_ce_loss", "eval_ctc_loss, eval_ctc_wer, eval_loss, eval_token_error_rate"),
        ("instruct", "eval_accuracy_intent", "eval_ce_loss, eval_loss, eval_wer"),
    ):
        with pytest.raises(ConfigError, match=f"{metric}, but validation in stage {stage} .* reports {known}"):
            train(stage, settings, tmp_path, best_metric=metric, **steps)
    assert not list(tmp_path.iterdir())
