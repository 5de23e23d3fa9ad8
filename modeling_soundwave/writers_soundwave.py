"""Transcripts as files: subtitles (SubRip, WebVTT), the JSON of OpenAI's transcription service, Praat's TextGrid.

Times of one file never overlap or run backwards, after rounding too: what has no length gets the smallest one, and
what begins before its predecessor ends begins with that end.
"""

import math
import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .transcripts_soundwave import Segment, TimedToken, Transcript, Word
from .words_soundwave import SENTENCE_ENDS, group_words

LINE_WIDTH = 42  # columns of a subtitle line; a wide character takes two
CUE_S = 7.0  # longest time that a subtitle stands ...
SHORTEST_CUE_S = 1.0  # ... and the shortest, where there is room
PAUSE_S = 0.3  # a silence at which a subtitle may well end ...
LONG_PAUSE_S = 2.0  # ... and one that it never spans
CLAUSE_ENDS = (",", ";", ":", "、", "，", "；", "：")
CUE_COST, CLAUSE_COST, WORD_COST = 0.5, 0.3, 1.0  # of one more subtitle; of one that ends behind a clause, or anywhere
SMALLEST_PROB = 1e-10  # JSON has no minus infinity
MS, US = 1000, 1_000_000  # ticks per second

Ticks = tuple[int, int, str]  # start, end, text


class Piece(NamedTuple):
    """A word of a subtitle."""

    text: str
    start: float
    end: float
    spaced: bool  # whether a space stands before it


def to_srt(transcript: Transcript) -> str:
    """Subtitles in SubRip's format (``.srt``). It knows no escapes: an arrow ``-->`` in a text becomes ``->``."""
    cues = enumerate(subtitle_cues(transcript), start=1)
    blocks = [f"{n}\n{_clock(a, ',')} --> {_clock(b, ',')}\n{t.replace('-->', '->')}\n" for n, (a, b, t) in cues]
    return "\n".join(blocks)


def to_vtt(transcript: Transcript) -> str:
    """Subtitles in WebVTT (``.vtt``)."""
    blocks = ["WEBVTT\n"]
    for start, end, text in subtitle_cues(transcript):
        escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        blocks.append(f"{_clock(start, '.')} --> {_clock(end, '.')}\n{escaped}\n")
    return "\n".join(blocks)


def to_verbose_json(transcript: Transcript) -> dict[str, Any]:
    """The fields of OpenAI's ``verbose_json``; ``None`` where nothing was measured.

    ``avg_logprob`` is the mean logarithm of the confidences of a segment's timed tokens, ``compression_ratio`` the
    length of its text over that of the text packed by zlib; decoding is greedy, so ``temperature`` is 0.
    """
    segments = [segment for segment in transcript.segments if segment.text.strip()]
    return {
        "task": "transcribe",
        "language": transcript.language or "unknown",
        "duration": round(transcript.duration, 3),
        "text": transcript.text,
        "segments": [{"id": index, **_segment_json(segment)} for index, segment in enumerate(segments)],
        "words": [{"word": word.text, **_times(word)} for word in transcript.words],
    }


def _times(item: Word | Segment) -> dict[str, float]:
    return {"start": round(item.start, 3), "end": round(item.end, 3)}


def _segment_json(segment: Segment) -> dict[str, Any]:
    data = segment.text.encode(errors="replace")
    logs = [math.log(max(token.confidence, SMALLEST_PROB)) for token in segment.tokens]
    return {
        "seek": round(segment.start * 100),  # mel frames of 10 ms
        **_times(segment),
        "text": segment.text,
        "tokens": [token.id for token in segment.tokens],
        "temperature": 0.0,
        "avg_logprob": sum(logs) / len(logs) if logs else None,
        "compression_ratio": len(data) / len(zlib.compress(data)),
        "no_speech_prob": segment.no_speech_prob,
    }


def to_textgrid(transcript: Transcript) -> str:
    """Praat's TextGrid in the long format: a tier of words and one of segments, silences as empty intervals."""
    tiers = {
        name: in_order(((item.start, item.end, " ".join(item.text.split())) for item in items), US)
        for name, items in (("words", transcript.words), ("segments", transcript.segments))
    }
    end = max([round(transcript.duration * US), 1, *(tier[-1][1] for tier in tiers.values() if tier)])
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0", f"xmax = {_decimal(end)}"]
    lines += ["tiers? <exists>", f"size = {len(tiers)}", "item []:"]
    for number, (name, tier) in enumerate(tiers.items(), start=1):
        intervals = _without_gaps(tier, end)
        lines += [f"    item [{number}]:", '        class = "IntervalTier"', f'        name = "{name}"']
        lines += ["        xmin = 0", f"        xmax = {_decimal(end)}", f"        intervals: size = {len(intervals)}"]
        for index, (start, stop, text) in enumerate(intervals, start=1):
            quoted = text.replace('"', '""')
            lines += [f"        intervals [{index}]:", f"            xmin = {_decimal(start)}"]
            lines += [f"            xmax = {_decimal(stop)}", f'            text = "{quoted}"']
    return "\n".join(lines) + "\n"


