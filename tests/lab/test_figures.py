"""Figures: what is drawn is what was measured, without a display and without pyplot."""

import itertools
import math
import resource
import struct
import subprocess
import sys

import matplotlib.figure
import matplotlib.text
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from mnist_ops.lab import figures, reports
from mnist_ops.mnist import data
from mnist_ops.training import EpochResult


def history(epochs):
    return [
        EpochResult(e, 90.0 + e, 91.0 + e, 0.1, 0.2, 1e-3, 60.0, [80.0 + e, 85.0 + e], [[1]])
        for e in range(1, epochs + 1)
    ]


@pytest.mark.parametrize("epochs", [1, 3])
def test_accuracy_curves(tmp_path, monkeypatch, epochs):
    drawn = []
    save = matplotlib.figure.Figure.savefig

    def keep(figure, *args, **options):
        drawn.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    path = tmp_path / "accuracy.png"
    figures.accuracy_curves(history(epochs), path, "a title", reports.TABLE_3_1)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (axes,) = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    numbers = range(1, epochs + 1)
    assert lines["training, whole epoch"] == [[e, 90.0 + e] for e in numbers]
    assert lines["test"] == [[e, 91.0 + e] for e in numbers]
    assert lines["training, within the epoch"] == [
        [e - 1 + half / 2, 75.0 + 5.0 * half + e] for e in numbers for half in (1, 2)
    ]
    printed = [collection.get_offsets().tolist() for collection in axes.collections]
    assert printed[:2] == [[[e, reports.TABLE_3_1[e][i]] for e in numbers] for i in (0, 1)]
    assert axes.get_title() == "a title"
    low, high = axes.get_ylim()
    assert low < 91.0 and high > 100.0


def test_no_epochs(tmp_path):
    with pytest.raises(ValueError, match="history holds no epochs"):
        figures.accuracy_curves([], tmp_path / "accuracy.png")


def test_matplotlib_is_imported_when_needed():
    code = "import sys, mnist_ops.lab.figures; print('matplotlib' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result


class Described:
    """An experiment as figures need it."""

    def __init__(self, name, reported=None):
        self.name, self.title, self.section, self.group = name, name, "section", "group"
        self.reported = reported or {}


def runs_of(name, rows):
    """A run a seed: training and test accuracy of each epoch."""
    return [
        {"experiment": name, "seed": seed, "epochs": [
            {"epoch": e, "train_accuracy": a, "test_accuracy": b}
            for e, (a, b) in enumerate(epochs, 1)]}
        for seed, epochs in enumerate(rows, 1)
    ]  # fmt: skip


@pytest.fixture
def drawn(monkeypatch):
    """Every figure that is saved."""
    kept = []
    save = matplotlib.figure.Figure.savefig

    def keep(figure, *args, **options):
        kept.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return kept


