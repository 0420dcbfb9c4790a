"""A run's digits beside the printed ones: the tables of report 1, guesses, and rounding's reach.

Everything here reads what :func:`mnist_ops.lab.runner.collect` returns.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import training
from . import records
from .experiments import CANDIDATES, Experiment, Table
from .reports import cut

__all__ = [
    "Cell",
    "candidates",
    "columns",
    "compare",
    "samples_apart",
    "spread",
    "text",
    "verdict",
    "write_csv",
]

Run = Mapping[str, Any]

# Training and test: the names in the records and the number of digits.
_SPLITS = (("training", "train_accuracy", 60_000), ("test", "test_accuracy", 10_000))


def samples_apart(accuracy: float, printed: float, total: int, decimals: int = 2) -> int:
    """How many digits more (or fewer: negative) are right than would print as ``printed``.

    Report 1 cuts its numbers off instead of rounding them, see :func:`mnist_ops.lab.reports.cut`.

    Args:
        accuracy: in %, of ``total`` digits.
        printed: in %, cut off.
        total: digits counted.
        decimals: printed after the point.

    Example::

        >>> samples_apart(99.48, 99.47, 10_000)
        1
        >>> samples_apart(96.718, 96.71, 60_000)
        0
    """
    right = round(accuracy * total / 100)
    scale = 10**decimals
    unit = round(printed * scale)
    # In integers: unit <= 100 scale right / total < unit + 1.
    low = -(-unit * total // (100 * scale))
    high = -(-(unit + 1) * total // (100 * scale)) - 1
    return right - min(max(right, low), high)


@dataclass(frozen=True)
class Cell:
    """One printed number and ours. ``samples`` is :func:`samples_apart`, ``None`` without both."""

    table: str
    column: str
    experiment: str
    dtype: str
    epoch: int
    split: str
    ours: float | None
    printed: float | None
    samples: int | None


def _runs_of(results: Mapping[str, Any], name: str) -> list[Run]:
    """The runs to print: with all of MNIST's digits, seed 1, as they are; float64 first."""
    runs = [
        run
        for run in results["runs"]
        if run["experiment"] == name
        and run["seed"] == 1
        and records.of_mnist(run)
        and run["perturbed_weight"] is None
        and run["epochs"]
    ]
    return sorted(runs, key=lambda run: run["dtype"], reverse=True)


def _cells(
    table: str,
    column: str,
    experiment: str,
    run: Run,
    printed: Mapping[int, tuple[float | None, float | None]],
) -> Iterable[Cell]:
    ours = {result["epoch"]: result for result in run["epochs"]}
    for epoch, pair in printed.items():
        for (split, key, total), value in zip(_SPLITS, pair, strict=True):
            accuracy = ours[epoch][key] if epoch in ours else None
            apart = (
                samples_apart(accuracy, value, total)
                if accuracy is not None and value is not None
                else None
            )
            yield Cell(
                table, column, experiment, run["dtype"], epoch, split, accuracy, value, apart
            )


def compare(table: Table, results: Mapping[str, Any]) -> list[Cell]:
    """Every number of a table, column by column; each column once per dtype that was run."""
    return [
        cell
        for column, name in table.columns.items()
        for run in _runs_of(results, name)
        for cell in _cells(table.number, column, name, run, table.printed[column])
    ]


def candidates(
    column: Experiment, results: Mapping[str, Any]
) -> list[tuple[Experiment, list[Cell]]]:
    """For each guess at ``column`` its numbers beside the printed ones, closest first.

    "Closest" counts the digits that the first epoch is off by. Guesses not run come last, empty.
    """
    rows = []
    for guess in CANDIDATES[column.name]:
        runs = _runs_of(results, guess.name)
        cells: list[Cell] = []
        for run in runs[:1]:
            last = max(result["epoch"] for result in run["epochs"])
            printed = {e: pair for e, pair in column.reported.items() if e <= last}
            cells = list(_cells("", column.name, guess.name, run, printed))
        rows.append((guess, cells))
    return sorted(rows, key=lambda row: _distance(row[1]))


