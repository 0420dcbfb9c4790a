"""A report of many runs, ``summary.md`` and a self-contained ``report.html``.

The page needs no network and no scripts, prints its figures from within itself, and reads in light
and dark and at half a screen. The same results give the same bytes. ::

    >>> import json
    >>> from mnist_ops.lab import experiments, html_report
    >>> results = json.load(open("runs/reproduce/results.json"))
    >>> html_report.write_report(results, experiments.EXPERIMENTS, "runs/reproduce")
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from ..training import write_atomically, write_text
from . import figures, records, reports, statistics
from .figures import Experiment
from .reports import cut
from .statistics import Sample, Verdict
from .tables import samples_apart

__all__ = ["compare", "write_report"]

_TRAIN_DIGITS, _TEST_DIGITS = 60_000, 10_000
# Of more epochs than these some are folded away, and left out of the summary.
_MANY = 6
_FOLDER = "figures"
# Report 2 prints no table: its figure 1 is drawn for this experiment.
_CURVE = ("rotation-0.2", "best_theta0.2")
_SHOWN_MISTAKES = 12


class Cell(NamedTuple):
    """One accuracy beside its print.

    Attributes:
        ours: over seeds.
        printed: by the report, or ``None``.
        digits: how many digits make 100 %, or ``None`` where nothing says so.
    """

    ours: Sample
    printed: float | None
    digits: int | None

    @property
    def same(self) -> bool:
        """Whether ours prints like that, see :func:`mnist_ops.lab.reports.cut`."""
        return (
            self.printed is not None
            and self.ours.n > 0
            and statistics.printed_equal(self.ours.mean, self.printed)
        )

    @property
    def points(self) -> float | None:
        """Ours minus printed, in percentage points."""
        return None if self.printed is None or not self.ours.n else self.ours.mean - self.printed

    @property
    def samples(self) -> float | None:
        """The same in digits; of one run, those that it has too many to print alike."""
        if self.points is None or self.printed is None or self.digits is None:
            return None
        if self.ours.n == 1:
            return samples_apart(self.ours.mean, self.printed, self.digits)
        return self.points / 100 * self.digits

    @property
    def value(self) -> str:
        """``96.71`` or ``96.71 ± 0.03``."""
        if not self.ours.n:
            return "–"
        if self.ours.n == 1:
            return cut(self.ours.mean)
        return f"{self.ours.mean:.2f} ± {self.ours.std:.2f}"

    @property
    def difference(self) -> str:
        """``+0.04 (+24)``: percentage points and digits; ``same`` where both print alike."""
        if self.points is None:
            return ""
        if self.same:
            return "same"
        digits = "" if self.samples is None else f" ({_signed(self.samples, 0)})"
        return f"{_signed(self.points, 2)}{digits}"


class Row(NamedTuple):
    """One epoch of one experiment."""

    name: str
    epoch: int
    n: int
    train: Cell
    test: Cell

    @property
    def has_print(self) -> bool:
        """Whether the report prints either accuracy."""
        return self.train.printed is not None or self.test.printed is not None


@dataclass
class _Group:
    """A section of the report."""

    name: str
    experiments: list[Experiment]
    runs: list[statistics.Run]
    rows: list[Row]
    verdicts: list[Verdict]
    figures: list[tuple[str, str]] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        return _anchor(self.name)

    @property
    def short(self) -> list[Row]:
        """Of many epochs the first three, each fifth and the last."""
        kept = []
        for experiment in self.experiments:
            rows = [row for row in self.rows if row.name == experiment.name]
            last = rows[-1].epoch if rows else 0
            many = len(rows) > _MANY
            kept += [
                row
                for row in rows
                if not many or row.epoch <= 3 or row.epoch % 5 == 0 or row.epoch == last
            ]
        return kept


def _signed(value: float, decimals: int) -> str:
    return f"{value:+.{decimals}f}".replace("-", "−")


def _anchor(text: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in text.lower())


def _limit(run: Mapping[str, Any], options: Mapping[str, Any]) -> int | None:
    value = run.get("limit", options.get("limit"))
    return value if isinstance(value, int) else None


def compare(
    runs: Iterable[statistics.Run],
    experiment: Experiment,
    options: Mapping[str, Any] | None = None,
) -> list[Row]:
    """An experiment's accuracies over seeds beside the report's, epoch by epoch.

    Args:
        runs: as in :mod:`mnist_ops.lab.statistics`.
        experiment: gives name and printed numbers.
        options: ``limit`` is looked up there where a run has none of its own.

    Returns:
        A :class:`Row` an epoch, without the epochs that no run has.
    """
    runs = list(runs)
    chosen = list(statistics.one_run_per_seed(runs, experiment.name).values())
    limits = {_limit(run, options or {}) for run in chosen}
    limit = next(iter(limits)) if len(limits) == 1 else None
    train = None if len(limits) > 1 else min(limit or _TRAIN_DIGITS, _TRAIN_DIGITS)
    counts = {statistics.digits_tested(run) for run in chosen} - {None}
    test = next(iter(counts)) if len(counts) == 1 else None
    if not counts and train is not None:
        test = min(limit or _TEST_DIGITS, _TEST_DIGITS)
    return [
        Row(
            experiment.name,
            epoch,
            max(entry.train.n, entry.test.n),
            Cell(entry.train, experiment.reported.get(epoch, (None, None))[0], train),
            Cell(entry.test, experiment.reported.get(epoch, (None, None))[1], test),
        )
        for epoch, entry in statistics.summary(runs, experiment.name).items()
    ]


@dataclass(frozen=True)
class _Unknown:
    """An experiment that runs name and nobody describes."""

    name: str
    title: str = "not a registered experiment"
    section: str = ""
    group: str = "other runs"
    reported: Mapping[int, tuple[float | None, float | None]] = field(default_factory=dict)


def _partners(names: Sequence[str], available: Mapping[str, Experiment]) -> list[str]:
    """The baselines with which the claims compare these experiments."""
    found = []
    for claim in reports.CLAIMS.values():
        members = (claim.a, *claim.b)
        if claim.kind in ("any value", "best") or not any(name in names for name in members):
            continue
        found += [name for name in members if name in available and name not in names]
    if not found:
        # Nothing is claimed that compares: the baseline of the same report.
        second = any(available[name].section.startswith("report 2") for name in names)
        found = [name for name in ["plain" if second else "original"] if name in available]
    return list(dict.fromkeys(found))


def _claims_about(names: Sequence[str], verdicts: Sequence[Verdict]) -> list[Verdict]:
    return [v for v in verdicts if v.claim.a in names or any(name in names for name in v.claim.b)]


def _until(run: statistics.Run, last: int) -> statistics.Run:
    epochs = [entry for entry in run.get("epochs") or () if entry["epoch"] <= last]
    return {**run, "epochs": epochs}


def _groups(
    runs: Sequence[statistics.Run],
    experiments: Mapping[str, Experiment],
    verdicts: Sequence[Verdict],
    options: Mapping[str, Any],
) -> list[_Group]:
    present = {run.get("experiment"): None for run in runs if run.get("epochs")}
    known: dict[str, Experiment] = {n: e for n, e in experiments.items() if n in present}
    known |= {str(n): _Unknown(str(n)) for n in present if n not in experiments}
    groups = []
    baselines = {"original", "plain"}
    for group in dict.fromkeys(e.group for e in known.values()):
        names = [n for n, e in known.items() if e.group == group]
        partners = [] if set(names) & baselines else _partners(names, known)
        shown = [known[name] for name in (*partners, *names)]
        # A baseline is shown as far as it is compared.
        last = max(
            e["epoch"]
            for run in runs
            if run.get("experiment") in names
            for e in run.get("epochs") or ()
        )
        inside = [_until(run, last) for run in runs]
        rows = [row for experiment in shown for row in compare(inside, experiment, options)]
        # A claim belongs to what varies, not to the baseline that it is compared with.
        about = names if not partners else [n for n in names if n not in baselines]
        claims = _claims_about(about, verdicts)
        if set(names) & baselines:
            claims = [v for v in claims if {v.claim.a, *v.claim.b} <= set(names)]
        groups.append(_Group(group, shown, inside, rows, claims))
    return groups


# --- Pieces of text ----------------------------------------------------------------------------


def _p(value: float | None) -> str:
    if value is None:
        return ""
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}" if value < 0.1 else f"{value:.2f}"


def _effect(verdict: Verdict) -> str:
    """``+0.19 [+0.11, +0.27] points`` and the like."""
    if verdict.effect is None:
        return ""
    if verdict.unit == "numbers":
        return f"{verdict.effect:.0f} of {verdict.total} numbers equal"
    if verdict.unit in ("%", "epoch"):
        digits = 2 if verdict.unit == "%" else 1

        def show(x: float) -> str:
            return f"{x:.{digits}f}"

        prefix, suffix = ("epoch ", "") if verdict.unit == "epoch" else ("", " %")
    else:
        digits = 3 if verdict.unit == "percentage points" else 1

        def show(x: float) -> str:
            return _signed(x, digits)

        prefix, suffix = "", " points" if verdict.unit == "percentage points" else " epochs"
    interval = ""
    if verdict.interval:
        low, high = verdict.interval
        interval = f" [{show(low)}, {show(high)}]"
    return f"{prefix}{show(verdict.effect)}{interval}{suffix}"


def _seconds(run: Mapping[str, Any]) -> float | None:
    values = [entry.get("seconds") for entry in run.get("epochs") or ()]
    known = [float(v) for v in values if isinstance(v, (int, float))]
    return sum(known) if known else None


def _run_rows(runs: Sequence[statistics.Run], options: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for run in runs:
        done = len(run.get("epochs") or ())
        wanted = run.get("epochs_wanted")
        limit = _limit(run, options)
        weight = run.get("perturbed_weight")
        time = _seconds(run)
        rows.append(
            [
                str(run.get("experiment", "")),
                str(run.get("seed", ""))
                + ("" if weight is None else f", weight {weight} perturbed"),
                f"{done}" if wanted in (None, done) else f"{done} of {wanted}",
                "all" if limit is None else f"{limit:,}",
                str(run.get("dtype", "")),
                str(run.get("device", "")),
                str(run.get("engine", "")),
                "" if time is None else f"{time:.0f} s",
            ]
        )
    return rows


def _scope(runs: Sequence[statistics.Run], options: Mapping[str, Any]) -> str:
    """A warning for runs that are no full runs; empty for full ones."""
    limits = sorted({n for n in (_limit(run, options) for run in runs) if n is not None})
    if any(run.get("data", records.MNIST) != records.MNIST for run in runs):
        return (
            "Some or all runs used other data than MNIST: their accuracies are not those of the "
            "reports, and no difference from a printed number means anything."
        )
    if not limits:
        return ""
    sizes = " and ".join(f"{n:,}" for n in limits)
    return (
        f"Some or all runs used only the first {sizes} digits of each split: their accuracies are "
        "not those of the reports, and no difference from a printed number means anything."
    )


# --- Figures -----------------------------------------------------------------------------------


class _Pictures:
    """Figures as they are drawn: files under ``figures/`` and, for the page, base64."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / _FOLDER
        self.data: dict[str, str] = {}

    def draw(self, name: str, function: Callable[..., None], *args: Any, **options: Any) -> str:
        """Draw one; its file's name, to be used as a key of :attr:`data`."""
        content = figures.png(function, *args, **options)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.png"
        write_atomically(path, lambda file: file.write(content))
        self.data[f"{name}.png"] = base64.b64encode(content).decode("ascii")
        return f"{name}.png"


