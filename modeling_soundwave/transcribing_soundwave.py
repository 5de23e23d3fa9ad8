"""Recordings of any length to transcripts, read as streams: by the CTC head alone, or by the LLM seam to seam.

Letters: M mel bins, T mel frames (10 ms), A aligned frames (40 ms), D LLM width.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from math import ceil
from numbers import Real
from typing import Any, NamedTuple

import torch

from .seams_soundwave import best_cut, collapse_runs
from .transcripts_soundwave import Segment, TimedToken, Transcript
from .words_soundwave import FRAME_S, Span, group_words, spread, timed_tokens

MEL_PER_ALIGNED_FRAME = 4
SAMPLING_RATE = 16_000  # Hz, of the processor's blocks


class Heard(NamedTuple):
    """What the CTC head hears, frame by frame."""

    token_ids: torch.Tensor  # (A,) arg-max
    log_probs: torch.Tensor  # (A,) of it
    blank_log_probs: torch.Tensor  # (A,)

    def cut(self, start: int, end: int | None) -> "Heard":
        """The frames from ``start`` to ``end``."""
        return Heard(*(values[start:end] for values in self))


def joined(parts: Sequence[Heard]) -> Heard:
    """What is heard in stretches that follow each other."""
    return Heard(*map(torch.cat, zip(*parts, strict=True)))


class Stretch(NamedTuple):
    """A stretch of a recording between two seams of windows."""

    recording: int  # its place in the list
    start: int  # frame of the recording
    last: bool
    heard: Heard
    frames: Any  # (A, D) tensor, or None where nobody wants them


def recordings_of(audio: Any) -> tuple[list[Any], bool]:
    """The recordings of an argument that may be one or a list of them, and whether it was one; numbers are one."""
    single = not isinstance(audio, list | tuple) or bool(audio and isinstance(audio[0], Real))
    return ([audio] if single else list(audio)), single


class SoundwaveTranscribingMixin:
    """Transcripts by the CTC head: no LLM, memory bounded whatever the length."""

    def transcribe_ctc(
        self,
        audio: Any,
        processor: Any,
        sampling_rate: int | None = None,
        streaming: bool = False,
        windows_per_batch: int = 8,
    ) -> Any:
        """Transcribe recordings of any length greedily with the CTC head alone (§2.2.1).

        Windows are read from the recording as a stream and encoded `windows_per_batch` at a time; only a few numbers
        per 40 ms are kept. The tokens are those of `transcribe_ids`, with times and probabilities.

        Args:
            audio: one recording in any form that the processor's `load_audio` takes, or a list of them.
            processor: a `SoundwaveProcessor`.
            sampling_rate: of recordings given as bare waveforms, in Hz.
            streaming: ``audio`` is an iterator of chunks (n,) that arrive one after the other; see `stream_ctc`.
            windows_per_batch: bounds the memory.

        Returns:
            A `Transcript`, a list of them for a list, or an iterator of `PartialTranscript` when streaming.

        Raises:
            ValueError: for a recording that cannot be read, or ``windows_per_batch`` below 1.
        """
        if streaming:
            return self.stream_ctc(audio, processor, sampling_rate)
        recordings, single = recordings_of(audio)
        reader = WindowReader(recordings, processor, sampling_rate, windows_per_batch)
        transcripts: list[Transcript] = []
        parts: list[Stretch] = []
        for stretch in self._stretches(reader, keep_frames=False):
            parts.append(stretch)
            if stretch.last:
                heard, starts = joined([part.heard for part in parts]), [part.start for part in parts]
                duration = reader.durations[stretch.recording]
                transcripts.append(ctc_transcript(heard, starts, duration, processor, self.config))
                parts = []
        return transcripts[0] if single else transcripts

    def _stretches(self, reader: "WindowReader", keep_frames: bool) -> Iterator[Stretch]:
        """The recordings seam to seam, in order."""
        blank = self.config.blank_id
        held: tuple[int, Heard, torch.Tensor] | None = None  # start, and what may still be cut off at its end
        begin = 0  # first frame of the held window that is its own
        for recording, window, heard, frames in self._heard_windows(reader, keep_frames):
            start = window.offset // MEL_PER_ALIGNED_FRAME
            if held is not None:
                before, held_heard, held_frames = held
                cut = best_cut(held_heard.token_ids, heard.token_ids, start - before, blank)
                own = None if held_frames is None else held_frames[begin:cut]
                yield Stretch(recording, before + begin, False, held_heard.cut(begin, cut), own)
                begin = cut - (start - before)
            held = start, heard, frames
            if window.last:
                own = None if frames is None else frames[begin:]
                yield Stretch(recording, start + begin, True, heard.cut(begin, None), own)
                held, begin = None, 0

    def _heard_windows(self, reader: "WindowReader", keep_frames: bool) -> Iterator[tuple]:
        """(recording, window, `Heard`, frames (A, D) or ``None``) of all windows, in order."""
        for ahead in reader.read_ahead(self.config.window_mel_frames):
            order = sorted(range(len(ahead)), key=lambda index: ahead[index][1].frames)
            heard: dict[int, tuple[Heard, torch.Tensor | None]] = {}
            for first in range(0, len(order), reader.windows_per_batch):
                batch = order[first : first + reader.windows_per_batch]
                heard.update(zip(batch, self._hear([ahead[i][1] for i in batch], keep_frames), strict=True))
            for index, (recording, window) in enumerate(ahead):
                yield (recording, window, *heard.pop(index))
            ahead.clear()  # before the next ones are read

    def _hear(self, windows: Sequence[Any], keep_frames: bool) -> list[tuple[Heard, torch.Tensor | None]]:
        """Windows, padded to the longest: see `hear`."""
        features = windows[0].features.new_zeros(
            len(windows), windows[0].features.shape[0], max(window.features.shape[1] for window in windows)
        )  # (n, M, T)
        for row, window in zip(features, windows, strict=True):
            row[:, : window.features.shape[1]] = window.features
        lengths = torch.tensor([window.frames for window in windows])
        return self.hear(features, torch.arange(features.shape[2]) < lengths[:, None], keep_frames)

    @torch.no_grad()
    def hear(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor, keep_frames: bool = False
    ) -> list[tuple[Heard, torch.Tensor | None]]:
        """What the CTC head hears in each window (n, M, T), and its frames (A, D) if wanted."""
        aligned = self.align(input_features.to(self.device), input_features_mask.to(self.device), greedy=False)
        counts = aligned.mask.sum(dim=1).tolist()
        scores = self.ctc_head.scores(aligned.frames[aligned.mask], self.ctc_rows())
        heard = map(Heard, *(values.cpu().split(counts) for values in scores))
        kept = [row[:count] if keep_frames else None for row, count in zip(aligned.frames, counts, strict=True)]
        return list(zip(heard, kept, strict=True))


class WindowReader:
    """The windows of a list of recordings, read as a stream: iterating yields (recording, `Window`).

    Raises:
        ValueError: for ``windows_per_batch`` below 1.
    """

    def __init__(self, recordings: Sequence[Any], processor: Any, sampling_rate: int | None, windows_per_batch: int):
        if windows_per_batch < 1:
            raise ValueError(f"windows_per_batch is {windows_per_batch}; expected at least 1.")
        self.recordings = recordings
        self.processor = processor
        self.sampling_rate = sampling_rate
        self.windows_per_batch = windows_per_batch
        self.durations = [0.0] * len(recordings)  # seconds read so far

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for index in range(len(self.recordings)):
            for window in self.processor.stream_windows(self._blocks(index)):
                yield index, window

    def read_ahead(self, window_mel_frames: int) -> Iterator[list[tuple[int, Any]]]:
        """As many windows as fill a batch of full ones; more of them if they are short, so that they can be sorted."""
        ahead: list[tuple[int, Any]] = []
        frames = 0
        for recording, window in self:
            ahead.append((recording, window))
            frames += window.features.shape[1]
            if frames >= self.windows_per_batch * window_mel_frames:
                yield ahead
                ahead, frames = [], 0
        if ahead:
            yield ahead

    def _blocks(self, index: int) -> Iterator[Any]:
        samples = 0
        for block in self.processor.stream_audio(self.recordings[index], self.sampling_rate):
            samples += len(block)
            self.durations[index] = samples / SAMPLING_RATE
            yield block


def ctc_peaks(heard: Heard, blank: int) -> tuple[list[int], list[Span]]:
    """Greedy CTC: the token ids, and of each its first frame, its end and its highest probability."""
    ids, blanks = heard.token_ids, torch.full((1,), blank)
    turns = (torch.cat([ids, blanks]) != torch.cat([blanks, ids])).nonzero().flatten().tolist()  # where runs begin
    tokens, peaks = [], []
    for first, stop in zip(turns, turns[1:], strict=False):
        if (token := int(ids[first])) != blank:
            tokens.append(token)
            peaks.append((first, stop, float(heard.log_probs[first:stop].max().exp())))
    return tokens, peaks


def ctc_transcript(heard: Heard, starts: Sequence[int], duration: float, processor: Any, config: Any) -> Transcript:
    """The transcript of what is heard in a whole recording, with a segment from each of ``starts`` (frames) on.

    A word belongs to the segment in which it begins.
    """
    ids, peaks = ctc_peaks(heard, config.blank_id)
    bounds = list(zip(starts, [*starts[1:], len(heard.token_ids)], strict=True))
    edges = [bisect_left(peaks, start, key=lambda peak: peak[0]) for start in starts]
    parts = (peaks[first:last] for first, last in zip(edges, [*edges[1:], len(peaks)], strict=True))
    spans = [span for part, (start, end) in zip(parts, bounds, strict=True) for span in spread_from(part, start, end)]
    tokens = timed_tokens(processor.tokenizer, ids, spans)
    segments: list[Segment] = []
    first = 0
    for start, end in bounds:
        last = first
        while last < len(tokens) and (tokens[last].start < end * FRAME_S or goes_on(tokens, last)):
            last += 1
        part, own = heard.cut(start, end), tokens[first:last]
        text = decoded(processor, [token.id for token in own]).strip()
        segment = Segment(text, start * FRAME_S, end * FRAME_S, own, group_words(own))
        segment.no_speech_prob, segment.compression = no_speech_prob(part), compression(part, config)
        segments.append(segment)
        first = last
    transcript = Transcript(decoded(processor, ids).strip(), segments, duration, ids)
    finish(transcript, heard, config)
    return transcript


def finish(transcript: Transcript, heard: Heard, config: Any) -> None:
    """Add what is known of a whole recording, and end everything with it: the last frame may reach beyond."""
    transcript.no_speech_prob, transcript.compression = no_speech_prob(heard), compression(heard, config)
    transcript.blank_probs = heard.blank_log_probs[: frames_of(transcript.duration)].exp()
    for timed in (*transcript.segments, *transcript.tokens, *transcript.words):
        timed.start, timed.end = (min(time, transcript.duration) for time in (timed.start, timed.end))


def frames_of(duration: float) -> int:
    """Aligned frames of a recording of so many seconds; a padded window has more."""
    return ceil(round(duration / FRAME_S, 3))


def spread_from(peaks: Sequence[Span], start: int, end: int) -> list[Span]:
    """Spans of the peaks of a segment from frame ``start`` to ``end``; none begins before it."""
    spans = spread([(first - start, stop - start, confidence) for first, stop, confidence in peaks], end - start)
    return [(first + start, stop + start, confidence) for first, stop, confidence in spans]


def goes_on(tokens: Sequence[TimedToken], index: int) -> bool:
    """Whether a token is of the same word as the one before it."""
    if index == 0:
        return False
    before, token = tokens[index - 1], tokens[index]
    return not token.text or len(group_words([before, token])) < len(group_words([before])) + len(group_words([token]))


def decoded(processor: Any, ids: Sequence[int]) -> str:
    """Token ids as text without special tokens, white space as it is."""
    return processor.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def no_speech_prob(heard: Heard) -> float:
    """The probability that the frame that is most like speech is silent; 1 - it is how sure the loudest peak is.

    Not that of the empty transcript, the product over all frames: it falls with the length of a silence.
    """
    return float(heard.blank_log_probs.min().exp())


def compression(heard: Heard, config: Any) -> float:
    """Aligned frames per position that the LLM would see."""
    ids = heard.token_ids[None]
    kept = int(collapse_runs(ids, torch.ones_like(ids, dtype=torch.bool), config.blank_id, config.keep_blanks).sum())
    return len(heard.token_ids) / min(kept, config.max_audio_positions or kept)
