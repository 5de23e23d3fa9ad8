"""The shipped settings: each file loads, and its model is built at full size, without weights, from configurations.

The sizes of the published components are written down here; trained parameters are those of Tables 1 and 13.
"""

import json
from pathlib import Path

import pytest

from soundwave.assets import TINY
from soundwave.training.building import build_skeleton
from soundwave.training.freezing import freeze
from soundwave.training.stages import STAGES, ConfigError, StageConfig, load_config

CONFIGS = Path(__file__).parents[1] / "training" / "configs"
PATHS = sorted(CONFIGS.rglob("*.yaml"))

WHISPER = {"model_type": "whisper", "max_source_positions": 1500, "scale_embedding": False}
PUBLISHED: dict[str, dict] = {
    "openai/whisper-large-v3": WHISPER
    | {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120}
    | {"num_mel_bins": 128, "vocab_size": 51866},
    "openai/whisper-small": WHISPER
    | {"d_model": 768, "encoder_layers": 12, "encoder_attention_heads": 12, "encoder_ffn_dim": 3072}
    | {"num_mel_bins": 80, "vocab_size": 51865},
    "meta-llama/Llama-3.1-8B-Instruct": {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096}
    | {"intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    | {"max_position_embeddings": 131072, "tie_word_embeddings": False},
    "Qwen/Qwen3-0.6B": {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "head_dim": 128}
    | {"intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8}
    | {"max_position_embeddings": 40960, "tie_word_embeddings": True},
}
ALIGNMENT, SHRINKING, LORA = 144_760_832, 67_133_440, 54_525_952  # Table 1: ~144M, ~67M, ~55M
BLANK_AND_SCALE = 4096 + 1


@pytest.fixture(scope="module")
def components(tmp_path_factory) -> dict[str, str]:
    """Folders with nothing but a `config.json`, by the names of components in the files; two of the tiny preset."""
    tiny = json.loads((Path(TINY) / "config.json").read_text())
    own = {"tiny audio": tiny["audio_config"], "tiny text": tiny["text_config"]}
    folders = {}
    for name, values in (PUBLISHED | own).items():
        folder = tmp_path_factory.mktemp("component")
        (folder / "config.json").write_text(json.dumps(values))
        folders[name] = str(folder)
    return folders


def skeletons(preset: str, components: dict[str, str], folder: Path, **changed) -> dict:
    """The three stages' models of a preset, each from the configuration that the one before would save."""
    models, start = {}, None
    for stage in STAGES:
        config = load_config(CONFIGS / preset / f"{stage}.yaml")
        if start is None:
            config.audio_model = components[config.audio_model or "tiny audio"]
            config.text_model = components[config.text_model or "tiny text"]
        else:
            config.start = start
            config.text_model = models["align"][0].text_model if stage == "shrink" else None
        for name, value in changed.items():
            setattr(config, name, value)
        model = build_skeleton(config)
        freeze(model, config.trains)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        model.config.architectures = [type(model).__name__]
        start = str(folder / f"{preset}-{stage}")
        model.config.save_pretrained(start)
        models[stage] = config, model
    return models


def trained(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_there_are_four_presets_of_three_stages():
    assert {path.parent.name for path in PATHS} == {"paper", "small", "qlora", "tiny"}
    assert all({path.stem for path in CONFIGS.glob(f"{path.parent.name}/*")} == set(STAGES) for path in PATHS)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_file_loads(path):
    config = load_config(path)
    assert config.stage == path.stem
    assert config.accumulation(1) * config.per_device_batch == config.global_batch
    if path.parent.name == "paper":
        for name, value in STAGES[config.stage].defaults.items():
            assert getattr(config, name) == value, name
        assert config.trains == list(STAGES[config.stage].trains)
        assert config.accumulation(32) == {"align": 8, "shrink": 8, "instruct": 4}[config.stage]
    if path.parent.name == "qlora":
        assert config.quantization == (None if config.stage == "align" else "nf4")


@pytest.mark.parametrize("preset", ["paper", "qlora"])
def test_the_papers_pair_trains_what_table_13_says(preset, components, tmp_path):
    models = skeletons(preset, components, tmp_path)
    counts = {stage: trained(model) for stage, (_, model) in models.items()}
    assert counts == {
        "align": ALIGNMENT + BLANK_AND_SCALE,  # 144M
        "shrink": ALIGNMENT + SHRINKING + LORA,  # 266M
        "instruct": SHRINKING + LORA,  # 122M
    }
    assert [round(count / 1e6) for count in counts.values()] == [145, 266, 122]
    freeze(models["instruct"][1], ["lora"])  # as §2.4 words it
    assert trained(models["instruct"][1]) == LORA
    encoder = models["shrink"][1].audio_tower
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 636_968_960
    assert sum(p.numel() for n, p in models["shrink"][1].language_model.named_parameters() if ".lora_" not in n) == (
        8_030_261_248
    )


@pytest.mark.parametrize("preset", ["small", "tiny"])
def test_other_pairs_train_what_their_widths_say(preset, components, tmp_path):
    for stage, (config, model) in skeletons(preset, components, tmp_path).items():
        audio, text = model.config.audio_config, model.config.text_config
        D, F = text.hidden_size, model.config.alignment_ffn_dim
        attention, lora = 4 * D * D + 4 * D, model.config.lora or {"r": 0}
        expected = {
            # projection of two frames, attention, feed-forward, three LayerNorms
            "alignment_adapter": 2 * audio.d_model * D + D + attention + 2 * D * F + D + F + 6 * D,
            "shrinking_adapter": attention + 2 * D,
            "ctc_head": text.vocab_size * D + D,  # separate: its own rows, and the blank's
            "ctc_head.blank": D,
            "ctc_head.log_scale": 1,
            "lora": lora["r"] * text.num_hidden_layers * sum(map(sum, projections(text))),
        }
        assert trained(model) == sum(expected[part] for part in config.trains), stage


def projections(text) -> list[tuple[int, int]]:
    """(in, out) of the four projections of an attention layer."""
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    q, kv = text.num_attention_heads * head, text.num_key_value_heads * head
    return [(text.hidden_size, q), (text.hidden_size, kv), (text.hidden_size, kv), (q, text.hidden_size)]


def test_the_encoder_or_the_llm_trains_by_configuration(components, tmp_path):
    stages = skeletons("paper", components, tmp_path, trains=["alignment_adapter", "encoder_lora"])
    r, D_e, layers = 16, 1280, 32
    assert [trained(model) for _, model in stages.values()] == 3 * [ALIGNMENT + 2 * 2 * r * D_e * layers]
    model = skeletons("small", components, tmp_path)["instruct"][1]
    freeze(model, ["audio_tower.layers.10", "audio_tower.layers.11"])
    assert trained(model) == 2 * (12 * 768**2 + 12 * 768)  # attention 4, feed-forward 8; keys have no bias
    freeze(model, ["lora"])
    lora = trained(model)
    freeze(model, ["language_model"])
    assert trained(model) == 596_049_920 + lora


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": "align", "quantization": "nf4"}, "stage I has no LLM"),
        ({"quantization": "nf4", "trains": ["shrinking_adapter"]}, "trains through LoRA alone"),
        ({"quantization": "int8", "trains": ["lora", "language_model.lm_head"]}, "trains through LoRA alone"),
        ({"quantization": "int4"}, "expected one of nf4, int8"),
        ({"encoder_cache": "x", "spec_augment": False, "trains": ["lora", "encoder_lora"]}, "cannot be cached"),
        ({"encoder_cache": "x", "spec_augment": False, "trains": ["audio_tower.layers.1"]}, "cannot be cached"),
        ({"encoder_lora_r": 0}, "encoder_lora_r is 0"),
        ({"early_stopping_patience": 2}, "best_metric None: expected at least 1 validation"),
        ({"early_stopping_patience": 0, "best_metric": "eval_loss"}, "patience is 0"),
        ({"best_metric": "eval_loss"}, "nothing is validated: set eval_data, eval_steps"),
        ({"best_metric": "eval_loss", "eval_data": ["a"], "eval_steps": 5}, "save_steps is None and eval_steps 5"),
        ({"best_metric": "eval_loss", "eval_data": ["a"], "eval_steps": 5, "save_steps": 10}, "make them equal"),
        ({"best_metric": "loss", "eval_data": ["a"], "eval_steps": 5, "save_steps": 5}, "best_metric is 'loss'"),
        ({"best_metric": "eval_fun", "eval_data": ["a"], "eval_steps": 5, "save_steps": 5}, "eval_fun"),
    ],
)
def test_settings_that_contradict_each_other_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        StageConfig.for_stage(**{"stage": "shrink"} | settings)
