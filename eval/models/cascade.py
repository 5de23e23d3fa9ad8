"""Speech recognition, then a text LLM: the baseline that the paper calls "Whisper + GPT-4".

What was recognised takes the place of the recording in the prompt, and stays in the item's fields as ``transcripts``,
so that an answer that went wrong can be traced to the half that failed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCTC, AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CTC_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

from soundwave.eval.items import Item
from soundwave.eval.models.base import (
    GREEDY,
    AudioModel,
    ModelError,
    describe,
    load_weights,
    read_config,
    text_of,
)
from soundwave.processing import SAMPLING_RATE

#: Class -> types that write down what is said.
RECOGNISERS: dict[Any, Mapping[str, str]] = {
    AutoModelForCTC: MODEL_FOR_CTC_MAPPING_NAMES,
    AutoModelForSpeechSeq2Seq: MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
}
#: In front of the instruction; a recording without one is the user's own words.
PROMPT = "Transcript of recording {number}: {transcript}"


class Transcriber:
    """Any speech recogniser of transformers' ``automatic-speech-recognition`` pipeline.

    Load it with ``Transcriber.load``.
    """

    def __init__(self, recognise: Any, source: str, commit: str | None) -> None:
        self._pipeline, self._source, self._commit = recognise, source, commit
        self._generation = {} if recognise.type == "ctc" else {"generate_kwargs": GREEDY}
        self.decoding = {"strategy": "greedy", **self._generation.get("generate_kwargs", {})}
        # Whisper goes through a long recording window by window, led by its own time stamps.
        self._window_s = recognise.feature_extractor.chunk_length if recognise.type == "seq2seq_whisper" else None

    @classmethod
    def load(
        cls, source: str, config: Any, device: str, dtype: torch.dtype, commit: str | None, **hub: Any
    ) -> "Transcriber":
        """The recogniser of a folder or of the Hub."""
        kind = next((kind for kind, names in RECOGNISERS.items() if config.model_type in names), None)
        if kind is None:
            raise ModelError(f"{source} ({config.model_type}) is no speech recogniser; a cascade begins with one")
        processor = read_config(source, AutoProcessor.from_pretrained, **hub)
        parts = {"tokenizer": processor.tokenizer, "feature_extractor": processor.feature_extractor}
        model = load_weights(source, kind, device, dtype, **hub)
        recognise = pipeline("automatic-speech-recognition", model=model, device=device, dtype=dtype, **parts)
        return cls(recognise, source, commit)

    def transcribe(self, waveforms: Sequence[np.ndarray]) -> list[str]:
        """What is said in waveforms (samples,) at 16 kHz."""
        texts = dict.fromkeys(range(len(waveforms)), "")
        for chosen, options in self._groups(waveforms):
            sounds = [{"raw": waveforms[index], "sampling_rate": SAMPLING_RATE} for index in chosen]
            results = self._pipeline(sounds, **options, **self._generation)
            texts |= {index: result["text"].strip() for index, result in zip(chosen, results, strict=True)}
        return list(texts.values())

    def _groups(self, waveforms: Sequence[np.ndarray]) -> list[tuple[list[int], dict[str, Any]]]:
        """Which waveforms go through the pipeline together, and its options for them."""
        everything = list(range(len(waveforms)))
        if self._window_s is None:  # other recognisers hear the padding of a batch
            return [(everything, {"batch_size": 1})] if everything else []
        short = [index for index in everything if len(waveforms[index]) <= self._window_s * SAMPLING_RATE]
        long = sorted(set(everything) - set(short))
        groups = [(short, {"batch_size": len(short)}), (long, {"batch_size": 1, "return_timestamps": True})]
        return [(chosen, options) for chosen, options in groups if chosen]

    @cached_property
    def _description(self) -> dict[str, Any]:
        return describe(self._pipeline.model, self._source, self._commit, "speech recogniser")

    def describe(self) -> dict[str, Any]:
        """As ``AudioModel`` says."""
        return self._description


class Cascade:
    """A recogniser whose transcripts are put to an LLM.

    Args:
        transcriber: Hears.
        llm: Answers items without recordings: ``TextModel``, ``Endpoint``, or a model that could hear, too.
    """

    def __init__(self, transcriber: Transcriber, llm: AudioModel) -> None:
        self.transcriber, self.llm = transcriber, llm
        self.decoding: dict[str, Any] = {
            "strategy": "greedy",
            "transcriber": transcriber.decoding,
            "llm": llm.decoding,
            "transcript_prompt": PROMPT,
        }

    @torch.inference_mode()
    def answer(self, items: Sequence[Item], max_new_tokens: int) -> list[str]:
        """Greedy answers; every item's ``fields["transcripts"]`` holds what was recognised."""
        for item in items:
            text_of(item)  # refuses an empty one before any work is done
        transcripts = iter(self.transcriber.transcribe([clip.read() for item in items for clip in item.clips]))
        for item in items:
            if item.clips:
                item.fields["transcripts"] = [next(transcripts) for _ in item.clips]
        return self.llm.answer([in_text(item) for item in items], max_new_tokens)

    def describe(self) -> dict[str, Any]:
        """Of both halves together; each by itself under ``parts``."""
        parts = [self.transcriber.describe(), self.llm.describe()]

        def joined(key: str) -> str:
            return " + ".join(str(part[key]) for part in parts)

        sizes = [part["parameters"] for part in parts]
        return {
            **{key: joined(key) for key in ("name", "revision", "class", "dtype")},
            "parameters": None if None in sizes else sum(sizes),
            "kind": "cascade",
            "parts": parts,
        }


def in_text(item: Item) -> Item:
    """An item whose recordings are replaced by their ``fields["transcripts"]``."""
    if not item.clips:
        return item
    transcripts = item.fields["transcripts"]
    if not item.instruction:
        return replace(item, clips=[], instruction="\n".join(transcripts) or "(nothing was recognised)")
    lines = [PROMPT.format(number=i, transcript=text) for i, text in enumerate(transcripts, start=1)]
    return replace(item, clips=[], instruction="\n".join([*lines, "", item.instruction]))
