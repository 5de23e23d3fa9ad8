"""Time spans in answers: when a word was said, or a sound was heard."""

import re
from collections.abc import Sequence

Span = tuple[float, float]

_SECONDS = r"(\d+(?:\.\d+)?)\s*(?:seconds?|secs?|s)?"
#: ``[1.2, 1.5]``, ``1.2s - 1.5s``, ``from 1.2 to 1.5 seconds``, ``between 1.2 and 1.5``.
SPAN = re.compile(rf"(?<![\w.]){_SECONDS}\s*(?:,|;|-|–|—|\bto\b|\band\b|\buntil\b)\s*{_SECONDS}(?![\w]|\.\d)", re.I)


def spans_in(text: str) -> list[Span]:
    """The time spans of a text in seconds, (start, end) with start < end, in its order; none if it states none."""
    pairs = [(float(start), float(end)) for start, end in SPAN.findall(text)]
    return [(start, end) for start, end in pairs if start < end]


def interval_iou(found: Sequence[Span], wanted: Sequence[Span]) -> float:
    """Intersection over union of two sets of spans: the time both cover over the time either covers, in [0, 1].

    Raises:
        ValueError: If neither side covers any time.
    """
    either = _covered([*found, *wanted])
    if not either:
        raise ValueError("two sets of spans that cover no time have no intersection over union")
    # What both cover, by inclusion and exclusion; the sides' own spans may overlap each other.
    return max(0.0, _covered(found) + _covered(wanted) - either) / either


def _covered(spans: Sequence[Span]) -> float:
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def nearest_choice(answer: str, choices: Sequence[str]) -> int | None:
    """Position of the option whose spans overlap those of an answer most; ``None`` if none does, or two do alike."""
    said = spans_in(answer)
    overlaps = [interval_iou(said, spans) if said and (spans := spans_in(choice)) else 0.0 for choice in choices]
    best = max(overlaps, default=0.0)
    return overlaps.index(best) if best > 0 and overlaps.count(best) == 1 else None
