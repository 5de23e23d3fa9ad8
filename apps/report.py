"""The quickstart's report: figures, learning curves, one utterance from the inside, spoken samples, what to do next.

``write_report`` makes ``DIR/report.md`` with its pictures and ``DIR/samples/``; ``print_summary`` is the short form on
the screen. Both show figures of ``results.json`` only.
"""

import os
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soundwave.apps.pictures import Utterance, draw_utterance
from soundwave.eval.results import read_answers, read_results
from soundwave.eval.scoring import METRICS
from soundwave.eval.tasks import TASKS
from soundwave.training.curves import draw_curves
from soundwave.training.report import duration, markdown_table

CURVES_PICTURE = "learning_curves.png"
UTTERANCE_PICTURE = "utterance.png"
SAMPLES_FOLDER = "samples"


@dataclass(frozen=True)
class StageSummary:
    """One training of the run.

    Attributes:
        title: Such as ``"Stage I: alignment"``.
        trains: What was trained, in words.
        seconds: Wall-clock time.
        steps: Updates of the weights.
        curve: ``(step, loss)`` as logged.
        folder: Where its model and ``results.json`` lie; ``None`` if it was not evaluated.
        figures: Further measured figures by name, already with their unit, such as the encoder's frame accuracy.
    """

    title: str
    trains: str
    seconds: float
    steps: int
    curve: Sequence[tuple[int, float]] = ()
    folder: str | os.PathLike[str] | None = None
    figures: Mapping[str, str] = field(default_factory=dict)


def percent(entry: Mapping[str, Any]) -> str:
    """``"4.7% (3.9 to 5.6)"`` of anything with a value and an interval."""
    low, high = entry["interval"]
    return f"{100 * entry['value']:.1f}% ({100 * low:.1f} to {100 * high:.1f})"


def results_table(stages: Sequence[StageSummary]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a row per test set, a column per evaluated stage; failures are shown where there are any."""
    evaluated = [(stage, {e["name"]: e for e in read_results(stage.folder)}) for stage in stages if stage.folder]
    evaluated = [(stage, entries) for stage, entries in evaluated if entries]
    keys = list(dict.fromkeys((e["name"], e["metric"]) for _, entries in evaluated for e in entries.values()))
    rows = []
    for name, metric in keys:
        found = [entries.get(name) for _, entries in evaluated]
        found = [e if e is not None and e["metric"] == metric else None for e in found]
        entry = next(e for e in reversed(found) if e is not None)
        cells = [percent(e) + (f", {e['failures']} failed" if e["failures"] else "") if e else "" for e in found]
        arrow = "lower is better" if METRICS[metric].lower_is_better else "higher is better"
        title = TASKS[entry["task"]].title if entry["task"] in TASKS else entry["task"]
        rows.append([f"{title} ({name})", f"{METRICS[metric].title}, {arrow}", str(entry["count"]), *cells])
    return ["Test set", "Metric", "Items", *(stage.title for stage, _ in evaluated)], rows


def write_report(
    out_dir: str | os.PathLike[str],
    *,
    title: str,
    speech: str,
    stages: Sequence[StageSummary],
    next_steps: Sequence[str],
    utterance: Utterance | None = None,
    samples_per_set: int = 2,
    command: str | None = None,
    seconds: float | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write ``report.md``, its two pictures and the samples.

    Args:
        out_dir: Folder of the run.
        title: Of the report.
        speech: What kind of speech this is (synthesized or recorded, by whom, which sentences): a reader must not take
            the figures for those of another kind.
        stages: In the order they ran; their figures are read from their folders' ``results.json``.
        next_steps: Commands to run next, each with a comment in front if it needs one.
        utterance: For the picture (``pictures.look_inside``).
        samples_per_set: Spoken items per test set of the last evaluated stage.
        command: What was run.
        seconds: Wall-clock time from start to end; stages may run side by side, so it is not their sum.
        notes: Further remarks, one paragraph each.

    Returns:
        The path of ``report.md``.
    """
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"# {title}"]
    if command:
        parts.append(_code([command]))
    parts += [f"**What kind of speech this is.** {speech}", *notes]

    parts.append("## Stages")
    further = any(stage.figures for stage in stages)
    header = ["Stage", "Trained", "Steps", "Time"] + (["Figures"] if further else [])
    rows = [
        [s.title, s.trains, str(s.steps), duration(s.seconds)]
        + ([", ".join(f"{name} {value}" for name, value in s.figures.items())] if further else [])
        for s in stages
    ]
    parts.append(markdown_table(header, rows))
    if seconds is not None:
        parts.append(f"From start to end, with data and tests: {duration(seconds)}.")

    header, rows = results_table(stages)
    parts.append("## Results")
    if rows:
        parts += [
            "In brackets: 95% bootstrap interval over the items of the test set. Every answer is in the stage's "
            "`answers.jsonl`, the full settings in its `results.json`.",
            markdown_table(header, rows),
        ]
    else:
        parts.append("Nothing was evaluated.")

    curves = {stage.title: stage.curve for stage in stages if stage.curve}
    if curves:
        draw_curves(folder / CURVES_PICTURE, curves)
        parts += ["## Learning curves", f"![Loss over steps, one panel per training]({CURVES_PICTURE})"]
    if utterance is not None:
        draw_utterance(folder / UTTERANCE_PICTURE, utterance)
        kept, frames = int(utterance.kept.sum()), len(utterance.kept)
        parts += [
            "## One utterance from the inside",
            "From top to bottom: the log-mel spectrogram; the CTC head's arg-max for every frame of 40 ms (a dot is "
            "the blank); the frames that are kept, the first of each run; the words they spell. The kept frames "
            f"gather the rest by cross-attention and stand in the LLM's prompt: {kept} positions for {frames} frames.",
            f"![Spectrogram, CTC peaks, kept frames and words of one utterance]({UTTERANCE_PICTURE})",
        ]

    last = next((s.folder for s in reversed(stages) if s.folder and read_answers(s.folder)), None)
    samples = copy_samples(folder, last, samples_per_set) if last else []
    if samples:
        parts += ["## Listen", "Of each test set the first right and the first wrong answer, where there are both."]
        parts.append(markdown_table(["Recording", "Asked", "Reference", "Answer", ""], samples))
    parts += ["## What to run next", _code(next_steps)]

    report = folder / "report.md"
    report.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return report


