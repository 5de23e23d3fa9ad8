"""Validation losses: means per token over all rows and devices, and the error rate of the CTC labels in stage I."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import has_length

from soundwave.modeling_soundwave.seams_soundwave import collapse_runs
from soundwave.training.collator import IGNORED
from soundwave.training.monitoring import speech_frames

#: What a validation adds up: losses times their tokens, greedy labels' errors, frames, LLM positions, rows left out.
SUMS = ("ce", "tokens", "ctc", "targets", "errors", "frames", "positions", "skipped")


class ValidationMixin(Trainer):
    """The trainers' validation losses, from sums over all rows and devices that are divided once."""

    losses: Sequence[str]
    _validation: torch.Tensor  # sums of this device, in the order of `SUMS`

    def evaluate(self, *args, **kwargs):
        """The library's, without a trace in the training: it goes on as if nothing had been in between."""
        with random_state_kept(self.args.device):  # a loader draws a seed whenever it starts
            return super().evaluate(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset=None):
        """The library's; for several devices one in which no row is repeated to fill the last batches."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if self.args.world_size == 1 or not has_length(dataset):
            return super().get_eval_dataloader(eval_dataset)
        args = self.args
        return DataLoader(
            dataset,
            batch_sampler=share_of(len(dataset), args.eval_batch_size, args.process_index, args.world_size),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """The library's, with the figures of `mean_losses`."""
        self._validation = torch.zeros(len(SUMS), dtype=torch.float64)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        sums = self.accelerator.reduce(self._validation.to(self.args.device), "sum").tolist()
        config = self.accelerator.unwrap_model(self.model).config
        figures = mean_losses(dict(zip(SUMS, sums, strict=True)), config.ctc_weight)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Add a batch to the sums; the library's loop has nothing to gather, which it would cut to the last batch."""
        skipped, empty = self.note_skipped(inputs)
        inputs = self._prepare_inputs(inputs)
        counts = count_tokens(inputs)
        with torch.no_grad():
            outputs = self._forward(model, inputs, counts)
        self._validation[SUMS.index("skipped")] += skipped
        if empty:  # silence, run so that the devices stay together
            return None, None, None
        config = self.accelerator.unwrap_model(model).config
        sums = {
            "tokens": counts[0],
            "targets": counts[1],
            "frames": speech_frames(inputs, config.mask_padding, self.args.device)[1],
        }
        if "answer" in self.losses:
            sums["ce"] = outputs.ce_loss.double() * counts[0]
        if outputs.ctc_loss is not None:
            sums["ctc"] = outputs.ctc_loss.double() * counts[1].clamp(min=1)
        if self.stage == "align":
            labels = (outputs.token_ids, outputs.mask, config.blank_id)
            sums["errors"] = _ctc_errors(*labels, inputs)
            sums["positions"] = collapse_runs(*labels, config.keep_blanks).sum()
        elif outputs.audio_positions is not None:
            sums["positions"] = outputs.audio_positions.sum()
        self._validation += torch.tensor([float(sums.get(name, 0)) for name in SUMS], dtype=torch.float64)
        return None, None, None


def share_of(n_rows: int, batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """One device's batches of row numbers: every row is in one, and all devices have as many, if empty ones.

    Args:
        n_rows: rows of all devices together.
        batch_size: at most so many rows a batch.
        rank: of the device.
        world_size: number of devices.
    """
    batches = -(-n_rows // (batch_size * world_size)) * world_size
    return [chunk.tolist() for chunk in np.array_split(np.arange(n_rows), batches)[rank::world_size]] if n_rows else []


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Leave the generators of Python, NumPy and torch as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def count_tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Labelled tokens and CTC target tokens of a batch, (2,)."""
    labels, lengths = batch.get("labels"), batch.get("ctc_label_lengths")
    return torch.stack(
        [
            torch.tensor(0) if labels is None else (labels != IGNORED).sum().cpu(),
            torch.tensor(0) if lengths is None else lengths.clamp(min=0).sum().cpu(),
        ]
    )


def mean_losses(sums: dict[str, float], ctc_weight: float) -> dict[str, float]:
    """Mean losses per token over all rows, frames per LLM position, and in stage I the greedy labels' error rate.

    ``loss`` is the stage's: that of the answers plus ``ctc_weight`` times the CTC's, or the CTC's alone.

    Args:
        sums: over the rows, by the names of `SUMS`.
        ctc_weight: of the configuration.
    """
    tokens, targets = sums["tokens"], sums["targets"]
    figures: dict[str, float] = {"skipped": int(sums["skipped"])}
    if tokens:
        figures["ce_loss"] = sums["ce"] / tokens
    if targets:
        figures["ctc_loss"] = sums["ctc"] / targets
        if not tokens:  # stage I: only there are the greedy labels compared
            figures["token_error_rate"] = sums["errors"] / targets
    if tokens or targets:
        weight = ctc_weight if tokens else 1.0
        figures["loss"] = figures.get("ce_loss", 0.0) + weight * figures.get("ctc_loss", 0.0)
    if sums["positions"]:
        figures["compression_ratio"] = sums["frames"] / sums["positions"]
    return figures


def _ctc_errors(token_ids: torch.Tensor, mask: torch.Tensor, blank: int, inputs: dict[str, torch.Tensor]) -> int:
    """Edits between the greedy labels (n_audios, A) and the transcripts, over recordings that have one."""
    errors = 0
    lengths = inputs["ctc_label_lengths"].tolist()
    for ids, valid, target, length in zip(token_ids, mask, inputs["ctc_labels"].tolist(), lengths, strict=True):
        if length >= 0:
            heard = [token for token in torch.unique_consecutive(ids[valid]).tolist() if token != blank]
            errors += edit_distance(heard, target[:length])
    return errors


def edit_distance(hypothesis: Sequence[int], reference: Sequence[int]) -> int:
    """Insertions, deletions and substitutions between two sequences."""
    row = list(range(len(reference) + 1))
    for i, token in enumerate(hypothesis, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(reference, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (token != other))
    return row[-1]
