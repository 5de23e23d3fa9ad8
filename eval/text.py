"""Texts as they are compared: Whisper's normalisers, and the labels that an answer holds."""

import re
import string
from collections.abc import Callable, Iterable, Mapping
from functools import cache

#: Between the parts of a chain-of-thought answer: ``question : answer``.
COT_SEPARATOR = " : "
#: A sound label inside a transcript, such as ``<cough>``.
SOUND_LABEL = re.compile(r"<[^<>\s]+>")
#: What may stand around a label without being part of it.
PUNCTUATION = " .,!?;:\"'"
NORMALIZERS = ("none", "basic", "english")


@cache
def _whisper_normalizer(name: str, spellings: str | None) -> Callable[[str], str]:
    # Imported late: these classes pull in the model code of Whisper.
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    if name == "basic":
        return BasicTextNormalizer()
    return EnglishTextNormalizer(_spelling_map(spellings) if spellings else {})


def _spelling_map(model: str) -> dict[str, str]:
    # The British-to-American list is not part of transformers: it lies in Whisper's own repositories.
    import json
    from pathlib import Path

    from transformers.utils import cached_file

    try:
        path = cached_file(model, "normalizer.json")
    except OSError as error:
        raise ValueError(
            f"spellings={model!r} holds no normalizer.json; give the folder or Hub id of a Whisper model, or leave "
            "spellings as they are (None)"
        ) from error
    return json.loads(Path(path).read_text(encoding="utf-8"))


def normalize(text: str, normalizer: str = "none", spellings: str | None = None) -> str:
    """Text as it is compared.

    Args:
        text: An answer or a reference.
        normalizer: ``"none"`` (white space only, the strictest), ``"basic"`` or ``"english"`` (Whisper's two; both
            delete everything in angle or square brackets, so sound labels must be scored with ``"none"``).
        spellings: Folder or Hub id of a Whisper model, whose list of British and American spellings ``"english"``
            then unifies; ``None`` leaves spellings as they are.

    Raises:
        ValueError: If the normaliser is unknown, or the spellings are not to be had.
    """
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer={normalizer!r} is unknown; choose 'none', 'basic' or 'english'")
    if normalizer != "none":
        text = _whisper_normalizer(normalizer, spellings if normalizer == "english" else None)(text)
    return " ".join(text.split())


def bare_label(text: str) -> str:
    """A label without case, surplus white space and punctuation at the ends."""
    return " ".join(text.split()).strip(PUNCTUATION).casefold()


def final_label(text: str) -> str:
    """The label an answer ends with: what follows the last ``" : "`` if there is one, as ``bare_label``."""
    return bare_label(text.rsplit(COT_SEPARATOR, 1)[-1])


def sound_labels(text: str) -> tuple[str, ...]:
    """The sound labels of a transcript in order: ``"<cough> hello" -> ("<cough>",)``."""
    return tuple(SOUND_LABEL.findall(text))


def labels_in(text: str, labels: Iterable[str], synonyms: Mapping[str, str] | None = None) -> set[str]:
    """The known labels that occur in a text as whole words, whatever their case.

    A label within a longer one that occurs there is not counted: ``"throat clearing"`` is not ``"clearing"``.

    Args:
        text: An answer.
        labels: Words or phrases.
        synonyms: Further word or phrase -> the label that it stands for.
    """
    known = {" ".join(label.casefold().split()): label for label in labels}
    known |= {" ".join(word.casefold().split()): label for word, label in (synonyms or {}).items()}
    phrases = "|".join(re.escape(word) for word in sorted(known, key=len, reverse=True) if word)
    if not phrases:
        raise ValueError("no labels to look for; name them in settings['labels']")
    found = re.findall(rf"(?<!\w)(?:{phrases})(?!\w)", " ".join(text.casefold().split()))
    return {known[word] for word in found}


def contains_answer(text: str, answer: str) -> bool:
    """Whether a short answer is contained in a text, the rule usual for LLaMA Questions.

    Both are lower-cased, stripped of punctuation and of the words a, an, the and and, and brought into the form of
    Whisper's English normaliser. Every part of the answer between commas must then occur as whole words; ``|||``
    separates alternatives (SLAM-LLM, ``examples/s2s/evaluation/close_qa.py``).

    Raises:
        ValueError: As ``answer_parts``.
    """
    padded = f" {_plain_words(text)} "
    return any(all(f" {part} " in padded for part in parts) for parts in answer_parts(answer))


def answer_parts(answer: str) -> list[list[str]]:
    """What ``contains_answer`` looks for: alternatives, of each the parts.

    Raises:
        ValueError: If nothing is left of the answer to look for.
    """
    alternatives = [
        parts
        for alternative in answer.split("|||")
        if (parts := [part for part in map(_plain_words, alternative.split(",")) if part])
    ]
    if not alternatives:
        raise ValueError(f"nothing is left of the answer {answer!r} to look for; it needs a word beside articles")
    return alternatives


def _plain_words(text: str) -> str:
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return normalize(re.sub(r"\b(a|an|the|and)\b", " ", text), "english")
