"""A stage's settings as the library's arguments."""

import os
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from trl import SFTConfig

from soundwave.training.generating import figure_of, sample_rows
from soundwave.training.monitoring import reporters
from soundwave.training.stages import ConfigError, StageConfig, higher_is_better

LONGEST_ENCODING_S = 7 * 24 * 3600
WINDOW_S = 30.0  # of both encoders


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
        per_device_eval_batch_size=_eval_batch(config),
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
        save_steps=500 if config.save_steps is None else config.save_steps,
        save_total_limit=config.save_total_limit,
        load_best_model_at_end=config.best_metric is not None,
        metric_for_best_model=config.best_metric,
        greater_is_better=None if config.best_metric is None else higher_is_better(config.best_metric),
        restore_callback_states_from_checkpoint=True,  # the patience of early stopping
        # The other processes wait while the first one encodes all recordings.
        ddp_timeout=1800 if config.encoder_cache is None else LONGEST_ENCODING_S,
        dataloader_num_workers=config.dataloader_workers,
        dataloader_pin_memory=_on_gpu(config),
        disable_tqdm=not config.progress,
        report_to=reporters(config.report_to) or "none",
        remove_unused_columns=False,
        # A batch without recordings still reaches every trained parameter, so nothing needs looking for.
        ddp_find_unused_parameters=False,
        push_to_hub=config.hub_model_id is not None,
        hub_model_id=config.hub_model_id,
        hub_revision=config.hub_revision,
        hub_private_repo=config.hub_private,
        hub_strategy=config.hub_strategy,
    )


def _eval_batch(config: StageConfig) -> int:
    """Rows of a validation pass; where seconds bound a training pass, as many as fit at a window's length."""
    if config.max_seconds_per_batch is None:
        return config.per_device_batch
    return max(1, min(config.per_device_batch, int(config.max_seconds_per_batch // WINDOW_S)))


def stopping_callbacks(config: StageConfig) -> list[TrainerCallback]:
    """What ends a run before its last step: nothing, or validations that no longer get better."""
    if config.early_stopping_patience is None:
        return []
    return [EarlyStoppingCallback(config.early_stopping_patience)]


def check_best_metric(config: StageConfig, eval_rows: Any) -> None:
    """Refuse a `best_metric` that no validation of these rows reports: now, not after `eval_steps` updates.

    Raises:
        ConfigError: naming those that there are.
    """
    if config.best_metric is None:
        return
    ctc = config.stage == "align"
    known = {"eval_loss"} | {{"answer": "eval_ce_loss", "ctc": "eval_ctc_loss"}[loss] for loss in config.table.losses}
    known |= {"eval_token_error_rate"} if ctc else set()
    sharded = {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & os.environ.keys()  # which answer nothing
    if config.eval_generate_rows and not sharded:
        answered = eval_rows.select_columns(["task", "answer", "transcript", "messages"])
        figures = [figure and figure[0] for figure in (figure_of(row, ctc) for row in answered)]
        known |= {f"eval_{figures[row]}" for row in sample_rows(figures, config.eval_generate_rows, config.seed)}
    if config.best_metric not in known:
        raise ConfigError(
            f"best_metric is {config.best_metric}, but validation in stage {config.stage} on eval_data "
            f"reports {', '.join(sorted(known))}."
        )
