"""The three Trainer subclasses: what trains, how losses are counted, and resuming exactly."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from transformers import TrainingArguments
from trl import SFTConfig

from soundwave.model_card.push_to_hub import published_files
from soundwave.training.augment import SpecAugment
from soundwave.training.checkpoints import FIGURES_ASIDE, last_complete_checkpoint
from soundwave.training.data import load_rows
from soundwave.training.freezing import freeze
from soundwave.training.lora import add_lora, is_lora
from soundwave.training.mixture import MixtureSampler
from soundwave.training.stages import STAGES, ConfigError
from soundwave.training.trainer import (
    AlignmentTrainer,
    InstructionTrainer,
    ShrinkingTrainer,
)
from soundwave.training.validation import edit_distance
from tests.test_modeling import batch_of, mel
from tests.tiny_models import tiny_model as tiny_modules
from tests.training_rows import write_rows

TRAINERS = {"align": AlignmentTrainer, "shrink": ShrinkingTrainer, "instruct": InstructionTrainer}
STAGE_NAMES = list(STAGES)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return load_rows(write_rows(tmp_path_factory.mktemp("rows")))


@pytest.fixture
def make(rows, processor, tiny_model, tiny_ctc, tmp_path):
    """Build a trainer of a stage; keyword arguments are `TrainingArguments`, or the trainer's own."""

    def build(stage, folder="run", dropout=True, sampler=None, spec_augment=None, trains=None, **settings):
        torch.manual_seed(7)
        model = copy.deepcopy(tiny_ctc if stage == "align" else tiny_model)
        if stage != "align":
            add_lora(model, 4, 8, ["q_proj", "v_proj"])
        if not dropout:
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
                elif isinstance(getattr(module, "dropout", None), float):
                    module.dropout = 0.0
        chosen = rows.select(range(10)) if stage == "align" else rows
        defaults = {
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "bf16": False,
            "seed": 3,
        }
        kind = SFTConfig if stage == "instruct" else TrainingArguments
        args = kind(output_dir=str(tmp_path / folder), **defaults | settings)
        return TRAINERS[stage](
            model,
            args,
            train_dataset=chosen,
            processing_class=processor,
            eval_dataset=chosen,
            sampler=sampler(chosen["task"][:]) if sampler else None,
            spec_augment=spec_augment,
            trains=trains,
        )

    return build


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_only_what_the_table_names_trains(make, stage):
    trainer = make(stage)
    before = weights(trainer)
    trainer.train()
    changed = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    trained = STAGES[stage].trains
    assert changed
    assert all(any(is_lora(n) if p == "lora" else n.startswith(p) for p in trained) for n in changed), changed
    for part in trained:
        assert any(is_lora(name) if part == "lora" else name.startswith(part) for name in changed), part
    assert not trainer.model.audio_tower.training  # frozen parts stay in evaluation mode
    assert trainer.model.alignment_adapter.training == (stage != "instruct")
    assert "forward" not in vars(trainer.model) and "use_cache" not in vars(trainer.model.config)


