"""The architecture of a stage as an SVG: the boxes of the data flow, what trained in colour, shapes on the arrows.

An SVG and not a Mermaid block: the Hub shows the images of a repository in its card, and does not say anywhere that it
draws Mermaid. An SVG is text of some kilobytes, needs no drawing library, and stays sharp.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

FIGURE = "architecture.svg"

WIDTH, HEIGHT, GAP, TOP = 172, 64, 60, 48  # of a box, between two, above them; pixels
TRAINED, FROZEN, NOTHING = ("#d7e8ff", "#2f6fbe"), ("#eeeeee", "#888888"), ("#ffffff", "#ffffff")  # fill, line


@dataclass(frozen=True)
class Box:
    """A part of the model.

    Attributes:
        title: Its name.
        detail: A line below it: size, or what in it trained.
        trained: Whether this stage changed something in it; ``None`` for what goes in and comes out.
        shape: Of what leaves it, written on the arrow.
        beside: What else goes into it, from above.
    """

    title: str
    detail: str
    trained: bool | None
    shape: str = ""
    beside: str = ""


def boxes(stage: str, config: dict[str, Any], trains: Sequence[str]) -> list[Box]:
    """The parts of a stage's model in the order of the data flow.

    Args:
        stage: Name in the stage table.
        config: The model's ``config.json``.
        trains: The stage's ``trains``: name prefixes, ``lora``, ``encoder_lora``.
    """
    audio, text = config["audio_config"], config["text_config"]

    def trained(*parts: str) -> bool:
        return any(name.partition(".")[0] in parts for name in trains)

    flow = [
        Box("Recording", "log-mel", None, "(B,M,T)"),
        Box(
            "Encoder",
            _inside(audio["model_type"], config.get("encoder_lora")),
            trained("audio_tower", "encoder_lora"),
            "(B,E,D_e)",
        ),
        Box("Alignment adapter", "to the LLM's space", trained("alignment_adapter"), "(B,A,D)"),
        Box("CTC head", f"{text['vocab_size']:,} pieces", trained("ctc_head"), "(B,A,V)"),
    ]
    if stage == "align":
        return [*flow, Box("Transcript", "", None)]
    return [
        *flow,
        Box("Shrinking adapter", "a vector per token", trained("shrinking_adapter"), "(B,K,D)"),
        Box(
            "LLM",
            _inside(text["model_type"], config.get("lora")),
            trained("language_model", "lora"),
            "(B,L,V)",
            "written instruction",
        ),
        Box("Answer", "", None),
    ]


def _inside(model_type: str, lora: dict[str, Any] | None) -> str:
    return f"{model_type} + LoRA" if lora else model_type


def draw(flow: Sequence[Box]) -> str:
    """The SVG of a data flow, left to right, with a legend of the two colours."""
    width = len(flow) * WIDTH + (len(flow) - 1) * GAP + 20
    height = TOP + HEIGHT + 50
    names = ", ".join(box.title for box in flow)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="14" text-anchor="middle" role="img">',
        f"<title>From left to right: {escape(names)}</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#444444"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',  # a card may be read on a dark page
    ]
    for number, box in enumerate(flow):
        left = 10 + number * (WIDTH + GAP)
        parts += _draw_box(box, left)
        if box.beside:
            parts += _draw_arrow_from_above(box.beside, left + WIDTH // 2)
        if number + 1 < len(flow):
            parts += _draw_arrow(box.shape, left + WIDTH)
    low = TOP + HEIGHT + 22
    for left, colours, text in ((10, TRAINED, "changed by this stage"), (220, FROZEN, "as it was before")):
        parts.append(f'<rect x="{left}" y="{low}" width="16" height="16" fill="{colours[0]}" stroke="{colours[1]}"/>')
        parts.append(f'<text x="{left + 24}" y="{low + 13}" text-anchor="start" font-size="12">{text}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _draw_box(box: Box, left: int) -> list[str]:
    fill, line = NOTHING if box.trained is None else TRAINED if box.trained else FROZEN
    middle, centre = left + WIDTH // 2, TOP + HEIGHT // 2
    return [
        f'<rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{fill}" stroke="{line}"/>',
        f'<text x="{middle}" y="{centre - 4 if box.detail else centre + 5}" font-weight="bold">'
        f"{escape(box.title)}</text>",
        f'<text x="{middle}" y="{centre + 16}" font-size="12" fill="#444444">{escape(box.detail)}</text>',
    ]


def _draw_arrow(shape: str, left: int) -> list[str]:
    middle = TOP + HEIGHT // 2
    return [
        f'<line x1="{left + 3}" y1="{middle}" x2="{left + GAP - 3}" y2="{middle}" stroke="#444444" '
        'marker-end="url(#tip)"/>',
        f'<text x="{left + GAP // 2}" y="{middle - 10}" font-size="11" fill="#444444">{escape(shape)}</text>',
    ]


def _draw_arrow_from_above(text: str, middle: int) -> list[str]:
    return [
        f'<text x="{middle}" y="16" font-size="12" fill="#444444">{escape(text)}</text>',
        f'<line x1="{middle}" y1="22" x2="{middle}" y2="{TOP - 3}" stroke="#444444" marker-end="url(#tip)"/>',
    ]
