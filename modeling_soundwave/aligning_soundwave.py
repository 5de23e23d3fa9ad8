"""Times for a given text: its tokens aligned to the frames by the CTC head (Kürzinger et al. 2020).

Letters: A aligned frames (40 ms), D LLM width, V vocabulary, U tokens, C distinct tokens of a text.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from .ctc_soundwave import linear_log_sum_exp
from .transcribing_soundwave import (
    SAMPLING_RATE,
    Heard,
    WindowReader,
    compression,
    ctc_peaks,
    finish,
    frames_of,
    goes_on,
    joined,
    no_speech_prob,
)
from .transcripts_soundwave import Segment, TimedToken, Transcript
from .words_soundwave import FRAME_S, SENTENCE_ENDS, Span, group_words, spread, timed_tokens

PIECE_SIZE = 30_000  # frames + 4 tokens that are aligned at once: some ten minutes of speech
KEPT_BYTES = 2**30  # of frames; the frames of longer recordings are computed a second time
ANCHOR_TOKENS = 4  # in a row, said once and written once: there the text and the recording surely meet
PAUSE_S = 0.3  # between the spans of two tokens: such a silence ends a segment


class AlignmentError(ValueError):
    """A text that cannot be aligned: too long for its audio, or without the library that aligns."""


def column_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    blank_weight: torch.Tensor | None,
    blank: int,
    columns: torch.Tensor,
) -> torch.Tensor:
    """Log-probabilities (A, 1 + C) of the blank and of some rows among all rows; (A, V) is never built.

    Args:
        hidden: scaled frames (A, D).
        weight: one row per label (V, D).
        blank_weight: a blank row (D,) beside ``weight``.
        blank: the row of ``weight`` that is the blank, without ``blank_weight``.
        columns: rows of ``weight`` (C,).
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    blank_row = weight[blank] if blank_weight is None else blank_weight.to(weight.dtype)
    wanted = torch.cat([blank_row[None], weight[columns]])  # (1 + C, D)
    h = hidden.to(weight.dtype)
    total, _ = linear_log_sum_exp(h, weight, blank_weight, dtype)
    return (h @ wanted.T).to(dtype) - total[:, None]


def forced_peaks(log_probs: torch.Tensor, targets: torch.Tensor) -> list[Span]:
    """The frames of each token on the likeliest path that spells the targets.

    Args:
        log_probs: (A, 1 + C), the blank first.
        targets: column numbers >= 1 (U,).

    Returns:
        Per token (first frame, end frame, highest probability in them).

    Raises:
        AlignmentError: when the targets do not fit (equal neighbours need a blank between them), or torchaudio
            cannot be imported.
    """
    A, U = len(log_probs), len(targets)
    repeats = int((targets[1:] == targets[:-1]).sum())
    if U + repeats > A:
        raise AlignmentError(
            f"{U} tokens ({repeats} of them repeated) came with {A} frames of 40 ms; expected at least {U + repeats} "
            "frames. Is this the text of this recording?"
        )
    if U == 0:
        return []
    try:
        from torchaudio.functional import forced_align
    except Exception as error:  # torchaudio that does not fit torch raises more than ImportError
        raise AlignmentError(
            "Aligning a text needs torchaudio, which cannot be imported; install the release that fits your torch: "
            f"`pip install torchaudio` (torch is {torch.__version__})."
        ) from error
    # On the CPU whatever the device: a GPU would take a kernel per frame for a handful of sums.
    path, scores = forced_align(log_probs[None].cpu().contiguous(), targets[None].cpu(), blank=0)
    labels, probs = path[0].tolist(), scores[0].exp().tolist()
    peaks: list[Span] = []
    before = 0
    for frame, label in enumerate(labels):
        if label and label == before:
            first, _, confidence = peaks[-1]
            peaks[-1] = (first, frame + 1, max(confidence, probs[frame]))
        elif label:
            peaks.append((frame, frame + 1, probs[frame]))
        before = label
    return peaks


