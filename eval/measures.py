"""What a measured row contributes to an efficiency figure; ``scoring.METRICS`` takes these up beside the benchmarks'.

A measured row holds its numbers in ``fields`` (``efficiency``), so that every figure follows from ``answers.jsonl``.
"""

import math
from typing import Any

import numpy as np

from soundwave.eval.counting import Row, Settings, Statistics


def measured(row: Row, name: str) -> float:
    """A number of a measured row.

    Raises:
        ValueError: If it is none.
    """
    value = (row.get("fields") or {}).get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"item {row.get('id')!r}: fields[{name!r}] is {value!r}, expected a measured number")
    return float(value)


def ratio_of(name: str, out_of: str) -> Statistics:
    """Pooled: the sum of one over the sum of the other."""
    return lambda row, settings: (measured(row, name), measured(row, out_of))


def mean_ratio_of(name: str, out_of: str) -> Statistics:
    """The mean of the rows' own ratios."""
    return lambda row, settings: (measured(row, name) / measured(row, out_of), 1)


def mean_of(name: str) -> Statistics:
    """The mean of a number."""
    return lambda row, settings: (measured(row, name), 1)


def moments_of(name: str) -> Statistics:
    """What a standard deviation is made of: square, number, 1."""

    def moments(row: Row, settings: Settings) -> tuple[float, float, float]:
        value = measured(row, name)
        return value**2, value, 1

    return moments


def rate_of(name: str | None = None) -> Statistics:
    """Per second: rows, or a number of theirs, over ``seconds``."""
    return lambda row, settings: (1 if name is None else measured(row, name), measured(row, "seconds"))


def deviation(sums: np.ndarray) -> float:
    """Standard deviation over the rows (n in the denominator) from the sums (3,) of ``moments_of``."""
    squares, total, count = sums
    return math.sqrt(max(squares / count - (total / count) ** 2, 0.0)) if count else math.nan


def _milliseconds(title: str, name: str, median: bool = False) -> dict[str, Any]:
    fields = {"title": title, "statistics": mean_of(name), "lower_is_better": True, "unit": "ms"}
    return fields | ({"reduce": lambda numbers: np.median(numbers, axis=0)} if median else {})


#: Name -> fields of a ``scoring.Metric``.
MEASURES: dict[str, dict[str, Any]] = {
    "ttft": _milliseconds("time to first token, median", "ttft_ms", median=True),
    "ttft_mean": _milliseconds("time to first token, mean", "ttft_ms"),
    "features_time": _milliseconds("time for features, median", "features_ms", median=True),
    "features_time_mean": _milliseconds("time for features, mean", "features_ms"),
    "ratio_padded": {
        "title": "LLM positions per encoder position, padding counted",
        "statistics": ratio_of("positions", "padded_positions"),
        "lower_is_better": True,
    },
    "ratio_padded_mean": {
        "title": "the same, mean over recordings",
        "statistics": mean_ratio_of("positions", "padded_positions"),
        "lower_is_better": True,
    },
    "ratio_speech": {
        "title": "LLM positions per encoder position of speech",
        "statistics": ratio_of("positions", "speech_positions"),
        "lower_is_better": True,
    },
    "ratio_speech_mean": {
        "title": "the same, mean over recordings",
        "statistics": mean_ratio_of("positions", "speech_positions"),
        "lower_is_better": True,
    },
    "similarity": {"title": "cosine of speech and its text, mean", "statistics": mean_of("cosine"), "unit": ""},
    "similarity_std": {
        "title": "cosine of speech and its text, deviation",
        "statistics": moments_of("cosine"),
        "combine": deviation,
        "size": 3,
        "unit": "",
    },
    "shuffled_similarity": {
        "title": "cosine of speech and another's text, mean",
        "statistics": mean_of("shuffled"),
        "unit": "",
    },
    "shuffled_similarity_std": {
        "title": "cosine of speech and another's text, deviation",
        "statistics": moments_of("shuffled"),
        "combine": deviation,
        "size": 3,
        "unit": "",
    },
    "steps_per_second": {"title": "training steps per second", "statistics": rate_of(), "unit": "1/s"},
    "audio_seconds_per_second": {
        "title": "seconds of audio trained on per second",
        "statistics": rate_of("audio_s"),
        "unit": "s/s",
    },
}
