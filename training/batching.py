"""Micro-batches by seconds of audio: the rows of an update, sorted by length and split so that little is padding.

An update still has exactly its global batch of rows, drawn by `MixtureSampler`: only who shares a forward pass with
whom changes, so losses, schedule and draws stay what they are without it.
"""

import heapq
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch.utils.data import Sampler

from soundwave.training.mixture import MixtureSampler
from soundwave.training.stages import ConfigError

SHORTEST_S = 2.0  # what a row counts at least, one without audio too: prompt and answer take room as well


class LengthBatches(Sampler[list[int]]):
    """Row numbers of one epoch, micro-batch by micro-batch: a batch sampler for a `DataLoader`.

    Every update is cut into the same number of micro-batches, `passes` for each device: as few as the fullest update
    of the run needs. The updates that need fewer are cut into smaller ones, so no device ever waits for another.
    Devices take turns (`accelerate` hands micro-batch k to device k modulo `devices`), the longest come first.

    Args:
        mixture: which rows an epoch draws; its `batch` rows in a row make an update.
        seconds: of audio per row of the dataset, (rows,); see `row_seconds`.
        max_seconds: per micro-batch, padding included: rows times the longest of them. A single row may exceed it.
        devices: number of processes.
        steps: updates of the run, whose draws the number of passes is planned from.

    Raises:
        ConfigError: when the global batch cannot be split evenly over the devices.
    """

    def __init__(
        self, mixture: MixtureSampler, seconds: ArrayLike, max_seconds: float, devices: int = 1, steps: int = 1
    ):
        if mixture.batch % devices:
            raise ConfigError(
                f"global_batch is {mixture.batch} rows, which {devices} devices cannot share; make it a multiple."
            )
        self.mixture, self.devices = mixture, devices
        self.seconds = np.asarray(seconds, dtype=float)
        per_epoch = mixture.draws // mixture.batch
        fullest = max(
            micro_batches_needed(self.seconds[rows], max_seconds)
            for epoch in range(-(-steps // per_epoch))
            for rows in self._updates(epoch)[: steps - epoch * per_epoch]
        )
        self.passes = -(-fullest // devices)

    def _updates(self, epoch: int) -> np.ndarray:
        """Rows of an epoch, (updates, global batch)."""
        return self.mixture.order(epoch).reshape(-1, self.mixture.batch)

    def micro_batches(self, epoch: int) -> Iterator[np.ndarray]:
        """The rows of each micro-batch of an epoch, (rows,), in order: a function of seed, epoch and their number."""
        for rows in self._updates(epoch):
            for positions in split_by_length(self.seconds[rows], self.passes * self.devices):
                yield rows[positions]

    def padding_share(self, epoch: int) -> float:
        """Share of an epoch's audio seconds that is padding."""
        return padding_share(self.micro_batches(epoch), self.seconds)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration draws."""
        self.mixture.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        return (rows.tolist() for rows in self.micro_batches(self.mixture.epoch))

    def __len__(self) -> int:
        return self.mixture.draws // self.mixture.batch * self.passes * self.devices


def row_seconds(rows: Any) -> np.ndarray:
    """Seconds of audio of each row of `data.load_rows`, (rows,); 0 for rows without audio.

    Raises:
        ConfigError: when a row has audio, but no duration.
    """
    seconds, unknown = [], 0
    for table in rows.select_columns(["audio", "duration_s"]).with_format("arrow").iter(1000):
        durations = table.column("duration_s").fill_null(0.0).to_numpy()
        silent = table.column("audio").is_null().to_numpy()
        unknown += int(((durations <= 0) & ~silent).sum())
        seconds.append(np.where(silent, 0.0, durations))
    if unknown:
        raise ConfigError(
            f"max_seconds_per_batch is set, but {unknown} of {len(rows)} rows have audio of unknown length; give them "
            "their `duration_s` in seconds, or leave max_seconds_per_batch out."
        )
    return np.concatenate(seconds)


def micro_batches_needed(seconds: np.ndarray, max_seconds: float) -> int:
    """How few micro-batches hold the rows when none may have more than `max_seconds`, padding included."""
    return len(_leaders(-np.sort(-_counted(seconds)), max_seconds))


def split_by_length(seconds: np.ndarray, n_batches: int) -> list[np.ndarray]:
    """Positions of `seconds`, in exactly `n_batches` micro-batches of rows of similar length, the longest first.

    None is empty, and the largest (rows times longest row) is as small as it can be.
    """
    order = np.argsort(-seconds, kind="stable")
    counted = _counted(seconds)[order]
    low, high = 0.0, counted[0] * -(-len(order) // n_batches)
    while high - low > 1e-6 * high:  # the smallest bound that this many micro-batches keep, but for single rows
        middle = (low + high) / 2
        low, high = (low, middle) if len(_leaders(counted, middle)) <= n_batches else (middle, high)
    starts = _leaders(counted, high)
    sizes = [end - start for start, end in zip(starts, [*starts[1:], len(order)], strict=True)]
    # The bound may be kept with fewer: the largest that can be halved are, which makes none larger.
    heap = [
        (-size * counted[start] if size > 1 else 0.0, start, size) for start, size in zip(starts, sizes, strict=True)
    ]
    heapq.heapify(heap)
    while len(heap) < n_batches:
        _, start, size = heapq.heappop(heap)
        for begin, part in ((start, size // 2), (start + size // 2, size - size // 2)):
            heapq.heappush(heap, (-part * counted[begin] if part > 1 else 0.0, begin, part))
    return [order[start : start + size] for _, start, size in sorted(heap, key=lambda entry: entry[1])]


def padding_share(batches: Iterable[ArrayLike], durations: ArrayLike) -> float:
    """Share of the audio seconds of some batches (row numbers) that is padding up to the longest row of each."""
    spoken = padded = 0.0
    lengths = np.asarray(durations, dtype=float)
    for rows in batches:
        heard = lengths[np.asarray(rows)]
        heard = heard[heard > 0]  # a row without audio takes no part in the encoder's batch
        spoken += heard.sum()
        padded += len(heard) * heard.max(initial=0.0)
    return float(1 - spoken / padded) if padded else 0.0


def _counted(seconds: np.ndarray) -> np.ndarray:
    return np.maximum(seconds, SHORTEST_S)


def _leaders(descending: np.ndarray, bound: float) -> list[int]:
    """Where each micro-batch begins when each takes as many of the rows, longest first, as the bound allows."""
    starts = [0]
    while (start := starts[-1] + max(1, int(bound / descending[starts[-1]] + 1e-9))) < len(descending):
        starts.append(start)
    return starts