def _detailed(runs: Sequence[statistics.Run]) -> statistics.Run | None:
    """The run whose network is looked into: the original's first seed, else the first with one."""
    chosen = list(statistics.one_run_per_seed(runs, "original").values())
    for run in (*chosen, *runs):
        if run.get("filters") or run.get("mistakes"):
            return run
    return next((run for run in chosen if run.get("epochs")), None)


def _look_inside(
    run: statistics.Run, pictures: _Pictures, root: str | None
) -> list[tuple[str, str]]:
    """Filters, confusion matrix and worst mistakes of one run."""
    from ..mnist import data

    drawn = []
    if run.get("filters"):
        name = pictures.draw("filters", figures.filters, run["filters"])
        drawn.append((name, "The first convolution's kernels after training."))
    epochs = run.get("epochs") or ()
    if epochs and epochs[-1].get("confusion"):
        last = epochs[-1]
        name = pictures.draw("confusion", figures.confusion, last["confusion"])
        drawn.append((name, f"Test digits after epoch {last['epoch']}, by class."))
    # Their indices are those of the run's own data.
    if run.get("mistakes") and (root is not None or run.get("data") in (None, records.MNIST)):
        try:
            images, _ = data.load("test", root)
            items = [m for m in run["mistakes"] if 0 <= m["index"] < len(images)]
            if items := items[:_SHOWN_MISTAKES]:
                name = pictures.draw("mistakes", figures.mistakes, items, images)
                words = "Wrong, and surest of it: true class as predicted class, confidence, index."
                drawn.append((name, words))
        except data.DataError:
            pass  # The report is about the runs; without the digits there is one picture less.
    return drawn


