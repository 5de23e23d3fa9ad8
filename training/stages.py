"""The settings of a run: those of its stage (`stage_table`), changed by a YAML file, then by `field=value`."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from soundwave.training.stage_table import STAGES, ConfigError, Stage

QUANTIZATIONS = ("nf4", "int8")
METRICS = {"loss": False, "error_rate": False, "wer": False, "cer": False, "bleu": True, "accuracy": True}  # higher?


@dataclass
class StageConfig:
    """Every setting of a run. Saved as `stage_config.yaml` beside the weights.

    `StageConfig.for_stage("align", steps=10)` fills in the stage's defaults; `load_config` reads a file.
    """

    # What runs, from what, to where
    stage: str  # "align", "shrink" or "instruct"
    output_dir: str = ""  # folder of the result; "" = runs/<stage>
    start: str | None = None  # repository to go on from, folder or Hub id; None = from the two components
    start_revision: str | None = None  # branch, tag or commit of `start`
    audio_model: str | None = None  # encoder, folder or Hub id; used where `start` brings none
    text_model: str | None = None  # LLM, folder or Hub id
    model: dict[str, Any] = field(default_factory=dict)  # fields of SoundwaveConfig, for a model made from components
    processor: dict[str, Any] = field(default_factory=dict)  # fields of SoundwaveProcessor, likewise

    # What trains
    # parameter-name prefixes ("audio_tower", "audio_tower.layers.31", ...), "lora", "encoder_lora"; [] = the table's
    trains: list[str] = field(default_factory=list)
    ctc_weight: float | None = None  # factor of the CTC loss beside the answer's; None = the model's (0.3)
    lora_r: int = 64  # rank (§4.1)
    lora_alpha: float = 16  # the update is scaled by alpha / r
    lora_targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    lora_dropout: float = 0.0  # probability, of both
    encoder_lora_r: int = 16  # "encoder_lora": in the encoder, beside the LLM's
    encoder_lora_alpha: float = 16
    encoder_lora_targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    quantization: str | None = None  # of the LLM under LoRA: "nf4" (bitsandbytes), "int8" (torchao); None = as dtype

    # Data
    data: list[str] = field(default_factory=list)  # sources of rows: files, folders, Hub ids
    eval_data: list[str] = field(default_factory=list)  # sources for the validation loss
    data_root: str = ""  # folder that relative sources start from
    draws_per_epoch: int | None = None  # rows drawn per epoch; None = as many as there are
    temperature_start: float = 1.0  # T of eq. 2 in the first epoch
    temperature_step: float = 0.0  # added to T with each epoch
    task_weights: dict[str, float] = field(default_factory=dict)  # shares by hand, in place of eq. 2; {} = eq. 2
    bucket_batches: int = 0  # batches filled together by length of audio, so that little is padding; 0 = none
    max_seconds_per_batch: float | None = None  # audio per device and forward pass, padding included; None = by rows
    streaming: bool = False  # sources are read as they come, one task each, and never held whole (streaming.py)
    stream_rows: dict[str, float] = field(default_factory=dict)  # rows of each streamed task, |D_k| of eq. 2
    encoder_cache: str | None = None  # folder for the frozen encoder's features; None = the encoder runs every step
    dataloader_workers: int = 0  # processes that read audio; 0 = in the training process
    # rows that cannot be used are left out and listed in skipped.jsonl; above this share of those drawn the run stops,
    # judged from 100 rows on and at the end of each epoch
    max_skipped_fraction: float = 0.05

    # SpecAugment on the log-mel (Park et al. 2019, policy LD; the paper names no values)
    spec_augment: bool = False
    freq_masks: int = 2
    freq_mask_width: int = 27  # mel bins, of 80 (scaled to the model's number)
    time_masks: int = 2
    time_mask_width: int = 100  # mel frames of 10 ms
    time_mask_share: float = 0.2  # at most this share of the valid frames per mask, for short recordings

    # Optimisation (AdamW)
    global_batch: int = 32  # rows per update over all devices; accumulation follows from the devices
    per_device_batch: int = 32  # rows per device and forward pass
    steps: int = 1000  # updates
    learning_rate: float = 1e-4  # peak
    warmup_steps: int = 100  # updates of linear warm-up
    min_lr_share: float = 0.05  # the cosine ends at this share of the peak
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.98
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    max_nonfinite_in_row: int = 10  # updates withheld, their loss or gradient not finite, before the run stops
    seed: int = 0

    # Machine
    device: str = "auto"  # "auto" or "cpu"
    dtype: str = (
        "auto"  # of the frozen parts: "float32", "bfloat16", "float16"; "auto" = bfloat16 on a GPU, else float32
    )
    gradient_checkpointing: bool = False  # memory for time

    # Log, checkpoints, Hub
    logging_steps: int = 10
    eval_steps: int | None = None  # updates between validations; None = never
    eval_generate_rows: int = 64  # eval_data rows that a validation answers by generation; 0 = losses only
    eval_max_new_tokens: int = 128  # of such an answer
    save_steps: int | None = None  # updates between checkpoints; None = only the result is saved
    save_total_limit: int = 2  # checkpoints kept
    best_metric: str | None = None  # e.g. "eval_ce_loss": the result is the checkpoint with the best; None = the last
    early_stopping_patience: int | None = None  # validations in a row without a better best_metric; None = all steps
    resume: bool = False  # go on from the last complete checkpoint of output_dir, if there is one
    progress: bool = True  # progress bar
    report_to: list[str] | None = None  # e.g. ["trackio"]; None = TensorBoard where it is installed, [] = none
    hub_model_id: str | None = None  # push the result to this repository
    hub_revision: str | None = None  # branch, created if need be; None = main
    hub_private: bool = False
    hub_strategy: str = "end"  # "end", or "every_save": each checkpoint is pushed too
    hub_patience_s: float = 600.0  # seconds within which the result's push is tried again; then `soundwave push`

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ConfigError(f"stage is {self.stage!r}, expected one of {', '.join(STAGES)}.")
        for name in (
            *("global_batch", "per_device_batch", "steps", "logging_steps", "save_total_limit"),
            *("lora_r", "encoder_lora_r", "eval_max_new_tokens", "max_nonfinite_in_row"),
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1.")
        for name in ("eval_generate_rows", "bucket_batches", "dataloader_workers", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 0 or more.")
        for name in ("eval_steps", "save_steps", "draws_per_epoch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1, or nothing ({name}=null).")
        if not 0 <= self.max_skipped_fraction <= 1:
            raise ConfigError(f"max_skipped_fraction is {self.max_skipped_fraction}, expected a share from 0 to 1.")
        if self.temperature_start <= 0 or self.temperature_step < 0:
            raise ConfigError(
                f"temperature_start is {self.temperature_start} and temperature_step {self.temperature_step}: "
                "the temperature of eq. 2 must be positive and must not fall; the paper has 1 and 5."
            )
        self._check_batches()
        if self.encoder_cache is not None and self.spec_augment:
            raise ConfigError(
                "encoder_cache and spec_augment exclude each other: cached features are those of the unmasked audio. "
                "Set spec_augment=false, or leave out encoder_cache."
            )
        if self.hub_model_id is not None and "/" not in self.hub_model_id:
            raise ConfigError(f"hub_model_id is {self.hub_model_id!r}, expected OWNER/NAME, as readers will load it.")
        if self.hub_strategy not in ("end", "every_save"):
            raise ConfigError(f"hub_strategy is {self.hub_strategy!r}, expected 'end' or 'every_save'.")
        if self.hub_patience_s < 0:
            raise ConfigError(f"hub_patience_s is {self.hub_patience_s}, expected seconds, 0 or more.")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype is {self.dtype!r}, expected auto, float32, bfloat16 or float16.")
        if self.device not in ("auto", "cpu"):
            raise ConfigError(f"device is {self.device!r}, expected auto or cpu; CUDA_VISIBLE_DEVICES picks a GPU.")
        if self.start_revision is not None and self.start is None:
            raise ConfigError(f"start_revision is {self.start_revision!r}, but start is not set.")
        self.trains = list(self.trains) or list(STAGES[self.stage].trains)
        self.output_dir = self.output_dir or f"runs/{self.stage}"
        self._check_what_trains()
        self._check_best_metric()
        if bool(self.eval_data) != (self.eval_steps is not None):
            raise ConfigError(
                f"eval_data is {self.eval_data} and eval_steps {self.eval_steps}: a validation needs both, rows and "
                "the updates between two; set the other too, or leave both out."
            )

    def _check_what_trains(self) -> None:
        encoder = [part for part in self.trains if part == "encoder_lora" or part.partition(".")[0] == "audio_tower"]
        if self.encoder_cache is not None and encoder:
            raise ConfigError(
                f"trains names {', '.join(encoder)} and encoder_cache is set; an encoder that trains cannot be cached."
            )
        if self.quantization is None:
            return
        if self.quantization not in QUANTIZATIONS:
            raise ConfigError(f"quantization is {self.quantization!r}, expected one of {', '.join(QUANTIZATIONS)}.")
        whole = [part for part in self.trains if part.partition(".")[0] == "language_model"]
        if "lora" not in self.trains or whole:
            raise ConfigError(
                f"quantization is {self.quantization} and trains {self.trains}: a quantized LLM trains through LoRA "
                "alone. Name lora and nothing of language_model, or leave out quantization (stage I has no LLM)."
            )

    def _check_best_metric(self) -> None:
        if self.early_stopping_patience is not None and (self.early_stopping_patience < 1 or self.best_metric is None):
            raise ConfigError(
                f"early_stopping_patience is {self.early_stopping_patience} and best_metric {self.best_metric}: "
                "expected at least 1 validation, and the metric that has to get better, e.g. best_metric=eval_loss."
            )
        if self.best_metric is None:
            return
        higher_is_better(self.best_metric)
        if not self.eval_data or self.eval_steps is None:
            raise ConfigError(
                f"best_metric is {self.best_metric}, but nothing is validated: set eval_data, eval_steps."
            )
        if self.save_steps != self.eval_steps:
            raise ConfigError(
                f"best_metric needs a checkpoint at every validation, but save_steps is {self.save_steps} and "
                f"eval_steps {self.eval_steps}; make them equal."
            )

    def _check_batches(self) -> None:
        """How rows come together: settings that exclude each other."""
        if self.max_seconds_per_batch is not None and self.max_seconds_per_batch <= 0:
            raise ConfigError(f"max_seconds_per_batch is {self.max_seconds_per_batch}, expected seconds above 0.")
        if self.max_seconds_per_batch is not None and self.bucket_batches:
            raise ConfigError(
                f"max_seconds_per_batch is {self.max_seconds_per_batch} and bucket_batches {self.bucket_batches}: "
                "both sort rows by length, so set one of them."
            )
        if not self.streaming:
            if self.stream_rows:
                raise ConfigError(f"stream_rows is {self.stream_rows}, which only streaming=true reads.")
            return
        named = ("max_seconds_per_batch", "bucket_batches", "encoder_cache", "draws_per_epoch")
        if excluded := [name for name in named if getattr(self, name)]:
            raise ConfigError(
                f"streaming is set, and so is {', '.join(excluded)}, which needs to know all rows at the start; leave "
                "it out, or read the sources whole with streaming=false."
            )
        if bool(self.stream_rows) == bool(self.task_weights):
            raise ConfigError(
                f"streaming is set with task_weights {self.task_weights} and stream_rows {self.stream_rows}; the size "
                "of a stream is not known, so give one of them: stream_rows, how many rows each task has (shares by "
                "eq. 2), or task_weights, the shares themselves."
            )
        if self.dataloader_workers > 1:
            raise ConfigError(
                f"streaming is set with {self.dataloader_workers} dataloader_workers, but one process reads a stream; "
                "set 0 or 1."
            )

    @classmethod
    def for_stage(cls, stage: str, **settings: Any) -> "StageConfig":
        """Settings of a stage: the table's defaults, then the given ones.

        Raises:
            ConfigError: for an unknown stage or field, naming it and what comes close.
        """
        if stage not in STAGES:
            raise ConfigError(f"stage is {stage!r}, expected one of {', '.join(STAGES)}.")
        values = {**STAGES[stage].defaults, **settings, "stage": stage}
        known = typing.get_type_hints(cls)
        for name in values:
            check_field(name, list(known))
        return cls(**{name: _convert(name, value, known[name]) for name, value in values.items()})

    @property
    def table(self) -> Stage:
        """This stage's row of the table."""
        return STAGES[self.stage]

    def accumulation(self, devices: int) -> int:
        """Forward passes per update, from the global batch and the number of devices.

        Raises:
            ConfigError: when the global batch is no multiple of `per_device_batch` x `devices`.
        """
        at_once = devices if self.max_seconds_per_batch is not None else self.per_device_batch * devices
        if self.global_batch % at_once:
            by_rows = self.max_seconds_per_batch is None
            rows = f" x per_device_batch {self.per_device_batch}" if by_rows else ""
            raise ConfigError(
                f"global_batch is {self.global_batch}, but {devices} device(s){rows} make {at_once} rows at once; "
                f"make global_batch a multiple (the nearest is {max(1, round(self.global_batch / at_once)) * at_once})"
                f"{' or change per_device_batch' if by_rows else ''}."
            )
        return self.global_batch // at_once

    def portable(self) -> dict[str, Any]:
        """The settings without folders of this machine: local paths are cut to their last part."""
        values = dataclasses.asdict(self)
        for name in ("output_dir", "start", "audio_model", "text_model", "data_root", "encoder_cache"):
            values[name] = portable_source(values[name])
        for name in ("data", "eval_data"):
            values[name] = [portable_source(source) for source in values[name]]
        return values

    def save(self, path: str | Path) -> None:
        """Write the settings as YAML, see `portable`."""
        text = yaml.safe_dump(self.portable(), sort_keys=False, allow_unicode=True)
        Path(path).write_text(text, encoding="utf-8")


