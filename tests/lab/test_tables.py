"""Our numbers beside the printed ones."""

import copy

import pytest
from test_statistics import record

from mnist_ops.lab import reports, tables
from mnist_ops.lab.experiments import CANDIDATES, EXPERIMENTS, TABLES

ORIGINAL = [(96.71, 99.04), (99.04, 99.41), (99.3416666, 99.40)]


@pytest.mark.parametrize("total", [10_000, 60_000])
@pytest.mark.parametrize("printed", [96.71, 99.04, 100.0, 12.34])
def test_images_apart_counts_to_the_nearest_that_prints_the_same(total, printed):
    unit = round(printed * 100)
    same = [count for count in range(total + 1) if count * 10_000 // total == unit]
    for count in range(max(0, same[0] - 30), min(total, same[-1] + 30) + 1):
        nearest = min(same, key=lambda s: abs(s - count))
        assert tables.images_apart(100 * count / total, printed, total) == count - nearest


def test_images_apart_by_hand():
    assert tables.images_apart(99.48, 99.47, 10_000) == 1
    assert tables.images_apart(99.46, 99.47, 10_000) == -1
    # 96.71 stands for 58,026 (96.71) to 58,031 (96.71833) of 60,000.
    for count, apart in ((58_025, -1), (58_026, 0), (58_031, 0), (58_032, 1)):
        assert tables.images_apart(100 * count / 60_000, 96.71, 60_000) == apart


def test_a_column_that_is_met_and_one_that_is_not():
    runs = [record("original", 1, ORIGINAL), record("relu", 1, [(96.52, 98.73)] * 3)]
    columns = tables.compare(TABLES["3.3"], runs)
    assert tables.column_verdict(columns["Tanh"]) == "6 of 6 equal"
    # Epoch 2 is printed as 98.86 / 99.02, epoch 3 as 99.13 / 99.08.
    assert tables.column_verdict(columns["reLU"]) == (
        "2 of 6 equal; farthest −1566 images (epoch 3, training)"
    )


def test_seed_1_stands_beside_print_and_all_seeds_beside_it():
    """The mean of the seeds is no number to meet."""
    runs = [record("original", s, [(96.71 + s - 1, 99.04)]) for s in (1, 2, 3)]
    cells = tables.compare(TABLES["3.1"], runs)["original"]
    assert (cells[0].ours, cells[0].images) == (96.71, 0)
    assert cells[0].seeds == pytest.approx((97.71, 1.0, 3))
    assert tables.compare(TABLES["3.1"], runs[1:])["original"][0].images is None


def test_numbers_that_were_not_run_are_neither_met_nor_missed():
    cells = tables.compare(TABLES["3.1"], [record("original", 1, ORIGINAL)])["original"]
    assert [c.images for c in cells] == [0] * 6 + [None] * 14
    assert tables.column_verdict(cells) == "6 of 20 equal, 14 not run"
    nothing = tables.compare(TABLES["3.2"], [])
    assert {tables.column_verdict(cells) for cells in nothing.values()} == {"not run"}


def test_a_dash_is_no_number_to_meet():
    runs = [record("mse", 1, [(96.74, 99.04), (99.07, 99.30), (99.35, 12.0)])]
    cells = tables.compare(TABLES["3.4"], runs)["MSE"]
    assert cells[-1].printed is None and cells[-1].images is None
    assert tables.column_verdict(cells) == "5 of 5 equal"


def test_epochs_that_a_table_numbers_too_high():
    # Printed for epoch 20: 99.98 / 99.53, for 21: 99.98 / 99.51.
    accuracies = [(99.0, 99.0)] * 18 + [(99.988, 99.53), (99.9883, 99.51)]
    runs = [record("original", 1, accuracies)]
    cells = tables.compare(TABLES["3.5"], runs)["2-layer"]
    assert [cell.epoch for cell in cells][::2] == list(range(19, 31))
    assert [cell.images for cell in cells][:5] == [0, 0, 0, 0, None]


def test_the_longest_run_of_seed_1_is_taken():
    short = record("original", 1, ORIGINAL)
    long = record("original", 1, [*ORIGINAL, (99.53, 99.47)], dtype="float32")
    cells = tables.compare(TABLES["3.1"], [short, long])["original"]
    assert cells[0].run is long
    assert tables.column_verdict(cells) == "8 of 20 equal, 12 not run"


def test_part_of_the_data_is_counted_as_such():
    runs = [record("original", 1, [(96.0, 99.0)], limit=10_000)]
    cells = tables.compare(TABLES["3.1"], runs)["original"]
    assert cells[0].images == -71  # 9,600 of 10,000, where 9,671 print 96.71


def test_candidates_closest_first():
    near, far = CANDIDATES["relu"][1], CANDIDATES["relu"][0]
    runs = [record(far.name, 1, [(90.0, 90.0)]), record(near.name, 1, [(96.52, 98.74)])]
    rows = tables.candidates(EXPERIMENTS["relu"], runs)
    assert [guess.name for guess, _ in rows[:2]] == [near.name, far.name]
    assert [cell.images for cell in rows[0][1]] == [0, 1]
    assert all(cells == [] for _, cells in rows[2:])
    assert len(rows) == len(CANDIDATES["relu"])


def perturbed(weight, accuracies):
    return record("original", 1, accuracies, perturbed_weight=weight)


def test_spread():
    runs = [
        record("original", 1, ORIGINAL),
        perturbed(0, [(96.71, 99.04), (99.04, 99.43)]),
        perturbed(1, [(96.71, 99.04), (99.03, 99.40)]),
        record("relu", 1, ORIGINAL),
    ]
    first, second, *rest = tables.spread({"runs": runs})
    assert rest == []  # of the third epoch there is one run
    assert (first["experiment"], first["epoch"], first["runs"]) == ("original", 1, 3)
    assert first["training_lowest"] == first["training_highest"] == 58_026
    assert (second["test_lowest"], second["test_highest"]) == (9940, 9943)
    assert (second["training_lowest"], second["training_highest"]) == (59_418, 59_424)
    other = [run | {"data": "md5:0123"} for run in runs]
    assert tables.spread({"runs": other}) == []


def test_beside_the_authors_log():
    log = reports.AUTHORS_LOGS["original"]
    accuracies = list(zip(log["training"], log["test"], strict=True))[:4]
    accuracies[3] = (accuracies[3][0], 99.48)
    found = tables.authors_log({"runs": [record("original", 1, accuracies)]}, "original")
    assert (found.epochs, found.apart) == (4, {"training": {}, "test": {4: 1}})
    assert found.inside == {}
    runs = [record("original", 1, accuracies), perturbed(0, [(97.0, 99.04), (99.0, 99.5)])]
    found = tables.authors_log({"runs": runs}, "original")
    assert found.inside == {("weight", "training"): (2, 2, {}), ("weight", "test"): (2, 2, {})}
    pixels = record("original--pixels-2", 1, [(96.0, 99.04), (99.0, 99.41), (99.0, 99.0)])
    found = tables.authors_log({"runs": [*runs, pixels]}, "original")
    assert found.inside["weight", "test"] == (2, 2, {})
    assert found.inside["pixels", "test"] == (2, 3, {})
    assert found.inside["pixels", "training"] == (2, 3, {})
    runs[0]["epochs"][1]["train_accuracy"] = 99.02  # the log has 99.04
    found = tables.authors_log({"runs": runs}, "original")
    assert found.inside["weight", "training"] == (2, 2, {2: 12})
    assert found.apart["training"] == {2: -12}
    assert tables.authors_log({"runs": []}, "three-layer") is None


def test_confusion_matrices_cell_by_cell():
    logged = reports.AUTHORS_LOGS["original"]["confusion"]["epochs"]
    run = record("original", 1, [(99.0, 99.0)] * 21)
    for epoch in (20, 21):
        run["epochs"][epoch - 1]["confusion"] = copy.deepcopy(logged[str(epoch)]["test"])
    assert tables.confusion_cells(run) == {"test": (200, 200, [])}
    run["epochs"][20]["confusion"][9][4] += 1
    run["epochs"][19]["train_confusion"] = logged["20"]["training"]
    wanted = logged["21"]["test"][9][4]
    assert tables.confusion_cells(run) == {
        "training": (100, 100, []),
        "test": (199, 200, [f"epoch 21, test, 9 as 4: {wanted + 1}, in the log {wanted}"]),
    }
    assert tables.confusion_cells(record("original", 1, [(99.0, 99.0)] * 5)) == {}
