"""A text LLM of transformers: the second half of a cascade. It is asked texts and hears nothing."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

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

#: Thinking models answer at once: hidden thoughts would use up the bound of an answer's length.
TEMPLATE = {"enable_thinking": False}


class TextModel:
    """A causal LM with a chat template. Load it with ``TextModel.load``."""

    def __init__(self, model: Any, tokenizer: Any, source: str, commit: str | None) -> None:
        if tokenizer.chat_template is None:
            raise ModelError(f"{source} has no chat template, so it cannot be asked; take the instruction-tuned model")
        prepare_tokenizer(source, tokenizer)
        keep_only_ids(model, tokenizer.pad_token_id)
        self.model, self.tokenizer = model, tokenizer
        self._source, self._commit = source, commit
        self.decoding: dict[str, Any] = {"strategy": "greedy", **GREEDY, "chat_template": TEMPLATE}

    @classmethod
    def load(cls, source: str, device: str, dtype: torch.dtype, commit: str | None, **hub: Any) -> "TextModel":
        """The LLM of a folder or of the Hub."""
        tokenizer = read_config(source, AutoTokenizer.from_pretrained, **hub)
        return cls(load_weights(source, AutoModelForCausalLM, device, dtype, **hub), tokenizer, source, commit)

    @torch.inference_mode()
    def answer(self, items: Sequence[Item], max_new_tokens: int) -> list[str]:
        """Greedy answers to texts."""
        for item in items:
            if item.clips:
                raise ModelError(f"item {item.id!r} has a recording, and {self._source} reads text only")
        conversations = [[{"role": "user", "content": text_of(item)}] for item in items]
        inputs = self.tokenizer.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
            sanitize_control_tokens=True,  # what an item says stays text
            **TEMPLATE,
        ).to(self.model.device)
        ids = self.model.generate(**inputs, **GREEDY, max_new_tokens=max_new_tokens)
        return new_texts(self.model, self.tokenizer, ids, inputs["input_ids"].shape[1], max_new_tokens)

    @cached_property
    def _description(self) -> dict[str, Any]:
        return describe(self.model, self._source, self._commit, "text")

    def describe(self) -> dict[str, Any]:
        """As ``AudioModel`` says."""
        return self._description
