"""The only way a figure gets into a card: looked up in ``results.json``, checked against the answers."""

import html
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from soundwave.eval.efficiency import BY_STAGE, EFFICIENCY, by_stage
from soundwave.eval.logs import read_settings
from soundwave.eval.provenance import weights_hash
from soundwave.eval.results import ANSWERS_FILE, RESULTS_FILE, read_answers, read_judgements, read_results, rescore

#: A percentage in prose or a table.
PERCENTAGE = re.compile(r"(?:(?<![\w%])[.,])?\d+(?:[.,]\d+)?\s*(?:%|percent\b|per cent\b)", re.IGNORECASE)
#: What makes the other numbers of a line figures too.
MEASURED = re.compile(
    r"(?<![^\W_])(?:WER|CER|BLEU|accura[^\W_]+|error rate|IoU|F1|score[sd]?|judge[sd]?|judge's|vs|versus)(?![^\W_])",
    re.IGNORECASE,
)
#: A number that stands alone: not a part of a name, a version or a date. Underscores are Markdown's emphasis.
NUMBER = re.compile(r"(?<![^\W_])(?<![.,:/@-])[.,]?\d+(?:[.,]\d+)?(?![^\W_]|[/:-])")
#: Words of others that a licence asks for: addresses, whose escapes look like percentages, and versions of licences.
QUOTED = re.compile(r"\w+://[^\s<>()]+|\bCC[- ]BY(?:[- ][A-Z]{2})*[- ]\d\.\d\b", re.IGNORECASE)
#: How many of the differences between results and answers are named.
NAMED_DIFFERENCES = 3

#: What an entry of an earlier version does not say.
NO_PARTS: dict[str, Any] = {"groups": {}, "areas": {}, "judge": None}


class CardError(ValueError):
    """A card that would say something that was not measured, or break a licence."""


