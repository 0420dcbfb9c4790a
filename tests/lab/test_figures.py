"""Figures: what is drawn is what was measured, without a display and without pyplot."""

import resource
import struct
import subprocess
import sys

import matplotlib.text
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from test_statistics import runs_of

from mnist_ops.lab import figures, reports
from mnist_ops.mnist import data


def test_matplotlib_is_imported_when_needed():
    code = "import sys, mnist_ops.lab.figures; print('matplotlib' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result


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


def line(label, rows, printed=None):
    return figures.Line(label, {run["seed"]: run for run in runs_of(label, rows)}, printed or {})


def test_curves():
    other = [(95.0, 96.0), (95.5, 97.0)]
    lines = [
        line("a", THREE, {1: (96.71, 99.04), 2: (99.04, None)}),
        line("a-long-name-of-an-experiment", [other]),
    ]
    figure = figures.curves(lines, "the log")
    training, test = figure.axes
    for axes, part in ((training, 0), (test, 1)):
        # Seed 1 of each, not the mean.
        shown = [one.get_xydata().tolist() for one in axes.lines]
        assert shown == [
            [[e, row[e - 1][part]] for e in (1, 2)]
            for row in (THREE[0], [(95.0, 96.0), (95.5, 97.0)])
        ]
        (band,) = (c for c in axes.collections if "Poly" in type(c).__name__)
        corners = band.get_paths()[0].vertices
        for epoch in (1, 2):
            values = [seed[epoch - 1][part] for seed in THREE]
            reached = corners[corners[:, 0] == epoch, 1]
            assert (reached.min(), reached.max()) == (min(values), max(values))
        (circles,) = (c for c in axes.collections if c is not band)
        assert circles.get_offsets().tolist() == [[[1, 96.71], [2, 99.04]], [[1, 99.04]]][part]
        low, high = axes.get_ylim()
        assert low < (95.0, 96.0)[part] and high > (99.04, 99.2)[part]
    assert training.get_ylabel() == "training (%)" and test.get_ylabel() == "test (%)"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["a", "a-long-name-of-an-experiment", "all seeds", "the log"]
    check_layout(figure)


def test_curves_of_report_2():
    """Points that go on beyond the runs, and one that cannot be read."""
    curve = reports.FIGURES["best_theta0.2"]
    figure = figures.curves([line("a", THREE[:1], curve)])
    training, test = figure.axes
    assert test.get_xlim()[1] > 44 and training.get_ylim()[1] > 99.9
    points = test.collections[0].get_offsets().tolist()
    assert len(points) == 43 and [30, 99.573] in points and 11 not in {x for x, _ in points}
    # Epoch 1 is far below what matters of 44.
    assert training.get_ylim()[0] > 97 and test.get_ylim()[0] < 97.563
    check_layout(figure)


def test_curves_until_an_epoch():
    rows = [[(90.0 + e, 91.0 + e) for e in range(9)]] * 2
    figure = figures.curves([line("a", rows, {1: (90.0, 91.0)})], last=3)
    assert all(len(axes.lines[0].get_xdata()) == 3 for axes in figure.axes)
    assert figure.axes[1].get_xlim()[1] < 3.5 and figure.axes[0].get_ylim()[0] < 90
    with pytest.raises(ValueError, match="neither a run nor a printed number"):
        figures.curves([line("a", [])])


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


def test_curves_within_the_epochs():
    """The online accuracy of consecutive pieces."""
    runs = runs_of("original", [[(91.0, 92.0), (93.0, 94.0)]])
    for epoch in runs[0]["epochs"]:
        epoch["curve"] = [80.0 + epoch["epoch"], 85.0]
    figure = figures.curves([figures.Line("a", {1: runs[0]}, {})], within=True)
    training, test = figure.axes
    assert [line.get_xydata().tolist() for line in training.lines] == [
        [[1, 91.0], [2, 93.0]],
        [[0.5, 81.0], [1, 85.0], [1.5, 82.0], [2, 85.0]],
    ]
    assert len(test.lines) == 1


def test_a_panel_without_a_number_is_left_out():
    """As of a log that has the test accuracies alone, before its run."""
    figure = figures.curves([figures.Line("a", {}, {1: (None, 99.0), 2: (None, 99.5)})])
    (panel,) = figure.axes
    assert panel.get_ylabel() == "test (%)" and panel.get_xlabel() == "epoch"
    check_layout(figure)


