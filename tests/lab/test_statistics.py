"""Verdicts on claims, against SciPy, values worked out by hand, and simulated error rates."""

import math

import numpy as np
import pytest
from scipy import stats

from mnist_ops.lab import statistics
from mnist_ops.lab.reports import CLAIMS, TABLES, Claim


def run(name, seed, train=None, test=None, **more):
    """A run with these accuracies, epoch by epoch; one may be left out."""
    train = train if train is not None else [99.0] * len(test)
    test = test if test is not None else [99.0] * len(train)
    epochs = [
        {"epoch": i, "train_accuracy": a, "test_accuracy": b}
        for i, (a, b) in enumerate(zip(train, test, strict=True), 1)
    ]
    return {"experiment": name, "seed": seed, "epochs": epochs, **more}


def pairs(a, b, **more):
    """One-epoch runs of "a" and "b", one seed each pair of test accuracies."""
    return [run("a", i, test=[x], **more) for i, x in enumerate(a, 1)] + [
        run("b", i, test=[x], **more) for i, x in enumerate(b, 1)
    ]


def claim(kind, **options):
    defaults = {"a": "a", "b": ("b",), "metric": "test", "epochs": (1,)}
    return Claim("c", "a and b", 1, "section", kind, **defaults | options)


A = [99.10, 99.04, 99.17, 99.08, 99.12]
B = [98.90, 98.95, 98.99, 98.91, 98.87]


def test_mean_std():
    assert statistics.mean_std([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0])[:3] == pytest.approx(
        (5.0, math.sqrt(32 / 7), 8)
    )
    assert statistics.mean_std([96.71, None, math.nan, math.inf])[2] == 1
    assert math.isnan(statistics.mean_std([96.71]).std)
    assert statistics.mean_std([0.1, 0.1, 0.1]) == (0.1, 0.0, 3, 0.1, 0.1)
    assert statistics.mean_std([]).n == 0


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([None, 0.5, None, 0.6]) == [None, 1.0, None, 1.0]
    assert statistics.holm([]) == []


def test_summary():
    runs = [run("a", s, train=[x, 99.0], test=[x + 1, 99.5]) for s, x in ((1, 96.0), (2, 97.0))]
    runs.append(run("b", 1, test=[10.0]))
    result = statistics.summary(runs, "a")
    assert list(result) == [1, 2]
    assert result[1].train == pytest.approx((96.5, math.sqrt(0.5), 2, 96.0, 97.0))
    assert result[1].test.mean == 97.5 and result[2].test.std == 0.0


def test_one_run_per_seed():
    runs = [
        run("a", 2, test=[1.0], perturbed_weight=3),
        run("a", 2, test=[2.0], dtype="float32"),
        run("a", 2, test=[3.0], dtype="float64", limit=100),
        run("a", 1, test=[4.0]),
    ]
    chosen = statistics.one_run_per_seed(runs, "a")
    assert {s: r["epochs"][0]["test_accuracy"] for s, r in chosen.items()} == {1: 4.0, 2: 2.0}
    assert list(chosen) == [1, 2]


# --- The tests -----------------------------------------------------------------------------------


def test_higher_is_scipys_paired_t_test():
    result = statistics.verdict(claim("higher"), pairs(A, B))
    expected = stats.ttest_rel(A, B)
    assert result.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert result.interval == pytest.approx(expected.confidence_interval(0.95), rel=1e-9)
    assert result.effect == pytest.approx(np.mean(A) - np.mean(B))
    assert (result.outcome, result.n) == ("supported", 5)
    assert statistics.verdict(claim("higher"), pairs(B, A)).outcome == "contradicted"
    assert statistics.verdict(claim("higher"), pairs(A, A[::-1])).outcome == "not supported"


def test_higher_by_hand():
    # Differences 1, 2, 3: t = 2 / (1 / sqrt 3) = 3.4641; two-sided p with 2 degrees of freedom is
    # 1 - t / sqrt(t^2 + 2); the interval's half width is 4.302653 / sqrt 3.
    result = statistics.verdict(claim("higher"), pairs([51.0, 52.0, 53.0], [50.0] * 3))
    t = 2 * math.sqrt(3)
    assert result.p_value == pytest.approx(1 - t / math.sqrt(t**2 + 2))
    assert result.interval == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-4)
    assert result.outcome == "not supported"


