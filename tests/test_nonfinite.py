"""Updates whose loss or gradient is not finite: named, withheld to the bit, and too many in a row stop the run."""

import copy
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments
from trl import SFTConfig

from soundwave.training.collator import SoundwaveCollator
from soundwave.training.data import load_rows
from soundwave.training.finite import NONFINITE, NonFiniteError
from soundwave.training.lora import add_lora
from soundwave.training.stages import ConfigError, StageConfig
from soundwave.training.trainer import AlignmentTrainer, InstructionTrainer, ShrinkingTrainer
from tests.training_rows import write_rows

ROOT = Path(__file__).parents[1]
TRAINERS = {"align": AlignmentTrainer, "shrink": ShrinkingTrainer, "instruct": InstructionTrainer}
POISONED = {"align": "alignment_adapter", "shrink": "alignment_adapter", "instruct": "shrinking_adapter"}


class Poison(TrainerCallback):
    """Makes the output of a module (`"loss"`), or a gradient alone, NaN in some steps, in their last pass.

    Keeps weights and optimizer state as they were before and after each step.
    """

    def __init__(self, trainer, part, steps, cause="loss"):
        self.steps, self.passes, self.now = steps, trainer.args.gradient_accumulation_steps, False
        self.trainer, self.before, self.kept = trainer, {}, {}
        module = getattr(trainer.model, part)
        if cause == "loss":
            module.register_forward_hook(lambda _, inputs, output: output * torch.nan if self.now else None)
        else:
            parameter = next(p for p in module.parameters() if p.requires_grad)
            parameter.register_hook(lambda grad: grad * torch.inf if self.now else grad)
        trainer.add_callback(self)

    def on_step_begin(self, args, state, control, **kwargs):
        self.step, self.pass_ = state.global_step + 1, 1
        self.now = self.step in self.steps and self.passes == 1
        self.before[self.step] = self.snapshot()

    def on_substep_end(self, args, state, control, **kwargs):
        self.pass_ += 1
        self.now = self.step in self.steps and self.pass_ == self.passes

    def on_step_end(self, args, state, control, **kwargs):
        self.now = False
        self.kept[self.step] = same(self.before[self.step], self.snapshot())

    def snapshot(self):
        moments = [tensor for part in self.trainer.optimizer.state.values() for tensor in part.values()]
        return [tensor.clone() for tensor in (*self.trainer.model.state_dict().values(), *moments)]


def same(one, two):
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return load_rows(write_rows(tmp_path_factory.mktemp("rows"), written=0))


@pytest.fixture
def make(rows, processor, tiny_model, tiny_ctc, tmp_path):
    """Build a trainer of a stage; keyword arguments are `TrainingArguments`, or `max_nonfinite_in_row`."""

    def build(stage, folder="run", in_row=10, **settings):
        torch.manual_seed(7)
        model = copy.deepcopy(tiny_ctc if stage == "align" else tiny_model)
        if stage != "align":
            add_lora(model, 4, 8, ["q_proj", "v_proj"])
        defaults = {
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "bf16": False,
            "seed": 3,
        }
        kind = SFTConfig if stage == "instruct" else TrainingArguments
        args = kind(output_dir=str(tmp_path / folder), **defaults | settings)
        kwargs = {"train_dataset": rows, "processing_class": processor, "max_nonfinite_in_row": in_row}
        return TRAINERS[stage](model, args, **kwargs)

    return build


def listed(trainer):
    return [json.loads(line) for line in (Path(trainer.args.output_dir) / NONFINITE).read_text().splitlines()]


