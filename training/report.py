"""The report of a run: `report.md` with a few tables and its curves, made from the files that the run wrote."""

import dataclasses
import importlib.util
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from soundwave.training.checkpoints import LOG
from soundwave.training.curves import draw_curves, draw_mixture
from soundwave.training.finite import NONFINITE
from soundwave.training.skipping import SKIPPED
from soundwave.training.stages import StageConfig

REPORT = "report.md"
CURVES_FOLDER = "curves"
TITLES = {"align": "Stage I: alignment", "shrink": "Stage II: shrinking", "instruct": "Stage III: instruction"}
#: Logged name -> title of its panel, in this order.
TRAINING_CURVES = {
    "loss": "Loss",
    "ce_loss": "Cross-entropy per token",
    "ctc_loss": "CTC loss per token",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "compression_ratio": "Aligned frames per LLM position",
    "tokens_per_second": "Target tokens per second",
    "audio_seconds_per_second": "Audio seconds per second",
    "steps_per_second": "Steps per second",
}
SPREAD = ("loss", "ce_loss", "ctc_loss", "grad_norm")  # values over orders of magnitude
LINEAR = [title for name, title in TRAINING_CURVES.items() if name not in SPREAD]
#: Of a validation's line: how long it took, which is no result.
EVAL_TIMES = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")
EVAL_FAILURES = ("skipped", "unanswered")  # rows; shown where there are any
#: Settings that say where a run goes and what it shows, not what it trains.
LOCAL_SETTINGS = ("stage", "output_dir", "resume", "progress", "report_to", "hub_model_id", "hub_revision")


def write_run_report(folder: str | os.PathLike[str]) -> Path:
    """Write `report.md` and the PNGs in `curves/` of a finished run, resumed ones as a whole; returns its path.

    Args:
        folder: of the run, with its `train_log.jsonl` and `stage_config.yaml`; `skipped.jsonl` and `nonfinite.jsonl`
            are counted if they are there. Without matplotlib the tables come alone.
    """
    folder = Path(folder)
    log = read_log(folder / LOG)
    settings = yaml.safe_load((folder / "stage_config.yaml").read_text(encoding="utf-8"))
    parts = [f"# {TITLES[settings['stage']]}", markdown_table(["", ""], _summary(log, settings, folder))]
    validations = _validations(log)
    if validations:
        parts += ["## Validation", markdown_table(["", "First", "Last", "Lowest", "Highest"], _spread(validations))]
    parts += _pictures(folder, log, validations)
    changed = _changed_settings(settings)
    parts += ["## Settings", "What differs from the stage's defaults; all of them are in `stage_config.yaml`."]
    parts += [markdown_table(["Setting", "Value"], changed)] if changed else []
    path = folder / REPORT
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Entries of a training log: JSON lines, or a `trainer_state.json` with its `log_history`."""
    text = Path(path).read_text(encoding="utf-8")
    if Path(path).suffix == ".json":
        return json.loads(text)["log_history"]
    return [json.loads(line) for line in text.splitlines()]


def read_curve(log: str | os.PathLike[str], key: str = "loss") -> list[tuple[int, float]]:
    """`(step, value)` of one name in a training log."""
    return _curve(read_log(log), key)


def _curve(log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(int(entry["step"]), float(entry[key])) for entry in log if key in entry]


def _summary(log: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], folder: Path) -> list[list[str]]:
    lines = [entry for entry in log if "steps_per_second" in entry]
    rows = [["Started from", settings["start"] or f"{settings['audio_model']}, {settings['text_model']}"]]
    if lines:
        last, seconds, before = lines[-1], 0.0, 0
        for entry in lines:
            seconds += (entry["step"] - before) / entry["steps_per_second"]
            before = entry["step"]
        audio_s, tokens = (sum(entry[name] for entry in lines) for name in ("audio_seconds", "target_tokens"))
        rows += [
            ["Steps", f"{last['step']:,} of {settings['steps']:,}, {last['epoch']:.3g} epochs"],
            ["Rows trained on", f"{sum(entry['rows'] for entry in lines):,}"],
            ["Audio trained on", f"{audio_s / 3600:,.4g} h" if audio_s >= 360 else f"{audio_s:,.4g} s"],
            ["Target tokens trained on", f"{tokens:,}"],
            ["Time, without validation and saving", duration(seconds)],
            ["Speed", f"{audio_s / seconds:,.3g} s of audio and {tokens / seconds:,.3g} tokens per second"],
        ]
        named = {name: last[name] for name in ("loss", "ce_loss", "ctc_loss") if name in last}
        rows.append(["Last losses", ", ".join(f"{name} {value:.4g}" for name, value in named.items())])
    if skipped := _lines(folder / SKIPPED):
        reasons = Counter(entry["reason"] for entry in skipped)
        listed = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        rows.append(["Bad rows, left out", f"{len(skipped):,}: {listed}"])
    if left_out := _lines(folder / NONFINITE):
        rows.append(["Updates left out, not finite", f"{len(left_out):,}"])
    return rows


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _validations(log: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Curves of all validation figures, without their `eval_`."""
    names = {name: None for entry in log for name in entry if name.startswith("eval_") and name not in EVAL_TIMES}
    curves = {name.removeprefix("eval_"): _curve(log, name) for name in names}
    return {
        name: curve for name, curve in curves.items() if name not in EVAL_FAILURES or any(value for _, value in curve)
    }