def test_higher_against_a_margin():
    wide = claim("higher", margin=10.0)
    a, b = [99.0, 99.1, 99.2, 99.05], [80.0, 81.0, 79.5, 80.5]
    result = statistics.verdict(wide, pairs(a, b))
    expected = stats.ttest_1samp(np.subtract(a, b), 10.0).pvalue
    assert result.outcome == "supported" and result.p_value == pytest.approx(expected)
    assert statistics.verdict(wide, pairs(A, B)).outcome == "contradicted"


def test_equivalence_is_two_one_sided_tests():
    near = [x + d for x, d in zip(A, (0.01, -0.02, 0.03, 0.0, -0.01), strict=True)]
    same = claim("equivalent", margin=0.1)
    result = statistics.verdict(same, pairs(A, near))
    d = np.subtract(A, near)
    expected = max(
        stats.ttest_1samp(d, 0.1, alternative="less").pvalue,
        stats.ttest_1samp(d, -0.1, alternative="greater").pvalue,
    )
    assert result.outcome == "supported" and result.p_value == pytest.approx(expected)
    # TOST at 5 % and the 90 % interval inside the margin are the same.
    assert result.level == 0.9
    assert result.interval == pytest.approx(stats.ttest_1samp(d, 0).confidence_interval(0.9))
    far = statistics.verdict(same, pairs(A, B))
    beyond = stats.ttest_1samp(np.subtract(A, B), 0.1, alternative="greater").pvalue
    assert far.outcome == "contradicted" and far.p_value == pytest.approx(2 * beyond)
    # No difference seen is not the same as equal.
    loose = [99.0, 99.3, 98.9, 99.25, 99.06]
    assert statistics.verdict(same, pairs(A, loose)).outcome == "not supported"


@pytest.mark.parametrize(("a", "b"), [(A, B), (B, A)])
def test_no_higher(a, b):
    result = statistics.verdict(claim("no higher", margin=0.1), pairs(a, b))
    d = np.subtract(a, b)
    if a is B:
        expected = stats.ttest_1samp(d, 0.1, alternative="less").pvalue
        assert result.outcome == "supported"
    else:
        expected = stats.ttest_1samp(d, 0.1, alternative="greater").pvalue
        assert result.outcome == "contradicted"
    assert result.p_value == pytest.approx(expected)


def test_small_improvement_within_the_margin_is_said():
    a = [x + 0.02 + 0.001 * i for i, x in enumerate(B)]
    result = statistics.verdict(claim("no higher", margin=0.1), pairs(a, B))
    assert result.outcome == "supported" and "difference itself is not zero" in result.note


def test_value():
    near = claim("value", b=(), value=78.0, margin=5.0)
    runs = pairs([75.9, 76.4, 75.2], [])
    result = statistics.verdict(near, runs)
    assert result.outcome == "supported" and result.effect == pytest.approx(75.8333, abs=1e-4)
    ci = stats.ttest_1samp([75.9, 76.4, 75.2], 0).confidence_interval(0.9)
    assert result.interval == pytest.approx(ci) and result.unit == "%"
    far = statistics.verdict(claim("value", b=(), value=45.0, margin=5.0), runs)
    assert far.outcome == "contradicted"
    # The mean is beyond the margin, a single run need not be: the report's is one.
    values = [50.5, 54.0, 51.0, 53.5, 52.0, 55.0, 50.2, 53.0]
    d = statistics.verdict(claim("value", b=(), value=49.0, margin=1.0), pairs(values, []))
    assert d.outcome == "not supported" and "one more run" in d.note


def test_welch_where_no_seed_is_common():
    runs = pairs(A, [])
    runs += [run("b", 10 + i, test=[x]) for i, x in enumerate(B[:4])]
    result = statistics.verdict(claim("higher"), runs)
    expected = stats.ttest_ind(A, B[:4], equal_var=False)
    assert result.p_value == pytest.approx(expected.pvalue)
    assert result.interval == pytest.approx(expected.confidence_interval(0.95))
    assert result.test.startswith("Welch") and "no seed in common" in result.note.lower()