def _draw(
    groups: Sequence[_Group],
    runs: Sequence[statistics.Run],
    experiments: Mapping[str, Experiment],
    pictures: _Pictures,
    root: str | None,
) -> None:
    from ..mnist import data

    for group in groups:
        shown = {e.name: e for e in group.experiments}
        if any(row.train.ours.n or row.test.ours.n for row in group.rows):
            name = pictures.draw(f"group-{group.anchor}", figures.group_curves, group.runs, shown)
            words = "Means over seeds, bands from lowest to highest; open circles: the report."
            group.figures.append((name, words))
        experiment, curve = _CURVE
        if experiment in shown and experiments.get(experiment):
            name = pictures.draw(
                "report-2-figure-1",
                figures.report_curves,
                runs,
                experiment,
                reports.FIGURES[curve],
            )
            words = "Over report 2's figure 1, read off the published plot to about 0.01."
            group.figures.append((name, words))
        if "normalization-15" in shown:
            try:
                name = pictures.draw("normalization", figures.normalization_gallery, root=root)
            except (data.DataError, ValueError):
                continue  # Other data than MNIST, or none: the numbers are still there.
            words = "What each normalization makes of the digits, as in report 1's Table 3.2."
            group.figures.append((name, words))


# --- Pages -------------------------------------------------------------------------------------

