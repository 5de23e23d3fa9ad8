"""Figures of answer rows: every metric, its bootstrap interval, its groups and areas.

    score_rows(rows, "wer", {"normalizer": "english"}) -> Figures(value, interval, count, ...)

A metric is a few numbers per row that add up (``counting``) and what their sums give. One representation serves the
figure, its interval (items drawn again with replacement), groups, and the pooling of several test sets.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any, Literal

import numpy as np

from soundwave.eval import counting, verdicts
from soundwave.eval.counting import Row, Settings, Statistics
from soundwave.eval.measures import MEASURES

#: Resamplings behind every interval.
RESAMPLES = 1000
CONFIDENCE = 0.95


def quotient(sums: np.ndarray) -> float:
    """The first sum over the second; NaN where there is nothing to divide by."""
    return float(sums[0] / sums[1]) if sums[1] else np.nan


@dataclass(frozen=True)
class Metric:
    """One way of scoring answers.

    Attributes:
        name: As in the files.
        title: For tables.
        statistics: (row, settings) -> ``size`` numbers that add up over rows.
        combine: Their sums (size,) -> the figure; NaN where it is undefined.
        lower_is_better: True for errors.
        unit: ``"%"``: a share, shown as a percentage; ``""``: points; or a unit of measurement such as ``"ms"``.
        size: How many numbers.
        reduce: Their numbers (rows, size) -> (size,), of a measure that does not add up over rows, such as a median.
        unread: What an item is called that the rule could not read, in the notes: one whose last number is 0.
        signature: (rows, settings) -> the tool's own account of its settings.
    """

    name: str
    title: str
    statistics: Statistics
    combine: Callable[[np.ndarray], float] = quotient
    lower_is_better: bool = False
    unit: str = "%"
    size: int = 2
    reduce: Callable[[np.ndarray], np.ndarray] | None = None
    unread: str | None = None
    signature: Callable[[Sequence[Row], Settings], str] | None = None

    def format(self, value: float | None) -> str:
        """A figure as tables print it: ``"4.7%"``, ``"25.31"``, ``"72.00 ms"``; ``"none"`` if it is undefined."""
        if value is None:
            return "none"
        if self.unit != "%":
            return f"{value:.2f} {self.unit}".rstrip()
        # Two digits at least: 0.067% is not 0.1%.
        return f"{100 * value:.2g}%" if 0 < abs(value) < 0.00995 else f"{100 * value:.1f}%"


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("wer", "word error rate", counting.word_edits, lower_is_better=True),
        Metric("cer", "character error rate", counting.character_edits, lower_is_better=True),
        Metric("sentence_accuracy", "sentences without error", counting.same_sentence),
        Metric("accuracy", "accuracy", counting.same_answer),
        Metric("final_label_accuracy", "answer accuracy", counting.same_final_label),
        Metric("sound_accuracy", "sound labels right", counting.same_sounds),
        Metric("contained_answer", "answers that contain the reference", counting.contained),
        Metric(
            "sacrebleu",
            "sacreBLEU",
            counting.ngram_counts,
            counting.corpus_bleu,
            unit="",
            size=10,
            signature=counting.bleu_signature,
        ),
        Metric("label_accuracy", "accuracy, exact label", counting.exact_label),
        Metric(
            "lenient_label_accuracy",
            "accuracy, the one label named",
            counting.named_label,
            size=3,
            unread="parse_failures",
        ),
        Metric("choice_accuracy", "accuracy of parsed choices", counting.official_choice, unread="parse_failures"),
        Metric("choice_strict", "accuracy of choices", counting.strict_choice, size=3, unread="parse_failures"),
        Metric("parse_failures", "choices not parsed", counting.unread_choice, lower_is_better=True),
        Metric("string_match", "accuracy by string match", counting.matched_choice),
        Metric("grounding", "overlap of time spans (IoU)", counting.time_overlap, size=3, unread="parse_failures"),
        Metric("grounding_choice", "time spans chosen right", counting.time_choice, size=3, unread="parse_failures"),
        Metric("judge_score", "judge's score", counting.judged, unit="", unread="judge_failures"),
        Metric("judge_win_rate", "preferred to the reference", counting.preferred, unread="judge_failures"),
        Metric(
            "judge_score_lenient",
            "judge's score, read leniently",
            verdicts.judged_leniently,
            unit="",
            unread="judge_failures",
        ),
        Metric(
            "judge_score_official",
            "judge's score, unread replies as 0",
            verdicts.judged_as_published,
            unit="",
            size=3,
            unread="judge_failures",
        ),
        Metric("judge_majority", "judged right", verdicts.judged_by_majority, unread="judge_failures"),
        Metric(
            "spoken_choice",
            "accuracy of spoken choices",
            verdicts.right_spoken_letter,
            size=3,
            unread="parse_failures",
        ),
        Metric("refusal_rate", "refusals", verdicts.refused),
        *(Metric(name, **fields) for name, fields in MEASURES.items()),
    )
}


def get_metric(name: str | Metric) -> Metric:
    """The metric of that name.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(name, Metric):
        return name
    if name not in METRICS:
        raise ValueError(f"metric {name!r} is unknown; choose one of {', '.join(METRICS)}")
    return METRICS[name]