@pytest.mark.parametrize("seeds", [2, 3, 5, 6, 8])
def test_equal_differences_are_no_certainty(seeds):
    """Zero spread: Student's t would give p = 0. Signs give 2^(1-n), or 2^-n one-sided."""
    runs = pairs([99.0] * seeds, [98.75] * seeds)
    result = statistics.verdict(claim("higher"), runs)
    assert result.p_value == pytest.approx(2.0 ** (1 - seeds))
    assert result.outcome == ("supported" if seeds >= 6 else "not supported")
    assert result.interval is None and "sign" in result.test
    same = statistics.verdict(claim("equivalent", margin=0.5), runs)
    assert same.p_value == pytest.approx(2.0**-seeds)
    assert same.outcome == ("supported" if seeds >= 5 else "not supported")
    zero = statistics.verdict(claim("higher"), pairs([99.0] * seeds, [99.0] * seeds))
    assert (zero.p_value, zero.outcome) == (1.0, "not supported")
    # Without pairs: 2 of the C(2n, n) orders of the values are as extreme.
    apart = [r | {"seed": r["seed"] + 100 * (r["experiment"] == "b")} for r in runs]
    exact = statistics.verdict(claim("higher"), apart)
    assert exact.p_value == pytest.approx(2 / math.comb(2 * seeds, seeds))


def test_rounding_of_equal_differences():
    """0.1 + 0.2 - 0.3 is not 0, and no evidence of anything."""
    a, b = [99.3, 98.3, 0.3], [99.2, 98.2, 0.2]
    assert 0 < np.ptp(np.subtract(a, b)) < 1e-12
    assert statistics.verdict(claim("higher"), pairs(a, b)).p_value == pytest.approx(0.25)


@pytest.mark.parametrize("name", list(CLAIMS))
def test_one_seed_has_no_p_value(name):
    c = CLAIMS[name]
    names = c.b if c.kind == "any value" else (c.a, *c.b)
    runs = [
        run(
            n, 1, train=list(np.linspace(96 - i, 100, 45)), test=list(np.linspace(98 - i, 99.4, 45))
        )
        for i, n in enumerate(dict.fromkeys(names))
    ]
    result = statistics.verdict(c, runs)
    assert result.p_value is None
    exact = c.kind in ("digits", "identical", "at most", "fails")
    assert (result.outcome == "not tested") != exact, result
    assert result.note


def test_error_rates():
    """Without a difference "higher" decides in 5 % of cases, on its edge "equivalent" does too."""
    rng = np.random.default_rng(0)
    counts = {"higher": 0, "equivalent": 0}
    for _ in range(200):
        a, b = 99 + rng.normal(scale=0.02, size=(2, 5))
        decided = statistics.verdict(claim("higher"), pairs(a.tolist(), b.tolist())).outcome
        counts["higher"] += decided != "not supported"
        shifted = (b - 0.1).tolist()
        same = statistics.verdict(claim("equivalent", margin=0.1), pairs(a.tolist(), shifted))
        counts["equivalent"] += same.outcome == "supported"
    # 99.9 % of binomials of 200 and 0.05 lie within.
    assert all(2 <= count <= 22 for count in counts.values()), counts


# --- Claims that need no test --------------------------------------------------------------------


def test_digits():
    table = TABLES["3.1"]["original"]
    train, test = ([pair[i] for pair in table.values()] for i in (0, 1))
    # 99.349 prints as 99.34: cut off.
    train[2] = 99.349
    c = CLAIMS["digits-3.1-original"]
    result = statistics.verdict(
        c, [run("original", 1, train, test), run("original", 2, test, test)]
    )
    assert (result.outcome, result.effect, result.total) == ("supported", 20, 20)
    short = statistics.verdict(c, [run("original", 1, train[:2], test[:2])])
    assert (short.outcome, short.total) == ("supported", 4) and "16 more not run" in short.note
    train[2] = 99.351
    wrong = statistics.verdict(c, [run("original", 1, train, test)])
    assert (wrong.outcome, wrong.effect) == ("contradicted", 19)
    assert statistics.verdict(c, [run("original", 2, test, test)]).outcome == "not tested"
    assert statistics.verdict(c, [run("original", 1, train, test)], 2000).outcome == "not tested"


