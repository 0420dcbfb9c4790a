"""What the two reports of 2016 printed, as numbers and as claims, to stand beside a run's own.

Accuracies are in %. "Training" is the reports' online accuracy, counted while the epoch trains and
each image before its own update; "test" is measured after the epoch. ::

    >>> from mnist_ops.lab import reports
    >>> reports.TABLES["3.2"]["gaussian1d_15"][1]
    (96.72, 98.88)
    >>> reports.FIGURES["best_theta0.2"][30]
    (99.775, 99.573)
    >>> reports.CLAIMS["tanh-over-relu-test"].kind
    'difference'

All of it is data: ``reports.json`` (tables, figures), ``report1_logs.json`` (the logs that the
authors of report 1 published, kept as they are) and ``claims.json``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any

__all__ = [
    "AUTHORS_LOGS",
    "CLAIMS",
    "EPOCH_SHIFT",
    "FIGURES",
    "LOGS",
    "SOURCES",
    "TABLES",
    "Claim",
    "counted",
    "cut",
]


def cut(accuracy: float) -> str:
    """An accuracy as report 1 prints it: two decimals, cut off and not rounded.

    The original column is met by one run to the last decimal only so: its 99.626667 in epoch 5 is
    printed as 99.62, its 99.898333 in epoch 9 as 99.89, and 98.998333 as 98.99 in Table 3.2.

    Example::

        >>> cut(99.626667)
        '99.62'
    """
    # The smallest step of an accuracy, 1/600 %, is far above what a division's rounding can take.
    return f"{math.floor(accuracy * 100 + 1e-6) / 100:.2f}"


def counted(count: int, noun: str) -> str:
    """``1 epoch``, ``2 epochs``."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


@dataclass(frozen=True)
class Claim:
    """One statement of a report that runs can decide, see :mod:`mnist_ops.lab.statistics`.

    Attributes:
        name: unique, as in :data:`CLAIMS`.
        report: 1 or 2.
        section: where it stands.
        quote: the report's own words.
        kind: ``"difference"``: ``a`` minus ``b`` is ``above`` or ``below`` a bound;
            ``"equivalence"``: it is ``within`` so much of 0, or ``a`` of ``value``; ``"equal"``:
            ``a`` prints what ``b`` prints, or ``value``; ``"bound"``: ``a`` is never above
            ``at_most``, never below ``at_least``; ``"none"``: no run can decide it, ``note`` says
            why.
        a: the experiments that it is about; a name may be a pattern, as ``"small-momentum-*"``.
        b: those that it compares them with.
        quantifier: whether it must hold of ``"all"`` pairs of ``a`` and ``b`` or of ``"any"``.
        metric: ``"train"``, ``"test"``: accuracy, mean over ``epochs``; ``"gap"``: training minus
            test; ``"best test"``: the highest test accuracy; ``"largest step"``: the largest
            change of the test accuracy from one epoch to the next; ``"first 100"``: the first
            epoch whose training accuracy prints as 100.00.
        epochs: first and last of those that it is about; ``None`` where the report names none:
            then the last that runs on both sides reach.
        epochs_b: those of ``b`` where they differ.
        above, below, within, at_most, at_least, value: bounds, in the metric's unit: percentage
            points, % or epochs.
        note: how the words were read.
    """

    name: str
    report: int
    section: str
    quote: str
    kind: str
    a: tuple[str, ...] = ()
    b: tuple[str, ...] = ()
    quantifier: str = "all"
    metric: str = "test"
    epochs: tuple[int, int] | None = None
    epochs_b: tuple[int, int] | None = None
    above: float | None = None
    below: float | None = None
    within: float | None = None
    at_most: float | None = None
    at_least: float | None = None
    value: float | None = None
    note: str = ""


def read(name: str) -> Any:
    """One of the package's own files."""
    return json.loads((resources.files(__package__) / name).read_text(encoding="utf-8"))


def _pairs(entry: dict[str, list[Any]], epochs: Iterable[int]) -> dict[int, tuple[Any, Any]]:
    """For each epoch training and test accuracy."""
    return dict(zip(epochs, zip(entry["training"], entry["test"], strict=True), strict=True))


def _claim(entry: dict[str, Any]) -> Claim:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
    return Claim(**values)


_CONTENT = read("reports.json")

#: Title, authors, date, repository and folder of both reports, under ``"1"`` and ``"2"``; under
#: ``"starter"`` the scripts of the course that both began with.
SOURCES: dict[str, Any] = _CONTENT["reports"]

#: Report 1, Tables 3.1 to 3.5, as printed: ``TABLES[table][column][epoch] = (training, test)``;
#: ``None`` where a dash is printed. Table 3.4's multi-margin column equals its NLL column to the
#: last decimal.
TABLES: dict[str, dict[str, dict[int, tuple[float, float | None]]]] = {
    table: {column: _pairs(entry, entry["epochs"]) for column, entry in columns.items()}
    for table, columns in _CONTENT["tables"].items()
}

#: How much too high a table numbers its epochs. Table 3.5 prints the lines of the authors' log
#: files and counts the header as one: what it prints for epoch 20 is the log's epoch 19.
EPOCH_SHIFT: dict[str, int] = {"3.5": 1}

#: The logs that the authors of report 1 published: ``original`` and ``three_layer``, each with
#: ``training`` and ``test``, one accuracy in % an epoch to five digits; ``original`` has confusion
#: matrices of epochs 20 to 46 as well. ``source`` says where they come from.
AUTHORS_LOGS: dict[str, Any] = read("report1_logs.json")

#: Report 2's figures 1 and 2, ``FIGURES[figure][epoch] = (training, test)``: curves read off the
#: published plots to about 0.01; ``None`` where they cannot be read. The legend of figure 2 is
#: swapped; here the curves have their right names. The published text is a later revision of the
#: report: it ends at 99.63 with all augmentations together.
FIGURES: dict[str, dict[int, tuple[float | None, float | None]]] = {
    figure: _pairs(entry, range(1, len(entry["test"]) + 1))
    for figure, entry in _CONTENT["figures"].items()
}

#: Test logs that the authors of report 2 published, ``LOGS[log][epoch] = (None, test)``: exact. The
#: one they call convolution is the run of figure 2 with everything together: from epoch 2 on its
#: test curve to 0.012. The one they call dropout includes rotation.
LOGS: dict[str, dict[int, tuple[None, float]]] = {
    log: {epoch: (None, value) for epoch, value in enumerate(test, 1)}
    for log, test in _CONTENT["logs"].items()
}

#: Every claim by its name, in the order of the reports.
CLAIMS: dict[str, Claim] = {entry["name"]: _claim(entry) for entry in read("claims.json")}
