"""Runs killed with SIGKILL and resumed end with the bits of the run that was left alone."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from soundwave.training.checkpoints import LOG, MANIFEST, checkpoints, last_complete_checkpoint, read_manifest
from soundwave.training.stages import STAGES, ConfigError, StageConfig
from soundwave.training.train import run_stage
from tests.forked_runs import ForkedRuns
from tests.local_hub import LocalHub
from tests.test_checkpoints import SAVED
from tests.training_rows import write_rows

STEPS, SAVED_EVERY = 12, 3
TIMING = re.compile("runtime|per_second")
PUSH_REQUESTS = ("/api/repos/create", "/preupload/", "/objects/batch", "PUT /lfs/", "/commit/")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with LocalHub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="module")
def runs(tmp_path_factory, hub):
    with ForkedRuns(tmp_path_factory.mktemp("output"), hub.environment()) as runs:
        yield runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory, runs, encoder_folder, llm_folder):
    """The three stages in a row, uninterrupted: a folder of each, and `settings(stage, output_dir)`."""
    folder = tmp_path_factory.mktemp("whole")
    path = write_rows(folder / "data", longest_s=2.5)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["duration_s"] = soundfile.info(folder / "data" / row["audio"]).duration if row["audio"] else None
    for name in ("rows", "spoken", *{row["task"] for row in rows}):
        chosen = [row for row in rows if name in ("rows", row["task"]) or (name == "spoken" and row["audio"])]
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    common = {
        "data_root": str(folder / "data"),
        "data": ["rows.jsonl"],
        "eval_data": ["rows.jsonl"],
        "eval_steps": 4,
        "eval_generate_rows": 2,
        "eval_max_new_tokens": 4,
        "draws_per_epoch": 20,  # five updates: checkpoints and the end fall inside epochs
        "temperature_step": 5.0,
        "spec_augment": True,
        "global_batch": 4,
        "per_device_batch": 2,
        "steps": STEPS,
        "warmup_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_steps": SAVED_EVERY,
        "save_total_limit": 1,
        "device": "cpu",
        "progress": False,
        "report_to": [],
        "resume": True,
    }
    lora = {"lora_r": 4, "lora_dropout": 0.1}
    own = {
        "align": {
            "audio_model": encoder_folder,
            "text_model": llm_folder,
            "model": {"audio_padding": "longest"},
            "data": ["spoken.jsonl"],
            "eval_data": ["spoken.jsonl"],
        },
        "shrink": lora | {"start": str(folder / "align"), "text_model": llm_folder},
        "instruct": lora | {"start": str(folder / "shrink")},
    }

    def settings(stage: str, output_dir: Path, **changed) -> dict:
        return common | own[stage] | {"stage": stage, "output_dir": str(output_dir)} | changed

    for stage in STAGES:
        runs.run(settings(stage, folder / stage))
    return SimpleNamespace(folder=folder, settings=settings)


def log_lines(folder: Path) -> list[dict]:
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return [{name: value for name, value in line.items() if not TIMING.search(name)} for line in lines]


def assert_same_result(folder: Path, reference: Path) -> None:
    """Weights, optimizer, schedule, random states and log of two finished runs, and one checkpoint in each."""
    last = f"checkpoint-{STEPS}"
    assert [path.name for path in checkpoints(folder)] == [last]
    for name in ("model.safetensors", f"{last}/model.safetensors"):
        assert (folder / name).read_bytes() == (reference / name).read_bytes(), name
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        ours, theirs = (torch.load(run / last / name, weights_only=False) for run in (folder, reference))
        assert same(ours, theirs), name
    assert log_lines(folder) == log_lines(reference)
    for name in ("config.json", "processor_config.json", "stage_config.yaml", "tokenizer.json"):
        assert (folder / name).is_file(), name
    assert read_manifest(folder)["step"] == STEPS


def same(one: Any, other: Any) -> bool:
    """Equality to the bit of what `torch.load` returns."""
    if isinstance(one, (torch.Tensor, np.ndarray)):
        return torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# The end of a run


@pytest.fixture
def ended(whole, tmp_path) -> Callable[[str], Path]:
    """A copy of a whole run, killed in the middle of its last save."""

    def copy(stage: str) -> Path:
        folder = Path(shutil.copytree(whole.folder / stage, tmp_path / stage))
        (folder / MANIFEST).unlink()
        os.truncate(folder / "model.safetensors", 1000)
        (folder / "processor_config.json").unlink()
        return folder

    return copy


def test_an_unfinished_save_is_completed_and_a_finished_run_left_alone(runs, whole, ended):
    folder = ended("shrink")
    runs.run(whole.settings("shrink", folder))
    assert_same_result(folder, whole.folder / "shrink")  # not one update too many
    saved = (folder / "model.safetensors").stat().st_mtime_ns
    runs.run(whole.settings("shrink", folder))
    assert "nothing is left to train" in runs.output.read_text()
    assert (folder / "model.safetensors").stat().st_mtime_ns == saved
    assert_same_result(folder, whole.folder / "shrink")


def test_more_steps_go_on_with_other_intervals(runs, whole, ended):
    folder = ended("align")
    runs.run(whole.settings("align", folder, steps=STEPS + 3, logging_steps=1, per_device_batch=4, save_total_limit=2))
    before, after = (
        [line for line in log_lines(run) if "train_loss" not in line] for run in (whole.folder / "align", folder)
    )
    assert after[: len(before)] == before
    steps = [line["step"] for line in after[len(before) :] if "loss" in line]
    assert steps == [STEPS + 1, STEPS + 2, STEPS + 3]
    assert [path.name for path in checkpoints(folder)] == [f"checkpoint-{STEPS + 3}", f"checkpoint-{STEPS}"]


def test_a_run_with_other_settings_is_refused(whole, ended):
    config = whole.settings("align", ended("align"), seed=5)
    with pytest.raises(ConfigError, match="checkpoint-12 was made with other settings: seed was 0 and is 5"):
        run_stage(StageConfig.for_stage(**config))
    with pytest.raises(ConfigError, match="holds 1 checkpoint.*resume=true, name another output_dir, or remove"):
        run_stage(StageConfig.for_stage(**config | {"resume": False}))


def test_early_stopping_is_remembered(runs, whole, tmp_path):
    changed = {
        "learning_rate": 30.0,  # it only gets worse
        "eval_steps": SAVED_EVERY,
        "best_metric": "eval_loss",
        "early_stopping_patience": 1,
        "save_total_limit": 2,
    }
    settings = whole.settings("align", tmp_path / "run", **changed)
    runs.run(settings)
    first = {name: (tmp_path / "run" / name).read_bytes() for name in ("model.safetensors",)}
    log = log_lines(tmp_path / "run")
    assert read_manifest(tmp_path / "run")["step"] == 2 * SAVED_EVERY
    (tmp_path / "run" / MANIFEST).unlink()
    runs.run(settings)
    assert {name: (tmp_path / "run" / name).read_bytes() for name in first} == first
    assert log_lines(tmp_path / "run") == log
    shutil.rmtree(tmp_path / "run" / f"checkpoint-{2 * SAVED_EVERY}")  # as if killed before; the patience is restored
    (tmp_path / "run" / MANIFEST).unlink()
    runs.run(settings)
    assert {name: (tmp_path / "run" / name).read_bytes() for name in first} == first
    assert log_lines(tmp_path / "run") == log


# Kills


def during_step(folder: Path, hub: LocalHub, rng: random.Random) -> float:
    """Wait for some checkpoint, or the start; the kill comes before the next, or in the middle of saving it."""
    step = rng.randrange(0, STEPS, SAVED_EVERY)
    until(lambda: step == 0 and folder.is_dir() or step in complete_steps(folder))
    return rng.uniform(0, 0.5)


def during_save(folder: Path, hub: LocalHub, rng: random.Random) -> float:
    """Wait for a file of a checkpoint, or of the result."""
    step = rng.choice([*range(SAVED_EVERY, STEPS + 1, SAVED_EVERY), None])
    if step is None:
        until(lambda: STEPS in complete_steps(folder))
        file = folder / rng.choice(["config.json", "model.safetensors", "processor_config.json", "report.md"])
    else:
        file = folder / f"checkpoint-{step}" / rng.choice(SAVED)
    until(file.exists)
    return rng.choice([0, rng.uniform(0, 0.01)])


def during_push(folder: Path, hub: LocalHub, rng: random.Random) -> float:
    """Wait for a request of the first pushes, or for the result's push."""
    if rng.random() < 0.3:
        until((folder / MANIFEST).exists)
        return rng.uniform(0, 0.2)
    kind, before = rng.choice(PUSH_REQUESTS), len(hub.requests)
    count = rng.choice([1, 2]) if kind in ("/preupload/", "/commit/") else 1
    until(lambda: sum(kind in request for request in hub.requests[before:]) >= count)
    return rng.choice([0, rng.uniform(0, 0.05)])


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "the moment did not come"
        time.sleep(0.0005)


