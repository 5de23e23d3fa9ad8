"""Sources read as they come: the mixture of eq. 2 over streams, for data that no table of rows should hold.

`datasets.interleave_datasets` mixes them. What a stream cannot do, and `MixtureSampler` over whole sources can:

- A source holds one task, and its number of rows has to be said (`stream_rows`), or the shares (`task_weights`).
- Shares hold on average; how often a task comes is not exact. The log tells shares, not draws.
- Rows come in the order of their source: there is no shuffle buffer, whose rows a resumed run would lose. Shuffle
  when writing files. A source that has ended begins again; when all have ended once, T rises by its step.
- A resumed run reads past the rows it has seen (their audio is not decoded), so it begins later the longer it has run.
- Every process reads the one common stream and takes its share of each batch: sources split over processes would be
  uneven, and a process that runs dry stops all.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import (
    Audio,
    Dataset,
    Features,
    IterableDataset,
    List,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
    load_from_disk,
)
from transformers import TrainerCallback

from soundwave.training.data import (
    READERS,
    RECORDING,
    SUFFIXES,
    DataError,
    _features,
    checked_row,
    recordings,
    transcripts,
)
from soundwave.training.mixture import task_probabilities
from soundwave.training.stages import ConfigError, StageConfig

FEATURES = Features({**_features(True), "audio": List(RECORDING)})  # of every streamed row: lists of recordings


class StreamedMixture:
    """Rows of streamed sources, tasks mixed by temperature, without end.

    Args:
        sources: `.jsonl`, `.json`, `.csv` or `.parquet` files, folders of them or written by `save_to_disk`, Hub ids
            (as in `data.load_rows`), `datasets.IterableDataset` or `datasets.Dataset`; each holds one task.
        root: folder that relative paths of sources start from.
        seed: which task comes next follows from it.
        sizes: rows of each task, |D_k| of eq. 2.
        weights: shares by hand, in its place.
        temperature_start: T of the first pass over the sources.
        temperature_step: added with each pass.

    Attributes:
        sources: names of each task's sources, of tasks that have a share.

    Raises:
        DataError: when a source does not exist, is empty, or its first row does not fit the schema.
        ConfigError: when `sizes` or `weights` name other tasks than the sources hold.
    """

    def __init__(
        self,
        sources: Any,
        root: str | Path = "",
        seed: int = 0,
        sizes: Mapping[str, float] | None = None,
        weights: Mapping[str, float] | None = None,
        temperature_start: float = 1.0,
        temperature_step: float = 0.0,
    ):
        self.seed, self.sizes, self.weights = seed, dict(sizes or {}), dict(weights or {})
        self.temperature_start, self.temperature_step = temperature_start, temperature_step
        self.first_draw = 0  # draws to read past; a resumed run sets it
        by_task: dict[str, list[Any]] = {}
        for source in sources_of(sources, Path(root)):
            first = next(checked_rows(source, root), None)
            if first is None:
                raise DataError(f"{_name(source)} holds no rows.")
            by_task.setdefault(first["task"], []).append(source)
        given = self.weights or self.sizes
        if set(given) != set(by_task) or min(given.values()) < 0 or sum(given.values()) <= 0:
            raise ConfigError(
                f"{'task_weights' if self.weights else 'stream_rows'} is {given}, but the sources hold the tasks "
                f"{', '.join(sorted(by_task))}; give each of these a number of at least 0, and one above 0."
            )
        self.sources = {task: list(map(_name, by_task[task])) for task in sorted(by_task) if given[task] > 0}
        self.streams = {
            task: concatenate_datasets([_stream(source, root, task) for source in by_task[task]])
            for task in self.sources  # one without a share would never end
        }

    @classmethod
    def from_config(cls, config: StageConfig) -> "StreamedMixture":
        """The streams of a run's `data`."""
        return cls(
            config.data,
            config.data_root,
            config.seed,
            config.stream_rows,
            config.task_weights,
            config.temperature_start,
            config.temperature_step,
        )

    def probabilities(self, number: int) -> dict[str, float]:
        """Shares of the tasks in one pass over the sources (eq. 2)."""
        if self.weights:
            total = sum(self.weights.values())
            return {task: self.weights[task] / total for task in self.streams}
        temperature = self.temperature_start + self.temperature_step * number
        return task_probabilities({task: int(self.sizes[task]) for task in self.streams}, temperature)

    def dataset(self) -> IterableDataset:
        """The rows from `first_draw` on, as the trainers take them."""
        return IterableDataset.from_generator(self._draws, features=FEATURES)

    def _draws(self) -> Iterator[dict[str, Any]]:
        yield from itertools.islice(self._passes(), self.first_draw, None)

    def _passes(self) -> Iterator[dict[str, Any]]:
        for number in itertools.count():
            mixed = interleave_datasets(
                list(self.streams.values()),
                probabilities=list(self.probabilities(number).values()),
                seed=self.seed * 1_000_003 + number,
                stopping_strategy="all_exhausted",
            )
            # Not `iter(mixed)`: that draws otherwise in a worker process than in the training process.
            for batch in mixed.iter(batch_size=1):
                yield {name: values[0] for name, values in batch.items()}


