"""Pictures of a comparison: AIR-Bench as a radar, as in the paper's Fig. 1, and the headlines as bars."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from soundwave.eval.benchmarks import BENCHMARKS
from soundwave.eval.comparison import Cell, Comparison, Line
from soundwave.training.curves import DROPPED, INK, QUIET

RADAR_BENCHMARK = "air_bench_foundation"
LEAST_AXES = 3  # of a radar; with fewer there is no area
#: Kinds of lines that have a panel of bars.
WITH_BARS = ("headline", "beside", "area")
#: Bars beside each other in one panel before the picture becomes wider.
BARS_PER_PANEL = 6
LEGEND_COLUMNS = 4
MARKERS = "osD^vP*X<>hd8"


class Palette(NamedTuple):
    """Matplotlib's colour maps, and a line style and a hatch for each time that the colours of one are used up."""

    maps: tuple[str, ...]
    lines: tuple[Any, ...]
    hatches: tuple[str, ...]


RUNS = Palette(("tab10",), ("-", (0, (8, 1.5)), (0, (8, 1.5, 2, 1.5))), ("", "xx", "++"))
#: Eight pale colours, then eight dark ones.
PUBLISHED = Palette(("Set2", "Dark2"), ("--", "-.", ":"), ("//", "\\\\", ".."))


@dataclass(frozen=True)
class Style:
    """How a column is drawn: the same in both pictures, and like no other column."""

    colour: Any
    line: Any
    hatch: str
    marker: str
    is_run: bool


def column_styles(comparison: Comparison) -> dict[str, Style]:
    """Runs in full colours, whole lines and plain bars, published models dashed and hatched."""
    runs = {column: _style(number, RUNS, True) for number, column in enumerate(comparison.runs)}
    return runs | {column: _style(number, PUBLISHED, False) for number, column in enumerate(comparison.published)}


def _style(number: int, palette: Palette, is_run: bool) -> Style:
    from matplotlib import colormaps

    colours = [colormaps[name](i) for name in palette.maps for i in range(colormaps[name].N)]
    turn = number // colormaps[palette.maps[0]].N
    return Style(
        colours[number % len(colours)],
        palette.lines[turn % len(palette.lines)],
        palette.hatches[turn % len(palette.hatches)],
        "o" if is_run else MARKERS[number % len(MARKERS)],
        is_run,
    )


def draw_radar(path: str | os.PathLike[str], comparison: Comparison) -> bool:
    """PNG with a radar per area of AIR-Bench, a task on each axis in percent, as far as the runs have tasks.

    Runs are drawn whole and on top, published models dashed. A task that a column lacks leaves a gap in its line.

    Returns:
        Whether there was anything to draw: at least three tasks of an area.
    """
    tasks = {
        line.part: line for line in comparison.lines if line.benchmark == RADAR_BENCHMARK and line.kind == "group"
    }
    areas = {
        area: [tasks[task] for task in members if task in tasks]
        for area, members in BENCHMARKS[RADAR_BENCHMARK].areas.items()
    }
    areas = {area: lines for area, lines in areas.items() if len(lines) >= LEAST_AXES}
    lines = [line for members in areas.values() for line in members]
    used = [column for column in comparison.columns if any(column in _drawn(line) for line in lines)]
    if not used:
        return False
    figure = _new_figure(6.4 * len(areas), 6.6)
    panels = figure.subplots(1, len(areas), squeeze=False, subplot_kw={"projection": "polar"}).ravel()
    styles = column_styles(comparison)
    for axis, (area, members) in zip(panels, areas.items(), strict=True):
        _draw_area(axis, area, members, {column: styles[column] for column in used})
    _add_legend(figure, [_legend_line(styles[column], column) for column in used])
    _save(figure, path, comparison, _left_out(comparison, lines, used))
    return True


def _new_figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _left_out(comparison: Comparison, lines: Collection[Line], used: Collection[str]) -> list[str]:
    """Columns that have cells in a picture's lines but no number in them."""
    present = {column for line in lines for column in line.cells}
    return [column for column in comparison.columns if column in present and column not in used]


def _add_legend(figure: Any, handles: list[Any]) -> None:
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=LEGEND_COLUMNS,
        frameon=False,
        fontsize=9,
        handlelength=3.4,  # long and high enough to tell dashes and hatches apart
        handleheight=1.3,
    )


