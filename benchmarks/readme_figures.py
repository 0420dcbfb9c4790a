"""Make the two pictures of the README.

    python benchmarks/readme_figures.py

``benchmarks/results/operators.png``: a digit before and after each operator.
``benchmarks/results/speed.png``: six operators on a CPU and on a GPU, from the committed tables.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import mnist_ops
from mnist_ops.mnist import data

RESULTS = Path(__file__).parent / "results"
CPU = RESULTS / "cpu-epyc-zen3-2core" / "ops-1-thread.json"
GPU = RESULTS / "nvidia-h100" / "ops.json"
NAMES = {
    "lp_pool2d": "LP pooling",
    "subtractive_norm2d": "subtractive\nnormalization",
    "contrastive_norm2d": "contrastive\nnormalization",
    "stage2d": "tanh, LP pooling,\nsubtractive",
    "softmax_nll": "softmax + NLL",
    "softmax": "softmax",
}
COLOURS = ("#4477aa", "#ee7733")


def operators() -> None:
    """Draw the first test digit and what each operator makes of it."""
    images, _ = data.load("test")
    digit = images[:1].double() / 255
    kernel = mnist_ops.gaussian1d(7)
    pictures = {
        "input": digit,
        "lp_pool2d\np = 2, 2×2": mnist_ops.lp_pool2d(digit, 2, 2),
        "lp_pool2d\np = inf, 3×3": mnist_ops.lp_pool2d(digit, float("inf"), 3, 1),
        "subtractive_norm2d": mnist_ops.subtractive_norm2d(digit, kernel),
        "divisive_norm2d": mnist_ops.divisive_norm2d(digit, kernel),
        "contrastive_norm2d": mnist_ops.contrastive_norm2d(digit, kernel),
        "sigmoid": mnist_ops.sigmoid(8 * digit - 4),
        "softmax\nof each row, β = 5": mnist_ops.softmax(digit, dim=-1, beta=5.0),
    }
    figure, axes = plt.subplots(2, 4, figsize=(8, 4.6), layout="constrained")
    for axis, (name, picture) in zip(axes.flat, pictures.items(), strict=True):
        largest = picture.abs().max().item()
        signed = bool((picture < 0).any())
        limits = {"vmin": -largest, "vmax": largest} if signed else {"vmin": 0, "vmax": largest}
        axis.imshow(picture[0, 0], cmap="RdBu_r" if signed else "gray", **limits)
        axis.set_title(name, fontsize=12)
        axis.set_axis_off()
    figure.savefig(RESULTS / "operators.png", dpi=100)


def rows(path: Path, directions: tuple[str, ...]) -> dict[tuple[str, str], dict]:
    """The largest float32 setting of each operator in a table of ``bench_ops.py``."""
    found: dict[tuple[str, str], dict] = {}
    for row in json.loads(path.read_text())["rows"]:
        if row["dtype"] != "float32" or row["channels_last"] or not row["sweep"]:
            continue
        key = (row["family"], row["direction"])
        known = found.get(key, {"elements": 0})
        if key[0] in NAMES and key[1] in directions and row["elements"] > known["elements"]:
            found[key] = row
    return found


def bars(axis: plt.Axes, series: dict[str, list[float]], text: str) -> None:
    """Draw two bars for each operator, with their numbers."""
    for i, (label, values) in enumerate(series.items()):
        places = [k + 0.2 * (2 * i - 1) for k in range(len(values))]
        drawn = axis.barh(places, values, 0.38, label=label, color=COLOURS[i])
        axis.bar_label(drawn, fmt=text, fontsize=10, padding=2)
    axis.set_yticks(range(len(NAMES)), NAMES.values(), fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=10, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    axis.set_ylim(len(NAMES) - 0.5, -0.5)
    axis.margins(x=0.15)


def speed() -> None:
    """Draw the ratios on one CPU thread, and the share of the bandwidth on the GPU."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5), layout="constrained", sharey=True)
    cpu = rows(CPU, ("forward+backward",))
    ratios = [cpu[name, "forward+backward"]["over_ours"] for name in NAMES]
    bars(
        left,
        {f"{label} / ours": [r[key] for r in ratios]
         for key, label in (("eager", "eager"), ("compile", "torch.compile"))},
        "%.1f",
    )  # fmt: skip
    left.axvline(1, color="black", linewidth=0.8)
    left.set_title("CPU, one thread: their time over ours")
    gpu = rows(GPU, ("forward", "backward"))

    def share(row: dict) -> float:
        return 100 * row["floor_us"] / row["kernel_us"]["mnist_ops"]

    shares = {d: [share(gpu[name, d]) for name in NAMES] for d in ("forward", "backward")}
    bars(right, shares, "%.0f")
    right.axvline(100, color="black", linewidth=0.8)
    right.set_title("H100: % of the bandwidth of a copy")
    figure.savefig(RESULTS / "speed.png", dpi=100)


if __name__ == "__main__":
    torch.set_num_threads(1)
    operators()
    speed()
