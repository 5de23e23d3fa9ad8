"""What one answer row contributes to a metric: a few numbers that add up over the rows.

Of most metrics two, (counted, out of), whose sums make the corpus figure as a quotient. Where an item can be answered
in a way that cannot be read, the last number is 1 if it was read and 0 if not: ``scoring`` counts those left out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from soundwave.eval.choices import letter_of, matches_choice, official_letter, spelled_out
from soundwave.eval.grounding import interval_iou, nearest_choice, spans_in
from soundwave.eval.text import bare_label, contains_answer, final_label, labels_in, normalize, sound_labels

#: A row of ``answers.jsonl``, with its ``judgements`` where a judge read it.
Row = Mapping[str, Any]
Settings = Mapping[str, Any]
Statistics = Callable[[Row, Settings], Sequence[float]]
#: Settings that a function below reads; ``scoring`` reads the others.
SETTINGS = ("normalizer", "spellings", "tokenize", "labels", "synonyms", "letters", "judgements", "scale")

# -- texts


def word_edits(row: Row, settings: Settings) -> tuple[float, float]:
    """Substitutions, deletions and insertions of words (jiwer's alignment), out of the reference's words."""
    import jiwer

    reference, answer = _normalized(row, settings)
    if not reference:  # jiwer refuses it; words put into silence are insertions all the same
        return len(answer.split()), 0
    found = jiwer.process_words(reference, answer)
    return found.substitutions + found.deletions + found.insertions, len(reference.split())


def character_edits(row: Row, settings: Settings) -> tuple[float, float]:
    """The same of characters, spaces included."""
    import jiwer

    reference, answer = _normalized(row, settings)
    if not reference:
        return len(answer), 0
    found = jiwer.process_characters(reference, answer)
    return found.substitutions + found.deletions + found.insertions, len(reference)


def same_sentence(row: Row, settings: Settings) -> tuple[float, float]:
    """1 for a text without any error."""
    reference, answer = _normalized(row, settings)
    return reference == answer, 1


def same_answer(row: Row, settings: Settings) -> tuple[float, float]:
    """1 for an answer equal to the reference but for case and punctuation at the ends."""
    reference, answer = _normalized(row, settings)
    return bare_label(reference) == bare_label(answer), 1


def same_final_label(row: Row, settings: Settings) -> tuple[float, float]:
    """1 if what follows the last ``" : "`` is right, whatever reasoning stands before it."""
    return final_label(text_of(row, "reference")) == final_label(text_of(row, "answer")), 1


def same_sounds(row: Row, settings: Settings) -> tuple[float, float]:
    """1 for exactly the reference's sound labels in its order, whatever the words."""
    return sound_labels(text_of(row, "reference")) == sound_labels(text_of(row, "answer")), 1


def contained(row: Row, settings: Settings) -> tuple[float, float]:
    """1 if the reference is contained in the answer (``text.contains_answer``)."""
    try:
        return contains_answer(text_of(row, "answer"), text_of(row, "reference")), 1
    except ValueError as error:
        raise ValueError(f"item {row.get('id')!r}: {error}") from error


def _normalized(row: Row, settings: Settings) -> tuple[str, str]:
    how = settings.get("normalizer", "none"), settings.get("spellings")
    return normalize(text_of(row, "reference"), *how), normalize(text_of(row, "answer"), *how)


# -- translations


@cache
def _bleu(tokenize: str, effective_order: bool) -> Any:
    from sacrebleu.metrics import BLEU

    if tokenize not in BLEU.TOKENIZERS:
        raise ValueError(f"tokenize={tokenize!r} is unknown to sacrebleu; choose one of {', '.join(BLEU.TOKENIZERS)}")
    return BLEU(tokenize=tokenize, effective_order=effective_order)


def ngram_counts(row: Row, settings: Settings) -> tuple[float, ...]:
    """sacreBLEU's: 4 numbers of matching n-grams, 4 of the answer's, its length and the nearest reference's.

    The reference may be a list of texts. Case and punctuation are kept, no normaliser is applied.
    """
    references = row.get("reference")
    texts = references if isinstance(references, (list, tuple)) and references else [text_of(row, "reference")]
    # The effective order has no part in the counts; sacrebleu asks for it wherever it sees a single sentence.
    found = _bleu(settings.get("tokenize", "13a"), True).sentence_score(text_of(row, "answer"), texts)
    return *found.counts, *found.totals, found.sys_len, found.ref_len


def corpus_bleu(sums: np.ndarray) -> float:
    """BLEU in points, 0 to 100, from the sums (10,) of ``ngram_counts``; sacrebleu's default smoothing."""
    from sacrebleu.metrics import BLEU

    numbers = [int(number) for number in sums]
    return BLEU.compute_bleu(numbers[:4], numbers[4:8], numbers[8], numbers[9], smooth_method="exp").score


def bleu_signature(rows: Sequence[Row], settings: Settings) -> str:
    """sacrebleu's own signature, as it belongs beside every score."""
    numbers = {len(row["reference"]) if isinstance(row["reference"], (list, tuple)) else 1 for row in rows}
    metric = _bleu(settings.get("tokenize", "13a"), False)
    metric.num_refs = numbers.pop() if len(numbers) == 1 else -1  # sacrebleu's sign for a varying number
    return str(metric.get_signature())


# -- labels and options


def exact_label(row: Row, settings: Settings) -> tuple[float, float]:
    """1 for the very label, case included; only white space before it is ignored (Qwen2-Audio's scripts)."""
    return text_of(row, "answer").lstrip() == text_of(row, "reference"), 1


def named_label(row: Row, settings: Settings) -> tuple[float, float, float]:
    """1 if exactly one known label stands in the answer, and it is the right one; read if there is exactly one."""
    labels = settings.get("labels") or choices_of(row)
    right = labels_in(text_of(row, "reference"), labels, settings.get("synonyms"))
    if len(right) != 1:
        raise ValueError(f"item {row.get('id')!r}: reference {row['reference']!r} is none of {', '.join(labels)}")
    found = labels_in(text_of(row, "answer"), labels, settings.get("synonyms"))
    return found == right, 1, len(found) == 1


def official_choice(row: Row, settings: Settings) -> tuple[float, float]:
    """1 for the right letter by AIR-Bench's rule; an answer that the rule cannot read leaves the denominator."""
    letter = official_letter(text_of(row, "answer"))
    return letter == right_letter(row), letter is not None


def strict_choice(row: Row, settings: Settings) -> tuple[float, float, float]:
    """The same, with an unread answer counted as wrong."""
    right, read = official_choice(row, settings)
    return right, 1, read


def unread_choice(row: Row, settings: Settings) -> tuple[float, float]:
    """1 for an answer that the rule cannot read."""
    return official_letter(text_of(row, "answer")) is None, 1


def matched_choice(row: Row, settings: Settings) -> tuple[float, float]:
    """1 by MMAU's string match; with the setting ``letters``, a bare letter stands for its option's text."""
    choices, answer = choices_of(row), text_of(row, "answer")
    if settings.get("letters"):
        answer = spelled_out(answer, choices)
    right_letter(row)  # the reference must be among the options, or its words would exclude each other
    return matches_choice(answer, text_of(row, "reference"), choices), 1


# -- times


def time_overlap(row: Row, settings: Settings) -> tuple[float, float, float]:
    """Intersection over union of the answer's time spans with the reference's; 0 for an answer without any."""
    wanted = spans_in(text_of(row, "reference"))
    if not wanted:
        raise ValueError(
            f"item {row.get('id')!r}: reference {row['reference']!r} states no time span, such as '[1.2, 1.5]'"
        )
    said = spans_in(text_of(row, "answer"))
    return (interval_iou(said, wanted) if said else 0.0), 1, bool(said)


def time_choice(row: Row, settings: Settings) -> tuple[float, float, float]:
    """1 for the right one of several spans, named by its letter (AIR-Bench's rule) or by times nearest to it."""
    answer = text_of(row, "answer")
    nearest = nearest_choice(answer, choices_of(row))
    letter = letter_of(nearest) if nearest is not None else official_letter(answer)
    return letter == right_letter(row), 1, letter is not None


# -- judges


def judged(row: Row, settings: Settings) -> tuple[float, float]:
    """The mean of an item's marks (both orders, if there are two); an item with a failed judgement is left out.

    One order alone would let the judge's liking for a position into the figure. The setting ``judgements`` is how many
    an item needs (1), ``scale`` the lowest and the highest mark.
    """
    mark = mean_mark(row, settings, "score")
    return (0, 0) if mark is None else (mark, 1)


def preferred(row: Row, settings: Settings) -> tuple[float, float]:
    """1 if the mean mark is above that of the reference (``reference_score``), which some judges give beside it."""
    mark, reference = (mean_mark(row, settings, key) for key in ("score", "reference_score"))
    return (0, 0) if mark is None or reference is None else (mark > reference, 1)


def mean_mark(row: Row, settings: Settings, key: str) -> float | None:
    """Mean of a mark over a row's judgements; ``None`` if one of them failed, or there are too few.

    Raises:
        ValueError: If a mark is no number on the scale.
    """
    judgements = row.get("judgements") or []
    if len(judgements) < settings.get("judgements", 1) or any(each.get("error") is not None for each in judgements):
        return None
    low, high = settings.get("scale") or (-math.inf, math.inf)
    marks = [each.get(key) for each in judgements]
    for mark in marks:
        if isinstance(mark, bool) or not isinstance(mark, (int, float)) or not low <= mark <= high:
            raise ValueError(f"item {row.get('id')!r}: a judge's {key} is {mark!r}, expected {low:g} to {high:g}")
    return sum(marks) / len(marks)


# -- what a row holds


def text_of(row: Row, key: str) -> str:
    """A text of a row.

    Raises:
        ValueError: If it is none: an answer of another type must not become a wrong answer unseen.
    """
    value = row.get(key)
    if not isinstance(value, str):
        raise ValueError(f"item {row.get('id')!r}: {key!r} is {value!r} ({type(value).__name__}), expected text")
    return value


def choices_of(row: Row) -> list[str]:
    """The options of a row, ``fields["choices"]``: their texts in the order of the letters; empty for an absent one.

    Raises:
        ValueError: If it has none.
    """
    choices = (row.get("fields") or {}).get("choices")
    if not isinstance(choices, (list, tuple)) or not all(text is None or isinstance(text, str) for text in choices):
        raise ValueError(f"item {row.get('id')!r}: fields['choices'] is {choices!r}, expected a list of texts")
    return [text or "" for text in choices]


def right_letter(row: Row) -> str:
    """The letter of the first option equal to the reference.

    Raises:
        ValueError: If none is.
    """
    choices, reference = choices_of(row), text_of(row, "reference")
    if reference not in choices:
        raise ValueError(f"item {row.get('id')!r}: reference {reference!r} is none of the choices {choices}")
    return letter_of(choices.index(reference))
