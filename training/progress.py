"""What a run leaves on the screen and on disk while it goes: progress bar and log lines."""

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback


class StageCallback(TrainerCallback):
    """Keeps the sampler's epoch, notes what each epoch draws, and writes the log beside the weights."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Set the sampler's epoch and log its temperature and exact counts."""
        # Told here too: the loader that skips what a resumed run has seen does not pass the epoch on to its sampler.
        sampler, epoch = self.trainer.sampler, int(state.epoch or 0)
        sampler.set_epoch(epoch)
        if epoch == (state.epoch or 0):  # a resumed epoch was noted when it began
            remaining = (state.max_steps - state.global_step) * self.trainer.global_batch
            counts = {f"draws/{task}": count for task, count in sampler.counts(epoch, remaining).items()}
            self.trainer.log({"temperature": sampler.temperature(epoch), **counts})

    def on_save(self, args, state, control, **kwargs):
        """Write the log."""
        if state.is_world_process_zero:
            self.trainer.write_log()

    on_train_end = on_save


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

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the losses behind the bar."""
        if self.training_bar is not None and logs and "loss" in logs:
            shown = {name: f"{logs[name]:.3g}" for name in ("ce_loss", "ctc_loss", "learning_rate") if name in logs}
            self.training_bar.set_postfix(shown)
