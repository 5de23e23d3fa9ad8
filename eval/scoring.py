"""Scores of lists of strings: word and character error rate, accuracy, labels, bootstrap intervals.

Every metric is a pair of numbers per item, (what is counted, out of how many), and a corpus figure is the quotient of
the two sums. One representation gives the value, the interval (items drawn again with replacement) and the pooling of
several test sets.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import jiwer
import numpy as np

#: Between the parts of a chain-of-thought answer: ``question : answer``.
COT_SEPARATOR = " : "
#: A sound label inside a transcript, such as ``<cough>``.
SOUND_LABEL = re.compile(r"<[^<>\s]+>")
#: Resamplings behind every interval.
RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Score:
    """A corpus-level figure.

    Attributes:
        value: The sum of the items' counts over the sum of their totals, in [0, 1] for accuracies; error rates can
            exceed 1.
        interval: Bootstrap interval of ``CONFIDENCE``, low and high end.
        count: Number of items.
    """

    value: float
    interval: tuple[float, float]
    count: int


@cache
def _whisper_normalizer(name: str) -> Callable[[str], str]:
    # Imported late: these classes pull in the model code of Whisper.
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    if name == "basic":
        return BasicTextNormalizer()
    # The British-to-American spelling list lives in Whisper's Hub repositories only; without it spellings stay.
    return EnglishTextNormalizer({})


def normalize(text: str, normalizer: str = "none") -> str:
    """Text as it is compared.

    Args:
        text: An answer or a reference.
        normalizer: ``"none"`` (white space only, the strictest), ``"basic"`` or ``"english"`` (Whisper's two; both
            delete everything in angle or square brackets, so sound labels must be scored with ``"none"``).

    Raises:
        ValueError: If the normaliser is unknown.
    """
    if normalizer == "none":
        return " ".join(text.split())
    if normalizer in ("basic", "english"):
        return " ".join(_whisper_normalizer(normalizer)(text).split())
    raise ValueError(f"normalizer={normalizer!r} is unknown; choose 'none', 'basic' or 'english'")


def final_label(text: str) -> str:
    """The label an answer ends with: what follows the last ``" : "`` if there is one, in lower case, unpunctuated."""
    return " ".join(text.rsplit(COT_SEPARATOR, 1)[-1].split()).strip(" .,!?;:\"'").casefold()


def sound_labels(text: str) -> tuple[str, ...]:
    """The sound labels of a transcript in order: ``"<cough> hello" -> ("<cough>",)``."""
    return tuple(SOUND_LABEL.findall(text))


def _word_edits(reference: str, hypothesis: str, normalizer: str) -> tuple[int, int]:
    reference, hypothesis = normalize(reference, normalizer), normalize(hypothesis, normalizer)
    if not reference:  # jiwer refuses it; words put into silence are insertions all the same
        return len(hypothesis.split()), 0
    counts = jiwer.process_words(reference, hypothesis)
    return counts.substitutions + counts.deletions + counts.insertions, len(reference.split())


def _character_edits(reference: str, hypothesis: str, normalizer: str) -> tuple[int, int]:
    reference, hypothesis = normalize(reference, normalizer), normalize(hypothesis, normalizer)
    if not reference:
        return len(hypothesis), 0
    counts = jiwer.process_characters(reference, hypothesis)
    return counts.substitutions + counts.deletions + counts.insertions, len(reference)


def _same_sentence(reference: str, hypothesis: str, normalizer: str) -> tuple[int, int]:
    return int(normalize(reference, normalizer) == normalize(hypothesis, normalizer)), 1


def _same_label(reference: str, hypothesis: str, normalizer: str) -> tuple[int, int]:
    def label(text: str) -> str:
        return normalize(text, normalizer).strip(" .,!?;:\"'").casefold()

    return int(label(reference) == label(hypothesis)), 1


def _same_final_label(reference: str, hypothesis: str, normalizer: str) -> tuple[int, int]:
    del normalizer  # labels have one rule, that of `final_label`
    return int(final_label(reference) == final_label(hypothesis)), 1


def _same_sounds(reference: str, hypothesis: str, normalizer: str) -> tuple[int, int]:
    del normalizer
    return int(sound_labels(reference) == sound_labels(hypothesis)), 1


#: Metric name -> what one item contributes: (counted, out of).
METRICS: dict[str, Callable[[str, str, str], tuple[int, int]]] = {
    "wer": _word_edits,
    "cer": _character_edits,
    "sentence_accuracy": _same_sentence,
    "accuracy": _same_label,
    "label_accuracy": _same_final_label,
    "sound_accuracy": _same_sounds,
}


def item_counts(
    metric: str, references: Sequence[str], hypotheses: Sequence[str], normalizer: str = "none"
) -> tuple[np.ndarray, np.ndarray]:
    """What each item contributes to a metric: (counted (n,), out of (n,)).

    Raises:
        ValueError: If the metric is unknown or the lists differ in length.
    """
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r} is unknown; choose one of {', '.join(METRICS)}")
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references but {len(hypotheses)} hypotheses; every item needs both")
    pairs = [METRICS[metric](r, h, normalizer) for r, h in zip(references, hypotheses, strict=True)]
    counts = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return counts[:, 0], counts[:, 1]


def bootstrap_interval(
    counted: np.ndarray,
    totals: np.ndarray,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap of ``sum(counted) / sum(totals)`` over items drawn with replacement.

    Args:
        counted: (n,) errors or hits per item.
        totals: (n,) words, characters or 1 per item.
        resamples: How often the items are drawn again.
        confidence: Share of the resampled figures inside the interval.
        seed: Of the drawing; the same answers always give the same interval.
    """
    rng = np.random.default_rng(seed)
    values = np.empty(resamples)
    for i in range(resamples):  # one row at a time: (resamples, n) indices of a large set would fill the memory
        drawn = rng.integers(0, len(counted), len(counted))
        total = totals[drawn].sum()
        values[i] = counted[drawn].sum() / total if total else np.nan
    margin = (1 - confidence) / 2
    low, high = np.nanquantile(values, [margin, 1 - margin])
    return float(low), float(high)


