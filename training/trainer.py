"""One Trainer subclass per stage, thin, over one mixin: what trains, which rows come, and how losses are counted.

Losses are means per token, over all devices and accumulated passes; labels and CTC targets are counted apart.
Everything random follows from the seed and the step, so that a run that was cut short goes on exactly.
"""

import json
import operator
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import PushInProgress
from trl import SFTConfig, SFTTrainer

from soundwave.modeling_soundwave.weights_soundwave import saved_name
from soundwave.training.augment import SpecAugment
from soundwave.training.collator import IGNORED, SoundwaveCollator
from soundwave.training.lora import is_lora
from soundwave.training.mixture import MixtureSampler
from soundwave.training.progress import LOG, PRIVATE, Progress, StageCallback
from soundwave.training.stages import STAGES, ConfigError

UNUSED_BY_FRAMES = tuple(f"alignment_adapter.layer.self_attn.{part}_proj." for part in "qk")


def freeze(model: nn.Module, trains: Sequence[str]) -> None:
    """Let only the named parts train, in fp32.

    Args:
        model: any Soundwave model.
        trains: prefixes of parameter names; `"lora"` stands for the LoRA matrices. The rows of a tied CTC head are
            the LLM's and never train, nor do the queries and keys of an alignment layer whose frames see only
            themselves: no gradient reaches them, and several devices would wait for one.

    Raises:
        ConfigError: for a prefix that no parameter has.
    """
    named = dict(model.named_parameters())
    if model.config.ctc_head == "tied":
        named.pop("ctc_head.weight", None)
    if model.config.alignment_attention == "frame":
        named = {name: parameter for name, parameter in named.items() if not name.startswith(UNUSED_BY_FRAMES)}
    model.requires_grad_(False)
    for part in trains:
        chosen = [name for name in named if (is_lora(name) if part == "lora" else (name + ".").startswith(part + "."))]
        if not chosen and part == "lora":
            raise ConfigError("this stage trains LoRA, but the model has none; call lora.add_lora(model, ...) first.")
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
    if name.startswith("audio_tower."):
        config.audio_model_revision = None
    elif name.startswith("language_model.") and not is_lora(name):
        config.text_model_revision = None


def _is_left_out(model: nn.Module, part: str) -> bool:
    """Whether the model knows this parameter and was built without it (a separate CTC head has no scale)."""
    try:
        return operator.attrgetter(part)(model) is None
    except AttributeError:
        return False


