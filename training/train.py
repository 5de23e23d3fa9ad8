"""Run one stage: `soundwave train align|shrink|instruct --config FILE [field=value ...]`.

Also `python -m soundwave.training.train ...`, and from Python `run_stage(load_config(...))`. Several GPUs:
`accelerate launch -m soundwave.training.train ...`.
"""

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainingArguments, set_seed
from transformers.utils.logging import disable_progress_bar

from soundwave.model_card.build_card import CARD, is_free, write_card
from soundwave.model_card.figures import CardError
from soundwave.model_card.licences import check_name, llama_version
from soundwave.training.arguments import (
    check_best_metric,
    resolve_dtype,
    stopping_callbacks,
    training_arguments,
)
from soundwave.training.augment import SpecAugment
from soundwave.training.batching import LengthBatches, row_seconds
from soundwave.training.building import build_model, pin_start
from soundwave.training.checkpoints import beginning, deciding_settings, refuse_old_checkpoints
from soundwave.training.data import load_rows, recordings, with_audio
from soundwave.training.described import draft_card_facts
from soundwave.training.encoder_cache import EncoderCache
from soundwave.training.generating import AnswerCheck
from soundwave.training.hub import push_result
from soundwave.training.incidents import report
from soundwave.training.lora import LORA_IN
from soundwave.training.mixture import MixtureSampler
from soundwave.training.plan import make_plan
from soundwave.training.report import write_run_report
from soundwave.training.skipping import SkippingCollator
from soundwave.training.stages import STAGES, ConfigError, StageConfig, load_config
from soundwave.training.streaming import StreamedMixture
from soundwave.training.trainer import (
    AlignmentTrainer,
    InstructionTrainer,
    ShrinkingTrainer,
    SoundwaveTrainerMixin,
)

logger = logging.getLogger(__name__)

TRAINERS: dict[str, type[SoundwaveTrainerMixin]] = {
    "align": AlignmentTrainer,
    "shrink": ShrinkingTrainer,
    "instruct": InstructionTrainer,
}
CONFIG_FILE = "stage_config.yaml"


def run_stage(config: StageConfig) -> Path:
    """Train one stage, save it and push it where `hub_model_id` is set; see `train_stage` and `hub.push_result`."""
    push_result(train_stage(config), config)
    return Path(config.output_dir)


def train_stage(config: StageConfig) -> SoundwaveTrainerMixin:
    """Train one stage and save it: model, processor, `stage_config.yaml` and `train_log.jsonl` in `config.output_dir`.

    Beside them, a draft of `card.yaml` with rows and hours of the data, unless a person has written one. With
    `hub_model_id`, a model card too, unless the folder has a README.md already. Returns the trainer, for
    `hub.push_result`.

    Raises:
        ConfigError: for settings that contradict each other or do not fit the model, or an `output_dir` with the
            checkpoints of another run.
        DataError: for a row that does not fit the schema, or more bad rows than `max_skipped_fraction`.
        NonFiniteError: after `max_nonfinite_in_row` updates without a finite loss and gradient.
        CardError: for a `hub_model_id` that the LLM's licence does not allow.
    """
    if not config.resume:
        refuse_old_checkpoints(config.output_dir)
    config = pin_start(config)
    trainer = make_trainer(config)
    begin = beginning(config, trainer.run_settings)
    if begin.finished:
        logger.warning("%s holds the result of this run; nothing is left to train.", config.output_dir)
        return trainer
    if trainer.is_world_process_zero():  # at the end once more; until then it says where a run cut short belongs
        config.save(Path(config.output_dir) / CONFIG_FILE)
        draft_card_facts(config.output_dir, trainer.train_dataset, trainer.sampler)
    try:
        trainer.train(resume_from_checkpoint=begin.folder)
    finally:  # an error's log is the one that is read; an empty one would hide that of the run before
        if trainer.is_world_process_zero() and trainer.state.log_history:
            trainer.write_log()
    _save_result(trainer, config)
    return trainer


