"""Any audio-text model of transformers, through its own processor and chat template.

Families differ in how their processors want to be asked; ``ADAPTERS`` says how, and what is not in it is asked in the
library's common way, one item at a time. Letters: `B` items, `N` prompt tokens.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoProcessor, BatchFeature

from soundwave.eval.items import Item
from soundwave.eval.models.base import (
    GREEDY,
    ModelError,
    describe,
    keep_only_ids,
    load_weights,
    new_texts,
    prepare_tokenizer,
    read_config,
    text_of,
)
from soundwave.eval.models.endpoint import input_audio
from soundwave.processing import SAMPLING_RATE

#: Text of the user's turn and the recordings before it, each (samples,) at 16 kHz.
Question = tuple[str, list[np.ndarray]]
#: With which the prompts of Qwen2-Audio's own evaluation end, as in "recognize the speech: <|en|>".
LANGUAGE_TAG = re.compile(r"<\|([a-z]{2})\|>")
OPEN, CLOSE = "\uf8f0", "\uf8f1"  # of a tag, until the template puts its signs there; for private use, in no text


def by_template(processor: Any, questions: Sequence[Question], chat_template: str | None = None) -> BatchFeature:
    """The common way: the processor's chat template over content lists, with the waveforms in them."""
    conversations = [_turn(text, [{"type": "audio", "audio": sound} for sound in heard]) for text, heard in questions]
    return processor.apply_chat_template(
        conversations,
        chat_template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        sanitize_control_tokens=True,  # what an item says stays text
        processor_kwargs={"text_kwargs": {"padding": True}},  # the texts only: recordings have a padding of their own
    )


def by_qwen_template(processor: Any, questions: Sequence[Question]) -> BatchFeature:
    """The common way, in which a language tag is the token that it is in Qwen2-Audio's own evaluation.

    The library spells a special token out that it finds in a conversation, and leaves be what the template writes: so
    the template writes the tags. Where the tokenizer has no such token, they are text.
    """
    outer = (
        f"{{% filter replace('{OPEN}', '<|') | replace('{CLOSE}', '|>') %}}{processor.chat_template}{{% endfilter %}}"
    )
    marked = [
        (LANGUAGE_TAG.sub(rf"{OPEN}\1{CLOSE}", text.replace(OPEN, "").replace(CLOSE, "")), heard)
        for text, heard in questions
    ]
    return by_template(processor, marked, outer)


def by_mistral_common(processor: Any, questions: Sequence[Question]) -> BatchFeature:
    """mistral-common writes the prompt; it takes files, no waveforms, and writes control tokens as text anyway."""
    return processor.apply_chat_template([_turn(text, [*map(input_audio, heard)]) for text, heard in questions])


def by_placeholder(processor: Any, questions: Sequence[Question]) -> BatchFeature:
    """A text-only template, in which the placeholder stands for each recording.

    Raises:
        ModelError: For a text that writes the placeholder itself.
    """
    for text, _ in questions:
        if processor.audio_token in text:
            raise ModelError(f"the instruction holds {processor.audio_token}, this model's sign for a recording")
    prompts = processor.tokenizer.apply_chat_template(
        [[{"role": "user", "content": processor.audio_token * len(heard) + text}] for text, heard in questions],
        add_generation_prompt=True,
        tokenize=False,
    )
    sounds = [sound for _, heard in questions for sound in heard]
    return processor(text=prompts, audio=sounds or None, padding=True, return_tensors="pt")


def _turn(text: str, content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content + ([{"type": "text", "text": text}] if text else [])}]


@dataclass(frozen=True)
class Adapter:
    """How one family is asked.

    Attributes:
        inputs: From questions to what ``generate`` takes, padded on the left.
        alone: One item at a time, because the encoder hears the padding of a batch.
        heard_s: The processor drops what comes later in a recording, in seconds; ``None``: it hears everything.
        needs: Package that the processor needs, if it is none of ours.
    """

    inputs: Callable[[Any, Sequence[Question]], BatchFeature] = by_template
    alone: bool = False
    heard_s: float | None = None
    needs: str | None = None


#: ``config.model_type`` -> adapter.
ADAPTERS: dict[str, Adapter] = {
    "qwen2_audio": Adapter(by_qwen_template, heard_s=30),
    "voxtral": Adapter(by_mistral_common, needs="mistral_common"),
    "granite_speech": Adapter(by_placeholder, alone=True),
    "audioflamingo3": Adapter(heard_s=600),
}
#: Of families that are not known here: nobody has looked whether their encoders hear the padding of a batch.
OTHERS = Adapter(alone=True)


