"""How fast the stages train: whole updates, optimizer included, over one batch of a benchmark's recordings (Fig. 6).

The paper compares average training speeds at equal batch and finds stage I close to three times as fast as the rest
(§5.2): it runs without the LLM. Here each stage's own trainer makes its updates on a copy of the model, with the
settings of the stage table but for the batch, and a learning rate of 0, which costs the same. What comes out holds for
the given model, recordings and batch, and for no others.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from soundwave.eval.batches import describe_error
from soundwave.eval.efficiency_inference import Measurement, speech_llm, synchronize, transcript_of
from soundwave.eval.items import Item
from soundwave.eval.models.base import AudioModel
from soundwave.modeling_soundwave import SoundwaveForCTC
from soundwave.processing import SAMPLING_RATE
from soundwave.training.arguments import training_arguments
from soundwave.training.collator import SoundwaveCollator
from soundwave.training.lora import add_lora, has_lora
from soundwave.training.stages import STAGES, StageConfig
from soundwave.training.train import TRAINERS


class _Clock(TrainerCallback):
    """When each update was done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
        """Note it, once the device has done what it was given."""
        synchronize(self.device)
        self.times.append(time.perf_counter())


def measure_training_speed(
    model: AudioModel, items: Sequence[Item], most_rows: int, steps: int, warm_up: int
) -> Iterator[Measurement]:
    """Time the updates of each stage, all over the same recordings: the first that can be read.

    Args:
        model: A whole Soundwave model; it is copied, so that the device must hold a second one, and not changed.
        items: With one recording each, and what is said as the reference.
        most_rows: Rows of an update; fewer where there are fewer items.
        steps: Updates that are timed.
        warm_up: Updates before those, at least 1.

    Yields:
        Per update, in the group of its stage, ``{"seconds", "audio_s", "rows"}``; per item that cannot be used, why.

    Raises:
        ValueError: Another kind of model, or no item with one recording and a transcript.
    """
    soundwave, processor = speech_llm(model, "training_speed")
    collator = SoundwaveCollator(processor, config=soundwave.config)
    rows: list[dict[str, Any]] = []
    for item in items:
        if len(rows) == most_rows:
            break
        try:
            row = _row(item, processor)
            collator.example(row)  # all that can fail in it
        except Exception as error:  # decoders raise whatever they like; the item is named in the files
            yield Measurement(item.id, None, item, error=describe_error(error))
        else:
            rows.append(row)
    if not rows:
        raise ValueError("training_speed needs recordings with transcripts; measure it on a speech recognition set")
    audio_s = sum(len(row["audio"]["array"]) for row in rows) / SAMPLING_RATE
    for stage in STAGES:
        for step, seconds in enumerate(_updates(stage, soundwave, processor, rows, steps, warm_up)):
            numbers = {"seconds": seconds, "audio_s": audio_s, "rows": len(rows)}
            yield Measurement(f"{stage}-{step}", numbers, group=stage)


def _updates(
    stage: str, model: Any, processor: Any, rows: list[dict[str, Any]], steps: int, warm_up: int
) -> list[float]:
    """Seconds of each update after the warm-up."""
    trained = stage_model(stage, model)
    clock = _Clock(trained.device)
    with tempfile.TemporaryDirectory() as folder:
        config = StageConfig.for_stage(
            stage,
            output_dir=folder,
            per_device_batch=len(rows),
            global_batch=len(rows),
            steps=warm_up + steps,
            warmup_steps=0,
            logging_steps=warm_up + steps,
            learning_rate=0.0,
            device="auto" if trained.device.type == "cuda" else "cpu",
            dtype=str(model.dtype).removeprefix("torch."),
            report_to=[],
            progress=False,
        )
        inputs = SoundwaveCollator(processor, STAGES[stage].losses, config=trained.config)(rows)
        TRAINERS[stage](
            model=trained,
            args=training_arguments(config),
            train_dataset=Dataset.from_dict({"id": [row["id"] for row in rows], "task": ["asr"] * len(rows)}),
            processing_class=processor,
            data_collator=lambda _: dict(inputs),
            callbacks=[clock],
        ).train()
    times = clock.times[max(warm_up - 1, 0) :]
    return [after - before for before, after in zip(times, times[1:], strict=False)]


def stage_model(stage: str, model: Any) -> Any:
    """What a stage trains, copied from a whole model: stage I without the LLM, the others with a new LoRA in it."""
    config = StageConfig.for_stage(stage)
    if stage == "align":
        rows = model.ctc_head.rows(model.ctc_rows()).detach()  # of a tied head the LLM's own, which nothing writes to
        rows = rows if model.ctc_head.tied else rows.clone()
        speech = SoundwaveForCTC(deepcopy(model.config), deepcopy(model.audio_tower), rows)
        speech.alignment_adapter.load_state_dict(model.alignment_adapter.state_dict())
        speech.ctc_head.load_state_dict(model.ctc_head.state_dict(), strict=False)  # a tied head has no rows there
        copied = speech.to(model.device)
    else:
        copied = deepcopy(model)
        if not has_lora(copied):
            add_lora(copied, config.lora_r, config.lora_alpha, config.lora_targets, config.lora_dropout)
    for name in ("alignment_adapter", "ctc_head", "shrinking_adapter"):  # our parts are fp32 while they train
        for parameter in getattr(copied, name, torch.nn.Module()).parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return copied


def _row(item: Item, processor: Any) -> dict[str, Any]:
    """An item as a row of training: transcription."""
    if len(item.clips) != 1:
        raise ValueError(f"item {item.id!r} has {len(item.clips)} recordings, expected one")
    said = transcript_of(item)
    return {
        "id": item.id,
        "audio": {"array": item.clips[0].read(), "sampling_rate": SAMPLING_RATE},
        "task": "asr",
        "instruction": processor.transcription_prompt,
        "answer": said,
        "transcript": said,
    }
