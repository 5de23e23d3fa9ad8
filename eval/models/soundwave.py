"""Our own models: the whole one, which is asked, and stage I's ``SoundwaveForCTC``, whose transcripts are read.

``SoundwaveAudioModel`` takes items, as every model does; ``llm_answerer`` and ``ctc_answerer`` below it take training
rows, for validation. Letters: `B` rows, `N` prompt tokens.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch

from soundwave.eval.items import CellClip, Clip, FileClip, Item
from soundwave.eval.models.base import (
    GREEDY,
    ModelError,
    describe,
    keep_only_ids,
    load_weights,
    new_texts,
    read_config,
    text_of,
)
from soundwave.processing import SAMPLING_RATE
from soundwave.training.data import recordings
from soundwave.training.encoder_cache import EncoderCache

Row = dict[str, Any]
#: A batch of rows in, one answer per row out.
Answerer = Callable[[Sequence[Row]], list[str]]


class SoundwaveAudioModel:
    """A Soundwave model with its processor.

    Args:
        model: ``SoundwaveForConditionalGeneration``, or ``SoundwaveForCTC``: its transcripts then are the answers,
            whatever the instruction says.
        processor: Its ``SoundwaveProcessor``.
        source: Folder or Hub id it came from, for the files.
        commit: Of the Hub.
        encoder_cache: Features of the frozen encoder, as training keeps them; ``None`` runs the encoder.
        ctc: Read the CTC head of a whole model, too.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        source: str,
        commit: str | None = None,
        encoder_cache: EncoderCache | None = None,
        ctc: bool = False,
    ) -> None:
        self.model, self.processor, self.encoder_cache = model.eval(), processor, encoder_cache
        self._source, self._commit = source, commit
        self._answers = hasattr(model, "generate") and not ctc
        self.decoding: dict[str, Any] = {"strategy": "greedy CTC", "max_new_tokens": None}
        if self._answers:
            self.decoding = {"strategy": "greedy", **GREEDY, "system_prompt": processor.system_prompt}

    @classmethod
    def load(
        cls, source: str, config: Any, device: str, dtype: torch.dtype, commit: str | None, **hub: Any
    ) -> "SoundwaveAudioModel":
        """The model and the processor of a stage's folder or repository; ``config`` says of which kind it is."""
        from soundwave import SoundwaveForConditionalGeneration, SoundwaveForCTC, SoundwaveProcessor

        kind = SoundwaveForCTC if config.architectures == ["SoundwaveForCTC"] else SoundwaveForConditionalGeneration
        revision = {"revision": hub["revision"]}  # the code is this package's, whatever may be trusted
        processor = read_config(source, SoundwaveProcessor.from_pretrained, **revision)
        model = load_weights(source, kind, device, dtype, **revision)
        if hasattr(model, "generate"):
            keep_only_ids(model, processor.tokenizer.pad_token_id)
        return cls(model, processor, source, commit)

    def answer(self, items: Sequence[Item], max_new_tokens: int) -> list[str]:
        """Greedy answers, or transcripts: these are as long as their recordings, whatever ``max_new_tokens`` says."""
        make = llm_answerer if self._answers else ctc_answerer
        answer = make(self.model, self.processor, self.encoder_cache, max_new_tokens)
        return answer([self._row(item) for item in items])

    @cached_property
    def _description(self) -> dict[str, Any]:
        return describe(self.model, self._source, self._commit, "soundwave")

    def describe(self) -> dict[str, Any]:
        """As ``AudioModel`` says; the weights are hashed once."""
        return self._description

    def _row(self, item: Item) -> Row:
        asked = {"messages": item.messages} if item.messages else {"instruction": text_of(item)}
        if not (item.clips or self._answers):
            raise ModelError(f"item {item.id!r} has no recording, and a CTC head answers no text; leave it out")
        read = _samples if self.encoder_cache is None else _place
        return {"audio": [read(clip) for clip in item.clips] or None, **asked}


def _samples(clip: Clip) -> dict[str, Any]:
    return {"array": clip.read(), "sampling_rate": SAMPLING_RATE}


def _place(clip: Clip) -> dict[str, Any]:
    """A recording as an encoder cache knows it."""
    if isinstance(clip, CellClip):
        return clip.cell()
    if isinstance(clip, FileClip) and not clip.start_s and clip.end_s is None:
        return {"path": str(clip.path), "bytes": None}
    raise ModelError(f"{clip.name}: an encoder cache holds whole recordings only; evaluate segments without it")


def llm_answerer(
    model: Any,
    processor: Any,
    encoder_cache: EncoderCache | None,
    max_new_tokens: int,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Answerer:
    """Greedy answers of a whole model to batches of rows.

    ``autocast`` is entered for the model alone, whose parts may be of several types: log-mel features need float32.
    """
    tokenizer = processor.tokenizer

    @torch.inference_mode()
    def answer(batch: Sequence[Row]) -> list[str]:
        inputs = generation_inputs(model, processor, batch, encoder_cache)
        with autocast():
            ids = model.generate(
                **inputs, **GREEDY, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id
            )
        return new_texts(model, tokenizer, ids, inputs["input_ids"].shape[1], max_new_tokens)

    return answer


def ctc_answerer(
    model: Any,
    processor: Any,
    encoder_cache: EncoderCache | None,
    max_new_tokens: int | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Answerer:
    """Greedy transcripts of the CTC head in the place of answers; ``max_new_tokens`` bounds nothing here."""
    del max_new_tokens  # a transcript is as long as its recording

    @torch.inference_mode()
    def answer(batch: Sequence[Row]) -> list[str]:
        inputs = audio_inputs(model, processor, batch, encoder_cache)
        with autocast():
            ids = model.transcribe_ids(**inputs)
        texts = iter(processor.tokenizer.batch_decode(ids, skip_special_tokens=True))
        # Several recordings of one row make one text, like their parallel transcripts.
        return [" ".join(next(texts).strip() for _ in recordings(row)) for row in batch]

    return answer


def generation_inputs(
    model: Any, processor: Any, rows: Sequence[Row], encoder_cache: EncoderCache | None = None
) -> dict[str, Any]:
    """Prompts (B, N), padded on the left, and the recordings of a batch, as ``generate`` takes them."""
    prompts = [processor.prompt_ids(processor.example_messages(row)) for row in rows]
    length = max(len(ids) for ids in prompts)
    input_ids = torch.full((len(rows), length), processor.tokenizer.pad_token_id)  # (B, N)
    attention_mask = torch.zeros_like(input_ids)
    for i, ids in enumerate(prompts):
        input_ids[i, length - len(ids) :] = torch.tensor(ids)
        attention_mask[i, length - len(ids) :] = 1
    inputs = {"input_ids": input_ids.to(model.device), "attention_mask": attention_mask.to(model.device)}
    return inputs | audio_inputs(model, processor, rows, encoder_cache)


def audio_inputs(
    model: Any, processor: Any, rows: Sequence[Row], encoder_cache: EncoderCache | None = None
) -> dict[str, Any]:
    """The recordings of a batch on the model's device; empty for rows without audio."""
    clips = [clip for row in rows for clip in recordings(row)]
    if not clips:
        return {}
    if encoder_cache is not None:
        inputs = encoder_cache.batch(clips)
    else:
        inputs = processor.audio_features([processor.load_audio(clip) for clip in clips])
    return {
        key: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for key, value in inputs.items()
    }