def higher_is_better(metric: str) -> bool:
    """Whether a validation metric (`eval_loss`, `eval_wer`, `eval_accuracy_intent`, ...) is better when higher.

    Raises:
        ConfigError: for a name that tells no direction.
    """
    for name, higher in METRICS.items():
        if metric.startswith("eval_") and f"_{name}_" in f"{metric}_":
            return higher
    raise ConfigError(
        f"best_metric is {metric!r}, expected a validation metric: eval_, then a name with one of "
        f"{', '.join(METRICS)} in it, such as eval_loss or eval_accuracy_intent."
    )


def load_config(path: str | Path | None, overrides: Sequence[str] = (), stage: str | None = None) -> StageConfig:
    """Settings from a YAML file (`None`: the stage's defaults), changed by `field=value` (`model.ctc_head=separate`).

    An override without a value, `data_root=`, takes the file's setting back.

    Raises:
        ConfigError: for an unreadable file, an unknown field, a value of the wrong type, or a file of another stage.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read the configuration {path}: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds a {type(values).__name__}, expected `field: value` lines.")
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} is not of the form field=value.")
        value = yaml.safe_load(text)
        if "." in name:  # one entry of a field that is a mapping
            name, _, key = name.partition(".")
            value = {**(values.get(name) or {}), key: value}
        values[name] = value
    named = values.pop("stage", None)
    if stage is not None and named not in (None, stage):
        raise ConfigError(f"{path} is for the stage {named!r}, but {stage!r} was asked for.")
    if stage is None and named is None:
        raise ConfigError(f"{path} does not name its stage; add `stage: align`, `shrink` or `instruct`.")
    return StageConfig.for_stage(stage or named, **values)


def check_field(name: str, known: Sequence[str], prefix: str = "") -> None:
    """Refuse a name that no setting has, saying which come close.

    Raises:
        ConfigError: naming it with its prefix (`model.`, for the fields of the model).
    """
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the fields are {', '.join(known)}."
        raise ConfigError(f"there is no setting {prefix + name!r}; {hint}")


def _convert(name: str, value: Any, hint: Any) -> Any:
    """A YAML value as the field's type. YAML reads 1e-4 as a string, and a list of one is easily left a scalar."""
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and (type(None) in choices):
        return None
    kind = choices[0]
    base = typing.get_origin(kind) or kind
    if value is None and base is str:  # `field=`
        return ""
    try:
        if base is list:
            items = [value] if isinstance(value, (str, int, float)) else list(value or [])
            return [str(item) for item in items]
        if base is dict:
            return {str(key): item for key, item in (value or {}).items()}
        if base is bool and not isinstance(value, bool):
            raise TypeError
        if base is int and (isinstance(value, bool) or float(value) != int(float(value))):
            raise TypeError
        if base is str and not isinstance(value, (str, int, float)):
            raise TypeError
        return base(float(value)) if base is int else base(value)
    except (TypeError, ValueError, AttributeError):
        raise ConfigError(f"{name} is {value!r}, expected {getattr(base, '__name__', base)}.") from None


def portable_source(path: str | None) -> str | None:
    """A path without this machine's folders; relative paths and Hub ids stay."""
    return Path(path).name if path and Path(path).is_absolute() else path
