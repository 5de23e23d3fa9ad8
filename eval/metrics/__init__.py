"""Metrics as folders for ``evaluate.load(path)``.

    metric = evaluate.load(metric_path("wer"))
    metric.add_batch(predictions=["the red box"], references=["the red boxes"])
    metric.compute(normalizer="english")

They work without a network, and in ``evaluate.combine`` too, where ``add_batch`` gives each of them the columns it
knows. The scoring is that of ``soundwave evaluate`` (``eval.scoring``); ``evaluate`` is only the shell.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from soundwave.eval.scoring import score_rows


def metric_path(name: str) -> str:
    """Absolute folder of a metric module, for ``evaluate.load``.

    Raises:
        ValueError: If there is no such metric; a relative or unknown name would be looked up on the Hub.
    """
    root = Path(__file__).parent
    if not (root / name / f"{name}.py").is_file():
        known = sorted(p.parent.name for p in root.glob("*/*.py") if p.stem == p.parent.name)
        raise ValueError(f"no metric {name!r}; choose one of {', '.join(known)}")
    return str(root / name)


def score_columns(
    metrics: Sequence[str], columns: Mapping[str, Sequence[Any]], settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a module returns: the figures of parallel columns by metric, and the first one's interval, count and notes.

    Args:
        metrics: Names of ``scoring.METRICS``, the headline first.
        columns: Name in an answer row -> one value per item.
        settings: Of the metrics; ``None`` is as if not given.

    Raises:
        ValueError: As ``scoring.score_rows``.
    """
    lines = zip(*columns.values(), strict=True)
    rows = [{"id": str(number), **dict(zip(columns, line, strict=True))} for number, line in enumerate(lines)]
    given = {name: value for name, value in (settings or {}).items() if value is not None}
    figures = {name: score_rows(rows, name, given) for name in metrics}
    headline = figures[metrics[0]].to_dict()
    values = {name: figure.value for name, figure in figures.items()}
    about = {key: headline[key] for key in ("interval", "count", "signature") if key in headline}
    return values | about | headline.get("notes", {})


__all__ = ["metric_path", "score_columns"]
