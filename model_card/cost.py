"""What a stage's training took, as far as it was measured: from the run's log, never estimated."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from soundwave.model_card.facts import CardFacts
from soundwave.training.checkpoints import LOG
from soundwave.training.report import duration, read_log

NOT_MEASURED = "not measured"
CPU = "CPU"  # in place of an accelerator's name


def training_cost(folder: str | Path, facts: CardFacts) -> list[tuple[str, str]]:
    """Rows of the card's table: what, and what was measured of it.

    The log's lines give the time between two of them, validation and saving left out; those with ``devices`` say what
    the run went on with from that step.
    """
    path = Path(folder) / LOG
    log = read_log(path) if path.is_file() else []
    spans = _spans(log)
    rows = [("training time, without validation and saving", duration(sum(s for *_, s in spans)))] if spans else []
    by_kind: dict[str, float] = {}
    for accelerator, devices, seconds in spans:
        by_kind[accelerator] = by_kind.get(accelerator, 0.0) + devices * seconds
    unknown = by_kind.pop("", 0.0)
    for kind, seconds in sorted(by_kind.items()):
        what = "processor hours" if kind == CPU else f"GPU hours, {kind}"
        rows.append((what, f"{seconds / 3600:.3g}"))
    if unknown:
        rows.append(("GPU hours", f"not known for {duration(unknown)} of it: the log names no device"))
    if not spans and (runtimes := [entry["train_runtime"] for entry in log if "train_runtime" in entry]):
        rows.append(
            ("training time of the last part of the run, validation and saving included", duration(runtimes[-1]))
        )
    audio_s = sum(entry.get("audio_seconds", 0.0) for entry in log)
    if audio_s:
        rows.append(("audio trained on, repeats included", f"{audio_s / 3600:.3g} h"))
    energy = NOT_MEASURED
    if facts.energy_kwh is not None:
        energy = f"{facts.energy_kwh:g} kWh, read from {facts.energy_meter}"
    return [*(rows or [("training time", NOT_MEASURED)]), ("energy", energy)]


def _spans(log: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, float]]:
    """Accelerator (``""``: not known), number of devices and seconds of each stretch that was timed."""
    spans, accelerator, devices, before = [], "", 1, 0
    for entry in log:
        if "devices" in entry:
            accelerator, devices = entry["accelerator"], entry["devices"]
        if entry.get("steps_per_second"):
            spans.append((accelerator, devices, (entry["step"] - before) / entry["steps_per_second"]))
            before = entry["step"]
    return spans
