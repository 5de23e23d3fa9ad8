"""The files of an evaluation: ``answers.jsonl`` (every answer as it came) and ``results.json`` (what follows from it).

``results.json`` is ``{"results": [...]}`` with one self-contained entry per test set, so that entries of several runs
can be laid side by side. Every figure in it can be computed again from ``answers.jsonl``: ``rescore`` does so.
"""

import hashlib
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from soundwave import __version__
from soundwave.training.data import recordings

if TYPE_CHECKING:  # scoring needs jiwer, an extra; folders without figures are read without it
    from soundwave.eval.scoring import Score

RESULTS_FILE = "results.json"
ANSWERS_FILE = "answers.jsonl"
PACKAGES = ("torch", "transformers", "tokenizers", "peft", "jiwer", "numpy")


@dataclass
class TaskResult:
    """One test set's figures and everything needed to get them again.

    Attributes:
        name: Of the test set, unique within ``results.json``.
        task: Name of the task (``tasks.TASKS``).
        dataset: ``name``, ``revision`` (Hub commit, or the hash of the rows), ``rows``.
        metric: Headline metric.
        settings: Of the metric: normaliser, bootstrap, what happens to failed items.
        value: Headline figure over all answered items.
        interval: Its bootstrap interval.
        count: Items answered and scored.
        failures: Items that gave no answer; they are in no figure.
        failed: Their ids with the reason.
        also: Further metrics: name -> ``{"value", "interval"}``.
        model: ``name``, ``revision`` (Hub commit, or the hash of the weights), ``class``, ``parameters``, ``dtype``.
        decoding: Settings of the generation.
        hardware: Machine, processor, threads, accelerator.
        packages: Name -> version.
        time: When the evaluation ended, UTC.
        seconds: How long it took, loading of the recordings included.
        command: What was run.
    """

    name: str
    task: str
    dataset: dict[str, Any]
    metric: str
    settings: dict[str, Any]
    value: float
    interval: tuple[float, float]
    count: int
    failures: int
    failed: dict[str, str]
    also: dict[str, dict[str, Any]]
    model: dict[str, Any]
    decoding: dict[str, Any]
    hardware: dict[str, Any]
    packages: dict[str, str]
    time: str
    seconds: float
    command: str
    answers: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The entry of ``results.json``: everything but the answers, which have a file of their own."""
        entry = asdict(self)
        del entry["answers"]
        entry["interval"] = list(self.interval)
        return entry


def score_answers(
    answers: Sequence[dict[str, Any]], metric: str, also: Iterable[str], settings: dict[str, Any]
) -> tuple["Score", dict[str, dict[str, Any]]]:
    """Headline score and further metrics of answer rows; rows with an error are left out.

    Raises:
        ValueError: If no row has an answer.
    """
    from soundwave.eval.scoring import score

    answered = [row for row in answers if row["error"] is None]
    if not answered:
        first = next((f"; the first: {row['id']}: {row['error']}" for row in answers), "")
        raise ValueError(f"none of {len(answers)} items was answered, so there is nothing to score{first}")
    references, hypotheses = [row["reference"] for row in answered], [row["answer"] for row in answered]

    def one(name: str) -> "Score":
        return score(name, references, hypotheses, settings["normalizer"], settings["resamples"], settings["seed"])

    rest = {name: one(name) for name in also}
    return one(metric), {name: {"value": s.value, "interval": list(s.interval)} for name, s in rest.items()}


def metric_settings(normalizer: str) -> dict[str, Any]:
    """What ``score_answers`` needs to give the same figures again."""
    from soundwave.eval.scoring import CONFIDENCE, RESAMPLES

    return {
        "normalizer": normalizer,
        "level": "corpus",
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "seed": 0,
        "failed_items": "left out and counted",
    }


def rescore(entry: dict[str, Any], answers: Sequence[dict[str, Any]]) -> list[str]:
    """Compute an entry's figures again from the answers.

    Returns:
        One line per figure that differs; an empty list means that the entry tells the truth.
    """
    rows = [row for row in answers if row["name"] == entry["name"]]
    if not rows:
        return [f"{entry['name']}: {ANSWERS_FILE} holds no answer for it"]
    headline, also = score_answers(rows, entry["metric"], entry["also"], entry["settings"])
    failures = sum(row["error"] is not None for row in rows)
    found: dict[str, Any] = {
        "value": headline.value,
        "interval": list(headline.interval),
        "count": headline.count,
        "failures": failures,
    }
    stated = {key: entry[key] for key in found}
    for name, figures in also.items():
        found |= {f"{name} {key}": number for key, number in figures.items()}
        stated |= {f"{name} {key}": entry["also"][name][key] for key in figures}
    return [
        f"{entry['name']}: {key} is {stated[key]} in {RESULTS_FILE}, but the answers give {found[key]}"
        for key in found
        if not _equal(stated[key], found[key])
    ]


def _equal(a: Any, b: Any) -> bool:
    # Sums in another order (another numpy) may differ in the last digits, never in a digit that is printed.
    a, b = (x if isinstance(x, list) else [x] for x in (a, b))
    return len(a) == len(b) and all(abs(x - y) < 1e-9 for x, y in zip(a, b, strict=True))


class AnswerLog:
    """``answers.jsonl`` of a folder, appended batch by batch so that a killed run keeps what it has.

    Lines of an earlier evaluation under the same name are dropped first: a set is scored from one run.
    """

    def __init__(self, folder: str | os.PathLike[str], name: str) -> None:
        self.path = Path(folder) / ANSWERS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            kept = [line for line in _lines(self.path) if json.loads(line)["name"] != name]
            _replace(self.path, "".join(line + "\n" for line in kept))

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write rows at the end of the file."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _replace(path: Path, text: str) -> None:
    # Written beside it and moved: a reader never sees half a file.
    beside = path.with_suffix(path.suffix + ".new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def read_answers(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Rows of a folder's ``answers.jsonl``; none if there is no such file."""
    path = Path(folder) / ANSWERS_FILE
    return [json.loads(line) for line in _lines(path)] if path.is_file() else []


