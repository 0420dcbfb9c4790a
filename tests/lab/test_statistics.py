"""Verdicts against SciPy's own tests, and results whose verdict is known beforehand."""

import math

import numpy as np
import pytest
from scipy import stats

from mnist_ops.lab import experiments, reports, statistics
from mnist_ops.lab.reports import Claim


def record(name, seed, accuracies, **more):
    """A run: training and test accuracy of each epoch."""
    epochs = [
        {"epoch": e, "train_accuracy": a, "test_accuracy": b, "confusion": [[5000, 0], [0, 5000]]}
        for e, (a, b) in enumerate(accuracies, 1)
    ]
    known = {"experiment": name, "seed": seed, "dtype": "float64", "device": "cpu", "limit": None}
    return known | {"perturbed_weight": None, "data": "MNIST", "epochs": epochs} | more


def runs_of(name, rows):
    return [record(name, seed, row) for seed, row in enumerate(rows, 1)]


def claim(kind="difference", **options):
    given = {"a": ("original",), "b": ("relu",), "epochs": (1, 1), "metric": "test"}
    if kind == "difference" and not {"above", "below"} & set(options):
        options["above"] = 0
    return Claim("c", 1, "3.1", "words", kind, **given | options)


def one(claim, runs):
    return statistics.verdicts([claim], runs)[0]


A, B = [99.0, 99.2, 99.1, 99.3], [98.5, 98.9, 98.7, 98.8, 98.2]


# --- Tests and intervals ------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [-0.2, 0.0, 0.35, 0.9])
def test_students_t_in_pairs_without_and_against_a_value(bound):
    cases = [
        (statistics.estimate(A, B[:4], True), lambda side: stats.ttest_rel(
            np.array(A) - bound, B[:4], alternative=side)),
        (statistics.estimate(A, B), lambda side: stats.ttest_ind(
            np.array(A) - bound, B, equal_var=False, alternative=side)),
        (statistics.estimate(A), lambda side: stats.ttest_1samp(A, bound, alternative=side)),
    ]  # fmt: skip
    for estimate, truth in cases:
        assert estimate.p(bound, "above") == pytest.approx(truth("greater").pvalue, rel=1e-9)
        assert estimate.p(bound, "below") == pytest.approx(truth("less").pvalue, rel=1e-9)
        low, high = truth("two-sided").confidence_interval(0.95)
        moved = 0.0 if estimate.paired is False and estimate.reach < math.inf else bound
        assert estimate.interval(0.95) == pytest.approx((low + moved, high + moved))


def test_one_more_run():
    """mean ± t s sqrt(1 + 1/n): the prediction interval by hand."""
    estimate = statistics.estimate(A)
    half = stats.t.ppf(0.975, 3) * np.std(A, ddof=1) * math.sqrt(1.25)
    assert estimate.p(99.15 + half, "below", reach=True) == pytest.approx(0.025)
    assert estimate.p(99.15 + half, "below") < 0.01


def test_values_without_spread_are_ranked():
    same = statistics.estimate([1.5, 1.5, 1.5], [1.0, 1.0, 1.0], True)
    assert same.p(0.0, "above") == stats.binomtest(3, 3, alternative="greater").pvalue == 1 / 8
    assert same.p(0.5, "above") == 1.0 and same.interval(0.95) == (0.5, 0.5)
    apart = statistics.estimate([1.5, 1.5, 1.5], [1.0, 1.0])
    exact = stats.mannwhitneyu([1.6, 1.5, 1.4], [1.0, 0.9], alternative="greater", method="exact")
    assert apart.p(0.0, "above") == pytest.approx(exact.pvalue)


@pytest.mark.parametrize("seed", range(5))
def test_holm(seed):
    """The definition: the least level at which the step-down procedure rejects."""
    p = np.random.default_rng(seed).uniform(0, 0.2, 6).tolist()
    adjusted = statistics.holm(p)
    for level in (0.01, 0.05, 0.2, 0.7):
        rejected, order = set(), sorted(range(6), key=p.__getitem__)
        for rank, i in enumerate(order):
            if p[i] > level / (6 - rank):
                break
            rejected.add(i)
        assert {i for i in range(6) if adjusted[i] <= level} == rejected
    assert statistics.holm([]) == []