def in_order(items: Iterable[tuple[float, float, str]], per_second: int) -> list[Ticks]:
    """(start, end, text) in seconds -> ticks: each at least one long, none before its predecessor ends.

    Items without text are left out.
    """
    ordered: list[Ticks] = []
    edge = 0
    for start, end, text in items:
        if text:
            first = max(round(start * per_second), edge)
            edge = max(round(end * per_second), first + 1)
            ordered.append((first, edge, text))
    return ordered


def _without_gaps(tier: Sequence[Ticks], end: int) -> list[Ticks]:
    """Intervals from 0 to the end, empty ones between those that have a text."""
    filled: list[Ticks] = []
    edge = 0
    for start, stop, text in [*tier, (end, end, "")]:
        if start > edge:
            filled.append((edge, start, ""))
        if stop > start:
            filled.append((start, stop, text))
        edge = stop
    return filled


def subtitle_cues(transcript: Transcript) -> list[Ticks]:
    """Subtitles (start, end, text) in milliseconds: at most two lines and `CUE_S`, cut between words.

    Of all ways to cut, the one with few subtitles that end with a sentence, a clause or a pause. A segment without
    words lends its words equal shares of its time per character.
    """
    pieces = [piece for segment in transcript.segments for piece in _pieces(segment)]
    best = [0.0] + [math.inf] * len(pieces)  # cost of the best cut of the first n words ...
    begin = [0] * (len(pieces) + 1)  # ... and where its last subtitle begins
    for first in range(len(pieces)):
        for stop in range(first + 1, first + _most(pieces[first : first + 2 * LINE_WIDTH]) + 1):
            cost = best[first] + CUE_COST + _end_cost(pieces, stop)
            if cost < best[stop]:
                best[stop], begin[stop] = cost, first
    cues, stop = [], len(pieces)
    while stop:
        cues.append(pieces[begin[stop] : stop])
        stop = begin[stop]
    cues.reverse()
    timed = [(cue[0].start, cue[-1].end, _lines(cue)) for cue in cues]
    ordered = in_order(timed, MS)
    room = [start for start, _, _ in ordered[1:]] + [round(transcript.duration * MS)]
    shortest = round(SHORTEST_CUE_S * MS)
    return [
        (start, max(end, min(start + shortest, limit)), text)
        for (start, end, text), limit in zip(ordered, room, strict=False)
    ]


def _pieces(segment: Segment) -> list[Piece]:
    """The words of a segment; its text says whether spaces stand between them."""
    words = segment.words or group_words([TimedToken(-1, segment.text, segment.start, segment.end, 0.0)])
    whole, position = " ".join(segment.text.split()), 0
    pieces = []
    for word in words:
        text = " ".join(word.text.split())
        if not text:
            continue
        adjoins = position > 0 and whole.startswith(text, position)
        found = whole.find(text, position, position + len(text) + LINE_WIDTH)
        position = found + len(text) if found >= 0 else position
        pieces.append(Piece(text, word.start, word.end, not adjoins))
    return pieces


def _most(pieces: Sequence[Piece]) -> int:
    """How many of the words fit into one subtitle; one always does."""
    lines, width = 1, _width(pieces[0].text)
    for count, (before, piece) in enumerate(zip(pieces, pieces[1:], strict=False), start=1):
        if piece.end - pieces[0].start > CUE_S or piece.start - before.end >= LONG_PAUSE_S:
            return count
        own = _width(piece.text)
        width += piece.spaced + own
        if width > LINE_WIDTH:
            lines, width = lines + 1, own
        if lines > 2 or width > LINE_WIDTH:
            return count
    return len(pieces)


def _end_cost(pieces: Sequence[Piece], stop: int) -> float:
    """What it costs to end a subtitle before word ``stop``."""
    last = pieces[stop - 1]
    if stop == len(pieces) or last.text.endswith(SENTENCE_ENDS) or pieces[stop].start - last.end >= PAUSE_S:
        return 0.0
    return CLAUSE_COST if last.text.endswith(CLAUSE_ENDS) else WORD_COST


def _lines(pieces: Sequence[Piece]) -> str:
    """The words of a subtitle in one line, or in two of about the same width."""

    def join(part: Sequence[Piece]) -> str:
        return part[0].text + "".join(" " * piece.spaced + piece.text for piece in part[1:])

    if len(pieces) == 1 or _width(join(pieces)) <= LINE_WIDTH:
        return join(pieces)
    halves = [(join(pieces[:cut]), join(pieces[cut:])) for cut in range(1, len(pieces))]
    return "\n".join(min(halves, key=lambda lines: max(map(_width, lines))))


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _clock(ms: int, mark: str) -> str:
    """Milliseconds as HH:MM:SS and a decimal mark."""
    seconds, ms = divmod(ms, MS)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{mark}{ms:03}"


def _decimal(us: int) -> str:
    """Microseconds as seconds."""
    return f"{us // US}.{us % US:06}"
