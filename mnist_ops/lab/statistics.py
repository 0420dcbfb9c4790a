"""What runs with several seeds say about the reports' claims.

A run is a mapping with ``experiment``, ``seed`` and ``epochs``, a list of mappings with ``epoch``,
``train_accuracy`` and ``test_accuracy`` in %, as in ``results.json``. Everything here is a pure
function of runs. ::

    >>> from mnist_ops.lab import reports, statistics
    >>> runs = [
    ...     {"experiment": name, "seed": seed, "epochs": [
    ...         {"epoch": 1, "train_accuracy": train - seed / 100, "test_accuracy": 98.0}]}
    ...     for name, train in (("original", 96.71), ("relu", 96.52)) for seed in (1, 2, 3)
    ... ]
    >>> statistics.summary(runs, "original")[1].train.mean
    96.69
    >>> statistics.verdict(reports.CLAIMS["tanh-over-relu-test"], runs).outcome
    'not supported'

**Which test for which claim.** The unit is the seed. Two experiments with the same seeds share
initial values and order of the digits as far as their networks allow, so their runs are paired and
the differences tested: Student's t on differences, with an interval; Welch's t where no seed is
common. A claim of "better" is two-sided; "the same" needs two one-sided tests (TOST) against a
margin in percentage points that the claim states; "no improvement" is one of the two. An interval
has the level that matches its test: 95 % for two-sided ones, 90 % for the others.

**Small samples.** The spread of one seed is unknown, and accuracies alone do not say which digits
two networks disagree on (McNemar's test), so a single seed gives an effect and never a p-value.
Where all differences are equal - accuracies are counts, and a few of them can be - Student's t
would divide by zero and call it certainty: an exact sign test stands in (Mann and Whitney's without
pairs), whose two-sided p-value is at least 2^(1-n). First epochs at 100 % are censored where a run
ends before, and skewed: sign test as well.

**Exact claims** ("the same digits", "never above", "exceptions") need no test: one run that
contradicts them does so for good.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .records import MNIST
from .reports import EPOCH_SHIFT, TABLES, Claim, cut

__all__ = [
    "EpochSummary",
    "Sample",
    "Verdict",
    "best_epochs",
    "digits_tested",
    "first_perfect_epoch",
    "holm",
    "mean_std",
    "one_run_per_seed",
    "printed_equal",
    "summary",
    "verdict",
    "verdicts",
]

SUPPORTED, NOT_SUPPORTED = "supported", "not supported"
CONTRADICTED, NOT_TESTED = "contradicted", "not tested"
OUTCOMES = (SUPPORTED, NOT_SUPPORTED, CONTRADICTED, NOT_TESTED)

#: Level of every decision.
ALPHA = 0.05
# Half a digit of the test set, in %: below it two accuracies are the same, whatever the rounding.
_HALF = 0.005
_TEST_DIGITS = 10_000
# A network that always answers "1" is right for 11.35 % of the test digits.
_CHANCE = 12.0
_KINDS = (
    *("higher", "equivalent", "no higher", "earlier", "best", "value", "any value"),
    *("at most", "identical", "digits", "fails"),
)
_METRICS = ("train", "test", "gap", "best test", "first epoch")

Run = Mapping[str, Any]


class Sample(NamedTuple):
    """Mean, standard deviation (n - 1; NaN for n < 2) and count of what is finite, with range."""

    mean: float
    std: float
    n: int
    low: float
    high: float


class EpochSummary(NamedTuple):
    """Training and test accuracy in % of one epoch, over seeds."""

    epoch: int
    train: Sample
    test: Sample


@dataclass(frozen=True)
class Verdict:
    """What the runs say about a claim.

    Attributes:
        claim: the claim.
        outcome: ``"supported"``, ``"not supported"`` (the runs leave it open), ``"contradicted"``
            (they show the opposite) or ``"not tested"``.
        test: the test's name; empty where none was made.
        p_value: of that test; ``None`` where none was made.
        p_adjusted: the same after Holm's correction for all claims, from :func:`verdicts`.
        n: seeds (pairs of seeds) that entered.
        effect: the mean difference ``a - b``, or ``a``'s own value, in ``unit``.
        interval: its confidence interval at ``level``, or ``None``.
        level: 0.95, or 0.9 where the test is one-sided.
        total: how many numbers were compared, where ``effect`` counts equal ones.
        unit: ``"percentage points"``, ``"%"``, ``"epochs"``, ``"epoch"`` or ``"numbers"``.
        note: what has to be known to read the rest.
    """

    claim: Claim
    outcome: str
    test: str = ""
    p_value: float | None = None
    p_adjusted: float | None = None
    n: int = 0
    effect: float | None = None
    interval: tuple[float, float] | None = None
    level: float = 0.95
    unit: str = "percentage points"
    note: str = ""
    total: int | None = None

    @property
    def reported(self) -> str:
        """The report's statement, with its own number where it gives one."""
        claim = self.claim
        if claim.printed is None:
            return claim.text
        if claim.kind in ("value", "any value", "at most"):
            epoch = claim.metric == "first epoch"
            printed = f"epoch {claim.printed:g}" if epoch else f"{claim.printed:g} %"
        else:
            unit = "epochs" if claim.metric == "first epoch" else "points"
            digits = 0 if claim.metric == "first epoch" else 2
            printed = f"{_signed(claim.printed, digits)} {unit}"
        return f"{claim.text} ({printed})"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _number(value: Any) -> float | None:
    """A finite float, or None for what is missing, NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def mean_std(values: Iterable[float | None]) -> Sample:
    """Mean and standard deviation (n - 1) of the finite values.

    Returns:
        A :class:`Sample`; NaN for what too few values leave undefined.

    Example:
        >>> mean_std([1.0, 2.0, 3.0, None])
        Sample(mean=2.0, std=1.0, n=3, low=1.0, high=3.0)
    """
    known = [x for x in map(_number, values) if x is not None]
    n = len(known)
    if n == 0:
        return Sample(math.nan, math.nan, 0, math.nan, math.nan)
    # Equal values have no spread, whatever the rounding of their mean leaves.
    if min(known) == max(known):
        return Sample(known[0], 0.0 if n > 1 else math.nan, n, known[0], known[0])
    mean = math.fsum(known) / n
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in known) / (n - 1))
    return Sample(mean, std, n, min(known), max(known))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment: ``max over j <= i of (m - j + 1) p_(j)``, at most 1.

    Args:
        p_values: ``None`` stays ``None`` and does not count.

    Returns:
        The adjusted values in the given order.

    Source:
        S. Holm, "A simple sequentially rejective multiple test procedure", 1979.

    Example:
        >>> holm([0.01, None, 0.04, 0.03])
        [0.03, None, 0.06, 0.06]
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = largest
    return adjusted


def printed_equal(measured: float, printed: float) -> bool:
    """Whether ``measured`` prints as ``printed``: two decimals, cut off as in report 1."""
    return cut(measured) == cut(printed)


def _epochs(run: Run) -> dict[int, Mapping[str, Any]]:
    return {int(entry["epoch"]): entry for entry in run.get("epochs") or ()}


def one_run_per_seed(runs: Iterable[Run], experiment: str) -> dict[int, Run]:
    """The experiment's runs by seed, ascending.

    Runs with one seed are not independent of each other. Of several one is taken: without a
    perturbed weight, on all digits of MNIST, in float64, on the CPU, the longest, the first, in
    this order.
    """
    chosen: dict[int, tuple[tuple[Any, ...], Run]] = {}
    for run in runs:
        if run.get("experiment") != experiment:
            continue
        rank = (
            run.get("perturbed_weight") is None,
            run.get("limit") is None and not _foreign(run),
            run.get("dtype", "float64") == "float64",
            str(run.get("device", "cpu")) == "cpu",
            len(run.get("epochs") or ()),
        )
        seed = int(run.get("seed", 1))
        if seed not in chosen or rank > chosen[seed][0]:
            chosen[seed] = (rank, run)
    return {seed: chosen[seed][1] for seed in sorted(chosen)}


def summary(runs: Iterable[Run], experiment: str) -> dict[int, EpochSummary]:
    """For each epoch mean, standard deviation and range of both accuracies over the seeds.

    Example:
        >>> summary([], "original")
        {}
    """
    histories = [_epochs(run) for run in one_run_per_seed(runs, experiment).values()]
    return {
        epoch: EpochSummary(
            epoch,
            mean_std(h[epoch].get("train_accuracy") for h in histories if epoch in h),
            mean_std(h[epoch].get("test_accuracy") for h in histories if epoch in h),
        )
        for epoch in sorted({epoch for history in histories for epoch in history})
    }


def first_perfect_epoch(run: Run) -> int | None:
    """The first epoch whose training accuracy prints as 100.00; ``None`` if there is none."""
    for epoch, entry in sorted(_epochs(run).items()):
        accuracy = _number(entry.get("train_accuracy"))
        if accuracy is not None and printed_equal(accuracy, 100.0):
            return epoch
    return None


def best_epochs(runs: Iterable[Run], experiment: str) -> dict[int, tuple[int, float]]:
    """For each seed the epoch with the highest test accuracy, the first of equals, and that one."""
    best = {}
    for seed, run in one_run_per_seed(runs, experiment).items():
        tests = [(_number(e.get("test_accuracy")), -epoch) for epoch, e in _epochs(run).items()]
        known = [(accuracy, epoch) for accuracy, epoch in tests if accuracy is not None]
        if known:
            accuracy, epoch = max(known)
            best[seed] = (-epoch, accuracy)
    return best


def digits_tested(run: Run) -> int | None:
    """How many digits the run was tested on: the sum of a confusion matrix, if it has one."""
    for entry in run.get("epochs") or ():
        if counts := entry.get("confusion"):
            return sum(int(count) for row in counts for count in row)
    return None


# --- Values of one run -------------------------------------------------------------------------


def _value(run: Run, metric: str, epochs: Sequence[int]) -> float | None:
    """The claim's quantity for one run; None where anything it needs is missing or not finite."""
    history = _epochs(run)
    if metric == "best test":
        last = max(epochs)
        tests = [_number(e.get("test_accuracy")) for i, e in history.items() if i <= last]
        known = [x for x in tests if x is not None]
        return max(known) if known and last in history else None
    values = []
    for epoch in epochs:
        if epoch not in history:
            return None
        train = _number(history[epoch].get("train_accuracy"))
        test = _number(history[epoch].get("test_accuracy"))
        if metric == "gap":
            values.append(None if train is None or test is None else train - test)
        else:
            values.append(train if metric == "train" else test)
    known = [x for x in values if x is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def _common(runs: Iterable[Run]) -> list[int]:
    """The epochs that all runs have."""
    sets = [set(_epochs(run)) for run in runs]
    return sorted(set.intersection(*sets)) if sets else []


def _list(numbers: Sequence[int]) -> str:
    """1, 2, 3, 5 as "1 to 3, 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join(" to ".join(map(str, part)) for part in parts)


class _Selection(NamedTuple):
    """The epochs that enter, of what the claim asks for, and what has to be said about that."""

    epochs: list[int]
    notes: list[str]


def _select(claim: Claim, wanted: tuple[int, ...], common: list[int]) -> _Selection:
    if not common or common[-1] < claim.since:
        return _Selection([], [f"needs epoch {claim.since}, the runs end at {(common or [0])[-1]}"])
    if not wanted:
        return _Selection(common[-1:], [f"epoch {common[-1]}, the last that all runs have"])
    both = [epoch for epoch in wanted if epoch in common]
    if both == list(wanted):
        return _Selection(both, [])
    if both:
        return _Selection(both, [f"epoch {_list(both)} of {_list(wanted)}"])
    return _Selection(common[-1:], [f"epoch {common[-1]} instead of {_list(wanted)}"])


# --- Tests -------------------------------------------------------------------------------------


class _Differences:
    """Differences of pairs, one sample against 0, or two samples without pairs.

    ``p(shift, alternative)`` is the p-value of a mean difference of ``shift``.
    """

    def __init__(self, a: list[float], b: list[float] | None = None) -> None:
        self.a, self.b = a, b
        self.n = len(a) if b is None else min(len(a), len(b))
        self.effect = mean_std(a).mean - (0.0 if b is None else mean_std(b).mean)
        spread = [self._spread(values) for values in ([a] if b is None else [a, b])]
        self.testable = self.n >= 2
        # Sums of binary fractions: a spread below this is rounding, far below one digit of 60,000.
        self.constant = self.testable and max(spread) < 1e-9

    @staticmethod
    def _spread(values: list[float]) -> float:
        return max(values) - min(values) if values else 0.0

    @property
    def name(self) -> str:
        if self.constant:
            return "exact sign test" if self.b is None else "exact Mann-Whitney test"
        return "paired t-test" if self.b is None else "Welch's t-test"

    def _result(self, shift: float, alternative: str) -> Any:
        from scipy import stats

        with warnings.catch_warnings():
            # Nearly equal values lose digits; the p-value is then tiny, however many remain.
            warnings.simplefilter("ignore", RuntimeWarning)
            if self.b is None:
                return stats.ttest_1samp(self.a, shift, alternative=alternative)
            moved = [x - shift for x in self.a]
            return stats.ttest_ind(moved, self.b, equal_var=False, alternative=alternative)

    def p(self, shift: float = 0.0, alternative: str = "two-sided") -> float:
        from scipy import stats

        if not self.constant:
            return float(self._result(shift, alternative).pvalue)
        if abs(self.effect - shift) < 1e-9:
            return 1.0
        if self.b is not None:
            moved = [x - shift for x in self.a]
            exact = stats.mannwhitneyu(moved, self.b, alternative=alternative, method="exact")
            return float(exact.pvalue)
        above = self.n if self.effect > shift else 0
        return float(stats.binomtest(above, self.n, alternative=alternative).pvalue)

    def interval(self, level: float) -> tuple[float, float] | None:
        """Of the mean difference; None for a single seed, and where the spread is zero."""
        if not self.testable or self.constant:
            return None
        ci = self._result(0.0, "two-sided").confidence_interval(level)
        return float(ci.low), float(ci.high)

    def prediction(self) -> tuple[float, float] | None:
        """Where one more run is to be expected, 95 %: mean ± t·s·sqrt(1 + 1/n)."""
        from scipy import stats

        if not self.testable or self.constant or self.b is not None:
            return None
        half = stats.t.ppf(1 - ALPHA / 2, self.n - 1) * mean_std(self.a).std
        half *= math.sqrt(1 + 1 / self.n)
        return self.effect - float(half), self.effect + float(half)


def _long_enough(claim: Claim, runs: Mapping[int, Run]) -> tuple[Mapping[int, Run], int]:
    """Without the runs that end before ``claim.since``, unless all do; and how many those are."""
    kept = {s: run for s, run in runs.items() if max(_epochs(run), default=0) >= claim.since}
    return (kept, len(runs) - len(kept)) if kept else (runs, 0)


def _gather(
    claim: Claim, a: Mapping[int, Run], b: Mapping[int, Run]
) -> tuple[_Differences | None, list[str], list[float], list[float]]:
    """Differences ``a - b``, paired where seeds are common; notes; both samples."""
    (a, left_out), (b, also) = _long_enough(claim, a), _long_enough(claim, b)
    seeds = [seed for seed in a if seed in b]
    paired = bool(seeds)
    used = [runs[seed] for runs in (a, b) for seed in (seeds if paired else runs)]
    common = _common(run for run in used if _epochs(run))
    if claim.epochs_b:
        # One experiment at two times: neither can be replaced by another epoch.
        first = [epoch for epoch in claim.epochs if epoch in common]
        second = [epoch for epoch in claim.epochs_b if epoch in common]
        notes = []
        if not first or not second or common[-1] < claim.since:
            notes.append(f"needs epochs {_list(claim.epochs)} and {_list(claim.epochs_b)}")
            return None, notes, [], []
        for have, wanted in ((first, claim.epochs), (second, claim.epochs_b)):
            if have != list(wanted):
                notes.append(f"epoch {_list(have)} of {_list(wanted)}")
    else:
        first, notes = _select(claim, claim.epochs, common)
        second = first
        if not first:
            return None, notes, [], []
    sides = []
    for runs, epochs in ((a, first), (b, second)):
        keys = seeds if paired else list(runs)
        sides.append({seed: _value(runs[seed], claim.metric, epochs) for seed in keys})
    if left_out + also:
        notes.append(f"{left_out + also} runs that end before epoch {claim.since} left out")
    dropped = sum(value is None for side in sides for value in side.values())
    if dropped:
        notes.append(f"{dropped} value{'s' * (dropped > 1)} missing or not finite, left out")
    if paired:
        kept = [s for s in seeds if sides[0][s] is not None and sides[1][s] is not None]
        first_values = [float(sides[0][s] or 0.0) for s in kept]
        second_values = [float(sides[1][s] or 0.0) for s in kept]
        differences = [x - y for x, y in zip(first_values, second_values, strict=True)]
        unpaired = len(a) + len(b) - 2 * len(seeds)
        if unpaired:
            notes.append(f"{unpaired} run{'s' * (unpaired > 1)} without a partner of the same seed")
        return _Differences(differences), notes, first_values, second_values
    first_values = [x for x in sides[0].values() if x is not None]
    second_values = [x for x in sides[1].values() if x is not None]
    notes.append("no seed in common")
    if not first_values or not second_values:
        return None, notes, first_values, second_values
    return _Differences(first_values, second_values), notes, first_values, second_values


def _foreign(run: Run) -> bool:
    """Whether its data were others than MNIST's digits."""
    return run.get("data", MNIST) != MNIST


def _about_runs(runs: Iterable[Run], limit: int | None) -> list[str]:
    """Notes on what the runs were: a part of the data, several dtypes, fewer epochs than meant."""
    runs = list(runs)
    notes = []
    counts = sorted({n for n in map(digits_tested, runs) if n is not None and n != _TEST_DIGITS})
    limits = [limit] if limit is not None else [run.get("limit") for run in runs]
    if any(n is not None for n in limits):
        sizes = {"all" if n is None else f"{n:,}" for n in limits}
        notes.append(f"on {' and '.join(sorted(sizes))} digits{'' if 'all' in sizes else ' only'}")
    elif counts:
        notes.append(f"tested on {', '.join(f'{n:,}' for n in counts)} digits only")
    if any(map(_foreign, runs)):
        notes.append("on other data than MNIST")
    dtypes = sorted({str(run["dtype"]) for run in runs if "dtype" in run})
    if len(dtypes) > 1:
        notes.append(f"{' and '.join(dtypes)} mixed")
    short = sum(len(run.get("epochs") or ()) < (run.get("epochs_wanted") or 0) for run in runs)
    if short:
        notes.append(f"{short} run{'s' * (short > 1)} ended before all wanted epochs")
    return notes


def _about_values(claim: Claim, *samples: list[float]) -> list[str]:
    """Notes on ceilings and floors, where differences say little."""
    if claim.metric not in ("train", "test", "best test"):
        return []
    notes = []
    values = [x for sample in samples for x in sample]
    top = sum(printed_equal(x, 100.0) for x in values)
    if top:
        notes.append(f"{top} of {len(values)} values at the ceiling of 100 %")
    low = sum(x < _CHANCE for x in values)
    if low:
        notes.append(f"{low} of {len(values)} values at chance level")
    return notes


def _join(*groups: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(note.rstrip(".") for group in groups for note in group if note))


def _sentence(*groups: Iterable[str]) -> str:
    text = _join(*groups)
    return f"{text}." if text else ""


# --- Claims ------------------------------------------------------------------------------------


def _decide(kind: str, d: _Differences, margin: float) -> tuple[str, str, float, float]:
    """Outcome, name of the test, p-value, level of the interval."""
    if kind == "higher":
        p = d.p(margin)
        if p >= ALPHA:
            outcome = NOT_SUPPORTED
        else:
            outcome = SUPPORTED if d.effect > margin else CONTRADICTED
        suffix = f" against +{margin:g}" if margin else ""
        return outcome, f"{d.name}{suffix}, two-sided", p, 0.95
    if kind == "no higher":
        below, above = d.p(margin, "less"), d.p(margin, "greater")
        name = f"{d.name} against +{margin:g}, one-sided"
        if below < ALPHA:
            return SUPPORTED, name, below, 0.9
        if above < ALPHA:
            return CONTRADICTED, name, above, 0.9
        return NOT_SUPPORTED, name, below, 0.9
    # Equivalence: both one-sided tests, and their opposite: beyond the margin on either side.
    inside = max(d.p(margin, "less"), d.p(-margin, "greater"))
    if inside < ALPHA:
        return SUPPORTED, f"TOST ±{margin:g}, {d.name}", inside, 0.9
    # Two ways to be outside: Bonferroni.
    outside = min(1.0, 2 * min(d.p(margin, "greater"), d.p(-margin, "less")))
    if outside < ALPHA:
        return CONTRADICTED, f"{d.name} against ±{margin:g}, two-sided", outside, 0.9
    return NOT_SUPPORTED, f"TOST ±{margin:g}, {d.name}", inside, 0.9


def _comparison(claim: Claim, a: Mapping[int, Run], b: Mapping[int, Run]) -> Verdict:
    """Kinds "higher", "no higher" and "equivalent"."""
    d, notes, *samples = _gather(claim, a, b)
    notes += _about_values(claim, *samples)
    unit = "epochs" if claim.metric == "first epoch" else "percentage points"
    if d is None or d.n == 0:
        return Verdict(claim, NOT_TESTED, unit=unit, note=_join(notes))
    if claim.metric == "gap" and mean_std(samples[0]).mean <= 0:
        notes.append(f"{claim.a} has no gap yet: its training accuracy, online, is below its test")
        return Verdict(claim, NOT_TESTED, n=d.n, effect=d.effect, unit=unit, note=_join(notes))
    if not d.testable:
        notes.append("one seed: no spread to compare with")
        return Verdict(claim, NOT_TESTED, n=d.n, effect=d.effect, unit=unit, note=_join(notes))
    outcome, name, p, level = _decide(claim.kind, d, claim.margin)
    if d.constant:
        notes.append("all differences are equal, which leaves Student's t undefined")
    if claim.kind != "higher" and d.p() < ALPHA:
        notes.append(f"the difference itself is not zero, p = {d.p():.2g}")
    return Verdict(
        claim,
        outcome,
        name,
        p,
        n=d.n,
        effect=d.effect,
        interval=d.interval(level),
        level=level,
        unit=unit,
        note=_join(notes),
    )


def _best(claim: Claim, runs: list[Run], by_seed: Callable[[str], dict[int, Run]]) -> Verdict:
    """Kind "best": above every other (all must hold), or below one (Holm's adjustment)."""
    others = [name for name in claim.b if by_seed(name)]
    missing = [name for name in claim.b if name not in others]
    single = [
        _comparison(replace(claim, kind="higher", b=(name,)), by_seed(claim.a), by_seed(name))
        for name in others
    ]
    notes = [f"{', '.join(missing)} not run"] if missing else []
    notes += [v.note for v in single]
    tested = [v for v in single if v.p_value is not None]
    known = [v for v in single if v.effect is not None]
    if not known:
        return Verdict(claim, NOT_TESTED, note=_join(notes))
    # The nearest rival's difference is the one that decides.
    nearest = min(known, key=lambda v: v.effect or 0.0)
    notes.append(f"effect against {nearest.claim.b[0]}, the nearest")
    if not tested or len(tested) < len(single):
        return Verdict(claim, NOT_TESTED, n=nearest.n, effect=nearest.effect, note=_join(notes))
    worst = max(v.p_value or 0.0 for v in tested)
    beaten = [
        p
        for p, v in zip(holm([v.p_value for v in tested]), tested, strict=True)
        if p is not None and p < ALPHA and v.outcome == CONTRADICTED
    ]
    if beaten:
        outcome, p, name = CONTRADICTED, min(beaten), "paired t-tests, the smallest p after Holm"
    else:
        best = not missing and all(v.outcome == SUPPORTED for v in tested)
        outcome, p, name = SUPPORTED if best else NOT_SUPPORTED, worst, "paired t-tests, largest p"
    return Verdict(
        claim,
        outcome,
        name,
        p,
        n=min(v.n for v in tested),
        effect=nearest.effect,
        interval=nearest.interval,
        note=_join(notes),
    )


def _against_value(claim: Claim, a: Mapping[int, Run]) -> Verdict:
    """Kind "value": the mean within the margin, or the figure out of reach of one more run."""
    value = claim.value if claim.value is not None else math.nan
    unit = "epoch" if claim.metric == "first epoch" else "%"
    runs = [run for run in a.values() if _epochs(run)]
    notes: list[str] = []
    if claim.metric == "first epoch":
        firsts = [first_perfect_epoch(run) for run in runs]
        values = [float(first) for first in firsts if first is not None]
        censored = len(runs) - len(values)
        if values:
            notes.append(f"first at 100.00 in epoch {', '.join(f'{x:g}' for x in values)}")
        if censored:
            notes.append(f"{censored} of {len(runs)} runs never printed 100.00")
            return Verdict(
                claim,
                NOT_TESTED,
                n=len(runs),
                effect=mean_std(values).mean if values and censored == 0 else None,
                unit=unit,
                note=_join(notes),
            )
    else:
        enough, left_out = _long_enough(claim, dict(enumerate(runs)))
        runs = list(enough.values())
        epochs, notes = _select(claim, claim.epochs, _common(runs))
        if left_out:
            notes.append(f"{left_out} runs that end before epoch {claim.since} left out")
        measured = [_value(run, claim.metric, epochs) if epochs else None for run in runs]
        values = [x for x in measured if x is not None]
        if epochs and len(values) < len(runs):
            notes.append(f"{len(runs) - len(values)} not finite, left out")
    notes += _about_values(claim, values)
    if not values:
        return Verdict(claim, NOT_TESTED, unit=unit, note=_join(notes))
    d = _Differences([x - value for x in values])
    mean = mean_std(values).mean
    if not d.testable:
        notes.append("one seed: no spread to compare with")
        return Verdict(claim, NOT_TESTED, n=1, effect=mean, unit=unit, note=_join(notes))
    outcome, name, p, level = _decide("equivalent", d, claim.margin)
    if outcome == CONTRADICTED:
        # The report's figure is one run, not a mean: it may lie where one more run may.
        reach = d.prediction()
        if reach is not None and reach[0] <= claim.margin and reach[1] >= -claim.margin:
            outcome = NOT_SUPPORTED
            notes.append("the mean is elsewhere, yet one more run might give the report's figure")
    if d.constant:
        notes.append("all runs give the same value")
    ci = d.interval(level)
    return Verdict(
        claim,
        outcome,
        name.replace("paired t-test", "one-sample t-test"),
        p,
        n=d.n,
        effect=mean,
        interval=(ci[0] + value, ci[1] + value) if ci else None,
        level=level,
        unit=unit,
        note=_join(notes),
    )


def _any_value(claim: Claim, by_seed: Callable[[str], dict[int, Run]]) -> Verdict:
    """Kind "any value": one setting gives the value (Bonferroni), or none can (all must)."""
    single = {
        name: _against_value(replace(claim, kind="value", a=name, b=()), runs)
        for name in claim.b
        if (runs := by_seed(name))
    }
    notes = [
        f"{name} {v.effect:.2f} %{'' if v.p_value is None else f' ({v.outcome})'}"
        for name, v in single.items()
        if v.effect is not None
    ]
    known = [v for v in single.values() if v.effect is not None]
    if not known:
        return Verdict(claim, NOT_TESTED, unit="%", note=_join(notes or ["not run"]))
    target = claim.value or 0.0
    nearest = min(known, key=lambda v: abs((v.effect or 0.0) - target))
    tested = [v for v in known if v.p_value is not None]
    outcome, name, p = NOT_TESTED, "", None
    if tested:
        outcome, name = NOT_SUPPORTED, f"{nearest.test}, nearest setting"
        p = nearest.p_value
        hits = [v.p_value or 0.0 for v in tested if v.outcome == SUPPORTED]
        if hits and min(1.0, len(tested) * min(hits)) < ALPHA:
            outcome, name = SUPPORTED, "TOST, the smallest p after Bonferroni"
            p = min(1.0, len(tested) * min(hits))
        elif len(tested) == len(known) and all(v.outcome == CONTRADICTED for v in tested):
            outcome, name = CONTRADICTED, "one-sample t-tests, largest p"
            p = max(v.p_value or 0.0 for v in tested)
    return Verdict(
        claim,
        outcome,
        name,
        p,
        n=nearest.n,
        effect=nearest.effect,
        interval=nearest.interval,
        level=nearest.level,
        unit="%",
        note=_join(notes, ["only the settings run here"]),
    )


def _earlier(claim: Claim, a: Mapping[int, Run], b: Mapping[int, Run]) -> Verdict:
    """Kind "earlier": the signs of the differences, known of some censored runs, too."""
    from scipy import stats

    sooner = later = ties = unknown = 0
    differences = []
    pairs = [(a[seed], b[seed]) for seed in a if seed in b]
    pairs = [(x, y) for x, y in pairs if _epochs(x) and _epochs(y)]
    for run, other in pairs:
        first, second = first_perfect_epoch(run), first_perfect_epoch(other)
        if first is not None and second is not None:
            differences.append(float(first - second))
            sooner, later, ties = (
                sooner + (first < second),
                later + (first > second),
                ties + (first == second),
            )
        elif first is not None and max(_epochs(other)) >= first:
            sooner += 1
        elif second is not None and max(_epochs(run)) >= second:
            later += 1
        else:
            unknown += 1
    n = sooner + later
    notes = [f"{sooner} earlier, {later} later, {ties} equal"] if pairs else ["no pair of seeds"]
    if unknown:
        notes.append(f"{unknown} not known: the runs end before 100.00")
    effect = mean_std(differences).mean if differences and len(differences) == len(pairs) else None
    unit = "epochs"
    if n + ties < 2:
        if n + ties == 1:
            notes.append("one seed: no spread to compare with")
        return Verdict(claim, NOT_TESTED, n=n + ties, effect=effect, unit=unit, note=_join(notes))
    p = float(stats.binomtest(sooner, n).pvalue) if n else 1.0
    if p >= ALPHA:
        outcome = NOT_SUPPORTED
        if n < 6:
            notes.append(f"{n} signs cannot give p < {ALPHA:g}: that takes 6")
    else:
        outcome = SUPPORTED if sooner > later else CONTRADICTED
    name = "exact sign test, two-sided"
    return Verdict(claim, outcome, name, p, n=n + ties, effect=effect, unit=unit, note=_join(notes))


def _at_most(claim: Claim, a: Mapping[int, Run]) -> Verdict:
    """Kind "at most": one run above contradicts; without one, long enough runs support."""
    best = {seed: (epoch, x) for seed, (epoch, x) in best_epochs(a.values(), claim.a).items()}
    if not best or claim.value is None:
        return Verdict(claim, NOT_TESTED, unit="%", note=_join(["no test accuracy"]))
    maxima = [x for _, x in best.values()]
    sample = mean_std(maxima)
    above = {s: (e, x) for s, (e, x) in best.items() if x > claim.value + _HALF}
    interval = _Differences(maxima).interval(0.95)
    notes = [f"{len(above)} of {len(best)} runs above", f"highest {sample.high:.2f} %"]
    wanted = max(claim.epochs) if claim.epochs else 1
    # Only what the report's run covers counts as long enough.
    lengths = [max(_epochs(run)) for run in a.values() if _epochs(run)]
    if above:
        seed, (epoch, x) = max(above.items(), key=lambda item: item[1][1])
        notes.append(f"seed {seed} prints {x:.2f} % in epoch {epoch}")
        outcome = CONTRADICTED
    elif min(lengths) < wanted:
        outcome = NOT_TESTED
        notes.append(f"the runs end at epoch {min(lengths)}, the report's at {wanted}")
    else:
        outcome = SUPPORTED
        bound = 1 - ALPHA ** (1 / len(best))
        notes.append(f"up to {100 * bound:.0f} % of runs may still exceed it (95 %, exact)")
    return Verdict(
        claim,
        outcome,
        "exact",
        n=len(best),
        effect=sample.mean,
        interval=interval,
        unit="%",
        note=_join(notes),
    )


def _identical(claim: Claim, a: Mapping[int, Run], b: Mapping[int, Run]) -> Verdict:
    """Kind "identical": every printed digit of every pair."""
    equal = compared = pairs = 0
    gap = 0.0
    for seed in a:
        if seed not in b:
            continue
        first, second = _epochs(a[seed]), _epochs(b[seed])
        before = compared
        for epoch in claim.epochs or sorted(first):
            if epoch not in first or epoch not in second:
                continue
            for key in ("train_accuracy", "test_accuracy"):
                x, y = _number(first[epoch].get(key)), _number(second[epoch].get(key))
                if x is None or y is None:
                    continue
                compared += 1
                equal += cut(x) == cut(y)
                gap = max(gap, abs(x - y))
        pairs += compared > before
    if not compared:
        note = _join(["no epoch and seed in common"])
        return Verdict(claim, NOT_TESTED, unit="numbers", note=note)
    notes = [f"{equal} of {compared} numbers equal", f"largest difference {gap:.3g} points"]
    outcome = SUPPORTED if equal == compared else CONTRADICTED
    return Verdict(
        claim,
        outcome,
        "exact",
        n=pairs,
        effect=float(equal),
        unit="numbers",
        note=_join(notes),
        total=compared,
    )


def _digits(claim: Claim, a: Mapping[int, Run], limited: bool) -> Verdict:
    """Kind "digits": seed 1, on which the original system printed them, against the table."""
    if claim.table is None or 1 not in a:
        return Verdict(claim, NOT_TESTED, unit="numbers", note=_join(["seed 1 was not run"]))
    if limited:
        note = _join(["the printed digits are those of all digits of MNIST"])
        return Verdict(claim, NOT_TESTED, unit="numbers", note=note)
    table, column = claim.table
    shift = EPOCH_SHIFT.get(table, 0)
    history = _epochs(a[1])
    equal = compared = total = 0
    gap = 0.0
    for epoch, printed in TABLES[table][column].items():
        for key, value in zip(("train_accuracy", "test_accuracy"), printed, strict=True):
            total += value is not None
            measured = _number(history.get(epoch - shift, {}).get(key))
            if value is None or measured is None:
                continue
            compared += 1
            equal += printed_equal(measured, value)
            gap = max(gap, abs(measured - value))
    if not compared:
        return Verdict(claim, NOT_TESTED, unit="numbers", note=_join(["none of its epochs run"]))
    notes = [f"{equal} of {compared} numbers equal"]
    if shift:
        notes.append(f"the table numbers its epochs {shift} too high")
    if compared < total:
        notes.append(f"{total - compared} more not run")
    if equal < compared:
        notes.append(f"largest difference {gap:.3f} points")
        outcome = CONTRADICTED
    else:
        outcome = SUPPORTED
    return Verdict(
        claim,
        outcome,
        "exact",
        n=1,
        effect=float(equal),
        unit="numbers",
        note=_join(notes),
        total=compared,
    )


def _fails(claim: Claim, a: Mapping[int, Run]) -> Verdict:
    """Kind "fails": a run with a finite accuracy contradicts."""
    errors = [run for run in a.values() if run.get("error")]
    finished = [
        run
        for run in a.values()
        if any(_number(e.get("test_accuracy")) is not None for e in run.get("epochs") or ())
    ]
    unit = "%"
    if finished:
        last = [_value(run, "test", [max(_epochs(run))]) for run in finished]
        sample = mean_std(last)
        note = _join([f"{len(finished)} of {len(a)} runs finished without an exception"])
        effect = sample.mean if sample.n else None
        return Verdict(claim, CONTRADICTED, "exact", n=len(a), effect=effect, unit=unit, note=note)
    if errors:
        note = _join([f"ended with: {errors[0]['error']}"])
        return Verdict(claim, SUPPORTED, "exact", n=len(a), unit=unit, note=note)
    note = _join(["no epoch was finished, for reasons unknown"])
    return Verdict(claim, NOT_TESTED, n=len(a), unit=unit, note=note)


def verdict(claim: Claim, runs: Iterable[Run], limit: int | None = None) -> Verdict:
    """What the runs say about one claim; see the module's text for the tests.

    Args:
        claim: of :data:`mnist_ops.lab.reports.CLAIMS`, or one of your own.
        runs: of any experiments; those that the claim does not name are ignored.
        limit: the runs used only so many digits of each split.

    Returns:
        A :class:`Verdict`. Missing experiments, single seeds, NaN, runs of unequal length and zero
        spread end in an outcome and a note, never in an error.

    Raises:
        ValueError: for a claim of unknown kind or metric.
    """
    for key, allowed in (("kind", _KINDS), ("metric", _METRICS)):
        if getattr(claim, key) not in allowed:
            known = ", ".join(map(repr, allowed))
            raise ValueError(f"verdict: {key} must be one of {known}, got {getattr(claim, key)!r}")
    runs = list(runs)

    def by_seed(name: str) -> dict[int, Run]:
        return one_run_per_seed(runs, name)

    group = claim.kind == "any value"
    names = claim.b if group else (claim.a, *claim.b)
    used = [run for name in dict.fromkeys(names) for run in by_seed(name).values()]
    general = _about_runs(used, limit)
    absent = [name for name in dict.fromkeys(names) if not by_seed(name)]
    enough = len(absent) < len(names) if group else claim.a not in absent
    if claim.b and not group:
        enough = enough and any(name not in absent for name in claim.b)
    if not enough:
        note = _sentence([claim.note], [f"{', '.join(absent)} not run"])
        return Verdict(claim, NOT_TESTED, note=note)

    a = by_seed(claim.a)
    b = by_seed(claim.b[0]) if claim.b else {}
    if claim.kind == "best":
        result = _best(claim, runs, by_seed)
    elif claim.kind == "any value":
        result = _any_value(claim, by_seed)
    elif claim.kind == "value":
        result = _against_value(claim, a)
    elif claim.kind == "earlier":
        result = _earlier(claim, a, b)
    elif claim.kind == "at most":
        result = _at_most(claim, a)
    elif claim.kind == "identical":
        result = _identical(claim, a, b)
    elif claim.kind == "digits":
        counts = {digits_tested(run) for run in a.values()}
        limits = {limit, *(run.get("limit") for run in a.values())}
        others = limits != {None} or not counts <= {None, _TEST_DIGITS}
        result = _digits(claim, a, others or any(map(_foreign, a.values())))
    elif claim.kind == "fails":
        result = _fails(claim, a)
    else:
        result = _comparison(claim, a, b)
    return replace(result, note=_sentence([claim.note], [result.note], general))


def verdicts(
    claims: Iterable[Claim], runs: Iterable[Run], limit: int | None = None
) -> list[Verdict]:
    """:func:`verdict` of every claim, with p-values adjusted for all of them (:func:`holm`).

    Outcomes follow the unadjusted p-values, each claim being a question of its own; a note says
    where the adjusted one would not decide.
    """
    runs = list(runs)
    results = [verdict(claim, runs, limit) for claim in claims]
    adjusted = holm([result.p_value for result in results])
    finished = []
    for result, p in zip(results, adjusted, strict=True):
        note = result.note
        if p is not None and p >= ALPHA and result.outcome in (SUPPORTED, CONTRADICTED):
            note = _sentence([note], [f"after Holm's correction p = {p:.2g} does not decide"])
        finished.append(replace(result, p_adjusted=p, note=note))
    return finished