def _lines(path: Path) -> list[str]:
    # Not `splitlines`: an answer may hold one of the other characters that it takes for the end of a line.
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line]


def read_results(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Entries of a folder's ``results.json``; none if there is no such file."""
    path = Path(folder) / RESULTS_FILE
    return json.loads(path.read_text(encoding="utf-8"))["results"] if path.is_file() else []


def save_result(folder: str | os.PathLike[str], result: TaskResult) -> None:
    """Put a result into a folder's ``results.json``, in place of an earlier one of the same name."""
    entries = [entry for entry in read_results(folder) if entry["name"] != result.name] + [result.to_dict()]
    path = Path(folder) / RESULTS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, json.dumps({"results": entries}, indent=1, ensure_ascii=False) + "\n")


def pool(folders: Iterable[str | os.PathLike[str]]) -> dict[str, "Score"]:
    """Headline scores over the answers of several runs (seeds) together, by name of the test set.

    The interval treats every answer as an item of its own: it says how sure the figure is for these runs, not how much
    another seed would change it.

    Raises:
        ValueError: If a test set has another metric or other settings in one of the runs.
    """
    entries: dict[str, dict[str, Any]] = {}
    answers: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        rows = read_answers(folder)
        for entry in read_results(folder):
            first = entries.setdefault(entry["name"], entry)
            if (first["metric"], first["settings"]) != (entry["metric"], entry["settings"]):
                raise ValueError(
                    f"{entry['name']} is scored by {entry['metric']} with {entry['settings']} in {folder}, elsewhere "
                    f"by {first['metric']} with {first['settings']}; evaluate both alike"
                )
            answers.setdefault(entry["name"], []).extend(row for row in rows if row["name"] == entry["name"])
    return {name: score_answers(answers[name], e["metric"], (), e["settings"])[0] for name, e in entries.items()}


def describe_dataset(name: str, rows: Sequence[dict[str, Any]], revision: str | None = None) -> dict[str, Any]:
    """Name, revision and size of a test set; without a Hub revision, the hash of what its rows say."""
    if revision is None:
        text = json.dumps([_portable(row) for row in rows], sort_keys=True, ensure_ascii=False)
        revision = "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:16]
    return {"name": name, "revision": revision, "rows": len(rows)}


def _portable(row: dict[str, Any]) -> dict[str, Any]:
    names = [Path(clip.get("path") or "").name for clip in recordings(row)]  # the folder differs by machine
    return {key: names if key == "audio" else value for key, value in row.items()}


def describe_model(model: Any, name: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """Name, revision, class, size and dtype of a model.

    Without a revision it is the hash of the weights in memory: a model that was trained since it was loaded
    still names the folder and the commit it came from.
    """
    return {
        "name": name or type(model).__name__,
        "revision": revision or "sha256:" + _weights_hash(model),
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _weights_hash(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def environment() -> dict[str, Any]:
    """``hardware``, ``packages`` and ``time`` of an entry."""
    versions = {"soundwave": __version__, **{package: version(package) for package in PACKAGES}}
    hardware = {
        "machine": platform.machine(),
        "system": platform.system(),
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
    }
    time = datetime.now(UTC).isoformat(timespec="seconds")
    return {"hardware": hardware, "packages": versions, "time": time}


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")  # Linux alone has it; elsewhere the platform module knows the name
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def command_line() -> str:
    """The running command, without folders of this machine (`portable_argument`)."""
    return shlex.join([Path(sys.argv[0]).name, *map(portable_argument, sys.argv[1:])])


def portable_argument(argument: str) -> str:
    """An argument whose paths outside the working folder are cut to their last part, in ``name=[a, b]`` too."""

    def name(part: str) -> str:
        path = Path(part.strip())
        return path.name if path.is_absolute() or ".." in path.parts else part

    return "".join(name(part) for part in re.split(r"([=,\[\]])", argument))


def portable_path(path: str, folder: str | os.PathLike[str]) -> str:
    """A recording's path from a folder of answers, so that both can be moved together and name no machine.

    Only what lies in the folder or beside it moves with it; of any other recording the file name is kept.
    """
    if "://" in path:
        return path
    near = Path(os.path.abspath(path)).is_relative_to(Path(os.path.abspath(folder)).parent)
    return os.path.relpath(path, folder) if near else Path(path).name
