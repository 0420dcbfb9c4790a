"""Figures of training runs. matplotlib is imported when a figure is drawn, without a display.

Every figure can be read at half a column, 3.5 inches: letters of 8 points or more at that width.
Colours are Okabe and Ito's, which people with any colour vision tell apart.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..training import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from .statistics import Run

__all__ = [
    "STYLE",
    "Line",
    "confusion",
    "curves",
    "filters",
    "mistakes",
    "normalization_gallery",
    "render",
    "save",
]

#: Okabe and Ito's palette without its yellow, which is too light for lines.
_COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9")
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
# From so many epochs on the first one is left out of the axes' range.
_MANY = 8


@contextmanager
def _canvas(height: float, **pads: Any) -> Iterator[Figure]:
    """A figure in the common style."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with mpl.rc_context(STYLE):  # type: ignore[arg-type, unused-ignore]
        yield Figure(figsize=(_WIDTH, height), layout=ConstrainedLayoutEngine(**pads))


def render(figure: Figure, format: str = "png") -> bytes:
    """A figure as a file of this format."""
    import matplotlib as mpl

    content = io.BytesIO()
    with mpl.rc_context(STYLE):  # type: ignore[arg-type, unused-ignore]
        figure.savefig(content, dpi=_DPI, format=format)
    return content.getvalue()


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure, whose path's ending chooses the format: the old file or the whole new one."""
    content = render(figure, Path(path).suffix.removeprefix(".") or "png")
    write_atomically(Path(path), lambda file: file.write(content))


class Line(NamedTuple):
    """One experiment in a figure.

    Attributes:
        label: in the legend.
        runs: its runs by seed.
        printed: for each epoch the printed training and test accuracy; either may be ``None``.
    """

    label: str
    runs: Mapping[int, Run]
    printed: Mapping[int, tuple[float | None, float | None]]


