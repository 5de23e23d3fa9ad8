"""The files of an evaluation: ``answers.jsonl`` (every answer as it came) and ``results.json`` (what follows from it).

``results.json`` is ``{"results": [...]}`` with one self-contained entry per test set, so that entries of several runs
can be laid side by side. Every figure in it can be computed again from ``answers.jsonl``, and ``judgements.jsonl``
where a judge read the answers: ``rescore`` does so.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

from soundwave.eval.benchmarks import BENCHMARKS
from soundwave.eval.counting import SETTINGS
from soundwave.eval.efficiency import EFFICIENCY
from soundwave.eval.logs import (
    ANSWERS_FILE,
    JUDGEMENTS_FILE,
    SETTINGS_FILE,
    AnswerLog,
    JudgementLog,
    read_answers,
    read_judgements,
    replace_file,
)
from soundwave.eval.provenance import (
    command_line,
    describe_model,
    environment,
    portable_path,
)
from soundwave.eval.scoring import CONFIDENCE, RESAMPLES, Figures, score_rows

Row = dict[str, Any]
RESULTS_FILE = "results.json"
#: What an entry says of its answers, as ``answers.settings.json`` says it too.
LABELS = ("task", "metric", "settings", "dataset", "model", "decoding")


@dataclass
class TaskResult:
    """One test set's figures and everything needed to get them again.

    Attributes:
        name: Of the test set, unique within ``results.json``.
        task: Name of the task (``tasks.TASKS``) or benchmark.
        dataset: ``name``, ``revision`` (Hub commit, or the hash of the rows), ``rows``.
        metric: Headline metric.
        settings: Of the metric: normaliser, bootstrap, averaging, what happens to failed items (``metric_settings``).
        value: Headline figure over all answered items; ``None`` if it is undefined (``scoring.Figures``).
        interval: Its bootstrap interval; ``None`` with ``value``.
        count: Items answered; those among them that the metric could not read stand in ``notes``.
        failures: Items that gave no answer; they are in no figure.
        failed: Their ids with the reason.
        also: Further metrics: name -> ``{"value", "interval"}`` and, where they have any, ``groups``, ``areas``,
            ``notes``, ``signature``.
        model: ``name``, ``revision`` (Hub commit, or the hash of the weights), ``class``, ``parameters``, ``dtype``.
        decoding: Settings of the generation.
        hardware: Machine, processor, threads, accelerator.
        packages: Name -> version.
        time: When the evaluation ended, UTC.
        seconds: How long it took, loading of the recordings included; of a resumed run, what was left of it.
        command: What was run.
        groups: Group -> ``{"value", "interval", "count"}`` of the headline metric, and ``"unread"`` (``Figures``).
        areas: Area -> the same, the unweighted mean over its groups.
        notes: What a reader must know of the headline figure: answers that were not parsed, judgements that failed.
        signature: The metric tool's own account of its settings, such as sacrebleu's.
        judge: Who judged: model, endpoint, sampling (``Judge.describe``).
        cut: Answers that reached the bound of their length (``max_new_tokens``).
        resumed: Answers that were there already, so that ``seconds`` does not count them.
        answers: The rows of ``answers.jsonl``.
    """

    name: str
    task: str
    dataset: dict[str, Any]
    metric: str
    settings: dict[str, Any]
    value: float | None
    interval: tuple[float, float] | None
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
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    areas: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    signature: str | None = None
    judge: dict[str, Any] | None = None
    cut: int = 0
    resumed: int = 0
    answers: list[Row] = field(default_factory=list, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The entry of ``results.json``: everything but the answers, which have a file of their own."""
        entry = asdict(self)
        del entry["answers"]
        return entry