def _spread(validations: Mapping[str, Sequence[tuple[int, float]]]) -> list[list[str]]:
    def shown(point: tuple[int, float]) -> str:
        return f"{point[1]:.4g} (step {point[0]})"

    def value(point: tuple[int, float]) -> float:
        return point[1]

    return [
        [name, *map(shown, (curve[0], curve[-1], min(curve, key=value), max(curve, key=value)))]
        for name, curve in validations.items()
    ]


def _pictures(
    folder: Path, log: Sequence[Mapping[str, Any]], validations: Mapping[str, Sequence[tuple[int, float]]]
) -> list[str]:
    """Draw what was logged; returns the parts of the report that show it."""
    if importlib.util.find_spec("matplotlib") is None:
        return ['Curves are left out without matplotlib: `pip install "soundwave[train]"`.']
    (folder / CURVES_FOLDER).mkdir(exist_ok=True)
    parts = []
    curves = {title: curve for name, title in TRAINING_CURVES.items() if (curve := _curve(log, name))}
    if curves:
        draw_curves(folder / CURVES_FOLDER / "training.png", curves, y_label=None, linear=LINEAR)
        parts += ["## Curves", f"![Losses, learning rate, gradient norm and speed]({CURVES_FOLDER}/training.png)"]
    if validations:
        draw_curves(folder / CURVES_FOLDER / "validation.png", validations, y_label=None)
        parts.append(f"![Figures of the validations]({CURVES_FOLDER}/validation.png)")
    epochs = [
        {
            "epoch": int(entry.get("epoch") or 0),
            "temperature": entry["temperature"],
            "shares": {k.removeprefix("shares/"): v for k, v in entry.items() if k.startswith("shares/")},
        }
        for entry in log
        if "temperature" in entry
    ]
    if epochs:
        draw_mixture(folder / CURVES_FOLDER / "mixture.png", epochs)
        parts += ["## Mixture", f"![Shares of the tasks and temperature, by epoch]({CURVES_FOLDER}/mixture.png)"]
    return parts


def _changed_settings(settings: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the settings that are not the stage's defaults."""
    defaults = dataclasses.asdict(StageConfig.for_stage(settings["stage"]))
    changed = [name for name in defaults if name not in LOCAL_SETTINGS and settings.get(name) != defaults[name]]
    return [[f"`{name}`", _shown(settings.get(name))] for name in changed]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def duration(seconds: float) -> str:
    """``"8 s"``, ``"1 min 05 s"``, ``"2 h 03 min"``."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; bars, angle brackets and line breaks in cells stay text (``<cough>`` is no HTML)."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    escaped = [
        [c.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ") for c in row]
        for row in rows
    ]
    return "\n".join([line(header), line(["---"] * len(header)), *map(line, escaped)])