def format_figure(metric: str, value: float | None) -> str:
    """A figure as tables print it (``Metric.format``), by the metric's name."""
    return get_metric(metric).format(value)


@dataclass(frozen=True)
class Figures:
    """What a metric says about a set of rows.

    Attributes:
        value: The headline figure; ``None`` if it is undefined, as the accuracy of parsed answers is when no answer
            could be parsed. A share is in [0, 1] (error rates can exceed 1), BLEU in [0, 100].
        interval: Its bootstrap interval, low and high end; ``None`` with ``value``.
        count: Items answered.
        groups: Group -> ``{"value", "interval", "count"}`` of its rows, ``"unread"``, how many of those the metric
            could not read, and ``"sources"``, the same by ``source``, where there are several.
        areas: Area -> ``{"value", "interval", "count"}``, the unweighted mean over its groups, and ``"missing"``: the
            groups of it that have no row.
        notes: What a reader must know: items that the metric could not read, groups without a figure (``undefined``)
            or without an answer (``missing``), which are in no mean.
        signature: The tool's own account of its settings, such as sacrebleu's.
    """

    value: float | None
    interval: tuple[float, float] | None
    count: int
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    areas: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    signature: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same for ``results.json``; parts that are empty are left out."""
        parts = asdict(self)
        return {key: parts[key] for key in parts if key in ("value", "interval", "count") or parts[key]}


@dataclass(frozen=True)
class _Sample:
    """A figure and what it becomes when items are drawn again: ``value``, ``draws`` (resamples,); NaN: undefined."""

    value: float
    draws: np.ndarray
    count: int
    unread: int

    def figure(self, confidence: float) -> dict[str, Any]:
        value = None if np.isnan(self.value) else float(self.value)
        interval = None if value is None else _interval(self.draws, confidence)
        unread = {"unread": self.unread} if self.unread else {}
        return {"value": value, "interval": interval, "count": self.count, **unread}


def _interval(draws: np.ndarray, confidence: float) -> tuple[float, float]:
    margin = (1 - confidence) / 2
    low, high = np.nanquantile(draws, [margin, 1 - margin])
    return float(low), float(high)


def _mean(samples: Sequence[_Sample]) -> _Sample:
    # Unweighted; undefined as soon as one part is: a mean over the rest would be another figure.
    return _Sample(
        float(np.mean([sample.value for sample in samples])),
        np.mean([sample.draws for sample in samples], axis=0),
        sum(sample.count for sample in samples),
        sum(sample.unread for sample in samples),
    )


def score_rows(
    rows: Iterable[Row],
    metric: str | Metric,
    settings: Settings | None = None,
    average: Literal["items", "groups", "areas"] = "items",
    areas: Mapping[str, Sequence[str]] | None = None,
) -> Figures:
    """Figures of answer rows; rows with an ``error`` are left out.

    The interval is a percentile bootstrap: items are drawn with replacement, of each group as many as it has. The same
    rows give the same interval, in whatever order they come.

    Args:
        rows: Of ``answers.jsonl``, with ``judgements`` where a judge read them.
        metric: Name in ``METRICS``, or a metric of your own.
        settings: Of the metric (see ``counting``), and ``resamples``, ``confidence``, ``seed``.
        average: Headline over all ``"items"`` together, or the unweighted mean over the ``"groups"`` or ``"areas"``.
        areas: Name -> groups whose unweighted mean is reported under that name.

    Raises:
        ValueError: If no row has an answer, a row lacks what the metric needs, or nothing can be counted.
    """
    metric, settings, areas = get_metric(metric), settings or {}, areas or {}
    rows = list(rows)
    by_group = _answered(rows, needs_groups=average != "items" or bool(areas))
    answered = [row for group in by_group.values() for row in group]
    rng, confidence = np.random.default_rng(settings.get("seed", 0)), settings.get("confidence", CONFIDENCE)
    sums, samples = _resampled(by_group, metric, settings, rng)
    in_areas = _areas(samples, areas)
    headlines = {
        "items": [_sample(sums, metric, len(answered))],
        "groups": samples.values(),
        "areas": in_areas.values(),
    }
    if not headlines.get(average):
        raise ValueError(f"average={average!r} averages nothing; choose 'items', 'groups' or, with areas, 'areas'")
    headline = _mean(list(headlines[average])).figure(confidence)
    headline.pop("unread", None)  # stands in the notes
    if headline["value"] is None and metric.unread is None:
        raise ValueError(
            f"{metric.name} of {len(answered)} items whose references hold nothing to count; give at least one"
        )
    groups = {
        name: sample.figure(confidence) | _by_source(by_group[name], metric, settings, rng)
        for name, sample in samples.items()
        if name
    }
    notes: dict[str, Any] = {metric.unread: len(answered) - int(sums[0][-1])} if metric.unread else {}
    if undefined := [name for name, figure in groups.items() if figure["value"] is None]:
        notes["undefined"] = undefined
    named = {row.get("group") for row in rows} | {group for part in areas.values() for group in part}
    if missing := sorted(group for group in named if group and group not in samples):
        notes["missing"] = missing
    return Figures(
        **headline | {"count": len(answered)},
        groups=groups,
        areas={area: sample.figure(confidence) | _missing(areas[area], samples) for area, sample in in_areas.items()},
        notes=notes,
        signature=metric.signature(answered, settings) if metric.signature else None,
    )


def _answered(rows: Sequence[Row], needs_groups: bool) -> dict[str, list[Row]]:
    """Rows with an answer by group, ``""`` for those without one; in an order that does not depend on the run's."""
    answered = [row for row in rows if row.get("error") is None]
    if not answered:
        first = next((f"; the first: {row['id']}: {row['error']}" for row in rows), "")
        raise ValueError(f"none of {len(rows)} items was answered, so there is nothing to score{first}")
    lost = next((row for row in answered if not row.get("group")), None)
    if needs_groups and lost is not None:
        raise ValueError(f"item {lost['id']!r} has no group, but the figure is a mean over groups")

    def group(row: Row) -> str:
        return row.get("group") or ""

    ordered = sorted(answered, key=lambda row: (group(row), str(row["id"])))
    return {name: list(members) for name, members in groupby(ordered, group)}


