"""Whole runs: three stages in a row, the command, two processes, and pushes."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file

from soundwave import SoundwaveForConditionalGeneration, SoundwaveForCTC
from soundwave.model_card.facts import CardFacts
from soundwave.model_card.figures import CardError
from soundwave.training.building import build_model
from soundwave.training.checkpoints import LOG
from soundwave.training.plan import make_plan
from soundwave.training.stages import ConfigError, StageConfig, load_config
from soundwave.training.train import main, run_stage, train_stage
from tests.local_hub import LocalHub
from tests.training_rows import write_rows

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, encoder_folder, llm_folder):
    """A folder with data and the results `one`, `two` and `three` of the three stages."""
    folder = tmp_path_factory.mktemp("runs")
    path = write_rows(folder / "data")
    spoken = [line for line in path.read_text().splitlines() if json.loads(line)["audio"]]
    (folder / "data" / "spoken.jsonl").write_text("\n".join(spoken))
    common = settings(folder)
    run_stage(
        StageConfig.for_stage(
            "align",
            output_dir=str(folder / "one"),
            audio_model=encoder_folder,
            text_model=llm_folder,
            model={"audio_padding": "longest", "ctc_head": "separate"},
            trains=["alignment_adapter", "ctc_head"],
            **common | {"data": ["spoken.jsonl"]},
        )
    )
    shrink = {"start": str(folder / "one"), "text_model": llm_folder, "lora_r": 4, "ctc_weight": 0.5}
    run_stage(StageConfig.for_stage("shrink", output_dir=str(folder / "two"), **common | shrink))
    cache = {"encoder_cache": str(folder / "cache"), "eval_data": ["rows.jsonl"], "eval_steps": 1}
    run_stage(
        StageConfig.for_stage(
            "instruct", output_dir=str(folder / "three"), start=str(folder / "two"), **common | cache
        )
    )
    return folder


def settings(folder) -> dict:
    return {
        "data_root": str(folder / "data"),
        "data": ["rows.jsonl"],
        "global_batch": 4,
        "per_device_batch": 4,
        "steps": 2,
        "warmup_steps": 0,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "device": "cpu",
        "progress": False,
    }


def test_each_stage_leaves_a_repository_that_loads(runs):
    one = SoundwaveForCTC.from_pretrained(runs / "one", dtype=torch.float32)
    two = SoundwaveForConditionalGeneration.from_pretrained(runs / "two", dtype=torch.float32)
    three = SoundwaveForConditionalGeneration.from_pretrained(runs / "three", dtype=torch.float32)
    assert one.config.ctc_head == two.config.ctc_head == "separate" and two.config.ctc_weight == 0.5
    same = {name: torch.equal(p, dict(three.named_parameters())[name]) for name, p in two.named_parameters()}
    assert all(same[name] for name in same if name.startswith(("audio_tower", "alignment_adapter", "ctc_head")))
    assert not all(same[name] for name in same if "q_proj" in name)
    for name in ("one", "two", "three"):
        log = [json.loads(line) for line in open(runs / name / LOG)]
        assert sum("loss" in entry for entry in log) == 2 and "train_runtime" in log[-1]
        assert log[0] == {"accelerator": "CPU", "devices": 1, "step": 0}
        assert not (runs / name / "README.md").exists() and not (runs / name / "training_args.bin").exists()
        assert str(runs) not in (runs / name / "stage_config.yaml").read_text()
        tasks = {row["task"]: (row["rows"], row["licence"]) for row in CardFacts.read(runs / name).data}
        assert tasks["asr"] == (8, "not stated") and tasks["sound"] == (2, "not stated")
        assert ("text_qa" in tasks) == (name != "one"), "stage I leaves out rows without recordings"
    assert sum("eval_ce_loss" in json.loads(line) for line in open(runs / "three" / LOG)) == 2


def test_one_lora_goes_from_stage_two_to_three(runs):
    second, third = load_file(runs / "two" / "model.safetensors"), load_file(runs / "three" / "model.safetensors")
    lora = [name for name in second if ".lora_A." in name]
    assert lora and second.keys() == third.keys()
    assert all(second[name].shape == third[name].shape and second[name].shape[0] == 4 for name in lora)
    assert load_config(runs / "three" / "stage_config.yaml").lora_r == 4
    config = StageConfig.for_stage("instruct", start=str(runs / "two"))
    model, _ = build_model(config)
    assert all(torch.equal(p, second[n.replace(".default", "")]) for n, p in model.named_parameters() if ".lora_" in n)
    merged, _ = build_model(StageConfig.for_stage("instruct", start=str(runs / "two"), trains=["shrinking_adapter"]))
    assert merged.config.lora is None and not any(".lora_" in name for name, _ in merged.named_parameters())


def test_our_parts_are_not_rounded_between_stages(runs):
    model, _ = build_model(StageConfig.for_stage("instruct", start=str(runs / "two")), torch.bfloat16)
    saved = load_file(runs / "two" / "model.safetensors")
    assert model.language_model.lm_head.weight.dtype == model.audio_tower.conv1.weight.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        if name.startswith(("alignment_adapter", "shrinking_adapter", "ctc_head")):
            assert torch.equal(parameter, saved[name]), name


def test_where_a_stage_may_begin(runs, encoder_folder, llm_folder):
    with pytest.raises(ConfigError, match="nothing to begin with: set start"):
        build_model(StageConfig.for_stage("align"))
    with pytest.raises(ConfigError, match="stage I goes on from a SoundwaveForCTC only"):
        build_model(StageConfig.for_stage("align", start=str(runs / "two")))
    again, _ = build_model(StageConfig.for_stage("align", start=str(runs / "one")))
    assert isinstance(again, SoundwaveForCTC)
    # Stage II without stage I: the ablation of Figure 5.
    parts = {"audio_model": encoder_folder, "text_model": llm_folder, "model": {"audio_padding": "longest"}}
    model, processor = build_model(StageConfig.for_stage("shrink", **parts))
    assert isinstance(model, SoundwaveForConditionalGeneration) and processor.audio_padding == "longest"


def test_the_command(runs, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"stage: instruct\nstart: {runs / 'two'}\n" + "".join(f"{k}: {v}\n" for k, v in settings(runs).items())
    )
    assert main(["instruct", "--config", str(path), "steps=1", f"output_dir={tmp_path / 'out'}"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "field=value" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no setting 'step'"):
        main(["instruct", "step=1"])


def test_settings_without_effect_are_named(runs, llm_folder, encoder_folder):
    one, two = {"start": str(runs / "one"), "text_model": llm_folder}, {"start": str(runs / "two")}
    wide, loud = {"audio_padding": "longest"}, {"keep_blanks": True}
    for stage, settings_, named in (
        ("align", one | {"model": loud}, "model.keep_blanks, text_model would have no effect"),
        ("shrink", one | {"model": {"window_seconds": 10}}, "model.window_seconds would have no effect"),
        ("shrink", one | {"audio_model": encoder_folder}, "audio_model would have no effect"),
        ("instruct", two | {"text_model": llm_folder}, "text_model would have no effect"),
        ("shrink", one | {"processor": wide, "model": loud}, r"^processor.audio_padding would have no effect"),
        ("instruct", two | {"processor": wide, "model": loud}, r"processor.audio_padding, model.keep_blanks would"),
        ("shrink", one | {"model": {"keep_blank": True}}, r"no setting 'model.keep_blank'; did you mean keep_blanks"),
        ("align", {"audio_model": encoder_folder, "model": {"ctc_haed": "tied"}}, "no setting 'model.ctc_haed'"),
    ):
        with pytest.raises(ConfigError, match=named):
            build_model(StageConfig.for_stage(stage, **settings_))
    model, processor = build_model(
        StageConfig.for_stage("shrink", **one, model={"keep_blanks": True, "audio_padding": "max_length"})
    )
    assert model.config.keep_blanks and model.config.audio_padding == processor.audio_padding == "max_length"


def test_a_revision_of_a_folder_is_refused(runs, tmp_path):
    common = settings(runs) | {"output_dir": str(tmp_path / "out"), "start": str(runs / "two")}
    config = StageConfig.for_stage("instruct", **common, start_revision="main")
    for begin in (train_stage, build_model, make_plan):
        with pytest.raises(ConfigError, match="start_revision is 'main' and would have no effect: start is the"):
            begin(config)
    assert not (tmp_path / "out").exists()
    config.save(tmp_path / "stage_config.yaml")
    assert load_config(tmp_path / "stage_config.yaml", ["start_revision="]).start_revision is None


def test_stage_one_goes_on_in_the_type_it_is_given(runs):
    model, _ = build_model(StageConfig.for_stage("align", start=str(runs / "one")), torch.bfloat16)
    assert model.audio_tower.conv1.weight.dtype == torch.bfloat16
    assert model.alignment_adapter.proj.weight.dtype == torch.float32
    saved = load_file(runs / "one" / "model.safetensors")
    assert all(torch.equal(p, saved[n]) for n, p in model.named_parameters() if n.startswith("alignment_adapter"))


def test_a_name_that_the_licence_forbids_is_refused_before_training(encoder_folder, llm_folder, tmp_path):
    model, processor = build_model(StageConfig.for_stage("align", audio_model=encoder_folder, text_model=llm_folder))
    model.config.text_model_id = "meta-llama/Llama-3.1-8B"
    model.save_pretrained(tmp_path / "one")
    processor.save_pretrained(tmp_path / "one")
    config = StageConfig.for_stage(
        "align",
        start=str(tmp_path / "one"),
        hub_model_id="ours/one",
        output_dir=str(tmp_path / "out"),
        **settings(tmp_path),
    )
    with pytest.raises(CardError, match="call it 'Llama-one'"):
        run_stage(config)


def test_a_card_that_cannot_be_written_is_no_failure_of_the_run(runs, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "card.yaml").write_text("limit: [it knows tones only]\n")
    trainer = train_stage(
        StageConfig.for_stage(
            "instruct",
            start=str(runs / "two"),
            output_dir=str(tmp_path / "out"),
            hub_model_id="ours/three",
            **settings(runs),
        )
    )
    trainer.background.wait()
    assert "has no new card: card.yaml holds limit" in capsys.readouterr().err
    assert (tmp_path / "out" / "complete.json").is_file() and not (tmp_path / "out" / "README.md").exists()


def test_pushes_load_at_every_moment(runs, tmp_path):
    """A branch that did not exist, each checkpoint and the result; nothing of this machine is uploaded."""
    script = f"""
        import json
        from huggingface_hub import HfApi
        from soundwave import SoundwaveForConditionalGeneration
        from soundwave.training.stages import StageConfig
        from soundwave.training.train import run_stage
        run_stage(StageConfig.for_stage(
            "instruct", start={str(runs / "two")!r}, output_dir={str(tmp_path / "out")!r}, save_steps=1,
            hub_model_id="ours/three", hub_revision="stage-3", hub_strategy="every_save", **{settings(runs)!r}))
        api = HfApi()
        print(json.dumps({{"files": api.list_repo_files("ours/three", revision="stage-3")}}))
        card = api.hf_hub_download("ours/three", "README.md", revision="stage-3")
        assert "This stage has not been evaluated." in open(card).read()
        SoundwaveForConditionalGeneration.from_pretrained("ours/three", revision="stage-3")
    """
    with LocalHub(tmp_path / "hub") as hub:
        environment = os.environ | hub.environment("home") | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "ours/three is pushed, but lacks a licence: card.yaml states no licence of noise (asr), " in done.stderr
        assert f"and push again: soundwave push {tmp_path / 'out'}" in done.stderr
        commits = sum("/commit/stage-3" in request for request in hub.requests)
    files = json.loads(done.stdout.splitlines()[-1])["files"]
    assert {"README.md", "model.safetensors", "config.json", "modeling_soundwave.py", "stage_config.yaml", LOG} <= set(
        files
    )
    assert not any(name.startswith(("checkpoint-", "optimizer", "training_args", "rng_state")) for name in files)
    assert commits >= 2
