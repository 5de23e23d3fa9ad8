"""A model over the items of a benchmark: every answer on disk as it comes, the figures from what is on disk.

    runner = Runner(load_model("runs/instruct"), output_dir="runs/instruct")
    result = runner.run(benchmark, benchmark.load())

A run that was killed goes on where it was. An item that fails (a missing file, a broken recording, a model's error) is
counted and named, and stands in no figure. Several processes share the items of each benchmark.
"""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tqdm.auto import tqdm

from soundwave.apps.processes import Processes
from soundwave.eval import results
from soundwave.eval.batches import Answered, answer_in_batches, describe_error, longest_first
from soundwave.eval.benchmarks import Benchmark
from soundwave.eval.items import Clip, CutAnswer, FileClip, Item
from soundwave.eval.judge import Judge, judge_rows, unjudged
from soundwave.eval.logs import AnswerLog, JudgementLog, read_answers
from soundwave.eval.models.base import AudioModel, ModelUnavailableError
from soundwave.eval.results import TaskResult
from soundwave.eval.resuming import PartLog, begin, claim, merge_parts
from soundwave.eval.selecting import check_unique, describe_dataset, item_length, problem_of, sample_items

Row = dict[str, Any]
#: After so many failures of the model in a row, of the same kind, the fault is not the items'.
MAX_FAILURES_IN_A_ROW = 20


class RunStoppedError(ValueError):
    """A run that gave up: says why. What was answered is kept, and the same command goes on from there."""