def even_peaks(count: int, n_frames: int) -> list[Span]:
    """Equal shares of the frames for each token, with confidence 0: times of a text that does not fit its audio."""
    edges = [index * n_frames // max(count, 1) for index in range(count + 1)]
    return [(first, stop, 0.0) for first, stop in zip(edges, edges[1:], strict=False)]


def frames_needed(token_ids: Sequence[int]) -> int:
    """Frames that a text needs at least: one per token, and a blank between equal neighbours."""
    return len(token_ids) + sum(a == b for a, b in zip(token_ids, token_ids[1:], strict=False))


def find_anchors(heard: Sequence[int], peaks: Sequence[Span], token_ids: Sequence[int]) -> list[tuple[int, int]]:
    """Where a text and what is heard surely meet: (frame, index of the token that begins behind it), ascending.

    Some tokens in a row that both hold once are matched; of the matches, the longest ascending sequence is taken.
    """

    def places(ids: Sequence[int]) -> dict[tuple[int, ...], int]:
        rows = [tuple(ids[index : index + ANCHOR_TOKENS]) for index in range(len(ids) - ANCHOR_TOKENS + 1)]
        counts = Counter(rows)
        return {row: index for index, row in enumerate(rows) if counts[row] == 1}

    written = places(token_ids)
    matches = [(place, written[row]) for row, place in places(heard).items() if row in written]
    tails: list[int] = []  # the smallest text position that ends an ascending sequence of each length
    chain: list[tuple[int, int]] = []  # per match: the length of its sequence, and the match before it
    last_of: list[int] = []
    for index, (_, place) in enumerate(matches):
        length = bisect_left(tails, place)
        tails[length : length + 1] = [place]
        last_of[length : length + 1] = [index]
        chain.append((length, last_of[length - 1] if length else -1))
    anchors = []
    index = last_of[-1] if last_of else -1
    middle = ANCHOR_TOKENS // 2
    while index >= 0:
        place, written_place = matches[index]
        end, start = peaks[place + middle - 1][1], peaks[place + middle][0]
        anchors.append(((end + start + 1) // 2, written_place + middle))
        index = chain[index][1]
    return anchors[::-1]


def cut_pieces(anchors: Iterable[tuple[int, int]], n_frames: int, n_tokens: int) -> list[tuple[int, int]]:
    """Bounds (frame, token) of pieces up to `PIECE_SIZE`, at anchors; where those are too far apart, evenly."""

    def size(first: tuple[int, int], second: tuple[int, int]) -> int:
        return second[0] - first[0] + 4 * (second[1] - first[1])

    points = [(0, 0), *anchors, (n_frames, n_tokens)]
    bounds = points[:1]
    for before, point in zip(points, points[1:], strict=False):
        if size(bounds[-1], point) > PIECE_SIZE and before != bounds[-1]:
            bounds.append(before)
        (frame, token), pieces = bounds[-1], -(-size(bounds[-1], point) // PIECE_SIZE)
        for piece in range(1, pieces):
            part = piece / pieces
            bounds.append((frame + int(part * (point[0] - frame)), token + int(part * (point[1] - token))))
    return [*bounds, points[-1]]


class SoundwaveAligningMixin:
    """Times of a given text for every Soundwave model."""

    def align_frames(self, frames: torch.Tensor, token_ids: Sequence[int], strict: bool = True) -> list[Span]:
        """When each token of a text is said.

        Args:
            frames: aligned frames (A, D) of one recording, or of the part in which the text is said.
            token_ids: LLM token ids (U,) of the text, as `processor.ctc_label_ids` gives them. Ids that the CTC head
                does not emit (control tokens, the blank, those outside ``config.ctc_token_ids``) take no time: they
                stand at the end of the token before, with its confidence.
            strict: whether a text that does not fit is an error. Else its tokens share the frames evenly, with
                confidence 0: a transcript is not lost because an LLM raved.

        Returns:
            (start frame, end frame, confidence) per token, in frames of 40 ms; in order, without overlap. The
            confidence is the highest probability of the token in the frames in which it is heard.

        Raises:
            AlignmentError: when the text has more tokens than fit into the frames, or torchaudio is not installed.
        """
        emitted = self._emitted(token_ids)
        peaks = self._peaks(frames, [token for token, known in zip(token_ids, emitted, strict=True) if known], strict)
        return fill_spans(spread(peaks, len(frames)), emitted)

    def align_text(
        self,
        audio: Any,
        text: str,
        processor: Any,
        sampling_rate: int | None = None,
        windows_per_batch: int = 8,
    ) -> Transcript:
        """Align a given transcript to its recording: when is each word said, and how sure is that.

        Recordings of hours are aligned in pieces that begin where the text and the greedy transcript surely meet, so
        that memory does not grow with the length. Where the two never meet, pieces are cut evenly; a piece whose
        tokens do not fit has confidence 0.

        Args:
            audio: the recording, in any form that the processor's `load_audio` takes.
            text: what is said in it.
            processor: a `SoundwaveProcessor`.
            sampling_rate: of a bare waveform, in Hz.
            windows_per_batch: windows that are encoded at once.

        Returns:
            The text in segments that end with a sentence or a pause.

        Raises:
            AlignmentError: when the text has more tokens than fit into the recording, or torchaudio is not installed.
            ValueError: for a recording that cannot be read.
        """
        if hasattr(audio, "read") or isinstance(audio, Iterator):  # a long recording is read twice, these only once
            audio, sampling_rate = processor.load_audio(audio, sampling_rate), SAMPLING_RATE
        reader = WindowReader([audio], processor, sampling_rate, windows_per_batch)
        heard, kept = self._hear_whole(reader)
        ids = processor.ctc_label_ids(text)
        emitted = self._emitted(ids)
        said = [token for token, known in zip(ids, emitted, strict=True) if known]
        n_frames = len(heard.token_ids)
        if frames_needed(said) > n_frames:
            raise AlignmentError(
                f"The text has {len(said)} tokens, which need {frames_needed(said)} frames of 40 ms, but the "
                f"recording has {n_frames}; is this its text?"
            )
        bounds = cut_pieces(find_anchors(*ctc_peaks(heard, self.config.blank_id), said), n_frames, len(said))
        again = (stretch.frames for stretch in self._stretches(reader, keep_frames=True))
        pieces = cut_frames(again if kept is None else kept, [frame for frame, _ in bounds])
        peaks: list[Span] = []
        for (start, first), (_, last), frames in zip(bounds, bounds[1:], pieces, strict=False):
            piece = self._peaks(frames, said[first:last], strict=False)
            peaks += [(begin + start, end + start, confidence) for begin, end, confidence in piece]
        tokens = timed_tokens(processor.tokenizer, ids, fill_spans(spread(peaks, n_frames), emitted))
        edges = [index for index in range(1, len(tokens)) if ends_segment(tokens, index)]
        parts = [tokens[start:end] for start, end in zip([0, *edges], [*edges, len(tokens)], strict=True)]
        segments = [self._segment_of(part, heard) for part in parts if part]
        transcript = Transcript(text.strip(), segments, reader.durations[0], ids)
        finish(transcript, heard, self.config)
        return transcript

    def _hear_whole(self, reader: WindowReader) -> tuple[Heard, list[torch.Tensor] | None]:
        """What is heard in a recording, and its frames, several (a, D), unless they are too many to keep."""
        parts, size = [], 0
        kept: list[torch.Tensor] = []
        for stretch in self._stretches(reader, keep_frames=True):
            parts.append(stretch.heard)
            size += stretch.frames.numel() * stretch.frames.element_size()
            kept = kept if size <= KEPT_BYTES else []
            kept.append(stretch.frames)
        heard = joined(parts)
        n_frames = frames_of(reader.durations[0])
        return heard.cut(0, n_frames), kept if size <= KEPT_BYTES else None

    @torch.no_grad()
    def _peaks(self, frames: torch.Tensor, token_ids: list[int], strict: bool) -> list[Span]:
        """The peaks of tokens that the head emits."""
        if not strict and frames_needed(token_ids) > len(frames):
            return even_peaks(len(token_ids), len(frames))
        distinct, targets = torch.tensor(token_ids, dtype=torch.long).unique(return_inverse=True)
        head = self.ctc_head
        hidden, rows, blank_row, blank = head(frames, self.ctc_rows())
        log_probs = column_log_probs(hidden, rows, blank_row, blank, head._to_rows(distinct).to(rows.device))
        return forced_peaks(log_probs, targets + 1)

    def _emitted(self, token_ids: Sequence[int]) -> list[bool]:
        """Which ids the CTC head emits: not the blank, no control tokens, only rows that it has."""
        config, text = self.config, self.config.text_config
        silent = {config.blank_id, config.audio_token_id}
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(text, name, None)
            silent |= set(value) if isinstance(value, list) else {value}
        allowed = range(text.vocab_size) if config.ctc_token_ids is None else frozenset(config.ctc_token_ids)
        return [token in allowed and token not in silent for token in token_ids]

    def _segment_of(self, tokens: list[TimedToken], heard: Heard) -> Segment:
        """The segment of some aligned tokens of a recording."""
        text = "".join(token.text for token in tokens).strip()
        segment = Segment(text, tokens[0].start, tokens[-1].end, tokens, group_words(tokens))
        part = heard.cut(*segment_frames(segment, len(heard.token_ids)))
        segment.no_speech_prob, segment.compression = no_speech_prob(part), compression(part, self.config)
        return segment


def segment_frames(segment: Segment, n_frames: int) -> tuple[int, int]:
    """The frames of a segment, at least one."""
    start = min(round(segment.start / FRAME_S), n_frames - 1)
    return start, max(round(segment.end / FRAME_S), start + 1)


def fill_spans(spans: Iterable[Span], emitted: Sequence[bool]) -> list[Span]:
    """Spans of the emitted tokens -> of all: the others are empty, at the end of the one before."""
    spans = list(spans)
    last = (spans[0][0], spans[0][0], spans[0][2]) if spans else (0, 0, 0.0)
    left, result = iter(spans), []
    for known in emitted:
        last = next(left) if known else (last[1], last[1], last[2])
        result.append(last)
    return result


def cut_frames(stretches: Iterable[torch.Tensor], bounds: Sequence[int]) -> Iterator[torch.Tensor]:
    """Frames that come in stretches (a, D) -> those between the bounds; only one piece of them exists at once."""
    stretches = iter(stretches)
    held = next(stretches)
    for start, end in zip(bounds, bounds[1:], strict=False):
        waiting = [held]
        while sum(map(len, waiting)) < end - start:
            waiting.append(next(stretches))
        held = torch.cat(waiting)
        yield held[: end - start]
        held = held[end - start :].clone()


def ends_segment(tokens: Sequence[TimedToken], index: int) -> bool:
    """Whether a sentence or a pause ends before a token."""
    before, token = tokens[index - 1], tokens[index]
    over = before.text.rstrip().endswith(SENTENCE_ENDS) or token.start - before.end >= PAUSE_S
    return over and not goes_on(tokens, index)