def test_digits_of_other_data():
    """All digits of something else than MNIST, with the accuracies that were printed for MNIST."""
    train, test = ([pair[i] for pair in TABLES["3.1"]["original"].values()] for i in (0, 1))
    c = CLAIMS["digits-3.1-original"]
    mnist = run("original", 1, train, test, data="MNIST")
    other = run("original", 1, train, test, data="md5:0123", dtype="float64")
    assert statistics.verdict(c, [mnist]).outcome == "supported"
    verdict = statistics.verdict(c, [other])
    assert verdict.outcome == "not tested" and "on other data than MNIST" in verdict.note
    assert statistics.verdict(c, [other, mnist]).outcome == "supported"


def test_digits_of_a_table_that_numbers_epochs_too_high():
    late = list(TABLES["3.5"]["two_layer"].values())
    train, test = ([99.0] * 18 + [pair[i] for pair in late] for i in (0, 1))
    result = statistics.verdict(CLAIMS["digits-3.5-two-layer"], [run("original", 1, train, test)])
    assert (result.outcome, result.effect) == ("supported", 24)
    assert "numbers its epochs 1 too high" in result.note


def test_identical():
    c = claim("identical", epochs=(1, 2))
    runs = [run("a", 1, [96.711, 99.0], [99.0, 99.4]), run("b", 1, [96.719, 99.0], [99.0, 99.4])]
    assert statistics.verdict(c, runs).outcome == "supported"
    runs[1]["epochs"][1]["test_accuracy"] = 99.41
    result = statistics.verdict(c, runs)
    assert (result.outcome, result.effect, result.total) == ("contradicted", 3, 4)


def test_at_most():
    c = CLAIMS["test-at-most-99.56"]
    flat = [99.5] * 30 + [99.56]
    assert statistics.verdict(c, [run("original", 1, test=flat)]).outcome == "supported"
    assert statistics.verdict(c, [run("original", 1, test=flat[:30])]).outcome == "not tested"
    prints = [run("original", 1, test=[*flat, 99.564])]
    assert statistics.verdict(c, prints).outcome == "supported"
    above = [run("original", 1, test=flat), run("original", 2, test=[99.0, 99.57])]
    result = statistics.verdict(c, above)
    assert result.outcome == "contradicted" and "seed 2 prints 99.57 % in epoch 2" in result.note


def first_at(name, seed, epoch, length=31):
    return run(name, seed, train=[99.9] * (epoch - 1) + [100.0] * (length - epoch + 1))


def test_earlier():
    c = CLAIMS["three-layer-converges-earlier"]
    runs = [first_at("three-layer", s, 20 + s) for s in range(1, 7)]
    runs += [first_at("original", s, 29) for s in range(1, 7)]
    result = statistics.verdict(c, runs)
    # Five or six of six: 21 to 26 are all before 29.
    assert result.outcome == "supported" and result.p_value == pytest.approx(2 / 64)
    assert result.effect == pytest.approx(np.mean(range(21, 27)) - 29)
    # A censored partner counts, where it ran for long enough.
    runs[6:] = [run("original", s, train=[99.9] * 31) for s in range(1, 7)]
    censored = statistics.verdict(c, runs)
    assert censored.outcome == "supported" and censored.effect is None
    runs[6:] = [run("original", s, train=[99.9] * 20) for s in range(1, 7)]
    assert statistics.verdict(c, runs).outcome == "not tested"
    few = statistics.verdict(c, [first_at("three-layer", s, 21) for s in (1, 2, 3)]
                             + [first_at("original", s, 29) for s in (1, 2, 3)])  # fmt: skip
    assert few.outcome == "not supported" and "that takes 6" in few.note


