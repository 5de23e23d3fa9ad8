"""Pictures of a comparison: AIR-Bench as a radar, as in the paper's Fig. 1, and the headlines as bars."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from soundwave.eval.benchmarks import BENCHMARKS
from soundwave.eval.comparison import Comparison, Line
from soundwave.training.curves import DROPPED, INK, QUIET

RADAR_BENCHMARK = "air_bench_foundation"
LEAST_AXES = 3  # of a radar; with fewer there is no area
#: Bars beside each other in one panel before the picture becomes wider.
BARS_PER_PANEL = 6


def _colours(comparison: Comparison) -> dict[str, Any]:
    """Runs in full colours, published models in pale ones; the same in both pictures."""
    from matplotlib import colormaps

    runs = [colormaps["tab10"](i % 10) for i in range(len(comparison.runs))]
    published = [colormaps["Set2"](i % 8) for i in range(len(comparison.published))]
    return dict(zip(comparison.columns, [*runs, *published], strict=True))


def draw_radar(path: str | os.PathLike[str], comparison: Comparison) -> bool:
    """PNG with a radar per area of AIR-Bench, a task on each axis in percent, as far as the runs have tasks.

    Runs are drawn whole, published models dashed. A task that a column lacks leaves a gap in its line.

    Returns:
        Whether there was anything to draw: at least three tasks of an area.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = {
        line.part: line for line in comparison.lines if line.benchmark == RADAR_BENCHMARK and line.kind == "group"
    }
    areas = {
        area: [tasks[task] for task in members if task in tasks]
        for area, members in BENCHMARKS[RADAR_BENCHMARK].areas.items()
    }
    areas = {area: lines for area, lines in areas.items() if len(lines) >= LEAST_AXES}
    if not areas:
        return False
    figure = Figure(figsize=(6.4 * len(areas), 6.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(areas), squeeze=False, subplot_kw={"projection": "polar"}).ravel()
    colours = _colours(comparison)
    for axis, (area, lines) in zip(panels, areas.items(), strict=True):
        _draw_area(axis, area, lines, comparison, colours)
    handles = {
        label: handle for axis in panels for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    _save(figure, path, comparison)
    return True


def _save(figure: Any, path: str | os.PathLike[str], comparison: Comparison) -> None:
    if comparison.notes:
        figure.suptitle("The notes of compare.md say what keeps figures from being compared", fontsize=9, color=QUIET)
    figure.savefig(path, facecolor="white")


def _draw_area(axis: Any, area: str, lines: list[Line], comparison: Comparison, colours: Mapping[str, Any]) -> None:
    angles = np.linspace(0, 2 * np.pi, len(lines), endpoint=False)
    for column in comparison.columns:
        values = np.array([_percent(line, column) for line in lines])
        if np.isnan(values).all():
            continue
        run = column in comparison.runs
        axis.plot(
            np.append(angles, angles[0]),
            np.append(values, values[0]),
            color=colours[column],
            linewidth=2 if run else 1.3,
            linestyle="-" if run else "--",
            marker="o",
            markersize=3,
            label=column,
        )
    axis.set_theta_offset(np.pi / 2)
    axis.set_theta_direction(-1)
    axis.set_xticks(angles, [line.part.replace("_", "\n") for line in lines], fontsize=8, color=INK)
    axis.tick_params(axis="x", pad=20)
    axis.set_ylim(0, 100)
    axis.set_yticks([20, 40, 60, 80, 100])
    axis.tick_params(axis="y", labelsize=7)
    axis.grid(color=DROPPED, linewidth=0.8)
    axis.set_title(f"AIR-Bench foundation, {area} (%)", fontsize=11, color=INK, pad=16)


def _percent(line: Line, column: str) -> float:
    value = line.cells[column].value if column in line.cells else None
    return np.nan if value is None else 100 * value


def draw_bars(path: str | os.PathLike[str], comparison: Comparison) -> bool:
    """PNG with a panel per benchmark: a bar per column that has its headline, and the interval where there is one.

    Areas have panels of their own. Published figures are hatched; one that the paper prints in two ways has no bar.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    lines = [line for line in comparison.lines if line.kind in ("headline", "area") and _drawn(line)]
    if not lines:
        return False
    columns = min(len(lines), 4)
    rows = -(-len(lines) // columns)
    widest = max(len(_drawn(line)) for line in lines)
    width = 3.4 * max(1.0, widest / BARS_PER_PANEL)
    figure = Figure(figsize=(max(width * columns, 5.0), 2.9 * rows + 0.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    colours = _colours(comparison)
    for axis, line in zip(axes, lines, strict=False):
        _draw_bars_of(axis, line, comparison, colours)
    for axis in axes[len(lines) :]:
        axis.set_axis_off()
    used = [column for column in comparison.columns if any(column in _drawn(line) for line in lines)]
    patches = [Patch(facecolor=colours[c], hatch=None if c in comparison.runs else "//", label=c) for c in used]
    figure.legend(handles=patches, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    _save(figure, path, comparison)
    return True


def _drawn(line: Line) -> list[str]:
    """Columns whose cell is one number."""
    return [column for column, cell in line.cells.items() if cell.value is not None]


def _draw_bars_of(axis: Any, line: Line, comparison: Comparison, colours: Mapping[str, Any]) -> None:
    scale = 100 if line.metric.unit == "%" else 1
    drawn = [column for column in comparison.columns if column in _drawn(line)]
    for position, column in enumerate(drawn):
        cell = line.cells[column]
        height = scale * (cell.value or 0.0)
        axis.bar(position, height, 0.8, color=colours[column], hatch=None if column in comparison.runs else "//")
        top = height
        if cell.interval is not None:
            low, high = (scale * end for end in cell.interval)
            axis.vlines(position, low, high, color=INK, linewidth=1.2)
            top = max(height, high)
        axis.annotate(
            cell.text, (position, top), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=8, color=INK
        )
    name = f"{line.benchmark}, {line.part}" if line.part else line.benchmark
    better = ", lower is better" if line.metric.lower_is_better else ""
    axis.set_title(f"{name}\n{line.metric.name}{better}", loc="left", fontsize=9, color=INK)
    axis.set_ylabel(line.metric.unit)
    axis.set_xticks([])
    axis.set_xlim(-0.6, max(len(drawn), 2) - 0.4)
    axis.margins(y=0.15)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color=DROPPED, linewidth=0.8)
    axis.set_axisbelow(True)