def test_mean_sd():
    assert statistics.mean_sd(A) == pytest.approx((99.15, np.std(A, ddof=1), 4))
    assert math.isnan(statistics.mean_sd([99.0]).sd)


# --- Quantities ---------------------------------------------------------------------------------


def test_metrics():
    run = record("a", 1, [(96.0, 98.0), (99.5, 99.4), (100.0, 99.1), (99.999, 99.3)])
    expected = {
        ("train", 1, 2): 97.75,
        ("test", 2, 3): 99.25,
        ("gap", 3, 3): 0.9,
        ("best test", 1, 3): 99.4,
        ("largest step", 1, 4): 1.4,
        ("largest step", 2, 4): 0.3,
        ("first 100", 1, 4): 3,
        ("first 100", 1, 2): 3,  # not by epoch 2
        ("first 100", 4, 4): 5,  # 99.999 prints as 99.99
    }
    for arguments, value in expected.items():
        assert statistics.metric(run, *arguments) == pytest.approx(value), arguments


# --- Which runs are compared --------------------------------------------------------------------


def test_one_run_a_seed():
    single = record("original", 1, [(96.0, 98.0)] * 5, dtype="float32")
    double = record("original", 1, [(96.0, 99.0)] * 2)
    on_gpu = record("original", 2, [(1.0, 1.0)] * 5, device="cuda")
    runs = [single, double, on_gpu, record("original", 2, [(2.0, 2.0)])]
    assert statistics.by_seed(runs, "original") == {1: double, 2: runs[3]}
    assert statistics.by_seed(runs, "original", 3) == {1: single, 2: on_gpu}


def test_what_is_usable():
    settings = experiments.EXPERIMENTS["relu"].settings()
    good = record("relu", 1, [(96.0, 98.0)], settings=settings | {"dtype": "float32"})
    other = good | {"settings": settings | {"batch_size": 2}}
    part = [good | {"limit": 100}, good | {"limit": 100, "seed": 2}, good | {"limit": 9}]
    bad = [other, good | {"perturbed_weight": 3}, good | {"epochs": []}]
    assert statistics.usable([*bad, *part, good]) == [good]
    assert statistics.usable([*bad, *part]) == part[:2]
    assert statistics.usable(bad) == []


def test_pairs_share_weights_and_shuffles():
    """What the sources of randomness say: see SEMANTICS of each experiment."""
    stream = statistics.stream
    assert stream("original") == stream("relu") == stream("multi-margin") == stream("mse")
    assert (
        stream("plain") == stream("batch-64") == stream("momentum-0.9") == stream("lbfgs-after-5")
    )
    # Layers of the digits' normalization draw numbers: other weights.
    for name in ("normalization-none", "normalization-15", "three-layer"):
        assert stream(name)[:1] != stream("original")[:1]
    # The same weights and first shuffle; then angles, noise or masks are drawn between.
    for name in ("rotation-0.2", "noise-0.1", "dropout"):
        assert stream(name)[:2] == stream("plain")[:2] and stream(name) != stream("plain")
    assert stream("rotation-0.2") == stream("rotation-0.349")
    assert stream("nobody's") is None


@pytest.mark.parametrize(("b", "paired"), [("relu", True), ("normalization-none", False)])
def test_paired_only_where_they_share(b, paired):
    noise = [0.0, 0.5, -0.4, 0.2]  # of the seed, in both
    runs = runs_of("original", [[(99.0, 99.0 + x)] for x in noise])
    runs += runs_of(
        b, [[(99.0, 98.9 + x + e)] for x, e in zip(noise, (0.01, -0.01, 0.0, 0.01), strict=False)]
    )
    verdict = one(claim(b=(b,)), runs)
    x, y = ([r["epochs"][0]["test_accuracy"] for r in runs[i : i + 4]] for i in (0, 4))
    truth = stats.ttest_rel(x, y) if paired else stats.ttest_ind(x, y, equal_var=False)
    assert verdict.p == pytest.approx(truth.pvalue, rel=1e-6)
    assert verdict.estimate.paired == paired
    assert verdict.outcome == ("supported" if paired else "open")