class Figures:
    """Figures of a run's ``results.json``, checked against its answers and judgements.

    Args:
        run_dir: Folder with ``results.json`` and ``answers.jsonl``; without results there are no figures.

    Raises:
        CardError: If a figure differs from what the answers give, its answers are missing or were made with other
            settings, a test set stands there twice, or was measured on another model than the folder's, or on other
            weights.
    """

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self.run_dir = Path(run_dir)
        self._shown: set[str] = set()
        name = self.run_dir.resolve().name
        try:
            entries = [NO_PARTS | entry for entry in read_results(run_dir)]
            answers, judgements, asked = read_answers(run_dir), read_judgements(run_dir), read_settings(run_dir)
            wrong = [
                line for entry in entries for line in rescore(entry, answers, judgements, asked.get(entry["name"]))
            ]
        except (ValueError, KeyError, TypeError) as error:  # edited by hand, cut short, or of another version
            raise CardError(
                f"{RESULTS_FILE} and {ANSWERS_FILE} of {name} cannot be scored again, so no card is written; evaluate "
                f"again. {type(error).__name__}: {error}"
            ) from error
        self._entries = {entry["name"]: entry for entry in entries}
        self._unscored = sorted({str(row["name"]) for row in answers} - set(self._entries))
        if twice := [each for each, count in Counter(entry["name"] for entry in entries).items() if count > 1]:
            raise CardError(f"{RESULTS_FILE} of {name} holds {', '.join(twice)} more than once; evaluate again")
        self._check_model(name)
        if wrong:
            first = [shorten(line, 250, placeholder=" …") for line in wrong[:NAMED_DIFFERENCES]]
            more = f"; and {len(wrong) - len(first)} more" if len(wrong) > len(first) else ""
            raise CardError(
                f"{RESULTS_FILE} and {ANSWERS_FILE} of {name} disagree, so no card is written; evaluate again. "
                + "; ".join(first)
                + more
            )

    def _check_model(self, name: str) -> None:
        weights = weights_hash(self.run_dir) if self._entries else None
        for entry in self._entries.values():
            measured = entry["model"]["class"]
            if not measured.startswith("Soundwave"):
                raise CardError(
                    f"{entry['name']} in {RESULTS_FILE} of {name} was measured on a {measured}, not on this model; "
                    "evaluate other models with an --output folder of their own"
                )
            if entry["model"].get("weights") != weights:
                raise CardError(
                    f"{entry['name']} in {RESULTS_FILE} of {name} was not measured on the weights that lie there; "
                    f"evaluate again: soundwave evaluate --model {self.run_dir} --output {self.run_dir} --overwrite"
                )

    @property
    def names(self) -> list[str]:
        """The test sets that were evaluated."""
        return list(self._entries)

    @property
    def entries(self) -> list[dict[str, Any]]:
        """Their entries in ``results.json``."""
        return list(self._entries.values())

    def unscored(self) -> list[str]:
        """Test sets with answers and no figures: they wait for a judge, are unfinished, or were taken out."""
        return [self.show(name) for name in self._unscored]

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self._entries:
            raise CardError(
                f"the card asks for a figure of {name!r}, which {RESULTS_FILE} does not hold; "
                f"evaluated are: {', '.join(self._entries) or 'none'}"
            )
        return self._entries[name]

    def _figure(self, name: str, metric: str | None) -> dict[str, Any]:
        entry = self._entry(name)
        if metric is None or metric == entry["metric"]:
            return entry
        if metric not in entry["also"]:
            raise CardError(f"the card asks for the {metric} of {name!r}, which {RESULTS_FILE} does not hold")
        return entry["also"][metric]

    def show(self, text: str) -> str:
        """Let the numbers of a text that was made from ``results.json`` stand in the card."""
        self._shown.update(PERCENTAGE.findall(_plain(text)))
        self._shown.update(NUMBER.findall(_plain(text)))
        return text

    def _value(self, metric: str, figure: Mapping[str, Any]) -> str:
        return self.show(_format(metric, figure["value"]))

    def _interval(self, metric: str, figure: Mapping[str, Any]) -> str:
        if figure["interval"] is None:
            return "none"
        low, high = (_format(metric, end) for end in figure["interval"])
        return self.show(f"{low} to {high}")

    def value(self, name: str, metric: str | None = None) -> str:
        """A test set's headline figure, or another metric of it, as ``"4.7%"``."""
        return self._value(metric or self._entry(name)["metric"], self._figure(name, metric))

    def interval(self, name: str, metric: str | None = None) -> str:
        """Its interval, as ``"3.9% to 5.6%"``."""
        return self._interval(metric or self._entry(name)["metric"], self._figure(name, metric))

    def confidence(self) -> str:
        """The share of resampled figures inside the intervals, as ``"95%"``."""
        shares = sorted({f"{100 * entry['settings']['confidence']:g}%" for entry in self.entries})
        return self.show(", ".join(shares))

    def rows(self) -> list[dict[str, str]]:
        """Every figure as a row of the results table, headline metrics first within their test set."""
        return [
            {
                "test_set": self.show(f"{name}, {stage}" if stage else name),
                "task": self.show(task_title(entry["task"])),
                "metric": _metric_title(metric),
                "value": self._value(metric, figure),
                "interval": self._interval(metric, figure),
                "count": self.show(str(figure.get("count", entry["count"]))),
                "failures": self.show(str(entry["failures"])),
            }
            for name, entry in self._entries.items()
            for metric in (entry["metric"], *entry["also"])
            for stage, figure in by_stage(metric, self._figure(name, metric)).items()
        ]

    def parts(self) -> list[dict[str, Any]]:
        """Test sets that have areas or groups, with a row for each: areas first, which are means over groups."""
        return [
            {
                "test_set": self.show(name),
                "metric": _metric_title(entry["metric"]),
                "rows": [
                    {
                        "part": self.show(f"{part}{_missing(figure)}"),
                        "kind": kind,
                        "value": self._value(entry["metric"], figure),
                        "interval": self._interval(entry["metric"], figure),
                        "count": self.show(_count(figure)),
                    }
                    for kind, figures in (("mean of groups", entry["areas"]), ("group", entry["groups"]))
                    for part, figure in figures.items()
                ],
            }
            for name, entry in self._entries.items()
            if (entry["areas"] or entry["groups"]) and entry["metric"] not in BY_STAGE
        ]

    def remarks(self) -> list[str]:
        """What a reader of the tables must know: what could not be read, who judged, a tool's own settings."""
        lines = []
        for name, entry in self._entries.items():
            said = []
            for metric, figure in ((entry["metric"], entry), *entry["also"].items()):
                for key, value in figure.get("notes", {}).items():
                    said.append(f"{_metric_title(metric)}: {key.replace('_', ' ')} {_listed(value)}")
                if figure.get("signature"):
                    said.append(f"signature `{figure['signature']}`")
            if entry["judge"]:
                said.append(f"judge: {_spelt(entry['judge'])}")
            if measured := entry["settings"].get("measured"):  # a time means nothing without its machine
                said.append(f"measured: {_spelt(measured)}, processor {entry['hardware'].get('processor')}")
            if said:
                lines.append(self.show(f"{name}: {'; '.join(said)}"))
        return lines

    def decoding(self) -> list[str]:
        """One line per way of decoding, with the test sets it was used for."""
        ways: dict[str, list[str]] = {}
        for name, entry in self._entries.items():
            decoding = {key: value for key, value in entry["decoding"].items() if value is not None}
            settings = [str(decoding.pop("strategy", "not stated"))]
            settings += [f"{key.replace('_', ' ')} {_listed(value)}" for key, value in decoding.items()]
            if "normalizer" in entry["settings"]:
                settings.append(f"normaliser {entry['settings']['normalizer']}")
            ways.setdefault(", ".join(settings), []).append(name)
        return [self.show(f"{way}: {', '.join(names)}") for way, names in ways.items()]

    def headline_values(self) -> dict[str, float]:
        """Headline figures by test set, in percent where they are shares; without those that are undefined."""
        return {
            name: _scaled(entry["metric"], entry["value"])
            for name, entry in self._entries.items()
            if entry["value"] is not None and entry["metric"] not in BY_STAGE
        }

    def check(self, text: str) -> None:
        """Refuse a text with a figure that no method here has handed out.

        A figure is a percentage, and any number in a line, or under the header of a table, that
        speaks of accuracy, errors, scores or BLEU.

        Raises:
            CardError: Naming the figures.
        """
        text = _plain(text)
        found = set(PERCENTAGE.findall(text))
        header = ""  # of the table that a line is in: its words hold for every row
        for line in text.splitlines():
            header = (header or line) if line.lstrip().startswith("|") else ""
            if MEASURED.search(line) or MEASURED.search(header):
                found.update(NUMBER.findall(PERCENTAGE.sub("", line)))
        if unknown := sorted(found - self._shown):
            raise CardError(
                f"the card would print {', '.join(unknown)}, not found in {RESULTS_FILE}; a figure is rendered from "
                "the results or not at all"
            )

    def show_all(self) -> None:
        """Let every figure of the results stand, for the check of a card that somebody wrote."""
        self.rows(), self.parts(), self.remarks(), self.decoding(), self.unscored()
        if self._entries:
            self.confidence()