def metric_settings(
    settings: Mapping[str, Any] | None = None,
    average: str = "items",
    areas: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """What ``score_answers`` needs to give the same figures again: an entry's ``settings``.

    Args:
        settings: Those that differ from the defaults (``counting``).
        average: What the headline is a mean over, see ``scoring.score_rows``.
        areas: Name -> groups.

    Raises:
        ValueError: If no metric knows a setting: a misspelt one would leave its default in force.
    """
    defaults = {"normalizer": "none", "confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": 0}
    if unknown := [name for name in settings or {} if name not in (*SETTINGS, *defaults)]:
        raise ValueError(f"no metric knows the setting {', '.join(unknown)}; known are {', '.join(SETTINGS)}")
    return {
        **defaults,
        **(settings or {}),
        "level": "corpus",
        "average": average,
        "areas": {name: list(groups) for name, groups in (areas or {}).items()},
        "failed_items": "left out and counted",
    }


def score_answers(
    answers: Sequence[Row], metric: str, also: Iterable[str], settings: Mapping[str, Any]
) -> tuple[Figures, dict[str, dict[str, Any]]]:
    """Figures of the headline metric and, as an entry holds them, of further ones; rows with an error are left out.

    Args:
        answers: Rows of one test set, with their judgements where there are any (``with_judgements``).
        metric: Headline metric.
        also: Further metrics.
        settings: Of ``metric_settings``.

    Raises:
        ValueError: If no row has an answer, or as ``scoring.score_rows``.
    """

    def one(name: str) -> Figures:
        return score_rows(answers, name, settings, settings.get("average", "items"), settings.get("areas"))

    rest = {name: one(name).to_dict() for name in also}
    for figures in rest.values():
        del figures["count"]  # that of the headline
    return one(metric), rest


def with_judgements(answers: Iterable[Row], judgements: Iterable[Row]) -> list[Row]:
    """Answer rows, each with the ``judgements`` of it; of two of the same order the later one counts."""
    found: dict[tuple[str, str], dict[Any, Row]] = {}
    for judgement in judgements:
        found.setdefault((judgement["name"], judgement["id"]), {})[judgement["order"]] = judgement
    return [row | {"judgements": list(found.get((row["name"], row["id"]), {}).values())} for row in answers]


def rescore(
    entry: Mapping[str, Any],
    answers: Sequence[Row],
    judgements: Sequence[Row] = (),
    made_with: Mapping[str, Any] | None = None,
) -> list[str]:
    """Compute an entry's figures again from the answers, and compare what it says of them.

    A benchmark's marks are read again from what its judge replied. The signature is not compared: it tells the
    version of the tool that made the stated figures.

    Args:
        entry: Of ``results.json``.
        answers: Rows of ``answers.jsonl``.
        judgements: Rows of ``judgements.jsonl``.
        made_with: What ``answers.settings.json`` says of this test set (``logs.read_settings``), if it is there.

    Returns:
        One line per figure or label that differs; an empty list means that the entry tells the truth.
    """
    rows = with_judgements([row for row in answers if row["name"] == entry["name"]], judgements)
    if not rows:
        return [f"{entry['name']}: {ANSWERS_FILE} holds no answer for it"]
    headline, also = score_answers(rows, entry["metric"], entry["also"], entry["settings"])
    failed = {row["id"]: row["error"] for row in rows if row["error"] is not None}
    found = _flat(asdict(headline)) | _flat(also) | {"failures": len(failed), "failed": failed}
    found |= {"cut": sum(row.get("cut", False) for row in rows), "judge": _judges(rows)}
    stated = _flat({key: entry.get(key, {}) for key in asdict(headline)}) | _flat(entry["also"])
    stated |= {"failures": entry["failures"], "failed": entry["failed"], "cut": entry.get("cut", 0)}
    stated |= {"judge": [entry["judge"]["model"]] if entry.get("judge") else []}
    if entry["task"] not in EFFICIENCY:  # which may measure some of the items, or updates
        stated |= {"dataset rows": entry["dataset"]["rows"]}
        found |= {"dataset rows": len(rows)}  # an answer that was taken away is in no other figure
    figures = [
        f"{entry['name']}: {key} is {stated.get(key)} in {RESULTS_FILE}, but the answers give {found.get(key)}"
        for key in dict.fromkeys([*found, *stated])
        if not _equal(stated.get(key), found.get(key))
    ]
    return _mislabelled(entry, rows, made_with) + _misread(entry, rows) + figures


def _mislabelled(entry: Mapping[str, Any], rows: Iterable[Row], made_with: Mapping[str, Any] | None) -> list[str]:
    """A line per label that the answers do not have: another task, data set, model or decoding."""
    tasks = {str(row.get("task")) for row in rows}
    if tasks != {entry["task"]}:
        said = f"the answers are of {', '.join(sorted(tasks))}"
        return [f"{entry['name']}: task is {entry['task']} in {RESULTS_FILE}, but {said}"]
    if made_with is None:
        return []
    stated = _flat({key: entry.get(key) for key in LABELS})
    stated.pop("decoding batch_size", None)  # nothing that the answers depend on
    asked = _flat({key: made_with.get(key) for key in LABELS})
    return [
        f"{entry['name']}: {key} is {stated.get(key)} in {RESULTS_FILE}, but {asked.get(key)} in {SETTINGS_FILE}"
        for key in dict.fromkeys([*asked, *stated])
        if not _equal(stated.get(key), asked.get(key))
    ]


def _misread(entry: Mapping[str, Any], rows: Iterable[Row]) -> list[str]:
    """A line per judgement whose marks are not those of its reply."""
    if entry["task"] not in BENCHMARKS or not BENCHMARKS[entry["task"]].judged:
        return []
    lines = []
    for judgement in (each for row in rows for each in row["judgements"] if each["reply"] is not None):
        verdict = BENCHMARKS[entry["task"]].verdict(judgement["reply"], judgement["order"])
        lines += [
            f"{entry['name']}: {judgement['id']} {judgement['order']}: {key} is {judgement.get(key)} in "
            f"{JUDGEMENTS_FILE}, but the reply says {mark}"
            for key, mark in verdict.items()
            if key != "error" and not _equal(judgement.get(key), mark)
        ]
    return lines


def _judges(rows: Iterable[Row]) -> list[str]:
    return sorted({judgement["model"] for row in rows for judgement in row["judgements"]})


def _flat(figures: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested figures by their paths: ``{"groups": {"a": {"value": 1}}} -> {"groups a value": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in figures.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key} ")
        elif key != "signature":
            flat[prefix + key] = value
    return flat


def _equal(a: Any, b: Any) -> bool:
    # Sums in another order (another numpy) may differ in the last digits, never in a digit that is printed.
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return abs(a - b) < 1e-9
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b


def read_results(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Entries of a folder's ``results.json``; none if there is no such file.

    Raises:
        ValueError: If it holds something else.
    """
    path = Path(folder) / RESULTS_FILE
    if not path.is_file():
        return []
    expected = f'expected {{"results": [entries, each with its "name"]}}; remove {path.name}, and evaluate again'
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); {expected}") from None
    entries = content.get("results") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "name" in entry for entry in entries):
        raise ValueError(f"{path} holds {shorten(json.dumps(content), 60)}, {expected}")
    return entries


def read_result(folder: str | os.PathLike[str], name: str) -> dict[str, Any] | None:
    """A test set's entry in a folder's ``results.json``; ``None`` if it has none."""
    return next((entry for entry in read_results(folder) if entry["name"] == name), None)


def save_result(folder: str | os.PathLike[str], result: TaskResult) -> None:
    """Put a result into a folder's ``results.json``, in place of an earlier one of the same name."""
    _write(folder, [entry for entry in read_results(folder) if entry["name"] != result.name] + [result.to_dict()])


def forget_result(folder: str | os.PathLike[str], name: str) -> None:
    """Take a test set's entry out of ``results.json``.

    Before its answers or judgements go: figures without them would be an entry that nothing proves.
    """
    if read_result(folder, name) is not None:
        _write(folder, [entry for entry in read_results(folder) if entry["name"] != name])


def _write(folder: str | os.PathLike[str], entries: list[dict[str, Any]]) -> None:
    path = Path(folder) / RESULTS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps({"results": entries}, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def pool(folders: Iterable[str | os.PathLike[str]]) -> dict[str, Figures]:
    """Headline figures over the answers of several runs (seeds) together, by name of the test set.

    The interval treats every answer as an item of its own: it says how sure the figure is for these runs, not how much
    another seed would change it.

    Raises:
        ValueError: If a test set has another metric or other settings in one of the runs.
    """
    entries: dict[str, dict[str, Any]] = {}
    answers: dict[str, list[Row]] = {}
    for folder in folders:
        rows = with_judgements(read_answers(folder), read_judgements(folder))
        for entry in read_results(folder):
            first = entries.setdefault(entry["name"], entry)
            if (first["metric"], first["settings"]) != (entry["metric"], entry["settings"]):
                raise ValueError(
                    f"{entry['name']} is scored by {entry['metric']} with {entry['settings']} in {folder}, elsewhere "
                    f"by {first['metric']} with {first['settings']}; evaluate both alike"
                )
            answers.setdefault(entry["name"], []).extend(row for row in rows if row["name"] == entry["name"])
    return {name: score_answers(answers[name], e["metric"], (), e["settings"])[0] for name, e in entries.items()}


__all__ = [
    "ANSWERS_FILE",
    "JUDGEMENTS_FILE",
    "RESULTS_FILE",
    "AnswerLog",
    "JudgementLog",
    "TaskResult",
    "command_line",
    "describe_model",
    "environment",
    "forget_result",
    "metric_settings",
    "pool",
    "portable_path",
    "read_answers",
    "read_judgements",
    "read_result",
    "read_results",
    "rescore",
    "save_result",
    "score_answers",
    "with_judgements",
]
