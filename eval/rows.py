"""Files of rows as test sets: the format of training, one task per file.

    results = evaluate_files(model, processor, ["test/asr_seen.jsonl"], output_dir="runs/instruct")

``evaluate_rows`` asks a model in memory, greedily; ``evaluate_ctc`` reads its CTC head, which is all that stage I has.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from soundwave.eval.benchmarks import Benchmark
from soundwave.eval.items import CellClip, Clip, FileClip, Item
from soundwave.eval.models.soundwave import SoundwaveAudioModel
from soundwave.eval.results import TaskResult
from soundwave.eval.runner import Runner
from soundwave.eval.tasks import CTC, Task, get_task, reference_of
from soundwave.training.data import DataError, load_rows, recordings
from soundwave.training.encoder_cache import EncoderCache

Row = dict[str, Any]


class RowsBenchmark(Benchmark):
    """Rows of one task.

    Args:
        rows: Of ``training.data.load_rows``, or dicts of the same fields.
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
            DataError: If the rows are of several tasks.
        """
        rows = list(load_rows(os.fspath(file)))
        tasks = sorted({row["task"] for row in rows})
        if len(tasks) != 1:
            raise DataError(f"{file} holds rows of the tasks {', '.join(tasks)}; give one file per task")
        return cls(rows, tasks[0])

    def transcripts_only(self) -> "RowsBenchmark | None":
        """The rows that a CTC head can be asked, those with transcripts; ``None`` if there are none."""
        rows = [row for row in self._rows if row["transcript"] is not None]
        return RowsBenchmark(rows, CTC) if rows else None

    def load(self, source: str | Path | None = None, revision: str | None = None) -> list[Item]:
        """The rows as items; a row without a reference is a broken one."""
        return [row_item(row, self._task) for row in self._rows]


def row_item(row: Row, task: Task) -> Item:
    """A row as an item; the answer of a conversation is its last turn."""
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


__all__ = ["RowsBenchmark", "evaluate_ctc", "evaluate_files", "evaluate_rows", "names_of", "row_clip", "row_item"]
