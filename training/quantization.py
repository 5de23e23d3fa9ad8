"""An LLM in 4 or 8 bit under a LoRA that trains (QLoRA: Dettmers et al. 2023), by the library's own quantizers."""

import copy
import functools
import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from soundwave.training.stages import QUANTIZATIONS, ConfigError

PACKAGES = dict(zip(QUANTIZATIONS, ("bitsandbytes", "torchao"), strict=True))
EXTRAS = dict(zip(QUANTIZATIONS, ("qlora", "quantize"), strict=True))


def check_installed(kind: str) -> None:
    """Refuse a quantization whose package is missing.

    Raises:
        ConfigError: saying what to install.
    """
    if importlib.util.find_spec(PACKAGES[kind]) is None:
        raise ConfigError(
            f"quantization is {kind}, which needs {PACKAGES[kind]}: pip install {PACKAGES[kind]} (or "
            f"'soundwave[{EXTRAS[kind]}]'), or leave out quantization."
        )


def quantize_llm(model: PreTrainedModel, kind: str) -> None:
    """Put the linear layers of a model's LLM, but the output layer, into 4 bit (`"nf4"`) or 8 (`"int8"`).

    What a run saves stays in the type that the LLM was loaded in: of an LLM with a pinned commit nothing, otherwise
    its tensors as they were (they stay in memory), so that LoRA is merged into exact matrices.

    Raises:
        ConfigError: when the quantizer's package is missing.
    """
    check_installed(kind)
    plain = model.language_model
    tensors = plain.state_dict()
    quantized = type(plain).from_pretrained(
        None,
        config=copy.deepcopy(plain.config),  # which the library writes the quantization into
        state_dict=dict(tensors),
        dtype=plain.dtype,
        quantization_config=_quantization_config(kind, plain.dtype),
    )
    quantized.generation_config = plain.generation_config
    quantized.requires_grad_(False)
    model.language_model = quantized.train(plain.training)
    if model.config.text_model_revision is None:
        quantized.register_state_dict_post_hook(functools.partial(_as_loaded, tensors))


def _quantization_config(kind: str, dtype: torch.dtype) -> Any:
    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _as_loaded(
    tensors: dict[str, torch.Tensor], llm: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, metadata: Any
) -> None:
    """In an LLM's state dict, the matrices before their quantization in place of those after it."""
    for name in [name for name in state_dict if name.startswith(prefix) and ".lora_" not in name]:
        del state_dict[name]
    state_dict.update({prefix + name: tensor for name, tensor in tensors.items()})