class TransformersAudioModel:
    """An audio-text model of transformers. Load it with ``TransformersAudioModel.load``."""

    def __init__(self, model: Any, processor: Any, adapter: Adapter, source: str, commit: str | None) -> None:
        prepare_tokenizer(source, processor.tokenizer)
        keep_only_ids(model, processor.tokenizer.pad_token_id)
        self.model, self.processor, self._adapter = model, processor, adapter
        self._source, self._commit = source, commit
        self.decoding: dict[str, Any] = {
            "strategy": "greedy",
            **GREEDY,
            "system_prompt": "the chat template's own",
            "heard_s": adapter.heard_s,
        }

    @classmethod
    def load(
        cls, source: str, config: Any, device: str, dtype: torch.dtype, commit: str | None, **hub: Any
    ) -> "TransformersAudioModel":
        """The model and the processor of a folder or of the Hub.

        Raises:
            ModelError: If it hears nothing, cannot be asked, or a package is missing.
        """
        adapter = ADAPTERS.get(config.model_type, OTHERS)
        if adapter.needs and find_spec(adapter.needs) is None:
            package = adapter.needs.replace("_", "-")
            raise ModelError(f"{source} ({config.model_type}) needs the package {package}: pip install {package}")
        kind = model_class(source, config)
        processor = read_config(source, AutoProcessor.from_pretrained, **hub)
        ears = getattr(processor, "feature_extractor", None) or getattr(processor, "audio_processor", None)
        if ears is None:
            raise ModelError(
                f"{source} ({config.model_type}) reads text and hears nothing; put a speech recogniser before it: "
                f"--model RECOGNISER --llm {source}"
            )
        if ears.sampling_rate != SAMPLING_RATE:
            raise ModelError(
                f"{source} hears at {ears.sampling_rate} Hz; only models of {SAMPLING_RATE} Hz can be run"
            )
        if not hasattr(processor, "tokenizer"):
            raise ModelError(f"{source} ({config.model_type}) has no tokenizer: an encoder alone answers nothing")
        return cls(load_weights(source, kind, device, dtype, **hub), processor, adapter, source, commit)

    @torch.inference_mode()
    def answer(self, items: Sequence[Item], max_new_tokens: int) -> list[str]:
        """Greedy answers; ``fields["heard_s"]`` of an item says where the processor cut its recordings."""
        questions = [(text_of(item), [clip.read() for clip in item.clips]) for item in items]
        limit = self._adapter.heard_s
        for item, (_, heard) in zip(items, questions, strict=True):
            if limit is not None and any(len(sound) > limit * SAMPLING_RATE for sound in heard):
                item.fields["heard_s"] = limit
        answers = dict.fromkeys(range(len(items)), "")
        for group in self._groups(questions):
            answers |= zip(group, self._generate([questions[i] for i in group], max_new_tokens), strict=True)
        return list(answers.values())

    @cached_property
    def _description(self) -> dict[str, Any]:
        return describe(self.model, self._source, self._commit, "transformers")

    def describe(self) -> dict[str, Any]:
        """As ``AudioModel`` says; the weights are hashed once."""
        return self._description

    def _groups(self, questions: Sequence[Question]) -> list[list[int]]:
        """Which of a batch go through the model together: never texts alone with recordings."""
        if self._adapter.alone:
            return [[i] for i in range(len(questions))]
        hearing = [i for i, (_, heard) in enumerate(questions) if heard]
        reading = [i for i, (_, heard) in enumerate(questions) if not heard]
        return [group for group in (hearing, reading) if group]

    def _generate(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        inputs = self._adapter.inputs(self.processor, questions).to(self.model.device, self.model.dtype)
        ids = self.model.generate(**inputs, **GREEDY, max_new_tokens=max_new_tokens)
        return new_texts(self.model, self.processor.tokenizer, ids, inputs["input_ids"].shape[1], max_new_tokens)


def model_class(source: str, config: Any) -> Any:
    """The class that the configuration names, of the library or of the repository's own code.

    Raises:
        ModelError: If it names none that generates text.
    """
    remote = [name for name in getattr(config, "auto_map", None) or {} if name.startswith("AutoModel")]
    names = [*remote, *(config.architectures or [])]
    found = [getattr(transformers, name, None) for name in names]
    kind = next((kind for kind in found if kind is not None), None)
    if kind is None or not (remote or getattr(kind, "can_generate", bool)()):
        raise ModelError(
            f"{source} is a {', '.join(names) or config.model_type}, in transformers {transformers.__version__} no "
            "model that generates text: an encoder alone answers nothing. For code that the repository brings, add "
            "--trust-remote-code"
        )
    return kind
