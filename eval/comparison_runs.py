"""``results.json`` of several runs, read with care: what is missing or damaged is named, and the rest is compared."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soundwave.eval.results import ANSWERS_FILE, RESULTS_FILE
from soundwave.eval.scoring import METRICS

#: Of an entry, what a comparison reads, beside ``value`` and ``interval``.
NEEDED: dict[str, type] = {
    **dict.fromkeys(("name", "task", "metric"), str),
    **dict.fromkeys(("dataset", "settings", "decoding"), dict),
    **dict.fromkeys(("count", "failures"), int),
}
#: Those that may be missing or ``None``, and else are of this type.
OPTIONAL = dict.fromkeys(("also", "areas", "groups", "judge", "notes", "packages"), dict)


@dataclass(frozen=True)
class Run:
    """Entries of one ``results.json`` by name, and how the run is called in tables."""

    label: str
    entries: dict[str, dict[str, Any]]


def read_runs(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[Run], list[str]]:
    """Runs of folders or ``results.json`` files, and a line about each thing that could not be read.

    A damaged entry is left out and named; the others of its file stay.

    Args:
        paths: Folders of evaluations, or their ``results.json``.
    """
    files = [path / RESULTS_FILE if path.is_dir() else path for path in map(Path, paths)]
    runs, problems = [], []
    for file, label in zip(files, _labels(files), strict=True):
        entries, wrong = _read_entries(file)
        problems += [f"{label}: {problem}" for problem in wrong]
        if entries:
            runs.append(Run(label, {entry["name"]: entry for entry in entries}))
    return runs, problems


def _labels(files: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell the runs apart; the same one given again is numbered."""
    whole = [file.resolve().parent if file.name == RESULTS_FILE else file.resolve() for file in files]
    labels = [path.name for path in whole]
    depth = 1
    while len(set(labels)) < len(set(whole)):
        depth += 1
        labels = ["/".join(path.parts[-depth:]) for path in whole]
    before = [labels[:i].count(label) for i, label in enumerate(labels)]
    return [f"{label} ({n + 1})" if n else label for label, n in zip(labels, before, strict=True)]


def _read_entries(file: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The sound entries of a file, and what is wrong with it and the others."""
    if file.name != RESULTS_FILE and not file.exists():
        return [], ["it does not exist; give a folder of an evaluation, or its results.json"]
    if not file.is_file():
        unfinished = f", only {ANSWERS_FILE}: the evaluation was cut short; run it again and it goes on"
        return [], [f"there is no {file.name}" + (unfinished if (file.parent / ANSWERS_FILE).is_file() else "")]
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [], [f"{file.name} is damaged ({type(error).__name__}: {error}); evaluate again"]
    if not isinstance(entries, list) or not entries:
        return [], [f"{file.name} holds no results (its 'results' is {entries!r:.40})"]
    sound, wrong = [], []
    for number, entry in enumerate(entries, start=1):
        if (fault := _fault(entry)) is None:
            sound.append(entry)
        else:
            name = entry.get("name") if isinstance(entry, dict) else None
            wrong.append(f"{name or f'result {number}'} is left out: {fault}")
    names = [entry["name"] for entry in sound]
    wrong += [f"{name} is there {names.count(name)} times; the last one counts" for name in _repeated(names)]
    return sound, wrong


def _repeated(names: Sequence[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]


def _fault(entry: Any) -> str | None:
    """What keeps an entry from being compared."""
    if not isinstance(entry, dict):
        return f"it is {entry!r:.40}, expected the fields of a result"
    if missing := [key for key in (*NEEDED, "value", "interval") if key not in entry]:
        return f"it has no {', '.join(missing)}"
    given = {key: kind for key, kind in OPTIONAL.items() if entry.get(key) is not None}
    for key, kind in (NEEDED | given).items():
        if not isinstance(entry[key], kind):
            return f"its {key} is {entry[key]!r:.40}, expected {kind.__name__}"
    for metric in (entry["metric"], *(entry.get("also") or {})):
        if metric not in METRICS:
            return f"its metric {metric!r} is unknown to this version"
    return next((fault for part, figure in parts_of(entry) if (fault := _figure_fault(part, figure))), None)


def _figure_fault(part: str, figure: Any) -> str | None:
    try:
        value, interval = figure["value"], figure["interval"]
        numbers = [] if value is None and interval is None else [value, *interval]  # None: undefined, and said so
        if len(numbers) in (0, 3) and all(not isinstance(n, bool) and math.isfinite(n) for n in numbers):
            return None
    except (KeyError, TypeError):
        pass
    return f"the figure of {part} is {figure!r:.80}, expected a finite value and an interval of two"


def parts_of(entry: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every figure of an entry with a name: the headline, its areas, groups, further metrics and their groups."""
    yield "the headline", {"value": entry["value"], "interval": entry["interval"]}
    for kind in ("areas", "groups"):
        yield from (entry.get(kind) or {}).items()
    for name, figure in (entry.get("also") or {}).items():
        yield name, figure
        groups = figure.get("groups") or {}
        yield from groups.items() if isinstance(groups, dict) else [(f"{name}, its groups", groups)]
