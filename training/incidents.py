"""What went wrong in a run without stopping it: a list in a file, counts that a resumed run goes on from.

All of it is a function of the step: a resumed run drops the lines of steps that it repeats, and writes them again.
"""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState


def report(message: str) -> None:
    """A line on stderr, above the progress bar."""
    with tqdm.external_write_mode(file=sys.stderr):
        sys.stderr.write(f"soundwave train: {message}\n")


class Tally(TrainerCallback, ExportableState):
    """Counts of a run, by name; every checkpoint holds them."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, Any]] = {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"args": {}, "attributes": {"counts": self.counts}}

    def on_train_begin(self, args, state, control, **kwargs):
        """Go on from the checkpoint's counts, whether or not the library restores callbacks."""
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        self.counts = saved["attributes"]["counts"] if saved else {}


def counts_of(trainer: Trainer, name: str, **start: Any) -> dict[str, Any]:
    """The trainer's counts of a name; `start` is what they begin with."""
    # Looked up: the library replaces a callback that it restores.
    tally = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Tally))
    return tally.counts.setdefault(name, start)


class IncidentList:
    """A JSON-lines file of the first process; every line has the `step` that it belongs to.

    Args:
        path: the file.
        step: the run has made so many steps; later lines of an earlier attempt, and one cut short, are dropped.
    """

    def __init__(self, path: str | Path, step: int):
        self.path = Path(path)
        self.entries: list[dict[str, Any]] = []  # found when the list was opened
        if not self.path.is_file():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if entry["step"] <= step and step > 0:
                self.entries.append(entry)
        if not self.entries:
            self.path.unlink()
            return
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text("".join(map(_line, self.entries)), encoding="utf-8")
        os.replace(partial, self.path)

    def add(self, entries: Iterable[dict[str, Any]]) -> None:
        """Append lines, at once: a run that is killed loses none that a checkpoint counts."""
        entries = list(entries)
        if entries:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(map(_line, entries)))


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"
