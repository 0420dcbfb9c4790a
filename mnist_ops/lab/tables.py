"""A run's numbers beside the printed ones: tables, guesses, the authors' logs, rounding's reach.

Runs are records of ``results.json``. What is compared with print is seed 1, the original's; the
report cuts its numbers (:func:`mnist_ops.lab.reports.cut`), and so does every comparison here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..mnist import data
from . import records, reports, statistics
from .experiments import CANDIDATES, ROUNDINGS, Experiment, Table
from .statistics import Run, Sample

__all__ = [
    "SPLITS",
    "Cell",
    "LogComparison",
    "authors_log",
    "candidates",
    "column_verdict",
    "compare",
    "confusion_cells",
    "images_apart",
    "signed",
    "spread",
]

#: Training and test: the names in the records.
SPLITS = {"training": "train_accuracy", "test": "test_accuracy"}


def images_apart(accuracy: float, printed: float, total: int) -> int:
    """How many images more (or fewer: negative) are right than would print as ``printed``.

    ``printed`` is cut off after two decimals; ``accuracy`` is in %, of ``total`` images.

    Example::

        >>> images_apart(99.48, 99.47, 10_000)
        1
    """
    right = round(accuracy * total / 100)
    unit = round(printed * 100)
    # In integers: unit <= 10000 right / total < unit + 1.
    low = -(-unit * total // 10_000)
    high = -(-(unit + 1) * total // 10_000) - 1
    return right - min(max(right, low), high)


def signed(images: int | None) -> str:
    """``0``, ``+3``, ``−12``; a dash for ``None``."""
    return "–" if images is None else f"{images:+d}".replace("-", "−") if images else "0"


class Cell(NamedTuple):
    """One printed number and ours.

    Attributes:
        column: the table's heading.
        experiment: behind it.
        run: of seed 1; ``None`` where there is none.
        epoch: as the run counts.
        split: ``"training"`` or ``"test"``.
        printed: ``None`` where a dash is printed.
        ours: of seed 1.
        images: :func:`images_apart`, ``None`` without both.
        seeds: over all seeds that reach this epoch.
    """

    column: str
    experiment: str
    run: Any
    epoch: int
    split: str
    printed: float | None
    ours: float | None
    images: int | None
    seeds: Sample | None


def images_of(run: Run, split: str) -> int:
    """How many images make 100 %."""
    if split == "test":
        return sum(map(sum, run["epochs"][0]["confusion"]))
    return int(run["limit"] or data.COUNTS["train"])


def _right(run: Run, split: str) -> dict[int, int]:
    """How many images are right, by epoch."""
    share = images_of(run, split) / 100
    return {epoch["epoch"]: round(epoch[SPLITS[split]] * share) for epoch in run["epochs"]}


def _cells(
    column: str,
    experiment: str,
    printed: Mapping[int, tuple[float | None, float | None]],
    runs: Sequence[Run],
) -> Iterable[Cell]:
    reaching = {epoch: statistics.by_seed(runs, experiment, epoch) for epoch in sorted(printed)}
    # The run that has most of the column; of equals the one that statistics takes, too.
    first = [by_seed[1] for by_seed in reaching.values() if 1 in by_seed]
    run = first[-1] if first else None
    for epoch, pair in printed.items():
        for (split, key), value in zip(SPLITS.items(), pair, strict=True):
            known = [other["epochs"][epoch - 1][key] for other in reaching[epoch].values()]
            ours = apart = None
            if run is not None and epoch <= len(run["epochs"]):
                ours = run["epochs"][epoch - 1][key]
                if value is not None:
                    apart = images_apart(ours, value, images_of(run, split))
            seeds = statistics.mean_sd(known) if known else None
            yield Cell(column, experiment, run, epoch, split, value, ours, apart, seeds)


def compare(table: Table, runs: Sequence[Run]) -> dict[str, list[Cell]]:
    """Every number of a table by column; ``runs`` as :func:`statistics.usable` gives them."""
    return {
        column: list(_cells(column, name, table.printed[column], runs))
        for column, name in table.columns.items()
    }


def column_verdict(cells: Sequence[Cell]) -> str:
    """How many printed numbers are met, and by how many images the others are missed."""
    known = [cell for cell in cells if cell.printed is not None]
    run = [cell for cell in known if cell.images is not None]
    if not run:
        return "not run"
    met = sum(cell.images == 0 for cell in run)
    words = f"{met} of {len(known)} equal"
    if len(run) < len(known):
        words += f", {len(known) - len(run)} not run"
    if met < len(run):
        far = max(run, key=lambda cell: abs(cell.images or 0))
        unit = reports.counted(abs(far.images or 0), "image").split()[1]
        words += f"; farthest {signed(far.images)} {unit} (epoch {far.epoch}, {far.split})"
    return words


def candidates(column: Experiment, runs: Sequence[Run]) -> list[tuple[Experiment, list[Cell]]]:
    """For each guess at ``column`` its first epoch beside the printed one, closest first.

    Distance is counted in % of the images of both splits. Guesses not run come last, empty.
    """
    rows = []
    for guess in CANDIDATES[column.name]:
        cells = list(_cells(guess.title, guess.name, {1: column.reported[1]}, runs))
        known = [c for c in cells if c.run and c.images is not None]
        far = sum(100 * abs(c.images or 0) / images_of(c.run, c.split) for c in known)
        rows.append((far if known else math.inf, guess, cells if known else []))
    return [(guess, cells) for _, guess, cells in sorted(rows, key=lambda row: row[0])]


#: In what runs differ that show rounding's reach.
PERTURBED = {
    "weight": "differ by 1e-15 in one weight",
    "pixels": "differ in their pixels as those of two machines do",
}


class LogComparison(NamedTuple):
    """A run beside a log of the authors, epoch by epoch and in whole images.

    Attributes:
        run: ours, seed 1.
        epochs: compared.
        apart: for each split the images that ours has more, by epoch, where they differ.
        inside: for each of :data:`PERTURBED` and split how many runs there are and how many epochs
            two or more of them have; and by how many images the log lies outside of their spread,
            by epoch.
    """

    run: Run
    epochs: int
    apart: dict[str, dict[int, int]]
    inside: dict[tuple[str, str], tuple[int, int, dict[int, int]]]


def authors_log(results: Mapping[str, Any], name: str) -> LogComparison | None:
    """Seed 1 of ``original`` or ``three-layer`` beside the authors' log of it."""
    log = reports.AUTHORS_LOGS[name.replace("-", "_")]
    full = [run for run in statistics.usable(results["runs"]) if records.of_mnist(run)]
    longest = max((len(run["epochs"]) for run in full if run["experiment"] == name), default=0)
    reach = min(longest, len(log["test"]))
    run = statistics.by_seed(full, name, reach).get(1) or statistics.by_seed(full, name).get(1)
    if run is None:
        return None
    rows = [
        row
        for row in spread(results)
        if (row["experiment"], row["dtype"], row["seed"]) == (name, run["dtype"], 1)
    ]
    apart: dict[str, dict[int, int]] = {}
    inside = {}
    for split in SPLITS:
        # Five digits name the count of images, of 60,000 as well.
        share = images_of(run, split) / 100
        counts = {epoch: round(x * share) for epoch, x in enumerate(log[split], 1)}
        ours = _right(run, split)
        apart[split] = {i: ours[i] - n for i, n in counts.items() if ours.get(i, n) != n}
        for what in PERTURBED:
            outside, of = {}, [row for row in rows if row["what"] == what]
            for row in of:
                low, high = row[f"{split}_lowest"], row[f"{split}_highest"]
                count = counts.get(row["epoch"], low)
                if far := count - min(max(count, low), high):
                    outside[row["epoch"]] = far
            if of:
                inside[what, split] = of[0]["runs"], len(of), outside
    return LogComparison(run, min(len(run["epochs"]), len(log["test"])), apart, inside)


