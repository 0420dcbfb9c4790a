"""What the reports printed, against the reference files."""

import json
from pathlib import Path

import pytest

from mnist_ops.lab import experiments, reports

REFERENCE = Path(__file__).parents[1] / "reference"


def reference(name):
    return json.loads((REFERENCE / name).read_text("utf-8"))


def test_tables():
    tables = reference("reports/report1_tables.json")
    del tables["source"]
    assert set(reports.TABLES) == set(tables)
    for table, columns in tables.items():
        for column, entry in columns.items():
            pairs = zip(entry["training"], entry["test"], strict=True)
            assert reports.TABLES[table][column] == dict(zip(entry["epochs"], pairs, strict=True))


def test_figures_and_logs():
    curves = reference("reports/report2_figures.json")
    for name in ("best_theta0.2", "top_noise_dropout_conv_rot"):
        pairs = zip(curves[name]["train"], curves[name]["test"], strict=True)
        assert reports.FIGURES[name] == dict(enumerate(pairs, 1))
    for name in ("extra_convolution", "dropout"):
        values = curves[f"log_{name}_test"]
        assert reports.LOGS[name] == {i: (None, x) for i, x in enumerate(values, 1)}
    # What the comment on LOGS says.
    curve, log = reports.FIGURES["top_noise_dropout_conv_rot"], reports.LOGS["extra_convolution"]
    apart = [abs(curve[epoch][1] - log[epoch][1]) for epoch in log]
    assert apart[0] > 0.1 and max(apart[1:]) < 0.0121


def test_the_authors_logs():
    """As they were published; and Tables 3.1 and 3.5 are their lines, cut, but for one number."""
    logs, others = reports.AUTHORS_LOGS, []
    assert logs == reference("authors/report1_logs.json")
    for table, column, name in (
        ("3.1", "original", "original"),
        ("3.5", "two_layer", "original"),
        ("3.5", "three_layer", "three_layer"),
    ):
        shift = reports.EPOCH_SHIFT.get(table, 0)
        for epoch, printed in reports.TABLES[table][column].items():
            for split, value in zip(("training", "test"), printed, strict=True):
                logged = logs[name][split][epoch - shift - 1]
                if reports.cut(logged) != f"{value:.2f}":
                    others.append((table, epoch, split, logged, value))
    assert others == [("3.1", 6, "training", 99.768, 99.77)]
    # The counts of the confusion matrices are the logs' accuracies.
    for number, entry in logs["original"]["confusion"]["epochs"].items():
        for split, total in (("training", 60_000), ("test", 10_000)):
            right = sum(row[i] for i, row in enumerate(entry[split]))
            assert sum(map(sum, entry[split])) == total
            assert right == round(logs["original"][split][int(number) - 1] * total / 100)


@pytest.mark.parametrize(
    ("accuracy", "printed"),
    [(99.626667, "99.62"), (99.99999, "99.99"), (100.0, "100.00"), (98.998333, "98.99"),
     (100 * 59_406 / 60_000, "99.01"), (0.0, "0.00")],
)  # fmt: skip
def test_cut(accuracy, printed):
    assert reports.cut(accuracy) == printed


def test_every_accuracy_that_ends_in_two_decimals_is_not_cut_short():
    for right in range(0, 10_001):
        assert reports.cut(100.0 * right / 10_000) == f"{right // 100}.{right % 100:02d}"


def test_claims():
    names = {*experiments.EXPERIMENTS, "normalization-21", "rotation-0.3"}
    assert len(reports.CLAIMS) > 30
    for name, claim in reports.CLAIMS.items():
        assert claim.name == name and claim.quote and claim.section
        assert {n for n in (*claim.a, *claim.b) if "*" not in n} <= names, name
        if claim.kind == "none":
            assert claim.note
        else:
            assert claim.a
        assert claim.kind in ("difference", "equivalence", "equal", "bound", "none"), name
        assert claim.metric in ("train", "test", "gap", "best test", "largest step", "first 100")
        assert claim.quantifier in ("all", "any") and claim.report in (1, 2)
        bounds = {
            "difference": (claim.above, claim.below),
            "equivalence": (claim.within,),
            "bound": (claim.at_most, claim.at_least),
        }.get(claim.kind, (0,))
        assert sum(bound is not None for bound in bounds) == 1, name
    # Report 1's three that say nothing of numbers are there, too.
    assert {"test-up-and-down", "three-layer-over-fitted"} <= set(reports.CLAIMS)


def test_every_number_is_an_accuracy():
    for columns in (*reports.TABLES.values(), reports.FIGURES, reports.LOGS):
        for pairs in columns.values():
            numbers = [value for pair in pairs.values() for value in pair if value is not None]
            assert numbers and all(0 < value <= 100 for value in numbers)