class StreamCallback(TrainerCallback):
    """Where a run stands in its streams: a resumed one reads past what it has seen."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Set the first draw, and log the shares that the run begins with."""
        mixture = self.trainer.sampler
        mixture.first_draw = state.global_step * self.trainer.global_batch
        if state.global_step == 0:
            shares = {f"shares/{task}": share for task, share in mixture.probabilities(0).items()}
            self.trainer.log({"temperature": mixture.temperature_start, **shares})

    def on_step_end(self, args, state, control, **kwargs):
        """Count epochs from the run's first step; the library counts from where a stream was taken up."""
        state.epoch = state.global_step / state.max_steps


def checked_rows(source: Any, root: str | Path = "") -> Iterator[dict[str, Any]]:
    """The rows of one source, checked one by one; recordings and transcripts as lists.

    Relative paths of recordings start from the folder of a file, from `root` in a dataset.

    Raises:
        DataError: naming the file, line and field that is wrong.
    """
    for where, row, path in raw_rows(source, Path(root)):
        checked = checked_row(row, where, path)
        spoken = checked["audio"] is not None
        # Both from the row as it was: a list of transcripts goes with a list of recordings.
        checked["transcript"], checked["audio"] = (
            (transcripts(checked), recordings(checked)) if spoken else (None, None)
        )
        yield checked


def _stream(source: Any, root: str | Path, task: str) -> IterableDataset:
    """A source as a stream of checked rows that all hold one task."""
    named = {"source": source, "root": root, "task": task}
    return IterableDataset.from_generator(_rows_of_task, features=FEATURES, gen_kwargs=named)


def _rows_of_task(source: Any, root: str | Path, task: str) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(checked_rows(source, root)):
        if row["task"] != task:
            raise DataError(
                f"{_name(source)}, row {number} ({row['id']!r}), field 'task': {row['task']!r}, but the source began "
                f"with {task!r}; a streamed source holds one task: split it, or read it whole with streaming=false."
            )
        yield row


def raw_rows(source: Any, root: Path) -> Iterator[tuple[str, Any, Path]]:
    """Unchecked rows, where each stands, and the file whose folder relative paths start from."""
    if isinstance(source, Path) and source.suffix in READERS:
        for where, row in READERS[source.suffix](source):
            yield where, row, source
        return
    folder = source if isinstance(source, Path) else root
    file = folder if folder.is_file() else folder / "row"
    for number, row in enumerate(_undecoded(_opened(source))):
        yield f"{_name(source)}, row {number}", row, file


def _opened(source: Any) -> Iterable[dict[str, Any]]:
    if not isinstance(source, (str, Path)):
        return source
    if isinstance(source, Path) and source.is_dir():
        return load_from_disk(str(source))
    if isinstance(source, Path):
        return load_dataset("parquet", data_files=str(source), split="train", streaming=True)
    name, _, split = source.partition(":")
    name, _, revision = name.partition("@")
    return load_dataset(name, split=split or "train", revision=revision or None, streaming=True)


def _undecoded(rows: Any) -> Any:
    audio = (rows.features or {}).get("audio")
    if isinstance(audio, Audio):
        return rows.cast_column("audio", Audio(decode=False))
    if isinstance(audio, List) and isinstance(audio.feature, Audio):
        return rows.cast_column("audio", List(Audio(decode=False)))
    return rows


def sources_of(sources: Any, root: Path) -> Iterator[Any]:
    """Each source on its own: files and saved folders as paths, Hub ids as text, datasets as they are."""
    for source in sources if isinstance(sources, Sequence) and not isinstance(sources, str) else [sources]:
        if isinstance(source, (Dataset, IterableDataset)):
            yield source
            continue
        path = root / str(source)
        if path.is_dir() and not (path / "state.json").is_file():
            files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
            if not files:
                raise DataError(f"{path} holds no .jsonl, .json, .csv or .parquet file, and no one saved dataset.")
            yield from files
        elif path.is_dir() or (path.is_file() and path.suffix in SUFFIXES):
            yield path
        elif str(source).partition(":")[0].partition("@")[0].count("/") == 1 and path.suffix not in SUFFIXES:
            yield str(source)
        else:
            raise DataError(
                f"the data source {path} does not exist or is of another kind; give a .jsonl, .json, .csv or .parquet "
                "file, a folder, or a Hub id (owner/name)."
            )


def _name(source: Any) -> str:
    return str(source) if isinstance(source, (str, Path)) else "the given dataset"
