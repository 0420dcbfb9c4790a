"""The reports' numbers, against the tests' own copies and the printed lines, and their claims."""

import json
from importlib import resources

import pytest
from conftest import REFERENCE

from mnist_ops.lab import experiments, reports


def test_tables():
    tables = json.loads((REFERENCE / "reports" / "report1_tables.json").read_text())
    del tables["source"]
    assert {
        table: {
            column: {"epochs": list(rows), "training": [a for a, _ in rows.values()],
                     "test": [b for _, b in rows.values()]}
            for column, rows in columns.items()
        }
        for table, columns in reports.TABLES.items()
    } == tables  # fmt: skip
    numbers = [
        x
        for columns in reports.TABLES.values()
        for rows in columns.values()
        for pair in rows.values()
        for x in pair
    ]
    assert len(numbers) == 116 and numbers.count(None) == 1


@pytest.mark.parametrize(
    ("table", "column", "epoch", "printed"),
    [
        ("3.1", "original", 10, (99.92, 99.51)),
        ("3.2", "gaussian1d_15", 2, (99.00, 99.11)),
        ("3.2", "none", 3, (99.27, 99.31)),
        ("3.3", "relu", 3, (99.13, 99.08)),
        ("3.4", "mse", 3, (99.35, None)),
        ("3.5", "three_layer", 24, (100.00, 99.57)),
        ("3.5", "two_layer", 29, (100.00, 99.56)),
    ],
)
def test_tables_as_printed(table, column, epoch, printed):
    assert reports.TABLES[table][column][epoch] == printed


def test_table_3_1():
    assert reports.TABLES["3.1"]["original"] == reports.TABLE_3_1
    assert reports.TABLE_3_1[1] == (96.71, 99.04)


def test_figures_and_logs():
    curves = json.loads((REFERENCE / "reports" / "report2_figures.json").read_text())
    for name in ("best_theta0.2", "top_noise_dropout_conv_rot"):
        pairs = zip(curves[name]["train"], curves[name]["test"], strict=True)
        assert reports.FIGURES[name] == dict(enumerate(pairs, 1))
    for name in ("extra_convolution", "dropout"):
        values = curves[f"log_{name}_test"]
        assert reports.LOGS[name] == {i: (None, x) for i, x in enumerate(values, 1)}
    assert len(reports.FIGURES["best_theta0.2"]) == 44
    assert reports.FIGURES["best_theta0.2"][11] == (99.479, None)
    assert [len(log) for log in reports.LOGS.values()] == [20, 34]
    # What the comment on LOGS says.
    curve, log = reports.FIGURES["top_noise_dropout_conv_rot"], reports.LOGS["extra_convolution"]
    apart = [abs(curve[epoch][1] - log[epoch][1]) for epoch in log]
    assert apart[0] > 0.1 and max(apart[1:]) < 0.0121


def test_claims_name_experiments():
    for name, claim in reports.CLAIMS.items():
        assert claim.name == name and claim.text and claim.section and claim.report in (1, 2)
        members = claim.b if claim.kind == "any value" else (claim.a, *claim.b)
        assert set(members) <= set(experiments.EXPERIMENTS), name
        assert claim.margin >= 0 and (claim.margin > 0 or "equivalent" not in claim.kind)
    compared = {e for c in reports.CLAIMS.values() for e in (c.a, *c.b)}
    assert {"relu", "cg", "noise-0.3", "rotation-0.349", "lbfgs-after-30"} <= compared


def test_printed_effects():
    """By hand from Tables 3.3 and 3.5."""
    claims = reports.CLAIMS
    assert claims["tanh-over-relu-train"].printed == pytest.approx((0.19 + 0.18 + 0.21) / 3)
    assert claims["tanh-over-relu-test"].printed == pytest.approx((0.31 + 0.39 + 0.32) / 3)
    assert claims["mse-no-better-test"].printed == pytest.approx((0.00 - 0.11) / 2)
    assert claims["three-layer-converges-earlier"].printed == 21 - 29
    assert claims["test-at-most-99.56"].printed == 99.56
    assert claims["rotation-0.2-99.57"].printed == 99.573


def test_a_damaged_file_is_named():
    good = json.loads((resources.files("mnist_ops.lab") / "reports.json").read_bytes())
    column = good["tables"]["3.1"]["original"]
    whole = reports._parse(json.dumps(good).encode())
    assert whole == (reports.TABLES, reports.FIGURES, reports.LOGS)

    def table(**changes):
        return good | {"tables": {"3.1": {"original": column | changes}}}

    cases = [
        b"",
        b"\xff",
        b"[" * 100_000,
        None,
        [],
        good | {"tables": None},
        good | {"figures": []},
        good | {"logs": {"dropout": ["99"]}},
        {key: value for key, value in good.items() if key != "logs"},
        table(epochs=column["epochs"][:-1]),
        table(test=column["test"] * 2),
        table(training=["96.71", *column["training"][1:]]),
        table(training=[float("nan"), *column["training"][1:]]),
        table(training=[1e300, *column["training"][1:]]),
    ]
    for case in cases:
        content = case if isinstance(case, bytes) else json.dumps(case).encode()
        with pytest.raises(ImportError, match=r"reports\.json is damaged .*: reinstall mnist_ops"):
            reports._parse(content)