class SoundwaveTrainerMixin:
    """What the three trainers share; comes before the library's Trainer in their bases.

    Args:
        model: a Soundwave model; for stages II and III with LoRA injected (`lora.add_lora`).
        args: `TrainingArguments` (`trl.SFTConfig` for stage III).
        train_dataset: rows of `data.load_rows`.
        processing_class: the `SoundwaveProcessor`.
        eval_dataset: rows for the validation losses.
        data_collator: `None` = a `SoundwaveCollator` with the stage's losses.
        sampler: `None` = the mixture of eq. 2 over the rows' tasks, with the stage's schedule.
        spec_augment: masks for the log-mel of training batches.
        trains: what trains; `None` = as the stage table says.
        **kwargs: of the library's Trainer.

    Raises:
        ConfigError: when several GPUs are visible to one process.
    """

    stage: str

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        train_dataset: Any = None,
        processing_class: Any = None,
        eval_dataset: Any = None,
        data_collator: Any = None,
        sampler: MixtureSampler | None = None,
        spec_augment: SpecAugment | None = None,
        trains: Sequence[str] | None = None,
        **kwargs: Any,
    ):
        if args.n_gpu > 1:
            raise ConfigError(
                f"{args.n_gpu} GPUs are visible to one process, which would cut windows and rows apart. "
                "Start one process per GPU with `accelerate launch -m soundwave.training.train ...` or `torchrun`, or "
                "show one GPU with CUDA_VISIBLE_DEVICES."
            )
        table = STAGES[self.stage]
        freeze(model, trains if trains is not None else table.trains)
        self.spec_augment = spec_augment
        self.losses = table.losses
        self.global_batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.sampler = sampler or MixtureSampler(
            train_dataset["task"][:],
            seed=args.seed,
            temperature_step=table.defaults.get("temperature_step", 0.0),
            multiple_of=self.global_batch,
        )
        args.remove_unused_columns = False  # the collator reads the rows' own columns
        had_use_cache = "use_cache" in vars(model.config)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or SoundwaveCollator(processing_class, table.losses),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=_mean_losses,
            **kwargs,
        )
        if not had_use_cache:  # set by the Trainer for itself; the published configuration must not say it
            vars(model.config).pop("use_cache", None)
        self.loss_is_scaled_for_ga = True  # divided by counts over the accumulated passes, not by their number
        self._names = [{"answer": "ce_loss", "ctc": "ctc_loss"}[loss] for loss in self.losses]
        self._sums = torch.zeros(len(self._names), device=args.device)  # of the losses since the last log
        self._updates = self._passes = 0  # since the last log; since the last update
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(StageCallback(self))
        if not args.disable_tqdm:
            self.add_callback(Progress(self.stage))

    # Rows

    def _get_train_sampler(self, train_dataset=None):
        return self.sampler

    # Losses

    def _get_num_items_in_batch(self, batch_samples, device):
        """Labels and CTC targets of one update, over all passes and devices; called once per update."""
        counts = sum(_count_tokens(batch) for batch in batch_samples).to(device)
        self._counts = self.accelerator.reduce(counts, "sum")
        self._passes, self._updates = 0, self._updates + 1
        return self._counts[0]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The stage's loss as its share of the update's mean per token (see `_get_num_items_in_batch`)."""
        if self.spec_augment is not None and "input_features" in inputs:
            inputs["input_features"] = self.spec_augment(
                inputs["input_features"], inputs.get("input_features_mask"), self._mask_seed()
            )
        self._passes += 1
        outputs = self._forward(model, inputs, self._counts)
        with torch.no_grad():
            for k, name in enumerate(self._names):
                loss = getattr(outputs, name)
                if loss is not None:  # a batch without recordings has no CTC loss
                    self._sums[k] += loss
        # The devices' gradients are averaged; ours are shares of a sum.
        loss = outputs.loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _mask_seed(self) -> int:
        """One number per batch of the run, the same however the batches are spread over devices and passes."""
        args = self.args
        batch = self.state.global_step * args.gradient_accumulation_steps + self._passes
        return (args.seed * 1_000_003 + batch * args.world_size + args.process_index) % 2**63

    def _forward(self, model, inputs, counts):
        inputs = dict(inputs)
        if "encoder_features" in inputs:  # cached in fp16
            dtype = next(self.accelerator.unwrap_model(model).alignment_adapter.parameters()).dtype
            inputs["encoder_features"] = inputs["encoder_features"].to(dtype)
        if "answer" in self.losses:
            inputs |= {"num_items_in_batch": counts[0].clamp(min=1), "use_cache": False}
        if "ctc" in self.losses:
            inputs["num_ctc_tokens"] = counts[1].clamp(min=1)
        return model(**inputs)

    def log(self, logs, start_time=None):
        """Add each loss by its name to the line that reports the total."""
        if "loss" in logs and self._updates:
            sums = self.accelerator.reduce(self._sums, "sum") / self._updates
            logs |= dict(zip(self._names, sums.tolist(), strict=True))
            self._sums.zero_()
            self._updates = 0
        super().log(logs, start_time)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss, and per row its share of the batch's sums: B rows each, which gather over devices."""
        inputs = self._prepare_inputs(inputs)
        counts = _count_tokens(inputs)
        with torch.no_grad():
            outputs = self._forward(model, inputs, counts)
        if prediction_loss_only:
            return outputs.loss, None, None
        B = len(inputs["labels"] if "labels" in inputs else inputs["windows_per_audio"])
        sums = [0.0, float(counts[0]), 0.0, float(counts[1]), 0.0]
        if "answer" in self.losses:
            sums[0] = float(outputs.ce_loss * counts[0])
        if outputs.ctc_loss is not None:
            sums[2] = float(outputs.ctc_loss * counts[1].clamp(min=1))
        if self.stage == "align":
            blank = self.accelerator.unwrap_model(model).config.blank_id
            sums[4] = float(_ctc_errors(outputs.token_ids, outputs.mask, blank, inputs))
        rows = torch.tensor(sums, dtype=torch.float64).div(B).expand(B, -1).contiguous().to(self.args.device)
        return outputs.loss, rows, rows[:, :1].contiguous()

    def floating_point_ops(self, inputs):
        """Not counted: the library's rule counts prompt ids, not audio, and walks all parameters at each step."""
        return 0

    # Checkpoints

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = model if model is not None else self.model
        path = Path(resume_from_checkpoint) / "model.safetensors"
        if not path.is_file():
            raise ConfigError(
                f"{resume_from_checkpoint} holds no model.safetensors; it is no checkpoint of this package."
            )
        tensors = load_file(path)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        with torch.no_grad():
            for name, value in model.state_dict().items():
                saved = tensors.get(saved_name(name))
                if saved is not None:
                    value.copy_(saved)
                elif name in trained:
                    raise ConfigError(
                        f"{path} lacks the trained tensor {saved_name(name)}; was it another stage's run?"
                    )

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        # A pickle with this machine's paths and the Hub token; nothing reads it.
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def write_log(self) -> None:
        """Write all log lines of the run, those before a resume included, to `train_log.jsonl`."""
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in self.state.log_history]
        path = Path(self.args.output_dir) / LOG
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")

    # Hub

    def init_hf_repo(self, token=None, private=None):
        """Create the repository, and a named branch: the library leaves that out, and pushes fail in silence."""
        super().init_hf_repo(token=token, private=private)
        if self.is_world_process_zero() and self.args.hub_revision:
            api = HfApi(token=self.args.hub_token)
            api.create_branch(self.hub_model_id, branch=self.args.hub_revision, exist_ok=True)

    def create_model_card(self, *args, **kwargs):
        """Nothing: the card is made by `soundwave.model_card` from results, and a generic one would overwrite it."""

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ):
        """Upload the output folder, without checkpoints and what belongs to this machine."""
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        return self._upload(commit_message, revision, run_as_future=not blocking)

    def _push_from_checkpoint(self, checkpoint_folder):
        """Push a checkpoint in a form that loads: weights, configuration, processor and code files."""
        if not self.is_world_process_zero() or self.args.hub_strategy == "end":
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            return  # the next one will carry more
        # Copied: the checkpoint may be rotated away while the upload runs.
        for file in Path(checkpoint_folder).iterdir():
            if file.is_file() and not any(file.match(pattern) for pattern in PRIVATE):
                shutil.copy2(file, self.args.output_dir)
        self.write_log()
        job = self._upload(f"Training in progress, step {self.state.global_step}", None, run_as_future=True)
        self.push_in_progress = PushInProgress([job])

    def _upload(self, message: str, revision: str | None, run_as_future: bool) -> Any:
        api: Any = HfApi(token=self.args.hub_token)  # its overloads do not know a bool variable
        return api.upload_folder(
            repo_id=self.hub_model_id,
            folder_path=self.args.output_dir,
            commit_message=message,
            revision=revision or self.args.hub_revision,
            ignore_patterns=PRIVATE,
            run_as_future=run_as_future,
        )


