"""Figures of training runs. matplotlib is imported when a figure is drawn, without a display.

Every figure can be read at half a column, 3.5 inches: letters of 8 points or more at that width.
Colours are Okabe and Ito's, which people with any colour vision tell apart.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from ..training import EpochResult, write_atomically
from . import statistics

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "STYLE",
    "Experiment",
    "accuracy_curves",
    "confusion",
    "filters",
    "group_curves",
    "mistakes",
    "normalization_gallery",
    "report_curves",
]

_TRAINING, _TEST = "#1f6fb4", "#d1495b"

#: Okabe and Ito's palette without its yellow, which is too light for lines.
_COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_WIDTH = 3.5
_DPI = 200
#: Letters, spines and grid of all figures, for :func:`matplotlib.rc_context`.
STYLE: dict[str, Any] = {
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "axes.titlesize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
}
# Where all accuracies lie above this, their axis is linear.
_LINEAR_FROM = 94.0

#: A file to write to: a path, whose ending chooses the format, or a binary file, which gets a PNG.
Target = str | os.PathLike[str] | BinaryIO


class Experiment(Protocol):
    """What figures and reports need to know about an experiment."""

    @property
    def name(self) -> str:
        """As in runs and on the command line."""

    @property
    def title(self) -> str:
        """One line for people."""

    @property
    def section(self) -> str:
        """Where it is reported."""

    @property
    def group(self) -> str:
        """Experiments of one group share a figure."""

    @property
    def reported(self) -> Mapping[int, tuple[float | None, float | None]]:
        """For each epoch training and test accuracy in % as printed; either may be None."""


@contextmanager
def _canvas(path: Target, height: float, width: float = _WIDTH) -> Iterator[Any]:
    """A figure in the common style, written when the block ends."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):  # type: ignore[arg-type, unused-ignore]
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        _save(figure, path, _DPI)


def _save(figure: Any, path: Target, dpi: int) -> None:
    """Write a figure; a file is the old one or the whole new one."""
    if isinstance(path, (str, os.PathLike)):
        ending = Path(path).suffix.removeprefix(".") or "png"
        content = io.BytesIO()
        figure.savefig(content, dpi=dpi, format=ending)
        write_atomically(Path(path), lambda file: file.write(content.getbuffer()))
    else:
        figure.savefig(path, dpi=dpi, format="png")


def _accuracy_axis(axis: Any, values: Sequence[float]) -> None:
    """Limits and scale of an axis of accuracies in %.

    Runs at 10 % and at 99.5 % in one figure: beyond 6 points of range the scale is logarithmic in
    the errors, so that 99 and 99.9 are as far apart as 90 and 99.
    """
    import numpy as np
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, MaxNLocator, NullLocator

    axes = axis.axes
    name = "y" if axis is axes.yaxis else "x"
    limits = getattr(axes, f"set_{name}lim")
    lowest, highest = min(values), max(values)
    if lowest >= _LINEAR_FROM:
        span = max(highest - lowest, 0.05)
        limits(lowest - 0.08 * span, min(highest + 0.08 * span, 100 + 0.03 * span))
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axis.set_label_text("accuracy (%)")
    else:
        # One error in 5,000 is the end of the scale: 100 % has a place on it.
        end = 100.02

        def forward(x: Any) -> Any:
            return -np.log10(np.maximum(end - np.asarray(x), 1e-3))

        def inverse(x: Any) -> Any:
            return end - 10.0 ** -np.asarray(x)

        getattr(axes, f"set_{name}scale")("function", functions=(forward, inverse))
        low, high = forward(lowest), forward(highest)
        margin = 0.07 * max(float(high - low), 0.3)
        limits(max(0.0, float(inverse(low - margin))), float(inverse(min(high + margin, 1.75))))
        bottom, top = getattr(axes, f"get_{name}lim")()
        # The round ones first, the others where there is room.
        space = float(forward(top) - forward(bottom)) / (9 if name == "y" else 7)
        shown: list[float] = []
        for tick in (90, 99, 99.9, 10, 100, 50, 95, 98, 99.5, 80, 70, 30):
            apart = [abs(float(forward(tick) - forward(other))) for other in shown]
            if bottom <= tick <= top and min(apart, default=space) >= space:
                shown.append(tick)
        axis.set_major_locator(FixedLocator(sorted(shown)))
        axis.set_minor_locator(NullLocator())
        axis.set_label_text("accuracy (%)" + (", " if name == "y" else "\n") + "log of errors")
    axis.set_major_formatter(FormatStrFormatter("%g"))


