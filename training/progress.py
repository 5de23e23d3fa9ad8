"""What a run leaves on the screen and on disk while it goes: progress bar, log lines, checkpoints that count."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from soundwave.training.stages import ConfigError

LOG = "train_log.jsonl"
# Of a checkpoint folder: what only a resumed run needs, and what must not leave this machine.
PRIVATE = [
    "checkpoint-*",
    "_*",
    "optimizer*",
    "scheduler*",
    "scaler*",
    "rng_state*",
    "trainer_state.json",
    "training_args.bin",
]
MARKER = "trainer_state.json"  # written last: a checkpoint without a whole one was cut short


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint of a run whose marker is whole, or `None`."""
    found = sorted(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        try:
            json.loads((path / MARKER).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            continue
        return path
    return None


def refuse_old_checkpoints(folder: str | Path) -> None:
    """Keep a new run out of a folder that holds another run's checkpoints: both would be numbered alike.

    Raises:
        ConfigError: naming the newest of them.
    """
    found = sorted(Path(folder).glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    if found:
        raise ConfigError(
            f"output_dir {folder} holds {len(found)} checkpoint(s) of an earlier run, the newest {found[-1].name}: go "
            "on from it with resume=true, name another output_dir, or remove the checkpoint-* folders."
        )


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
