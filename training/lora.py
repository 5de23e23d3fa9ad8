"""LoRA on the LLM (Hu et al. 2022): injected by peft, saved beside our own weights, one from stage II to III."""

from collections.abc import Sequence

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from soundwave.modeling_soundwave import SoundwaveConfig
from soundwave.modeling_soundwave.weights_soundwave import lora_state_dict, saved_name
from soundwave.training.stages import ConfigError


def is_lora(name: str) -> bool:
    """Whether a parameter is one of LoRA's."""
    return ".lora_A." in name or ".lora_B." in name


def add_lora(model: nn.Module, r: int, alpha: float, target_modules: Sequence[str], dropout: float = 0.0) -> None:
    """Put LoRA beside the named projections of the LLM, which starts out unchanged, and note it in the configuration.

    Raises:
        ConfigError: when the model has no LLM, has LoRA already, or no module of those names.
    """
    if not hasattr(model, "language_model"):
        raise ConfigError(f"a {type(model).__name__} has no LLM that LoRA could be added to; stage I trains without.")
    if any(is_lora(name) for name, _ in model.named_parameters()):
        raise ConfigError("the model has LoRA already; load it with merge_lora=True to begin a new one.")
    last = {
        name.rpartition(".")[2]
        for name, module in model.language_model.named_modules()
        if isinstance(module, nn.Linear)
    }
    unknown = [name for name in target_modules if name not in last]
    if unknown:
        raise ConfigError(
            f"the LLM has no linear layers called {', '.join(unknown)}; it has {', '.join(sorted(last))}."
        )
    fields = {"r": int(r), "alpha": alpha, "target_modules": list(target_modules)}
    settings = LoraConfig(r=r, lora_alpha=alpha, target_modules=list(target_modules), lora_dropout=dropout)
    inject_adapter_in_model(settings, model.language_model)
    model.config.lora = fields


def restore_lora(model: nn.Module, source: str, dropout: float = 0.0, **hub_arguments: str | None) -> None:
    """Inject the LoRA of a stage repository (folder or Hub id) into a model loaded from it with `merge_lora=False`.

    Raises:
        ConfigError: when the repository's configuration names no LoRA, or its tensors do not fit the LLM.
    """
    fields = SoundwaveConfig.from_pretrained(source, **hub_arguments).lora
    if fields is None:
        raise ConfigError(f"{source} has no LoRA to go on with; begin one with add_lora.")
    tensors = lora_state_dict(source, **hub_arguments)
    add_lora(model, fields["r"], fields["alpha"], fields["target_modules"], dropout)
    ours = {saved_name(name): parameter for name, parameter in model.named_parameters() if is_lora(name)}
    if ours.keys() != tensors.keys():
        missing, surplus = sorted(ours.keys() - tensors.keys()), sorted(tensors.keys() - ours.keys())
        raise ConfigError(f"the LoRA of {source} does not fit the LLM: missing {missing[:3]}, surplus {surplus[:3]}.")
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(tensors[name])