def _epoch_axis(axes: Any, epochs: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    room = max(0.08, 0.03 * (epochs[-1] - epochs[0]))
    axes.set_xlim(epochs[0] - min(room, 0.9), epochs[-1] + room)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")


def _look(index: int) -> tuple[str, str]:
    """Colour and marker of the experiment with this index; pairs repeat after 49."""
    turn = index // len(_COLORS)
    return _COLORS[index % len(_COLORS)], _MARKERS[(index + turn) % len(_MARKERS)]


def accuracy_curves(
    history: Sequence[EpochResult],
    path: str | os.PathLike[str],
    title: str = "",
    printed: Mapping[int, tuple[float, float]] | None = None,
) -> None:
    """Draw training and test accuracy over the epochs into a file.

    Args:
        history: what :func:`mnist_ops.training.fit` returned, one epoch at least.
        path: the file; its ending chooses the format, ``.png`` or ``.pdf``.
        title: above the figure.
        printed: for each epoch the training and test accuracy in % that a report printed, shown
            as open circles.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, MaxNLocator

    if not history:
        raise ValueError("accuracy_curves: history holds no epochs")
    epochs = [result.epoch for result in history]
    training = [result.train_accuracy for result in history]
    test = [result.test_accuracy for result in history]
    shown = {e: printed[e] for e in epochs if printed and e in printed}

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    # The online accuracy within each epoch: piece i ends at (i + 1) / pieces of the epoch.
    within = [
        (result.epoch - 1 + (i + 1) / len(result.curve), value)
        for result in history
        for i, value in enumerate(result.curve)
    ]
    if within:
        axes.plot(
            *zip(*within, strict=True),
            color=_TRAINING,
            alpha=0.35,
            linewidth=1,
            label="training, within the epoch",
        )
    style: dict[str, Any] = {"linewidth": 1.6, "markersize": 5, "zorder": 3}
    axes.plot(epochs, training, "o-", color=_TRAINING, label="training, whole epoch", **style)
    axes.plot(epochs, test, "s-", color=_TEST, label="test", **style)
    if shown:
        ring: dict[str, Any] = {"facecolors": "none", "s": 110, "linewidths": 1.2, "zorder": 4}
        for column, color in ((0, _TRAINING), (1, _TEST)):
            values = [pair[column] for pair in shown.values()]
            axes.scatter(list(shown), values, edgecolors=color, **ring)
        axes.scatter([], [], edgecolors="0.4", label="printed in the report", **ring)

    lowest = min(training + test)
    # The first digits of a run are guesses: the axis is for the epochs, not for them.
    margin = max(0.25, (100.0 - lowest) * (1.5 if len(history) == 1 else 0.25))
    axes.set_ylim(max(0.0, lowest - margin), 100.0 + 0.05 * min(100.0, 100.0 - lowest + margin))
    axes.set_xlim(epochs[0] - 1, epochs[-1] + max(0.08, 0.03 * len(epochs)))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy (%)")
    if title:
        axes.set_title(title, fontsize=11)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=True, framealpha=0.9, edgecolor="0.85", fontsize=9)
    _save(figure, path, 150)


def group_curves(
    runs: Iterable[statistics.Run],
    experiments: Mapping[str, Experiment],
    path: Target,
    title: str = "",
) -> None:
    """Draw the accuracies of several experiments over the epochs into a file.

    One colour an experiment, test accuracy solid, training accuracy dashed; lines are means over
    seeds, bands reach from the lowest to the highest; open circles are the report's numbers, test
    large and training small. Runs of a single epoch make a row of dots an experiment instead.

    Args:
        runs: as in :mod:`mnist_ops.lab.statistics`, of any experiments.
        experiments: those to draw, in this order; what has no runs is left out.
        path: the file; its ending chooses the format. Or a binary file, which gets a PNG.
        title: above the figure.

    Raises:
        ValueError: if no experiment has an epoch with a finite accuracy.
    """
    runs = list(runs)
    summaries = {name: statistics.summary(runs, name) for name in experiments}
    summaries = {
        name: epochs
        for name, epochs in summaries.items()
        if any(e.train.n or e.test.n for e in epochs.values())
    }
    if not summaries:
        raise ValueError("group_curves: runs hold no epoch of these experiments")
    if max(max(epochs) for epochs in summaries.values()) == 1:
        _dots(runs, summaries, experiments, path, title)
        return

    from matplotlib.lines import Line2D

    rows = math.ceil(len(summaries) / (1 if max(map(len, summaries)) > 20 else 2)) + 2
    with _canvas(path, 2.5 + 0.17 * rows) as figure:
        axes = figure.subplots()
        values: list[float] = []
        circles = False
        for index, (name, epochs) in enumerate(summaries.items()):
            color, marker = _look(index)
            for column, style, width in (("test", "-", 1.5), ("train", "--", 1.1)):
                samples = {e: getattr(s, column) for e, s in epochs.items()}
                samples = {e: sample for e, sample in samples.items() if sample.n}
                x = list(samples)
                axes.plot(
                    x,
                    [s.mean for s in samples.values()],
                    style,
                    color=color,
                    linewidth=width,
                    marker=marker if len(x) <= 12 else None,
                    markersize=3,
                )
                low, high = ([getattr(s, end) for s in samples.values()] for end in ("low", "high"))
                values += low + high
                if any(s.n > 1 for s in samples.values()):
                    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
                part = 1 if column == "test" else 0
                printed = {
                    e: pair[part]
                    for e, pair in experiments[name].reported.items()
                    if pair[part] is not None and e <= max(epochs)
                }
                if printed:
                    circles = True
                    values += [float(v) for v in printed.values() if v is not None]
                    size = 30 if part else 14
                    if len(printed) > 12:
                        size //= 2
                    axes.scatter(
                        list(printed),
                        list(printed.values()),
                        s=size,
                        facecolors="none",
                        edgecolors=color,
                        linewidths=0.8,
                        zorder=4,
                    )
        _accuracy_axis(axes.yaxis, values)
        _epoch_axis(axes, sorted({e for epochs in summaries.values() for e in epochs}))
        handles = [
            Line2D([], [], color=_look(i)[0], marker=_look(i)[1], markersize=3, label=name)
            for i, name in enumerate(summaries)
        ]
        grey: dict[str, Any] = {"color": "0.35"}
        handles.append(Line2D([], [], linestyle="-", label="test", **grey))
        handles.append(Line2D([], [], linestyle="--", label="training", **grey))
        if circles:
            ring: dict[str, Any] = {"marker": "o", "markerfacecolor": "none", "linestyle": ""}
            handles.append(Line2D([], [], label="printed in the report", **ring, **grey))
        columns = 1 if max(map(len, summaries)) > 20 else 2
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            columnspacing=1.0,
            handlelength=1.8,
            labelspacing=0.3,
        )
        if title:
            axes.set_title(title)


def _dots(
    runs: Sequence[statistics.Run],
    summaries: Mapping[str, Mapping[int, statistics.EpochSummary]],
    experiments: Mapping[str, Experiment],
    path: Target,
    title: str,
) -> None:
    """One epoch: a row an experiment, a faint dot a seed, the mean, the report's number."""
    from matplotlib.lines import Line2D

    with _canvas(path, 1.25 + 0.32 * len(summaries)) as figure:
        axes = figure.subplots()
        values: list[float] = []
        looks = (
            ("test_accuracy", "o", _COLORS[1], -0.13),
            ("train_accuracy", "s", _COLORS[2], 0.13),
        )
        for row, name in enumerate(summaries):
            for part, (key, marker, color, shift) in enumerate(looks):
                seeds = [
                    entry.get(key)
                    for run in statistics.one_run_per_seed(runs, name).values()
                    for entry in run["epochs"]
                ]
                sample = statistics.mean_std(seeds)
                if sample.n:
                    axes.plot(sample.mean, row + shift, marker, color=color, markersize=4.5)
                    values += [sample.low, sample.high]
                if sample.n > 1:
                    known = [x for x in seeds if isinstance(x, (int, float)) and math.isfinite(x)]
                    axes.plot(
                        known,
                        [row + shift] * len(known),
                        "|",
                        color=color,
                        alpha=0.6,
                        markersize=8,
                    )
                printed = experiments[name].reported.get(1, (None, None))[1 - part]
                if printed is not None:
                    values.append(printed)
                    axes.plot(
                        printed,
                        row + shift,
                        "o",
                        markerfacecolor="none",
                        markeredgecolor="0.2",
                        markersize=8,
                        markeredgewidth=0.8,
                    )
        _accuracy_axis(axes.xaxis, values)
        axes.set_yticks(range(len(summaries)), list(summaries))
        axes.set_ylim(len(summaries) - 0.5, -0.5)
        handles = [
            Line2D([], [], marker=marker, color=color, linestyle="", markersize=4.5, label=label)
            for (_, marker, color, _), label in zip(looks, ("test", "training"), strict=True)
        ]
        ring: dict[str, Any] = {"marker": "o", "markerfacecolor": "none", "color": "0.2"}
        handles.append(Line2D([], [], label="report", linestyle="", **ring))
        figure.legend(
            handles=handles, loc="outside lower center", ncols=3, frameon=False, handletextpad=0.2
        )
        axes.set_title(title or "after one epoch")


def report_curves(
    runs: Iterable[statistics.Run],
    experiment: str,
    reported: Mapping[int, tuple[float | None, float | None]],
    path: Target,
    title: str = "",
) -> None:
    """Draw an experiment's accuracies over a report's curve, such as report 2's figure 1.

    Args:
        runs: as in :mod:`mnist_ops.lab.statistics`.
        experiment: its name in the runs.
        reported: for each epoch training and test accuracy in %, either may be ``None``; all of it
            is drawn, however far the runs go: :data:`mnist_ops.lab.reports.FIGURES`.
        path: the file, or a binary file.
        title: above the figure.

    Raises:
        ValueError: if neither runs nor report hold an accuracy.
    """
    summary = statistics.summary(runs, experiment)
    with _canvas(path, 3.0) as figure:
        axes = figure.subplots()
        values: list[float] = []
        for part, column, color in ((1, "test", _COLORS[1]), (0, "train", _COLORS[2])):
            words = "test" if part else "training"
            # A missing value is a gap in the line.
            x = sorted(reported)
            y = [math.nan if reported[e][part] is None else reported[e][part] for e in x]
            known = [float(v) for v in y if v is not None and math.isfinite(v)]
            if known:
                values += known
                axes.plot(
                    x, y, "o-", color=color, alpha=0.45, linewidth=0.8, markersize=2.5,
                    markerfacecolor="none", label=f"{words}, report",
                )  # fmt: skip
            samples = {e: getattr(s, column) for e, s in summary.items() if getattr(s, column).n}
            if samples:
                low, high = ([getattr(s, k) for s in samples.values()] for k in ("low", "high"))
                values += low + high
                axes.fill_between(list(samples), low, high, color=color, alpha=0.2, linewidth=0)
                axes.plot(
                    list(samples), [s.mean for s in samples.values()], color=color,
                    linewidth=1.8, marker="o" if len(samples) == 1 else None,
                    label=f"{words}, here",
                )  # fmt: skip
        if not values:
            raise ValueError("report_curves: neither runs nor reported hold an accuracy")
        _accuracy_axis(axes.yaxis, values)
        _epoch_axis(axes, sorted({*reported, *summary}))
        figure.legend(
            loc="outside lower center", ncols=2, frameon=False, columnspacing=1.0, labelspacing=0.3
        )
        if title:
            axes.set_title(title)


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def normalization_gallery(
    path: Target,
    indices: Sequence[int] = (0, 1, 2, 3, 4, 5, 7, 13),
    root: str | os.PathLike[str] | None = None,
) -> None:
    """Draw digits as they are and after each normalization of report 1's Table 3.2.

    Rows: pixels; global normalization; with Gaussian1D(7); with Gaussian1D(15). Each row has a grey
    scale of its own, the same for its digits.

    Args:
        path: the file, or a binary file.
        indices: training digits, from 0.
        root: as for :func:`mnist_ops.mnist.data.load`.

    Raises:
        ValueError: for no index, or one that is out of range.
    """
    import torch

    from ..mnist import data

    images, _ = data.load("train", root)
    if not indices or not all(0 <= i < len(images) for i in indices):
        raise ValueError(
            f"normalization_gallery: indices must be in 0 to {len(images) - 1} and at least one, "
            f"got {list(indices)}"
        )
    pixels = data.pad32(images[torch.tensor(list(indices), device="cpu")])
    normal = data.global_norm(pixels, *data.global_statistics(images))
    rows = {
        "as it is": pixels.float(),
        "global": normal,
        "Gaussian1D(7)": data.local_norm(normal, 7),
        "Gaussian1D(15)": data.local_norm(normal, 15),
    }
    width = _WIDTH - 0.95
    with _canvas(path, 4 * width / len(indices) * 1.04 + 0.1) as figure:
        grid = figure.subplots(len(rows), len(indices), squeeze=False)
        figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.02, hspace=0.02)
        for axes_row, (name, row) in zip(grid, rows.items(), strict=True):
            low, high = float(row.min()), float(row.max())
            for axes, image in zip(axes_row, row, strict=True):
                axes.imshow(
                    image[0].numpy(), cmap="gray", vmin=low, vmax=high, interpolation="nearest"
                )
                _bare(axes)
            axes_row[0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=4)


