"""LoRA on the LLM, and on the encoder where asked for (Hu et al. 2022).

Injected by peft, saved beside our own weights under plain names, merged when they are loaded; one from stage to stage.
"""

from collections.abc import Sequence

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from soundwave.modeling_soundwave import SoundwaveConfig
from soundwave.modeling_soundwave.weights_soundwave import lora_state_dict, saved_name
from soundwave.training.stages import ConfigError

# What `trains` calls a LoRA, and the module that it is in. The configuration field is called `lora` for both alike.
LORA_IN = {"lora": "language_model", "encoder_lora": "audio_tower"}


def is_lora(name: str, kind: str | None = None) -> bool:
    """Whether a parameter is one of LoRA's: of a `kind` (`"lora"`, `"encoder_lora"`), or of any."""
    inside = kind is None or name.startswith(LORA_IN[kind] + ".")
    return inside and (".lora_A." in name or ".lora_B." in name)


def has_lora(model: nn.Module, kind: str | None = None) -> bool:
    """Whether a model has LoRA matrices, of a `kind` or any."""
    return any(is_lora(name, kind) for name, _ in model.named_parameters())


def add_lora(
    model: nn.Module,
    r: int,
    alpha: float,
    target_modules: Sequence[str],
    dropout: float = 0.0,
    kind: str = "lora",
) -> None:
    """Put LoRA beside the named projections, which starts without effect, and note it in the configuration.

    Args:
        model: any Soundwave model; one with an LLM for `"lora"`.
        r: rank.
        alpha: the update is scaled by `alpha / r`.
        target_modules: last parts of the names of linear layers.
        dropout: probability, on what the matrices are given.
        kind: `"lora"` in the LLM, `"encoder_lora"` in the encoder.

    Raises:
        ConfigError: when the model has no LLM, has such a LoRA already, or no module of those names.
    """
    part = getattr(model, LORA_IN[kind], None)
    if part is None:
        raise ConfigError(f"a {type(model).__name__} has no LLM that LoRA could be added to; stage I trains without.")
    if has_lora(model, kind):
        raise ConfigError("the model has LoRA already; load it with merge_lora=True to begin a new one.")
    last = {name.rpartition(".")[2] for name, module in part.named_modules() if isinstance(module, nn.Linear)}
    unknown = [name for name in target_modules if name not in last]
    if unknown:
        raise ConfigError(
            f"the {'LLM' if kind == 'lora' else 'encoder'} has no linear layers called {', '.join(unknown)}; it has "
            f"{', '.join(sorted(last))}."
        )
    fields = {"r": int(r), "alpha": alpha, "target_modules": list(target_modules)}
    settings = LoraConfig(r=r, lora_alpha=alpha, target_modules=list(target_modules), lora_dropout=dropout)
    inject_adapter_in_model(settings, part)
    setattr(model.config, kind, fields)


def restore_lora(model: nn.Module, source: str, dropout: float = 0.0, **hub_arguments: str | None) -> None:
    """Inject the LoRA of a stage repository (folder or Hub id) into a model loaded from it with `merge_lora=False`.

    Raises:
        ConfigError: when the repository's configuration names no LoRA, or its tensors do not fit the model.
    """
    begun = SoundwaveConfig.from_pretrained(source, **hub_arguments)
    kinds = {kind: getattr(begun, kind) for kind in LORA_IN if getattr(begun, kind) is not None}
    if not kinds:
        raise ConfigError(f"{source} has no LoRA to go on with; begin one with add_lora.")
    tensors = lora_state_dict(source, **hub_arguments)
    for kind, fields in kinds.items():
        add_lora(model, fields["r"], fields["alpha"], fields["target_modules"], dropout, kind)
    ours = {saved_name(name): parameter for name, parameter in model.named_parameters() if is_lora(name)}
    if ours.keys() != tensors.keys():
        missing, surplus = sorted(ours.keys() - tensors.keys()), sorted(tensors.keys() - ours.keys())
        raise ConfigError(f"the LoRA of {source} does not fit: missing {missing[:3]}, surplus {surplus[:3]}.")
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.data = parameter.data.float()  # as in the file: not rounded between two stages
            parameter.copy_(tensors[name])