def confusion_cells(run: Run) -> dict[str, tuple[int, int, list[str]]]:
    """The original's confusion matrices beside the authors': cells equal, of, and the others.

    By split; without training where the run's record has no matrices of it.
    """
    logged = reports.AUTHORS_LOGS["original"]["confusion"]["epochs"]
    found = {}
    for split, key in (("training", "train_confusion"), ("test", "confusion")):
        total, others = 0, []
        for number, entry in logged.items():
            if int(number) > len(run["epochs"]) or key not in run["epochs"][int(number) - 1]:
                continue
            ours, theirs = run["epochs"][int(number) - 1][key], entry[split]
            for i, j in itertools.product(range(10), range(10)):
                total += 1
                if ours[i][j] != theirs[i][j]:
                    where = f"epoch {number}, {split}, {i} as {j}"
                    others.append(f"{where}: {ours[i][j]}, in the log {theirs[i][j]}")
        if total:
            found[split] = total - len(others), total, others
    return found


def spread(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How far runs drift apart that differ in :data:`PERTURBED`: rounding's reach.

    For each experiment and dtype with such runs, and each epoch that two or more of them have: the
    number of runs, the unperturbed one included, and in images the lowest and highest count of
    right ones.
    """
    original = {e.name: name for name, group in ROUNDINGS.items() for e in group}
    groups: dict[tuple[str, str, int, str], list[Run]] = {}
    for run in results["runs"]:
        if not (records.of_mnist(run) and run["epochs"] and statistics.is_current(run)):
            continue
        name = original.get(run["experiment"], run["experiment"])
        pixels, weight = name != run["experiment"], run["perturbed_weight"] is not None
        for what, other in (("weight", pixels), ("pixels", weight)):
            if not other:
                groups.setdefault((name, run["dtype"], run["seed"], what), []).append(run)
    rows = []
    for (name, dtype, seed, what), runs in groups.items():
        lengths = sorted(len(run["epochs"]) for run in runs)
        if all(run["experiment"] == name and run["perturbed_weight"] is None for run in runs):
            continue
        if len(runs) < 2:
            continue
        right = {split: [_right(run, split) for run in runs] for split in SPLITS}
        for epoch in range(1, lengths[-2] + 1):
            row: dict[str, Any] = {"experiment": name, "dtype": dtype, "seed": seed, "what": what}
            row |= {"epoch": epoch, "runs": sum(length >= epoch for length in lengths)}
            for split, counts in right.items():
                there = [count[epoch] for count in counts if epoch in count]
                row |= {f"{split}_lowest": min(there), f"{split}_highest": max(there)}
            rows.append(row)
    return rows
