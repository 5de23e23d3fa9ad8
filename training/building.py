"""The model and processor that a stage begins with: from two components, or from the stage before."""

import dataclasses
import os
from typing import Any

import torch
from transformers import AutoConfig

from soundwave.model_card.lineage import read_stage_settings
from soundwave.modeling_soundwave import SoundwaveConfig, SoundwaveForConditionalGeneration, SoundwaveForCTC
from soundwave.modeling_soundwave.loading_soundwave import resolve_commit
from soundwave.modeling_soundwave.same_llm_soundwave import check_sizes, check_vocabulary
from soundwave.modeling_soundwave.weights_soundwave import WeightsError, find_shards, read_tensors
from soundwave.processing import SoundwaveProcessor
from soundwave.training.lora import LORA_IN, add_lora, has_lora, restore_lora
from soundwave.training.quantization import check_installed, quantize_llm
from soundwave.training.stages import ConfigError, StageConfig, check_field

OUR_PARTS = ("alignment_adapter.", "ctc_head.", "shrinking_adapter.")


def pin_start(config: StageConfig) -> StageConfig:
    """The settings with the commit that `start_revision` means now: one for all reads, and for the card's lineage.

    Those of a run that begins with a folder stay as they are: it has no commits, and `check_start` refuses one.
    """
    if config.start is None or os.path.isdir(config.start):
        return config
    revision = config.start_revision or _begun_at(config)
    return dataclasses.replace(config, start_revision=resolve_commit(config.start, revision))


def _begun_at(config: StageConfig) -> str | None:
    """The commit that a run to be resumed began with: the Hub may hold another since."""
    before = read_stage_settings(config.output_dir) if config.resume else {}
    return before.get("start_revision") if before.get("start") == config.portable()["start"] else None


def build_model(config: StageConfig, dtype: torch.dtype = torch.float32) -> tuple[Any, SoundwaveProcessor]:
    """The model and processor that a stage begins with, LoRA injected where the stage trains it.

    Stage I is a `SoundwaveForCTC`. The later stages begin with a stage I result (new shrinking adapter and LoRA), with
    a result of stage II or III (whose LoRA goes on), or with the two components alone.

    Args:
        config: settings of the run.
        dtype: of encoder and LLM; our own parts, and what trains, are fp32.

    Raises:
        ConfigError: when the stage has nothing to begin with, or for a setting that would have no effect.
    """
    begun = check_start(config)
    if config.quantization is not None:
        check_installed(config.quantization)  # before the LLM is loaded
    processor = build_processor(config, begun)
    if begun is None:
        kind = SoundwaveForCTC if config.stage == "align" else SoundwaveForConditionalGeneration
        model = kind.from_components(
            config.audio_model, config.text_model, processor.audio_token_id, dtype=dtype, **config.model
        )
    else:
        model = _from_start(config, begun, dtype)
    if config.ctc_weight is not None:
        model.config.ctc_weight = config.ctc_weight
    if config.quantization is not None:
        quantize_llm(model, config.quantization)
    if begun is not None and _goes_on(config, begun):
        restore_lora(model, str(config.start), config.lora_dropout, **_hub(config))
    _add_new_lora(model, config)
    return model, processor


def build_skeleton(config: StageConfig, dtype: torch.dtype = torch.float32) -> Any:
    """The model of `build_model` without its weights: on the meta device, from configurations alone.

    Raises:
        ConfigError: as `build_model`.
    """
    begun = check_start(config)
    if begun is None:
        audio, text = (AutoConfig.from_pretrained(name) for name in (config.audio_model, config.text_model))
        settings = SoundwaveConfig(audio_config=audio, text_config=text, **config.model)
    else:
        settings = SoundwaveConfig.from_dict({**begun.to_dict(), **config.model, "lora": None, "encoder_lora": None})
        if config.stage != "align" and _is_stage_one(begun):
            settings.text_config = _llm_config(config, begun)
    kind = SoundwaveForCTC if config.stage == "align" else SoundwaveForConditionalGeneration
    with torch.device("meta"):
        model = kind(settings)
    for part in ("audio_tower", "language_model"):
        if hasattr(model, part):
            getattr(model, part).to(dtype)
    if begun is None and config.stage == "align" and model.ctc_head.tied:  # the LLM's rows, as they are in its file
        model.ctc_head.weight.data = model.ctc_head.weight.data.to(settings.text_config.dtype or torch.float32)
    if begun is not None and _goes_on(config, begun):
        for name in LORA_IN:
            if (fields := getattr(begun, name)) is not None:
                add_lora(model, fields["r"], fields["alpha"], fields["target_modules"], config.lora_dropout, name)
    _add_new_lora(model, config)
    return model


def build_processor(config: StageConfig, begun: SoundwaveConfig | None) -> SoundwaveProcessor:
    """The processor of a run: of its two components, or that of `start`, whose configuration is `begun`."""
    # Model and processor must pad and cut alike.
    padding = {name: config.model[name] for name in ("audio_padding", "window_seconds") if name in config.model}
    if begun is None:
        return SoundwaveProcessor.from_components(
            config.audio_model, config.text_model, **(padding | config.processor)
        )
    processor = SoundwaveProcessor.from_pretrained(str(config.start), **_hub(config))
    processor.audio_padding = padding.get("audio_padding", begun.audio_padding)
    return processor


