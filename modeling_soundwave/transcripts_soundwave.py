"""What a transcript is: text with times and confidences, as every way of making one returns it.

All times are seconds from the beginning of the recording; confidences are probabilities in 0..1.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch


@dataclass
class TimedToken:
    """One LLM token as the CTC head hears it."""

    id: int
    text: str
    start: float
    end: float
    confidence: float


@dataclass
class Word:
    """One word; its confidence is the lowest of its tokens."""

    text: str
    start: float
    end: float
    confidence: float


@dataclass
class Segment:
    """A stretch of a recording that was transcribed as one: between two seams of windows, or two pauses."""

    text: str
    start: float
    end: float
    tokens: list[TimedToken] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)
    no_speech_prob: float | None = None  # probability that nothing is said
    compression: float | None = None  # aligned frames (40 ms) per position that the LLM sees
    cut: bool = False  # a limit on new tokens ended the text


@dataclass
class Transcript:
    """The transcript of one recording."""

    text: str
    segments: list[Segment]
    duration: float
    token_ids: list[int] = field(default_factory=list)
    blank_probs: torch.Tensor | None = None  # (A,) probability of the CTC blank, one per 40 ms
    no_speech_prob: float | None = None
    compression: float | None = None
    language: str | None = None
    llm_forwards: int | None = None  # forward passes of the LLM, None without it

    @property
    def words(self) -> list[Word]:
        """All words in order."""
        return [word for segment in self.segments for word in segment.words]

    @property
    def tokens(self) -> list[TimedToken]:
        """All timed tokens in order."""
        return [token for segment in self.segments for token in segment.tokens]

    @property
    def cut(self) -> bool:
        """Whether a limit on new tokens ended the text of a segment."""
        return any(segment.cut for segment in self.segments)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = asdict(self)
        values["blank_probs"] = None if self.blank_probs is None else self.blank_probs.tolist()
        return values

    def to_srt(self) -> str:
        """Subtitles in SubRip's format; see `writers_soundwave` for this and the next three."""
        from .writers_soundwave import to_srt

        return to_srt(self)

    def to_vtt(self) -> str:
        """Subtitles in WebVTT."""
        from .writers_soundwave import to_vtt

        return to_vtt(self)

    def to_verbose_json(self) -> dict[str, Any]:
        """The fields of OpenAI's ``verbose_json``."""
        from .writers_soundwave import to_verbose_json

        return to_verbose_json(self)

    def to_textgrid(self) -> str:
        """Praat's TextGrid, with tiers of words and segments."""
        from .writers_soundwave import to_textgrid

        return to_textgrid(self)


@dataclass
class PartialTranscript:
    """What is known while a recording still arrives."""

    text: str  # stable: later values only append to it
    tail: str  # heard, but may still change
    duration: float  # seconds heard so far
    transcript: Transcript | None = None  # the whole, with the last value