_METHOD = (
    "Accuracies are in %, means ± standard deviation (n − 1) over seeds. Training accuracy is "
    "online: each digit is predicted before its own update. A difference is ours minus printed, in "
    "percentage points and, in brackets, in digits; 'same' where ours rounds to the printed "
    "number. With one seed there is no spread, and nothing is tested that needs one.",
    "Runs of two experiments are paired by seed: Student's t-test on the differences, Welch's "
    "where no seed is common, an exact test where all differences are equal. 'The same' is tested "
    "as equivalence, by two one-sided tests (TOST) against a margin of ours that the test names; "
    "'no improvement' by one of them. Intervals: 95 %, but 90 % for the one-sided tests. Claims of "
    "equal digits, of never and of exceptions need no test: one run against them is enough.",
    "Supported, contradicted: the claim, or its opposite, at p < 0.05. Not supported: the runs "
    "leave it open, which is no evidence for its opposite. Not tested: the runs cannot show it. "
    "Holm's column corrects for all claims tested here together; outcomes follow the plain p.",
)


def _markdown(text: Any) -> str:
    """Text in a Markdown table or paragraph: nothing in it is markup."""
    line = " ".join(str(text).split())
    for character in "\\`*_[]|<>":
        line = line.replace(character, "\\" + character)
    return line