def test_short_runs_do_not_shorten_the_comparison():
    """Seed 4 ran one epoch: the claim on epochs 2 to 3 is decided by the others."""
    rows = [[(96.0, 90.0), (98.0, 99.3 + d), (99.0, 99.4 + d)] for d in (0.0, 0.01, 0.02)]
    runs = [*runs_of("original", rows), record("original", 4, [(96.0, 12.0)])]
    runs += runs_of("relu", [[(96.0, 99.9), (98.0, 99.0), (99.0, 99.1)]] * 3)
    verdict = one(claim(epochs=(2, 3)), runs)
    assert verdict.estimate.n == 3 and verdict.estimate.effect == pytest.approx(0.31)
    assert verdict.outcome == "supported" and "epochs 2 to 3" in verdict.sentence


def test_without_an_epoch_the_last_that_three_seeds_reach():
    history = [(90.0, 90.0), (95.0, 95.0), (99.0, 99.0)]
    runs = [record("original", s, history[:n]) for s, n in ((1, 3), (2, 2), (3, 2), (4, 1))]
    runs += [record("relu", s, [(1.0, 50.0 + s / 10)] * 3) for s in (1, 2, 3)]
    verdict = one(claim(epochs=None), runs)
    assert "of epoch 2:" in verdict.sentence
    assert verdict.estimate.effect == pytest.approx(95 - 50.2)


def test_after_a_switch_of_optimizers():
    """Before it the run is the baseline: nothing to compare."""
    same = [(96.0, 99.0)] * 5
    runs = [record(n, s, same) for n in ("plain", "lbfgs-after-5") for s in (1, 2, 3)]
    wanted = claim("equivalence", a=("lbfgs-after-5",), b=("plain",), epochs=None, within=0.1)
    assert one(wanted, runs).outcome == "not tested"
    runs = [record(n, s, [*same, (96.0, 99.0 + s / 1000)]) for n in ("plain", "lbfgs-after-5")
            for s in (1, 2, 3, 4, 5)]  # fmt: skip
    assert "of epoch 6:" in one(wanted, runs).sentence


# --- Decisions ----------------------------------------------------------------------------------


def pair(differences, b="relu"):
    """Runs of the original that are so much above those of another."""
    spread = [0.3, -0.2, 0.1, 0.0, -0.3][: len(differences)]
    runs = runs_of(
        "original", [[(99.0, 99.0 + s + d)] for s, d in zip(spread, differences, strict=False)]
    )
    return runs + runs_of(b, [[(99.0, 99.0 + s)] for s in spread])


@pytest.mark.parametrize(
    ("options", "differences", "outcome"),
    [
        ({"above": 0}, [0.30, 0.31, 0.29, 0.30], "supported"),
        ({"above": 0}, [-0.30, -0.31, -0.29, -0.30], "contradicted"),
        ({"above": 0}, [0.30, -0.31, 0.29, -0.30], "open"),
        ({"above": 0.5}, [0.30, 0.31, 0.29, 0.30], "contradicted"),
        ({"below": 0.1}, [0.01, -0.01, 0.02, 0.0], "supported"),
        ({"below": 0.1}, [0.30, 0.31, 0.29, 0.30], "contradicted"),
        ({"kind": "equivalence", "within": 0.1}, [0.01, -0.01, 0.02, 0.0], "supported"),
        ({"kind": "equivalence", "within": 0.1}, [0.30, 0.31, 0.29, 0.30], "contradicted"),
        ({"kind": "equivalence", "within": 0.1}, [0.30, -0.31, 0.29, -0.30], "open"),
        ({"above": 0}, [0.3], "not tested"),
    ],
)
def test_differences_and_equivalence(options, differences, outcome):
    assert one(claim(**options), pair(differences)).outcome == outcome


def test_p_values_of_both_kinds():
    d = [0.05, -0.02, 0.04, 0.01]
    runs = pair(d)
    assert one(claim(), runs).p == pytest.approx(stats.ttest_1samp(d, 0).pvalue)
    tost = max(stats.ttest_1samp(d, 0.1, alternative="less").pvalue,
               stats.ttest_1samp(d, -0.1, alternative="greater").pvalue)  # fmt: skip
    verdict = one(claim("equivalence", within=0.1), runs)
    assert verdict.p == pytest.approx(tost)
    interval = stats.ttest_1samp(d, 0).confidence_interval(0.9)
    assert verdict.interval == pytest.approx(tuple(interval))
    # The interval and the test agree: inside the margins, supported.
    assert (interval.low > -0.1 and interval.high < 0.1) == (verdict.outcome == "supported")