@dataclass
class Runner:
    """Asks a model and scores it.

    Args:
        model: Who is asked.
        output_dir: Folder of ``answers.jsonl`` and ``results.json``; ``None`` writes nothing.
        batch_size: Items per batch.
        max_new_tokens: Bound of an answer's length; the benchmark's own if not given.
        limit: At most so many items of a benchmark, drawn with a fixed seed from all of its groups alike.
        judge: Of judged benchmarks. Without one their answers are written, and scored by a later run that has one.
        overwrite: Start anew where the folder has answers already.
        retry_failed: Ask again what failed in a finished test set, as in an unfinished one anyway.
        max_failures_in_a_row: Of the model, with the same kind of error; a recording that cannot be read is not one.
        progress: Show bars, and say what happens.
        command: What was run; the process's command line if not given.
        processes: Those that share the work; this one alone if not given.

    Raises:
        ValueError: If several processes have no folder to bring their answers together in.
    """

    model: AudioModel
    output_dir: str | os.PathLike[str] | None = None
    batch_size: int = 16
    max_new_tokens: int | None = None
    limit: int | None = None
    judge: Judge | None = None
    overwrite: bool = False
    retry_failed: bool = False
    max_failures_in_a_row: int = MAX_FAILURES_IN_A_ROW
    progress: bool = True
    command: str | None = None
    processes: Processes = field(default_factory=lambda: Processes("cpu"))

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.processes.count > 1 and self.output_dir is None:
            raise ValueError("several processes bring their answers together in a folder; give output_dir")

    @cached_property
    def _described(self) -> Row:
        return self.model.describe()  # once: the weights may have to be hashed

    def run(
        self, benchmark: Benchmark, items: Sequence[Item], name: str | None = None, dataset: Row | None = None
    ) -> TaskResult | None:
        """Answers and figures of one benchmark.

        Args:
            benchmark: How the answers are scored.
            items: What is asked, from its ``load``.
            name: Of the test set in the files; the benchmark's if not given.
            dataset: ``name`` and ``revision`` of the data; without a revision, the hash of the items.

        Returns:
            The result, in every process; ``None`` if the answers wait for a judge.

        Raises:
            RunStoppedError: If the model fails item after item.
            ModelUnavailableError: If the model is gone, as an endpoint may be.
            JudgeError: If the judge cannot be asked.
            ValueError: If there is nothing to ask, nothing was answered, or the folder has answers that were made with
                other settings.
        """
        name, started = name or benchmark.name, time.perf_counter()
        check_unique(items, name)
        chosen = sample_items(items, self.limit)
        about = self._about(benchmark, name, describe_dataset(dataset or {"name": name}, chosen, len(items)))
        with ExitStack() as claimed:
            kept, finished = self.processes.share(lambda: self._begin(about, benchmark.instruction, claimed))
            if finished and not self._to_be_judged(name):
                return self._finished(name, kept)
            rows = kept + self.processes.together(lambda: self._ask(benchmark, chosen, kept, about))
            about["resumed"] = len(kept)
            return self.processes.share(lambda: self._finish(benchmark, chosen, rows, about, started))

    def _about(self, benchmark: Benchmark, name: str, dataset: Row) -> Row:
        """Everything the answers and figures depend on; the keys are those of ``TaskResult``."""
        bound = {"max_new_tokens": self.max_new_tokens or benchmark.max_new_tokens}
        return {
            "name": name,
            "task": benchmark.name,
            "metric": benchmark.metric,
            "settings": results.metric_settings(benchmark.settings, benchmark.average, benchmark.areas),
            "dataset": dataset,
            "model": self._described,
            "decoding": bound | self.model.decoding,  # a model that has no such bound says so
        }

    def _begin(self, about: Row, prompt: str | None, claimed: ExitStack) -> tuple[list[Row], bool]:
        if self.output_dir is None:
            return [], False
        claimed.enter_context(claim(self.output_dir))
        # The prompt is in the items' hash, too; here it can be read.
        settings = {"prompt": prompt, **{key: value for key, value in about.items() if key != "name"}}
        return begin(self.output_dir, about["name"], settings, self.overwrite, self.retry_failed)

    def _entry(self, name: str) -> Row:
        """What ``results.json`` says of a finished test set."""
        return results.read_result(self.output_dir or "", name) or {}

    def _to_be_judged(self, name: str) -> bool:
        """Whether the judge is another one, or has failed: only what failed on the way is then asked again."""
        entry = self._entry(name)
        if self.judge is None or entry["judge"] is None:
            return False
        return entry["judge"] != self.judge.describe() or bool(entry["notes"].get("judge_failures"))

    def _finished(self, name: str, rows: list[Row]) -> TaskResult:
        entry = self._entry(name)
        retry = f", --retry-failed asks the {entry['failures']} again that failed" if entry["failures"] else ""
        self._say(f"{name}: finished already; --overwrite starts anew{retry}")
        return TaskResult(**entry, answers=rows)

    def _ask(self, benchmark: Benchmark, items: Sequence[Item], kept: Sequence[Row], about: Row) -> list[Row]:
        """This process's share of the items that are left; every row is in the log before the next batch is asked."""
        done = {row["id"] for row in kept}
        if done:
            self._say(f"{about['name']}: {len(done)} of {len(items)} items have their answers; going on")
        left = longest_first([item for item in items if item.id not in done], item_length)
        mine = left[self.processes.rank :: self.processes.count]
        problems = {item.id: problem for item in mine if (problem := problem_of(item, benchmark))}
        record = _Record(self._log(about["name"]), len(mine), about["name"], self._quiet)
        streak = _Streak(self.max_failures_in_a_row)
        with record.bar:
            record.add([self._row(item, about, None, problems[item.id]) for item in mine if item.id in problems])
            for batch in answer_in_batches(
                lambda asked: self.model.answer(asked, about["decoding"]["max_new_tokens"]),
                [item for item in mine if item.id not in problems],
                self.batch_size,
                self._say,
                fatal=(ModelUnavailableError,),
            ):
                found = [_unreadable(answered) for answered in batch]
                pairs = list(zip(batch, found, strict=True))
                record.add([self._row(each.item, about, each.answer, _reason(each, bad)) for each, bad in pairs])
                for answered, bad in pairs:
                    streak.count(answered, bad)
        return record.rows

    def _log(self, name: str) -> AnswerLog | None:
        if self.output_dir is None:
            return None
        if self.processes.count > 1:
            return PartLog(self.output_dir, name, self.processes.rank)
        return AnswerLog(self.output_dir, name, keep=lambda row: True)

    def _row(self, item: Item, about: Row, answer: str | None, error: str | None) -> Row:
        for clip in item.clips:  # a decoder names the file that it cannot read
            if error is not None and isinstance(clip, FileClip):
                error = error.replace(str(clip.path), clip.name)
        return {
            "name": about["name"],
            "task": about["task"],
            "id": item.id,
            "instruction": item.instruction,
            "reference": item.reference,
            "answer": answer,
            "error": error,
            "cut": isinstance(answer, CutAnswer),
            "audio": [self._place(clip) for clip in item.clips],
            "duration_s": item.duration_s,
            "source": item.fields.get("source"),
            "group": item.group,
            "fields": {key: value for key, value in item.fields.items() if key not in ("source", "error")},
        }

    def _place(self, clip: Clip) -> str:
        """Where to find a recording from the folder of the answers, or its name."""
        near = self.output_dir is not None and isinstance(clip, FileClip)
        return results.portable_path(str(clip.path), self.output_dir) if near else clip.name

    def _finish(
        self, benchmark: Benchmark, items: Sequence[Item], rows: list[Row], about: Row, started: float
    ) -> TaskResult | None:
        """Figures of all answers; ``None`` if they wait for a judge."""
        name = about["name"]
        if self.output_dir is not None:
            merge_parts(self.output_dir)
            rows = [row for row in read_answers(self.output_dir) if row["name"] == name]
        if lost := {item.id for item in items} - {row["id"] for row in rows}:
            # Processes that saw other lengths, as of a file that came or went meanwhile, share the items otherwise.
            raise RunStoppedError(f"{len(lost)} of {len(items)} items were not asked; the same command asks them")
        if benchmark.judged and self.judge is None:
            self._say(f"{name}: the answers are written and wait for a judge: the same command with --judge goes on")
            return None
        judged = results.with_judgements(rows, self._judgements(benchmark, rows, name)) if benchmark.judged else rows
        headline, also = results.score_answers(judged, benchmark.metric, benchmark.also, about["settings"])
        result = TaskResult(
            **about | {"decoding": about["decoding"] | {"batch_size": self.batch_size}},
            **vars(headline),
            failures=sum(row["error"] is not None for row in rows),
            failed={row["id"]: row["error"] for row in rows if row["error"] is not None},
            cut=sum(row["cut"] for row in rows),
            also=also,
            judge=self.judge.describe() if benchmark.judged and self.judge else None,
            seconds=round(time.perf_counter() - started, 2),
            command=self.command or results.command_line(),
            answers=rows,
            **results.environment(),
        )
        if self.output_dir is not None:
            results.save_result(self.output_dir, result)
        return result

    def _judgements(self, benchmark: Benchmark, rows: list[Row], name: str) -> list[Row]:
        log = None
        if self.output_dir is not None:
            results.forget_result(self.output_dir, name)
            log = JudgementLog(self.output_dir, name).append
        judgements = judge_rows(benchmark, rows, self.judge, log, self.progress)
        if failed := unjudged(judgements):
            first, reason = next(iter(failed.items()))
            self._say(
                f"{name}: {len(failed)} of {len(judgements)} judgements failed, the first of {first}: {reason}. The "
                "same command asks for those again"
            )
        return judgements

    @property
    def _quiet(self) -> bool:
        return not self.progress or self.processes.rank > 0

    def _say(self, message: str) -> None:
        if not self._quiet:
            tqdm.write(message, file=sys.stderr)