def filters(weights: Tensor | Sequence[Any], path: Target, title: str = "") -> None:
    """Draw a convolution's kernels, zero in white, negative in blue, positive in red.

    Args:
        weights: ``(filters, 1, height, width)`` or ``(filters, height, width)``, a tensor or lists.
        path: the file, or a binary file.
        title: above the figure.

    Raises:
        ValueError: for other shapes.
    """
    import numpy as np

    kernels = np.asarray(weights, dtype=np.float64)
    if kernels.ndim == 4 and kernels.shape[1] == 1:
        kernels = kernels[:, 0]
    if kernels.ndim != 3 or 0 in kernels.shape:
        raise ValueError(f"filters: weights must be (filters, 1, H, W), got {kernels.shape}")
    count, height, width = kernels.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    mosaic = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1), np.nan)
    for i, kernel in enumerate(kernels):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        mosaic[top : top + height, left : left + width] = kernel
    finite = np.abs(kernels[np.isfinite(kernels)])
    largest = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    with _canvas(path, 0.8 * _WIDTH * mosaic.shape[0] / mosaic.shape[1] + 0.35) as figure:
        axes = figure.subplots()
        picture = axes.imshow(mosaic, cmap="RdBu_r", vmin=-largest, vmax=largest)
        _bare(axes)
        bar = figure.colorbar(picture, ax=axes, fraction=0.05, pad=0.02, label="weight")
        bar.outline.set_visible(False)
        axes.set_title(title or f"{count} filters of {height}×{width}")