def make_trainer(config: StageConfig) -> SoundwaveTrainerMixin:
    """Model, data and trainer of a stage; raises what `train_stage` does."""
    args = training_arguments(config)
    if not config.progress:
        disable_progress_bar()  # of loading and saving
    set_seed(config.seed)  # the initial weights of adapters and LoRA follow from it
    model, processor = build_model(config, resolve_dtype(config))
    if config.hub_model_id is not None:  # now, not after the training
        check_name(config.hub_model_id.rsplit("/", 1)[-1], llama_version(model.config.to_dict()))
    sampler: MixtureSampler | StreamedMixture
    if config.streaming:
        sampler, batches = StreamedMixture.from_config(config), None
        rows = sampler.dataset()
    else:
        rows = load_rows(config.data, config.data_root)
        rows = with_audio(rows) if config.table.needs_audio else rows
        sampler = make_sampler(config, rows)
        batches = make_batches(config, rows, sampler, args.world_size, model.config.audio_padding)
    eval_rows = load_rows(config.eval_data, config.data_root) if config.eval_data else None
    if eval_rows is not None and config.table.needs_audio:
        eval_rows = with_audio(eval_rows)
    check_best_metric(config, eval_rows)
    cache = _cache(config, args, model, processor, rows, eval_rows)
    trainer = TRAINERS[config.stage](
        model,
        args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        data_collator=SkippingCollator(processor, config.table.losses, cache, model.config),
        sampler=sampler,
        batches=batches,
        spec_augment=_spec_augment(config),
        trains=config.trains,
        max_skipped_fraction=config.max_skipped_fraction,
        max_nonfinite_in_row=config.max_nonfinite_in_row,
        answer_check=AnswerCheck.from_config(config),
        callbacks=stopping_callbacks(config),
    )
    trainer.run_settings = deciding_settings(config, rows)
    return trainer


def _save_result(trainer: SoundwaveTrainerMixin, config: StageConfig) -> None:
    """Weights, settings, report and card in `config.output_dir`; the mark that they are whole comes last."""
    trainer.save_model(config.output_dir, _internal_call=True)
    if trainer.is_world_process_zero():
        config = with_lora_of(trainer.accelerator.unwrap_model(trainer.model), config)
        config.save(Path(config.output_dir) / CONFIG_FILE)
        write_run_report(config.output_dir)
        trainer.mark_finished()
        if config.hub_model_id is not None and is_free(Path(config.output_dir) / CARD):
            try:
                write_card(config.output_dir, config.hub_model_id)
            except CardError as error:  # a slip in card.yaml is no failure of the run
                report(f"{config.output_dir} has no new card: {error}")


def with_lora_of(model: Any, config: StageConfig) -> StageConfig:
    """The settings, with the sizes that a LoRA has which went on from the stage before."""
    for kind in LORA_IN:
        if (fields := getattr(model.config, kind)) is not None:
            sizes = {"r": fields["r"], "alpha": fields["alpha"], "targets": fields["target_modules"]}
            config = dataclasses.replace(config, **{f"{kind}_{name}": value for name, value in sizes.items()})
    return config


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


def make_batches(
    config: StageConfig, rows: Dataset, sampler: MixtureSampler, devices: int = 1, audio_padding: str = "longest"
) -> LengthBatches | None:
    """The sampler's draws in micro-batches by seconds of audio; `None` where they go by rows.

    Raises:
        ConfigError: when a recording's length is not known, or makes no difference.
    """
    if config.max_seconds_per_batch is None:
        return None
    if audio_padding == "max_length":
        raise ConfigError(
            f"max_seconds_per_batch is {config.max_seconds_per_batch}, but audio_padding is 'max_length': every "
            "recording fills whole windows, whatever it shares a batch with. Set model.audio_padding=longest, or "
            "leave max_seconds_per_batch out."
        )
    return LengthBatches(sampler, row_seconds(rows), config.max_seconds_per_batch, devices, config.steps)


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
    everything = [rows] if eval_rows is None else [rows, eval_rows]
    clips = (clip for part in everything for audio in part["audio"] for clip in recordings({"audio": audio}))
    with args.main_process_first(local=False, desc="encoding recordings"):
        if args.process_index > 0:
            return EncoderCache(config.encoder_cache)
        model.audio_tower.to(args.device)
        return EncoderCache.build(config.encoder_cache, model, processor, clips, progress=config.progress)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("stage", choices=list(STAGES), help="I: align, II: shrink, III: instruct")
    parser.add_argument("--config", metavar="FILE", help="YAML settings (default: the paper's, see training/configs)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would train, on what, in how much memory, and stop"
    )
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
    config = load_config(arguments.config, arguments.overrides, arguments.stage)
    if arguments.dry_run:
        sys.stdout.write(str(make_plan(config)))
        return 0
    trainer = train_stage(config)
    if torch.distributed.is_initialized():
        # A process that ends while another still saves, its group's threads running, aborts now and then.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    push_result(trainer, config)  # by the first process, when no other waits: it may take long
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(f"{config.output_dir}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
