"""Metrics as folders for ``evaluate.load(path)``, and the same functions to import.

``metric_path("wer")`` is what ``evaluate.load`` takes; it works without a network.
"""

from pathlib import Path

from soundwave.eval.scoring import (
    accuracy,
    character_error_rate,
    label_accuracy,
    sentence_accuracy,
    sound_accuracy,
    word_error_rate,
)

__all__ = [
    "accuracy",
    "character_error_rate",
    "label_accuracy",
    "metric_path",
    "sentence_accuracy",
    "sound_accuracy",
    "word_error_rate",
]


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
