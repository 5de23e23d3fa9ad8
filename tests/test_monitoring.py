"""What a run logs beside its losses: counts that are exact, rates without validation and saving, TensorBoard."""

import json
import shutil
import time
from types import SimpleNamespace

import pytest
import soundfile
import torch
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from soundwave.training import monitoring
from soundwave.training.checkpoints import PRIVATE
from soundwave.training.data import load_rows
from soundwave.training.mixture import MixtureSampler
from soundwave.training.monitoring import LOGS, Monitor, reporters, speech_frames
from soundwave.training.stages import ConfigError
from tests.conftest import SAMPLING_RATE, tone
from tests.tiny_trainers import build_trainer
from tests.training_rows import write_rows

STAGE_NAMES = ("align", "shrink", "instruct")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return load_rows(write_rows(tmp_path_factory.mktemp("rows")))


@pytest.fixture
def make(rows, processor, tiny_model, tiny_ctc, tmp_path):
    def build(stage, folder="run", **settings):
        model, chosen = (tiny_ctc, rows.select(range(10))) if stage == "align" else (tiny_model, rows)
        return build_trainer(stage, model, processor, chosen, tmp_path / folder, chosen, **settings)

    return build


def steps_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@settings(max_examples=15)
@given(seconds=st.lists(st.floats(0.05, 5.0), min_size=1, max_size=4))
def test_frames_are_those_that_the_model_aligns(tiny_ctc, processor, seconds):
    """Recordings of any length, some over several windows that overlap, padded to the longest."""
    waves = [tone(length) for length in seconds]
    inputs = processor.audio_features(waves)
    mel, aligned = speech_frames(inputs, True, torch.device("cpu"))
    assert int(aligned) == int(tiny_ctc(**inputs).mask.sum())
    heard = sum(len(wave) for wave in waves) / SAMPLING_RATE
    assert heard <= float(mel) * 0.01 <= heard + 0.04 * len(waves)  # whole aligned frames


def test_without_mask_padding_counts_and_without_audio_nothing():
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]])
    assert [int(n) for n in speech_frames({"input_features_mask": mask}, True, mask.device)] == [3, 1]
    assert [int(n) for n in speech_frames({"input_features_mask": mask}, False, mask.device)] == [3, 2]
    assert [int(n) for n in speech_frames({"labels": mask}, True, mask.device)] == [0, 0]


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_each_line_counts_what_was_trained_on(make, rows, stage):
    trainer = make(stage, max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=2)
    order = [*trainer.sampler.order(0), *trainer.sampler.order(1)]
    drawn = [rows[int(k)] for k in order[:16]]
    trainer.train()
    lines = steps_of(trainer)
    assert [line["step"] for line in lines] == [2, 4]
    batch = trainer.data_collator(drawn)
    tokens = (batch["labels"] != -100).sum() if stage != "align" else batch["ctc_label_lengths"].clamp(min=0).sum()
    assert sum(line["rows"] for line in lines) == 16 and sum(line["target_tokens"] for line in lines) == int(tokens)
    samples = [soundfile.info(row["audio"]["path"]).frames for row in drawn if row["audio"]]
    heard = sum(samples) / SAMPLING_RATE
    assert heard <= sum(line["audio_seconds"] for line in lines) <= heard + 0.04 * len(samples) + 0.01
    for line in lines:
        seconds = 2 / line["steps_per_second"]
        assert line["tokens_per_second"] * seconds == pytest.approx(line["target_tokens"])
        assert line["audio_seconds_per_second"] * seconds == pytest.approx(line["audio_seconds"], rel=0.01)
        assert {"grad_norm", "learning_rate", "epoch"} <= line.keys()
        # In stage I nothing is shrunk; a random head emits few runs, so a position stands for more than a frame.
        assert ("compression_ratio" not in line) if stage == "align" else line["compression_ratio"] > 1


def test_the_compression_ratio_is_frames_over_positions():
    monitor = Monitor(torch.device("cpu"))
    mask = torch.ones(2, 80, dtype=torch.long)
    batch = {"labels": torch.zeros(3, 4, dtype=torch.long), "input_features_mask": mask}
    for _ in range(2):
        monitor.add(batch, SimpleNamespace(audio_positions=torch.tensor([5, 3])))
    monitor.add({"labels": batch["labels"]}, SimpleNamespace(audio_positions=None))
    line = monitor.line(1, lambda counts: counts)
    assert (line["rows"], line["target_tokens"], line["audio_seconds"]) == (9, 36, 3.2)
    assert line["compression_ratio"] == 80 / 16
    assert monitor.line(1, lambda counts: counts)["rows"] == 0


