"""Recordings of any length to transcripts by the LLM: stretch by stretch, each from one seam of windows to the next.

Letters: n stretches, A aligned frames (40 ms), D LLM width, N prompt tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from .seams_soundwave import blank_runs, runs_of
from .speech_soundwave import AlignedAudio
from .transcribing_soundwave import (
    Heard,
    Stretch,
    WindowReader,
    compression,
    decoded,
    finish,
    joined,
    no_speech_prob,
    recordings_of,
)
from .transcripts_soundwave import Segment, Transcript
from .words_soundwave import FRAME_S, group_words, timed_tokens

# Bound on a transcript: fast speech has about 5 words a second, and a small vocabulary several tokens a word.
TOKENS_BESIDES, TOKENS_PER_SECOND = 64, 20


class SoundwaveLLMTranscribingMixin:
    """Transcripts by the LLM: times run through, memory is bounded whatever the length."""

    @torch.no_grad()
    def transcribe(
        self,
        audio: Any,
        processor: Any,
        sampling_rate: int | None = None,
        timestamps: bool = False,
        ctc_draft: bool = False,
        language: str | None = None,
        bias: Sequence[str] | None = None,
        max_new_tokens: int | None = None,
        windows_per_batch: int = 8,
        on_segment: Callable[[Segment], None] | None = None,
    ) -> Any:
        """Transcribe recordings of any length: each stretch between two seams is a question to the LLM of its own.

        Windows are read from the recordings as a stream; at most `windows_per_batch` stretches, of one recording or
        several, are held and answered together. A stretch in which the CTC head hears no token at all gets no text,
        without asking the LLM. Decoding is greedy.

        Args:
            audio: one recording in any form that the processor's `load_audio` takes, or a list of them.
            processor: a `SoundwaveProcessor`.
            sampling_rate: of recordings given as bare waveforms, in Hz.
            timestamps: whether to align each segment's text to its frames: tokens and words with times.
            ctc_draft: whether the CTC tokens are the draft that the LLM verifies (see `generate`).
            language: a hint for the prompt.
            bias: words that are likely to be said: their scores are raised (the processor's `sequence_bias`), which
                needs no LLM that was trained on hints.
            max_new_tokens: per stretch; ``None`` = 64, and 20 for each second of it.
            windows_per_batch: bounds the memory.
            on_segment: called with each segment, in order, as soon as its batch is answered.

        Returns:
            A `Transcript`, or a list of them for a list, with a `Segment` per stretch, empty ones included. Where
            ``config.max_transcript_seconds`` says what the LLM was trained on, longer stretches are cut at pauses. A
            segment is ``cut`` when the limit, or the end of the LLM's context, ended its text. ``llm_forwards`` counts
            those of all batches that a recording had a stretch in.

        Raises:
            ValueError: for a recording that cannot be read, a hint that the processor refuses, ``max_new_tokens`` or
                ``windows_per_batch`` below 1, or a prompt over the LLM's context.
        """
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1, or None for what is usual.")
        recordings, single = recordings_of(audio)
        reader = WindowReader(recordings, processor, sampling_rate, windows_per_batch)
        prompt = torch.tensor(processor.transcription_ids(language))  # (N,)
        options = {} if not bias else {"sequence_bias": processor.sequence_bias(bias)}
        transcripts = [Transcript("", [], 0.0, language=language, llm_forwards=0) for _ in recordings]
        parts: list[list[Heard]] = [[] for _ in recordings]
        longest = self.config.max_transcript_seconds
        stretches: Iterator[Stretch] = self._stretches(reader, keep_frames=True)
        if longest is not None:
            stretches = (piece for whole in stretches for piece in cut_at_pauses(whole, longest, self.config.blank_id))
        while batch := list(islice(stretches, windows_per_batch)):
            limits = [max_new_tokens or limit_of(stretch) for stretch in batch]
            answers, forwards = self._answers(batch, prompt, limits, ctc_draft, options)
            for index in {stretch.recording for stretch in batch}:
                transcripts[index].llm_forwards = (transcripts[index].llm_forwards or 0) + forwards
            for stretch, (ids, cut) in zip(batch, answers, strict=True):
                parts[stretch.recording].append(stretch.heard)
                transcript = transcripts[stretch.recording]
                transcript.segments.append(self._segment(stretch, ids, cut, processor, timestamps))
                transcript.token_ids += ids
                if on_segment is not None:
                    on_segment(transcript.segments[-1])
                if stretch.last:
                    transcript.text = " ".join(segment.text for segment in transcript.segments if segment.text)
                    transcript.duration = reader.durations[stretch.recording]
                    finish(transcript, joined(parts[stretch.recording]), self.config)
                    parts[stretch.recording] = []
        return transcripts[0] if single else transcripts

    def _answers(
        self, batch: Sequence[Stretch], prompt: torch.Tensor, limits: Sequence[int], ctc_draft: bool, options: dict
    ) -> tuple[list[tuple[list[int], bool]], int]:
        """Answer ids per stretch and whether a limit cut them, and the forwards of the LLM."""
        blank = self.config.blank_id
        drafts = [runs_of(stretch.heard.token_ids.tolist(), blank) for stretch in batch]
        spoken = [index for index, draft in enumerate(drafts) if draft]
        answers: list[tuple[list[int], bool]] = [([], False) for _ in batch]
        if not spoken:
            return answers, 0
        frames = [batch[index].frames for index in spoken]
        mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in frames], batch_first=True)
        ids = pad_sequence([batch[index].heard.token_ids for index in spoken], True, blank)
        padded = pad_sequence(frames, batch_first=True)  # (n, A, D)
        shrunk = self.shrink(AlignedAudio(padded, mask.to(padded.device), ids.to(padded.device)))
        input_ids = prompt.to(padded.device).expand(len(spoken), -1)  # (n, N)
        output = self.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            audio_embeds=shrunk.embeds,
            audio_lengths=shrunk.lengths,
            ctc_draft=[drafts[index] for index in spoken] if ctc_draft else None,
            max_new_tokens=1 + max(limits[index] for index in spoken),  # one more: the end of the longest
            do_sample=False,
            return_dict_in_generate=True,
            **options,
        )
        ends = self.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        for index, row in zip(spoken, output.sequences[:, len(prompt) :].tolist(), strict=True):
            limit = limits[index]  # the LLM's context may end an answer earlier
            end = next((place for place, token in enumerate(row[: limit + 1]) if token in ends), None)
            answers[index] = (row[:limit], True) if end is None else (row[:end], False)
        return answers, output.llm_forwards

    def _segment(self, stretch: Stretch, ids: list[int], cut: bool, processor: Any, timestamps: bool) -> Segment:
        """The segment of a stretch and the ids that the LLM answered."""
        start = stretch.start * FRAME_S
        segment = Segment(
            text=decoded(processor, ids).strip(),
            start=start,
            end=(stretch.start + len(stretch.heard.token_ids)) * FRAME_S,
            no_speech_prob=no_speech_prob(stretch.heard),
            compression=compression(stretch.heard, self.config),
            cut=cut,
        )
        if timestamps and ids:
            spans = self.align_frames(stretch.frames, ids, strict=False)
            segment.tokens = timed_tokens(processor.tokenizer, ids, spans, start)
            segment.words = group_words(segment.tokens)
        return segment


def cut_at_pauses(stretch: Stretch, max_seconds: float, blank: int) -> Iterator[Stretch]:
    """A stretch in pieces of at most ``max_seconds``, cut in the longest silence of each piece's second half.

    Without any blank frame there the piece is cut at its longest.
    """
    n_frames, most = len(stretch.heard.token_ids), max(1, int(max_seconds / FRAME_S + 1e-6))
    start = 0
    while start < n_frames:
        end = n_frames
        if n_frames - start > most:
            first = start + most // 2
            runs = blank_runs(stretch.heard.token_ids[first : start + most].tolist(), blank)
            begin, stop = max(runs, key=lambda run: run[1] - run[0], default=(most, most))
            end = min(first + (begin + stop + 1) // 2, start + most)
        own = None if stretch.frames is None else stretch.frames[start:end]
        part = stretch.heard.cut(start, end)
        yield Stretch(stretch.recording, stretch.start + start, stretch.last and end == n_frames, part, own)
        start = end


def limit_of(stretch: Stretch) -> int:
    """The longest transcript that is expected of a stretch, in tokens."""
    return TOKENS_BESIDES + int(TOKENS_PER_SECOND * FRAME_S * len(stretch.heard.token_ids))
