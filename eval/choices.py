"""Which option an answer chose, by the rules of the benchmarks that published one."""

import re
from collections.abc import Sequence

#: Letters that AIR-Bench's rule reads.
OFFICIAL_LETTERS = "ABCD"
#: An answer that is a letter, ``B``, ``(B)``, ``B.``, ``b)``, with or without a text behind it, as in ``(B) rain``.
LETTERED = re.compile(r"\(?([A-Za-z])(?:[).:]+\s*(.*))?", re.DOTALL)


def letter_of(position: int) -> str:
    """``0 -> "A"``."""
    return chr(ord("A") + position)


def official_letter(answer: str) -> str | None:
    """The letter that AIR-Bench's own scorer reads in an answer (``score_foundation.py``); ``None``: a parse failure.

    The first character if it is A, B, C or D in upper case (``"A man speaks"`` is an A), else the last but one, as of
    a sentence that ends in ``"B."``.
    """
    answer = answer.strip().replace("\n", "")
    if not answer or answer == "None":
        return None
    if answer[0] in OFFICIAL_LETTERS:
        return answer[0]
    return answer[-2] if len(answer) > 1 and answer[-2] in OFFICIAL_LETTERS else None


def spelled_out(answer: str, choices: Sequence[str]) -> str:
    """The option that an answer names by its letter, alone or before the option's text; any other answer as it is.

    Left in front of the text, the letter A would be the article that other options hold.
    """
    lettered = LETTERED.fullmatch(answer.strip())
    position = ord(lettered[1].upper()) - ord("A") if lettered else len(choices)
    if lettered is None or position >= len(choices):
        return answer
    return choices[position] if not lettered[2] or words_of(lettered[2]) == words_of(choices[position]) else answer


def words_of(text: str) -> set[str]:
    """The distinct words of a text in lower case, as MMAU's scorer cuts them."""
    return set(re.findall(r"\b\w+\b", text.lower()))


def matches_choice(answer: str, right: str, choices: Sequence[str]) -> bool:
    """Whether an answer holds all words of the right option and none that only others have.

    The string match of MMAU (``evaluation.py``). A bare letter never matches: see ``spelled_out``.
    """
    said, wanted = words_of(answer), words_of(right)
    others = {word for choice in choices if words_of(choice) != wanted for word in words_of(choice) - wanted}
    return bool(said) and wanted <= said and not said & others