def copy_samples(out_dir: Path, answers_folder: str | os.PathLike[str], per_set: int) -> list[list[str]]:
    """Copy some items' recordings to ``out_dir/samples`` and give the rows of their table.

    Wrong answers are shown as often as right ones: a reader should hear what goes wrong.
    """
    (out_dir / SAMPLES_FOLDER).mkdir(parents=True, exist_ok=True)
    by_set: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(read_answers(answers_folder), key=lambda row: row["id"]):
        if row["error"] is None and row["audio"]:
            by_set.setdefault(row["name"], []).append(row)
    metrics = {entry["name"]: entry for entry in read_results(answers_folder)}
    table = []
    for name, rows in by_set.items():
        entry = metrics[name]
        marked = [(_is_right(entry, row), row) for row in rows]
        right, wrong = ([row for good, row in marked if good is wanted] for wanted in (True, False))
        n_wrong = min(len(wrong), max(per_set // 2, per_set - len(right)))
        chosen = right[: per_set - n_wrong] + wrong[:n_wrong]
        for row in chosen:
            links = []
            for number, audio in enumerate(row["audio"]):
                source = Path(answers_folder, audio)
                suffix = f"_{number + 1}" if len(row["audio"]) > 1 else ""
                target = f"{SAMPLES_FOLDER}/{name}_{_file_name(row['id'])}{suffix}{source.suffix}"
                shutil.copyfile(source, out_dir / target)
                links.append(f"[{Path(target).name}]({target})")
            mark = "right" if row in right else "wrong"
            table.append([" ".join(links), row["instruction"] or "", row["reference"], row["answer"], mark])
    return table


def _is_right(entry: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    metric = METRICS[entry["metric"]]
    counted, total = metric.statistics(row, entry["settings"])[:2]
    return counted == 0 if metric.lower_is_better else counted == total


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in text)


def _code(lines: Sequence[str]) -> str:
    return "```bash\n" + "\n".join(lines) + "\n```"


def summary_text(
    stages: Sequence[StageSummary], report: str | os.PathLike[str], speech: str, next_steps: Sequence[str]
) -> str:
    """The report in a screenful of plain text."""
    header, rows = results_table(stages)
    short = [[row[0], row[1].split(",")[0], *row[3:]] for row in rows]
    lines = [f"{stage.title}: {duration(stage.seconds)}, {stage.steps} steps" for stage in stages]
    if rows:
        columns = [header[0], header[1], *header[3:]]
        widths = [max(len(r[i]) for r in [columns, *short]) for i in range(len(columns))]
        lines += [
            "",
            *("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in [columns, *short]),
        ]
    lines += ["", *textwrap.wrap(speech, 100), "", f"Report: {report}", "Next:", *(f"  {step}" for step in next_steps)]
    return "\n".join(lines)


def print_summary(
    stages: Sequence[StageSummary], report: str | os.PathLike[str], speech: str, next_steps: Sequence[str]
) -> None:
    """Show ``summary_text`` on the screen."""
    print(summary_text(stages, report, speech, next_steps))