def check_layout(figure):
    """Nothing reaches out of the figure, and letters have 8 points or more at 3.5 inches."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer, (width, height) = canvas.get_renderer(), canvas.get_width_height()
    assert figure.get_figwidth() == 3.5
    texts = [t for t in figure.findobj(matplotlib.text.Text) if t.get_text() and t.get_visible()]
    inside = [figure.axes[0].title, figure.axes[0].xaxis.label, figure.axes[0].yaxis.label]
    for text in [*inside, *(t for legend in figure.legends for t in legend.get_texts())]:
        box = text.get_window_extent(renderer)
        if text.get_text():
            assert box.x0 >= -1 and box.y0 >= -1, text
            assert box.x1 <= width + 1 and box.y1 <= height + 1, text
    assert min(text.get_fontsize() for text in texts) >= 8


THREE = [[(96.0, 98.0), (98.0, 99.0)], [(97.0, 98.5), (98.5, 99.2)], [(96.5, 98.1), (98.1, 98.8)]]


def test_group_curves(tmp_path, drawn):
    described = {
        "a": Described("a", {1: (96.71, 99.04), 2: (99.04, None), 9: (1.0, 1.0)}),
        "absent": Described("absent"),
        "b": Described("b"),
    }
    runs = runs_of("b", [[(95.0, 96.0), (95.5, 97.0)]]) + runs_of("a", THREE)
    figures.group_curves(runs, described, tmp_path / "group.png", "a title")
    (axes,) = drawn[0].axes
    lines = [(line.get_linestyle(), line.get_xydata().tolist()) for line in axes.lines]
    assert [style for style, _ in lines] == ["-", "--", "-", "--"]
    assert [y for style, xy in lines for y in xy] == [
        pytest.approx(point)
        for point in [(1, 98.2), (2, 99.0), (1, 96.5), (2, 98.2), (1, 96.0), (2, 97.0), (1, 95.0),
                      (2, 95.5)]
    ]  # fmt: skip
    bands = [c for c in axes.collections if "Poly" in type(c).__name__]
    assert len(bands) == 2  # one seed has none
    test = bands[0].get_paths()[0].vertices
    assert test[test[:, 0] == 1, 1].min() == 98.0 and test[test[:, 0] == 2, 1].max() == 99.2
    # Beyond the runs' last epoch nothing is shown of the report.
    circles = [c.get_offsets().tolist() for c in axes.collections if c not in bands]
    assert circles == [[[1, 99.04]], [[1, 96.71], [2, 99.04]]]
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert legend == ["a", "b", "test", "training", "printed in the report"]
    low, high = axes.get_ylim()
    assert 94.0 < low < 95.0 and 99.2 < high < 100 and axes.get_yscale() == "linear"
    check_layout(drawn[0])


def test_group_curves_from_chance_to_the_ceiling(tmp_path, drawn):
    runs = runs_of("low", [[(10.0, 9.8), (11.0, 11.35)]])
    runs += runs_of("a-long-name-of-an-experiment", [[(99.9, 99.0), (100.0, 99.5)]])
    described = {name: Described(name) for name in ("low", "a-long-name-of-an-experiment")}
    figures.group_curves(runs, described, tmp_path / "group.png")
    (axes,) = drawn[0].axes
    low, high = axes.get_ylim()
    assert low < 9.8 and high > 100.0
    ends = axes.transData.transform([(1, y) for y in (9.8, 90.0, 99.0, 99.9, 100.0)])[:, 1]
    steps = [b - a for a, b in itertools.pairwise(ends)]
    # 90 to 99 takes as much room as 99 to 99.9, nearly.
    assert min(steps) > 10 and steps[1] == pytest.approx(steps[2], rel=0.1)
    assert {10, 90, 99} <= set(axes.get_yticks())
    check_layout(drawn[0])


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("low", [96.0, 10.0])
def test_group_curves_of_one_epoch(tmp_path, drawn, seeds, low):
    rows = [[(low + s, 98.0 + s / 10)] for s in range(seeds)]
    described = {"a-long-name-indeed": Described("a-long-name-indeed", {1: (96.71, 99.04)})}
    figures.group_curves(runs_of("a-long-name-indeed", rows), described, tmp_path / "group.png")
    (axes,) = drawn[0].axes
    means = [line.get_xdata()[0] for line in axes.lines if line.get_marker() in ("o", "s")]
    middle = (seeds - 1) / 2
    assert means == pytest.approx([98.0 + middle / 10, 99.04, low + middle, 96.71])
    seeds_drawn = [line.get_xdata().tolist() for line in axes.lines if line.get_marker() == "|"]
    assert len(seeds_drawn) == (2 if seeds > 1 else 0)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a-long-name-indeed"]
    check_layout(drawn[0])


def test_group_curves_without_runs(tmp_path):
    nan = runs_of("a", [[(float("nan"), None)]])
    for runs in ([], nan):
        with pytest.raises(ValueError, match="group_curves: runs hold no epoch"):
            figures.group_curves(runs, {"a": Described("a")}, tmp_path / "group.png")


def test_report_curves(tmp_path, drawn):
    curve = reports.FIGURES["best_theta0.2"]
    figures.report_curves(runs_of("a", THREE), "a", curve, tmp_path / "curve.png")
    (axes,) = drawn[0].axes
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    assert lines["test, here"].tolist() == [pytest.approx((1, 98.2)), pytest.approx((2, 99.0))]
    assert len(lines["test, report"]) == 44 and lines["test, report"][29].tolist() == [30, 99.573]
    assert math.isnan(lines["test, report"][10][1])  # not readable: a gap
    assert axes.get_xlim()[0] > 0 and axes.get_xlim()[1] > 44
    check_layout(drawn[0])
    with pytest.raises(ValueError, match="neither runs nor reported"):
        figures.report_curves([], "a", {}, tmp_path / "curve.png")


def write_digits(root, count=12):
    """A folder of the user's own with this many digits a split."""
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "t10k"):
        pixels = torch.randint(0, 256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        head = struct.pack(">4I", 0x0803, count, 28, 28)
        (root / f"{split}-images-idx3-ubyte").write_bytes(head + pixels.numpy().tobytes())
        labels = bytes(i % 10 for i in range(count))
        (root / f"{split}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2I", 0x0801, count) + labels
        )


def test_normalization_gallery(tmp_path, drawn):
    write_digits(tmp_path)
    path = tmp_path / "gallery.png"
    figures.normalization_gallery(path, [0, 7], tmp_path)
    grid = [axes.images[0] for axes in drawn[0].axes]
    assert len(grid) == 8
    shown = np.stack([np.asarray(picture.get_array()) for picture in grid])
    images, _ = data.load("train", tmp_path)
    assert np.array_equal(shown[:2], data.pad32(images[[0, 7]])[:, 0])
    # The same digits as prepared for training, row by row.
    for row, options in ((1, ("global",)), (2, ("contrastive", 7)), (3, ("contrastive", 15))):
        expected = data.prepare(*options, root=tmp_path).train_images[[0, 7], 0].numpy()
        assert np.array_equal(shown[2 * row : 2 * row + 2], expected)
    names = [axes.get_ylabel() for axes in drawn[0].axes[::2]]
    assert names == ["as it is", "global", "Gaussian1D(7)", "Gaussian1D(15)"]
    check_layout(drawn[0])
    for wrong in ([], [12], [-1]):
        with pytest.raises(ValueError, match="indices must be in 0 to 11"):
            figures.normalization_gallery(path, wrong, tmp_path)


