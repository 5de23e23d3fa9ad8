"""Rows to a batch: prompts and answers padded on the left, labels, CTC targets, and the audio or its cached features.

Letters: `B` batch, `N` prompt tokens, `A` aligned frames (40 ms), `U` target tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from soundwave.processing import AudioError
from soundwave.processing.audio_soundwave import mel_frames
from soundwave.processing.messages_soundwave import ChatError
from soundwave.training.data import DataError, recordings, transcripts
from soundwave.training.encoder_cache import MEL_PER_ALIGNED_FRAME, EncoderCache, Window
from soundwave.training.stages import ConfigError

IGNORED = -100  # label of a token that is not learned
NO_TRANSCRIPT = -1  # CTC target length of a recording without transcript; 0 means that nothing is said


class BadRow(DataError):
    """A row that nothing can be learned from.

    `reason` is one of

    - `"unreadable_audio"`: a recording is missing, broken, empty, holds NaN, or its URL fails
    - `"no_audio"`: where only CTC is learned
    - `"empty_answer"`: none, or white space, where answers are learned
    - `"empty_transcript"`: text without tokens; in stage I also no transcript at all, or an empty one that the row's
      answer does not bear out (an empty transcript beside an answer, `"silence"`, means that nothing is said)
    - `"bad_text"`: a conversation that the chat template refuses, or a token that the CTC head cannot emit
    - `"too_long"`: prompt, recordings and answer exceed the LLM's context
    - `"target_too_long"`: a CTC target does not fit the frames of its recording
    """

    def __init__(self, detail: str, reason: str = ""):
        super().__init__(detail)
        self.reason = reason


@dataclass
class Example:
    """A row made ready for a batch."""

    prompt: list[int] = field(default_factory=list)  # token ids
    answer: list[int] = field(default_factory=list)  # token ids, the closing one included
    audio: list[Any] = field(default_factory=list)  # waveforms (n,) at 16 kHz, or the windows of a cache
    targets: list[list[int] | None] = field(default_factory=list)  # CTC target of each recording


class SoundwaveCollator:
    """Makes the tensors that the model's `forward` takes from rows of `data.load_rows`.

    Args:
        processor: a `SoundwaveProcessor`.
        losses: of the stage: `"answer"` adds `input_ids`, `attention_mask` and `labels` (B, N), `"ctc"` adds
            `ctc_labels` (n_audios, U) and `ctc_label_lengths` (n_audios,).
        cache: features of the frozen encoder in place of audio.
        config: the model's `SoundwaveConfig`, which bounds what fits; `None` = the length of rows is not checked.
    """

    def __init__(
        self,
        processor: Any,
        losses: Sequence[str] = ("answer", "ctc"),
        cache: EncoderCache | None = None,
        config: Any = None,
    ):
        self.processor, self.losses, self.cache, self.config = processor, tuple(losses), cache, config

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of some rows; recordings in order of appearance.

        Raises:
            BadRow: for the first row that nothing can be learned from.
        """
        return self.batch([self.example(row) for row in rows])

    # One row

    def example(self, row: Mapping[str, Any]) -> Example:
        """A row's token ids and recordings: all that can fail in it.

        Raises:
            BadRow: with its reason.
        """
        example = Example()
        if "ctc" in self.losses:
            example.targets = self._targets(row)
        if "answer" in self.losses:
            example.prompt, example.answer = self._ids(row)
        clips = recordings(row)
        if not clips and "answer" not in self.losses:
            raise BadRow(
                f"the row {row['id']!r} has no audio, and stage I trains on recordings only; leave it out.", "no_audio"
            )
        example.audio = [self._read(clip) for clip in clips]
        self._check_lengths(example)
        return example

    def _ids(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Ids of prompt and answer."""
        if row.get("messages"):
            # Arrow fills the fields of every item: an audio item comes back with a text of None.
            turns = [
                {**turn, "content": [{k: v for k, v in item.items() if v is not None} for item in turn["content"]]}
                for turn in row["messages"]
            ]
            row = {**row, "messages": turns}
        elif row.get("answer") is None:
            raise BadRow(
                f"the row {row['id']!r} has no answer, which stages II and III learn from; only stage I can use it.",
                "empty_answer",
            )
        try:
            messages = self.processor.example_messages(row)
            if not any(item.get("text", "").strip() for item in messages[-1]["content"]):
                raise BadRow("the answer is empty; give its text, or leave the row out.", "empty_answer")
            return self.processor.prompt_and_answer_ids(messages)
        except ChatError as error:
            raise BadRow(str(error), "bad_text") from error

    def _targets(self, row: Mapping[str, Any]) -> list[list[int] | None]:
        """CTC target of each recording: `None` where there is no transcript, [] where nothing is said."""
        texts = transcripts(row)
        if texts and "answer" not in self.losses and all(text is None for text in texts):
            raise BadRow("no transcript, which is all that stage I learns from.", "empty_transcript")
        answered = bool(row.get("messages") or (row.get("answer") or "").strip())
        targets: list[list[int] | None] = []
        for text in texts:
            if text is None:
                targets.append(None)
                continue
            try:
                targets.append(self.processor.ctc_label_ids(text))
            except ChatError as error:
                raise BadRow(str(error), "bad_text") from error
            if not targets[-1] and (text.strip() or not answered):
                raise BadRow(
                    f"the transcript {text!r} has no tokens; where nothing is said on purpose, say so in the answer "
                    "('silence').",
                    "empty_transcript",
                )
        allowed = getattr(self.config, "ctc_token_ids", None)
        unknown = {token for ids in targets for token in ids or ()}.difference(allowed or ()) if allowed else set()
        if unknown:
            raise BadRow(
                f"a transcript holds the token ids {sorted(unknown)[:5]}, which config.ctc_token_ids does not list.",
                "bad_text",
            )
        return targets

    def _read(self, clip: Mapping[str, Any]) -> np.ndarray | list[Window]:
        """The waveform of a recording, or its windows in the cache."""
        try:
            return self.processor.load_audio(clip) if self.cache is None else self.cache.windows(clip)
        except (AudioError, ConfigError, OSError) as error:
            raise BadRow(str(error), "unreadable_audio") from error

    def _check_lengths(self, example: Example) -> None:
        """Refuse what does not fit. Before the model ran, a recording counts with all of its frames."""
        frames = [self._frames(audio) for audio in example.audio]
        for target, A in zip(example.targets, frames, strict=False):
            repeats = sum(a == b for a, b in zip(target[1:], target, strict=False)) if target else 0
            if target and len(target) + repeats > A:
                raise BadRow(
                    f"the transcript's {len(target)} tokens, and {repeats} blanks between equal ones, do not fit the "
                    f"{A} frames of 40 ms of its recording.",
                    "target_too_long",
                )
        context = getattr(getattr(self.config, "text_config", None), "max_position_embeddings", None)
        if context is None or "answer" not in self.losses:
            return
        budget = self.config.max_audio_positions
        heard = sum(A if budget is None else min(A, budget) for A in frames)
        text = len(example.prompt) - len(frames) + len(example.answer)  # without the placeholders
        if text + heard > context:
            raise BadRow(
                f"{text} tokens of prompt and answer and up to {heard} positions of audio exceed the LLM's context of "
                f"{context}; cut the answer or the recording, or set model.max_audio_positions.",
                "too_long",
            )

    def _frames(self, audio: np.ndarray | list[Window]) -> int:
        """Aligned frames (40 ms) of a recording."""
        if self.cache is None:
            return mel_frames(len(audio)) // MEL_PER_ALIGNED_FRAME
        _, _, mel, offset = audio[-1]
        return (offset + mel) // MEL_PER_ALIGNED_FRAME

    # A batch

    def batch(self, examples: Sequence[Example]) -> dict[str, Any]:
        """The tensors of some examples, which do not fail any more."""
        batch: dict[str, torch.Tensor] = {}
        if "answer" in self.losses:
            batch |= self._text(examples)
        audio = [recording for example in examples for recording in example.audio]
        if audio:
            batch |= self.processor.audio_features(audio) if self.cache is None else self.cache.features_of(audio)
            if "ctc" in self.losses:
                batch |= _padded_targets([target for example in examples for target in example.targets])
        return batch

    def silence(self) -> Example:
        """An example that teaches nothing: for a batch whose rows are all bad, as the other devices wait for it."""
        if "answer" in self.losses:
            return Example(prompt=[self.processor.tokenizer.pad_token_id])
        audio: Any = np.zeros(1, np.float32) if self.cache is None else [(0, 0, MEL_PER_ALIGNED_FRAME, 0)]
        return Example(audio=[audio], targets=[None])

    def _text(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        N = max(len(example.prompt) + len(example.answer) for example in examples)
        input_ids = torch.full((len(examples), N), self.processor.tokenizer.pad_token_id)
        labels = torch.full((len(examples), N), IGNORED)
        attention_mask = torch.zeros((len(examples), N), dtype=torch.long)
        for k, example in enumerate(examples):
            start = N - len(example.prompt) - len(example.answer)
            input_ids[k, start:] = torch.tensor(example.prompt + example.answer)
            labels[k, N - len(example.answer) :] = torch.tensor(example.answer, dtype=torch.long)
            attention_mask[k, start:] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _padded_targets(targets: Sequence[list[int] | None]) -> dict[str, torch.Tensor]:
    U = max(1, *(len(ids or ()) for ids in targets), 1)
    labels = torch.zeros((len(targets), U), dtype=torch.long)
    for row, ids in zip(labels, targets, strict=True):
        row[: len(ids or ())] = torch.tensor(ids or [], dtype=torch.long)
    lengths = torch.tensor([NO_TRANSCRIPT if ids is None else len(ids) for ids in targets])
    return {"ctc_labels": labels, "ctc_label_lengths": lengths}
