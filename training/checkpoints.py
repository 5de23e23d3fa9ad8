"""Checkpoints of a run: which of them count, what is in them, what of them is nobody else's."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import Trainer

from soundwave.modeling_soundwave.weights_soundwave import saved_name
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


class CheckpointMixin(Trainer):
    """How the trainers save and load: the trained tensors only, under the names that the model's files have."""

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
