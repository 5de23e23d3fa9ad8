"""Checkpoints of a run: which of them count, what is in them, what of them is nobody else's.

A folder counts once `complete.json` is in it. That is written last, by a rename, when every other file has reached the
disk, and holds their sizes: a save cut short, or a file that was damaged later, is recognised. Older checkpoints are
deleted after that, so at no moment is the disk without a complete one.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from soundwave.modeling_soundwave.weights_soundwave import WeightsError, find_shards, read_tensors, saved_name
from soundwave.training.stages import ConfigError, StageConfig

logger = logging.getLogger(__name__)

LOG = "train_log.jsonl"
MANIFEST = "complete.json"
# Of a checkpoint folder: what only a resumed run needs, and what must not leave this machine.
PRIVATE = [
    "checkpoint-*",
    "_*",
    "optimizer*",
    "scheduler*",
    "scaler*",
    "rng_state*",
    "pytorch_model_fsdp*",  # weights as FSDP and ZeRO resume from them
    "global_step*",
    "latest",
    "zero_to_fp32.py",
    "trainer_state.json",
    "training_args.bin",
    "skipped.jsonl",
    "nonfinite.jsonl",
    "logs/*",  # TensorBoard's
    MANIFEST,
]
# What an evaluation leaves beside the weights that it asked.
FIGURES = ("results.json", "answers.*", "judgements.jsonl", ".eval_results")
FIGURES_ASIDE = "_earlier_results"  # `PRIVATE`, as all that begins so
# Beginnings of the settings that may change when a run goes on: where and how it runs, is validated, logged and kept.
# All others decide what it learns.
MAY_CHANGE = (
    *("output_dir", "data_root", "resume", "steps", "per_device_batch", "encoder_cache", "dataloader_workers"),
    *("device", "dtype", "gradient_checkpointing"),
    *("max_skipped_fraction", "max_nonfinite_in_row"),
    *("logging_", "eval_", "save_", "progress", "report_to", "hub_"),
)


class IncompleteError(ValueError):
    """A folder whose writing was cut short, or of which a file is gone or has another size."""


def mark_complete(folder: str | Path, files: Iterable[Path], **facts: Any) -> None:
    """Write `complete.json`, once the files are on the disk: their names and sizes, and `facts` that JSON can hold."""
    sizes = {}
    for path in sorted(files):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sizes[str(path.relative_to(folder))] = path.stat().st_size
    write_whole(Path(folder) / MANIFEST, json.dumps({**facts, "files": sizes}, indent=1, ensure_ascii=False))


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """What `complete.json` says, after a look at the files.

    Raises:
        IncompleteError: naming the first file that is missing or has another size.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise IncompleteError(f"{folder} was cut short: it has no whole {MANIFEST}") from None
    for name, size in manifest["files"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            problem = "is missing" if found is None else f"has {found} bytes"
            raise IncompleteError(f"{folder} is damaged: {name} {problem}, {size} bytes were written")
    return manifest


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that a reader finds the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"_{path.name}")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoint folders of a run, complete or not, newest first."""
    steps = {path: path.name.rpartition("-")[2] for path in Path(folder).glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path in steps if steps[path].isdigit()), key=lambda path: int(steps[path]), reverse=True)


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint of a run that is complete, or `None` where there is none yet.

    Raises:
        ConfigError: when there are checkpoints, none is complete, and not because the very first was cut short.
    """
    problems: list[str] = []
    found = checkpoints(folder)
    for path in found:
        try:
            read_manifest(path)
        except IncompleteError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            logger.warning("%s; going on from %s.", problem, path.name)
        return path
    if len(found) > 1 or (found and (found[0] / MANIFEST).exists()):
        raise ConfigError(
            f"none of the {len(found)} checkpoints in {folder} is complete: {'; '.join(problems)}. Put back the "
            "missing files, or remove the checkpoint-* folders to begin anew."
        )
    for problem in problems:
        logger.warning("%s; it is the first of the run, which begins anew.", problem)
    return None