def confusion(counts: Sequence[Sequence[int]], path: Target, title: str = "") -> None:
    """Draw a confusion matrix with its counts; colour is for the mistakes, off the diagonal.

    Args:
        counts: ``(classes, classes)``; row: true class, column: predicted class.
        path: the file, or a binary file.
        title: above the figure; the numbers of digits and mistakes unless given.

    Raises:
        ValueError: if ``counts`` is not square.
    """
    import numpy as np

    matrix = np.asarray(counts)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"confusion: counts must be square, got {matrix.shape}")
    classes = len(matrix)
    off = matrix.astype(float)
    np.fill_diagonal(off, np.nan)
    wrong = int(matrix.sum() - matrix.trace())
    most = max(1.0, float(np.nan_to_num(off).max()))
    with _canvas(path, _WIDTH * 1.02) as figure:
        axes = figure.subplots()
        figure.get_layout_engine().set(w_pad=0.01, h_pad=0.02)
        # Square roots: one mistake is seen beside fifty.
        axes.imshow(np.sqrt(off), cmap="Oranges", vmin=0, vmax=math.sqrt(most) * 1.25)
        for i in range(classes):
            for j in range(classes):
                count = int(matrix[i, j])
                if i == j:
                    axes.add_patch(_square(i))
                if count or i == j:
                    axes.text(j, i, str(count), ha="center", va="center", fontsize=8, color="black")
        axes.set_xticks(range(classes))
        axes.set_yticks(range(classes))
        axes.grid(False)
        axes.tick_params(length=0)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        axes.set_title(title or f"{wrong:,} of {int(matrix.sum()):,} digits wrong")


