"""Transcripts while audio arrives: what two decodings in a row agree on is stable (Liu et al. 2020).

Letters: M mel bins, T mel frames (10 ms), A aligned frames (40 ms).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from .seams_soundwave import best_cut, runs_of
from .transcribing_soundwave import MEL_PER_ALIGNED_FRAME, SAMPLING_RATE, Heard, ctc_transcript, decoded, joined
from .transcripts_soundwave import PartialTranscript
from .words_soundwave import INCOMPLETE

SAMPLES_PER_FRAME = 640  # 40 ms
STEP = SAMPLING_RATE // 2  # samples of new audio for which the window is decoded anew: half a second
LAG_SHARE = 30  # of a window (1 s of Whisper's): at the end of what is heard, words may be half
CONTEXT = 8  # tokens before new ones that tell how these are written


class SoundwaveStreamingMixin:
    """Partial results of the CTC head."""

    @torch.no_grad()
    def stream_ctc(
        self, chunks: Iterable[Any], processor: Any, sampling_rate: int | None = None
    ) -> Iterator[PartialTranscript]:
        """Transcribe audio that arrives in chunks: `transcribe_ctc(..., streaming=True)`.

        The window in which the newest audio lies, one of those of the whole recording, is decoded anew for every half
        second that came. What two decodings in a row agree on, up to a silence at least a thirtieth of a window
        before the end of what is heard, is stable. Work per second of audio and memory, but for the transcript
        itself, do not depend on the length of the stream.

        The result may differ from that of `transcribe_ctc` on the whole recording: what is stable was heard without
        what is said more than about a second after it.

        Args:
            chunks: samples (n,) of any length each, as `load_audio` takes them.
            processor: a `SoundwaveProcessor`.
            sampling_rate: of the chunks, in Hz.

        Yields:
            A `PartialTranscript` per decoding; ``text`` only grows. The last has everything in it, and the whole
            `Transcript`.

        Raises:
            ValueError: for a stream without samples, with NaN or infinite ones, without a sampling rate, or longer
                than ``processor.audio_limits`` allow.
        """
        stream = _Stream(self, processor)
        for block in processor.stream_audio(iter(chunks), sampling_rate):
            stream.take(torch.as_tensor(block))
            if stream.fresh >= STEP:
                stream.decode()
                yield stream.partial()
        yield stream.end()


class _Stream:
    """What is known of a stream; frames and samples are counted from its beginning."""

    def __init__(self, model: Any, processor: Any):
        self.model = model
        self.processor = processor
        self.blank: int = model.config.blank_id
        window = model.config.window_mel_frames // MEL_PER_ALIGNED_FRAME  # frames
        self.step, self.lag = window * 5 // 6, -(-window // LAG_SHARE)  # from one window to the next; not yet certain
        self.start = 0  # frame at which the window begins
        self.buffer = torch.zeros(window * SAMPLES_PER_FRAME)  # the window, as far as it was heard:
        self.n_samples = 0
        self.fresh = 0  # samples that were not decoded yet
        self.heard = Heard(*(torch.zeros(0, dtype=dtype) for dtype in (torch.long, torch.float, torch.float)))
        self.stable: list[Heard] = []
        self.stable_end = 0  # frame up to which nothing changes any more
        self.last = self.blank  # label of the frame before
        self.seams = [0]  # frames at which a window took over
        self.text = _GrowingText(processor)

    @property
    def samples(self) -> torch.Tensor:
        """What is heard of the window (n,)."""
        return self.buffer[: self.n_samples]

    def take(self, samples: torch.Tensor) -> None:
        """Samples (n,) that have arrived; a full window is left when more come."""
        while len(samples):
            if self.n_samples == len(self.buffer):
                self._move_on()
            count = min(len(samples), len(self.buffer) - self.n_samples)
            self.buffer[self.n_samples : self.n_samples + count] = samples[:count]
            self.n_samples += count
            self.fresh += count
            samples = samples[count:]

    def decode(self) -> None:
        """Decode the window anew, and call stable what was heard the same the last time."""
        before, self.heard = self.heard, self._hear()
        first = self.stable_end - self.start
        certain = self.heard.cut(first, max(len(self.heard.token_ids) - self.lag, first))
        both = (before.cut(first, None).token_ids.tolist(), certain.token_ids.tolist())
        self._keep(self.stable_end + agreed(*both, self.last, self.blank))

    def _hear(self) -> Heard:
        features = self.processor.audio_features([self.samples.numpy()])
        self.fresh = 0
        n_frames = -(-self.n_samples // SAMPLES_PER_FRAME)  # a padded window has more
        return self.model.hear(features["input_features"], features["input_features_mask"])[0][0].cut(0, n_frames)

    def _move_on(self) -> None:
        """Go to the next window; what lies before the seam with it becomes stable."""
        if self.fresh:
            self.decode()
        rest = self.samples[self.step * SAMPLES_PER_FRAME :].clone()
        self.n_samples = len(rest)
        self.samples[:] = rest
        following = self._hear()
        certain = following.token_ids[: len(following.token_ids) - self.lag]
        first = self.heard.token_ids[: self.step + len(certain)]
        self._keep(self.start + best_cut(first, certain, self.step, self.blank))
        self.start, self.heard = self.start + self.step, following
        self.seams.append(self.stable_end)

    def _keep(self, end: int) -> None:
        """What the window holds up to a frame is stable."""
        if end > self.stable_end:
            part = self.heard.cut(self.stable_end - self.start, end - self.start)
            self.text.add(runs_of(part.token_ids.tolist(), self.blank, self.last))
            self.stable.append(Heard(*(values.clone() for values in part)))  # a slice would hold the whole window
            self.stable_end, self.last = end, int(part.token_ids[-1])

    def partial(self) -> PartialTranscript:
        """What is stable, and what may still change."""
        rest = self.heard.token_ids[self.stable_end - self.start :].tolist()
        text, tail = self.text.with_tail(runs_of(rest, self.blank, self.last))
        return PartialTranscript(text, tail, (self.start * SAMPLES_PER_FRAME + self.n_samples) / SAMPLING_RATE)

    def end(self) -> PartialTranscript:
        """All of it."""
        if self.fresh:
            self.decode()
        self._keep(self.start + len(self.heard.token_ids))
        value = self.partial()
        value.text, value.tail = value.text + value.tail, ""
        value.transcript = ctc_transcript(
            joined(self.stable), self.seams, value.duration, self.processor, self.model.config
        )
        value.transcript.text = value.text
        return value


def agreed(before: Sequence[int], heard: Sequence[int], last: int, blank: int) -> int:
    """How far two decodings of the same frames agree: up to the middle of the last silence that is common to both.

    Args:
        before: labels of the one.
        heard: labels of the other; further frames of the longer one do not count.
        last: label of the frame before both.
        blank: label of the blank.

    Returns:
        A number of frames; in as many of each the same tokens begin.
    """
    said: tuple[list[int], list[int]] = [], []
    labels = (last, last)
    end = silent = 0
    for frame, pair in enumerate(zip(before, heard, strict=False)):
        for tokens, label, previous in zip(said, pair, labels, strict=True):
            if label not in (blank, previous):
                tokens.append(label)
        labels = pair
        shared = min(map(len, said))
        if shared and said[0][shared - 1] != said[1][shared - 1]:
            break
        silent = silent + 1 if pair == (blank, blank) and len(said[0]) == len(said[1]) else 0
        if silent:
            end = frame + 1 - (silent + 1) // 2
    return end


class _GrowingText:
    """Text that tokens are added to: decoded a few at a time, never in the middle of a character."""

    def __init__(self, processor: Any):
        self.processor = processor
        self.text = ""
        self.context: list[int] = []  # the last tokens of the text: they tell whether a space comes first
        self.waiting: list[int] = []  # tokens that begin a character

    def add(self, ids: Sequence[int]) -> None:
        """Tokens that are stable."""
        self.waiting += ids
        written = self._written(self.waiting)
        if not written.endswith(INCOMPLETE):
            self.text += written
            self.context, self.waiting = (self.context + self.waiting)[-CONTEXT:], []

    def with_tail(self, ids: Sequence[int]) -> tuple[str, str]:
        """The text, and what it goes on with if further tokens are ``ids``; joined they are the whole."""
        text = self.text.rstrip()
        return text, (self.text + self._written([*self.waiting, *ids])).rstrip()[len(text) :]

    def _written(self, ids: Sequence[int]) -> str:
        behind = decoded(self.processor, self.context)
        written = decoded(self.processor, [*self.context, *ids])[len(behind) :]
        return written if self.text else written.lstrip()
