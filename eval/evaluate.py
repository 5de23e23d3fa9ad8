"""Run models over benchmarks and score their answers: `soundwave evaluate`.

    soundwave evaluate --list
    soundwave evaluate --model M --tasks librispeech_clean,meld --source meld=data/MELD.Raw --output DIR
    soundwave evaluate --model M --data test/*.jsonl --output DIR
    accelerate launch -m soundwave.apps.cli evaluate --model M --tasks librispeech_clean --output DIR

The same command goes on where a run was interrupted. What computes is imported when it is needed.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soundwave.eval.benchmarks import BENCHMARKS, Benchmark, get_benchmark
from soundwave.eval.efficiency import BY_STAGE, EFFICIENCY, Efficiency, by_stage, get_efficiency

if TYPE_CHECKING:
    from soundwave.eval.items import Item
    from soundwave.eval.judge import Judge
    from soundwave.eval.results import TaskResult
    from soundwave.eval.runner import Runner

#: Groups that are named one by one on the terminal; of more, ``results.json`` tells.
MOST_LISTED = 6


@dataclass
class TestSet:
    """What one entry of ``results.json`` is made from."""

    __test__ = False  # for pytest: no test in spite of its name

    name: str
    benchmark: Benchmark
    items: "list[Item]"
    dataset: dict[str, Any]


def build_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="soundwave evaluate",
        description="Answers and scores of a model. The same command goes on where a run was interrupted.",
    )
    parser.add_argument("--list", action="store_true", help="show the tasks: size, metric, licence, where the data is")
    parser.add_argument("--model", metavar="M", help="folder or Hub id; with --endpoint, the model's name there")
    parser.add_argument("--output", metavar="DIR", help="folder of answers.jsonl and results.json")
    what = parser.add_argument_group("what is asked")
    what.add_argument(
        "--tasks", type=_names, default=[], metavar="A,B", help="names of --list; NAME@REVISION pins the data"
    )
    what.add_argument(
        "--source",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME=FOLDER",
        help="a task's data in its published layout (default: the Hub); ttft:NAME reads NAME's",
    )
    what.add_argument("--data", nargs="+", default=[], metavar="FILE", help="rows as for training, one task per file")
    what.add_argument("--prompt", metavar="TEXT", help="ask the tasks in these words in place of their own")
    what.add_argument("--limit", type=_positive, metavar="N", help="a fixed sample of N items of each, of all groups")
    who = parser.add_argument_group("who is asked")
    who.add_argument("--revision", metavar="R", help="commit, tag or branch of the model on the Hub")
    who.add_argument("--llm", metavar="L", help="text LLM that is given what --model, a speech recogniser, hears")
    who.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible server of the model (with --llm: of that)")
    who.add_argument("--max-new-tokens", type=_positive, metavar="N", help="longest answer (default: the task's)")
    who.add_argument("--batch-size", type=_positive, default=16, metavar="N", help="items per batch (default: 16)")
    who.add_argument("--device", default="auto", metavar="D", help="cpu, cuda or cuda:N (default: a GPU if any)")
    who.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="precision")
    who.add_argument("--trust-remote-code", action="store_true", help="run code that the model's repository brings")
    judge = parser.add_argument_group("who judges, where a task needs it")
    judge.add_argument("--judge", metavar="MODEL", help="name of the judge at its endpoint")
    judge.add_argument("--judge-endpoint", metavar="URL", help="OpenAI-compatible server of the judge")
    judge.add_argument(
        "--judge-as-published", action="store_true", help="sample the judge as the benchmark did (default: greedily)"
    )
    judge.add_argument(
        "--judge-timeout",
        type=_positive,
        default=120,
        metavar="S",
        help="seconds without a byte, five tries (default: 120)",
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew where DIR has answers already")
    parser.add_argument("--retry-failed", action="store_true", help="ask again what failed in finished test sets")
    parser.add_argument(
        "--stop-after",
        type=_positive,
        default=20,
        metavar="N",
        help="failures in a row of one kind (default: 20)",
    )
    return parser


def _names(text: str) -> list[str]:
    return [name for name in text.replace(",", " ").split() if name]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate a model. Returns the exit code: 1 if a test set has no figure."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.list:
        sys.stdout.write(task_table())
        return 0
    if missing := [f"--{name}" for name in ("model", "output") if getattr(arguments, name) is None]:
        parser.error(f"{' and '.join(missing)} missing (--list shows the tasks)")
    if not arguments.tasks and not arguments.data:
        parser.error("nothing to ask: give --tasks or --data (--list shows the tasks)")
    if Path(arguments.output).exists() and not Path(arguments.output).is_dir():
        parser.error(f"--output {arguments.output} is a file; name a folder")
    sources = named_folders(arguments.source, arguments.tasks)
    tasks = [_chosen(name, arguments.prompt) for name in arguments.tasks]
    return _evaluate(arguments, tasks, sources)


def task_table() -> str:
    """A line per task: name, items, metric, licence, where the data is."""
    rows = [("TASK", "ITEMS", "METRIC", "LICENCE", "DATA")]
    for benchmark in (*BENCHMARKS.values(), *EFFICIENCY.values()):
        data = benchmark.hub_id or f"--source {benchmark.name}=FOLDER"
        where = f"{data} ({benchmark.homepage})" if benchmark.homepage else data
        metric = benchmark.metric + (", judged" if benchmark.judged else "")
        rows.append((benchmark.name, str(benchmark.size or "?"), metric, benchmark.licence or "not confirmed", where))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines) + "\n"


def named_folders(given: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    """Task -> folder, from ``NAME=FOLDER`` texts; the folder of ``meld`` is that of ``ttft:meld``, too.

    Raises:
        ValueError: For a text of another form, or a name that is not among the tasks.
    """
    names = [task.partition("@")[0] for task in tasks]
    measured_on = {name: data for name in names if (data := name.partition(":")[2])}
    folders = {}
    for text in given:
        name, separator, folder = text.partition("=")
        if not separator or not folder:
            raise ValueError(f"--source {text}: expected NAME=FOLDER")
        if name not in (*names, *measured_on.values()):
            raise ValueError(f"--source {text}: {name} is not among --tasks {','.join(tasks)}")
        folders[name] = folder
    return {task: folders[data] for task, data in measured_on.items() if data in folders} | folders


def _chosen(name: str, prompt: str | None) -> tuple[Benchmark, str | None]:
    """A benchmark and the revision of its data."""
    name, _, revision = name.partition("@")
    benchmark = get_efficiency(name) or get_benchmark(name)
    return (benchmark if prompt is None else benchmark.with_instruction(prompt)), revision or None


def _evaluate(
    arguments: argparse.Namespace, tasks: Sequence[tuple[Benchmark, str | None]], sources: dict[str, str]
) -> int:
    from soundwave.apps.loading import resolve_device
    from soundwave.apps.processes import Processes
    from soundwave.eval.models import load_model
    from soundwave.eval.runner import Runner

    device, _ = resolve_device(*(None if given == "auto" else given for given in (arguments.device, arguments.dtype)))
    processes = Processes(device)
    if processes.rank > 0:  # the first one fetches what is not on the disk yet
        processes.wait()
    # Before the model: what is missing is known in seconds.
    sets = [_load(*task, sources.get(task[0].name)) for task in tasks] + _files(arguments.data)
    if processes.rank == 0:
        processes.wait()
    _check_names(sets)
    judge = _judge(arguments) if any(each.benchmark.judged for each in sets) else None
    model = load_model(
        arguments.model,
        llm=arguments.llm,
        endpoint=arguments.endpoint,
        device=processes.device,
        dtype=arguments.dtype,
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
    )
    runner = Runner(
        model,
        arguments.output,
        arguments.batch_size,
        arguments.max_new_tokens,
        arguments.limit,
        judge,
        arguments.overwrite,
        arguments.retry_failed,
        arguments.stop_after,
        processes=processes,
    )
    whole = model.decoding["strategy"] != "greedy CTC"
    scored = [_run(runner, each if whole else _transcripts_of(each)) for each in sets]
    processes.leave()
    return int(not all(scored))


def _load(benchmark: Benchmark, revision: str | None, source: str | None) -> TestSet:
    if source is not None:
        dataset = {"name": benchmark.hub_id or benchmark.name}
        return TestSet(benchmark.name, benchmark, benchmark.load(source, revision), dataset)
    commit = _commit(benchmark.hub_id, revision) if benchmark.hub_id else None
    dataset = {"name": benchmark.hub_id or benchmark.name, **({"revision": commit} if commit else {})}
    return TestSet(benchmark.name, benchmark, benchmark.load(revision=commit or revision), dataset)


def _commit(hub_id: str, revision: str | None) -> str | None:
    """The commit that a data set on the Hub is read at; ``None`` without a connection: the items' hash names it."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(hub_id, revision=revision).sha
    except Exception:  # offline, or unreachable in one of many ways; whether the data is there, loading it will tell
        return None


