"""The only way a figure gets into a card: looked up in ``results.json``, checked against the answers."""

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from soundwave.eval.results import ANSWERS_FILE, RESULTS_FILE, read_answers, read_results, rescore
from soundwave.eval.tasks import METRIC_TITLES, TASKS

#: A percentage in prose or a table: what `Figures.check` looks for.
PERCENTAGE = re.compile(r"\d+(?:[.,]\d+)?\s*(?:%|percent\b|per cent\b)", re.IGNORECASE)
#: The Hub's names for what the tasks are.
HUB_TASKS = {
    "asr": "automatic-speech-recognition",
    "ctc": "automatic-speech-recognition",
    "sound": "automatic-speech-recognition",
    "st": "translation",
    "intent": "audio-classification",
    "sound_class": "audio-classification",
    "spoken_qa": "audio-text-to-text",
    "text_qa": "question-answering",
}


class CardError(ValueError):
    """A card that would say something that was not measured, or break a licence."""


class Figures:
    """Figures of a run's ``results.json``, checked against its answers.

    Args:
        run_dir: Folder with ``results.json`` and ``answers.jsonl``; without results there are no figures.

    Raises:
        CardError: If a figure differs from what the answers give, or its answers are missing.
    """

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self.run_dir = Path(run_dir)
        self._entries = {entry["name"]: entry for entry in read_results(run_dir)}
        self._shown: set[str] = set()
        answers = read_answers(run_dir)
        wrong = [line for entry in self._entries.values() for line in rescore(entry, answers)]
        if wrong:
            raise CardError(
                f"{RESULTS_FILE} and {ANSWERS_FILE} of {self.run_dir.name} disagree, so no card is written; evaluate "
                "again. " + "; ".join(wrong)
            )

    @property
    def names(self) -> list[str]:
        """The test sets that were evaluated."""
        return list(self._entries)

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

    def _show(self, text: str) -> str:
        self._shown.update(PERCENTAGE.findall(text))
        return text

    def value(self, name: str, metric: str | None = None) -> str:
        """A test set's headline figure, or another metric of it, as ``"4.7%"``."""
        return self._show(f"{100 * self._figure(name, metric)['value']:.1f}%")

    def interval(self, name: str, metric: str | None = None) -> str:
        """Its interval, as ``"3.9% to 5.6%"``."""
        low, high = self._figure(name, metric)["interval"]
        return self._show(f"{100 * low:.1f}% to {100 * high:.1f}%")

    def confidence(self) -> str:
        """The share of resampled figures inside the intervals, as ``"95%"``."""
        shares = sorted({f"{100 * entry['settings']['confidence']:g}%" for entry in self._entries.values()})
        return self._show(", ".join(shares))

    def rows(self) -> list[dict[str, str]]:
        """Every figure as a row of the results table, headline metrics first within their test set."""
        rows = []
        for name, entry in self._entries.items():
            task = TASKS[entry["task"]].title if entry["task"] in TASKS else entry["task"]
            for metric in (entry["metric"], *entry["also"]):
                rows.append(
                    {
                        "test_set": name,
                        "task": task,
                        "metric": METRIC_TITLES.get(metric, metric),
                        "value": self.value(name, metric),
                        "interval": self.interval(name, metric),
                        "count": str(entry["count"]),
                        "failures": str(entry["failures"]),
                    }
                )
        return rows

    def decoding(self) -> list[str]:
        """One line per way of decoding, with the test sets it was used for."""
        ways: dict[str, list[str]] = {}
        for name, entry in self._entries.items():
            decoding = dict(entry["decoding"])
            settings = [decoding.pop("strategy"), *(f"{key.replace('_', ' ')} {decoding[key]}" for key in decoding)]
            ways.setdefault(", ".join([*settings, f"normaliser {entry['settings']['normalizer']}"]), []).append(name)
        return [f"{way}: {', '.join(names)}" for way, names in ways.items()]

    def eval_results(self) -> list[EvalResult]:
        """The headline figures as the Hub's ``model-index``, in percent."""
        return [
            EvalResult(
                task_type=HUB_TASKS.get(entry["task"], "audio-text-to-text"),
                task_name=TASKS[entry["task"]].title if entry["task"] in TASKS else entry["task"],
                dataset_type=entry["dataset"]["name"],
                dataset_name=name,
                dataset_revision=entry["dataset"]["revision"],
                metric_type="wer" if entry["metric"] == "wer" else "cer" if entry["metric"] == "cer" else "accuracy",
                metric_name=METRIC_TITLES.get(entry["metric"], entry["metric"]),
                metric_value=round(100 * entry["value"], 2),
            )
            for name, entry in self._entries.items()
        ]

    def check(self, text: str) -> None:
        """Refuse a text that holds a percentage which no method here has handed out.

        Raises:
            CardError: Naming the percentages.
        """
        unknown = sorted(set(PERCENTAGE.findall(text)) - self._shown)
        if unknown:
            raise CardError(
                f"the card would print {', '.join(unknown)}, not found in {RESULTS_FILE}; a figure is rendered from "
                "the results or not at all"
            )
