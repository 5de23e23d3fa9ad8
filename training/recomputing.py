"""Gradient checkpointing in an LLM that is wholly frozen, through which gradients flow to the adapters.

The library recomputes a layer in training mode only, and a frozen LLM stays in evaluation mode: some families drop out
in the layer itself, so that the layer's mode cannot be changed without changing the loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer


@dataclass
class RecomputedForward:
    """The forward of a layer, run again in the backward pass in place of keeping what it computes.

    In training mode the library does it, if at all; a call with a cache runs once, lest the cache be written twice.
    """

    layer: GradientCheckpointingLayer
    forward: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer's forward."""
        layer = self.layer
        cached = any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
        if layer.training or cached or not layer.gradient_checkpointing or not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return layer._gradient_checkpointing_func(partial(self.forward, **kwargs), *args)


def recompute_in_evaluation(llm: nn.Module) -> None:
    """Let `activation_checkpointing_enable`, before or after, hold in evaluation mode too.

    Args:
        llm: the LLM; its layers are changed in place, once.
    """
    for layer in llm.modules():
        if isinstance(layer, GradientCheckpointingLayer) and not isinstance(layer.forward, RecomputedForward):
            layer.forward = RecomputedForward(layer, layer.forward)