def test_rates_leave_validation_and_saving_out(make):
    class Slow(TrainerCallback):
        times: list[float] = []

        def on_step_begin(self, args, state, control, **kwargs):
            self.times.append(time.perf_counter())

        on_step_end = on_step_begin

        def on_evaluate(self, args, state, control, **kwargs):
            time.sleep(0.4)

        on_save = on_evaluate

    trainer = make("align", eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
    trainer.add_callback(Slow)
    trainer.train()
    between = Slow.times[-1] - Slow.times[0]  # the first step's begin and the second's end; once slept twice
    assert sum(1 / line["steps_per_second"] for line in steps_of(trainer)) < between - 0.4


def test_a_resumed_run_logs_the_same_lines_but_for_the_rates(make, tmp_path):
    """A checkpoint between two log lines gets a line of its own, so that no sum is cut."""
    settings = {
        "max_steps": 5,
        "logging_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "per_device_train_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    whole = make("shrink", "whole", **settings)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    resumed = make("shrink", "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-3"))
    logs = []
    for trainer in (whole, resumed):
        lines = [json.loads(line) for line in open(f"{trainer.args.output_dir}/train_log.jsonl")]
        untimed = [{k: v for k, v in line.items() if not k.endswith(("_per_second", "_runtime"))} for line in lines]
        logs.append([{k: v for k, v in line.items() if "preparation_time" not in k} for line in untimed])
    assert [line["step"] for line in logs[0] if "loss" in line] == [2, 3, 4, 5]
    assert [line["step"] for line in logs[0] if "eval_loss" in line] == [2, 4, 5]
    assert logs[0] == logs[1]


def test_shares_of_the_tasks_are_logged_with_the_counts(make, rows):
    sampler = MixtureSampler(rows["task"][:], seed=3, draws_per_epoch=8, temperature_step=5, multiple_of=4)
    trainer = make("shrink", max_steps=3, sampler=sampler)
    trainer.train()
    epochs = [entry for entry in trainer.state.log_history if "temperature" in entry]
    assert [entry["temperature"] for entry in epochs] == [1.0, 6.0]
    for entry, draws in zip(epochs, (8, 4), strict=True):  # the run ends within the second epoch
        counts = {name.removeprefix("draws/"): n for name, n in entry.items() if name.startswith("draws/")}
        shares = {name.removeprefix("shares/"): n for name, n in entry.items() if name.startswith("shares/")}
        assert sum(counts.values()) == draws and shares == {task: n / draws for task, n in counts.items()}


def test_tensorboard_holds_the_curves_and_stays_here(make, tmp_path):
    settings = {"report_to": "tensorboard", "save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    trainer = make("align", **settings)
    trainer.train()
    again = make("align", **settings)  # as after a kill: step 3 comes again
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    events = EventAccumulator(str(tmp_path / "run" / LOGS)).Reload()
    assert {"train/loss", "train/ctc_loss", "train/grad_norm", "train/audio_seconds_per_second"} <= set(
        events.Tags()["scalars"]
    )
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    names = [str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()]
    pushed = list(filter_repo_objects([*names, "curves/training.png"], ignore_patterns=PRIVATE))
    assert any(name.startswith(LOGS) for name in names) and "curves/training.png" in pushed
    assert not any(name.startswith(LOGS) for name in pushed)


def test_what_reports_where(monkeypatch, capsys):
    assert reporters(None) == ["tensorboard"]
    assert reporters([]) == reporters(["none"]) == []
    assert reporters(["tensorboard"]) == ["tensorboard"]
    with pytest.raises(ConfigError, match="'report_to: tensorbord'; did you mean tensorboard"):
        reporters(["tensorbord"])
    monkeypatch.setattr(monitoring, "get_available_reporting_integrations", lambda: ["mlflow"])
    for name, remedy in (("wandb", "pip install wandb"), ("tensorboard", r'pip install "soundwave\[train\]"')):
        with pytest.raises(ConfigError, match=f"names '{name}', which is not installed: {remedy}"):
            reporters([name])
    monkeypatch.setattr(monitoring, "is_tensorboard_available", lambda: False)
    assert reporters(None) == []
    assert capsys.readouterr().err.count("soundwave[train]") == 1
    monkeypatch.setenv("RANK", "1")
    assert reporters(None) == [] and not capsys.readouterr().err
