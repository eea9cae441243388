"""Figures. Each function draws on the axes that it is given and returns them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cl_zoo.evaluation.metrics import accuracy_after_each_task, anytime_accuracy

__all__ = [
    "accuracy_heat_map",
    "accuracy_within_tasks",
    "anytime_curve",
    "course",
    "label_lines",
    "seen_task_accuracy",
    "strength_curve",
]


def accuracy_heat_map(axes: Any, matrix: ArrayLike, title: str = "") -> Any:
    """The accuracy matrix R in percent, the mean over any leading axes: rows are times, columns are tasks."""
    runs = 100 * np.asarray(matrix)
    percent = runs.reshape((-1, *runs.shape[-2:])).mean(0)
    n_tasks = percent.shape[1]
    image = axes.imshow(percent, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    if n_tasks <= 10:
        for row in range(n_tasks + 1):
            for column in range(n_tasks):
                shade = "black" if percent[row, column] > 60 else "white"
                axes.text(column, row, f"{percent[row, column]:.0f}", ha="center", va="center", color=shade, fontsize=7)
    axes.set_xticks(range(n_tasks), [str(i + 1) for i in range(n_tasks)])
    axes.set_yticks(range(n_tasks + 1), ["before"] + [str(i + 1) for i in range(n_tasks)])
    axes.set_xlabel("tested on task")
    axes.set_ylabel("after training on task")
    axes.set_title(title)
    axes.figure.colorbar(image, ax=axes, label="accuracy (%)", fraction=0.046)
    return axes


def seen_task_accuracy(axes: Any, matrices: Mapping[str, ArrayLike], title: str = "") -> Any:
    """Mean accuracy over the tasks seen so far, a line per method, bands of one standard deviation over runs."""
    for name, matrix in matrices.items():
        values = np.asarray(accuracy_after_each_task(matrix)) * 100
        values = values.reshape((-1, values.shape[-1]))
        _band(axes, np.arange(1, values.shape[-1] + 1), values, name)
    axes.set_xlabel("tasks seen")
    axes.set_ylabel("accuracy on tasks seen (%)")
    axes.set_ylim(0, 102)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    return axes


def accuracy_within_tasks(
    axes: Any, curve: ArrayLike, task: int = 0, every: int = 1, label: str = "", title: str = ""
) -> Any:
    """Accuracy on one task at points within all tasks: where the stability gap shows.

    Args:
      axes: to draw on.
      curve: `[..., T, points, T]`.
      task: which task to follow.
      every: updates between points.
      label, title: of the line and of the axes.
    """
    curve = 100 * np.asarray(curve)
    n_tasks, points = curve.shape[-3], curve.shape[-2]
    values = curve[..., task].reshape((-1, n_tasks * points))
    _band(axes, every * np.arange(1, n_tasks * points + 1), values, label)
    for boundary in range(1, n_tasks):
        axes.axvline(boundary * points * every, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("updates (dotted: a new task)")
    axes.set_ylabel(f"accuracy on task {task + 1} (%)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    return axes


def anytime_curve(axes: Any, curves: Mapping[str, ArrayLike], every: int = 1, title: str = "") -> Any:
    """Mean accuracy over the tasks seen so far at points of the whole stream, a line per method.

    Args:
      axes: to draw on.
      curves: `[..., T, points, T]` by name.
      every: updates between points.
      title: of the axes.
    """
    for name, curve in curves.items():
        values = 100 * anytime_accuracy(curve)
        values = values.reshape((-1, values.shape[-1]))
        _band(axes, every * np.arange(1, values.shape[-1] + 1), values, name)
    axes.set_xlabel("updates")
    axes.set_ylabel("accuracy on tasks seen (%)")
    axes.set_ylim(0, 102)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    return axes


def strength_curve(axes: Any, strengths: Sequence[float], accuracy: ArrayLike, label: str = "", title: str = "") -> Any:
    """Final accuracy against strength on a logarithmic axis; `accuracy` is `[strengths, runs]`."""
    accuracy = 100 * np.asarray(accuracy)
    _band(axes, np.asarray(strengths), accuracy.T, label, marker="o")
    axes.set_xscale("log")
    axes.set_xlabel("strength")
    axes.set_ylabel("average accuracy (%)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    return axes


def course(axes: Any, x: ArrayLike, runs: Mapping[str, ArrayLike], title: str = "") -> Any:
    """Any number against time, a line per method, bands of one standard deviation over runs; values are `[runs, n]`."""
    for name, values in runs.items():
        _band(axes, np.asarray(x), np.asarray(values), name)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    return axes


COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Told apart by all eyes (Okabe and Ito 2008), without its yellow, which is too light for a line."""
MARKERS = "os^DvPX"


def _band(axes: Any, x: np.ndarray, values: np.ndarray, label: str, marker: str = "") -> None:
    """A mean and one standard deviation around it; colour, marker and dashes by how many lines there are."""
    mean, place = values.mean(0), sum(not str(line.get_label()).startswith("_") for line in axes.lines)
    style = {"color": COLOURS[place % len(COLOURS)], "linestyle": "-" if place < len(COLOURS) else "--"}
    few = len(x) <= 30
    marker = marker or (MARKERS[place % len(MARKERS)] if few else "")
    axes.plot(x, mean, label=label or None, marker=marker or None, markersize=4, linewidth=1.6, **style)
    if len(values) > 1:
        spread = values.std(0, ddof=1)
        axes.fill_between(x, mean - spread, mean + spread, alpha=0.12, color=style["color"], linewidth=0)


_LEADER = {"arrowstyle": "-", "linewidth": 0.5, "alpha": 0.6, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 2}


def label_lines(axes: Any) -> Any:
    """Each line's name beside its end, in its colour, apart from the others: instead of a legend."""
    lines = [line for line in axes.lines if not line.get_label().startswith("_") and len(line.get_ydata())]
    if not lines:
        return axes
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height * 72 / axes.figure.dpi  # in points
    gap = 11 / height * (high - low)
    ends = np.array([float(np.asarray(line.get_ydata())[-1]) for line in lines])
    order, places = np.argsort(ends), ends.copy()
    for before, after in zip(order, order[1:], strict=False):  # upwards, each at least a gap above the last
        places[after] = max(places[after], places[before] + gap)
    top = places[order[-1]]
    if top > high - gap / 2:  # then down again from the top
        places[order[-1]] = high - gap / 2
        for before, after in zip(order[::-1], order[-2::-1], strict=False):
            places[after] = min(places[after], places[before] - gap)
    right = max(float(np.asarray(line.get_xdata())[-1]) for line in lines)
    for line, end, place in zip(lines, ends, places, strict=True):
        axes.annotate(
            line.get_label(),
            (right, end),
            xytext=(1.06, place),
            textcoords=axes.get_yaxis_transform(),
            color=line.get_color(),
            fontsize=8,
            va="center",
            arrowprops={**_LEADER, "color": line.get_color()},
            annotation_clip=False,
        )
    return axes
