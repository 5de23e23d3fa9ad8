"""Files of rows as test sets: the format of training, one task per file.

    results = evaluate_files(model, processor, ["test/asr_seen.jsonl"], output_dir="runs/instruct")

``evaluate_rows`` asks a model in memory, greedily; ``evaluate_ctc`` reads its CTC head, which is all that stage I has.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from soundwave.eval.batches import shortened
from soundwave.eval.benchmarks import Benchmark
from soundwave.eval.items import CellClip, Clip, FileClip, Item
from soundwave.eval.models.soundwave import SoundwaveAudioModel
from soundwave.eval.results import TaskResult
from soundwave.eval.runner import Runner
from soundwave.eval.tasks import CTC, Task, get_task, reference_of
from soundwave.training.data import READERS, DataError, check_names, checked_row, load_rows, recordings
from soundwave.training.encoder_cache import EncoderCache
from soundwave.training.streaming import raw_rows, sources_of

Row = dict[str, Any]


class RowsBenchmark(Benchmark):
    """Rows of one task.

    Args:
        rows: Of ``training.data.load_rows``, or dicts of the same fields; one with an ``"error"`` is broken.
        task: Name in ``tasks.TASKS``, or a task of your own.
        normalizer: Of the texts before scoring; the task's own if not given.
    """

    def __init__(self, rows: Sequence[Row], task: str | Task, normalizer: str | None = None) -> None:
        task = get_task(task)
        self.name, self.title, self.metric, self.also = task.name, task.title, task.metric, task.also
        self.settings = {"normalizer": normalizer or task.normalizer}
        self.max_new_tokens = task.max_new_tokens
        self._rows, self._task = rows, task

    @classmethod
    def from_file(cls, file: str | os.PathLike[str]) -> "RowsBenchmark":
        """The rows of a file (or other source of ``training.data.load_rows``) by the task that they name.

        Raises:
            DataError: If the file cannot be read, has other columns, no rows or none that names its task, or rows of
                several tasks.
        """
        rows = read_rows(os.fspath(file))
        if not rows:
            raise DataError(f"{file} holds no rows.")
        tasks = sorted({row["task"] for row in rows if row["task"]})
        if not tasks:
            raise DataError(f"{file}: no row names its task; the first, {rows[0]['id']}: {rows[0]['error']}")
        if len(tasks) > 1:
            raise DataError(f"{file} holds rows of the tasks {', '.join(tasks)}; give one file per task")
        return cls(rows, tasks[0])

    def transcripts_only(self) -> "RowsBenchmark | None":
        """Rows with transcripts, which a CTC head can be asked, and broken ones; ``None`` without the first."""
        rows = [row for row in self._rows if row.get("error") or row["transcript"] is not None]
        return RowsBenchmark(rows, CTC) if any(not row.get("error") for row in rows) else None

    def load(self, source: str | Path | None = None, revision: str | None = None) -> list[Item]:
        """The rows as items; a row without a reference is a broken one."""
        return [row_item(row, self._task) for row in self._rows]


def read_rows(source: str) -> list[Row]:
    """The rows of a source for evaluation: where training would refuse the source, a broken row has its ``"error"``.

    Args:
        source: As for ``training.data.load_rows``. Data of the Hub is refused as a whole.

    Returns:
        Rows with every field of the schema; of a broken one no more than ``id``, ``task`` (``None`` if it names none)
        and ``error``.

    Raises:
        DataError: If there is no such source, it cannot be read, or a column's name is misspelt.
    """
    rows: list[Row] = []
    for part in sources_of(source, Path()):
        rows += load_rows(part) if isinstance(part, str) else _rows_of_file(part)
    return rows


def _rows_of_file(file: Path) -> Iterator[Row]:
    for where, row, path in raw_rows(file, Path()):
        place = where.replace(str(file), file.name)  # no folder of this machine stands in the files of results
        given = row if isinstance(row, dict) else {}
        check_names(given, where)
        # Without an id, a row goes by its place, as training calls it.
        name = place.replace(file.name, file.stem).replace(", line " if file.suffix in READERS else ", row ", ":")
        name = name if given.get("id") is None else str(given["id"])
        try:
            yield checked_row({**row, "id": name} if given else row, where, path, to_learn=False)
        except DataError as error:
            task = given.get("task")
            reason = shortened(str(error).replace(where, place))
            yield {"id": name, "task": task if isinstance(task, str) else None, "error": reason}


def row_item(row: Row, task: Task) -> Item:
    """A row as an item; the answer of a conversation is its last turn."""
    if row.get("error"):
        return Item(str(row["id"]), None, [], None, fields={"error": row["error"]})
    fields: Row = {"source": row["source"]} if row.get("source") else {}
    reference = None
    try:
        reference = reference_of(row, task)
    except ValueError as error:
        fields["error"] = str(error)
    messages = row.get("messages")
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    clips = [row_clip(recording, number) for number, recording in enumerate(recordings(row))]
    return Item(str(row["id"]), row.get("instruction"), clips, reference, fields=fields, messages=messages or None)


def row_clip(recording: Row, number: int = 0) -> Clip:
    """A recording ``{"path", "bytes"}`` of a row; ``number`` is its place in the row."""
    path = recording.get("path") or ""
    if recording.get("bytes") is None and path and "://" not in path and not path.startswith("data:"):
        return FileClip(path)
    return CellClip(recording, f"audio-{number}")


def evaluate_rows(
    model: Any,
    processor: Any,
    rows: Sequence[Row],
    task: str | Task,
    *,
    name: str | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    batch_size: int = 50,
    encoder_cache: EncoderCache | None = None,
    max_new_tokens: int | None = None,
    normalizer: str | None = None,
    dataset: dict[str, Any] | None = None,
    source: str | None = None,
    revision: str | None = None,
    command: str | None = None,
    progress: bool = True,
) -> TaskResult:
    """Answers of a model in memory to rows, scored. Answers of an earlier evaluation under the same name are replaced.

    Args:
        model: ``SoundwaveForConditionalGeneration``; ``SoundwaveForCTC`` will do for task ``"ctc"``, and any causal LM
            for rows without audio.
        processor: Its ``SoundwaveProcessor``.
        rows: Evaluation rows, all of one task (``training.data.load_rows``, or dicts of the same fields).
        task: Name in ``tasks.TASKS``, or a task of your own.
        name: Of this test set in the files; the task's name if not given.
        output_dir: Where ``answers.jsonl`` and ``results.json`` go; ``None`` writes nothing.
        batch_size: Rows per batch.
        encoder_cache: Features of the frozen encoder, as training keeps them; ``None`` runs the encoder.
        max_new_tokens: Bound of an answer's length; the task's own if not given.
        normalizer: Of the texts before scoring; the task's own if not given.
        dataset: ``name`` and ``revision`` of the data; without it, the test set's name and the hash of the rows.
        source: Folder or Hub id that the model was read from, if it was not changed since: what a card of that folder
            asks for. The model's class if not given.
        revision: Hub commit of the model; the hash of its weights if not given.
        command: What was run; the process's command line if not given.
        progress: Show a bar.

    Raises:
        ValueError: If there are no rows, or not one of them could be answered.
    """
    benchmark = RowsBenchmark(rows, task, normalizer)
    with _asked(model, processor, benchmark.name == CTC, source, revision, encoder_cache) as asked:
        runner = Runner(
            asked, output_dir, batch_size, max_new_tokens, overwrite=True, progress=progress, command=command
        )
        return _scored(runner, benchmark, name, dataset)


def evaluate_ctc(model: Any, processor: Any, rows: Sequence[Row], **options: Any) -> TaskResult:
    """Greedy transcripts of the CTC head against the rows' transcripts.

    Args:
        model: ``SoundwaveForCTC``, or a whole model: it has the same head.
        processor: Its ``SoundwaveProcessor``.
        rows: Rows with recordings and transcripts.
        options: As in ``evaluate_rows``.
    """
    return evaluate_rows(model, processor, rows, CTC, **options)


def evaluate_files(
    model: Any,
    processor: Any,
    files: Sequence[str | os.PathLike[str]],
    *,
    encoder_cache: EncoderCache | None = None,
    source: str | None = None,
    revision: str | None = None,
    **options: Any,
) -> list[TaskResult]:
    """Evaluate files of rows, each a test set called by its file name, by the task that its rows name.

    Args:
        model: A whole model; a ``SoundwaveForCTC`` gives its greedy transcripts of every file that has transcripts.
        processor: Its ``SoundwaveProcessor``.
        files: Anything ``training.data.load_rows`` takes that has a file name.
        encoder_cache: As in ``evaluate_rows``.
        source: As in ``evaluate_rows``.
        revision: As in ``evaluate_rows``.
        options: Of ``Runner``.

    Raises:
        ValueError: If the rows of a file are of several tasks, or two files have one name.
    """
    names, ctc = names_of(files), not hasattr(model, "generate")
    benchmarks = [RowsBenchmark.from_file(file) for file in files]
    sets = [(each.transcripts_only() if ctc else each, name) for each, name in zip(benchmarks, names, strict=True)]
    with _asked(model, processor, ctc, source, revision, encoder_cache) as asked:
        runner = Runner(asked, **{"batch_size": 50, "overwrite": True, **options})
        return [_scored(runner, benchmark, name) for benchmark, name in sets if benchmark is not None]


def names_of(files: Sequence[str | os.PathLike[str]]) -> list[str]:
    """What test sets of files are called.

    Raises:
        ValueError: If two would have one name.
    """
    names = [Path(file).stem for file in files]
    if twice := ", ".join(sorted({name for name in names if names.count(name) > 1})):
        raise ValueError(f"several files are called {twice}; a test set goes by its file's name: rename one")
    return names


@contextmanager
def _asked(
    model: Any, processor: Any, ctc: bool, source: str | None, revision: str | None, cache: EncoderCache | None
) -> Iterator[SoundwaveAudioModel]:
    """A model in memory as one that is evaluated; afterwards it is in the mode that it was in."""
    training = model.training
    try:
        yield SoundwaveAudioModel(model, processor, source or type(model).__name__, revision, cache, ctc=ctc)
    finally:
        model.train(training)


def _scored(
    runner: Runner, benchmark: RowsBenchmark, name: str | None, dataset: dict[str, Any] | None = None
) -> TaskResult:
    result = runner.run(benchmark, benchmark.load(), name, dataset)
    assert result is not None, "only judged benchmarks wait"
    return result


__all__ = [
    "RowsBenchmark",
    "evaluate_ctc",
    "evaluate_files",
    "evaluate_rows",
    "names_of",
    "read_rows",
    "row_clip",
    "row_item",
]