def test_a_printed_figure_is_one_run():
    """Far from the mean, yet within the reach of one more run: not contradicted."""
    rows = [[(0.0, x)] for x in (99.50, 99.60, 99.55, 99.45, 99.40)]
    near = claim("equivalence", b=(), value=99.65, within=0.01)
    far = claim("equivalence", b=(), value=99.95, within=0.01)
    assert one(near, runs_of("original", rows)).outcome == "open"
    assert one(far, runs_of("original", rows)).outcome == "contradicted"
    met = claim("equivalence", b=(), value=99.5, within=0.2)
    assert one(met, runs_of("original", rows)).outcome == "supported"


def test_of_all_and_of_any():
    names = ("batch-32", "batch-64")

    def runs(first, second):
        rows = runs_of("plain", [[(96.0 + s / 100, 0.0)] for s in range(4)])
        for name, level in zip(names, (first, second), strict=False):
            rows += runs_of(name, [[(level + s / 100 + (s == 2) / 50, 0.0)] for s in range(4)])
        return rows

    every = claim(a=names, b=("plain",), metric="train", below=-10, above=None)
    some = claim(a=names, b=("plain",), metric="train", below=-10, above=None, quantifier="any")
    cases = {
        (70, 60): ("supported", "supported"),
        (70, 90): ("contradicted", "supported"),
        (90, 91): ("contradicted", "contradicted"),
    }
    for levels, outcomes in cases.items():
        assert (one(every, runs(*levels)).outcome, one(some, runs(*levels)).outcome) == outcomes
    # What decides: the largest p of all, the smallest of any times their number.
    x = one(every, runs(70, 60)).p
    single = [
        one(claim(a=(n,), b=("plain",), metric="train", below=-10, above=None), runs(70, 60)).p
        for n in names
    ]
    assert x == pytest.approx(max(single))
    assert one(some, runs(70, 60)).p == pytest.approx(2 * min(single))
    # Without one of them, all cannot be supported, and any not contradicted.
    half = [run for run in runs(70, 60) if run["experiment"] != "batch-64"]
    assert (one(every, half).outcome, one(some, half).outcome) == ("not tested", "supported")
    half = [run for run in runs(90, 60) if run["experiment"] != "batch-64"]
    assert (one(every, half).outcome, one(some, half).outcome) == ("contradicted", "not tested")


def test_patterns_name_experiments():
    lbfgs = [n for n in experiments.EXPERIMENTS if n.startswith("lbfgs-after-")]
    runs = [record(n, s, [(0.0, 99.2 + s / 100)] * 40) for n in lbfgs for s in (1, 2, 3)]
    wanted = claim("equivalence", a=("lbfgs-after-*",), b=(), value=99.2, within=0.2)
    verdict = one(wanted, runs)
    assert verdict.outcome == "supported" and f"of {len(lbfgs)} comparisons" in verdict.sentence


def test_outcomes_count_after_holm_within_a_report():
    runs = pair([0.10, 0.04, 0.12, 0.05])
    alone = one(claim(), runs)
    assert 0.05 / 4 < alone.p < 0.05 and alone.outcome == "supported"
    four = statistics.verdicts([claim()] * 4, runs)
    assert [v.outcome for v in four] == ["open"] * 4
    assert four[0].p == alone.p and four[0].p_holm == pytest.approx(4 * alone.p)
    # Exact claims and the other report's are no part of it.
    exact = claim("bound", b=(), at_most=100.0)
    other = Claim("d", 2, "", "", "difference", ("original",), ("relu",), epochs=(1, 1), above=0)
    mixed = statistics.verdicts([claim(), exact, other], runs)
    assert [v.outcome for v in mixed] == ["supported"] * 3
    assert mixed[0].p_holm == alone.p and mixed[1].p is None


