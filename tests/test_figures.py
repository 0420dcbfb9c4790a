"""Figures: what is drawn is what was measured, without a display and without pyplot."""

import subprocess
import sys

import matplotlib.figure
import pytest

from mnist_ops import figures, reports
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
    code = "import sys, mnist_ops.figures; print('matplotlib' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result