def _plain(text: str) -> str:
    """A text as it is read: escapes and wide forms of signs resolved, without what others have named."""
    return QUOTED.sub("", unicodedata.normalize("NFKC", html.unescape(text)))


def task_title(task: str) -> str:
    """A task's or benchmark's title; its name where it has none."""
    from soundwave.eval.benchmarks import BENCHMARKS
    from soundwave.eval.tasks import TASKS

    known = next((where[task] for where in (TASKS, BENCHMARKS, EFFICIENCY) if task in where), None)
    return known.title if known is not None else task


def _metric_title(metric: str) -> str:
    from soundwave.eval.scoring import METRICS  # needs jiwer, an extra; folders without figures are read without it

    return METRICS[metric].title if metric in METRICS else metric


def _format(metric: str, value: float | None) -> str:
    from soundwave.eval.scoring import format_figure

    return format_figure(metric, value)


def _scaled(metric: str, value: float) -> float:
    from soundwave.eval.scoring import get_metric

    return round(100 * value if get_metric(metric).unit == "%" else value, 2)


def _spelt(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {_listed(value)}" for key, value in settings.items())


def _count(figure: Mapping[str, Any]) -> str:
    return f"{figure['count']} ({figure['unread']} unread)" if figure.get("unread") else str(figure["count"])


def _missing(figure: Mapping[str, Any]) -> str:
    missing = figure.get("missing")  # of areas only
    return f" (without {', '.join(missing)})" if missing else ""


def _listed(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key} {_listed(inner)}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