def _save(figure: Any, path: str | os.PathLike[str], comparison: Comparison, left_out: list[str]) -> None:
    said = [f"Not drawn, for want of a figure: {', '.join(left_out)}."] if left_out else []
    if comparison.notes:
        said.append("The notes of compare.md say what keeps figures from being compared.")
    if said:
        figure.suptitle("\n".join(said), fontsize=9, color=INK if left_out else QUIET)
    figure.savefig(path, facecolor="white")


def _line_style(style: Style) -> dict[str, Any]:
    return {
        "color": style.colour,
        "linestyle": style.line,
        "linewidth": 2.8 if style.is_run else 1.3,
        "marker": style.marker,
        "markersize": 5.5 if style.is_run else 4.5,
    }


def _legend_line(style: Style, label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **_line_style(style))


def _draw_area(axis: Any, area: str, lines: list[Line], styles: Mapping[str, Style]) -> None:
    angles = np.linspace(0, 2 * np.pi, len(lines), endpoint=False)
    for column, style in styles.items():
        values = np.array([_percent(line, column) for line in lines])
        axis.plot(
            np.append(angles, angles[0]),
            np.append(values, values[0]),
            zorder=3 if style.is_run else 2,  # no published line hides a run's
            **_line_style(style),
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

    Areas, training stages and what belongs beside a headline have panels of their own. Published figures are hatched.
    Where a cell is not one number, undefined or printed in two ways, its text stands in the place of the bar.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib.patches import Patch

    of_kinds = [line for line in comparison.lines if line.kind in WITH_BARS]
    lines = [line for line in of_kinds if _drawn(line)]
    if not lines:
        return False
    columns = min(len(lines), 4)
    rows = -(-len(lines) // columns)
    width = 3.4 * max(1.0, max(len(line.cells) for line in lines) / BARS_PER_PANEL)
    used = [column for column in comparison.columns if any(column in _drawn(line) for line in lines)]
    legend_rows = -(-len(used) // LEGEND_COLUMNS)
    figure = _new_figure(max(width * columns, 5.0), 2.9 * rows + 0.5 + 0.25 * legend_rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    styles = column_styles(comparison)
    for axis, line in zip(axes, lines, strict=False):
        _draw_bars_of(axis, line, {c: styles[c] for c in comparison.columns if c in line.cells})
    for axis in axes[len(lines) :]:
        axis.set_axis_off()
    patches = [Patch(facecolor=styles[column].colour, hatch=styles[column].hatch, label=column) for column in used]
    _add_legend(figure, patches)
    _save(figure, path, comparison, _left_out(comparison, of_kinds, used))
    return True


def _drawn(line: Line) -> list[str]:
    """Columns whose cell is one number."""
    return [column for column, cell in line.cells.items() if cell.value is not None]


def _draw_bars_of(axis: Any, line: Line, styles: Mapping[str, Style]) -> None:
    scale = 100 if line.metric.unit == "%" else 1
    for position, (column, style) in enumerate(styles.items()):
        _draw_bar(axis, position, line.cells[column], style, scale)
    name = f"{line.benchmark}, {line.part}" if line.part else line.benchmark
    better = ", lower is better" if line.metric.lower_is_better else ""
    axis.set_title(f"{name}\n{line.metric.name}{better}", loc="left", fontsize=9, color=INK)
    axis.set_ylabel(line.metric.unit)
    axis.set_xticks([])
    axis.set_xlim(-0.6, max(len(styles), 2) - 0.4)
    axis.margins(y=0.15)
    if not any(line.cells[column].value for column in _drawn(line)):
        axis.set_ylim(0, 1)  # matplotlib would put the zero of nothing but zeros in the middle
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color=DROPPED, linewidth=0.8)
    axis.set_axisbelow(True)


def _draw_bar(axis: Any, position: int, cell: Cell, style: Style, scale: float) -> None:
    """The bar, its interval and its text; without a number the text alone."""
    height = scale * (cell.value or 0.0)
    top = height
    if cell.value is not None:
        axis.bar(position, height, 0.8, color=style.colour, hatch=style.hatch)
    if not cell.value:  # nothing to see of a bar: the column's colour and sign all the same
        axis.plot(position, 0, style.marker, color=style.colour, markersize=6, clip_on=False)
    if cell.interval is not None:
        low, high = (scale * end for end in cell.interval)
        axis.vlines(position, low, high, color=INK, linewidth=1.2)
        top = max(height, high)
    axis.annotate(
        cell.text.replace(", ", "\n"),
        (position, max(top, 0.0)),
        xytext=(0, 2 if cell.value else 6),
        textcoords="offset points",
        ha="center",
        va="bottom",
        rotation=0 if cell.value is not None else 90,
        fontsize=8,
        color=INK,
    )
