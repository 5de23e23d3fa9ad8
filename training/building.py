"""The model and processor that a stage begins with: from two components, or from the stage before."""

from typing import Any

import torch

from soundwave.modeling_soundwave import SoundwaveConfig, SoundwaveForConditionalGeneration, SoundwaveForCTC
from soundwave.modeling_soundwave.weights_soundwave import find_shards, read_tensors
from soundwave.processing import SoundwaveProcessor
from soundwave.training.lora import add_lora, is_lora, restore_lora
from soundwave.training.stages import ConfigError, StageConfig, check_field

OUR_PARTS = ("alignment_adapter.", "ctc_head.", "shrinking_adapter.")


def build_model(config: StageConfig, dtype: torch.dtype = torch.float32) -> tuple[Any, SoundwaveProcessor]:
    """The model and processor that a stage begins with, LoRA injected where the stage trains it.

    Stage I is a `SoundwaveForCTC`. The later stages begin with a stage I result (new shrinking adapter and LoRA), with
    a result of stage II or III (whose LoRA goes on), or with the two components alone.

    Args:
        config: settings of the run.
        dtype: of encoder and LLM; our own parts are fp32.

    Raises:
        ConfigError: when the stage has nothing to begin with, or for a setting that would have no effect.
    """
    for name in config.model:
        check_field(name, sorted(SoundwaveConfig.__dataclass_fields__), "model.")
    model, processor = (_from_components if config.start is None else _from_start)(config, dtype)
    if config.ctc_weight is not None:
        model.config.ctc_weight = config.ctc_weight
    if "lora" in config.trains and not any(is_lora(name) for name, _ in model.named_parameters()):
        add_lora(model, config.lora_r, config.lora_alpha, config.lora_targets, config.lora_dropout)
    return model, processor


def _from_components(config: StageConfig, dtype: torch.dtype) -> tuple[Any, SoundwaveProcessor]:
    if config.audio_model is None or config.text_model is None:
        raise ConfigError(
            f"stage {config.stage} has nothing to begin with: set start to the repository of the stage before, or "
            "audio_model and text_model to an encoder and an LLM."
        )
    # Model and processor must pad alike.
    fields = {name: config.model[name] for name in ("audio_padding",) if name in config.model} | config.processor
    processor = SoundwaveProcessor.from_components(config.audio_model, config.text_model, **fields)
    kind = SoundwaveForCTC if config.stage == "align" else SoundwaveForConditionalGeneration
    model = kind.from_components(
        config.audio_model, config.text_model, processor.audio_token_id, dtype=dtype, **config.model
    )
    return model, processor


def _from_start(config: StageConfig, dtype: torch.dtype) -> tuple[Any, SoundwaveProcessor]:
    start, hub = str(config.start), {"revision": config.start_revision} if config.start_revision else {}
    begun = SoundwaveConfig.from_pretrained(start, **hub)
    processor = SoundwaveProcessor.from_pretrained(start, **hub)
    from_stage_one = begun.architectures == ["SoundwaveForCTC"]
    if config.stage == "align" and not from_stage_one:
        raise ConfigError(f"{start} holds a {begun.architectures}; stage I goes on from a SoundwaveForCTC only.")
    _refuse_without_effect(config, from_stage_one)
    if config.stage == "align":
        aligned = SoundwaveForCTC.from_pretrained(start, dtype=torch.float32, **hub)
        aligned.audio_tower.to(dtype)
        return aligned, processor
    goes_on = begun.lora is not None and "lora" in config.trains
    kind = SoundwaveForConditionalGeneration
    if from_stage_one:
        model = kind.from_ctc(start, config.text_model, dtype=dtype, **hub, **config.model)
        processor.audio_padding = model.config.audio_padding  # model and processor must pad alike
    else:
        model = kind.from_pretrained(start, merge_lora=not goes_on, dtype=dtype, **hub)
    if dtype != torch.float32:  # our parts are fp32 in the file and must not be rounded between two stages
        parameters = dict(model.named_parameters())
        for name, tensor in read_tensors(find_shards(start, **hub), lambda name: name.startswith(OUR_PARTS)).items():
            if name in parameters:
                parameters[name].data = tensor
    if goes_on:
        restore_lora(model, start, config.lora_dropout, **hub)
    return model, processor


def _refuse_without_effect(config: StageConfig, from_stage_one: bool) -> None:
    """Settings of new parts, where the parts come from `start`: said, because nothing would come of them."""
    given = [f"processor.{name}" for name in config.processor]
    if config.stage == "align" or not from_stage_one:  # stage II makes a new model around what stage I has
        given += [f"model.{name}" for name in config.model]
    if given:
        raise ConfigError(
            f"{', '.join(given)} would have no effect: with start, they are those of {config.start}. Leave them out "
            "(processor={} model={} takes a file's back), or begin without start, from audio_model and text_model."
        )