class _Record:
    """The rows of a run, in the log, in memory and on the bar."""

    def __init__(self, log: AnswerLog | None, total: int, name: str, quiet: bool) -> None:
        self.rows: list[Row] = []
        self.bar = tqdm(total=total, desc=name, unit="item", disable=quiet, leave=False)
        self._log, self._failed, self._cut = log, 0, 0

    def add(self, rows: list[Row]) -> None:
        if self._log is not None and rows:
            self._log.append(rows)
        self.rows += rows
        self._failed += sum(row["error"] is not None for row in rows)
        self._cut += sum(row["cut"] for row in rows)
        counts = {"failed": self._failed, "cut": self._cut}
        self.bar.set_postfix({key: count for key, count in counts.items() if count}, refresh=False)
        self.bar.update(len(rows))


class _Streak:
    """Counts failures of the model, one after the other and of the same kind."""

    def __init__(self, most: int) -> None:
        self._most, self._count, self._kind = most, 0, ""

    def count(self, answered: Answered[Item], unreadable: Exception | None) -> None:
        if unreadable is not None:  # that item's fault: it tells nothing about the model
            return
        kind = type(answered.error).__name__
        self._count = 0 if answered.error is None else self._count + 1 if kind == self._kind else 1
        self._kind = kind
        if answered.error is not None and self._count >= self._most:
            raise RunStoppedError(
                f"{self._count} items in a row failed alike, the last ({answered.item.id}) with "
                f"{describe_error(answered.error)}; what was answered is kept: mend the cause, and the same command "
                "goes on from there"
            )


def _unreadable(answered: Answered[Item]) -> Exception | None:
    """What is wrong with a recording of an item that failed; ``None`` if all can be read."""
    if answered.error is None:
        return None
    for clip in answered.item.clips:
        try:
            clip.read()
        except Exception as error:  # as many kinds as there are decoders
            return error
    return None


def _reason(answered: Answered[Item], unreadable: Exception | None) -> str | None:
    error = unreadable or answered.error
    return None if error is None else describe_error(error)


__all__ = ["MAX_FAILURES_IN_A_ROW", "RunStoppedError", "Runner"]