def _resampled(
    by_group: Mapping[str, Sequence[Row]], metric: Metric, settings: Settings, rng: np.random.Generator
) -> tuple[np.ndarray, dict[str, _Sample]]:
    """Sums over all rows, (1 + resamples, size) with those of the rows themselves first, and a sample per group."""
    if metric.reduce and len(by_group) > 1:
        raise ValueError(f"{metric.name} does not add up over groups; score rows without groups")
    resamples = settings.get("resamples", RESAMPLES)
    pooled = np.zeros((1 + resamples, metric.size))
    samples = {}
    for name, rows in by_group.items():
        numbers = np.array([metric.statistics(row, settings) for row in rows], dtype=np.float64)  # (n, size)
        sums = np.empty_like(pooled)
        sums[0] = metric.reduce(numbers) if metric.reduce else numbers.sum(axis=0)
        for i in range(1, 1 + resamples):  # one at a time: (resamples, n) indices of a large set would fill the memory
            drawn = rng.integers(0, len(rows), len(rows))
            counts = np.bincount(drawn, minlength=len(rows))
            sums[i] = metric.reduce(numbers[drawn]) if metric.reduce else counts @ numbers
        samples[name] = _sample(sums, metric, len(rows))
        pooled += sums
    return pooled, samples


def _sample(sums: np.ndarray, metric: Metric, count: int) -> _Sample:
    values = np.array([metric.combine(row) for row in sums], dtype=np.float64)  # (1 + resamples,)
    draws, lost = values[1:], np.isnan(values[1:])
    if lost.any() and not np.isnan(values[0]):
        # A draw of nothing but unread items has no figure: another one stands in for it, as if drawn once more. Else
        # a mean over many groups, each undefined now and then, would have an interval from hardly any draw.
        draws[lost] = np.resize(values[:1] if lost.all() else draws[~lost], lost.sum())
    return _Sample(values[0], draws, count, count - int(sums[0][-1]) if metric.unread else 0)


def _by_source(rows: Sequence[Row], metric: Metric, settings: Settings, rng: np.random.Generator) -> dict[str, Any]:
    sources: dict[str, list[Row]] = {}
    for row in rows:
        sources.setdefault(str(row.get("source")), []).append(row)
    if len(sources) == 1:
        return {}
    _, samples = _resampled(dict(sorted(sources.items())), metric, settings, rng)
    confidence = settings.get("confidence", CONFIDENCE)
    return {"sources": {name: sample.figure(confidence) for name, sample in samples.items()}}


def _missing(groups: Sequence[str], samples: Mapping[str, _Sample]) -> dict[str, list[str]]:
    missing = [group for group in groups if group not in samples]
    return {"missing": missing} if missing else {}


def _areas(samples: Mapping[str, _Sample], areas: Mapping[str, Sequence[str]]) -> dict[str, _Sample]:
    """The mean over its groups of every area that has any."""
    found = {area: [samples[group] for group in groups if group in samples] for area, groups in areas.items()}
    return {area: _mean(here) for area, here in found.items() if here}


def score_texts(
    metric: str | Metric, references: Sequence[str], hypotheses: Sequence[str], **settings: Any
) -> Figures:
    """Figures of two parallel lists of texts.

    Args:
        metric: Name in ``METRICS``, or a metric of your own, that needs nothing but the two texts.
        references: What is right.
        hypotheses: What was answered.
        settings: As in ``score_rows``.

    Raises:
        ValueError: If the lists differ in length, or as ``score_rows``.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references but {len(hypotheses)} hypotheses; every item needs both")
    pairs = enumerate(zip(references, hypotheses, strict=True))
    rows = [{"id": number, "reference": said, "answer": heard} for number, (said, heard) in pairs]
    return score_rows(rows, metric, settings)
