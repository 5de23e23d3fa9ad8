"""Several results beside each other and beside the papers' figures.

    soundwave compare RESULTS... [--output DIR] [--published all|none|MODEL,...]

Prints a table and what keeps its numbers from being compared; with ``--output`` also writes ``compare.md``,
``compare.csv``, ``bars.png`` and, where AIR-Bench was run, ``radar.png`` as the paper's Fig. 1.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from soundwave.eval.comparison import PAPERS, Cell, Comparison, Line, compare_runs, number_text
from soundwave.eval.comparison_runs import read_runs
from soundwave.eval.published import choose_models, citation
from soundwave.eval.results import replace_file

#: Published models beside which results stand if nothing else is asked for: the paper's own and its main rival.
DEFAULT_MODELS = "Soundwave,Qwen2-Audio"
TABLE_FILE, CSV_FILE, RADAR_FILE, BARS_FILE = "compare.md", "compare.csv", "radar.png", "bars.png"
CSV_COLUMNS = (
    "benchmark", "part", "kind", "metric", "unit", "column", "published",
    "value", "printed", "low", "high", "count", "failures", "unread", "notes",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Compare results. Returns the exit code: 1 if one of them could not be read whole, and stderr says which."""
    parser = argparse.ArgumentParser(prog="soundwave compare", description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="folders of evaluations, or their results.json")
    parser.add_argument("--output", type=Path, metavar="DIR", help="also write the table and the plots here")
    parser.add_argument(
        "--published",
        default=DEFAULT_MODELS,
        metavar="all|none|MODEL,...",
        help=f"models of the papers to stand beside (default: {DEFAULT_MODELS})",
    )
    arguments = parser.parse_args(argv)
    if arguments.output is not None:
        import_module("matplotlib")  # an extra: it is missed before anything is read
    models = [] if arguments.published == "none" else choose_models(arguments.published.split(","))
    runs, problems = read_runs(arguments.results)
    for problem in problems:
        sys.stderr.write(f"soundwave compare: {problem}\n")
    if not runs:
        raise ValueError(f"none of the {len(arguments.results)} results could be read: {'; '.join(problems)}")
    comparison = compare_runs(runs, models)
    sys.stdout.write(markdown(comparison, problems))
    if arguments.output is not None:
        for file in write(arguments.output, comparison, problems):
            sys.stderr.write(f"wrote {file}\n")
    return 1 if problems else 0


def write(folder: Path, comparison: Comparison, problems: Sequence[str] = ()) -> list[Path]:
    """The table, as Markdown and CSV, and the plots; returns the files. A picture without data is not drawn."""
    from soundwave.eval.comparison_plots import draw_bars, draw_radar

    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / TABLE_FILE, markdown(comparison, problems))
    with (folder / CSV_FILE).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS)
        writer.writeheader()
        writer.writerows(csv_rows(comparison))
    files = [folder / TABLE_FILE, folder / CSV_FILE]
    for name, draw in ((BARS_FILE, draw_bars), (RADAR_FILE, draw_radar)):
        (folder / name).unlink(missing_ok=True)  # that of an earlier comparison would pass for this one's
        if draw(folder / name, comparison):
            files.append(folder / name)
    return files


def markdown(comparison: Comparison, problems: Sequence[str] = ()) -> str:
    """The table with its notes, aligned so that it can be read as text, too."""
    header = ["Benchmark", "Part", "Metric", *comparison.columns]
    rows = [
        [line.benchmark, line.part, metric_text(line), *(cell_text(line, column) for column in comparison.columns)]
        for line in comparison.lines
    ]
    rows = [[text.replace("|", "\\|") for text in row] for row in (header, *rows)]
    widths = [max(len(row[k]) for row in rows) for k in range(len(header))]
    rows.insert(1, ["-" * width for width in widths])
    table = [f"| {' | '.join(text.ljust(width) for text, width in zip(row, widths, strict=True))} |" for row in rows]
    parts = ["\n".join(table)]
    parts.append(
        "In parentheses: the bootstrap interval. Failed items are in no figure; unread answers are those that the "
        "metric's rule could not read."
    )
    if comparison.notes:
        parts.append("A number in brackets refers to a note on what keeps that figure from being compared.")
        parts.append("Notes\n\n" + "\n".join(f"{n}. {note}" for n, note in enumerate(comparison.notes, start=1)))
    if problems:
        parts.append("Not read\n\n" + "\n".join(f"- {problem}" for problem in problems))
    if comparison.published:
        parts.append("Published figures\n\n" + "\n".join(f"- {name}: {citation(p)}" for p, name in PAPERS.items()))
    return "\n\n".join(parts) + "\n"


def metric_text(line: Line) -> str:
    """Name, unit and direction of a line's metric."""
    unit = f", {line.metric.unit}" if line.metric.unit else ""
    return f"{line.metric.name}{unit}" + (" (lower is better)" if line.metric.lower_is_better else "")


def cell_text(line: Line, column: str) -> str:
    """A cell of the table: figure, interval, what failed, notes; empty without a figure."""
    if (cell := line.cells.get(column)) is None:
        return ""
    text = cell.text
    if cell.interval is not None:
        low, high = (number_text(line.metric, end) for end in cell.interval)
        text += f" ({low} to {high})"
    text += "".join(f", {n} {what}" for n, what in ((cell.failures, "failed"), (cell.unread, "unread")) if n)
    return text + (f" [{','.join(map(str, cell.notes))}]" if cell.notes else "")


def csv_rows(comparison: Comparison) -> list[dict[str, object]]:
    """A row per cell, values on the scale of ``results.json``, notes in full."""

    def row(line: Line, column: str, cell: Cell) -> dict[str, object]:
        low, high = cell.interval or (None, None)
        return {
            "benchmark": line.benchmark,
            "part": line.part,
            "kind": line.kind,
            "metric": line.metric.name,
            "unit": line.metric.unit,
            "column": column,
            "published": column in comparison.published,
            "value": cell.value,
            "printed": cell.text,
            "low": low,
            "high": high,
            "count": cell.count,
            "failures": cell.failures,
            "unread": cell.unread,
            "notes": "; ".join(comparison.notes[n - 1] for n in cell.notes),
        }

    return [row(line, c, line.cells[c]) for line in comparison.lines for c in comparison.columns if c in line.cells]


if __name__ == "__main__":
    sys.exit(main())
