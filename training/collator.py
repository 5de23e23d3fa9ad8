"""Rows to a batch: prompts and answers padded on the left, labels, CTC targets, and the audio or its cached features.

Letters: `B` batch, `N` prompt tokens, `U` target tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from soundwave.training.data import DataError, recordings, transcripts
from soundwave.training.encoder_cache import EncoderCache

IGNORED = -100  # label of a token that is not learned
NO_TRANSCRIPT = -1  # CTC target length of a recording without transcript; 0 means that nothing is said


class SoundwaveCollator:
    """Makes the tensors that the model's `forward` takes from rows of `data.load_rows`.

    Args:
        processor: a `SoundwaveProcessor`.
        losses: of the stage: `"answer"` adds `input_ids`, `attention_mask` and `labels` (B, N), `"ctc"` adds
            `ctc_labels` (n_audios, U) and `ctc_label_lengths` (n_audios,).
        cache: features of the frozen encoder in place of audio.
    """

    def __init__(self, processor: Any, losses: Sequence[str] = ("answer", "ctc"), cache: EncoderCache | None = None):
        self.processor, self.losses, self.cache = processor, tuple(losses), cache

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch of some rows; recordings in order of appearance.

        Raises:
            DataError: for rows without audio where only CTC is learned, or a row without answer where answers are.
        """
        batch: dict[str, torch.Tensor] = {}
        if "answer" in self.losses:
            batch |= self._text(rows)
        clips = [clip for row in rows for clip in recordings(row)]
        if not clips and "answer" not in self.losses:
            raise DataError(
                f"the rows {[row['id'] for row in rows]} have no audio; stage I trains on recordings only."
            )
        if clips:
            batch |= self._audio(clips)
            if "ctc" in self.losses:
                batch |= self._ctc([text for row in rows for text in transcripts(row)])
        return batch

    def _text(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        pairs = [self._ids(row) for row in rows]
        N = max(len(prompt) + len(answer) for prompt, answer in pairs)
        pad = self.processor.tokenizer.pad_token_id
        input_ids = torch.full((len(rows), N), pad)
        labels = torch.full((len(rows), N), IGNORED)
        attention_mask = torch.zeros((len(rows), N), dtype=torch.long)
        for k, (prompt, answer) in enumerate(pairs):
            start = N - len(prompt) - len(answer)
            input_ids[k, start:] = torch.tensor(prompt + answer)
            labels[k, N - len(answer) :] = torch.tensor(answer)
            attention_mask[k, start:] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

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
            raise DataError(
                f"the row {row['id']!r} has no answer, which stages II and III learn from; only stage I can use it."
            )
        return self.processor.prompt_and_answer_ids(self.processor.example_messages(row))

    def _audio(self, clips: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if self.cache is not None:
            return self.cache.batch(clips)
        return dict(self.processor.audio_features([self.processor.load_audio(clip) for clip in clips]))

    def _ctc(self, texts: list[str | None]) -> dict[str, torch.Tensor]:
        targets = [
            None if text is None else self.processor.ctc_label_ids(text) if text.strip() else [] for text in texts
        ]
        U = max(1, *(len(ids or ()) for ids in targets), 1)
        labels = torch.zeros((len(targets), U), dtype=torch.long)
        for row, ids in zip(labels, targets, strict=True):
            row[: len(ids or ())] = torch.tensor(ids or [], dtype=torch.long)
        lengths = torch.tensor([NO_TRANSCRIPT if ids is None else len(ids) for ids in targets])
        return {"ctc_labels": labels, "ctc_label_lengths": lengths}