def _distance(cells: Sequence[Cell]) -> float:
    """Digits apart in the first epoch, in % of the digits counted, training and test together."""
    first = [cell for cell in cells if cell.epoch == 1 and cell.samples is not None]
    if not first:
        return math.inf
    totals = {split: total for split, _, total in _SPLITS}
    return sum(100.0 * abs(cell.samples or 0) / totals[cell.split] for cell in first)


def verdict(cells: Sequence[Cell]) -> str:
    """One line on one column: whether all printed numbers are met, or where it parts from them."""
    known = [cell for cell in cells if cell.printed is not None]
    met = [cell for cell in known if cell.samples == 0]
    missing = [cell for cell in known if cell.samples is None]
    if len(met) == len(known):
        return f"reproduced: all {len(known)} printed numbers"
    parted = [cell for cell in known if cell.samples]
    count = f"{len(met)} of {len(known)} printed numbers"
    if missing:
        count += f", {len(missing)} not run"
    if not parted:
        return count
    first = parted[0]
    farthest = max(parted, key=lambda cell: abs(cell.samples or 0))
    return (
        f"{count}; parts in epoch {first.epoch}, {first.split}, by {first.samples:+d} digits"
        f" (largest: {farthest.samples:+d} in epoch {farthest.epoch}, {farthest.split})"
    )


def columns(cells: Sequence[Cell]) -> list[tuple[str, list[Cell]]]:
    """The cells of each column and dtype, under a heading."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.column, cell.dtype), []).append(cell)
    return [(f"{column} ({dtype})", group) for (column, dtype), group in groups.items()]


def _print(value: float | None) -> str:
    return "-" if value is None else cut(value)


def _signed(value: int | None) -> str:
    if value is None:
        return "-"
    return f"{value:+d}" if value else "0"


def text(table: Table, results: Mapping[str, Any]) -> str:
    """The table for a terminal: ours, printed and the difference in digits, and a line each."""
    cells = compare(table, results)
    lines = [f"Table {table.number}. {table.title}"]
    if table.shift:
        lines.append(f"(The report numbers these epochs {table.shift} higher.)")
    lines += [
        "",
        f"{'':26s}        training                  test",
        f"{'column':26s} epoch     ours  printed  digits     ours  printed  digits",
    ]
    summary = []
    for heading, group in columns(cells):
        by_epoch: dict[int, list[Cell]] = {}
        for cell in group:
            by_epoch.setdefault(cell.epoch, []).append(cell)
        for i, (epoch, pair) in enumerate(by_epoch.items()):
            numbers = "".join(
                f"{_print(cell.ours):>9s}{_print(cell.printed):>9s}{_signed(cell.samples):>8s}"
                for cell in pair
            )
            lines.append(f"{heading if i == 0 else '':26s} {epoch:5d}{numbers}")
        summary.append(f"  {heading}: {verdict(group)}")
    if not cells:
        return f"Table {table.number}: no run with all digits, none to compare with the printed\n"
    return "\n".join([*lines, "", *summary]) + "\n"


def spread(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How far runs drift apart that differ by 1e-15 in one weight: rounding's reach.

    For each experiment and dtype with perturbed runs, and each epoch that all have: the number of
    runs, the unperturbed one included, and in digits the lowest and highest count of right ones.
    """
    groups: dict[tuple[str, str, int], list[Run]] = {}
    for run in results["runs"]:
        if records.of_mnist(run) and run["epochs"]:
            groups.setdefault((run["experiment"], run["dtype"], run["seed"]), []).append(run)
    rows = []
    for (name, dtype, seed), runs in groups.items():
        if all(run["perturbed_weight"] is None for run in runs):
            continue
        for epochs in zip(*(run["epochs"] for run in runs), strict=False):
            row: dict[str, Any] = {
                "experiment": name,
                "dtype": dtype,
                "seed": seed,
                "epoch": epochs[0]["epoch"],
                "runs": len(runs),
            }
            for split, key, total in _SPLITS:
                right = [round(epoch[key] * total / 100) for epoch in epochs]
                row |= {f"{split}_lowest": min(right), f"{split}_highest": max(right)}
            rows.append(row)
    return rows


def write_csv(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same keys; nothing for no rows."""
    if not rows:
        return
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    training.write_text(path, out.getvalue())
