"""Results of several runs and the papers' figures side by side, and which of the numbers cannot be compared.

    compare_runs(runs, models) -> Comparison: lines of cells, and the notes that the cells refer to

``comparison_runs`` reads the runs and ``published`` the papers; ``compare`` prints and writes, ``comparison_plots``
draws.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from soundwave.eval.benchmarks import BENCHMARKS
from soundwave.eval.comparison_runs import Run
from soundwave.eval.efficiency import BY_STAGE, EFFICIENCY, by_stage
from soundwave.eval.published import PublishedFigure, all_published_figures, missing_tables, published_figures
from soundwave.eval.scoring import Metric, get_metric

#: Settings of the interval: they change how sure a figure is said to be, not the figure.
OF_THE_INTERVAL = ("resamples", "confidence", "seed")
#: Settings of the decoding that belong to a model, not to the way in which all are asked.
OF_THE_MODEL = ("batch_size", "system_prompt", "transcriber", "llm", "chat_template", "transcript_prompt")
#: Packages whose version decides what is counted.
SCORERS = ("soundwave", "jiwer", "sacrebleu")
#: Undefined figures that a note names one by one.
MOST_NAMED = 4
KINDS = ("headline", "beside", "area", "group", "also")
#: Headline -> the further metric without which it says little: a baseline, or the other reading of the same ratio.
BESIDE = {"similarity": "shuffled_similarity", "ratio_padded": "ratio_speech"}
PAPERS = {"soundwave": "Soundwave paper", "sim": "SiM paper"}


@dataclass(frozen=True)
class Cell:
    """A figure in a table.

    Attributes:
        value: On the scale of ``results.json``; ``None``: undefined.
        text: As printed, unit left out.
        interval: Of a run's figure.
        count: Items it is made of; ``None`` for a published one.
        failures: Items without an answer, which are in no figure.
        unread: Answers that the metric could not read.
        notes: Numbers in ``Comparison.notes``, from 1.
    """

    value: float | None
    text: str
    interval: tuple[float, float] | None = None
    count: int | None = None
    failures: int = 0
    unread: int = 0
    notes: tuple[int, ...] = ()


@dataclass
class Line:
    """One row of the table: a benchmark's headline, what belongs beside it, an area or group, or a further metric.

    ``part`` is the area, the group or the training stage, else empty. ``cells`` holds a cell per column that has the
    figure.
    """

    benchmark: str
    part: str
    kind: str  # of KINDS
    metric: Metric
    cells: dict[str, Cell] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Lines over columns: the runs, then the published models that have a figure in one of the lines."""

    runs: list[str]
    published: list[str]
    lines: list[Line]
    notes: list[str]

    @property
    def columns(self) -> list[str]:
        """Labels in order."""
        return [*self.runs, *self.published]