def test_normalization_gallery(tmp_path):
    write_digits(tmp_path)
    figure = figures.normalization_gallery(tmp_path, [0, 7])
    grid = [axes.images[0] for axes in figure.axes]
    assert len(grid) == 10
    shown = np.stack([np.asarray(picture.get_array()) for picture in grid])
    images, _ = data.load("train", tmp_path)
    assert np.array_equal(shown[:2], data.pad32(images[[0, 7]])[:, 0])
    # The same digits as prepared for training, row by row.
    kinds = [("global",), *(("contrastive", taps) for taps in (7, 15, 21))]
    for row, options in enumerate(kinds, 1):
        expected = data.prepare(*options, root=tmp_path).train_images[[0, 7], 0].numpy()
        assert np.array_equal(shown[2 * row : 2 * row + 2], expected)
    names = [axes.get_ylabel() for axes in figure.axes[::2]]
    assert names == ["as it is", "global", *(f"Gaussian1D({n})" for n in (7, 15, 21))]
    check_layout(figure)


def test_filters():
    weights = torch.arange(5 * 9.0).view(5, 1, 3, 3) - 20
    for figure in (figures.filters(weights), figures.filters(weights.tolist())):
        picture = figure.axes[0].images[0]
        mosaic = np.ma.filled(picture.get_array(), np.nan)
        assert mosaic.shape == (9, 13)  # two rows of three, lines around each
        assert np.array_equal(mosaic[1:4, 5:8], weights[1, 0].numpy())
        assert np.array_equal(mosaic[5:8, 5:8], weights[4, 0].numpy())
        assert np.isnan(mosaic[[0, 4, 8]]).all() and np.isnan(mosaic[5:, 9:]).all()
        assert picture.get_clim() == (-24, 24)
        check_layout(figure)
    for wrong in (torch.zeros(4, 2, 3, 3), torch.zeros(0, 1, 3, 3), [1.0]):
        with pytest.raises(ValueError, match="filters: weights must be"):
            figures.filters(wrong)


def test_confusion():
    counts = [
        [5 * (i == j) * 200 + (i + 2 * j) % 5 * (i != j) for j in range(10)] for i in range(10)
    ]
    figure = figures.confusion(counts)
    (axes,) = figure.axes
    written = {text.get_position(): int(text.get_text()) for text in axes.texts}
    assert written == {(j, i): counts[i][j] for i in range(10) for j in range(10) if counts[i][j]}
    wrong = sum(map(sum, counts)) - 10_000
    assert axes.get_title() == f"{wrong} of {10_000 + wrong:,} images wrong"
    check_layout(figure)
    # The counts fit their cells.
    cell = abs(axes.transData.transform((1, 0))[0] - axes.transData.transform((0, 0))[0])
    renderer = FigureCanvasAgg(figure).get_renderer()
    assert max(text.get_window_extent(renderer).width for text in axes.texts) <= cell
    with pytest.raises(ValueError, match="confusion: counts must be square"):
        figures.confusion([[1, 2]])


def test_mistakes():
    images = torch.arange(6 * 4).view(6, 1, 2, 2)
    items = [{"index": i, "true": 3, "predicted": i, "confidence": 0.994} for i in (5, 1, 0, 2, 3)]
    del items[4]["confidence"]
    figure = figures.mistakes(items, images)
    axes = figure.axes
    assert len(axes) == 8
    assert np.array_equal(axes[0].images[0].get_array(), images[5, 0])
    assert axes[0].get_title() == "3 as 5, 99 %" and axes[0].get_xlabel() == "no. 5"
    assert axes[4].get_title() == "3 as 3" and not axes[5].images
    check_layout(figure)


def test_the_same_bytes():
    lines = [line("a", THREE, {1: (96.71, 99.04)})]
    first, second = (figures.render(figures.curves(lines)) for _ in "ab")
    assert first == second and first[:4] == b"\x89PNG"


def test_a_full_disk_leaves_the_old_figure(tmp_path):
    """A limit on the size of files, as a disk that takes no more."""
    path = tmp_path / "confusion.png"
    figure = figures.confusion([[3, 1], [0, 4]])
    figures.save(figure, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        for name in ("confusion.png", "new.pdf"):
            with pytest.raises(OSError, match=name):
                figures.save(figure, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_ending_chooses_the_format(tmp_path):
    for name, head in (("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml")):
        figures.save(figures.confusion([[3, 1], [0, 4]]), tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(head)


def test_the_gallery_does_not_depend_on_the_default_device(tmp_path, monkeypatch):
    write_digits(tmp_path)
    images, labels = data.load("train", tmp_path)
    expected = figures.render(figures.normalization_gallery(tmp_path, [0, 7]))
    monkeypatch.setattr(data, "load", lambda *_: (images, labels))
    real = data.local_norm
    monkeypatch.setattr(data, "local_norm", lambda x, n: outside(real, x, n))

    def outside(function, *arguments):  # whose own tensors are not what is looked at here
        with torch.device("cpu"):
            return function(*arguments)

    with torch.device("meta"):
        assert figures.render(figures.normalization_gallery(tmp_path, [0, 7])) == expected