def logged(trainer):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    lines = (Path(trainer.args.output_dir) / "train_log.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.mark.parametrize("cause", ["loss", "gradient"])
@pytest.mark.parametrize("stage", list(TRAINERS))
def test_an_update_that_is_not_finite_changes_nothing(make, rows, stage, cause, capfd):
    trainer = make(stage)
    poison = Poison(trainer, POISONED[stage], {2, 4}, cause)
    trainer.train()
    assert poison.kept == {1: False, 2: True, 3: False, 4: True}  # momentum and weight decay rest as well
    assert all(bool(torch.isfinite(tensor).all()) for tensor in trainer.model.state_dict().values())
    order = trainer.sampler.order(0).tolist()
    expected = [[rows[k]["id"] for k in order[start : start + 2]] for start in (2, 6)]
    second, fourth = ({"step": s, "cause": cause, "ids": ids} for s, ids in zip((2, 4), expected, strict=True))
    assert listed(trainer) == [second, fourth]
    said = f"step 2: the {cause} is not finite, so the weights stay as they are; its rows are {', '.join(expected[0])}"
    assert said in capfd.readouterr().err
    lines = [entry for entry in logged(trainer) if "learning_rate" in entry]
    assert ["loss" in entry for entry in lines] == [True, False, True, False]
    assert [entry.get("nonfinite_updates") for entry in lines] == [None, 1, 1, 2]
    rates = [entry["learning_rate"] for entry in lines]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 4  # the schedule goes on


def test_a_collator_that_names_no_rows(make, processor, capfd):
    trainer = make("align")
    trainer.data_collator = SoundwaveCollator(processor, ("ctc",))
    poison = Poison(trainer, "alignment_adapter", {2})
    trainer.train()
    assert poison.kept == {1: False, 2: True, 3: False, 4: False}
    assert listed(trainer) == [{"step": 2, "cause": "loss", "ids": []}]
    assert "its rows are not known" in capfd.readouterr().err


def test_one_bad_pass_withholds_the_whole_update(make, rows):
    trainer = make("shrink", gradient_accumulation_steps=2)
    poison = Poison(trainer, "alignment_adapter", {2})
    trainer.train()
    assert poison.kept == {1: False, 2: True, 3: False, 4: False}
    order = trainer.sampler.order(0).tolist()
    assert listed(trainer) == [{"step": 2, "cause": "loss", "ids": [rows[k]["id"] for k in order[6:8]]}]


def test_a_logged_loss_is_the_mean_of_the_updates_that_were_made(make):
    entries = []
    for folder, every in (("one", 1), ("two", 2), ("four", 4)):
        trainer = make("shrink", folder, logging_steps=every)
        Poison(trainer, "alignment_adapter", {2})
        trainer.train()
        entries.append([entry for entry in logged(trainer) if "loss" in entry])
    (a, c, d), (first, second), (whole,) = entries
    for name in ("loss", "ce_loss", "ctc_loss"):
        assert first[name] == pytest.approx(a[name]), name
        assert second[name] == pytest.approx((c[name] + d[name]) / 2), name
        assert whole[name] == pytest.approx((a[name] + c[name] + d[name]) / 3), name


def test_too_many_in_a_row_stop_the_run_also_across_a_resume(make, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 9, "in_row": 3}
    whole = make("align", "whole", **settings)
    poison = Poison(whole, "alignment_adapter", {1, 2, 4, 5, 6})
    with pytest.raises(NonFiniteError, match=r"not finite in 3 updates in a row.*step 6; their rows are in .*whole"):
        whole.train()
    assert [entry["step"] for entry in listed(whole)] == [1, 2, 4, 5, 6]
    assert same(poison.before[6], poison.snapshot())
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    resumed = make("align", "resumed", **settings)
    Poison(resumed, "alignment_adapter", {5, 6})
    with pytest.raises(NonFiniteError, match="step 6"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-4"))
    assert listed(resumed) == listed(whole)
    # A new run in the same folder begins a new list.
    fresh = make("align", "whole", max_steps=1)
    fresh.train()
    assert not (tmp_path / "whole" / NONFINITE).exists()


def test_the_setting(tmp_path):
    assert StageConfig.for_stage("align", max_nonfinite_in_row=3).max_nonfinite_in_row == 3
    with pytest.raises(ConfigError, match="max_nonfinite_in_row is 0"):
        StageConfig.for_stage("align", max_nonfinite_in_row=0)


def test_devices_withhold_and_stop_together(tmp_path, encoder_folder, llm_folder):
    """The loss of one of two processes is NaN, or infinite where its gradient is not: both leave the update out."""
    write_rows(tmp_path / "data", written=0)
    script = f"""
        import os
        import sys
        import torch
        from soundwave.training import train
        from soundwave.training.finite import NonFiniteError
        from soundwave.training.stages import StageConfig
        from soundwave.modeling_soundwave import SoundwaveForCTC
        forward, passes, seen = SoundwaveForCTC.forward, 0, []
        def poisoned(self, *args, **kwargs):
            global passes
            passes += 1
            seen.append(self.alignment_adapter.proj.weight.detach().clone())
            out = forward(self, *args, **kwargs)
            if os.environ["RANK"] == "1" and passes > 1:
                out.loss = out.loss + (torch.inf if passes == 2 else torch.nan * out.loss)
            return out
        SoundwaveForCTC.forward = poisoned
        config = StageConfig.for_stage(
            "align", audio_model={encoder_folder!r}, text_model={llm_folder!r}, model={{"audio_padding": "longest"}},
            data=[{str(tmp_path / "data" / "rows.jsonl")!r}], output_dir={str(tmp_path / "run")!r}, steps=9,
            global_batch=4, per_device_batch=2, device="cpu", progress=False, report_to=[], max_nonfinite_in_row=3,
            warmup_steps=0)
        try:
            train.run_stage(config)
        except NonFiniteError as error:
            made = [not torch.equal(a, b) for a, b in zip(seen, seen[1:])]
            print("stopped", os.environ["RANK"], passes, made, flush=True)
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = sorted(line for line in done.stdout.splitlines() if line.startswith("stopped"))
    assert said == [f"stopped {rank} 4 [True, False, False]" for rank in (0, 1)], done.stderr[-3000:]
    entries = [json.loads(line) for line in (tmp_path / "run" / NONFINITE).read_text().splitlines()]
    assert [(entry["step"], entry["cause"], len(entry["ids"])) for entry in entries] == [
        (2, "loss", 2),
        (3, "loss", 2),
        (4, "loss", 2),
    ]
