"""The three stages as data: what trains, by which losses, and what the paper sets.

The paper's values are those of §4.1 and Table 13. Its batch sizes are read per GPU, on 32 GPUs, times the
accumulation: only then do four days of training and more than one epoch fit together. Settings hold the *global*
batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class ConfigError(ValueError):
    """A setting that does not exist, has the wrong type, or contradicts another one."""


@dataclass(frozen=True)
class Stage:
    """One row of the stage table.

    Args:
        number: I, II or III, as the paper counts.
        trains: name prefixes of the parameters that train; `"lora"` stands for the LoRA matrices in the LLM,
            `"encoder_lora"` for those in the encoder.
        losses: `"ctc"` on the transcript, `"answer"` for cross-entropy on the answer.
        needs_audio: whether every row must have a recording (no LLM takes part, so text has nothing to train).
        defaults: what the paper sets for this stage, as fields of `StageConfig`.
    """

    number: int
    trains: tuple[str, ...]
    losses: tuple[str, ...]
    needs_audio: bool
    defaults: Mapping[str, Any]


STAGES: dict[str, Stage] = {
    "align": Stage(
        number=1,
        trains=("alignment_adapter", "ctc_head.blank", "ctc_head.log_scale"),  # 144M
        losses=("ctc",),
        needs_audio=True,
        defaults={
            "global_batch": 8192,  # 32 rows x 8 accumulated x 32 GPUs
            "per_device_batch": 32,
            "learning_rate": 1e-4,
            "steps": 6000,
            "spec_augment": True,
        },
    ),
    "shrink": Stage(
        number=2,
        trains=("alignment_adapter", "shrinking_adapter", "lora"),  # 266M
        losses=("answer", "ctc"),
        needs_audio=False,
        defaults={
            "global_batch": 4096,  # 16 x 8 x 32
            "per_device_batch": 16,
            "learning_rate": 3e-5,
            "steps": 6000,
            "spec_augment": True,
            "temperature_step": 5.0,  # T = 1 + 5 per epoch (§4.1)
        },
    ),
    "instruct": Stage(
        number=3,
        trains=("shrinking_adapter", "lora"),  # 122M (Table 13); §2.4 words it as ("lora",)
        losses=("answer",),
        needs_audio=False,
        defaults={
            "global_batch": 1024,  # 8 x 4 x 32
            "per_device_batch": 8,
            "learning_rate": 3e-5,
            "steps": 4000,
        },
    ),
}
