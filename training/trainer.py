"""One Trainer subclass per stage, thin, over one mixin: what trains, which rows come, and how losses are counted.

Losses are means per token, over all devices and accumulated passes; labels and CTC targets are counted apart.
Everything random follows from the seed and the step, so that a run that was cut short goes on exactly.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from soundwave.training.augment import SpecAugment
from soundwave.training.batching import LengthBatches
from soundwave.training.checkpoints import CheckpointMixin
from soundwave.training.finite import FiniteCallback, FiniteMixin
from soundwave.training.freezing import freeze
from soundwave.training.generating import AnswerCheck, AnsweringMixin
from soundwave.training.hub import HubMixin
from soundwave.training.incidents import Tally
from soundwave.training.mixture import MixtureSampler
from soundwave.training.monitoring import Monitor, MonitoringMixin, TensorBoard
from soundwave.training.progress import Progress, StageCallback
from soundwave.training.recomputing import recompute_in_evaluation
from soundwave.training.skipping import SkippingCallback, SkippingCollator, SkippingMixin, rows_taken, take_rows
from soundwave.training.stages import STAGES, ConfigError
from soundwave.training.streaming import StreamCallback, StreamedMixture
from soundwave.training.validation import ValidationMixin, count_tokens


class SoundwaveTrainerMixin(
    SkippingMixin, FiniteMixin, ValidationMixin, AnsweringMixin, MonitoringMixin, CheckpointMixin, HubMixin
):
    """What the three trainers share; comes before the library's Trainer in their bases.

    Args:
        model: a Soundwave model; for stages II and III with LoRA injected (`lora.add_lora`).
        args: `TrainingArguments` (`trl.SFTConfig` for stage III).
        train_dataset: rows of `data.load_rows`.
        processing_class: the `SoundwaveProcessor`.
        eval_dataset: rows for the validation losses.
        data_collator: `None` = a `SkippingCollator` with the stage's losses.
        sampler: `None` = the mixture of eq. 2 over the rows' tasks, with the stage's schedule. With a
            `StreamedMixture`, `train_dataset` is its `dataset()`.
        batches: the sampler's draws in micro-batches by seconds; `None` = by rows.
        spec_augment: masks for the log-mel of training batches.
        trains: what trains; `None` = as the stage table says.
        max_skipped_fraction: share of bad rows above which the run stops, see `skipping`.
        max_nonfinite_in_row: updates in a row without a finite loss and gradient before it stops, see `finite`.
        answer_check: how many rows of `eval_dataset` a validation answers by generation; `None` = losses only.
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
        sampler: MixtureSampler | StreamedMixture | None = None,
        batches: LengthBatches | None = None,
        spec_augment: SpecAugment | None = None,
        trains: Sequence[str] | None = None,
        max_skipped_fraction: float = 0.05,
        max_nonfinite_in_row: int = 10,
        answer_check: AnswerCheck | None = None,
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
        if args.activation_checkpointing and hasattr(model, "language_model"):
            recompute_in_evaluation(model.language_model)  # a frozen one stays in evaluation mode
        self.spec_augment = spec_augment
        self.max_skipped_fraction, self.max_nonfinite_in_row = max_skipped_fraction, max_nonfinite_in_row
        self.losses = table.losses
        self.batches = batches
        if batches is None:
            self.global_batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        else:
            args.gradient_accumulation_steps, self.global_batch = batches.passes, batches.mixture.batch
            sampler = batches.mixture
        self.sampler = sampler or MixtureSampler(
            train_dataset["task"][:],
            seed=args.seed,
            temperature_step=table.defaults.get("temperature_step", 0.0),
            multiple_of=self.global_batch,
        )
        self.streamed = isinstance(self.sampler, StreamedMixture)
        if self.streamed:
            args.ignore_data_skip = True  # `StreamCallback` does, without decoding what it passes by
            args.accelerator_config.dispatch_batches = False  # one process would cut batches apart for the others
        args.remove_unused_columns = False  # the collator reads the rows' own columns
        had_use_cache = "use_cache" in vars(model.config)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or SkippingCollator(processing_class, table.losses, config=model.config),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=None,  # `ValidationMixin` has the figures; nobody else's could be made of them
            **kwargs,
        )
        if not had_use_cache:  # set by the Trainer for itself; the published configuration must not say it
            vars(model.config).pop("use_cache", None)
        self.loss_is_scaled_for_ga = True  # divided by counts over the accumulated passes, not by their number
        self._names = [{"answer": "ce_loss", "ctc": "ctc_loss"}[loss] for loss in self.losses]
        self._sums = torch.zeros(len(self._names), device=args.device)  # of the losses since the last log
        self._update_sums = torch.zeros_like(self._sums)  # of those of the update that is being made
        self._passes = 0  # since the last update
        self.monitor = Monitor(args.device, model.config.mask_padding)
        self.answer_check = answer_check
        if self.pop_callback(TensorBoardCallback) is not None:
            self.add_callback(TensorBoard)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(StageCallback(self))
        for callback in (Tally(), SkippingCallback(self), FiniteCallback(self)):
            self.add_callback(callback)
        if self.streamed:
            self.add_callback(StreamCallback(self))
        if not args.disable_tqdm:
            self.add_callback(Progress(self.stage))

    # Rows

    def _get_train_sampler(self, train_dataset=None):
        return self.sampler

    def get_train_dataloader(self):
        """The library's loader, or one of micro-batches by seconds, or of a stream."""
        if self.batches is None and not self.streamed:
            return super().get_train_dataloader()
        args = self.args
        rows = {"batch_size": self._train_batch_size} if self.streamed else {"batch_sampler": self.batches}
        loader = DataLoader(
            self.train_dataset,
            **rows,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            # Its own, so that to begin a stream anew when resuming leaves the dropout's random numbers alone.
            generator=torch.Generator(),
        )
        return self.accelerator.prepare(loader)

    def get_total_train_batch_size(self, args):
        """Rows per update."""
        return self.global_batch

    # Losses

    def _get_num_items_in_batch(self, batch_samples, device):
        """Labels and CTC targets of one update, over all passes and devices; called once per update."""
        taken = [take_rows(batch) for batch in batch_samples]
        tokens = torch.stack([count_tokens(batch) for batch in batch_samples]).sum(dim=0)
        counts = self.accelerator.reduce(torch.cat([tokens, rows_taken(taken)]).to(device), "sum")
        self._counts, (drawn, skipped) = counts[:2], counts[2:].tolist()
        self.count_rows(drawn, skipped, [bad for _, part in taken for bad in part])
        self.begin_update([ids for ids, _ in taken], empty=skipped == drawn > 0)
        self._update_sums.zero_()
        self._passes = 0
        return self._counts[0]

    def keep_losses(self):
        """Add the losses of an update that is made to those of the next log."""
        self._sums += self._update_sums

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The stage's loss as its share of the update's mean per token (see `_get_num_items_in_batch`)."""
        if self.spec_augment is not None and "input_features" in inputs:
            inputs["input_features"] = self.spec_augment(
                inputs["input_features"], inputs.get("input_features_mask"), self._mask_seed()
            )
        self._passes += 1
        outputs = self._forward(model, inputs, self._counts)
        self.monitor.add(inputs, outputs)
        with torch.no_grad():
            for k, name in enumerate(self._names):
                loss = getattr(outputs, name)
                if loss is not None:  # a batch without recordings has no CTC loss
                    self._update_sums[k] += loss
        self.note_loss(outputs.loss)
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
        """Add each loss by its name, counts and rates to the line that reports the total."""
        if "loss" in logs:
            if self._made:
                sums = self.accelerator.reduce(self._sums, "sum") / self._made
                logs |= dict(zip(self._names, sums.tolist(), strict=True))
                self._sums.zero_()
            updates = self._made + self._withheld  # `FiniteMixin.log`, which comes next, begins anew
            logs |= self.monitor.line(updates, lambda counts: self.accelerator.reduce(counts, "sum"))
        super().log(logs, start_time)

    def floating_point_ops(self, inputs):
        """Not counted: the library's rule counts prompt ids, not audio, and walks all parameters at each step."""
        return 0


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
