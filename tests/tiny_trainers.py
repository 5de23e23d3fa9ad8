"""Trainers of the three stages over tiny random models, for tests that look at what a run reports."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from trl import SFTConfig

from soundwave.training.lora import add_lora
from soundwave.training.train import TRAINERS

OWN = ("sampler", "trains", "answer_check", "data_collator")


def build_trainer(stage: str, model: Any, processor: Any, rows: Any, folder: Path, eval_rows: Any = None, **settings):
    """A trainer on a copy of the model, with LoRA where there is an LLM; `settings`: arguments, or the trainer's own.

    The seed is set: two trainers of the same settings train alike.
    """
    torch.manual_seed(7)
    model = copy.deepcopy(model)
    if stage != "align":
        add_lora(model, 4, 8, ["q_proj", "v_proj"])
    own = {name: settings.pop(name) for name in OWN if name in settings}
    arguments = {
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
    return TRAINERS[stage](
        model,
        kind(output_dir=str(folder), **arguments | settings),
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        **own,
    )
