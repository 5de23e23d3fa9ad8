"""Run a model over rows and score its answers.

    python -m soundwave.eval.evaluate --model M --data test/*.jsonl --output DIR

``evaluate_rows`` asks the model (greedy generation); ``evaluate_ctc`` reads its CTC head, all that stage I has.
Items go through in batches of similar length; every batch's answers are on disk before the next one starts. An item
that fails (a missing file, a broken recording) is counted and named, and stands in no figure.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from soundwave.eval import results
from soundwave.eval.results import TaskResult
from soundwave.eval.tasks import CTC, Task, get_task, reference_of
from soundwave.training.data import load_rows, recordings
from soundwave.training.encoder_cache import EncoderCache

Row = dict[str, Any]
#: A batch of rows in, one answer per row out.
Answerer = Callable[[list[Row]], list[str]]


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
    model_name: str | None = None,
    revision: str | None = None,
    command: str | None = None,
    progress: bool = True,
) -> TaskResult:
    """Answers of a model to rows, scored.

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
        dataset: ``{"name", "revision", "rows"}``; without it, the name and the hash of the rows.
        model_name: For the files; the model's class if not given.
        revision: Hub commit of the model; the hash of its weights if not given.
        command: What was run; the process's command line if not given.
        progress: Show a bar.

    Raises:
        ValueError: If there are no rows, or not one of them could be answered.
    """
    task = get_task(task)
    answer, decoding = (ctc_answerer if task.name == CTC else llm_answerer)(
        model, processor, encoder_cache, max_new_tokens or task.max_new_tokens
    )
    name = name or task.name
    if not rows:
        raise ValueError(f"test set {name!r} has no rows; give at least one")
    about = {
        "name": name,
        "task": task.name,
        "metric": task.metric,
        "settings": results.metric_settings(normalizer or task.normalizer),
        "dataset": dataset or results.describe_dataset(name, rows),
        "model": results.describe_model(model, model_name, revision),
        "decoding": decoding | {"batch_size": batch_size},
        "command": command or results.command_line(),
    }
    return _run(model, rows, task, answer, about, output_dir, batch_size, progress)


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
    model: Any, processor: Any, files: Sequence[str | os.PathLike[str]], *, limit: int | None = None, **options: Any
) -> list[TaskResult]:
    """Evaluate files of rows, each a test set called by its file name, by the task that its rows name.

    Args:
        model: A whole model; a ``SoundwaveForCTC`` gives its greedy transcripts of every file that has transcripts.
        processor: Its ``SoundwaveProcessor``.
        files: Anything ``training.data.load_rows`` takes that has a file name.
        limit: At most so many rows of each.
        options: As in ``evaluate_rows``.

    Raises:
        ValueError: If the rows of a file are of several tasks, or two files have one name.
    """
    names = [Path(file).stem for file in files]
    if twice := ", ".join(sorted({name for name in names if names.count(name) > 1})):
        raise ValueError(f"several files are called {twice}; a test set goes by its file's name: rename one")
    done = []
    for file in files:
        rows = list(load_rows(os.fspath(file)))[:limit]
        tasks = sorted({row["task"] for row in rows})
        if len(tasks) != 1:
            raise ValueError(f"{file} holds rows of the tasks {', '.join(tasks)}; give one file per task")
        if not hasattr(model, "generate"):
            rows = [row for row in rows if row["transcript"] is not None]
            if not rows:
                continue
            tasks = [CTC]
        done.append(evaluate_rows(model, processor, rows, tasks[0], name=Path(file).stem, **options))
    return done


def llm_answerer(
    model: Any,
    processor: Any,
    encoder_cache: EncoderCache | None,
    max_new_tokens: int,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[Answerer, dict[str, Any]]:
    """Greedy answers of a model to batches of rows, and the settings for the files.

    ``autocast`` is entered for the model alone, whose parts may be of several types: log-mel features need float32.
    """

    def answer(batch: list[Row]) -> list[str]:
        inputs = generation_inputs(model, processor, batch, encoder_cache)
        with autocast():
            ids = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=processor.tokenizer.pad_token_id,
            )
        return _texts(processor, ids[:, inputs["input_ids"].shape[1] :])

    return answer, {"strategy": "greedy", "max_new_tokens": max_new_tokens}


def ctc_answerer(
    model: Any,
    processor: Any,
    encoder_cache: EncoderCache | None,
    max_new_tokens: int,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[Answerer, dict[str, Any]]:
    """Greedy transcripts of the CTC head in the place of answers, and the settings for the files."""
    del max_new_tokens  # a transcript is as long as its recording

    def answer(batch: list[Row]) -> list[str]:
        inputs = audio_inputs(model, processor, batch, encoder_cache)
        with autocast():
            transcripts = iter(_texts(processor, model.transcribe_ids(**inputs)))
        # Several recordings of one row make one text, like their parallel transcripts (`reference_of`).
        return [" ".join(next(transcripts) for _ in recordings(row)) for row in batch]

    return answer, {"strategy": "greedy CTC"}


def _run(
    model: Any,
    rows: Sequence[Row],
    task: Task,
    answer: Answerer,
    about: dict[str, Any],
    output_dir: str | os.PathLike[str] | None,
    batch_size: int,
    progress: bool,
) -> TaskResult:
    started = time.perf_counter()
    log = results.AnswerLog(output_dir, about["name"]) if output_dir is not None else None
    answers: list[Row] = []
    bar = tqdm(total=len(rows), desc=about["name"], unit="item", disable=not progress, leave=False)
    training = model.training
    model.eval()
    try:
        for batch in length_sorted_batches(rows, batch_size):
            done = [
                _answer_row(row, task, about, text, error, output_dir)
                for row, text, error in answer_safely(answer, batch)
            ]
            answers += done
            if log is not None:
                log.append(done)
            bar.update(len(batch))
    finally:
        bar.close()
        model.train(training)
    headline, also = results.score_answers(answers, task.metric, task.also, about["settings"])
    failed = [row for row in answers if row["error"] is not None]
    result = TaskResult(
        **about,
        value=headline.value,
        interval=headline.interval,
        count=headline.count,
        failures=len(failed),
        failed={row["id"]: row["error"] for row in failed},
        also=also,
        seconds=round(time.perf_counter() - started, 2),
        answers=answers,
        **results.environment(),
    )
    if output_dir is not None:
        results.save_result(output_dir, result)
    return result


@torch.inference_mode()
def answer_safely(answer: Answerer, batch: list[Row]) -> Iterator[tuple[Row, str | None, str | None]]:
    """(row, answer, error) of a batch. If the batch fails, its rows go one by one, so that the broken one is named."""
    try:
        texts = answer(batch)
    except Exception as error:  # decoders and models raise whatever they like; nothing is lost, it is in the files
        if len(batch) == 1:
            yield batch[0], None, f"{type(error).__name__}: {error}"
            return
        for row in batch:
            yield from answer_safely(answer, [row])
        return
    for row, text in zip(batch, texts, strict=True):
        yield row, text, None


def _answer_row(
    row: Row,
    task: Task,
    about: dict[str, Any],
    text: str | None,
    error: str | None,
    output_dir: str | os.PathLike[str] | None,
) -> Row:
    reference = None
    try:
        reference = reference_of(row, task)
    except ValueError as missing:
        error = error or str(missing)
    paths = [clip["path"] for clip in recordings(row) if clip.get("path")]
    for path in paths:  # a decoder names the file that it cannot read
        error = error and error.replace(path, Path(path).name)
    return {
        "name": about["name"],
        "task": task.name,
        "id": str(row["id"]),
        "instruction": row.get("instruction"),
        "reference": reference,
        "answer": text,
        "error": error,
        "audio": [results.portable_path(path, output_dir or ".") for path in paths],
        "duration_s": row.get("duration_s"),
        "source": row.get("source"),
    }


def length_sorted_batches(rows: Sequence[Row], batch_size: int) -> list[list[Row]]:
    """Batches of rows of similar length, the longest first (too large a batch then fails at once, not at the end)."""

    def length(row: Row) -> tuple[float, int]:
        return row.get("duration_s") or 0.0, len(row.get("instruction") or "")

    ordered = sorted(rows, key=length, reverse=True)
    return [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]


def generation_inputs(
    model: Any, processor: Any, rows: Sequence[Row], encoder_cache: EncoderCache | None = None
) -> dict[str, Any]:
    """Prompts (B, N), padded on the left, and the recordings of a batch, as ``generate`` takes them."""
    prompts = [processor.prompt_ids(processor.example_messages(row)) for row in rows]
    length = max(len(ids) for ids in prompts)
    input_ids = torch.full((len(rows), length), processor.tokenizer.pad_token_id)  # (B, N)
    attention_mask = torch.zeros_like(input_ids)
    for i, ids in enumerate(prompts):
        input_ids[i, length - len(ids) :] = torch.tensor(ids)
        attention_mask[i, length - len(ids) :] = 1
    inputs = {"input_ids": input_ids.to(model.device), "attention_mask": attention_mask.to(model.device)}
    return inputs | audio_inputs(model, processor, rows, encoder_cache)


def audio_inputs(
    model: Any, processor: Any, rows: Sequence[Row], encoder_cache: EncoderCache | None = None
) -> dict[str, Any]:
    """The recordings of a batch on the model's device; empty for rows without audio."""
    clips = [clip for row in rows for clip in recordings(row)]
    if not clips:
        return {}
    if encoder_cache is not None:
        inputs = encoder_cache.batch(clips)
    else:
        inputs = processor.audio_features([processor.load_audio(clip) for clip in clips])
    return {
        key: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for key, value in inputs.items()
    }