def test_a_component_that_trains_is_saved_whole(make):
    """Pinned to a commit, it would be read from there again, and what it learnt would be lost."""
    trainer = make("align")
    config = trainer.model.config
    config.audio_model_revision = config.text_model_revision = "0123abc"
    freeze(trainer.model, ["alignment_adapter"])
    assert (config.audio_model_revision, config.text_model_revision) == ("0123abc", "0123abc")
    freeze(trainer.model, ["alignment_adapter", "audio_tower"])
    assert (config.audio_model_revision, config.text_model_revision) == (None, "0123abc")
    trainer = make("shrink")
    trainer.model.config.text_model_revision = "0123abc"
    freeze(trainer.model, ["lora"])
    assert trainer.model.config.text_model_revision == "0123abc"
    freeze(trainer.model, ["language_model"])
    assert trainer.model.config.text_model_revision is None


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_the_log_names_each_loss_and_what_was_drawn(make, stage):
    trainer = make(stage)
    trainer.train()
    log = [json.loads(line) for line in open(f"{trainer.args.output_dir}/train_log.jsonl")]
    steps = [entry for entry in log if "loss" in entry]
    assert len(steps) == 2
    names = {"align": ["ctc_loss"], "shrink": ["ce_loss", "ctc_loss"], "instruct": ["ce_loss"]}[stage]
    factors = {"ce_loss": 1.0, "ctc_loss": 0.3 if stage == "shrink" else 1.0}
    for entry in steps:
        assert {"ce_loss", "ctc_loss"} & entry.keys() == set(names)
        assert entry["loss"] == pytest.approx(sum(factors[name] * entry[name] for name in names), rel=1e-5)
    first = next(entry for entry in log if "temperature" in entry)
    drawn = {name: count for name, count in first.items() if name.startswith("draws/")}
    assert first["temperature"] == 1.0 and sum(drawn.values()) == 2 * 4


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_accumulation_does_not_change_the_update(make, stage):
    """Four passes of two rows, some without audio, equal one pass of eight: losses are counted per token."""
    results = []
    for folder, size, passes in (("one", 8, 1), ("four", 2, 4)):
        trainer = make(
            stage,
            folder,
            dropout=False,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=passes,
            # Momentum-free, so that weights show the gradient itself and not its sign.
            optim="sgd",
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
        )
        before = weights(trainer)
        trainer.train()
        entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
        moved = {name: tensor - before[name] for name, tensor in trainer.model.state_dict().items()}
        results.append((entry, moved))
    (one, moved_one), (four, moved_four) = results
    for name in ("loss", "ce_loss", "ctc_loss", "grad_norm"):
        if name in one:
            assert one[name] == pytest.approx(four[name], rel=1e-4), name
    largest = max(float(tensor.abs().max()) for tensor in moved_one.values())
    for name, tensor in moved_one.items():
        assert torch.allclose(tensor, moved_four[name], atol=1e-4 * largest), name


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_a_resumed_run_ends_with_the_same_bits(make, tmp_path, stage):
    """Dropout, masks, mixture and optimizer go on where the checkpoint, inside the second epoch, was made."""
    settings = {
        "sampler": lambda tasks: MixtureSampler(tasks, seed=3, draws_per_epoch=12, temperature_step=5, multiple_of=4),
        "spec_augment": SpecAugment() if stage != "instruct" else None,
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 4,
        "logging_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    whole = make(stage, "whole", **settings)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    resumed = make(stage, "resumed", **settings)
    checkpoint = last_complete_checkpoint(tmp_path / "resumed")
    assert checkpoint.name == "checkpoint-4"
    resumed.train(resume_from_checkpoint=True)
    first, second = weights(whole), weights(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    losses = [[(e["step"], e["loss"]) for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == [2, 4, 6, 7]
    drawn = [[e for e in t.state.log_history if "temperature" in e] for t in (whole, resumed)]
    assert drawn[0] == drawn[1] and [e["temperature"] for e in drawn[0]] == [1.0, 6.0, 11.0]


def test_checkpoints_hold_a_loadable_repository_and_no_secrets(make, tmp_path):
    trainer = make("shrink", max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    names = {path.name for path in (tmp_path / "run" / "checkpoint-1").iterdir()}
    assert {"config.json", "model.safetensors", "modeling_soundwave.py", "processor_config.json"} <= names
    assert "training_args.bin" not in names and "README.md" not in names


def test_figures_of_the_weights_before_are_set_aside(make, tmp_path):
    """A card made from them would show figures that these weights never had."""
    trainer = make("align", max_steps=1)
    run = tmp_path / "run"
    (run / ".eval_results").mkdir(parents=True)
    for name in ("results.json", "answers.jsonl", "answers.settings.json", "judgements.jsonl", ".eval_results/a.yaml"):
        (run / name).write_text("{}")
    trainer.train()
    assert not list(run.glob("results*")) + list(run.glob("answers*")) + list(run.glob("judgements*"))
    assert len([path for path in (run / FIGURES_ASIDE).rglob("*") if path.is_file()]) == 5
    assert not [path for path in published_files(run) if path.startswith(("_", "results", "answers"))]


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_validation_reports_means_per_token(make, stage, rows):
    trainer = make(stage, dropout=False, per_device_eval_batch_size=3)
    trainer.model.eval()
    small = trainer.evaluate()
    trainer.args.per_device_eval_batch_size = 10
    large = trainer.evaluate()
    names = {"align": ["ctc_loss", "token_error_rate"], "shrink": ["ce_loss", "ctc_loss"], "instruct": ["ce_loss"]}[
        stage
    ]
    for name in names:
        # The split into batches must not show: these are sums over all rows, divided once.
        assert small[f"eval_{name}"] == pytest.approx(large[f"eval_{name}"], rel=1e-4), name
    assert small["eval_loss"] == pytest.approx(large["eval_loss"], rel=1e-4)


def test_masks_depend_on_the_place_in_the_run_not_on_devices(make):
    trainer = make("align", gradient_accumulation_steps=4)
    seeds = []
    for step in range(2):
        trainer.state.global_step = step
        for passes in range(4):
            trainer._passes = passes
            seeds.append(trainer._mask_seed())
    assert len(set(seeds)) == 8 and np.all(np.diff(seeds) == 1)


def test_several_gpus_in_one_process_are_refused(tiny_ctc, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    args._n_gpu = 2
    with pytest.raises(ConfigError, match="accelerate launch"):
        AlignmentTrainer(tiny_ctc, args)


def test_parts_that_do_not_exist_are_named(tiny_model):
    model = copy.deepcopy(tiny_model)
    with pytest.raises(ConfigError, match="trains names 'adapter'.*shrinking_adapter"):
        freeze(model, ["adapter"])
    with pytest.raises(ConfigError, match="the model has none"):
        freeze(model, ["lora"])
    freeze(model.to(torch.bfloat16), ["alignment_adapter", "ctc_head"])
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"alignment_adapter", "ctc_head"}
    assert set(trained.values()) == {torch.float32} and model.audio_tower.conv1.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("attention", ["frame", "full"])
def test_what_no_gradient_reaches_does_not_train(attention, processor):
    """Devices wait for every trained parameter's gradient, and a frame that sees only itself has no queries."""
    model = tiny_modules(alignment_attention=attention, dtype=torch.float32)
    freeze(model, ["alignment_adapter"])
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(".v_proj." in name for name in names)
    assert any(".q_proj." in name or ".k_proj." in name for name in names) == (attention == "full")
    batch = batch_of([[3, mel(50, 1).float(), 5]])
    model.train()(**batch).logits.sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == names


def test_stage_three_wants_its_own_arguments(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match="expected a trl.SFTConfig"):
        InstructionTrainer(tiny_model, TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"))


@pytest.mark.parametrize(
    ("a", "b", "edits"), [([], [], 0), ([1], [], 1), ([1, 2, 3], [2, 3, 4], 2), ([1, 2], [1, 3], 1)]
)
def test_edit_distance(a, b, edits):
    assert edit_distance(a, b) == edit_distance(b, a) == edits
