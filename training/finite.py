"""Updates whose loss or gradient is not finite: withheld on all devices together, named, counted.

A withheld update leaves weights and optimizer as they were, to the bit; the step counter and the learning rate's
schedule go on, so that data and schedule stay functions of the step. Under fp16 an overflow of the gradients alone is
the loss scaler's business. DeepSpeed steps inside its backward pass: there updates are named and counted only.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback

from soundwave.training.incidents import IncidentList, counts_of, report

NONFINITE = "nonfinite.jsonl"
IDS_SHOWN = 8  # on stderr; the file has all


class NonFiniteError(ValueError):
    """Too many updates in a row had a loss or gradient that is not finite."""


class FiniteMixin(Trainer):
    """How the trainers withhold an update."""

    max_nonfinite_in_row: int
    _nonfinite: IncidentList
    _passed: list[tuple[list[str], torch.Tensor]]  # of this update: ids of each pass, and whether its loss is finite
    _empty: bool  # all rows of this update were bad: there is nothing to learn from
    _made = _withheld = 0  # updates since the last log

    def begin_finite(self) -> None:
        """Open the list, where the run stands."""
        if self.is_world_process_zero():
            self._nonfinite = IncidentList(Path(self.args.output_dir) / NONFINITE, self.state.global_step)

    def begin_update(self, ids: Sequence[list[str]], empty: bool) -> None:
        """Note the rows of each pass of this device, and whether no device has any."""
        self._ids, self._passed, self._empty = list(ids), [], empty
        self._loss_before = self._tr_loss.clone()

    def note_loss(self, loss: torch.Tensor) -> None:
        """Note whether the loss of the next pass is finite; nothing waits for the accelerator here."""
        self._passed.append((self._ids[len(self._passed)], torch.isfinite(loss.detach())))

    def keep_losses(self) -> None:
        """Called for an update that is made: the losses of its passes count."""

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        bad_loss = ~torch.stack([finite for _, finite in self._passed]).all()
        bad_gradient = torch.full_like(bad_loss, self.accelerator.scaler is None and not _is_finite(norm))
        found = torch.stack([bad_loss, bad_gradient]).long()
        losses, gradients = self.accelerator.reduce(found, "sum").tolist()
        tally = self._nonfinite_counts()
        if not losses and not gradients and not self._empty:
            self._made, tally["in_row"] = self._made + 1, 0
            self.keep_losses()
            return norm
        model.zero_grad()  # without gradients, rather than with zeros: momentum and weight decay must rest, too
        self._tr_loss.copy_(self._loss_before)
        self._withheld += 1
        if losses or gradients:
            self._name_rows("loss" if losses else "gradient", tally)
        return norm

    def _name_rows(self, cause: str, tally: dict[str, int]) -> None:
        """List the rows of an update that is withheld, on all devices together.

        Raises:
            NonFiniteError: after `max_nonfinite_in_row` of them in a row.
        """
        mine = [ids for ids, finite in self._passed if cause == "gradient" or not bool(finite)]
        ids = gather_object([name for part in mine for name in part])
        tally["updates"], tally["in_row"] = tally["updates"] + 1, tally["in_row"] + 1
        step = self.state.global_step + 1
        if self.is_world_process_zero():
            self._nonfinite.add([{"step": step, "cause": cause, "ids": ids}])
            more = f" and {len(ids) - IDS_SHOWN} more" if len(ids) > IDS_SHOWN else ""
            report(
                f"step {step}: the {cause} is not finite, so the weights stay as they are; its rows are "
                f"{', '.join(ids[:IDS_SHOWN]) or 'not known'}{more}"
            )
        if tally["in_row"] >= self.max_nonfinite_in_row:
            raise NonFiniteError(
                f"the {cause} was not finite in {tally['in_row']} updates in a row (max_nonfinite_in_row), the last "
                f"of them step {step}; their rows are in {Path(self.args.output_dir) / NONFINITE}. Look at these "
                "rows, or begin anew from an earlier checkpoint (start=.../checkpoint-N) with a lower learning_rate."
            )

    def _nonfinite_counts(self) -> dict[str, int]:
        return counts_of(self, "nonfinite", updates=0, in_row=0)

    def log(self, logs, start_time=None):
        """Make the loss the mean over the updates that were made, and say how many were not."""
        if "loss" in logs and self._withheld:
            if self._made:
                logs["loss"] *= (self._made + self._withheld) / self._made
            else:
                del logs["loss"]
        if not math.isfinite(logs.get("grad_norm", 0.0)):  # JSON has no NaN
            del logs["grad_norm"]
        if "learning_rate" in logs:
            if self._nonfinite_counts()["updates"]:
                logs["nonfinite_updates"] = self._nonfinite_counts()["updates"]
            self._made = self._withheld = 0
        super().log(logs, start_time)


def _is_finite(norm: Any) -> bool:
    """Whether the norm of the gradients, the same on all devices, is a number; DeepSpeed may not tell it."""
    if hasattr(norm, "full_tensor"):  # of sharded weights
        norm = norm.full_tensor()
    return norm is None or math.isfinite(float(norm))


class FiniteCallback(TrainerCallback):
    """When the list is opened."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the list."""
        self.trainer.begin_finite()
