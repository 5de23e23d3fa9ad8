"""The figures that the Soundwave and SiM papers print, as data beside this file, and what is wrong or open in them.

    published_figures("air_bench_chat", "Speech", "Soundwave")   # 6.51 (Table 7) and 6.41 (Table 17)

``published.json`` holds one block per table and benchmark: ``paper``, ``table``, ``benchmark``, ``metric``, ``unit``,
``settings`` that the paper states, what is ``not_stated``, and ``figures`` (group or area -> model -> number as
printed; ``""``: the benchmark's headline). Under ``later_versions`` stand versions of the data that came after the
paper, whose figures are other ones. Groups have the names of the benchmarks here, AIR-Bench's own spellings.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

PUBLISHED_FILE = Path(__file__).with_name("published.json")
#: Of a figure as printed: what makes it a value of ``results.json``.
SCALES = {"%": 0.01, "share": 1.0, "BLEU": 1.0, "points": 1.0, "ms": 1.0}


@dataclass(frozen=True)
class PublishedFigure:
    """One number of a paper's table.

    Attributes:
        paper: ``"soundwave"`` or ``"sim"``.
        table: Its number in that paper.
        benchmark: Name as in ``benchmarks.BENCHMARKS`` or ``efficiency.EFFICIENCY``.
        group: Group or area; ``""``: the headline.
        model: As the paper writes it; rows of an ablation carry their table.
        metric: Name of the metric that comes closest.
        unit: Of ``number``: ``"%"``, ``"share"`` (0 to 1), ``"BLEU"``, ``"points"`` of a judge, ``"ms"``.
        number: As printed.
        settings: Of the metric, as far as the paper states them.
        not_stated: What the paper leaves open and a rerun has to choose.
        measured_on: The benchmark that the paper measured: ``benchmark``, or an earlier version of it.
        contradictions: What the paper says elsewhere that this figure cannot be squared with.
    """

    paper: str
    table: str
    benchmark: str
    group: str
    model: str
    metric: str
    unit: str
    number: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    not_stated: tuple[str, ...] = ()
    measured_on: str = ""
    contradictions: tuple[str, ...] = ()

    @property
    def value(self) -> float:
        """On the scale of ``results.json``, where shares are 0 to 1."""
        return self.number * SCALES[self.unit]

    @property
    def printed(self) -> str:
        """With the paper's digits, shares in percent."""
        if self.unit == "share":
            return f"{100 * self.number:.{max(self.decimals - 2, 0)}f}"
        return repr(self.number)

    @property
    def decimals(self) -> int:
        """Digits after the point of ``number``."""
        return len(repr(self.number).partition(".")[2])

    def agrees(self, other: "PublishedFigure") -> bool:
        """Whether two prints of one figure differ by no more than rounding."""
        coarser = min(self.decimals, other.decimals)
        return abs(self.number - other.number) <= 0.5 * 10**-coarser + 1e-9


@cache
def all_published_figures() -> tuple[PublishedFigure, ...]:
    """Every figure of the file, in the order of the papers' tables there."""
    data = _read()
    return tuple(
        PublishedFigure(
            paper=block["paper"],
            table=block["table"],
            benchmark=benchmark,
            group=group,
            model=model,
            metric=block["metric"],
            unit=block["unit"],
            number=number,
            settings=block.get("settings", {}),
            not_stated=tuple(block["not_stated"]),
            measured_on=block["benchmark"],
            contradictions=tuple(
                entry["text"]
                for entry in data["discrepancies"]
                if [block["table"], block["benchmark"], group, model] in entry["figures"]
            ),
        )
        for block in data["tables"]
        for benchmark in (block["benchmark"], *block.get("later_versions", ()))
        for group, numbers in block["figures"].items()
        for model, number in numbers.items()
    )


def published_figures(benchmark: str, group: str = "", model: str | None = None) -> list[PublishedFigure]:
    """The figures of a benchmark or of one of its groups; several of one model where tables print it again.

    Args:
        benchmark: Name, such as ``"librispeech_clean"``; one that no paper reports has no figures.
        group: Group or area, such as ``"Speech_Grounding"`` or ``"speech"``; ``""``: the headline.
        model: Of this one only.
    """
    return [
        figure
        for figure in all_published_figures()
        if (figure.benchmark, figure.group) == (benchmark, group) and model in (None, figure.model)
    ]


def published_models() -> list[str]:
    """Names of the models that have figures, Soundwave first, then in the papers' order."""
    names = dict.fromkeys(figure.model for figure in all_published_figures())
    return sorted(names, key=lambda name: name != "Soundwave")


def missing_tables(benchmark: str) -> list[tuple[str, str]]:
    """(paper, table) of the tables that report a benchmark, but whose figures the papers' available text lacks."""
    return [(entry["paper"], entry["table"]) for entry in _read()["missing"] if benchmark in entry["benchmarks"]]


def citation(paper: str) -> str:
    """Title of a paper, with its arXiv number where it has one."""
    about = _read()["papers"][paper]
    return about["title"] + (f" (arXiv {about['arxiv']})" if "arxiv" in about else "")


def choose_models(wanted: Sequence[str]) -> list[str]:
    """The published models of these names, whatever their case; ``["all"]``: all of them.

    Raises:
        ValueError: If one is unknown.
    """
    names = published_models()
    if list(wanted) == ["all"]:
        return names
    known = {name.casefold(): name for name in names}
    if unknown := [name for name in wanted if name.casefold() not in known]:
        raise ValueError(
            f"no published figures of {', '.join(map(repr, unknown))}; choose among {', '.join(names)}, or 'all'"
        )
    return list(dict.fromkeys(known[name.casefold()] for name in wanted))


@cache
def _read() -> dict[str, Any]:
    return json.loads(PUBLISHED_FILE.read_text(encoding="utf-8"))