def refuse_old_checkpoints(folder: str | Path) -> None:
    """Keep a new run out of a folder that holds another run's checkpoints: both would be numbered alike.

    Raises:
        ConfigError: naming the newest of them.
    """
    found = checkpoints(folder)
    if found:
        raise ConfigError(
            f"output_dir {folder} holds {len(found)} checkpoint(s) of an earlier run, the newest {found[0].name}: go "
            "on from it with resume=true, name another output_dir, or remove the checkpoint-* folders."
        )


def deciding_settings(config: StageConfig, rows: Any) -> dict[str, Any]:
    """The settings that decide what a run learns, and which rows it has; without folders of this machine."""
    settings = {name: value for name, value in config.portable().items() if not name.startswith(MAY_CHANGE)}
    if config.best_metric is not None:  # figures of other rows do not compare
        settings |= {"eval_data": config.portable()["eval_data"], "eval_generate_rows": config.eval_generate_rows}
    if isinstance(rows, Dataset):
        digest = hashlib.sha256()
        for part in rows.select_columns(["id", "task"]).iter(10_000):
            digest.update(json.dumps(part).encode())
        settings["data"] = f"{', '.join(settings['data'])} ({len(rows)} rows, {digest.hexdigest()[:12]})"
    return settings


def check_settings(folder: str | Path, settings: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The manifest of a checkpoint or result that a run goes on from.

    Raises:
        ConfigError: for settings that differ from those it was made with, or fewer steps than it has done.
    """
    manifest = read_manifest(folder)
    before = manifest["settings"]
    changed = [
        f"{name} was {before[name]!r} and is {settings[name]!r}"
        for name in sorted(before.keys() & settings.keys())  # a newer version may have more
        if before[name] != settings[name]
    ]
    if changed:
        raise ConfigError(
            f"{folder} was made with other settings: {'; '.join(changed)}. Set them back to go on with that run "
            "(steps, per_device_batch, and where it runs, is validated, logged and saved may change), or begin "
            f"another with resume=false and a new output_dir; start={folder} takes over the weights."
        )
    if manifest["step"] > steps:
        raise ConfigError(
            f"steps is {steps}, but {folder} has done {manifest['step']} already; ask for at least as many."
        )
    return manifest


def is_over(manifest: Mapping[str, Any], steps: int) -> bool:
    """Whether no update is left to do after a checkpoint or result: all are done, or it was stopped early."""
    return manifest["stopped_early"] or manifest["step"] >= steps


def is_finished(folder: str | Path, settings: Mapping[str, Any], steps: int) -> bool:
    """Whether a folder holds the saved result of a run with these settings.

    Raises:
        ConfigError: for the result of a run with other settings, or one that more steps cannot go on from.
    """
    try:
        read_manifest(folder)
    except IncompleteError:
        return False
    manifest = check_settings(folder, settings, steps)
    if is_over(manifest, steps):
        return True
    if not checkpoints(folder):
        raise ConfigError(
            f"{folder} holds a result of {manifest['step']} steps and no checkpoint to go on from; begin another run "
            f"from its weights with start={folder}, resume=false and a new output_dir."
        )
    return False


@dataclass(frozen=True)
class Beginning:
    """Where a run goes on."""

    folder: Path | None = None  # a checkpoint, or the output folder with the result; None = it begins anew
    step: int = 0  # updates that are done
    finished: bool = False  # nothing is left to train


def beginning(config: StageConfig, settings: Mapping[str, Any]) -> Beginning:
    """Where a run with these `deciding_settings` goes on, in its output folder.

    Raises:
        ConfigError: with `resume` for what another run left there; without it, for checkpoints of any run.
    """
    if not config.resume:
        refuse_old_checkpoints(config.output_dir)
        return Beginning()
    if is_finished(config.output_dir, settings, config.steps):
        return Beginning(Path(config.output_dir), read_manifest(config.output_dir)["step"], finished=True)
    checkpoint = last_complete_checkpoint(config.output_dir)
    if checkpoint is None:
        return Beginning()
    return Beginning(checkpoint, check_settings(checkpoint, settings, config.steps)["step"])


def set_figures_aside(folder: Path) -> None:
    """Move the results of an evaluation out of a run's way: they are figures of weights that change now."""
    found = [path for pattern in FIGURES for path in folder.glob(pattern)]
    if not found:
        return
    aside = folder / FIGURES_ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for path in found:
        path.replace(aside / path.name)
    logger.warning("%s: the results of the weights before this training are in %s now.", folder, FIGURES_ASIDE)


class CheckpointMixin(Trainer):
    """How the trainers save and load: the trained tensors only, under the names that the model's files have."""

    run_settings: Mapping[str, Any] = {}  # see `deciding_settings`; noted in each checkpoint

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """Train; `resume_from_checkpoint=True` goes on from the last complete checkpoint, if there is one."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        if self.is_world_process_zero():
            (Path(self.args.output_dir) / MANIFEST).unlink(missing_ok=True)
            set_figures_aside(Path(self.args.output_dir))
        return super().train(str(resume_from_checkpoint) if resume_from_checkpoint else None, *args, **kwargs)

    def mark_finished(self) -> None:
        """Note that the output folder holds the whole result: without that, a resumed run saves it again."""
        folder = Path(self.args.output_dir)
        self._mark(folder, folder.glob("*.safetensors*"), self.state.global_step < self.state.max_steps)

    def _mark(self, folder: Path, files: Iterable[Path], stopped_early: bool) -> None:
        facts = {"step": self.state.global_step, "stopped_early": stopped_early, "settings": dict(self.run_settings)}
        mark_complete(folder, files, **facts)

    def _init_training_state(self, max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial):
        begin = super()._init_training_state(max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial)
        if resume_from_checkpoint is None:
            return begin
        self.state.compute_steps(self.args, max_steps)  # the library would keep the intervals of the run before
        # Of a run that was killed after its last update only the end is left; the library would do one update more.
        return (epochs, 0) if is_over(read_manifest(resume_from_checkpoint), max_steps) else begin

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = model if model is not None else self.model
        path = Path(resume_from_checkpoint)
        try:
            tensors = read_tensors(find_shards(str(path)))
        except WeightsError as error:
            raise ConfigError(f"{path} is no checkpoint of this package: {error}") from error
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

    def _load_best_model(self):
        """By the names in our files: the library's own way would leave LoRA as it is, in silence."""
        if self.is_deepspeed_enabled:
            return super()._load_best_model()
        return self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save_checkpoint(self, model, trial):
        """Save, mark as complete, and only then delete older ones: the library deletes before it knows."""
        folder = Path(self._get_output_dir(trial))
        new = folder / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (new / MANIFEST).unlink(missing_ok=True)
            _delete_incomplete(folder)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # each process writes its random state
        if self.args.should_save:
            stopped_early = self.control.should_training_stop and self.state.global_step < self.state.max_steps
            self._mark(new, (path for path in new.rglob("*") if path.is_file()), stopped_early)
            rotate_checkpoints(str(folder), limit, self.state.best_model_checkpoint)

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        # A pickle with this machine's paths and the Hub token; nothing reads it.
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def log(self, logs, start_time=None):
        """Log; the mean loss at the end is that of the whole run, where the library's begins at a resume."""
        if "train_loss" in logs:
            total, step = 0.0, 0
            for entry in self.state.log_history:
                if "loss" in entry:
                    total, step = total + entry["loss"] * (entry["step"] - step), entry["step"]
            logs["train_loss"] = total / max(step, 1)
        super().log(logs, start_time)

    def write_log(self) -> None:
        """Write all log lines of the run, those before a resume included, to `train_log.jsonl`."""
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in self.state.log_history]
        write_whole(Path(self.args.output_dir) / LOG, "".join(lines))


def _delete_incomplete(folder: Path) -> None:
    """Delete the checkpoints that a kill left unfinished: their place may be needed, and they never count."""
    for path in checkpoints(folder):
        try:
            read_manifest(path)
        except IncompleteError:
            shutil.rmtree(path)
