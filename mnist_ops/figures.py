"""Figures of training runs. matplotlib is imported when a figure is drawn, without a display."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .training import EpochResult

__all__ = ["accuracy_curves"]

_TRAINING, _TEST = "#1f6fb4", "#d1495b"


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
    figure.savefig(Path(path), dpi=150)
