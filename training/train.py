"""Run one stage: `soundwave train align|shrink|instruct --config FILE [field=value ...]`.

Also `python -m soundwave.training.train ...`, and from Python `run_stage(load_config(...))`. Several GPUs:
`accelerate launch -m soundwave.training.train ...`.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainingArguments, set_seed

from soundwave.model_card.build_card import build_card, check_name, llama_version
from soundwave.training.arguments import resolve_dtype, training_arguments
from soundwave.training.augment import SpecAugment
from soundwave.training.building import build_model
from soundwave.training.checkpoints import last_complete_checkpoint, refuse_old_checkpoints
from soundwave.training.collator import SoundwaveCollator
from soundwave.training.data import load_rows, recordings
from soundwave.training.encoder_cache import EncoderCache
from soundwave.training.mixture import MixtureSampler
from soundwave.training.stages import STAGES, ConfigError, StageConfig, load_config
from soundwave.training.trainer import (
    AlignmentTrainer,
    InstructionTrainer,
    ShrinkingTrainer,
    SoundwaveTrainerMixin,
)

TRAINERS: dict[str, type[SoundwaveTrainerMixin]] = {
    "align": AlignmentTrainer,
    "shrink": ShrinkingTrainer,
    "instruct": InstructionTrainer,
}
CONFIG_FILE = "stage_config.yaml"


def run_stage(config: StageConfig) -> Path:
    """Train one stage and save it: model, processor, `stage_config.yaml` and `train_log.jsonl` in `config.output_dir`.

    With `hub_model_id` it is pushed, with a model card unless the folder has a README.md already.

    Raises:
        ConfigError: for settings that contradict each other or do not fit the model, or an `output_dir` with the
            checkpoints of another run.
        DataError: for a row that does not fit the schema.
        CardError: for a `hub_model_id` that the LLM's licence does not allow.
    """
    if not config.resume:
        refuse_old_checkpoints(config.output_dir)
    args = training_arguments(config)
    set_seed(config.seed)  # the initial weights of adapters and LoRA follow from it
    model, processor = build_model(config, resolve_dtype(config))
    if config.hub_model_id is not None:  # now, not after the training
        check_name(config.hub_model_id.rsplit("/", 1)[-1], llama_version(model.config.to_dict()))
    rows = load_rows(config.data, config.data_root)
    eval_rows = load_rows(config.eval_data, config.data_root) if config.eval_data else None
    cache = _cache(config, args, model, processor, rows, eval_rows)
    trainer = TRAINERS[config.stage](
        model,
        args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        data_collator=SoundwaveCollator(processor, config.table.losses, cache),
        sampler=make_sampler(config, rows),
        spec_augment=_spec_augment(config),
        trains=config.trains,
    )
    checkpoint = last_complete_checkpoint(config.output_dir) if config.resume else None
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_model(config.output_dir, _internal_call=True)
    if trainer.is_world_process_zero():
        trainer.write_log()
        if model.config.lora is not None:  # of the stage before, where its LoRA went on
            lora = {f"lora_{name}": model.config.lora[name] for name in ("r", "alpha")}
            config = dataclasses.replace(config, **lora, lora_targets=model.config.lora["target_modules"])
        config.save(Path(config.output_dir) / CONFIG_FILE)
        card = Path(config.output_dir) / "README.md"
        if config.hub_model_id is not None and not card.exists():
            card.write_text(build_card(config.output_dir, config.hub_model_id), encoding="utf-8")
    if config.hub_model_id is not None:
        trainer.push_to_hub(commit_message=f"Stage {config.table.number}: {config.stage}")
    return Path(config.output_dir)


def make_sampler(config: StageConfig, rows: Dataset) -> MixtureSampler:
    """The mixture of a run over its rows' tasks."""
    return MixtureSampler(
        rows["task"][:],
        seed=config.seed,
        draws_per_epoch=config.draws_per_epoch,
        temperature_start=config.temperature_start,
        temperature_step=config.temperature_step,
        weights=config.task_weights,
        multiple_of=config.global_batch,
        durations=rows["duration_s"][:] if config.bucket_batches else None,
        bucket_batches=config.bucket_batches,
    )


def _spec_augment(config: StageConfig) -> SpecAugment | None:
    if not config.spec_augment:
        return None
    return SpecAugment(
        config.freq_masks, config.freq_mask_width, config.time_masks, config.time_mask_width, config.time_mask_share
    )


def _cache(
    config: StageConfig, args: TrainingArguments, model: Any, processor: Any, rows: Dataset, eval_rows: Dataset | None
) -> EncoderCache | None:
    """The encoder's features of all rows, encoded by the first process while the others wait."""
    if config.encoder_cache is None:
        return None
    if any(part.startswith("audio_tower") for part in config.trains):
        raise ConfigError(
            f"trains names {config.trains} and encoder_cache is set; an encoder that trains cannot be cached."
        )
    everything = [rows] if eval_rows is None else [rows, eval_rows]
    clips = (clip for part in everything for audio in part["audio"] for clip in recordings({"audio": audio}))
    with args.main_process_first(local=False, desc="encoding recordings"):
        model.audio_tower.to(args.device)
        return EncoderCache.build(config.encoder_cache, model, processor, clips, progress=config.progress)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("stage", choices=list(STAGES), help="I: align, II: shrink, III: instruct")
    parser.add_argument("--config", metavar="FILE", help="YAML settings (default: the paper's, see training/configs)")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="field=value",
        help="a setting over the file's, e.g. steps=100 model.ctc_head=tied",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; `argv` without the program's name. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="soundwave train", description="Run one training stage.")
    add_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)
    output = run_stage(load_config(arguments.config, arguments.overrides, arguments.stage))
    if torch.distributed.is_initialized():
        # A process that ends while another still saves, its group's threads running, aborts now and then.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(f"{output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