def _texts(processor: Any, ids: Any) -> list[str]:
    texts = processor.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [text.strip() for text in texts]


def main(argv: list[str] | None = None) -> int:
    """Evaluate a saved model on files of rows. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="soundwave evaluate", description="Answers and scores of a model.")
    parser.add_argument("--model", required=True, help="folder or Hub id of a saved stage")
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE", help="rows, one task per file")
    parser.add_argument("--output", required=True, help=f"folder of {results.ANSWERS_FILE} and {results.RESULTS_FILE}")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--limit", type=int, help="at most so many rows of each file")
    arguments = parser.parse_args(argv)

    from soundwave import SoundwaveConfig, SoundwaveForConditionalGeneration, SoundwaveForCTC, SoundwaveProcessor

    config = SoundwaveConfig.from_pretrained(arguments.model)
    kind = SoundwaveForCTC if config.architectures == ["SoundwaveForCTC"] else SoundwaveForConditionalGeneration
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # bf16 is several times slower on a CPU
    model = kind.from_pretrained(arguments.model, dtype=dtype).to(device)
    processor = SoundwaveProcessor.from_pretrained(arguments.model)
    done = evaluate_files(
        model,
        processor,
        arguments.data,
        limit=arguments.limit,
        output_dir=arguments.output,
        batch_size=arguments.batch_size,
        model_name=Path(arguments.model).name if Path(arguments.model).is_dir() else arguments.model,
        revision=getattr(config, "_commit_hash", None),
    )
    for result in done:
        low, high = result.interval
        sys.stdout.write(
            f"{result.name}: {result.metric} {100 * result.value:.1f}% ({100 * low:.1f} to {100 * high:.1f}), "
            f"{result.count} items, {result.failures} failed\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