def score(
    metric: str,
    references: Sequence[str],
    hypotheses: Sequence[str],
    normalizer: str = "none",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Score:
    """Corpus figure of a metric, with its interval.

    Raises:
        ValueError: If there is nothing to divide by (no items, or only empty references).
    """
    counted, totals = item_counts(metric, references, hypotheses, normalizer)
    return Score(
        _quotient(metric, counted, totals), bootstrap_interval(counted, totals, resamples, seed=seed), len(counted)
    )


def _quotient(metric: str, counted: np.ndarray, totals: np.ndarray) -> float:
    if totals.sum() == 0:
        raise ValueError(
            f"{metric} of {len(totals)} items whose references hold nothing to count; give at least one reference"
        )
    return float(counted.sum() / totals.sum())


def _value(metric: str, references: Sequence[str], hypotheses: Sequence[str], normalizer: str) -> float:
    return _quotient(metric, *item_counts(metric, references, hypotheses, normalizer))


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str], normalizer: str = "none") -> float:
    """Corpus-level WER: all substitutions, deletions and insertions over all reference words (jiwer's alignment)."""
    return _value("wer", references, hypotheses, normalizer)


def character_error_rate(references: Sequence[str], hypotheses: Sequence[str], normalizer: str = "none") -> float:
    """Corpus-level CER, spaces included."""
    return _value("cer", references, hypotheses, normalizer)


def accuracy(references: Sequence[str], hypotheses: Sequence[str], normalizer: str = "none") -> float:
    """Share of answers equal to the reference but for case and punctuation at the ends."""
    return _value("accuracy", references, hypotheses, normalizer)


def sentence_accuracy(references: Sequence[str], hypotheses: Sequence[str], normalizer: str = "none") -> float:
    """Share of sentences with no error at all."""
    return _value("sentence_accuracy", references, hypotheses, normalizer)


def label_accuracy(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Share of answers whose final label (after the last ``" : "``) is right, whatever reasoning stands before it."""
    return _value("label_accuracy", references, hypotheses, "none")


def sound_accuracy(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Share of transcripts with exactly the reference's sound labels, in its order, whatever the words."""
    return _value("sound_accuracy", references, hypotheses, "none")