def check_start(config: StageConfig) -> SoundwaveConfig | None:
    """The configuration of the repository that a run goes on from; `None` where it begins with two components.

    Raises:
        ConfigError: when the stage cannot begin there, or for a setting that would have no effect.
    """
    for name in config.model:
        check_field(name, sorted(SoundwaveConfig.__dataclass_fields__), "model.")
    if config.start is None:
        if config.audio_model is None or config.text_model is None:
            raise ConfigError(
                f"stage {config.stage} has nothing to begin with: set start to the repository of the stage before, or "
                "audio_model and text_model to an encoder and an LLM."
            )
        return None
    if config.start_revision is not None and os.path.isdir(config.start):
        raise ConfigError(
            f"start_revision is {config.start_revision!r} and would have no effect: start is the folder "
            f"{config.start}, which has no revisions. Leave it out (start_revision= takes a file's back), or set "
            "start to a repository on the Hub."
        )
    begun = SoundwaveConfig.from_pretrained(config.start, **_hub(config))
    if config.stage == "align" and not _is_stage_one(begun):
        raise ConfigError(
            f"{config.start} holds a {begun.architectures}; stage I goes on from a SoundwaveForCTC only."
        )
    _refuse_without_effect(config, begun)
    return begun


def _is_stage_one(begun: SoundwaveConfig) -> bool:
    return begun.architectures == ["SoundwaveForCTC"]


def _goes_on(config: StageConfig, begun: SoundwaveConfig) -> bool:
    """Whether the LoRA that `start` has stays apart, because this stage trains one; otherwise it is merged."""
    begun_with = [name for name in LORA_IN if getattr(begun, name) is not None]
    return bool(begun_with) and any(name in config.trains for name in LORA_IN)


def _llm_config(config: StageConfig, begun: SoundwaveConfig) -> Any:
    """The configuration of the LLM that stage II puts behind a stage I result, checked as `from_ctc` does."""
    if config.text_model is None:
        if begun.text_model_id is None:
            raise WeightsError(f"{config.start} names no LLM on the Hub; give text_model, which it was aligned to.")
        return begun.text_config
    text_config = AutoConfig.from_pretrained(config.text_model)
    check_sizes(text_config, begun.text_config, config.text_model, str(config.start))
    check_vocabulary(config.text_model, None, str(config.start), config.start_revision)
    return text_config


def _hub(config: StageConfig) -> dict[str, str]:
    return {"revision": config.start_revision} if config.start_revision else {}


def _from_start(config: StageConfig, begun: SoundwaveConfig, dtype: torch.dtype) -> Any:
    start, hub, merge = str(config.start), _hub(config), not _goes_on(config, begun)
    if config.stage == "align":
        model = SoundwaveForCTC.from_pretrained(start, dtype=torch.float32, merge_lora=merge, **hub)
        model.audio_tower.to(dtype)
    elif _is_stage_one(begun):
        kind = SoundwaveForConditionalGeneration
        model = kind.from_ctc(start, config.text_model, dtype=dtype, merge_lora=merge, **hub, **config.model)
    else:
        model = SoundwaveForConditionalGeneration.from_pretrained(start, merge_lora=merge, dtype=dtype, **hub)
    if dtype != torch.float32:  # what trained is fp32 in the file and must not be rounded between two stages
        merged = merge and (begun.lora is not None or begun.encoder_lora is not None)  # and so not as in the file
        prefixes = OUR_PARTS if merged else (*OUR_PARTS, *(part + "." for part in config.trains))
        parameters = dict(model.named_parameters())
        for name, tensor in read_tensors(find_shards(start, **hub), lambda name: name.startswith(prefixes)).items():
            if name in parameters:
                parameters[name].data = tensor
    return model


def _add_new_lora(model: Any, config: StageConfig) -> None:
    """The LoRA that this stage trains, unless it came with `start`."""
    new = {
        "lora": (config.lora_r, config.lora_alpha, config.lora_targets),
        "encoder_lora": (config.encoder_lora_r, config.encoder_lora_alpha, config.encoder_lora_targets),
    }
    for kind, (r, alpha, targets) in new.items():
        if kind in config.trains and not has_lora(model, kind):
            add_lora(model, r, alpha, targets, config.lora_dropout, kind)


def _refuse_without_effect(config: StageConfig, begun: SoundwaveConfig) -> None:
    """Settings of new parts, where the parts come from `start`: said, because nothing would come of them."""
    given = [f"processor.{name}" for name in config.processor]
    given += ["audio_model"] if config.audio_model is not None else []
    if config.stage == "align" or not _is_stage_one(begun):  # stage II makes a new model around what stage I has
        given += [f"model.{name}" for name in config.model]
        given += ["text_model"] if config.text_model is not None else []
    elif "window_seconds" in config.model:
        given.append("model.window_seconds")  # the processor's is that of stage I
    if given:
        raise ConfigError(
            f"{', '.join(given)} would have no effect: with start, they are those of {config.start}. Leave them out "
            "(audio_model= text_model= processor={} model={} take a file's back), or begin without start."
        )