def _pairs(mapping: Mapping[str, Any]) -> list[tuple[str, str]]:
    def show(value: Any) -> str:
        if isinstance(value, (list, tuple)):
            return ", ".join(map(str, value))
        return str(value)

    return [(str(key), show(value)) for key, value in mapping.items() if value is not None]


def write_report(
    results: Mapping[str, Any],
    experiments: Mapping[str, Experiment],
    folder: str | os.PathLike[str],
) -> tuple[Path, Path]:
    """Write ``summary.md``, ``report.html`` and the figures they show into a folder.

    Args:
        results: ``results.json`` as :func:`json.load` gives it: ``runs``, and where there are any
            ``environment`` and ``options``. Runs may be unfinished, of unequal length, of unknown
            experiments, or none.
        experiments: from name to experiment, in the order of the report.
        folder: is made where it does not exist. ``figures/`` in it gets the PNG files.

    Returns:
        The paths of ``summary.md`` and ``report.html``.

    Raises:
        ValueError: if ``results`` has another format than 1, or is not made like this.
        OSError: if the folder cannot be written.
    """
    import jinja2

    try:
        records.check(results, records.RESULTS, "results")
    except records.RunError as error:
        raise ValueError(f"write_report: {error}") from None
    if results.get("format", 1) != 1:
        raise ValueError(f"write_report: format must be 1, got {results['format']!r}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    runs: list[statistics.Run] = list(results.get("runs") or ())
    options: Mapping[str, Any] = results.get("options") or {}
    limit = options.get("limit")
    verdicts = statistics.verdicts(reports.CLAIMS.values(), runs, limit)
    groups = _groups(runs, experiments, verdicts, options)

    pictures = _Pictures(folder)
    root = options.get("data") or options.get("root")
    _draw(groups, runs, experiments, pictures, root)
    detailed = _detailed(runs)
    inside = [] if detailed is None else _look_inside(detailed, pictures, root)
    inside_of = ""
    if detailed is not None:
        done = len(detailed.get("epochs") or ())
        inside_of = (
            f"Experiment {detailed.get('experiment')}, seed {detailed.get('seed')}, after {done} "
            f"epoch{'s' * (done != 1)}."
        )

    present = [run for run in runs if run.get("epochs")]
    names = {run.get("experiment") for run in present}
    epochs = sum(len(run["epochs"]) for run in present)
    counts = [(o, sum(v.outcome == o for v in verdicts)) for o in statistics.OUTCOMES]
    context = {
        "title": "Two reports on MNIST of 2016, run again",
        "intro": f"{len(present)} runs of {len(names)} experiments, {epochs} epochs in all, beside "
        f"the numbers that the reports printed, and what they say about {len(verdicts)} claims.",
        "scope": _scope(runs, options),
        "groups": groups,
        "verdicts": verdicts,
        "counts": [(outcome, count) for outcome, count in counts if count],
        "inside": inside,
        "inside_of": inside_of,
        "method": _METHOD,
        "environment": _pairs(results.get("environment") or {}) + _pairs(options),
        "missing": [name for name in experiments if name not in names],
        "run_rows": _run_rows(runs, options),
        "data": pictures.data,
        "effect": _effect,
        "p": _p,
    }
    strict: dict[str, Any] = {"undefined": jinja2.ChainableUndefined, "keep_trailing_newline": True}
    written = []
    for name in ("summary.md", "report.html"):
        page = name.endswith(".html")
        environment = jinja2.Environment(autoescape=page, trim_blocks=not page, **strict)
        environment.filters["md"] = _markdown
        source = (resources.files(__package__) / f"{name}.jinja").read_text(encoding="utf-8")
        path = folder / name
        text = environment.from_string(source).render(context)
        write_text(path, text)
        written.append(path)
    return written[0], written[1]
