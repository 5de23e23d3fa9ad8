"""The report's picture of what the model makes of one utterance.

``look_inside`` reads everything out of the model; ``draw_utterance`` only draws.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from soundwave.training.curves import ACCENT, DROPPED, INK, QUIET

SECONDS_PER_MEL_FRAME = 0.01
SECONDS_PER_ALIGNED_FRAME = 0.04
#: Piece beginnings that say "a new word starts here": byte-level BPE and SentencePiece.
WORD_STARTS = ("Ġ", "▁", " ")


@dataclass(frozen=True)
class Utterance:
    """What happens to one recording on its way to the LLM.

    Attributes:
        log_mel: Log-mel spectrogram (M, T).
        pieces: Per aligned frame (A), the text of its CTC arg-max, ``None`` for the blank.
        kept: Per aligned frame (A), whether it becomes a position of the LLM.
        words: ``(first second, last second, word)`` of the collapsed pieces.
        said: What was said, if known.
        answer: What the LLM answered, if it was asked.
    """

    log_mel: np.ndarray
    pieces: list[str | None]
    kept: np.ndarray
    words: list[tuple[float, float, str]]
    said: str | None = None
    answer: str | None = None


def word_frames(pieces: Sequence[str | None], kept: np.ndarray) -> list[list[int]]:
    """Kept frames grouped to words: a piece that begins with the tokenizer's mark, or a ``<label>``, starts one.

    Args:
        pieces: Per aligned frame, the tokenizer's own piece, ``None`` for the blank.
        kept: Per aligned frame, whether it is kept.
    """
    words: list[list[int]] = []
    label = True  # the first piece starts a word in any case
    for frame in np.flatnonzero(kept).tolist():
        piece = pieces[frame]
        if piece is None:
            continue
        if label or piece.startswith((*WORD_STARTS, "<")):
            words.append([])
        words[-1].append(frame)
        label = piece.endswith(">")
    return words


@torch.inference_mode()
def look_inside(
    model: Any, processor: Any, audio: Any, said: str | None = None, answer: str | None = None
) -> Utterance:
    """Run encoder, alignment adapter and CTC head over one recording of at most one window.

    Args:
        model: ``SoundwaveForCTC``.
        processor: Its ``SoundwaveProcessor``.
        audio: Anything ``processor.load_audio`` takes.
        said: The transcript, for the title.
        answer: The LLM's answer, for the title.

    Raises:
        ValueError: If the recording does not fit one window of the encoder.
    """
    from soundwave.modeling_soundwave.seams_soundwave import collapse_runs

    features = processor.audio_features([processor.load_audio(audio)])
    if len(features["input_features"]) != 1:
        raise ValueError("the picture shows one window of the encoder; choose a recording of at most that length")
    model.eval()
    features = {key: value.to(model.device) for key, value in features.items()}
    features["input_features"] = features["input_features"].to(model.dtype)
    output = model(**features)
    blank = model.config.blank_id
    kept = collapse_runs(output.token_ids, output.mask, blank, model.config.keep_blanks)[0].cpu().numpy()
    A = int(output.mask[0].sum())
    ids = output.token_ids[0, :A].tolist()
    decode = processor.tokenizer.decode
    raw = [None if i == blank else processor.tokenizer.convert_ids_to_tokens(i) for i in ids]
    pieces = [None if i == blank else decode([i]).strip() for i in ids]
    words = [
        (
            frames[0] * SECONDS_PER_ALIGNED_FRAME,
            (frames[-1] + 1) * SECONDS_PER_ALIGNED_FRAME,
            decode([ids[frame] for frame in frames]).strip(),
        )
        for frames in word_frames(raw, kept[:A])
    ]
    T = int(features["input_features_mask"][0].sum()) if features.get("input_features_mask") is not None else 4 * A
    log_mel = features["input_features"][0, :, :T].float().cpu().numpy()
    return Utterance(log_mel, pieces, kept[:A], words, said, answer)


def draw_utterance(path: str | os.PathLike[str], utterance: Utterance) -> None:
    """PNG of one utterance: spectrogram, CTC peaks with their tokens, kept frames, words, on one time axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    M, T = utterance.log_mel.shape
    A = len(utterance.pieces)
    seconds = max(T * SECONDS_PER_MEL_FRAME, A * SECONDS_PER_ALIGNED_FRAME)
    width = float(np.clip(3.6 * seconds + 1.6, 9.0, 24.0))
    figure = Figure(figsize=(width, 6.4), dpi=120)
    FigureCanvasAgg(figure)
    mel, peaks, frames, words = figure.subplots(
        4, 1, sharex=True, gridspec_kw={"height_ratios": [3.0, 1.9, 0.35, 1.0], "hspace": 0.12}
    )
    per_inch = seconds / (width * 0.86)  # seconds per inch of the axes

    mel.imshow(
        utterance.log_mel,
        origin="lower",
        aspect="auto",
        cmap="magma",
        extent=(0, T * SECONDS_PER_MEL_FRAME, 0, M),
        interpolation="nearest",
    )
    hertz = [250, 1000, 2000, 4000, 8000]
    mel.set_yticks([M * _mel(f) / _mel(8000) for f in hertz], ["0.25", "1", "2", "4", "8"])
    mel.set_ylabel("Frequency (kHz)")

    centres = (np.arange(A) + 0.5) * SECONDS_PER_ALIGNED_FRAME
    peak = np.array([piece is not None for piece in utterance.pieces], dtype=bool)
    peaks.hlines(0, 0, seconds, color=DROPPED, linewidth=1, zorder=0)
    peaks.plot(centres[~peak], np.zeros((~peak).sum()), ".", color=QUIET, markersize=3)
    peaks.vlines(centres[peak], 0, 1, color=ACCENT, linewidth=1.6)
    peaks.plot(centres[peak], np.ones(peak.sum()), "o", color=ACCENT, markersize=4)
    for frame in np.flatnonzero(peak & utterance.kept):
        text = _drawable(utterance.pieces[frame] or "") or "\u2423"  # a visible space
        peaks.text(
            centres[frame],
            1.15,
            text,
            rotation=62,
            rotation_mode="anchor",
            fontsize=8.5,
            ha="left",
            va="bottom",
            color=INK,
            parse_math=False,
        )
    peaks.set_ylim(-0.15, 2.6)
    peaks.set_yticks([0, 1], ["blank", "token"])
    peaks.set_ylabel("CTC head")

    edges = np.arange(A) * SECONDS_PER_ALIGNED_FRAME
    colours = [ACCENT if kept else DROPPED for kept in utterance.kept]
    frames.bar(edges, 1, SECONDS_PER_ALIGNED_FRAME, align="edge", color=colours, edgecolor="white", linewidth=0.6)
    frames.set_ylim(0, 1)
    frames.set_yticks([0.5], [f"kept: {int(utterance.kept.sum())} of {A}"])
    frames.tick_params(axis="y", length=0)

    free_from = [-np.inf] * 3  # right end of the last word in each line
    for start, end, word in utterance.words:
        text = _drawable(word)
        half = 0.5 * (0.1 * len(text) + 0.1) * per_inch
        middle = (start + end) / 2
        free = [line for line, end_of_last in enumerate(free_from) if end_of_last <= middle - half]
        line = free[0] if free else int(np.argmin(free_from))
        free_from[line] = middle + half
        words.hlines(0.99, start, end, color=ACCENT, linewidth=2)
        words.text(middle, 0.74 - 0.3 * line, text, ha="center", va="center", fontsize=10, color=INK, parse_math=False)
    words.set_ylim(0, 1)
    words.set_yticks([0.5], ["words"])
    words.tick_params(axis="y", length=0)
    words.set_xlabel("Time (s)")
    words.set_xlim(0, seconds)

    for axis in (peaks, frames, words):
        axis.spines[["top", "right"]].set_visible(False)
    for axis in (frames, words):
        axis.spines["left"].set_visible(False)
    for axis in (mel, peaks, frames):
        axis.tick_params(axis="x", length=0)
    title = [f"{label}: {text}" for label, text in (("Said", utterance.said), ("Answer", utterance.answer)) if text]
    if title:
        mel.set_title(_drawable("\n".join(title)), loc="left", fontsize=11, color=INK, parse_math=False)
    figure.align_ylabels([mel, peaks])
    figure.savefig(path, bbox_inches="tight", facecolor="white")


def _drawable(text: str) -> str:
    """Text with a box for every character that the pictures' font lacks (it would draw one, and warn)."""
    from matplotlib.font_manager import findfont, get_font

    known = get_font(findfont("DejaVu Sans")).get_charmap()
    return "".join(c if c == "\n" or ord(c) in known else "\u25a1" for c in text)


def _mel(hertz: float) -> float:
    from transformers.audio_utils import hertz_to_mel

    return float(hertz_to_mel(hertz, mel_scale="slaney"))  # Whisper's scale
