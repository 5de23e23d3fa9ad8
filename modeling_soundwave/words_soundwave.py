"""From token ids and the frames of their CTC peaks to text with times: spans, tokens, words.

Any tokenizer family: pieces of bytes, pieces of sentences, several words or characters in one piece. A span is
(start frame, end frame, confidence) of one token, in aligned frames of 40 ms; the end is exclusive.
"""

import unicodedata
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from .transcripts_soundwave import TimedToken, Word

FRAME_S = 0.04  # an aligned frame
# A token begins before its peak: after a third of the pause since the last one, but at most so many frames before ...
LEAD_FRAMES = 4
TRAIL_FRAMES = 3  # ... and ends where the next one begins, at most so many frames after it
SENTENCE_ENDS = (".", "?", "!", "…", "。", "？", "！")
INCOMPLETE = "\ufffd"  # what bytes decode to that are no whole character
LONGEST_CHARACTER = 16  # tokens; pieces of bytes may begin in one character and end in the next
# Scripts without spaces, in which every character is a word of its own: first and last code point.
UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x2FDF),  # radicals
    (0x3005, 0x3007),
    (0x3021, 0x30FF),  # kana
    (0x31F0, 0x31FF),
    (0x3400, 0x9FFF),  # Han
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),
    (0x20000, 0x3FFFF),
)

Span = tuple[int, int, float]


def spread(peaks: Sequence[Span], n_frames: int) -> list[Span]:
    """Peaks (first frame, end frame, confidence) -> spans: CTC says in one frame what lasts for several.

    A token is heard late: of the frames between two peaks two thirds belong to the later one, up to `LEAD_FRAMES`, and
    the rest to the earlier one, up to `TRAIL_FRAMES`. The constants are measured on speech with known word starts.
    Empty spans (start = end) stay as they are.
    """
    spans = list(peaks)
    loud = [index for index, (first, stop, _) in enumerate(peaks) if first < stop]
    end = 0  # of the last peak
    for place, index in enumerate(loud):
        first, stop, confidence = peaks[index]
        start = max(first - LEAD_FRAMES, end + -(-(first - end) // 3))
        if place:
            earlier = loud[place - 1]
            spans[earlier] = (spans[earlier][0], min(end + TRAIL_FRAMES, start), spans[earlier][2])
        spans[index] = (start, min(stop + TRAIL_FRAMES, n_frames), confidence)
        end = stop
    return spans


def timed_tokens(tokenizer: Any, ids: Sequence[int], spans: Sequence[Span], offset_s: float = 0.0) -> list[TimedToken]:
    """The text and times of tokens; special ones, and ids that the tokenizer does not know, are left out.

    The texts joined are the tokenizer's own text up to white space. A character whose bytes are spread over several
    tokens is the text of the first of them; the others have none. Bytes that are no character become U+FFFD.

    Args:
        tokenizer: The LLM's.
        ids: Token ids (n,).
        spans: One per id, in aligned frames.
        offset_s: Where frame 0 lies in the recording, in seconds.

    Raises:
        ValueError: when there are not as many spans as ids.
    """
    if len(ids) != len(spans):
        raise ValueError(f"{len(ids)} token ids came with {len(spans)} spans; expected one span per id.")
    # Some tokenizers drop the space before the first word of a text: every piece is read behind another one.
    context = tokenizer.encode("a", add_special_tokens=False)

    def decode(pieces: Sequence[int]) -> str:
        text = tokenizer.decode([*context, *pieces], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text[len(behind) :]

    behind = ""
    behind = decode([])
    alone = {token: decode([token]) for token in set(ids)}
    known = [index for index, token in enumerate(ids) if alone[token]]
    texts: list[str] = []
    for broken, run in groupby((ids[index] for index in known), key=lambda token: INCOMPLETE in alone[token]):
        pieces = list(run)
        texts += _characters(pieces, decode) if broken else [alone[token] for token in pieces]
    tokens = []
    for index, text in zip(known, texts, strict=True):
        first, stop, confidence = spans[index]
        start, end = offset_s + first * FRAME_S, offset_s + stop * FRAME_S
        tokens.append(TimedToken(int(ids[index]), text, start, end, confidence))
    return tokens


def _characters(ids: list[int], decode) -> list[str]:
    """Texts of a run of tokens none of which is whole: each character at its first token, none at the others."""
    texts: list[str] = []
    while len(texts) < len(ids):
        start, whole = len(texts), INCOMPLETE
        size = 0
        while INCOMPLETE in whole and size < min(LONGEST_CHARACTER, len(ids) - start):
            size += 1
            whole = decode(ids[start : start + size])
        if INCOMPLETE in whole:  # no character begins here
            whole, size = INCOMPLETE, 1
        texts += [whole, *[""] * (size - 1)]
    return texts


def group_words(tokens: Sequence[TimedToken]) -> list[Word]:
    """Tokens of one recording to words: what stands between white space, punctuation included.

    In scripts without spaces every character is a word. The characters of a token have equal shares of its time; a
    word lasts from its first to its last character.
    """
    words: list[Word] = []
    open_word = has_letter = unspaced = False
    for text, start, end, confidence in _pieces(tokens):
        visible = sum(not character.isspace() for character in text)
        share = (end - start) / max(visible, 1)
        count = 0
        for character in text:
            if character.isspace():
                open_word = False
                continue
            category = unicodedata.category(character)
            letter, alone = category[0] in "LN", _is_unspaced(character)
            if open_word and has_letter:  # marks and closing punctuation stay with what they follow
                open_word = not ((letter or category in ("Ps", "Pi")) and (alone or unspaced))
            if not open_word:
                words.append(Word("", start + count * share, 0.0, confidence))
                open_word, has_letter, unspaced = True, False, False
            count += 1
            word = words[-1]
            word.text += character
            word.end = end if count == visible else start + count * share
            word.confidence = min(word.confidence, confidence)
            has_letter, unspaced = has_letter or letter, unspaced or alone
    return words


def _pieces(tokens: Sequence[TimedToken]) -> list[tuple[str, float, float, float]]:
    """(text, start, end, confidence) of tokens, the bytes of one character together."""
    pieces: list[tuple[str, float, float, float]] = []
    for token in tokens:
        if token.text or not pieces:
            pieces.append((token.text, token.start, token.end, token.confidence))
        else:
            text, start, end, confidence = pieces[-1]
            pieces[-1] = (text, start, max(end, token.end), min(confidence, token.confidence))
    return pieces


def _is_unspaced(character: str) -> bool:
    code = ord(character)
    return code >= UNSPACED[0][0] and any(first <= code <= last for first, last in UNSPACED)
