"""Which row comes next: the temperature mixture of eq. 2 as a sampler that is a pure function of seed and epoch.

An epoch is `draws_per_epoch` draws. How many of them a task gets is fixed by its share (largest remainder), so the
counts are exact; which of its rows, by going through shuffled passes over the task, each to its end, across epochs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from soundwave.training.stages import ConfigError


def task_probabilities(sizes: Mapping[str, int], temperature: float) -> dict[str, float]:
    """Shares p_k proportional to (|D_k| / sum |D|)^(1/T), normalised (eq. 2); tasks without rows get 0."""
    total = sum(sizes.values())
    if total == 0:
        raise ConfigError(f"there are no rows to draw from; the tasks are {', '.join(sizes) or 'none'}.")
    powers = {task: (size / total) ** (1.0 / temperature) if size else 0.0 for task, size in sizes.items()}
    norm = sum(powers.values())
    return {task: power / norm for task, power in powers.items()}


def apportion(probabilities: Mapping[str, float], draws: int) -> dict[str, int]:
    """Whole counts that sum to `draws`, each within one of its share (largest remainder, ties by order)."""
    exact = np.array([probability * draws for probability in probabilities.values()])
    counts = np.floor(exact + 1e-9).astype(int)
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[: draws - counts.sum()]] += 1
    return dict(zip(probabilities, counts.tolist(), strict=True))


@dataclass(frozen=True)
class EpochPlan:
    """What one epoch draws."""

    epoch: int
    temperature: float
    probabilities: dict[str, float]
    counts: dict[str, int]


class MixtureSampler(Sampler[int]):
    """Row numbers of one epoch, tasks mixed by temperature.

    Args:
        tasks: the task of every row, in the order of the dataset.
        seed: everything random follows from it and the epoch.
        draws_per_epoch: `None` = the number of rows.
        temperature_start: T of the first epoch (1: every row equally likely).
        temperature_step: added with each epoch (the paper: 5; towards equal shares of the tasks).
        weights: shares by hand in place of eq. 2, for every task that occurs.
        multiple_of: draws are rounded up to a multiple of this (the global batch), so that no batch is cut short.
        durations: seconds of audio per row; with `bucket_batches`, rows of similar length share a batch.
        bucket_batches: batches of `multiple_of` rows that are filled by length together; 0 = in drawn order.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        seed: int = 0,
        draws_per_epoch: int | None = None,
        temperature_start: float = 1.0,
        temperature_step: float = 0.0,
        weights: Mapping[str, float] | None = None,
        multiple_of: int = 1,
        durations: Sequence[float | None] | None = None,
        bucket_batches: int = 0,
    ):
        if bucket_batches and durations is None:
            raise ConfigError("bucket_batches needs the durations of the rows (`duration_s`).")
        names = np.asarray(tasks, dtype=str)
        # Sorted: the order in which sources were listed must not change the draws of a seed more than it has to.
        self.rows = {str(task): np.flatnonzero(names == task) for task in np.unique(names)}
        self.sizes = {task: len(rows) for task, rows in self.rows.items()}
        if not self.sizes:
            raise ConfigError("there are no rows to draw from; check the data sources.")
        if weights and (set(weights) != set(self.sizes) or min(weights.values()) < 0 or sum(weights.values()) <= 0):
            raise ConfigError(
                f"task_weights are {dict(weights)}, but the rows hold the tasks {', '.join(self.sizes)}; give each of "
                "these a weight of at least 0 (0 leaves it out), and one above 0."
            )
        self.seed, self.weights = seed, dict(weights or {})
        self.temperature_start, self.temperature_step = temperature_start, temperature_step
        self.draws = -(-(draws_per_epoch or len(names)) // multiple_of) * multiple_of
        self.batch, self.bucket_batches = multiple_of, bucket_batches
        self.durations = np.array([duration or 0.0 for duration in durations or ()])
        if bucket_batches and not (self.durations > 0).any():
            raise ConfigError(
                f"bucket_batches is {bucket_batches}, but none of the {len(names)} rows has a duration to sort by; "
                "give rows with audio their `duration_s` in seconds, or set bucket_batches to 0."
            )
        self._before = [dict.fromkeys(self.sizes, 0)]  # draws of each task before epoch 0, 1, ...
        self.epoch = 0

    def temperature(self, epoch: int) -> float:
        """T of an epoch."""
        return self.temperature_start + self.temperature_step * epoch

    def plan(self, epoch: int) -> EpochPlan:
        """Temperature, shares and exact counts of an epoch."""
        temperature = self.temperature(epoch)
        if self.weights:
            total = sum(self.weights.values())
            probabilities = {task: self.weights[task] / total for task in self.sizes}
        else:
            probabilities = task_probabilities(self.sizes, temperature)
        return EpochPlan(epoch, temperature, probabilities, apportion(probabilities, self.draws))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration draws."""
        self.epoch = epoch

    def order(self, epoch: int) -> np.ndarray:
        """The rows of an epoch, (draws,), in order: a function of seed and epoch alone."""
        plan = self.plan(epoch)
        while len(self._before) <= epoch:
            counts, last = self.plan(len(self._before) - 1).counts, self._before[-1]
            self._before.append({task: last[task] + counts[task] for task in last})
        before = self._before[epoch]
        parts = [self._draw(k, task, before[task], plan.counts[task]) for k, task in enumerate(self.sizes)]
        rng = np.random.default_rng([self.seed, 0, epoch])
        order = rng.permutation(np.concatenate(parts))
        return self._bucket(order, rng) if self.bucket_batches else order

    def _bucket(self, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The same draws with rows of similar length in a batch, batches in random order; text rows go anywhere."""
        size = self.batch * self.bucket_batches
        batches = []
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            seconds = self.durations[rows]
            typical = seconds[seconds > 0] if (seconds > 0).any() else np.zeros(1)
            seconds = np.where(seconds > 0, seconds, rng.choice(typical, len(rows)))
            grouped = rows[np.argsort(seconds, kind="stable")].reshape(-1, self.batch)
            batches += list(grouped[rng.permutation(len(grouped))])
        return np.concatenate(batches)

    def _draw(self, k: int, task: str, start: int, count: int) -> np.ndarray:
        """Draws `start` to `start + count` of a task: pass after pass, each a fresh shuffle of all its rows."""
        rows, drawn, position = self.rows[task], [np.empty(0, dtype=np.int64)], start
        while position < start + count:
            number, offset = divmod(position, len(rows))
            shuffled = np.random.default_rng([self.seed, 1, k, number]).permutation(rows)
            drawn.append(shuffled[offset : offset + start + count - position])
            position += len(drawn[-1])
        return np.concatenate(drawn)

    def counts(self, epoch: int, draws: int) -> dict[str, int]:
        """How often each task occurs in the first `draws` draws of an epoch (a run may end inside one)."""
        if draws >= self.draws:
            return self.plan(epoch).counts
        chosen = self.order(epoch)[:draws]
        return {task: int(np.isin(chosen, rows).sum()) for task, rows in self.rows.items()}

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch).tolist())

    def __len__(self) -> int:
        return self.draws