def test_first_epoch_at_100():
    def runs(name, firsts, last=10):
        return [
            record(name, s, [(100.0 if e >= first else 99.9, 99.0) for e in range(1, last + 1)])
            for s, first in enumerate(firsts, 1)
        ]

    sooner = claim(a=("three-layer",), b=("original",), metric="first 100", epochs=(1, 10),
                   below=0, above=None)  # fmt: skip
    verdict = one(sooner, runs("three-layer", [3, 4, 3, 4]) + runs("original", [9, 8, 9, 8]))
    truth = stats.ttest_ind([3, 4, 3, 4], [9, 8, 9, 8], equal_var=False)
    assert verdict.outcome == "supported" and verdict.p == pytest.approx(truth.pvalue)
    # Not reached on the other side: at least one epoch later than the last.
    verdict = one(sooner, runs("three-layer", [3, 4, 3, 4]) + runs("original", [99, 8, 99, 8]))
    assert verdict.estimate.effect == 3.5 - 9.5 and verdict.outcome == "supported"
    # Not reached on this side: nobody knows by how much.
    assert (
        one(sooner, runs("three-layer", [99, 4]) + runs("original", [9, 8])).outcome == "not tested"
    )
    # A limit can only understate: it never contradicts.
    later = runs("three-layer", [10, 9, 10, 9]) + runs("original", [2, 3, 2, 99])
    assert one(sooner, later).outcome == "open"


# --- Exact claims -------------------------------------------------------------------------------


def test_bounds_are_those_of_the_printed_run():
    """Seed 1 decides, cut as the report prints; the other seeds are counted."""
    rows = [[(99.0, 99.5699)], [(99.0, 99.58)], [(99.0, 99.1)]]
    never = claim("bound", b=(), metric="best test", at_most=99.56)
    verdict = one(never, runs_of("original", rows))
    assert verdict.outcome == "supported" and "1 of 2 other seeds" in verdict.sentence
    assert one(never, runs_of("original", rows[1:])).outcome == "contradicted"
    assert one(never, runs_of("original", rows)[1:]).outcome == "not tested"
    least = claim("bound", b=(), metric="train", at_least=100.0)
    assert one(least, runs_of("original", [[(99.999, 0.0)]])).outcome == "contradicted"
    assert one(least, runs_of("original", [[(100.0, 0.0)]])).outcome == "supported"
    late = claim("bound", b=(), metric="train", at_least=100.0, epochs=(2, 2))
    assert one(late, runs_of("original", [[(100.0, 0.0)]])).outcome == "not tested"


def test_equal_numbers():
    same = claim("equal", epochs=(1, 2))
    runs = runs_of("original", [[(99.001, 99.0), (99.5, 99.1)]] * 2)
    equal = runs_of("relu", [[(99.009, 99.0), (99.5, 99.1)]] * 2)
    verdict = one(same, runs + equal)
    assert verdict.outcome == "supported" and verdict.sentence.startswith("8 of 8")
    equal[1]["epochs"][1]["test_accuracy"] = 99.11
    verdict = one(same, runs + equal)
    assert verdict.outcome == "contradicted" and verdict.sentence.startswith("7 of 8")
    assert one(same, runs).outcome == "not tested"
    first = claim("equal", b=(), metric="first 100", epochs=(1, 3), value=2)
    history = [(99.0, 0.0), (100.0, 0.0), (99.0, 0.0)]
    assert one(first, runs_of("original", [history])).outcome == "supported"
    assert one(first, runs_of("original", [history[1:] * 2])).outcome == "contradicted"


def test_every_claim_of_the_reports():
    """With no runs nothing is tested, and each says what it needs."""
    verdicts = statistics.verdicts(reports.CLAIMS.values(), [])
    assert [v.claim for v in verdicts] == list(reports.CLAIMS.values())
    for verdict in verdicts:
        assert verdict.outcome == "not tested"
        assert "needs" in verdict.sentence or verdict.claim.kind == "none"


def test_claims_on_the_printed_run_hold_of_its_log():
    """What the report says of its own run is true of its log."""
    log = reports.AUTHORS_LOGS["original"]
    run = record("original", 1, list(zip(log["training"], log["test"], strict=False)))
    claims = [c for c in reports.CLAIMS.values() if c.a == ("original",) and not c.b]
    assert len(claims) >= 4
    assert {v.outcome for v in statistics.verdicts(claims, [run])} == {"supported"}