class AlignmentTrainer(SoundwaveTrainerMixin, Trainer):
    """Stage I: the alignment adapter of a `SoundwaveForCTC` learns the LLM's space by CTC (§2.2)."""

    stage = "align"


class ShrinkingTrainer(SoundwaveTrainerMixin, Trainer):
    """Stage II: both adapters and LoRA learn to answer from shrunk speech, with CTC beside it (§2.3)."""

    stage = "shrink"


class InstructionTrainer(SoundwaveTrainerMixin, SFTTrainer):
    """Stage III: fine-tuning on instructions (§2.4). `args` is an `SFTConfig`, the rows a `datasets.Dataset`."""

    stage = "instruct"

    def __init__(self, model: PreTrainedModel, args: SFTConfig, *positional: Any, **kwargs: Any):
        if not isinstance(args, SFTConfig):
            raise ConfigError(f"args is a {type(args).__name__}, expected a trl.SFTConfig.")
        # Our collator writes the prompts; the library would tokenize rows as text.
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        args.max_length = None
        super().__init__(model, args, *positional, **kwargs)
        # The library patches in a fused head that needs hidden states as long as the labels; ours grow inside.
        vars(self.model).pop("forward", None)


def _count_tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Labelled tokens and CTC target tokens of a batch, (2,)."""
    labels, lengths = batch.get("labels"), batch.get("ctc_label_lengths")
    return torch.stack(
        [
            torch.tensor(0) if labels is None else (labels != IGNORED).sum().cpu(),
            torch.tensor(0) if lengths is None else lengths.clamp(min=0).sum().cpu(),
        ]
    )


def _mean_losses(prediction: Any) -> dict[str, float]:
    """Mean losses per token over all rows, and the token error rate of the greedy CTC labels in stage I."""
    ce, tokens, ctc, targets, errors = prediction.predictions.sum(axis=0).tolist()
    metrics = {"ce_loss": ce / tokens} if tokens else {}
    if targets:
        metrics["ctc_loss"] = ctc / targets
        if not tokens:  # stage I: only there are the greedy labels compared
            metrics["token_error_rate"] = errors / targets
    return metrics


def _ctc_errors(token_ids: torch.Tensor, mask: torch.Tensor, blank: int, inputs: dict[str, torch.Tensor]) -> int:
    """Edits between the greedy labels (n_audios, A) and the transcripts, over recordings that have one."""
    errors = 0
    lengths = inputs["ctc_label_lengths"].tolist()
    for ids, valid, target, length in zip(token_ids, mask, inputs["ctc_labels"].tolist(), lengths, strict=True):
        if length >= 0:
            heard = [token for token in torch.unique_consecutive(ids[valid]).tolist() if token != blank]
            errors += edit_distance(heard, target[:length])
    return errors


def edit_distance(hypothesis: Sequence[int], reference: Sequence[int]) -> int:
    """Insertions, deletions and substitutions between two sequences."""
    row = list(range(len(reference) + 1))
    for i, token in enumerate(hypothesis, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(reference, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (token != other))
    return row[-1]
