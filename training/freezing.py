"""What a stage trains: the named parts, in fp32; everything else stays as it was loaded."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from soundwave.training.lora import LORA_IN, is_lora
from soundwave.training.stages import ConfigError

UNUSED_BY_FRAMES = tuple(f"alignment_adapter.layer.self_attn.{part}_proj." for part in "qk")


def freeze(model: nn.Module, trains: Sequence[str]) -> None:
    """Let only the named parts train, in fp32.

    Args:
        model: any Soundwave model.
        trains: prefixes of parameter names; `"lora"` and `"encoder_lora"` stand for the LoRA matrices. The rows of a
            tied CTC head are the LLM's and never train, nor do the queries and keys of an alignment layer whose
            frames see only themselves: no gradient reaches them, and several devices would wait for one.

    Raises:
        ConfigError: for a prefix that no parameter has.
    """
    named = dict(model.named_parameters())
    if model.config.ctc_head == "tied":
        named.pop("ctc_head.weight", None)
    if model.config.audio_config.model_type == "whisper":
        named.pop("audio_tower.embed_positions.weight", None)  # fixed sinusoids
    if model.config.alignment_attention == "frame":
        named = {name: parameter for name, parameter in named.items() if not name.startswith(UNUSED_BY_FRAMES)}
    model.requires_grad_(False)
    for part in trains:
        if part in LORA_IN:
            chosen = [name for name in named if is_lora(name, part)]
        else:
            chosen = [name for name in named if (name + ".").startswith(part + ".")]
        if not chosen and part in LORA_IN:
            raise ConfigError(
                f"this stage trains LoRA ({part}), but the model has none; call lora.add_lora(model, ...) first."
            )
        if not chosen and not _is_left_out(model, part):
            raise ConfigError(
                f"trains names {part!r}, but the model has only {', '.join(n for n, _ in model.named_children())}."
            )
        for name in chosen:
            _own(model.config, name)
            named[name].requires_grad_(True)
            if named[name].dtype in (torch.bfloat16, torch.float16):
                named[name].data = named[name].data.float()


def _own(config: Any, name: str) -> None:
    """A component that trains is no longer the one of its pinned commit: its weights are saved with ours."""
    if is_lora(name):
        return
    if name.startswith("audio_tower."):
        config.audio_model_revision = None
    elif name.startswith("language_model."):
        config.text_model_revision = None


def _is_left_out(model: nn.Module, part: str) -> bool:
    """Whether the model knows this parameter and was built without it (a separate CTC head has no scale)."""
    try:
        return operator.attrgetter(part)(model) is None
    except AttributeError:
        return False
