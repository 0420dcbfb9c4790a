"""Our digits beside the printed ones."""

import csv
import resource

import pytest

from mnist_ops.lab import tables
from mnist_ops.lab.experiments import CANDIDATES, EXPERIMENTS, TABLES


def record(experiment, accuracies, dtype="float64", weight=None, seed=1, limit=None):
    epochs = [
        {"epoch": i, "train_accuracy": train, "test_accuracy": test}
        for i, (train, test) in enumerate(accuracies, 1)
    ]
    return {
        "experiment": experiment,
        "dtype": dtype,
        "seed": seed,
        "limit": limit,
        "perturbed_weight": weight,
        "epochs": epochs,
    }


ORIGINAL = [(96.71, 99.04), (99.04, 99.41), (99.3416666, 99.40)]


@pytest.mark.parametrize("total", [10_000, 60_000])
@pytest.mark.parametrize("printed", [96.71, 99.04, 100.0, 12.34])
def test_samples_apart_counts_to_the_nearest_that_prints_the_same(total, printed):
    unit = round(printed * 100)
    same = [count for count in range(total + 1) if count * 10_000 // total == unit]
    for count in range(max(0, same[0] - 30), min(total, same[-1] + 30) + 1):
        nearest = min(same, key=lambda s: abs(s - count))
        assert tables.samples_apart(100 * count / total, printed, total) == count - nearest


def test_samples_apart_by_hand():
    assert tables.samples_apart(99.48, 99.47, 10_000) == 1
    assert tables.samples_apart(99.46, 99.47, 10_000) == -1
    # 96.71 stands for 58,026 (96.71) to 58,031 (96.71833) of 60,000.
    assert tables.samples_apart(100 * 58_026 / 60_000, 96.71, 60_000) == 0
    assert tables.samples_apart(100 * 58_031 / 60_000, 96.71, 60_000) == 0
    assert tables.samples_apart(100 * 58_032 / 60_000, 96.71, 60_000) == 1
    assert tables.samples_apart(100 * 58_025 / 60_000, 96.71, 60_000) == -1


def test_a_table_that_is_met():
    results = {"runs": [record("original", ORIGINAL), record("relu", [(96.52, 98.73)] * 3)]}
    cells = tables.compare(TABLES["3.3"], results)
    assert len(cells) == 12
    columns = dict(tables.columns(cells))
    assert tables.verdict(columns["Tanh (float64)"]) == "reproduced: all 6 printed numbers"
    relu = tables.verdict(columns["reLU (float64)"])
    # Epoch 2 is printed as 98.86 / 99.02.
    assert relu.startswith("2 of 6 printed numbers; parts in epoch 2, training, by -1404 digits")
    text = tables.text(TABLES["3.3"], results)
    assert "    96.71    96.71       0    99.04    99.04       0" in text
    assert "-1404" in text and "reproduced" in text


def test_numbers_that_were_not_run_are_neither_met_nor_missed():
    results = {"runs": [record("original", ORIGINAL)]}
    cells = tables.compare(TABLES["3.1"], results)
    assert [c.samples for c in cells] == [0] * 6 + [None] * 14
    assert tables.verdict(cells) == "6 of 20 printed numbers, 14 not run"
    nothing = tables.text(TABLES["3.2"], {"runs": []})
    assert nothing == "Table 3.2: no run with all digits, none to compare with the printed\n"


def test_a_dash_is_no_number_to_meet():
    results = {"runs": [record("mse", [(96.74, 99.04), (99.07, 99.30), (99.35, 12.0)])]}
    cells = tables.compare(TABLES["3.4"], results)
    assert [cell.printed for cell in cells][-1] is None and cells[-1].samples is None
    assert tables.verdict(cells) == "reproduced: all 5 printed numbers"


def test_epochs_that_a_table_numbers_too_high():
    # Printed for epoch 20: 99.98 / 99.53, for 21: 99.98 / 99.51.
    accuracies = [(99.0, 99.0)] * 18 + [(99.988, 99.53), (99.9883, 99.51)]
    results = {"runs": [record("original", accuracies)]}
    cells = tables.compare(TABLES["3.5"], results)
    assert [cell.epoch for cell in cells][::2] == list(range(19, 31))
    assert [cell.samples for cell in cells][:5] == [0, 0, 0, 0, None]
    assert tables.verdict(cells) == "4 of 24 printed numbers, 20 not run"
    assert "(The report numbers these epochs 1 higher.)" in tables.text(TABLES["3.5"], results)


def test_runs_that_are_no_comparison_stay_out():
    runs = [
        record("original", ORIGINAL, seed=2),
        record("original", ORIGINAL, limit=100),
        record("original", ORIGINAL, weight=0),
        record("original", []),
    ]
    assert tables.compare(TABLES["3.1"], {"runs": runs}) == []
    runs += [record("original", ORIGINAL, dtype="float32"), record("original", ORIGINAL)]
    cells = tables.compare(TABLES["3.1"], {"runs": runs})
    assert [name for name, _ in tables.columns(cells)] == [
        "original (float64)",
        "original (float32)",
    ]


def test_candidates_closest_first():
    near, far = CANDIDATES["relu"][1], CANDIDATES["relu"][0]
    runs = [record(far.name, [(90.0, 90.0)]), record(near.name, [(96.52, 98.74)])]
    rows = tables.candidates(EXPERIMENTS["relu"], {"runs": runs})
    assert [guess.name for guess, _ in rows[:2]] == [near.name, far.name]
    assert [cell.samples for cell in rows[0][1]] == [0, 1]
    assert all(cells == [] for _, cells in rows[2:])
    assert len(rows) == len(CANDIDATES["relu"])


def test_spread():
    runs = [
        record("original", ORIGINAL),
        record("original", [(96.71, 99.04), (99.04, 99.43)], weight=0),
        record("original", [(96.71, 99.04), (99.03, 99.40)], weight=1),
        record("relu", ORIGINAL),
    ]
    first, second = tables.spread({"runs": runs})
    assert (first["experiment"], first["epoch"], first["runs"]) == ("original", 1, 3)
    assert first["training_lowest"] == first["training_highest"] == 58_026
    assert (second["test_lowest"], second["test_highest"]) == (9940, 9943)
    assert (second["training_lowest"], second["training_highest"]) == (59_418, 59_424)


def test_csv(tmp_path):
    tables.write_csv(tmp_path / "a.csv", [{"x": 1, "y": None}, {"x": 2, "y": "z, w"}])
    with open(tmp_path / "a.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{"x": "1", "y": ""}, {"x": "2", "y": "z, w"}]
    tables.write_csv(tmp_path / "b.csv", [])
    assert not (tmp_path / "b.csv").exists()


def test_runs_on_other_data_are_not_compared_with_print():
    """All digits of something else than MNIST are no digits of the report."""
    mnist = record("original", ORIGINAL) | {"data": "MNIST"}
    other = record("original", ORIGINAL) | {"data": "md5:0123"}
    table = TABLES["3.1"]
    assert tables.compare(table, {"runs": [other]}) == []
    assert len(tables.compare(table, {"runs": [other, mnist]})) == 2 * len(table.epochs)
    perturbed = record("original", ORIGINAL, weight=0) | {"data": "md5:0123"}
    assert tables.spread({"runs": [other, perturbed]}) == []


def test_a_full_disk_leaves_the_old_table(tmp_path):
    path = tmp_path / "t.csv"
    tables.write_csv(path, [{"a": 1}])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(OSError, match=r"t\.csv"):
            tables.write_csv(path, [{"a": 1}] * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "a\n1\n"
    assert list(tmp_path.iterdir()) == [path]