def _square(i: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((i - 0.5, i - 0.5), 1, 1, facecolor="0.88", edgecolor="none")


def mistakes(
    items: Sequence[Mapping[str, Any]],
    images: Tensor,
    path: Target,
    columns: int = 4,
) -> None:
    """Draw misclassified digits with true class, prediction and the network's confidence.

    Args:
        items: each with ``index`` into ``images``, ``true``, ``predicted`` and, where known,
            ``confidence`` from 0 to 1.
        images: ``(N, 1, H, W)`` or ``(N, H, W)``.
        path: the file, or a binary file.
        columns: digits a row.

    Raises:
        ValueError: for no items, or an index that is out of range.
    """
    import numpy as np

    bad = [item["index"] for item in items if not 0 <= item["index"] < len(images)]
    if not items or bad:
        got = f"index {bad[0]} of {len(images)} images" if items else "none"
        raise ValueError(f"mistakes: items must be indices into images, at least one, got {got}")
    rows = math.ceil(len(items) / columns)
    with _canvas(path, rows * 1.12 + 0.1) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            _bare(axes)
        for axes, item in zip(grid.flat, items, strict=False):
            image = np.asarray(images[item["index"]].cpu())
            axes.imshow(image.reshape(image.shape[-2:]), cmap="gray_r", interpolation="nearest")
            sure = item.get("confidence")
            percent = "" if sure is None else f", {100 * sure:.0f} %"
            axes.set_title(f"{item['true']} as {item['predicted']}{percent}", fontsize=8, pad=2)
            axes.set_xlabel(f"no. {item['index']}", fontsize=8, labelpad=1, color="0.35")


def png(draw: Callable[..., None], *args: Any, **options: Any) -> bytes:
    """The PNG that ``draw(*args, path, **options)`` would write.

    ``path`` is passed by name.
    """
    buffer = io.BytesIO()
    draw(*args, path=buffer, **options)
    return buffer.getvalue()