def test_first_epoch_value():
    c = CLAIMS["training-reaches-100"]
    runs = [first_at("original", s, e) for s, e in ((1, 29), (2, 30), (3, 30), (4, 31), (5, 30))]
    result = statistics.verdict(c, runs)
    assert result.outcome == "supported" and result.effect == pytest.approx(30.0)
    assert statistics.verdict(c, [*runs, run("original", 6, train=[99.9] * 31)]).p_value is None
    assert statistics.first_perfect_epoch(run("a", 1, train=[99.9, 99.999])) is None


def test_best():
    rows = {"a": [0.3, 0.32, 0.31, 0.29], "b": [0.1, 0.13, 0.1, 0.08], "d": [0.0, 0.02, 0.04, 0.01]}
    runs = [run(n, s, test=[99 + x]) for n, xs in rows.items() for s, x in enumerate(xs)]
    c = claim("best", b=("b", "d"), metric="best test")
    result = statistics.verdict(c, runs)
    p = [stats.ttest_rel(rows["a"], rows[n]).pvalue for n in "bd"]
    assert result.outcome == "supported" and result.p_value == pytest.approx(max(p), rel=1e-6)
    assert result.effect == pytest.approx(np.mean(np.subtract(rows["a"], rows["b"])))
    worst = statistics.verdict(claim("best", a="d", b=("a", "b")), runs)
    assert worst.outcome == "contradicted"
    part = statistics.verdict(claim("best", b=("b", "e")), runs)
    assert part.outcome == "not supported" and "e not run" in part.note


def test_best_of_as_many_epochs():
    """The longer run has had more chances: only those that both had count."""
    c = claim("higher", metric="best test", epochs=())
    runs = [run("a", s, test=[99.2 + s / 100, 99.1]) for s in (1, 2)]
    runs += [run("b", s, test=[99.0, 99.1, 99.9]) for s in (1, 2)]
    assert statistics.verdict(c, runs).effect == pytest.approx(0.115)


def test_any_value():
    c = claim("any value", a="group", b=("a", "b"), value=30.0, margin=5.0)
    assert (
        statistics.verdict(c, pairs([30.1, 29.7, 30.4], [99.0, 99.1, 99.2])).outcome == "supported"
    )
    none = statistics.verdict(c, pairs([10.1, 10.0, 10.2], [99.0, 99.1, 99.2]))
    assert none.outcome == "contradicted"


def test_gap_needs_a_gap():
    c = CLAIMS["noise-0.1-smaller-gap"]
    plain = [run("plain", s, [96.0 + s / 10], [98.0]) for s in (1, 2, 3)]
    noise = [run("noise-0.1", s, [95.0], [98.0]) for s in (1, 2, 3)]
    result = statistics.verdict(c, plain + noise)
    assert result.outcome == "not tested" and "no gap yet" in result.note
    plain = [run("plain", s, [99.9 + s / 100], [99.4]) for s in (1, 2, 3)]
    noise = [run("noise-0.1", s, [99.5], [99.4]) for s in (1, 2, 3)]
    assert statistics.verdict(c, plain + noise).outcome == "supported"


def test_fails():
    c = CLAIMS["cg-fails"]
    assert statistics.verdict(c, [run("cg", 1, test=[95.0])]).outcome == "contradicted"
    broken = {"experiment": "cg", "seed": 1, "epochs": [], "error": "it broke"}
    assert statistics.verdict(c, [broken]).outcome == "supported"
    assert statistics.verdict(c, [broken | {"error": None}]).outcome == "not tested"
    assert statistics.verdict(c, [run("cg", 1, test=[math.nan])]).outcome == "not tested"


# --- What runs may look like ---------------------------------------------------------------------


def test_epochs():
    c = claim("higher", epochs=(1, 2, 3))
    a = [run("a", s, test=[99.0 + s / 100, 99.2, 99.3][:n]) for s, n in ((1, 3), (2, 2))]
    b = [run("b", s, test=[98.0, 98.1, 0.0]) for s in (1, 2)]
    result = statistics.verdict(c, a + b)
    assert "epoch 1 to 2 of 1 to 3" in result.note
    assert result.effect == pytest.approx((1.01 + 1.02) / 4 + 1.1 / 2)
    other = statistics.verdict(claim("higher", epochs=(20, 21)), a + b)
    assert "epoch 2 instead of 20 to 21" in other.note and other.effect == pytest.approx(1.1)
    late = statistics.verdict(claim("higher", epochs=(), since=5), a + b)
    assert late.outcome == "not tested" and "needs epoch 5" in late.note.lower()