def test_filters(tmp_path, drawn):
    weights = torch.arange(5 * 9.0).view(5, 1, 3, 3) - 20
    figures.filters(weights, tmp_path / "filters.png")
    figures.filters(weights.tolist(), tmp_path / "filters.png")
    for figure in drawn:
        picture = figure.axes[0].images[0]
        mosaic = np.ma.filled(picture.get_array(), np.nan)
        assert mosaic.shape == (7, 11)  # two rows of three, a line between
        assert np.array_equal(mosaic[:3, 4:7], weights[1, 0].numpy())
        assert np.array_equal(mosaic[4:, 4:7], weights[4, 0].numpy())
        assert np.isnan(mosaic[3]).all() and np.isnan(mosaic[4:, 8:]).all()
        assert picture.get_clim() == (-24, 24)
        check_layout(figure)
    for wrong in (torch.zeros(4, 2, 3, 3), torch.zeros(0, 1, 3, 3), [1.0]):
        with pytest.raises(ValueError, match="filters: weights must be"):
            figures.filters(wrong, tmp_path / "filters.png")


def test_confusion(tmp_path, drawn):
    counts = [
        [5 * (i == j) * 200 + (i + 2 * j) % 5 * (i != j) for j in range(10)] for i in range(10)
    ]
    figures.confusion(counts, tmp_path / "confusion.png")
    (axes,) = drawn[0].axes
    written = {text.get_position(): int(text.get_text()) for text in axes.texts}
    assert written == {(j, i): counts[i][j] for i in range(10) for j in range(10) if counts[i][j]}
    wrong = sum(map(sum, counts)) - 10_000
    assert axes.get_title() == f"{wrong} of {10_000 + wrong:,} digits wrong"
    check_layout(drawn[0])
    # The counts fit their cells.
    cell = abs(axes.transData.transform((1, 0))[0] - axes.transData.transform((0, 0))[0])
    renderer = FigureCanvasAgg(drawn[0]).get_renderer()
    assert max(text.get_window_extent(renderer).width for text in axes.texts) <= cell
    with pytest.raises(ValueError, match="confusion: counts must be square"):
        figures.confusion([[1, 2]], tmp_path / "confusion.png")


def test_mistakes(tmp_path, drawn):
    images = torch.arange(6 * 4).view(6, 1, 2, 2)
    items = [{"index": i, "true": 3, "predicted": i, "confidence": 0.994} for i in (5, 1, 0, 2, 3)]
    del items[4]["confidence"]
    figures.mistakes(items, images, tmp_path / "mistakes.png")
    axes = drawn[0].axes
    assert len(axes) == 8
    assert np.array_equal(axes[0].images[0].get_array(), images[5, 0])
    assert axes[0].get_title() == "3 as 5, 99 %" and axes[0].get_xlabel() == "no. 5"
    assert axes[4].get_title() == "3 as 3" and not axes[5].images
    check_layout(drawn[0])
    with pytest.raises(ValueError, match=r"index 6 of 6 images"):
        figures.mistakes([{"index": 6, "true": 1, "predicted": 2}], images, tmp_path / "x.png")
    with pytest.raises(ValueError, match="at least one, got none"):
        figures.mistakes([], images, tmp_path / "x.png")


def test_the_same_bytes():
    described = {"a": Described("a", {1: (96.71, 99.04)})}
    first, second = (
        figures.png(figures.group_curves, runs_of("a", THREE), described) for _ in "ab"
    )
    assert first == second and first[:4] == b"\x89PNG"


def test_a_full_disk_leaves_the_old_figure(tmp_path):
    """A limit on the size of files, as a disk that takes no more."""
    path = tmp_path / "confusion.png"
    figures.confusion([[3, 1], [0, 4]], path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        for name in ("confusion.png", "new.pdf"):
            with pytest.raises(OSError, match=name):
                figures.confusion([[3, 1], [0, 4]], tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_ending_chooses_the_format(tmp_path):
    for name, head in (("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml")):
        figures.confusion([[3, 1], [0, 4]], tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(head)


def test_the_gallery_does_not_depend_on_the_default_device(tmp_path, monkeypatch):
    write_digits(tmp_path)
    images, labels = data.load("train", tmp_path)
    expected = figures.png(figures.normalization_gallery, indices=[0, 7], root=tmp_path)
    monkeypatch.setattr(data, "load", lambda *_: (images, labels))
    real = data.local_norm
    monkeypatch.setattr(data, "local_norm", lambda x, n: outside(real, x, n))

    def outside(function, *arguments):  # whose own tensors are not what is looked at here
        with torch.device("cpu"):
            return function(*arguments)

    with torch.device("meta"):
        assert figures.png(figures.normalization_gallery, indices=[0, 7], root=tmp_path) == expected