def curves(
    lines: Sequence[Line], points: str = "printed", last: int | None = None, within: bool = False
) -> Figure:
    """Draw training and test accuracy of experiments over the epochs, a panel each.

    A line is the run of the lowest seed, a band reaches from the lowest to the highest seed, open
    circles are the report's numbers: ``points`` in the legend. Of many epochs the first may lie
    below the panel. A panel without a number is left out. ``last`` is the last epoch to draw.
    ``within`` shows the training accuracy of consecutive pieces of the epochs as well.

    Raises:
        ValueError: if there is neither a run nor a printed number.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    ends = [len(run["epochs"]) for line in lines for run in line.runs.values()]
    last = last or max([0, *ends, *(max(line.printed, default=0) for line in lines)])
    if not last:
        raise ValueError("curves: lines hold neither a run nor a printed number")
    shown = [
        part
        for part in (0, 1)
        if any(ends) or any(p[part] is not None for line in lines for p in line.printed.values())
    ]
    bands = rings = False
    height = 1.8 * len(shown) + 0.17 * math.ceil((len(lines) + 2) / 2)
    with _canvas(height) as figure:
        panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        for axes, part in zip(panels, shown, strict=True):
            key = ("train_accuracy", "test_accuracy")[part]
            inside: list[float] = []
            for color, line in zip(_COLORS * len(lines), lines, strict=False):
                runs = [run["epochs"][:last] for _, run in sorted(line.runs.items())]
                rows = [[epoch[key] for epoch in run] for run in runs]
                several = sorted(map(len, rows))[-2] if len(rows) > 1 else 0
                known = {e: y for e, p in line.printed.items() if (y := p[part]) is not None}
                if rows:
                    x = range(1, len(rows[0]) + 1)
                    mark = "o" if len(rows[0]) == 1 else None
                    axes.plot(x, rows[0], color=color, linewidth=1.3, marker=mark, markersize=3)
                if rows and within and part == 0:
                    pieces = [
                        (e["epoch"] - 1 + (i + 1) / len(e["curve"]), y)
                        for e in runs[0]
                        for i, y in enumerate(e["curve"])
                    ]
                    axes.plot(*zip(*pieces, strict=True), color=color, alpha=0.35, linewidth=0.8)
                if several:
                    there = [[r[i] for r in rows if len(r) > i] for i in range(several)]
                    band = range(1, several + 1), list(map(min, there)), list(map(max, there))
                    axes.fill_between(*band, color=color, alpha=0.18, linewidth=0)
                if known:
                    axes.scatter(
                        list(known), list(known.values()), s=14 if len(known) > _MANY else 26,
                        edgecolors=color, facecolors="none", linewidths=0.8, zorder=4,
                    )  # fmt: skip
                drawn = [*rows[:1], *(row[:several] for row in rows)]
                values = [*known.items(), *(pair for row in drawn for pair in enumerate(row, 1))]
                inside += [y for epoch, y in values if epoch > 1 or last < _MANY]
                bands, rings = bands or several > 0, rings or len(known) > 0
            low_end, high_end = min(inside, default=0.0), max(inside, default=100.0)
            span = max(high_end - low_end, 0.05)
            axes.set_ylim(low_end - 0.07 * span, high_end + 0.07 * span)
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            axes.ticklabel_format(useOffset=False)
            axes.set_ylabel(f"{('training', 'test')[part]} (%)")
        axes.set_xlim(1 - max(0.1, 0.02 * last), last + max(0.1, 0.02 * last))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        axes.set_xlabel("epoch")
        handles: list[Any] = [
            Line2D([], [], color=color, label=line.label)
            for color, line in zip(_COLORS * len(lines), lines, strict=False)
        ]
        if bands:
            handles.append(Patch(color="0.5", alpha=0.3, linewidth=0, label="all seeds"))
        if rings:
            hollow: dict[str, Any] = {"marker": "o", "markerfacecolor": "none", "linestyle": ""}
            handles.append(Line2D([], [], color="0.3", markersize=5, label=points, **hollow))
        figure.legend(
            handles=handles, loc="outside lower center", ncols=2, frameon=False,
            columnspacing=1.2, handlelength=1.6, labelspacing=0.3,
        )  # fmt: skip
    return figure


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def normalization_gallery(
    root: str | os.PathLike[str] | None = None, indices: Sequence[int] = (0, 1, 2, 3, 4, 5, 7, 13)
) -> Figure:
    """Draw training digits as they are and after each normalization of report 1's Table 3.2.

    Each row has a grey scale of its own, the same for its digits.
    """
    import torch

    from ..mnist import data

    images, _ = data.load("train", root)
    pixels = data.pad32(images[torch.tensor(list(indices), device="cpu")])
    normal = data.global_norm(pixels, *data.global_statistics(images))
    rows = {"as it is": pixels.float(), "global": normal}
    rows |= {f"Gaussian1D({taps})": data.local_norm(normal, taps) for taps in (7, 15, 21)}
    width = _WIDTH - 0.95
    height = len(rows) * width / len(indices) * 1.04 + 0.1
    with _canvas(height, w_pad=0.01, h_pad=0.01, wspace=0.02, hspace=0.02) as figure:
        grid = figure.subplots(len(rows), len(indices), squeeze=False)
        for axes_row, (name, row) in zip(grid, rows.items(), strict=True):
            low, high = float(row.min()), float(row.max())
            for axes, image in zip(axes_row, row, strict=True):
                pixels = image[0].numpy()
                axes.imshow(pixels, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
                _bare(axes)
            axes_row[0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=4)
    return figure


def filters(weights: Tensor | Sequence[Any]) -> Figure:
    """Draw a convolution's kernels, zero in white, negative in blue, positive in red.

    Raises:
        ValueError: unless they are ``(filters, 1, height, width)`` or ``(filters, height, width)``.
    """
    import numpy as np
    import torch
    from torchvision.utils import make_grid

    kernels = np.asarray(weights, dtype=np.float64)
    if kernels.ndim == 4 and kernels.shape[1] == 1:
        kernels = kernels[:, 0]
    if kernels.ndim != 3 or 0 in kernels.shape:
        raise ValueError(f"filters: weights must be (filters, 1, H, W), got {kernels.shape}")
    count, height, width = kernels.shape
    mosaic = make_grid(
        torch.from_numpy(kernels).unsqueeze(1),
        nrow=math.ceil(math.sqrt(count)),
        padding=1,
        pad_value=math.nan,
    )[0]
    finite = np.abs(kernels[np.isfinite(kernels)])
    largest = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    with _canvas(0.8 * _WIDTH * mosaic.shape[0] / mosaic.shape[1] + 0.35) as figure:
        axes = figure.subplots()
        picture = axes.imshow(mosaic, cmap="RdBu_r", vmin=-largest, vmax=largest)
        _bare(axes)
        bar = figure.colorbar(picture, ax=axes, fraction=0.05, pad=0.02, label="weight")
        bar.outline.set_visible(False)
        axes.set_title(f"{count} filters of {height}×{width}")
    return figure


def confusion(counts: Sequence[Sequence[int]]) -> Figure:
    """Draw the counts of ``(true class, predicted class)``; colour is for the mistakes.

    Raises:
        ValueError: if ``counts`` is not square.
    """
    import numpy as np
    from matplotlib.patches import Rectangle

    matrix = np.asarray(counts)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"confusion: counts must be square, got {matrix.shape}")
    classes = len(matrix)
    off = matrix.astype(float)
    np.fill_diagonal(off, np.nan)
    wrong = int(matrix.sum() - matrix.trace())
    most = max(1.0, float(np.nan_to_num(off).max()))
    with _canvas(_WIDTH * 1.02, w_pad=0.01, h_pad=0.02) as figure:
        axes = figure.subplots()
        # Square roots: one mistake is seen beside fifty.
        axes.imshow(np.sqrt(off), cmap="Oranges", vmin=0, vmax=math.sqrt(most) * 1.25)
        for (i, j), count in np.ndenumerate(matrix):
            if i == j:
                axes.add_patch(Rectangle((i - 0.5, i - 0.5), 1, 1, facecolor="0.88", lw=0))
            if count or i == j:
                axes.text(j, i, str(count), ha="center", va="center", fontsize=8, color="black")
        axes.set_xticks(range(classes))
        axes.set_yticks(range(classes))
        axes.grid(False)
        axes.tick_params(length=0)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        axes.set_title(f"{wrong:,} of {int(matrix.sum()):,} images wrong")
    return figure


def mistakes(items: Sequence[Mapping[str, Any]], images: Tensor) -> Figure:
    """Draw misclassified digits, with true class, prediction and, where known, confidence."""
    import numpy as np

    rows = math.ceil(len(items) / 4)
    with _canvas(rows * 1.12 + 0.1) as figure:
        grid = figure.subplots(rows, 4, squeeze=False)
        for axes in grid.flat:
            _bare(axes)
        for axes, item in zip(grid.flat, items, strict=False):
            image = np.asarray(images[item["index"]].cpu())
            axes.imshow(image.reshape(image.shape[-2:]), cmap="gray_r", interpolation="nearest")
            sure = item.get("confidence")
            percent = "" if sure is None else f", {100 * sure:.0f} %"
            axes.set_title(f"{item['true']} as {item['predicted']}{percent}", fontsize=8, pad=2)
            axes.set_xlabel(f"no. {item['index']}", fontsize=8, labelpad=1, color="0.35")
    return figure