def complete_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that are there with their marker."""
    return [int(path.name.split("-")[1]) for path in checkpoints(folder) if (path / MANIFEST).exists()]


def kill_and_resume(
    runs: ForkedRuns, whole: Any, hub: LocalHub, folder: Path, stage: str, moment: Any, seed: int
) -> str:
    """Kill a run of a stage at a moment and let it go on: it ends as the whole one did. Returns what the kill left."""
    rng, pushed = random.Random(seed), {}
    if moment is during_push:
        for blob in hub.blobs.iterdir():
            blob.unlink()  # else the same weights, pushed before, would not be sent again
        # Patience: a commit of the killed process may arrive while the next one pushes, which then has to try again.
        pushed = {"hub_model_id": f"ours/{stage}-{seed}", "hub_strategy": "every_save", "hub_patience_s": 60}
    settings = whole.settings(stage, folder, **pushed)
    pid = runs.start(settings)
    time.sleep(moment(folder, hub, rng))
    os.kill(pid, signal.SIGKILL)
    code = runs.wait()
    left = state_of(folder)
    assert code == -signal.SIGKILL, left
    assert last_complete_checkpoint(folder) or checkpoints(folder) in ([], [folder / f"checkpoint-{SAVED_EVERY}"])
    runs.run(settings)
    assert_same_result(folder, whole.folder / stage)
    if pushed:
        model = (folder / "model.safetensors").read_bytes()
        same = hub.content(pushed["hub_model_id"], "model.safetensors") == model
        assert same, runs.output.read_text()[-3000:]
    return left


def state_of(folder: Path) -> str:
    """What a kill left, for the record."""
    found = [f"{path.name[11:]}{'' if path / MANIFEST in path.iterdir() else '?'}" for path in checkpoints(folder)]
    return f"checkpoints {' '.join(found) or 'none'}, {'finished' if (folder / MANIFEST).exists() else 'unfinished'}"


@pytest.mark.parametrize(
    ("stage", "moment"), [("align", during_step), ("shrink", during_save), ("instruct", during_push)]
)
def test_a_killed_run_ends_with_the_same_bits(runs, whole, hub, tmp_path, stage, moment):
    kill_and_resume(runs, whole, hub, tmp_path / stage, stage, moment, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 21))
@pytest.mark.parametrize("stage", STAGES)
def test_sixty_kills(runs, whole, hub, tmp_path, stage, seed):
    moment = (during_step, during_save, during_push)[seed % 3]
    left = kill_and_resume(runs, whole, hub, tmp_path / stage, stage, moment, seed)
    print(f"{stage} {seed} {moment.__name__}: {left}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        {"dataloader_workers": 2},
        {"bucket_batches": 2},
        {"max_seconds_per_batch": 5.0},
        {"streaming": True, "data": ["asr.jsonl", "sound.jsonl", "text_qa.jsonl"], "draws_per_epoch": None}
        | {"stream_rows": {"asr": 8, "sound": 2, "text_qa": 4}},
        {"encoder_cache": "cache", "spec_augment": False},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_other_ways_to_read_rows_resume_exactly(runs, whole, hub, tmp_path, changed):
    if "encoder_cache" in changed:
        changed = changed | {"encoder_cache": str(tmp_path / "cache")}
    runs.run(whole.settings("shrink", tmp_path / "whole", **changed))
    settings = whole.settings("shrink", tmp_path / "killed", **changed)
    pid = runs.start(settings)
    until(lambda: 2 * SAVED_EVERY in complete_steps(tmp_path / "killed"))
    os.kill(pid, signal.SIGKILL)
    assert runs.wait() == -signal.SIGKILL
    runs.run(settings)
    assert_same_result(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_go_on_where_one_was_killed(runs, whole, tmp_path):
    """The same draws and masks, so without dropout the same losses, up to the order of summation."""
    changed = {"model": {"audio_padding": "longest", "alignment_dropout": 0.0}, "eval_data": [], "eval_steps": None}
    runs.run(whole.settings("align", tmp_path / "whole", **changed))
    settings = whole.settings("align", tmp_path / "killed", **changed)
    pid = runs.start(settings)
    until(lambda: 2 * SAVED_EVERY in complete_steps(tmp_path / "killed"))
    os.kill(pid, signal.SIGKILL)
    runs.wait()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "soundwave.training.train", settings.pop("stage")]
    command += [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    done = subprocess.run(command, env=runs.environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = log_lines(tmp_path / "whole"), log_lines(tmp_path / "killed")
    assert [line["devices"] for line in two if "devices" in line] == [1, 2]  # said where a run begins and goes on
    one, two = ([line for line in lines if "devices" not in line] for lines in (one, two))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for ours, theirs in zip(one, two, strict=True):
        for name in ("loss", "grad_norm", "rows", "draws/asr", "draws/sound", "learning_rate"):
            assert ours.get(name, 0) == pytest.approx(theirs.get(name, 0), rel=1e-3), (name, ours, theirs)
