"""What runs with several seeds say about the reports' claims.

A run is a record of ``results.json``; the claims are ``claims.json``
(:data:`mnist_ops.lab.reports.CLAIMS`). Everything here is a pure function of both. ::

    from mnist_ops.lab import records, reports, statistics

    runs = statistics.usable(records.read_results("results.json")["runs"])
    for verdict in statistics.verdicts(reports.CLAIMS.values(), runs):
        print(verdict.claim.quote, verdict.outcome, verdict.sentence)

**Two kinds of evidence.** What a report says of its own run ("never exceeded 99.56 %", the same
numbers) is decided exactly, by seed 1, whose weights and shuffles are those of the original; how
many other seeds agree is said beside it. What it says of a method ("better", "the same") is decided
over seeds, by Student's t: the difference of two experiments or of one from a printed figure.

- *difference*: above or below a bound, two-sided, with its 95 % interval;
- *equivalence*: two one-sided tests (TOST) against a margin in both directions, 90 % interval.

Seeds are paired only where runs of one seed share initial weights and every shuffle, which
:func:`stream` finds by building both; elsewhere Welch's test compares the two samples. A claim
about several experiments must hold of all (largest p), or of any (smallest p times their number).

**One rule: an outcome counts after Holm's correction** for all claims of the same report that were
tested so: supported or contradicted where the corrected p is below 0.05, open elsewhere. Open is no
evidence for the opposite.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from . import experiments, records
from .reports import Claim, counted, cut

__all__ = [
    "Estimate",
    "Sample",
    "Verdict",
    "by_seed",
    "estimate",
    "holm",
    "mean_sd",
    "metric",
    "stream",
    "usable",
    "verdicts",
]

SUPPORTED, CONTRADICTED, OPEN, NOT_TESTED = "supported", "contradicted", "open", "not tested"
OUTCOMES = (SUPPORTED, CONTRADICTED, OPEN, NOT_TESTED)

#: Level of every decision.
ALPHA = 0.05
#: Where a report names no epoch: the last that so many seeds reach on both sides.
SEEDS = 3

Run = Mapping[str, Any]


# --- Runs --------------------------------------------------------------------------------------


def is_current(run: Run) -> bool:
    """Whether a run has the settings that its experiment has today."""
    known = experiments.EVERY.get(run["experiment"])
    if known is None or "settings" not in run:
        return True
    now, then = records.plain(known.settings()), records.plain(run["settings"])
    return all(now.get(k) == then.get(k) for k in {*now, *then} - {"experiment", "dtype"})


def usable(runs: Iterable[Run]) -> list[Run]:
    """The runs that can be compared with each other and, if on all of MNIST, with print.

    Without runs that have no epoch, a perturbed weight or settings that have changed since. Runs
    on all of MNIST where there is one; else those on the part of it that the first run had.
    """
    kept = [r for r in runs if r["epochs"] and r["perturbed_weight"] is None and is_current(r)]
    parts = [(run["limit"], run.get("data")) for run in kept]
    whole = [run for run in kept if records.of_mnist(run)]
    return whole or [run for run, part in zip(kept, parts, strict=True) if part == parts[0]]


def by_seed(runs: Iterable[Run], name: str, reach: int = 1) -> dict[int, Run]:
    """One run a seed of an experiment, of those that reach an epoch.

    Of several the one in float64, then that on a CPU, then the longest.
    """

    def rank(run: Run) -> tuple[bool, bool, int]:
        return run["dtype"] == "float64", run["device"] == "cpu", len(run["epochs"])

    best: dict[int, Run] = {}
    for run in runs:
        if run["experiment"] == name and len(run["epochs"]) >= reach:
            known = best.get(run["seed"])
            if known is None or rank(run) > rank(known):
                best[run["seed"]] = run
    return dict(sorted(best.items()))


@functools.cache
def stream(name: str) -> tuple[str, str, str] | None:
    """What a seed fixes in an experiment: initial weights, the first shuffle, the ones after it.

    The network is built with seed 1 and takes one image, augmented if the experiment does so. Equal
    weights, an equal state of the random numbers before and an equal one after that image: two
    experiments with all three equal share weights and every shuffle, with any seed. ``None`` for an
    experiment that nobody describes.
    """
    known = experiments.EVERY.get(name)
    if known is None:
        return None
    parts = experiments.build(known)

    def state() -> str:
        now = parts.generator.get_state()
        return hashlib.md5(str((now["key"].tolist(), now["position"])).encode()).hexdigest()

    weights = b"".join(p.detach().double().numpy().tobytes() for p in parts.model.parameters())
    found = [hashlib.md5(weights).hexdigest(), state()]
    image = torch.zeros(1, 1, 32, 32, dtype=next(parts.model.parameters()).dtype)
    with torch.no_grad():
        parts.model.train()(image if parts.transform is None else parts.transform(image))
    return found[0], found[1], state()


# --- Numbers of one run ------------------------------------------------------------------------


def metric(run: Run, name: str, first: int, last: int) -> float:
    """A claim's quantity for one run, see :class:`mnist_ops.lab.reports.Claim`.

    ``"first 100"`` is ``last + 1`` where no epoch until then prints 100.00.
    """
    epochs = run["epochs"][first - 1 : last]
    train = [epoch["train_accuracy"] for epoch in epochs]
    test = [epoch["test_accuracy"] for epoch in epochs]
    if name == "first 100":
        return next((first + i for i, x in enumerate(train) if cut(x) == "100.00"), last + 1)
    if name == "largest step":
        return max(abs(b - a) for a, b in itertools.pairwise(test))
    if name == "best test":
        return max(test)
    gap = [a - b for a, b in zip(train, test, strict=True)]
    return float(np.mean({"train": train, "test": test, "gap": gap}[name]))


class Sample(NamedTuple):
    """Mean, standard deviation (n - 1; NaN for one) and count of some values."""

    mean: float
    sd: float
    n: int


def mean_sd(values: Sequence[float]) -> Sample:
    """A :class:`Sample` of one value or more.

    Example:
        >>> mean_sd([1.0, 2.0, 3.0])
        Sample(mean=2.0, sd=1.0, n=3)
    """
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return Sample(float(np.mean(values)), sd, len(values))


# --- Tests -------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A mean, or a difference of two, with Student's t around it.

    Attributes:
        effect: the estimate.
        se: its standard error; 0 where all values are equal.
        df: degrees of freedom.
        n: seeds, or pairs of seeds, of the smaller sample.
        paired: whether seeds were paired.
        reach: standard error of one more run's value; infinite for a difference.
        exact: the smallest one-sided p of a rank test of such samples, for those without spread.
    """

    effect: float
    se: float
    df: float
    n: int
    paired: bool
    reach: float
    exact: float

    def p(self, bound: float, side: str, reach: bool = False) -> float:
        """One-sided p: the true value is ``"above"`` or ``"below"`` a bound.

        With ``reach`` it is that of one more run and not of the mean.
        """
        from scipy import stats

        distance = self.effect - bound if side == "above" else bound - self.effect
        if self.se == 0:
            return self.exact if distance > 1e-9 else 1.0
        return float(stats.t.sf(distance / (self.reach if reach else self.se), self.df))

    def interval(self, level: float) -> tuple[float, float]:
        """Of the true value; the estimate alone where the values have no spread."""
        from scipy import stats

        half = float(stats.t.ppf((1 + level) / 2, self.df)) * self.se
        return self.effect - half, self.effect + half


