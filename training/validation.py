"""Validation losses: means per token over all rows and devices, and the error rate of the CTC labels in stage I."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import Trainer

from soundwave.modeling_soundwave.seams_soundwave import collapse_runs
from soundwave.training.collator import IGNORED
from soundwave.training.monitoring import speech_frames


class ValidationMixin(Trainer):
    """The trainers' `prediction_step`; what it returns has a row for each of the batch, so that it gathers."""

    def evaluate(self, *args, **kwargs):
        """The library's, without a trace in the training: it goes on as if nothing had been in between."""
        with random_state_kept(self.args.device):  # a loader draws a seed whenever it starts
            return super().evaluate(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss, and per row its share of the batch's sums: B rows each, which gather over devices."""
        left_out = self.note_skipped(inputs)
        inputs = self._prepare_inputs(inputs)
        counts = count_tokens(inputs)
        with torch.no_grad():
            outputs = self._forward(model, inputs, counts)
        if prediction_loss_only:
            return outputs.loss, None, None
        B = len(left_out)
        config = self.accelerator.unwrap_model(model).config
        frames = speech_frames(inputs, config.mask_padding, self.args.device)[1]
        sums = [0.0, float(counts[0]), 0.0, float(counts[1]), 0.0, float(frames), 0.0]
        if "answer" in self.losses:
            sums[0] = float(outputs.ce_loss * counts[0])
        if outputs.ctc_loss is not None:
            sums[2] = float(outputs.ctc_loss * counts[1].clamp(min=1))
        if self.stage == "align":
            labels = (outputs.token_ids, outputs.mask, config.blank_id)
            sums[4] = float(_ctc_errors(*labels, inputs))
            sums[6] = float(collapse_runs(*labels, config.keep_blanks).sum())
        elif outputs.audio_positions is not None:
            sums[6] = float(outputs.audio_positions.sum())
        rows = torch.tensor(sums, dtype=torch.float64).div(B).expand(B, -1)
        rows = torch.cat([rows, left_out[:, None].double()], dim=1).to(self.args.device)
        return outputs.loss, rows, rows[:, :1].contiguous()


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


def mean_losses(prediction: Any, ctc_weight: float = 1.0) -> dict[str, float]:
    """Mean losses per token over all rows, frames per LLM position, and in stage I the greedy labels' error rate.

    ``loss`` is the stage's: that of the answers plus ``ctc_weight`` times the CTC's, or the CTC's alone. It takes the
    place of the library's own, which is a mean over batches.
    """
    ce, tokens, ctc, targets, errors, frames, positions, skipped = prediction.predictions.sum(axis=0).tolist()
    metrics: dict[str, float] = {"skipped": int(skipped)}
    if tokens:
        metrics["ce_loss"] = ce / tokens
    if targets:
        metrics["ctc_loss"] = ctc / targets
        if not tokens:  # stage I: only there are the greedy labels compared
            metrics["token_error_rate"] = errors / targets
    if tokens or targets:
        weight = ctc_weight if tokens else 1.0
        metrics["loss"] = metrics.get("ce_loss", 0.0) + weight * metrics.get("ctc_loss", 0.0)
    if positions:
        metrics["compression_ratio"] = frames / positions
    return metrics


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
