"""Pictures of a training: curves over steps, and what the mixture drew in each epoch. Needs matplotlib, an extra."""

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

INK, QUIET, ACCENT, DROPPED = "#1b1f24", "#8c959f", "#c2410c", "#e3e7ec"


def draw_curves(
    path: str | os.PathLike[str],
    curves: Mapping[str, Sequence[tuple[int, float]]],
    y_label: str | None = "Loss",
    linear: Collection[str] = (),
) -> None:
    """PNG with one panel per curve over steps, faint as logged and bold as a running mean.

    Args:
        path: Of the picture.
        curves: Title -> ``(step, value)`` in order. Panels with nothing logged say so.
        y_label: Of every panel; ``None`` where the titles say it.
        linear: Titles of panels that keep a linear axis; the others get a logarithmic one where values spread.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    columns = min(len(curves), 3)
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(4.0 * columns, 3.0 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (title, curve) in zip(axes, curves.items(), strict=False):
        axis.set_title(title, loc="left", fontsize=11, color=INK)
        axis.spines[["top", "right"]].set_visible(False)
        points = np.array([(s, v) for s, v in curve if np.isfinite(v)], dtype=float).reshape(-1, 2)
        if not len(points):
            axis.text(0.5, 0.5, "nothing logged", ha="center", va="center", color=QUIET, transform=axis.transAxes)
            axis.set_axis_off()
            continue
        steps, values = points.T
        axis.plot(steps, values, color=ACCENT, alpha=0.3, linewidth=1)
        smooth = _running_mean(values, len(values) // 25)
        axis.plot(steps, smooth, color=ACCENT, linewidth=2, marker="o" if len(values) == 1 else None, markersize=4)
        axis.annotate(
            f"{smooth[-1]:.3g}",
            (steps[-1], smooth[-1]),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=9,
            va="center",
        )
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        # Within less than that, a linear axis has more ticks.
        if title not in linear and values.min() > 0 and values.max() > 4 * values.min():
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.grid(axis="y", color=DROPPED, linewidth=0.8)
        axis.set_xlabel("Step")
        if y_label is not None:
            axis.set_ylabel(y_label)
        axis.margins(x=0.08)
    for axis in axes[len(curves) :]:
        axis.set_axis_off()
    figure.savefig(path, facecolor="white")


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over ``2 width + 1`` neighbours, fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - width, 0), np.minimum(index + width + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def draw_mixture(path: str | os.PathLike[str], epochs: Sequence[Mapping[str, Any]]) -> None:
    """PNG with each epoch's shares of the tasks as a stacked bar, and the mixture's temperature below (eq. 2).

    Args:
        path: Of the picture.
        epochs: ``{"epoch": int, "temperature": float, "shares": {task: share of the draws}}`` in order.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    tasks = sorted({task for epoch in epochs for task in epoch["shares"]})
    numbers = [epoch["epoch"] for epoch in epochs]
    colours = [matplotlib.colormaps["tab20"](k) for k in range(20)]
    width = float(np.clip(4 + 0.4 * len(epochs), 6, 14))
    figure = Figure(figsize=(width, max(4.5, 0.24 * len(tasks) + 1.6)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    shares, temperature = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    below = np.zeros(len(epochs))
    for k, task in enumerate(tasks):
        heights = np.array([epoch["shares"].get(task, 0.0) for epoch in epochs])
        shares.bar(numbers, heights, 0.8, bottom=below, label=task, color=colours[k % len(colours)])
        below += heights
    shares.set_ylim(0, 1)
    shares.set_ylabel("Share of the draws")
    handles, labels = shares.get_legend_handles_labels()  # from the top down, as the bars are stacked
    shares.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9)
    temperature.plot(numbers, [epoch["temperature"] for epoch in epochs], color=ACCENT, marker="o", markersize=4)
    temperature.set_ylabel("Temperature")
    temperature.set_ylim(bottom=0)
    temperature.set_xlabel("Epoch")
    temperature.set_xlim(numbers[0] - 0.6, numbers[-1] + 0.6)
    temperature.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    temperature.grid(axis="y", color=DROPPED, linewidth=0.8)
    for axis in (shares, temperature):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, facecolor="white")
