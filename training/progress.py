"""What a run leaves on the screen and on disk while it goes: progress bar and log lines."""

from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback


class StageCallback(TrainerCallback):
    """Keeps the sampler's epoch, notes what each epoch draws, starts the clock, and writes the log beside the weights.

    A checkpoint and the end of the run fall on a log line: what a line sums up is then never cut by a resume, and the
    last line and validation are those of the final weights.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Note what the run is on, in a line of its own; again only if it goes on with something else."""
        hardware = {"accelerator": accelerator_name(args.device), "devices": args.world_size}
        noted = [entry for entry in state.log_history if "devices" in entry]
        if not noted or any(noted[-1][name] != value for name, value in hardware.items()):
            state.log_history.append({**hardware, "step": state.global_step})

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Set the sampler's epoch and log its temperature and exact counts."""
        # Told here too: the loader that skips what a resumed run has seen does not pass the epoch on to its sampler.
        sampler, epoch = self.trainer.sampler, int(state.epoch or 0)
        if self.trainer.streamed:  # without end, and so without epochs: `StreamCallback`
            return
        sampler.set_epoch(epoch)
        if epoch == (state.epoch or 0):  # a resumed epoch was noted when it began
            remaining = (state.max_steps - state.global_step) * self.trainer.global_batch
            counts = sampler.counts(epoch, remaining)
            total = max(1, sum(counts.values()))
            drawn = {f"draws/{task}": count for task, count in counts.items()}
            drawn |= {f"shares/{task}": count / total for task, count in counts.items()}
            batches = self.trainer.batches
            if batches is not None:
                drawn |= {"passes": batches.passes, "padding_share": batches.padding_share(epoch)}
            self.trainer.log({"temperature": sampler.temperature(epoch), **drawn})

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock of the rates: at the first step, so that what a resumed run skips does not count."""
        self.trainer.monitor.start()

    def on_step_end(self, args, state, control, **kwargs):
        """Log whenever a checkpoint is saved; log and validate at the last step."""
        last = state.global_step >= state.max_steps
        control.should_log = control.should_log or control.should_save or last
        control.should_evaluate = control.should_evaluate or (last and args.eval_strategy != "no")
        return control

    def on_save(self, args, state, control, **kwargs):
        """Write the log."""
        if state.is_world_process_zero:
            self.trainer.write_log()

    on_train_end = on_save


def accelerator_name(device: torch.device) -> str:
    """What a device is called by its maker: ``"NVIDIA H100 80GB HBM3"``; ``"CPU"``; else its type."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "CPU" if device.type == "cpu" else device.type


class Progress(ProgressCallback):
    """A bar with the losses in it instead of a line per log."""

    def __init__(self, stage: str):
        super().__init__()
        self.stage = stage

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the bar, where a resumed run stands."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.stage)
            self.training_bar.update(state.global_step)
            self.current_step = state.global_step

    def on_prediction_step(self, args, state, control, **kwargs):
        """Say what the second bar is about."""
        super().on_prediction_step(args, state, control, **kwargs)
        if self.prediction_bar is not None:
            self.prediction_bar.set_description("validation", refresh=False)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the losses behind the bar."""
        if self.training_bar is not None and logs and "loss" in logs:
            shown = {name: f"{logs[name]:.3g}" for name in ("ce_loss", "ctc_loss", "learning_rate") if name in logs}
            self.training_bar.set_postfix(shown)
