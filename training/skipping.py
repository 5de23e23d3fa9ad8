"""Bad rows: left out of their batch, counted by reason, listed once; too many of them stop the run.

Nothing takes a bad row's place, so that what a step trains on stays a function of seed and step. Losses are sums over
counts, and so the mean over the good rows stays right.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback

from soundwave.training.collator import BadRow, Example, SoundwaveCollator
from soundwave.training.data import DataError
from soundwave.training.incidents import IncidentList, counts_of, report

SKIPPED = "skipped.jsonl"
IDS_SHOWN = 3  # in the error; the file has all
MIN_JUDGED = 100  # rows drawn before the share of bad ones says anything; an epoch's end is judged in any case


class SkippingCollator(SoundwaveCollator):
    """`SoundwaveCollator` that leaves bad rows out.

    A batch has two more entries, lists with one item for each of its B rows: `ids`, and `skipped`, which is `None` or
    what `skipped.jsonl` says of a row that was left out. Where all were, the batch is one that teaches nothing.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of the good ones among some rows."""
        examples: list[Example] = []
        skipped: list[dict[str, Any] | None] = []
        for row in rows:
            try:
                examples.append(self.example(row))
                skipped.append(None)
            except BadRow as error:
                named = {name: row.get(name) for name in ("id", "source", "task")}
                skipped.append({**named, "reason": error.reason, "detail": str(error)})
        return {**self.batch(examples or [self.silence()]), "ids": [row["id"] for row in rows], "skipped": skipped}


def take_rows(batch: dict[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """Take what is no tensor out of a batch: the ids of its good rows, and what is to be said of the bad ones."""
    ids, skipped = batch.pop("ids", []), batch.pop("skipped", [])
    return [name for name, bad in zip(ids, skipped, strict=True) if bad is None], [bad for bad in skipped if bad]


class SkippingMixin(Trainer):
    """How the trainers count and list the rows that their collator left out, over all devices alike."""

    max_skipped_fraction: float
    _skipped_rows: IncidentList
    _listed: set[tuple[str, str, str, str]]  # what is in it: a row is drawn again in each epoch
    _unlisted: Sequence[dict[str, Any]] = ()  # bad rows of this device's validation batches so far

    def begin_skipping(self) -> None:
        """Open the list, where the run stands."""
        if self.is_world_process_zero():
            self._skipped_rows = IncidentList(Path(self.args.output_dir) / SKIPPED, self.state.global_step)
            self._listed = {_key(entry["split"], entry) for entry in self._skipped_rows.entries}

    def count_rows(self, drawn: int, skipped: int, entries: list[dict[str, Any]]) -> None:
        """Count what an update drew and left out, on all devices together, and list this device's bad rows.

        Raises:
            DataError: on all devices, above `max_skipped_fraction`.
        """
        counts = self._row_counts()
        counts["drawn"] += drawn
        if skipped:  # the same on every device: all of them come to the exchange, or none
            entries = gather_object(entries)
            for reason, count in Counter(entry["reason"] for entry in entries).items():
                counts["skipped"][reason] = counts["skipped"].get(reason, 0) + count
            self._list("train", self.state.global_step + 1, entries)
        self.judge_skipped(MIN_JUDGED)

    def judge_skipped(self, at_least: int = 1) -> None:
        """Stop where too many of at least so many rows were bad.

        Raises:
            DataError: saying how many, for which reasons, and where they are listed.
        """
        counts = self._row_counts()
        skipped = sum(counts["skipped"].values())
        if counts["drawn"] >= at_least and skipped > self.max_skipped_fraction * counts["drawn"]:
            first = ", ".join(repr(name) for name in counts["first"])
            raise DataError(
                f"{self._skipped_summary()}, more than max_skipped_fraction = {self.max_skipped_fraction:g} allows; "
                f"the first are {first}. Mend or remove them, or raise max_skipped_fraction."
            )

    def note_skipped(self, batch: dict[str, Any]) -> tuple[int, bool]:
        """Take what is no tensor out of a validation batch; rows that were left out, and whether none remained."""
        named = "ids" in batch  # another collator's are not
        good, bad = take_rows(batch)
        self._unlisted = [*self._unlisted, *bad]
        return len(bad), named and not good

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """The library's; then the bad rows that the devices met are listed."""
        self._unlisted = ()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self.is_in_train and output.metrics.get(f"{metric_key_prefix}_skipped"):
            self._list("validation", self.state.global_step, gather_object(list(self._unlisted)))
        return output

    def log(self, logs, start_time=None):
        """Add how many rows were left out so far, by reason, to the line that reports the loss."""
        if "loss" in logs:
            logs |= {f"skipped/{reason}": count for reason, count in self._row_counts()["skipped"].items()}
        super().log(logs, start_time)

    def end_skipping(self) -> None:
        """Say how many rows were left out, and where they are listed."""
        if self._row_counts()["skipped"] and self.is_world_process_zero():
            report(f"{self._skipped_summary()}.")

    def _row_counts(self) -> dict[str, Any]:
        return counts_of(self, "skipped_rows", drawn=0, skipped={}, first=[])

    def _skipped_summary(self) -> str:
        counts = self._row_counts()
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(counts["skipped"].items()))
        path = Path(self.args.output_dir) / SKIPPED
        return f"{sum(counts['skipped'].values())} of {counts['drawn']} rows were left out ({reasons}), see {path}"

    def _list(self, split: str, step: int, entries: list[dict[str, Any]]) -> None:
        if split == "train":
            counts = self._row_counts()
            counts["first"] = list(dict.fromkeys([*counts["first"], *(entry["id"] for entry in entries)]))[:IDS_SHOWN]
        if not self.is_world_process_zero():
            return
        fresh = []
        for entry in entries:
            if (key := _key(split, entry)) not in self._listed:
                self._listed.add(key)
                fresh.append({"step": step, "split": split, **entry})
        self._skipped_rows.add(fresh)


def _key(split: str, entry: Mapping[str, Any]) -> tuple[str, str, str, str]:
    return split, entry["source"] or "", entry["id"], entry["reason"]


class SkippingCallback(TrainerCallback):
    """When the list is opened, judged and summed up."""

    def __init__(self, trainer: SkippingMixin):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the list."""
        self.trainer.begin_skipping()

    def on_epoch_end(self, args, state, control, **kwargs):
        """Judge small data, too."""
        self.trainer.judge_skipped()

    def on_train_end(self, args, state, control, **kwargs):
        """Sum up."""
        self.trainer.end_skipping()


def rows_taken(taken: Sequence[tuple[list[str], list[dict[str, Any]]]]) -> torch.Tensor:
    """Rows drawn and rows left out, (2,), of batches by `take_rows`."""
    skipped = sum(len(bad) for _, bad in taken)
    return torch.tensor([sum(len(ids) for ids, _ in taken) + skipped, skipped])