def estimate(
    a: Sequence[float], b: Sequence[float] | None = None, paired: bool = False
) -> Estimate:
    """The mean of ``a``, or of ``a`` minus ``b``, of two values or more each.

    Student's t; in pairs if value i of both belongs to one seed, otherwise Welch's.
    """

    # Sums of binary fractions: a smaller spread is rounding, far below one image of 60,000.
    def variance(values: Any) -> float:
        return float(np.var(values, ddof=1)) if np.ptp(values) > 1e-9 else 0.0

    if b is not None and not paired:
        parts = [variance(values) / len(values) for values in (a, b)]
        below = sum(v**2 / (len(x) - 1) for v, x in zip(parts, (a, b), strict=True))
        df = sum(parts) ** 2 / below if below else 1.0
        exact = 1 / math.comb(len(a) + len(b), len(a))
        effect, se = float(np.mean(a) - np.mean(b)), math.sqrt(sum(parts))
        return Estimate(effect, se, df, min(len(a), len(b)), False, math.inf, exact)
    values = np.asarray(a) - (np.asarray(b) if b is not None else 0.0)
    n, sd = len(values), math.sqrt(variance(values))
    more = math.inf if b is not None else sd * math.sqrt(1 + 1 / n)
    return Estimate(float(values.mean()), sd / math.sqrt(n), n - 1, n, b is not None, more, 0.5**n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: ``max over j <= i of (m - j + 1) p_(j)``, at most 1.

    Source:
        S. Holm, "A simple sequentially rejective multiple test procedure", 1979.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    steps = [min(1.0, (len(order) - rank) * p_values[i]) for rank, i in enumerate(order)]
    largest = dict(zip(order, itertools.accumulate(steps, max), strict=True))
    return [largest[i] for i in range(len(p_values))]


# --- Verdicts ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What the runs say about a claim.

    Attributes:
        claim: the claim.
        outcome: one of :data:`OUTCOMES`.
        sentence: why, in one sentence; of what is not tested, what it needs.
        p: of the test; ``None`` where the decision is exact or there is none.
        p_holm: after Holm's correction.
        estimate: the numbers of the pair of experiments that decides.
        interval: of its effect.
    """

    claim: Claim
    outcome: str
    sentence: str
    p: float | None = None
    p_holm: float | None = None
    estimate: Estimate | None = None
    interval: tuple[float, float] | None = None


_WORDS = {
    "train": "training accuracy",
    "test": "test accuracy",
    "gap": "training minus test accuracy",
    "best test": "best test accuracy",
    "largest step": "largest change of the test accuracy from one epoch to the next",
    "first 100": "first epoch that prints a training accuracy of 100.00",
}


def _when(name: str, first: int, last: int) -> str:
    if name == "first 100":
        return ""
    if name == "best test":
        return f" until epoch {last}"
    return f" of epoch {first}" if first == last else f" of epochs {first} to {last}"


def _show(values: Sequence[float], name: str, signed: bool) -> str:
    """A number, or an interval, of a metric with its unit."""
    form = f"{'+' if signed else ''}{'.3g' if name == 'first 100' else '.2f'}"
    text = " to ".join(f"{value:{form}}" for value in values).replace("-", "−")
    if name == "first 100":
        return f"{text} epochs" if signed else text
    return f"{text} {'points' if signed or name == 'largest step' else '%'}"


def _small(p: float) -> str:
    return "0.0001 or less" if p < 1e-4 else f"{p:.2g}"


def _names(patterns: Sequence[str]) -> list[str]:
    known = list(experiments.EXPERIMENTS)
    found = [fnmatch.filter(known, one) if "*" in one else [one] for one in patterns]
    return list(itertools.chain.from_iterable(found))


class _Pair(NamedTuple):
    """One pair of experiments of a claim, or one experiment and a printed figure."""

    a: str
    b: str | None
    needs: str = ""
    numbers: Estimate | None = None
    inside: float = 1.0
    outside: float = 1.0
    when: str = ""


def _pair(claim: Claim, runs: Sequence[Run], a: str, b: str | None) -> _Pair:
    """Test one pair; ``needs`` where that is not possible."""
    sides = [name for name in (a, b) if name is not None]
    if claim.epochs is None:
        # Before the second optimizer a run is its baseline: nothing to compare.
        known = experiments.EVERY.get(a)
        last = (known and known.switch) or 1
        lengths = [sorted(len(r["epochs"]) for r in by_seed(runs, s).values()) for s in sides]
        if fewest := min(SEEDS, *map(len, lengths)):
            last = max(last, min(x[-fewest] for x in lengths))
        spans = [(last, last)] * 2
    else:
        spans = [claim.epochs, claim.epochs_b or claim.epochs]
    reach = max(last for _, last in spans)
    chosen = {name: by_seed(runs, name, reach) for name in sides}
    both = [] if b is None else [seed for seed in chosen[a] if seed in chosen[b]]
    paired = len(both) > 1 and (a == b or None is not stream(a) == stream(str(b)))
    if paired:
        chosen = {name: {seed: chosen[name][seed] for seed in both} for name in sides}
    values = [
        [metric(run, claim.metric, *span) for run in chosen[name].values()]
        for name, span in zip(sides, spans, strict=False)
    ]
    if any(len(x) < 2 for x in values):
        there = ", ".join(f"{name} {len(chosen[name])}" for name in dict.fromkeys(sides))
        needs = f"needs 2 seeds or more with {counted(reach, 'epoch')} (there are: {there})"
        if all(values):
            effect = values[0][0] - (values[1][0] if b is not None else 0)
            needs += f"; one seed gives {_show([effect], claim.metric, b is not None)}"
        return _Pair(a, b, needs)
    late = [claim.metric == "first 100" and max(x) > reach for x in values]
    if late[0]:
        return _Pair(a, b, f"needs more epochs: not every seed of {a} prints 100.00 by {reach}")
    numbers = estimate(values[0], values[1] if b is not None else None, paired)
    # A printed figure is one run: the mean may be elsewhere and one more run still give it.
    one_more = claim.value is not None
    if claim.within is not None:
        low, high = ((claim.value or 0.0) + sign * claim.within for sign in (-1, 1))
        p_in = max(numbers.p(low, "above"), numbers.p(high, "below"))
        p_out = 2 * min(numbers.p(low, "below", one_more), numbers.p(high, "above", one_more))
    else:
        side, other = ("above", "below") if claim.above is not None else ("below", "above")
        bound = claim.above if claim.above is not None else claim.below or 0.0
        p_in, p_out = 2 * numbers.p(bound, side), 2 * numbers.p(bound, other, one_more)
    if any(late):  # a limit where 100.00 was not reached understates the second side
        p_out = 1.0
    when = _when(claim.metric, *spans[0])
    return _Pair(a, b, "", numbers, min(1.0, p_in), min(1.0, p_out), when)


def _tested(claim: Claim, runs: Sequence[Run]) -> Verdict:
    """Differences and equivalences, before Holm: ``outcome`` is that of the plain p."""
    pairs = [_pair(claim, runs, a, b) for a in _names(claim.a) for b in (claim.b or (None,))]
    done = [pair for pair in pairs if pair.numbers is not None]
    complete = bool(pairs) and len(done) == len(pairs)

    # One that was not tested decides neither "all" nor "none of any".
    def every(p_values: list[float]) -> float:
        return max(p_values) if complete else 1.0

    def one_of(p_values: list[float]) -> float:
        return min(1.0, len(pairs) * min(p_values, default=1.0))

    inside, outside = [pair.inside for pair in done], [pair.outside for pair in done]
    if claim.quantifier == "all":
        p_in, p_out = every(inside), one_of(outside)
    else:
        p_in, p_out = one_of(inside), every(outside)
    if not complete and min(p_in, p_out) >= ALPHA:
        missing = [pair.needs for pair in pairs if pair.numbers is None]
        more = f"; {len(missing) - 1} more likewise" if len(missing) > 1 else ""
        needs = f"{missing[0]}{more}" if missing else "needs runs of its experiments"
        return Verdict(claim, NOT_TESTED, needs)
    outcome = SUPPORTED if p_in <= p_out else CONTRADICTED
    weakest = (claim.quantifier == "all") == (outcome == SUPPORTED)
    key = (lambda pair: pair.inside) if outcome == SUPPORTED else (lambda pair: pair.outside)
    decides = (max if weakest else min)(done, key=key)
    numbers = decides.numbers
    assert numbers is not None
    level = 0.9 if claim.within is not None else 0.95
    interval = numbers.interval(level)
    signed = claim.value is None
    reach = f"{100 * level:g} % interval {_show(interval, claim.metric, signed)}"
    what = f"{_WORDS[claim.metric]}{decides.when}"
    if decides.b == decides.a and claim.epochs_b:
        what += f" minus that{_when(claim.metric, *claim.epochs_b)}"
    name = decides.a if decides.b in (None, decides.a) else f"{decides.a} minus {decides.b}"
    many = f" (of {len(pairs)} comparisons the one that decides)" if len(pairs) > 1 else ""
    paired = ", paired" if numbers.paired else ""
    sentence = (
        f"{name}{many}, {what}: {_show([numbers.effect], claim.metric, signed)} "
        f"({reach if numbers.se else 'the same in every seed'}; {numbers.n} seeds{paired}"
    )
    return Verdict(claim, outcome, sentence, min(p_in, p_out), None, numbers, interval)


def _exact(claim: Claim, runs: Sequence[Run]) -> Verdict:
    """What the report says of its own run: seed 1 decides, the other seeds are told."""
    first, last = claim.epochs or (1, 1)
    a = by_seed(runs, claim.a[0], last)
    if claim.b:
        b = by_seed(runs, claim.b[0], last)
        keys = ("train_accuracy", "test_accuracy")
        equal = [
            cut(a[seed]["epochs"][epoch - 1][key]) == cut(b[seed]["epochs"][epoch - 1][key])
            for seed in a
            if seed in b
            for epoch in range(first, last + 1)
            for key in keys
        ]
        if not equal:
            return Verdict(claim, NOT_TESTED, f"needs a seed of both with {counted(last, 'epoch')}")
        sentence = f"{sum(equal)} of {len(equal)} printed numbers are equal"
        return Verdict(claim, SUPPORTED if all(equal) else CONTRADICTED, sentence)
    if 1 not in a:
        needs = f"needs seed 1 of {claim.a[0]} with {counted(last, 'epoch')}"
        return Verdict(claim, NOT_TESTED, needs)
    values = {seed: metric(run, claim.metric, first, last) for seed, run in a.items()}

    def holds(value: float) -> bool:
        # As the report prints it: cut.
        shown = float(cut(value))
        if claim.value is not None:
            return shown == claim.value
        if claim.at_most is not None:
            return shown <= claim.at_most
        return shown >= (claim.at_least or 0.0)

    others = [holds(value) for seed, value in values.items() if seed != 1]
    found = _show([values[1]], claim.metric, False)
    if claim.metric == "first 100" and values[1] > last:
        found = f"none until epoch {last}"
    sentence = f"{_WORDS[claim.metric]}{_when(claim.metric, first, last)}: {found} with seed 1"
    if others:
        sentence += f"; true of {sum(others)} of {len(others)} other seeds, too"
    return Verdict(claim, SUPPORTED if holds(values[1]) else CONTRADICTED, sentence)


def verdicts(claims: Iterable[Claim], runs: Iterable[Run]) -> list[Verdict]:
    """What the runs say about every claim, outcomes after Holm's correction within each report."""
    runs = list(runs)
    results = []
    for claim in claims:
        if claim.kind == "none":
            results.append(Verdict(claim, NOT_TESTED, claim.note.rstrip(".")))
        else:
            results.append((_exact if claim.kind in ("equal", "bound") else _tested)(claim, runs))
    for report in (1, 2):
        here = [i for i, v in enumerate(results) if v.claim.report == report and v.p is not None]
        adjusted = holm([results[i].p or 0.0 for i in here])
        for i, p in zip(here, adjusted, strict=True):
            words = f"p = {_small(results[i].p or 0.0)}, after Holm {_small(p)})"
            outcome = results[i].outcome if p < ALPHA else OPEN
            sentence = f"{results[i].sentence}; {words}"
            results[i] = replace(results[i], outcome=outcome, p_holm=p, sentence=sentence)
    return results
