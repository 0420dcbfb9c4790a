"""What the two reports of 2016 printed, as numbers and as claims, to stand beside a run's own.

Accuracies are in %. "Training" is the reports' online accuracy, counted while the epoch trains and
each digit before its own update; "test" is measured after the epoch. ::

    >>> from mnist_ops.lab import reports
    >>> reports.TABLES["3.2"]["gaussian1d_15"][1]
    (96.72, 98.88)
    >>> reports.FIGURES["best_theta0.2"][30]
    (99.775, 99.573)
    >>> reports.CLAIMS["tanh-over-relu-test"].text
    'tanh works better than ReLU in test accuracy'
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any

__all__ = ["CLAIMS", "EPOCH_SHIFT", "FIGURES", "LOGS", "TABLES", "TABLE_3_1", "Claim", "cut"]


def cut(accuracy: float) -> str:
    """An accuracy as report 1 prints it: two decimals, cut off and not rounded.

    The original column is met by one run to the last digit only so: its 99.626667 in epoch 5 is
    printed as 99.62, its 99.898333 in epoch 9 as 99.89, and 98.998333 as 98.99 in Table 3.2.

    Example::

        >>> cut(99.626667)
        '99.62'
    """
    # The smallest step of an accuracy, 1/600 %, is far above what a division's rounding can take.
    return f"{math.floor(accuracy * 100 + 1e-6) / 100:.2f}"


_Pairs = dict[int, tuple[Any, Any]]


def _pairs(entry: dict[str, list[Any]], epochs: Iterable[int]) -> _Pairs:
    """For each epoch training and test accuracy."""
    for value in (*entry["training"], *entry["test"]):
        if value is not None and not 0 <= value <= 100:
            raise ValueError(f"{value} is no accuracy in %")
    return dict(zip(epochs, zip(entry["training"], entry["test"], strict=True), strict=True))


def _parse(content: bytes) -> tuple[dict[str, dict[str, _Pairs]], dict[str, _Pairs], Any]:
    """Tables, figures and logs of ``reports.json``, a part of the package."""
    try:
        parts = json.loads(content.decode("utf-8"))
        tables = {
            table: {
                column: _pairs(entry, map(int, entry["epochs"]))
                for column, entry in columns.items()
            }
            for table, columns in parts["tables"].items()
        }
        figures = {
            figure: _pairs(entry, range(1, len(entry["test"]) + 1))
            for figure, entry in parts["figures"].items()
        }
        logs = {
            log: _pairs({"training": [None] * len(test), "test": test}, range(1, len(test) + 1))
            for log, test in parts["logs"].items()
        }
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ImportError(
            f"mnist_ops/lab/reports.json is damaged ({error!r}): reinstall mnist_ops"
        ) from None
    return tables, figures, logs


_TABLES, _FIGURES, _LOGS = _parse((resources.files(__package__) / "reports.json").read_bytes())

#: Report 1, Tables 3.1 to 3.5, as printed: ``TABLES[table][column][epoch] = (training, test)``;
#: ``None`` where a dash is printed. Table 3.4's multi-margin column equals its NLL column to the
#: last digit.
TABLES: dict[str, dict[str, dict[int, tuple[float, float | None]]]] = _TABLES

#: How much too high a table numbers its epochs. The two-layer column of Table 3.5 is, digit for
#: digit, the run of Table 3.1 one epoch earlier: what it prints for epoch 20 is the state after 19.
EPOCH_SHIFT: dict[str, int] = {"3.5": 1}

#: Report 2's figures 1 and 2, ``FIGURES[figure][epoch] = (training, test)``: curves read off the
#: published plots to about 0.01; ``None`` where they cannot be read. The published text is a later
#: revision of the report: it ends at 99.63 with all augmentations together.
FIGURES: dict[str, dict[int, tuple[float | None, float | None]]] = _FIGURES

#: Test logs that the authors of report 2 published, ``LOGS[log][epoch] = (None, test)``: exact. The
#: log of the additional convolution is, from epoch 2 on, the test curve of figure 2 to 0.012.
LOGS: dict[str, dict[int, tuple[None, float]]] = _LOGS

#: Report 1, Table 3.1, "The training and test accuracy of the original model": for each epoch
#: training and test accuracy in %, as printed.
TABLE_3_1: dict[int, tuple[float, float]] = {
    epoch: (training, test)
    for epoch, (training, test) in TABLES["3.1"]["original"].items()
    if test is not None
}


@dataclass(frozen=True)
class Claim:
    """One statement of a report that runs can decide, see :func:`mnist_ops.lab.statistics.verdict`.

    Attributes:
        name: unique, as in :data:`CLAIMS`.
        text: the statement, in our words.
        report: 1 or 2.
        section: where it stands.
        kind: what the statement says of ``a``, in the unit of ``metric``:

            - ``"higher"``: above ``b`` by more than ``margin``;
            - ``"equivalent"``: within ``margin`` of ``b``;
            - ``"no higher"``: not above ``b`` by ``margin`` or more;
            - ``"earlier"``: ``b`` needs more epochs to a training accuracy printed as 100.00;
            - ``"best"``: above every one of ``b``;
            - ``"value"``: within ``margin`` of ``value``, the report's own figure;
            - ``"any value"``: the same of at least one of ``b``, settings of ``a``;
            - ``"at most"``: never printed above ``value``;
            - ``"identical"``: the printed digits are those of ``b``, training and test;
            - ``"digits"``: seed 1 prints the digits of ``table``, training and test;
            - ``"fails"``: does not run.
        a: name of the experiment that the statement is about.
        b: names of those it is compared with.
        metric: ``"train"`` or ``"test"``: accuracy, mean over ``epochs``; ``"gap"``: training minus
            test; ``"best test"``: the highest test accuracy up to the last of ``epochs``;
            ``"first epoch"``: the first with a training accuracy printed as 100.00.
        epochs: those that the statement is about; empty where it names none, then the last epoch
            that all runs have.
        epochs_b: those of ``b`` where they differ.
        since: runs that end before this epoch cannot show what the statement is about.
        margin: percentage points, or epochs for ``"first epoch"``. Ours: no report states one.
        value: the report's figure where ``kind`` needs one.
        printed: the report's own effect, in the same unit, where its numbers give one.
        table: ``(table, column)`` of :data:`TABLES` for ``"digits"``.
        note: what has to be known to read the verdict.
    """

    name: str
    text: str
    report: int
    section: str
    kind: str
    a: str
    b: tuple[str, ...] = ()
    metric: str = "test"
    epochs: tuple[int, ...] = ()
    epochs_b: tuple[int, ...] = ()
    since: int = 1
    margin: float = 0.0
    value: float | None = None
    printed: float | None = None
    table: tuple[str, str] | None = None
    note: str = ""


_FIRST = (1, 2, 3)
_LATE = tuple(range(20, 32))
# Ten of the 10,000 test digits: as far as Table 3.1's test accuracy wanders in epochs 6 to 10.
_MARGIN = 0.1
_METRICS = {"train": ("training accuracy", 0), "test": ("test accuracy", 1)}


def _difference(table: str, a: str, b: str, metric: str) -> float:
    """The mean difference of two columns over the epochs where both are printed."""
    index = _METRICS[metric][1]
    first, second = TABLES[table][a], TABLES[table][b]
    pairs = [(first[e][index], second[e][index]) for e in first if e in second]
    known = [x - y for x, y in pairs if x is not None and y is not None]
    return sum(known) / len(known)


def _best(curve: dict[int, Any]) -> float:
    return max(test for _, test in curve.values() if test is not None)


def _report_1() -> Iterable[Claim]:
    columns = {
        "original": [("3.1", "original"), ("3.5", "two_layer")],
        "normalization-15": [("3.2", "gaussian1d_15")],
        "normalization-none": [("3.2", "none")],
        "relu": [("3.3", "relu")],
        "multi-margin": [("3.4", "multi_margin")],
        "mse": [("3.4", "mse")],
        "three-layer": [("3.5", "three_layer")],
    }
    for experiment, tables in columns.items():
        for table, column in tables:
            yield Claim(
                f"digits-{table}-{column.replace('_', '-')}",
                f"the numbers of Table {table}, column {column.replace('_', ' ')}",
                1,
                f"Table {table}",
                "digits",
                experiment,
                epochs=tuple(TABLES[table][column]),
                table=(table, column),
            )

    section = "section 3.1"
    yield Claim(
        "training-reaches-100",
        "training reaches 100 % in epoch 30",
        1,
        section,
        "value",
        "original",
        metric="first epoch",
        since=29,
        margin=3,
        value=30,
        printed=29,
        note="The text says epoch 30; Table 3.5 prints 100.00 in epoch 29 and 31, 99.99 in 30.",
    )
    yield Claim(
        "test-at-most-99.56",
        "the test accuracy never exceeds 99.56 %",
        1,
        section,
        "at most",
        "original",
        metric="best test",
        epochs=(31,),
        value=99.56,
        printed=max(_best(TABLES["3.1"]["original"]), _best(TABLES["3.5"]["two_layer"])),
    )
    yield Claim(
        "test-rises-first",
        "the test accuracy rises in the first several epochs",
        1,
        section,
        "higher",
        "original",
        ("original",),
        epochs=(6,),
        epochs_b=(1,),
        printed=TABLE_3_1[6][1] - TABLE_3_1[1][1],
        note="Epoch 6 against epoch 1; the report names no epochs.",
    )
    late = [TABLES["3.5"]["two_layer"][e][1] for e in _LATE]
    early = [TABLE_3_1[e][1] for e in range(6, 11)]
    yield Claim(
        "test-stops-rising",
        "after the first several epochs the test accuracy stops increasing",
        1,
        section,
        "no higher",
        "original",
        ("original",),
        epochs=_LATE,
        epochs_b=tuple(range(6, 11)),
        since=20,
        margin=_MARGIN,
        printed=sum(x for x in late if x is not None) / len(late) - sum(early) / len(early),
        note="Epochs 20 to 31 against 6 to 10; the report names no epochs.",
    )

    section = "section 3.2"
    for other, words, column in (
        ("normalization-15", "Gaussian1D(15)", "gaussian1d_15"),
        ("normalization-none", "no normalization", "none"),
    ):
        for metric, (spoken, _) in _METRICS.items():
            yield Claim(
                f"gaussian7-over-{other.removeprefix('normalization-')}-{metric}",
                f"Gaussian1D(7) is better than {words} in {spoken}",
                1,
                section,
                "higher",
                "original",
                (other,),
                metric,
                _FIRST,
                printed=_difference("3.2", "gaussian1d_7", column, metric),
            )

    for metric, (spoken, _) in _METRICS.items():
        yield Claim(
            f"tanh-over-relu-{metric}",
            f"tanh works better than ReLU in {spoken}",
            1,
            "section 3.3",
            "higher",
            "original",
            ("relu",),
            metric,
            _FIRST,
            printed=_difference("3.3", "tanh", "relu", metric),
        )

    section = "section 3.4"
    yield Claim(
        "multi-margin-same-digits",
        "multi-margin generates the same result as NLL",
        1,
        section,
        "identical",
        "multi-margin",
        ("original",),
        epochs=_FIRST,
        note="Table 3.4 prints both columns with the same digits.",
    )
    for metric, (spoken, _) in _METRICS.items():
        yield Claim(
            f"multi-margin-equivalent-{metric}",
            f"multi-margin is as good as NLL in {spoken}",
            1,
            section,
            "equivalent",
            "multi-margin",
            ("original",),
            metric,
            _FIRST,
            margin=_MARGIN,
            printed=_difference("3.4", "multi_margin", "nll", metric),
        )
    yield Claim(
        "mse-over-nll-train",
        "MSE looks slightly better than NLL in training accuracy",
        1,
        section,
        "higher",
        "mse",
        ("original",),
        "train",
        _FIRST,
        printed=_difference("3.4", "mse", "nll", "train"),
    )
    yield Claim(
        "mse-no-better-test",
        "MSE is not better than NLL in test accuracy",
        1,
        section,
        "no higher",
        "mse",
        ("original",),
        "test",
        _FIRST,
        margin=_MARGIN,
        printed=_difference("3.4", "mse", "nll", "test"),
    )

    section = "section 3.5"
    yield Claim(
        "three-layer-converges-earlier",
        "three layers reach a training accuracy of 100 % earlier than two",
        1,
        section,
        "earlier",
        "three-layer",
        ("original",),
        "first epoch",
        since=20,
        printed=21 - 29,
    )
    yield Claim(
        "three-layer-first-100",
        "three layers reach a training accuracy of 100 % in epoch 21",
        1,
        section,
        "value",
        "three-layer",
        metric="first epoch",
        since=20,
        margin=3,
        value=21,
        printed=21,
        note="Table 3.5 begins with epoch 20: an earlier 100.00 would not be in it.",
    )
    yield Claim(
        "three-layer-higher-train",
        "three layers have the higher training accuracy",
        1,
        section,
        "higher",
        "three-layer",
        ("original",),
        "train",
        _LATE,
        printed=_difference("3.5", "three_layer", "two_layer", "train"),
    )
    yield Claim(
        "three-layer-equivalent-test",
        "three layers differ not much from two in test accuracy",
        1,
        section,
        "equivalent",
        "three-layer",
        ("original",),
        "test",
        _LATE,
        margin=_MARGIN,
        printed=_difference("3.5", "three_layer", "two_layer", "test"),
    )


def _report_2() -> Iterable[Claim]:
    section = "section 2.0.4, batch size"
    for size, value in ((32, 78.0), (64, 60.0), (128, 45.0)):
        yield Claim(
            f"batch-{size}-drastic",
            f"a batch size of {size} decreases the performance drastically",
            2,
            section,
            "higher",
            "plain",
            (f"batch-{size}",),
            "train",
            (1,),
            margin=10.0,
            note="Drastically: by more than 10 percentage points. The report names no epoch.",
        )
        yield Claim(
            f"batch-{size}-value",
            f"a batch size of {size} gives accuracies in the range of {value:g} %",
            2,
            section,
            "value",
            f"batch-{size}",
            metric="train",
            epochs=(1,),
            margin=5.0,
            value=value,
            printed=value,
            note="The report names neither split nor epoch; the training accuracy of epoch 1 comes "
            "nearest to its three figures.",
        )

    section = "section 2.0.4, momentum and learning rate"
    momentum = (
        "momentum-0.5",
        "momentum-0.9",
        "momentum-0.9-lr-1e-2",
        "momentum-0.9-lr-1e-4",
        "momentum-0.9-undamped",
    )
    for name in (*momentum, "lr-1e-2", "lr-1e-4"):
        yield Claim(
            f"{name}-no-better",
            f"{name} gives no better performance than the default",
            2,
            section,
            "no higher",
            name,
            ("plain",),
            margin=_MARGIN,
            note="The default: momentum 0, learning rate 1e-3.",
        )
    yield Claim(
        "momentum-about-30",
        "with momentum the accuracy is only around 30 %",
        2,
        section,
        "any value",
        "momentum",
        momentum,
        "train",
        margin=5.0,
        value=30.0,
        printed=30.0,
        note="The report gives no settings, split or epoch; any of those run here may show it.",
    )

    section = "section 2.0.4, optimization algorithm"
    for epoch in (5, 7, 15, 30):
        yield Claim(
            f"lbfgs-after-{epoch}-on-par",
            f"L-BFGS after epoch {epoch} performs on par with SGD",
            2,
            section,
            "equivalent",
            f"lbfgs-after-{epoch}",
            ("plain",),
            since=epoch + 1,
            margin=_MARGIN,
            note="The report's 99.2 % has no epoch.",
        )
        yield Claim(
            f"lbfgs-after-{epoch}-no-better",
            f"L-BFGS after epoch {epoch} brings no improvement",
            2,
            section,
            "no higher",
            f"lbfgs-after-{epoch}",
            ("plain",),
            since=epoch + 1,
            margin=_MARGIN,
        )
    for name in ("asgd", "cg"):
        yield Claim(
            f"{name}-fails",
            f"{name.upper()} gives a number of exceptions",
            2,
            "section 2.0.4, drop out",
            "fails",
            name,
        )

    section = "section 2.0.4, data augmentation"
    for angle in ("0.131", "0.174", "0.2"):
        yield Claim(
            f"rotation-{angle}-better",
            f"rotation with a standard deviation of {angle} rad, less than 20 degrees, improves",
            2,
            section,
            "higher",
            f"rotation-{angle}",
            ("plain",),
            "best test",
        )
    yield Claim(
        "rotation-0.349-no-better",
        "rotation with 0.349 rad, 20 degrees, does not improve",
        2,
        section,
        "no higher",
        "rotation-0.349",
        ("plain",),
        "best test",
        margin=_MARGIN,
        note="Implied: the report says 'smaller than 20 degree'.",
    )
    yield Claim(
        "rotation-0.2-best",
        "of all rotations 0.2 rad is best",
        2,
        section,
        "best",
        "rotation-0.2",
        ("rotation-0.131", "rotation-0.174", "rotation-0.349"),
        "best test",
    )
    figure = FIGURES["best_theta0.2"]
    yield Claim(
        "rotation-0.2-99.57",
        "rotation with 0.2 rad reaches 99.57 % on the test set",
        2,
        "section 2.0.3",
        "value",
        "rotation-0.2",
        metric="best test",
        epochs=(max(figure),),
        since=max(figure),
        margin=0.05,
        value=99.57,
        printed=_best(figure),
        note=f"The highest of {max(figure)} epochs, chosen on the test set.",
    )

    section = "section 2.0.4, introduction of noise"
    for name in ("noise-0.1", "noise-0.3"):
        level = name.removeprefix("noise-")
        yield Claim(
            f"{name}-worse-train",
            f"noise of {level} makes training worse",
            2,
            section,
            "higher",
            "plain",
            (name,),
            "train",
        )
        yield Claim(
            f"{name}-equivalent-test",
            f"noise of {level} leaves test accuracy comparable",
            2,
            section,
            "equivalent",
            name,
            ("plain",),
            margin=_MARGIN,
        )
        yield Claim(
            f"{name}-smaller-gap",
            f"noise of {level} reduces the gap between training and test",
            2,
            section,
            "higher",
            "plain",
            (name,),
            "gap",
        )
    yield Claim(
        "extra-convolution-no-better",
        "an additional convolution brings no considerable improvement",
        2,
        "section 2.0.4, additional convolutional layer",
        "no higher",
        "extra-convolution",
        ("plain",),
        margin=_MARGIN,
    )


#: Every claim by its name, in the order of the reports.
CLAIMS: dict[str, Claim] = {claim.name: claim for claim in (*_report_1(), *_report_2())}