class _Notes:
    """Numbered texts, each once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def number(self, texts: Sequence[str]) -> tuple[int, ...]:
        self.texts += [text for text in dict.fromkeys(texts) if text not in self.texts]
        return tuple(sorted({self.texts.index(text) + 1 for text in texts}))


def compare_runs(runs: Sequence[Run], models: Sequence[str] = ()) -> Comparison:
    """Lines of every benchmark that a run has, in the runs' order.

    Notes mark what keeps numbers from being compared. Between runs: other data, items, rules, versions, judges or
    decoding than the first run that has the benchmark; fewer items than the benchmark has, or an unknown share of
    them; figures that are undefined. Beside a published figure: another metric or setting, what the paper does not
    state, and where it contradicts itself.

    Args:
        runs: Of ``comparison_runs.read_runs``.
        models: Published ones, of ``published.choose_models``.
    """
    notes, lines = _Notes(), []
    labels = {model: f"{model} (published)" for model in models}
    for name in dict.fromkeys(name for run in runs for name in run.entries):
        entries = {run.label: run.entries[name] for run in runs if name in run.entries}
        of_benchmark = _lines_of_runs(name, entries, notes)
        for line in of_benchmark:
            for model, label in labels.items() if line.kind not in ("beside", "also") else ():
                if found := published_figures(_benchmark(name, entries), line.part, model):
                    line.cells[label] = _published_cell(found, line, entries, notes)
        if models:
            notes.number(
                [
                    f"{name}: {PAPERS[paper]}, Table {table} reports it, but its figures are not in the available text"
                    for paper, table in missing_tables(_benchmark(name, entries))
                ]
            )
        lines += of_benchmark
    published = [label for label in labels.values() if any(label in line.cells for line in lines)]
    return Comparison([run.label for run in runs], published, lines, notes.texts)


def _benchmark(name: str, entries: Mapping[str, dict[str, Any]]) -> str:
    """What a test set is called in the papers' data: a set may go by another name than its benchmark.

    A measurement has no other: ``ttft`` is on the papers' data, ``ttft:meld`` is not.
    """
    return next((entry["task"] for entry in entries.values() if entry["task"] in BENCHMARKS), name)


def _lines_of_runs(name: str, entries: Mapping[str, dict[str, Any]], notes: _Notes) -> list[Line]:
    lines: dict[tuple[str, str], Line] = {}
    first_label, first = next(iter(entries.items()))
    for label, entry in entries.items():
        marks = notes.number(
            [
                *_fewer_items(name, label, entry, _benchmark(name, entries)),
                *_differences(name, label, entry, first_label, first),
            ]
        )
        figures = list(_figures(entry))
        undefined = notes.number(_undefined(name, label, figures))
        for kind, part, metric, figure in figures:
            line = lines.setdefault((part, metric.name), Line(name, part, kind, metric))
            here = marks if figure["value"] is not None else tuple(sorted({*marks, *undefined}))
            line.cells[label] = _cell(metric, entry, kind, figure, here)
    return sorted(lines.values(), key=lambda line: KINDS.index(line.kind))


def _figures(entry: dict[str, Any]) -> Iterator[tuple[str, str, Metric, Mapping[str, Any]]]:
    """(kind, part, metric, figure) of an entry."""
    yield from _by_stage("headline", entry["metric"], entry)
    for kind in ("area", "group") if entry["metric"] not in BY_STAGE else ():
        for part, figure in (entry.get(f"{kind}s") or {}).items():
            yield kind, part, get_metric(entry["metric"]), figure
    for name, figure in (entry.get("also") or {}).items():
        yield from _by_stage("beside" if name == BESIDE.get(entry["metric"]) else "also", name, figure)


def _by_stage(kind: str, name: str, figure: dict[str, Any]) -> Iterator[tuple[str, str, Metric, Mapping[str, Any]]]:
    """The figure itself, or in its place those of the stages in their order."""
    for stage, part in by_stage(name, figure).items():
        yield kind, stage, get_metric(name), part


def _undefined(name: str, label: str, figures: Sequence[tuple[str, str, Metric, Mapping[str, Any]]]) -> list[str]:
    """A note if a run has no figure where one belongs: the pictures cannot show what is not there."""
    without = [part or metric.name for _, part, metric, figure in figures if figure["value"] is None]
    if not without:
        return []
    which = ", ".join(without) if len(without) <= MOST_NAMED else f"{len(without)} of its {len(figures)} figures"
    return [
        f"{name}: undefined (none) for {label}: {which}; no answer there could be read, or the mean lacks a part, "
        "and the pictures show no value"
    ]


def _cell(metric: Metric, entry: dict[str, Any], kind: str, figure: Mapping[str, Any], notes: tuple[int, ...]) -> Cell:
    interval, headline = figure["interval"], kind == "headline"
    return Cell(
        value=figure["value"],
        text=number_text(metric, figure["value"]),
        interval=None if interval is None else (interval[0], interval[1]),
        count=figure.get("count", entry["count"]),
        failures=entry["failures"] if headline else 0,
        unread=(entry.get("notes") or {}).get(metric.unread, 0) if headline else figure.get("unread", 0),
        notes=notes,
    )


def number_text(metric: Metric, value: float | None) -> str:
    """A figure as ``Metric.format`` prints it, without its unit: the line names that."""
    return metric.format(value).removesuffix(metric.unit).rstrip()


def _fewer_items(name: str, label: str, entry: dict[str, Any], benchmark: str) -> list[str]:
    published = any(figure.benchmark == benchmark for figure in all_published_figures())
    # A measurement that no paper's table has draws items of its own (similarity) or repeats them (training_speed).
    known = BENCHMARKS.get(benchmark) or (EFFICIENCY.get(benchmark) if published else None)
    asked = entry["count"] + entry["failures"]
    if known is not None and known.size is not None:
        return [] if asked == known.size else [f"{name}: {label} was asked {asked} items, of {known.size} that it has"]
    notes = []
    if whole := entry["dataset"].get("sampled_from"):
        given = entry["dataset"].get("rows", asked)
        notes.append(f"{name}: {label} was given {given} of the {whole} items of its data")
    if published:
        notes.append(f"{name}: {label} was asked {asked} items; how many the whole set has is not known here")
    return notes


def _differences(name: str, label: str, entry: dict[str, Any], first_label: str, first: dict[str, Any]) -> list[str]:
    here, there = conditions(entry), conditions(first)
    differing = [key for key in dict.fromkeys([*here, *there]) if here.get(key) != there.get(key)]
    if not differing:
        return []
    listed = "; ".join(f"{key} {_brief(here.get(key))} (there {_brief(there.get(key))})" for key in differing)
    return [f"{name}: {label} is not comparable with {first_label}: {listed}"]


def _brief(value: Any) -> str:
    return "not stated" if value is None else f"{value:.60}" if isinstance(value, str) else f"{value!r:.60}"


def conditions(entry: dict[str, Any]) -> dict[str, Any]:
    """What two entries must share for their figures to be comparable, by a name for readers."""
    dataset = entry["dataset"]
    named: dict[str, Any] = {
        "data": dataset.get("name"),
        "data revision": dataset.get("revision"),
        "items": entry["count"] + entry["failures"],
        "metric": entry["metric"],
        "signature": entry.get("signature"),
    }
    named |= {key: value for key, value in entry["settings"].items() if key not in (*OF_THE_INTERVAL, "measured")}
    named |= entry["settings"].get("measured", {})  # an efficiency's: device, dtype, batch ...
    named |= {f"decoding {key}": value for key, value in entry["decoding"].items() if key not in OF_THE_MODEL}
    judge = entry.get("judge") or {}
    named |= {f"judge {key}": value for key, value in judge.items() if key not in ("failures", "judgements")}
    packages = entry.get("packages") or {}
    return named | {f"{package} version": packages[package] for package in SCORERS if package in packages}


def _published_cell(
    found: Sequence[PublishedFigure], line: Line, entries: Mapping[str, dict[str, Any]], notes: _Notes
) -> Cell:
    """One figure, the most precise print of it; several where the paper's tables contradict each other."""
    best = sorted(found, key=lambda figure: -figure.decimals)
    agree = all(figure.agrees(best[0]) for figure in best)
    texts = []
    for figure in found:
        where = f"{PAPERS[figure.paper]}, Table {figure.table}"
        texts += [f"the paper contradicts itself: {text}" for text in figure.contradictions]
        texts.append(f"{line.benchmark}: {where} does not state: {', '.join(figure.not_stated)}")
        if figure.measured_on != figure.benchmark:
            texts.append(
                f"{line.benchmark}: {where} is of {figure.measured_on}, other data under nearly the same name"
            )
        if figure.metric != line.metric.name:
            texts.append(f"{line.benchmark}: {where} has {figure.metric}, the runs {line.metric.name}")
        for label, entry in entries.items():
            texts += [
                f"{line.benchmark}: {where} has {key} {value}, {label} {entry['settings'].get(key)}"
                for key, value in figure.settings.items()
                if entry["settings"].get(key) != value
            ]
    text = best[0].printed if agree else ", ".join(f"{figure.printed} (Table {figure.table})" for figure in found)
    return Cell(value=best[0].value if agree else None, text=text, notes=notes.number(texts))