def _files(files: Sequence[str]) -> list[TestSet]:
    if not files:
        return []
    from soundwave.eval.rows import RowsBenchmark, names_of

    benchmarks = [RowsBenchmark.from_file(file) for file in files]
    named = zip(names_of(files), benchmarks, strict=True)
    return [TestSet(name, benchmark, benchmark.load(), {"name": name}) for name, benchmark in named]


def _check_names(sets: Sequence[TestSet]) -> None:
    names = [each.name for each in sets]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"several test sets are called {', '.join(twice)}; one would take the place of the other")


def _transcripts_of(test_set: TestSet) -> TestSet:
    """What a CTC head alone can be asked of a file: its transcripts; another task is what it is.

    Raises:
        ValueError: If the file has none.
    """
    from soundwave.eval.rows import RowsBenchmark

    if not isinstance(test_set.benchmark, RowsBenchmark):
        return test_set
    spoken = test_set.benchmark.transcripts_only()
    if spoken is None:
        raise ValueError(f"{test_set.name} has no transcripts, and a model of stage I answers with nothing else")
    return TestSet(test_set.name, spoken, spoken.load(), test_set.dataset)


def _judge(arguments: argparse.Namespace) -> "Judge | None":
    if arguments.judge is None:
        return None
    from soundwave.eval.judge import Judge

    cache = Path(arguments.output) / "judge_replies"
    return Judge(
        arguments.judge,
        cache,
        arguments.judge_endpoint,
        official=arguments.judge_as_published,
        timeout_s=arguments.judge_timeout,
    )