def test_short_runs_do_not_hide_long_ones():
    c = claim("higher", epochs=(), since=3)
    runs = [run(n, s, test=[99.0, 99.0, x + s / 100]) for n, x in (("a", 99.5), ("b", 99.0))
            for s in (1, 2)]  # fmt: skip
    runs += [run("a", 3, test=[99.0]), run("b", 3, test=[99.0])]
    result = statistics.verdict(c, runs)
    assert result.n == 2 and result.effect == pytest.approx(0.5)
    assert "2 runs that end before epoch 3 left out" in result.note


def test_notes():
    result = statistics.verdict(claim("higher"), pairs(A, B, limit=2000))
    assert "on 2,000 digits only" in result.note
    confusion = [[30, 0], [0, 20]]
    runs = pairs(A, B)
    runs[0]["epochs"][0]["confusion"] = confusion
    assert "tested on 50 digits only" in statistics.verdict(claim("higher"), runs).note.lower()
    ceiling = statistics.verdict(claim("higher"), pairs([100.0, 99.99, 100.0], [99.98] * 3))
    assert "2 of 6 values at the ceiling" in ceiling.note
    floor = statistics.verdict(claim("higher"), pairs([99.0, 99.1], [9.8, 11.35]))
    assert "2 of 4 values at chance level" in floor.note
    missing = statistics.verdict(claim("higher"), pairs([*A, math.nan], [*B, 98.0]))
    assert missing.n == 5 and "1 value missing or not finite" in missing.note
    mixed = pairs(A, B, dtype="float64")
    mixed[0]["dtype"] = "float32"
    assert "float32 and float64 mixed" in statistics.verdict(claim("higher"), mixed).note


@pytest.mark.parametrize("value", [math.nan, None, math.inf])
@pytest.mark.parametrize("name", list(CLAIMS))
def test_degenerate_runs_never_crash(name, value):
    c = CLAIMS[name]
    names = c.b if c.kind == "any value" else (c.a, *c.b)
    bad = [run(n, s, [value] * 31, [value] * 31) for n in names for s in (1, 2)]
    result = statistics.verdict(c, bad)
    assert result.p_value is None and result.outcome in ("not tested", "not supported"), result
    empty = [{"experiment": n, "seed": s, "epochs": []} for n in names for s in (1, 2)]
    assert statistics.verdict(c, empty).outcome == "not tested"
    assert statistics.verdict(c, empty + bad[:1]).p_value is None
    missing = statistics.verdict(c, bad[2:] if len(set(names)) > 1 else [])
    assert missing.outcome == "not tested" and missing.note
    constant = [run(n, s, [100.0] * 31, [99.5] * 31) for n in names for s in (1, 2)]
    assert statistics.verdict(c, constant).outcome in statistics.OUTCOMES


def test_verdicts_adjust_together():
    first, second = claim("higher"), claim("equivalent", margin=0.1)
    results = statistics.verdicts([first, second, CLAIMS["cg-fails"]], pairs(A, B))
    expected = statistics.holm([r.p_value for r in results])
    assert [r.p_adjusted for r in results] == expected and expected[2] is None
    many = statistics.verdicts([first] * 100, pairs(A, B))
    assert many[0].outcome == "supported" and "after Holm's correction" in many[0].note


@pytest.mark.parametrize("key", ["kind", "metric"])
def test_unknown(key):
    c = claim("higher") if key == "metric" else claim("better")
    c = c if key == "kind" else claim("higher", metric="speed")
    with pytest.raises(ValueError, match=f"verdict: {key} must be one of .*, got '(better|speed)'"):
        statistics.verdict(c, [])


def test_reported():
    def said(name):
        return statistics.verdict(CLAIMS[name], []).reported

    assert said("tanh-over-relu-test").endswith("(+0.34 points)")
    assert said("three-layer-converges-earlier").endswith("(−8 epochs)")
    assert said("batch-32-value").endswith("(78 %)")
    assert said("cg-fails") == "CG gives a number of exceptions"
