"""`soundwave train STAGE --dry-run`: it prints what the run would do, reads no weights and writes nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, WhisperConfig

from soundwave.modeling_soundwave import SoundwaveConfig, SoundwaveForConditionalGeneration
from soundwave.training import memory
from soundwave.training.building import build_model
from soundwave.training.data import DataError, load_rows
from soundwave.training.freezing import freeze
from soundwave.training.lora import add_lora
from soundwave.training.memory import MicroBatch, parts_of
from soundwave.training.plan import make_plan
from soundwave.training.stages import ConfigError, StageConfig
from soundwave.training.train import main, make_sampler, run_stage
from tests.test_configs import ALIGNMENT, LORA, PUBLISHED, SHRINKING
from tests.training_rows import write_rows


@pytest.fixture(scope="module")
def weightless(tmp_path_factory, encoder_folder, llm_folder) -> dict[str, str]:
    """The two components without their weights."""
    folders = {}
    for name, folder in (("audio_model", encoder_folder), ("text_model", llm_folder)):
        folders[name] = str(tmp_path_factory.mktemp(name) / "component")
        shutil.copytree(folder, folders[name], ignore=shutil.ignore_patterns("*.safetensors"))
    return folders


@pytest.fixture(scope="module")
def data_root(tmp_path_factory) -> str:
    """Eight recordings of known length (asr and sound) and four rows of text, and the recordings alone."""
    folder = tmp_path_factory.mktemp("data")
    rows = [json.loads(line) for line in write_rows(folder, spoken=8, written=4).read_text().splitlines()]
    for k, row in enumerate(rows):
        row["duration_s"] = 900.0 + 100 * k if row["audio"] else None
    for name, chosen in (("rows", rows), ("spoken", rows[:8]), ("unknown", [r | {"duration_s": None} for r in rows])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return str(folder)


@pytest.fixture
def settings(weightless, data_root, tmp_path) -> dict:
    return {
        **weightless,
        "data_root": data_root,
        "data": ["rows.jsonl"],
        "global_batch": 4,
        "per_device_batch": 2,
        "steps": 7,
        "lora_r": 4,
        "output_dir": str(tmp_path / "out"),
        "device": "cpu",
    }


@pytest.mark.parametrize("stage", ["align", "shrink", "instruct"])
def test_the_table_is_that_of_the_model_that_would_train(stage, settings, encoder_folder, llm_folder):
    settings["data"] = ["spoken.jsonl"] if stage == "align" else ["rows.jsonl"]
    settings["trains"] = ["alignment_adapter", "encoder_lora"] + ["lora"] * (stage != "align")
    plan = make_plan(StageConfig.for_stage(stage, **settings))
    config = StageConfig.for_stage(
        stage, **settings | {"audio_model": encoder_folder, "text_model": llm_folder}, seed=1
    )
    model, _ = build_model(config)
    freeze(model, config.trains)
    assert plan.parts == parts_of(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(part.trained for part in plan.parts) == trained
    assert plan.memory["weights"] == sum(p.numel() * p.element_size() for p in model.parameters())
    assert (plan.memory["gradients"], plan.memory["optimizer"]) == (4 * trained, 8 * trained)
    assert list(dict.fromkeys(part.name.partition(",")[0] for part in plan.parts)) == [
        name for name, module in model.named_children() if list(module.parameters())
    ]


def test_the_data_is_what_the_sampler_draws(settings, capsys):
    config = StageConfig.for_stage("shrink", **settings, temperature_step=5, temperature_start=1)
    plan = make_plan(config)
    sampler = make_sampler(config, load_rows(config.data, config.data_root))
    assert {task: (found.rows, found.hours) for task, found in plan.tasks.items()} == {
        "asr": (6, pytest.approx((900 + 1000 + 1100 + 1300 + 1400 + 1500) / 3600)),
        "sound": (2, pytest.approx((1200 + 1600) / 3600)),
        "text_qa": (4, 0),
    }
    assert plan.epochs_in_all == pytest.approx(7 * 4 / 12) and [epoch.number for epoch in plan.epochs] == [1, 2, 3]
    for epoch in plan.epochs:
        expected = sampler.plan(epoch.number - 1)
        assert (epoch.temperature, epoch.shares) == (expected.temperature, expected.probabilities)
    assert (plan.passes, plan.devices) == (2, 1)
    assert plan.batch.audio_s == 2 * 1600  # the longest, twice
    assert main(["shrink", "--dry-run", *(f"{name}={json.dumps(value)}" for name, value in settings.items())]) == 0
    printed = capsys.readouterr().out
    for words in ("T = 6", "50.0 %", "7 updates of 4 rows: 28 draws, 2.33 epochs", "2 rows x 2 passes x 1 device(s)"):
        assert words in printed, words
    table = printed[printed.index("what trains") :].split("\n\n")[0].splitlines()
    assert len({len(line) for line in table[:-1]}) == 1  # columns end alike; the sum has no type
    assert max(map(len, printed.splitlines()[1:])) < 120  # the first has the paths


def test_nothing_is_written_and_one_row_may_run_long(settings, tmp_path, capsys):
    long = settings | {"steps": 60, "data": ["unknown.jsonl"], "task_weights": {"asr": 3, "sound": 1, "text_qa": 0}}
    plan = make_plan(StageConfig.for_stage("instruct", **long))
    assert [epoch.number for epoch in plan.epochs] == [1, 2, 3, 4, 5, 6, 20]  # the first, and the last
    assert all(epoch.temperature is None and epoch.shares["asr"] == 0.75 for epoch in plan.epochs)
    assert plan.tasks["asr"].hours is None and plan.tasks["text_qa"].hours == 0
    spoken_only = make_plan(StageConfig.for_stage("align", **settings))
    assert "text_qa" not in spoken_only.tasks and "text_qa" in plan.tasks  # stage I learns from recordings alone
    assert "8 rows with audio state no duration_s" in str(plan) and "?" in str(plan)
    assert list(tmp_path.iterdir()) == []


def test_streams_and_batches_by_seconds(settings):
    batches = {"model": {"audio_padding": "longest"}, "max_seconds_per_batch": 4000}
    plan = make_plan(StageConfig.for_stage("instruct", **settings | batches))
    assert plan.batch.audio_s == 4000 and "up to 4000 s x" in str(plan)
    streams = {"streaming": True, "stream_rows": {"asr": 90, "sound": 10}, "data": ["asr.jsonl", "sound.jsonl"]}
    for task in ("asr", "sound"):
        lines = (Path(settings["data_root"]) / "rows.jsonl").read_text().splitlines()
        chosen = [line for line in lines if json.loads(line)["task"] == task]
        (Path(settings["data_root"]) / f"{task}.jsonl").write_text("\n".join(chosen))
    plan = make_plan(StageConfig.for_stage("instruct", **settings | streams))
    assert plan.epochs[0].shares == {"asr": pytest.approx(0.9), "sound": pytest.approx(0.1)}
    assert plan.tasks["asr"].rows == 90 and "streams are not counted" in str(plan)


def test_bad_settings_fail_as_in_a_run(settings, tmp_path):
    best = {"eval_data": ["rows.jsonl"], "eval_steps": 1, "save_steps": 1, "best_metric": "eval_bleu_st"}
    for changed, error, message in (
        ({"trains": ["alignment"]}, ConfigError, "trains names 'alignment'"),
        ({"global_batch": 5}, ConfigError, "make 2 rows at once"),
        ({"lora_targets": ["wq"]}, ConfigError, "no linear layers called wq"),
        ({"audio_model": None}, ConfigError, "nothing to begin with"),
        ({"model": {"ctc_haed": "tied"}}, ConfigError, "no setting 'model.ctc_haed'"),
        ({"data": ["none.jsonl"]}, DataError, "does not exist"),
        (best, ConfigError, "best_metric is eval_bleu_st, but validation in stage shrink"),
    ):
        with pytest.raises(error, match=message):
            make_plan(StageConfig.for_stage("shrink", **settings | changed))
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds 1 checkpoint"):
        make_plan(StageConfig.for_stage("shrink", **settings))


def test_a_resumed_run_is_planned_from_where_it_stands(settings, encoder_folder, llm_folder):
    settings |= {"audio_model": encoder_folder, "text_model": llm_folder, "data": ["spoken.jsonl"], "progress": False}
    run = {**settings, "steps": 2, "save_steps": 1, "report_to": "none"}
    run_stage(StageConfig.for_stage("align", **run))
    again = {**run, "resume": True}
    assert "holds the result of this run" in make_plan(StageConfig.for_stage("align", **again)).notes[0]
    notes = make_plan(StageConfig.for_stage("align", **again | {"steps": 5})).notes
    assert notes[0].startswith("goes on from ") and "checkpoint-2, after 2 updates" in notes[0]
    with pytest.raises(ConfigError, match="learning_rate was"):
        make_plan(StageConfig.for_stage("align", **again | {"learning_rate": 0.5}))


def test_validation_by_generation_needs_its_scorer(settings, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    settings |= {"eval_data": ["rows.jsonl"], "eval_steps": 2}
    with pytest.raises(ConfigError, match="jiwer"):
        make_plan(StageConfig.for_stage("shrink", **settings))
    assert make_plan(StageConfig.for_stage("shrink", **settings, eval_generate_rows=0))


def test_the_papers_pair_in_4_bit_is_planned_without_weights(settings, weightless, tmp_path):
    pair = {"audio_model": "openai/whisper-large-v3", "text_model": "meta-llama/Llama-3.1-8B-Instruct"}
    for name, published in pair.items():
        shutil.copytree(weightless[name], tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(PUBLISHED[published]))
        settings[name] = str(tmp_path / name)
    paper = {"dtype": "bfloat16", "quantization": "nf4", "lora_r": 64, "gradient_checkpointing": True}
    plan = make_plan(StageConfig.for_stage("shrink", **settings | paper))
    trained = ALIGNMENT + SHRINKING + LORA
    linear = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    others = 8_030_261_248 - linear + 636_968_960  # embeddings, output layer, norms; the encoder
    ours = ALIGNMENT + SHRINKING + LORA + 4096 + 1
    assert plan.memory["weights"] == pytest.approx(4 * ours + 2 * others + 0.5159 * linear, rel=1e-4)
    assert plan.memory["optimizer"] == 8 * trained
    assert "266,420,224" in str(plan) and "nf4 + bfloat16" in str(plan)
    assert 4e9 < plan.memory["weights"] + plan.memory["optimizer"] < 12e9


def test_stage_one_holds_the_embedding_rows_as_the_llm_has_them(settings, weightless, tmp_path):
    shutil.copytree(weightless["text_model"], tmp_path / "llm")
    text = json.loads((tmp_path / "llm" / "config.json").read_text())
    (tmp_path / "llm" / "config.json").write_text(json.dumps(text | {"dtype": "bfloat16"}))
    plans = [make_plan(StageConfig.for_stage("align", **settings))]
    plans.append(make_plan(StageConfig.for_stage("align", **settings | {"text_model": str(tmp_path / "llm")})))
    sizes = [next(part for part in plan.parts if part.name == "ctc_head").weight_bytes for plan in plans]
    assert sizes[0] - sizes[1] == 2 * text["vocab_size"] * text["hidden_size"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "trains", [["lora"], ["alignment_adapter", "shrinking_adapter", "lora"], ["audio_tower", "alignment_adapter"]]
)
def test_the_estimate_of_activations_is_near_what_is_kept(trains, dtype, monkeypatch):
    """Against the bytes that autograd keeps of one pass, parameters left out."""
    text = LlamaConfig(
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        vocab_size=500,
    )
    audio = WhisperConfig(
        d_model=64, encoder_layers=4, encoder_attention_heads=2, encoder_ffn_dim=256, max_source_positions=250
    )
    torch.manual_seed(0)
    config = SoundwaveConfig(audio_config=audio, text_config=text, audio_token_id=500)
    model = SoundwaveForConditionalGeneration(config)
    model.audio_tower.to(dtype)
    model.language_model.to(dtype)
    model.init_from_embeddings()
    if "lora" in trains:
        add_lora(model, 16, 16, ["q_proj", "k_proj", "v_proj", "o_proj"])
    freeze(model, trains)
    B, N, answer, seconds = 4, 60, 20, 5
    ids = torch.randint(3, 500, (B, N))
    ids[:, 5] = 500
    labels = ids.masked_fill(torch.arange(N) < N - answer, -100)
    inputs = {"input_ids": ids, "labels": labels, "input_features": torch.randn(B, 80, 100 * seconds)}
    if "alignment_adapter" in trains:
        inputs |= {"ctc_labels": torch.randint(3, 500, (B, 20)), "ctc_label_lengths": torch.full((B,), 20)}
    kept, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    mixed = dtype == torch.bfloat16
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", enabled=mixed):
        positions = int(model.train()(**inputs).audio_positions.sum())
    monkeypatch.setattr(memory, "POSITIONS_PER_SECOND", positions / (B * seconds))  # as it came out
    batch = MicroBatch(B * seconds, B * N, B * answer)
    estimate = memory.memory(model, parts_of(model), batch, mixed, checkpointing=False)["activations"]
    assert 0.6 < estimate / sum(kept.values()) < 1.7
    less = memory.memory(model, parts_of(model), batch, mixed, checkpointing=True)["activations"]
    assert less < estimate