def _run(runner: "Runner", test_set: TestSet) -> bool:
    """Ask and score a test set, and say what came out; whether it has a figure. The others go on without it."""
    from soundwave.apps.processes import OtherProcessError
    from soundwave.eval.models.base import ModelUnavailableError

    try:
        if isinstance(test_set.benchmark, Efficiency):
            result = test_set.benchmark.run(runner, test_set.items, test_set.dataset)
        else:
            result = runner.run(test_set.benchmark, test_set.items, test_set.name, test_set.dataset)
    except ModelUnavailableError:
        raise
    except OtherProcessError:
        return False
    except ValueError as error:
        sys.stderr.write(f"soundwave evaluate: {test_set.name}: {error}\n")
        return False
    if result is not None and runner.processes.rank == 0:
        sys.stdout.write(summary(result))
        sys.stdout.flush()
    return result is not None and result.value is not None


def summary(result: "TaskResult") -> str:
    """The figures of a test set: a line for the headline, then one per further metric, area or group, and failure."""
    from soundwave.eval.scoring import format_figure

    def figure(metric: str, figures: Mapping[str, Any]) -> str:
        ends = figures["interval"] and [format_figure(metric, end) for end in figures["interval"]]
        return format_figure(metric, figures["value"]) + (f" ({' to '.join(ends)})" if ends else "")

    counts = [f"{result.count} items", f"{result.failures} failed"]
    if result.cut:
        counts.append(f"{result.cut} cut at {result.decoding['max_new_tokens']} tokens (--max-new-tokens)")
    counts += [f"{key}: {_short(value)}" for key, value in result.notes.items()]
    shown = {
        f"{metric}, {stage}" if stage else metric: figure(metric, part)
        for metric, whole in {result.metric: vars(result), **result.also}.items()
        for stage, part in by_stage(metric, whole).items()
    }
    if result.metric not in BY_STAGE:
        parts = result.areas or (result.groups if len(result.groups) <= MOST_LISTED else {})
        shown |= {name: figure(result.metric, part) for name, part in parts.items()}
    (first, value), *rest = shown.items()
    lines = [f"{result.name}: {first} {value}, {', '.join(counts)}", *(f"  {name}: {said}" for name, said in rest)]
    if result.failed:
        failed, reason = next(iter(result.failed.items()))
        lines.append(
            f"  failed: {failed}: {reason}" + (" (the others in results.json)" if result.failures > 1 else "")
        )
    return "".join(f"{line}\n" for line in lines)


def _short(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    return ", ".join(value) if len(value) <= MOST_LISTED else f"{len(value)} groups"


if __name__ == "__main__":
    sys.exit(main())
