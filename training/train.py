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
from trl import SFTConfig

from soundwave.model_card.build_card import build_card, check_name, llama_version
from soundwave.modeling_soundwave import SoundwaveConfig, SoundwaveForConditionalGeneration, SoundwaveForCTC
from soundwave.modeling_soundwave.weights_soundwave import find_shards, read_tensors
from soundwave.processing import SoundwaveProcessor
from soundwave.training.augment import SpecAugment
from soundwave.training.collator import SoundwaveCollator
from soundwave.training.data import load_rows, recordings
from soundwave.training.encoder_cache import EncoderCache
from soundwave.training.lora import add_lora, is_lora, restore_lora
from soundwave.training.mixture import MixtureSampler
from soundwave.training.progress import last_complete_checkpoint, refuse_old_checkpoints
from soundwave.training.stages import STAGES, ConfigError, StageConfig, check_field, load_config
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
OUR_PARTS = ("alignment_adapter.", "ctc_head.", "shrinking_adapter.")


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


def build_model(config: StageConfig, dtype: torch.dtype = torch.float32) -> tuple[Any, SoundwaveProcessor]:
    """The model and processor that a stage begins with, LoRA injected where the stage trains it.

    Stage I is a `SoundwaveForCTC`. The later stages begin with a stage I result (new shrinking adapter and LoRA), with
    a result of stage II or III (whose LoRA goes on), or with the two components alone.

    Args:
        config: settings of the run.
        dtype: of encoder and LLM; our own parts are fp32.

    Raises:
        ConfigError: when the stage has nothing to begin with, or for a setting that would have no effect.
    """
    for name in config.model:
        check_field(name, sorted(SoundwaveConfig.__dataclass_fields__), "model.")
    model, processor = (_from_components if config.start is None else _from_start)(config, dtype)
    if config.ctc_weight is not None:
        model.config.ctc_weight = config.ctc_weight
    if "lora" in config.trains and not any(is_lora(name) for name, _ in model.named_parameters()):
        add_lora(model, config.lora_r, config.lora_alpha, config.lora_targets, config.lora_dropout)
    return model, processor


def _from_components(config: StageConfig, dtype: torch.dtype) -> tuple[Any, SoundwaveProcessor]:
    if config.audio_model is None or config.text_model is None:
        raise ConfigError(
            f"stage {config.stage} has nothing to begin with: set start to the repository of the stage before, or "
            "audio_model and text_model to an encoder and an LLM."
        )
    # Model and processor must pad alike.
    fields = {name: config.model[name] for name in ("audio_padding",) if name in config.model} | config.processor
    processor = SoundwaveProcessor.from_components(config.audio_model, config.text_model, **fields)
    kind = SoundwaveForCTC if config.stage == "align" else SoundwaveForConditionalGeneration
    model = kind.from_components(
        config.audio_model, config.text_model, processor.audio_token_id, dtype=dtype, **config.model
    )
    return model, processor


def _from_start(config: StageConfig, dtype: torch.dtype) -> tuple[Any, SoundwaveProcessor]:
    start, hub = str(config.start), {"revision": config.start_revision} if config.start_revision else {}
    begun = SoundwaveConfig.from_pretrained(start, **hub)
    processor = SoundwaveProcessor.from_pretrained(start, **hub)
    from_stage_one = begun.architectures == ["SoundwaveForCTC"]
    if config.stage == "align" and not from_stage_one:
        raise ConfigError(f"{start} holds a {begun.architectures}; stage I goes on from a SoundwaveForCTC only.")
    _refuse_without_effect(config, from_stage_one)
    if config.stage == "align":
        aligned = SoundwaveForCTC.from_pretrained(start, dtype=torch.float32, **hub)
        aligned.audio_tower.to(dtype)
        return aligned, processor
    goes_on = begun.lora is not None and "lora" in config.trains
    kind = SoundwaveForConditionalGeneration
    if from_stage_one:
        model = kind.from_ctc(start, config.text_model, dtype=dtype, **hub, **config.model)
        processor.audio_padding = model.config.audio_padding  # model and processor must pad alike
    else:
        model = kind.from_pretrained(start, merge_lora=not goes_on, dtype=dtype, **hub)
    if dtype != torch.float32:  # our parts are fp32 in the file and must not be rounded between two stages
        parameters = dict(model.named_parameters())
        for name, tensor in read_tensors(find_shards(start, **hub), lambda name: name.startswith(OUR_PARTS)).items():
            if name in parameters:
                parameters[name].data = tensor
    if goes_on:
        restore_lora(model, start, config.lora_dropout, **hub)
    return model, processor


def _refuse_without_effect(config: StageConfig, from_stage_one: bool) -> None:
    """Settings of new parts, where the parts come from `start`: said, because nothing would come of them."""
    given = [f"processor.{name}" for name in config.processor]
    if config.stage == "align" or not from_stage_one:  # stage II makes a new model around what stage I has
        given += [f"model.{name}" for name in config.model]
    if given:
        raise ConfigError(
            f"{', '.join(given)} would have no effect: with start, they are those of {config.start}. Leave them out "
            "(processor={} model={} takes a file's back), or begin without start, from audio_model and text_model."
        )


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


def resolve_dtype(config: StageConfig) -> torch.dtype:
    """Type of the frozen parts: on a CPU bfloat16 is several times slower than float32."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.bfloat16 if _on_gpu(config) else torch.float32


def _on_gpu(config: StageConfig) -> bool:
    return config.device == "auto" and torch.cuda.is_available()


def training_arguments(config: StageConfig) -> TrainingArguments:
    """The library's arguments for a run; accumulation follows from the global batch and the number of processes."""
    dtype = resolve_dtype(config)
    kind = SFTConfig if config.stage == "instruct" else TrainingArguments
    return kind(
        output_dir=config.output_dir,
        max_steps=config.steps,
        per_device_train_batch_size=config.per_device_batch,
        per_device_eval_batch_size=config.per_device_batch,
        gradient_accumulation_steps=config.accumulation(int(os.environ.get("WORLD_SIZE", "1"))),
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": config.min_lr_share},
        warmup_steps=config.warmup_steps,
        optim="adamw_torch",
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        use_cpu=not _on_gpu(config),
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        activation_checkpointing=config.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="no" if config.eval_steps is None else "steps",
        eval_steps=config.eval_steps,
        save_strategy="no" if config.save_steps is None else "steps",
        save_steps=config.save_steps or 500,
        save_total_limit=config.save_total_limit,
        dataloader_num_workers=config.dataloader_workers,
        dataloader_pin_memory=_on_gpu(config),
        disable_tqdm=not config.progress,
        report_to=config.report_to or "none",
        remove_unused_columns=False,
        # A batch without recordings still reaches every trained parameter, so nothing needs looking for.
        ddp_find_unused_parameters=False,
        push_to_hub=config.hub_model_id is not None,
        hub_model_id=config.hub_model_id,
        hub_revision=config.hub_revision,
        hub_private_repo=config.hub_private,
        hub_strategy=config.hub_strategy,
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
