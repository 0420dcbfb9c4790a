"""Every experiment of the two reports, by name: what was tried, exactly enough to run it again.

::

    >>> from mnist_ops.lab import experiments
    >>> experiments.EXPERIMENTS["relu"].network
    {'activation': 'relu'}
    >>> history = experiments.train(experiments.EXPERIMENTS["original"], limit=100)

``examples/reproduce.py`` runs them side by side, with figures and statistics; the numbers that the
reports printed are in :mod:`mnist_ops.lab.reports`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import torch7, training
from ..mnist import data, models
from ..torch7 import optim
from . import reports

__all__ = [
    "CANDIDATES",
    "CHOICES",
    "EVERY",
    "EXPERIMENTS",
    "SMALL_SET",
    "TABLES",
    "Experiment",
    "Parts",
    "Table",
    "build",
    "describe_engine",
    "digits",
    "select",
    "train",
]

#: The scripts' default: ``optim.sgd`` with these options.
SGD: dict[str, Any] = {"name": "sgd", "lr": 1e-3, "lr_decay": 1e-7}

#: Training and test digits of the scripts' small set.
SMALL_SET = (6000, 1000)

_CRITERIA: dict[str, training.Criterion] = {
    "nll": torch7.nll_loss,
    "multi_margin": torch7.multi_margin_loss,
    "mse": torch7.mse_loss,
}
_OPTIMIZERS: dict[str, Any] = {
    "sgd": optim.SGD,
    "asgd": optim.ASGD,
    "cg": optim.CG,
    "lbfgs": optim.LBFGS,
    "averaged": training.AveragedSGD,
}
# Without the log-softmax that only the NLL wants; the original adds a tanh for MSE.
_MARGIN_OUTPUT = {"log_softmax": None}
_MSE_OUTPUT = {"log_softmax": None, "output_activation": "tanh"}


@dataclass(frozen=True)
class Experiment:
    """One configuration of data, network and training.

    Attributes:
        name: as on the command line and in folder names.
        title: one line for tables and figures.
        section: where it is reported.
        group: experiments of one group share a figure.
        epochs: how far to train unless told otherwise: as far as the report shows.
        data_kernel: taps of the digits' local normalization; ``None``: global normalization only.
        network: keyword arguments of :func:`mnist_ops.mnist.models.convnet`.
        loss: ``"nll"``, ``"multi_margin"`` or ``"mse"``.
        optimizers: from the first epoch that uses it to an optimizer's ``name`` (``"sgd"``,
            ``"asgd"``, ``"cg"``, ``"lbfgs"``; ``"averaged"``: SGD that is tested with the mean of
            its weights at the ends of its epochs) and options.
        batch_size: samples per step.
        rotation: standard deviation in radians of the training digits' random angles.
        noise: standard deviation of the normal noise on the training digits' pixels, which have
            mean 0 and standard deviation 1.
        stream_kernel: taps of the data's normalization as far as the random numbers go that its
            construction consumes (``"data"``: those of ``data_kernel``); other values are guesses
            of :data:`CANDIDATES`.
        extra_words: random words skipped before the network is built; 0 but for guesses.
        startup_words: as for :func:`mnist_ops.torch7.start`; other than its own for guesses.
        small: train on the first 6,000 digits and test on the first 1,000, normalised by the mean
            and deviation of the former: the scripts' default until two days before the deadline of
            report 2.
        augmentation: arguments of :class:`mnist_ops.mnist.transforms.RandomAffine`.
        validation: test on so many of the training digits, the last ones, and train on the others:
            for what is chosen without a look at the test set.
        continues: another experiment, which this one is until its second optimizer takes over: a
            run may begin with a checkpoint of that one.
        dtype: ``"float64"`` as the original, or ``"float32"``.
        reported: the report's accuracies in %: for each epoch training and test, either may be
            ``None``.
        note: what is uncertain about it.
        details: whether a run keeps filters and worst mistakes, and of each epoch what was taken
            for what in the training.
    """

    name: str
    title: str
    section: str
    group: str
    epochs: int
    data_kernel: int | None = 7
    network: Mapping[str, Any] = field(default_factory=dict)
    loss: str = "nll"
    optimizers: Mapping[int, Mapping[str, Any]] = field(default_factory=lambda: {1: SGD})
    batch_size: int = 1
    rotation: float = 0.0
    noise: float = 0.0
    stream_kernel: int | str | None = "data"
    extra_words: int = 0
    startup_words: int = torch7.STARTUP_WORDS
    small: bool = False
    augmentation: Mapping[str, float] = field(default_factory=dict)
    validation: int = 0
    continues: str = ""
    dtype: str = "float64"
    reported: Mapping[int, tuple[float | None, float | None]] = field(default_factory=dict)
    note: str = ""
    details: bool = False

    def settings(self) -> dict[str, Any]:
        """What defines the numbers of a run, as plain values: a checkpoint's ``settings``."""
        return {
            "experiment": self.name,
            "normalization": "global" if self.data_kernel is None else "contrastive",
            "data_kernel": self.data_kernel,
            "network": dict(self.network),
            "loss": self.loss,
            "optimizers": {epoch: dict(options) for epoch, options in self.optimizers.items()},
            "batch_size": self.batch_size,
            "rotation": self.rotation,
            "noise": self.noise,
            "stream_kernel": self.stream_kernel,
            "extra_words": self.extra_words,
            "dtype": self.dtype,
            # What came later: runs from before it are those with the defaults.
            **{
                name: getattr(self, name)
                for name, default in (
                    ("startup_words", torch7.STARTUP_WORDS),
                    ("small", False),
                    ("augmentation", {}),
                    ("validation", 0),
                )
                if getattr(self, name) != default
            },
        }

    @property
    def training_digits(self) -> int:
        """How many digits an epoch has."""
        return (SMALL_SET[0] if self.small else 60_000) - self.validation

    @property
    def switch(self) -> int | None:
        """The first epoch of the second optimizer."""
        return min((epoch for epoch in self.optimizers if epoch > 1), default=None)


def _sgd(**options: Any) -> dict[int, dict[str, Any]]:
    return {1: SGD | options}


def _table(number: str, column: str) -> dict[int, tuple[float | None, float | None]]:
    """The printed numbers by the epochs that they belong to."""
    shift = reports.EPOCH_SHIFT.get(number, 0)
    return {epoch - shift: pair for epoch, pair in reports.TABLES[number][column].items()}


def _report_1() -> list[Experiment]:
    """Report 1. Its default for the digits is contrastive normalization with 7 taps."""
    original = _table("3.5", "two_layer") | _table("3.1", "original")
    return [
        Experiment(
            "original", "original network", "report 1, section 3.1", "original", 47,
            reported=dict(sorted(original.items())), details=True,
        ),
        Experiment(
            "normalization-15", "digits normalised with Gaussian1D(15)",
            "report 1, section 3.2", "normalization", 3, data_kernel=15,
            reported=_table("3.2", "gaussian1d_15"),
            note="the report's run differs in something unknown from this one",
        ),
        Experiment(
            "normalization-21", "digits normalised with Gaussian1D(21)",
            "report 1, section 3.2", "normalization", 3, data_kernel=21,
            note="the kernel that the report's picture of 'Gaussian1D(15)' shows",
        ),
        Experiment(
            "normalization-none", "digits without local normalization",
            "report 1, section 3.2", "normalization", 3, data_kernel=None,
            reported=_table("3.2", "none"),
        ),
        Experiment(
            "relu", "ReLU for all three tanh", "report 1, section 3.3", "activation", 3,
            network={"activation": "relu"}, reported=_table("3.3", "relu"),
            note="which of the three tanh were replaced is not reported",
        ),
        Experiment(
            "multi-margin", "multi-margin loss", "report 1, section 3.4", "loss", 3,
            network=_MARGIN_OUTPUT, loss="multi_margin", reported=_table("3.4", "multi_margin"),
            note="the printed column repeats the NLL column: that run was none with this loss",
        ),
        Experiment(
            "mse", "MSE loss", "report 1, section 3.4", "loss", 3,
            network=_MSE_OUTPUT, loss="mse", reported=_table("3.4", "mse"),
            note="the printed column is not what the original scripts give for MSE",
        ),
        Experiment(
            "three-layer", "three stages, 32-64-128-256", "report 1, section 3.5", "depth", 43,
            network={"widths": (32, 64, 128, 256), "pool_size": (2, 2, 1)},
            reported=_table("3.5", "three_layer"), details=True,
        ),
        Experiment(
            "three-layer-3x3", "the same with 3x3 filters, pooled three times",
            "report 1, section 3.5", "depth", 31,
            network={"widths": (32, 64, 128, 256), "kernel_size": 3},
            note="a guess at the filters, from before the authors' model file was found",
        ),
    ]  # fmt: skip


def _report_2() -> list[Experiment]:
    """Report 2. Its digits are normalised globally only."""

    def make(name: str, title: str, group: str, epochs: int, **options: Any) -> Experiment:
        return Experiment(
            name, title, "report 2, section 2.0.4", group, epochs, **{"data_kernel": None} | options
        )

    plain = make("plain", "baseline of report 2", "baseline", 44, details=True)
    rows = [plain]
    for size in (32, 64, 128):
        rows.append(make(f"batch-{size}", f"batch size {size}", "batch size", 10, batch_size=size))
        rows.append(
            make(
                f"batch-{size}-scaled", f"batch size {size}, learning rate times {size}",
                "batch size", 10, batch_size=size, optimizers=_sgd(lr=1e-3 * size),
            )
        )  # fmt: skip
    for name, options in {
        "momentum-0.5": {"momentum": 0.5},
        "momentum-0.9": {"momentum": 0.9},
        "momentum-0.9-lr-1e-2": {"momentum": 0.9, "lr": 1e-2},
        "momentum-0.9-lr-1e-4": {"momentum": 0.9, "lr": 1e-4},
        "momentum-0.9-undamped": {"momentum": 0.9, "dampening": 0.0},
        "lr-1e-2": {"lr": 1e-2},
        "lr-1e-4": {"lr": 1e-4},
    }.items():
        title = ", ".join(
            f"{key.replace('lr', 'learning rate')} {value:g}" for key, value in options.items()
        )
        rows.append(make(name, title, "momentum", 5, optimizers=_sgd(**options)))
    # The authors' script makes the optimizer's state anew every epoch.
    lbfgs = {"name": "lbfgs", "lr": 1e-3, "max_iter": 2, "history_size": 10}
    rows += [
        make(
            f"lbfgs-after-{k}", f"SGD, from epoch {k + 1} on L-BFGS", "optimizer switch", k + 3,
            optimizers={1: SGD, k + 1: lbfgs, k + 2: lbfgs, k + 3: lbfgs}, continues="plain",
        )
        for k in (5, 7, 15, 30)
    ]  # fmt: skip
    rows += [
        make(
            "asgd", "averaged SGD", "optimizers", 5,
            optimizers={1: {"name": "asgd", "lr": 1e-3, "t0": 60000}},
            note="the report's run stopped with exceptions",
        ),
        make(
            "cg", "conjugate gradient", "optimizers", 5,
            optimizers={1: {"name": "cg", "max_iter": 2}},
            note="the report's run stopped with exceptions",
        ),
    ]  # fmt: skip
    rows += [
        make(
            f"rotation-{std}", f"digits rotated by N(0, {std} rad)", "rotation",
            44 if std == 0.2 else 20, rotation=std,
            reported=reports.FIGURES["best_theta0.2"] if std == 0.2 else {},
        )
        for std in (0.131, 0.174, 0.2, 0.3, 0.349)
    ]  # fmt: skip
    extra = {
        "widths": (64, 64, 64, 128),
        "pool_size": (2, 2, 1),
        "kernel_size": (5, 5, 3),
        "pooling": ("lp", "lp", None),
    }
    unknown = "its settings are not reported"
    rows += [
        make(
            f"noise-{std}", f"noise N(0, {std}) on the digits", "noise", 10, noise=std, note=unknown
        )
        for std in (0.1, 0.3)
    ]
    rows += [
        make("extra-convolution", "one more convolution, 3x3", "architecture", 20,
             network=extra, note=unknown),
        make("dropout", "dropout 0.5 before the classifier", "architecture", 20,
             network={"dropout": 0.5}, note=unknown),
        make("rotation-dropout", "rotation and dropout 0.5", "architecture", 34, rotation=0.2,
             network={"dropout": 0.5}, reported=reports.LOGS["dropout"],
             note="the log that the authors call dropout includes rotation; " + unknown),
        make("rotation-noise-dropout-convolution",
             "rotation, noise, dropout, one more convolution",
             "architecture", 108, rotation=0.2, noise=0.1, network=extra | {"dropout": 0.5},
             note="the authors' log called convolution is its first 20 epochs; " + unknown,
             reported=reports.FIGURES["top_noise_dropout_conv_rot"]),
    ]  # fmt: skip
    return rows + _small_set()


def _small_set() -> list[Experiment]:
    """What report 2 may have tried on the scripts' small set, their default at the time."""

    def make(name: str, title: str, group: str, epochs: int, **options: Any) -> Experiment:
        return Experiment(
            f"small-{name}", f"small set: {title}", "report 2, section 2.0.4", group, epochs,
            **{"data_kernel": None, "small": True} | options,
        )  # fmt: skip

    rows = [
        make(f"batch-{size}{suffix}", f"batch size {size}{words}", "small set: batch size", 8,
             batch_size=size, data_kernel=kernel)
        for suffix, words, kernel in (("", "", None), ("-local", ", local normalization", 7))
        for size in (32, 64, 128)
    ]  # fmt: skip
    # Without damping momentum takes steps 1 / (1 - momentum) times as large.
    for momentum, dampening in ((0.0, None), (0.5, None), (0.9, None), (0.99, None), (0.9, 0.0)):
        for lr in ("1e-1", "1e-2", "1e-3", "1e-4", "1e-5"):
            options = {"lr": float(lr)} | ({"momentum": momentum} if momentum else {})
            undamped = dampening is not None
            options |= {"dampening": 0.0} if undamped else {}
            rows.append(
                make(
                    f"momentum-{momentum:g}{'-undamped' * undamped}-lr-{lr}",
                    f"momentum {momentum:g}{', undamped' * undamped}, learning rate {lr}",
                    "small set: momentum", 5, optimizers=_sgd(**options),
                )
            )  # fmt: skip
    lbfgs = {"name": "lbfgs", "lr": 1e-3, "max_iter": 2, "history_size": 10}
    rows += [
        make(
            f"lbfgs-after-{k}", f"SGD, from epoch {k + 1} on L-BFGS",
            "small set: optimizer switch", k + 3,
            optimizers={1: SGD, k + 1: lbfgs, k + 2: lbfgs, k + 3: lbfgs},
        )
        for k in (5, 7, 15, 30)
    ]  # fmt: skip
    return rows


#: How the reports' original network is trained today; what :data:`CHOICES` varies.
_MODERN_AUGMENTATION = {"rotation": 0.15, "scale": 0.08, "shear": 0.15, "shift": 1.0}


def _cosine(lr: float, epochs: int) -> dict[int, dict[str, Any]]:
    """SGD with a rate for each epoch, from ``lr`` down half a cosine."""
    return {
        e: {"name": "sgd", "lr": lr * 0.5 * (1 + math.cos(math.pi * (e - 1) / epochs))}
        for e in range(1, epochs + 1)
    }


def _modern() -> Experiment:
    return Experiment(
        "modern", "the original network, trained as one would today", "beyond the reports",
        "modern", 40, optimizers=_cosine(1.5e-3, 40), augmentation=_MODERN_AUGMENTATION,
        note="affine augmentation, half a cosine of learning rates; the test set chooses nothing",
    )  # fmt: skip


def _choices() -> list[Experiment]:
    """Variants of ``modern``, half as long, tested on the last 5,000 training digits."""

    def choice(
        name: str, title: str, lr: float = 1.5e-3, averaged: Any = None, **changes: Any
    ) -> Experiment:
        base = replace(
            _modern(), epochs=20, optimizers=_cosine(lr, 20), validation=5000,
            note="a choice: its test digits are training digits",
        )  # fmt: skip
        if averaged is not None:
            early = {e: o for e, o in base.optimizers.items() if e < min(averaged)}
            base = replace(base, optimizers=early | averaged)
        return replace(base, name=f"modern--{name}", title=title, **changes)

    def times(factor: float) -> dict[str, float]:
        return {key: round(factor * value, 4) for key, value in _MODERN_AUGMENTATION.items()}

    return [
        choice("first", "affine augmentation, cosine from 1.5e-3"),
        choice("dropout", "the same with dropout 0.5", network={"dropout": 0.5}),
        choice("stronger", "augmentation half as strong again", augmentation=times(1.5)),
        choice("weaker", "augmentation half as strong", augmentation=times(0.5)),
        choice("faster", "cosine from 3e-3", lr=3e-3),
        choice("exact", "exact log-softmax", network={"log_softmax": "exact"}),
        choice("averaged", "from epoch 13 on a rate of 5e-4, tested with the mean of the weights",
               averaged={13: {"name": "averaged", "lr": 5e-4}}),
        choice("plain", "without local normalization", data_kernel=None,
               augmentation=_MODERN_AUGMENTATION | {"fill": -0.3635}),
    ]  # fmt: skip


#: Every experiment by name, in the reports' order, and one beyond them.
EXPERIMENTS: dict[str, Experiment] = {e.name: e for e in [*_report_1(), *_report_2(), _modern()]}

#: What an experiment was chosen from.
CHOICES: dict[str, list[Experiment]] = {"modern": _choices()}


@dataclass(frozen=True)
class Table:
    """A printed table.

    Attributes:
        number: in report 1.
        title: as printed.
        columns: the report's headings and the experiments behind them.
        epochs: those that are printed.
        printed: for each column the accuracies as printed.
        shift: how much too high the table numbers its epochs; here they are counted right.
    """

    number: str
    title: str
    columns: Mapping[str, str]
    epochs: Sequence[int]
    printed: Mapping[str, Mapping[int, tuple[float | None, float | None]]]
    shift: int = 0


def _tables() -> dict[str, Table]:
    def make(number: str, title: str, columns: dict[str, tuple[str, str]]) -> Table:
        printed = {heading: _table(number, key) for heading, (key, _) in columns.items()}
        epochs = sorted(next(iter(printed.values())))
        names = {heading: name for heading, (_, name) in columns.items()}
        shift = reports.EPOCH_SHIFT.get(number, 0)
        return Table(number, title, names, epochs, printed, shift)

    title = "The training and test accuracy of "
    tables = [
        make("3.1", title + "the original model", {"original": ("original", "original")}),
        make(
            "3.2",
            title + "different normalization methods",
            {
                "Gaussian1D(7)": ("gaussian1d_7", "original"),
                "Gaussian1D(15)": ("gaussian1d_15", "normalization-15"),
                "no normalization": ("none", "normalization-none"),
            },
        ),
        make(
            "3.3",
            title + "different activation function",
            {"Tanh": ("tanh", "original"), "reLU": ("relu", "relu")},
        ),
        make(
            "3.4",
            title + "different loss function",
            {
                "NLL": ("nll", "original"),
                "Multi-margin": ("multi_margin", "multi-margin"),
                "MSE": ("mse", "mse"),
            },
        ),
        make(
            "3.5",
            title + "3-layer versus 2-layer model",
            {
                "2-layer": ("two_layer", "original"),
                "3-layer": ("three_layer", "three-layer"),
            },
        ),
    ]
    return {table.number: table for table in tables}


#: Report 1's tables by number.
TABLES: dict[str, Table] = _tables()


#: Random words of the original run's digits and network after the start-up, and of one shuffle.
_WORDS_OF_A_RUN = 48 + 312_268
_WORDS_OF_A_SHUFFLE = 59_999


def _candidates() -> dict[str, list[Experiment]]:
    """Guesses at what was behind the columns that the described configuration does not give.

    Three kinds: another configuration; the same without the start-up words, as in a second run
    within one process; and a run that goes on with the random numbers after an original run of
    some epochs, its digits normalised anew or still there.
    """

    def guess(column: str, name: str, title: str, **changes: Any) -> Experiment:
        base = EXPERIMENTS[column]
        return replace(
            base, name=f"{column}--{name}", title=title, epochs=1, note="a guess", **changes
        )

    def after(column: str, epochs: int, name: str, title: str, **changes: Any) -> list[Experiment]:
        words = _WORDS_OF_A_RUN + epochs * _WORDS_OF_A_SHUFFLE
        told = f"{title}, after {epochs} epochs of another run"
        changed = {"extra_words": words} | changes
        return [
            guess(column, f"{name}after-{epochs}-epochs", told, **changed),
            guess(column, f"{name}after-{epochs}-epochs-same-digits",
                  f"{told}, the digits still there", stream_kernel=None, **changed),
        ]  # fmt: skip

    tanh, relu = "tanh", "relu"
    mixed = {
        "conv1": (relu, tanh, tanh),
        "conv2": (tanh, relu, tanh),
        "linear": (tanh, tanh, relu),
        "conv1-conv2": (relu, relu, tanh),
        "conv1-linear": (relu, tanh, relu),
        "conv2-linear": (tanh, relu, relu),
        "all": (relu, relu, relu),
    }
    relus = [
        guess("relu", f"{name}-{digits}", f"ReLU in {name}, {digits} digits",
              network={"activation": activation}, data_kernel=kernel)
        for digits, kernel in (("local", 7), ("plain", None))
        for name, activation in mixed.items()
    ]  # fmt: skip
    no_words = {"startup_words": 0}
    cuda = {"pooling": "max", "norm_kernel": None}
    relus += [
        guess("relu", f"cuda-{digits}", f"ReLU, max pooling, no normalization, {digits} digits",
              network=cuda | {"activation": relu}, data_kernel=kernel)
        for digits, kernel in (("local", 7), ("plain", None), ("21", 21))
    ]  # fmt: skip
    relus += [
        *after("relu", 3, "", "ReLU for all three tanh"),
        guess("relu", "all-21", "ReLU in all, digits 21", data_kernel=21),
        guess("relu", "all-21-second-run", "ReLU in all, digits 21, no start-up words",
              data_kernel=21, **no_words),
        guess("relu", "conv1-conv2-21", "ReLU in conv1-conv2, digits 21", data_kernel=21,
              network={"activation": mixed["conv1-conv2"]}),
        guess("relu", "conv1-linear-21", "ReLU in conv1-linear, digits 21", data_kernel=21,
              network={"activation": mixed["conv1-linear"]}),
        guess("relu", "all-local-second-run", "ReLU in all, no start-up words", **no_words),
        guess("relu", "all-plain-second-run", "ReLU in all, plain digits, no start-up words",
              data_kernel=None, **no_words),
    ]  # fmt: skip
    net15 = {"norm_kernel": 15}
    fifteens = [
        guess("normalization-15", "data", "digits 15, network 7"),
        guess("normalization-15", "network", "digits 7, network 15", data_kernel=7, network=net15),
        guess("normalization-15", "both", "both 15", network=net15),
        guess("normalization-15", "plain-network", "plain digits, network 15",
              data_kernel=None, network=net15),
        guess("normalization-15", "stream-of-7", "digits 15, random numbers as for 7",
              stream_kernel=7),
        guess("normalization-15", "stream-of-none", "digits 15, random numbers as for plain digits",
              stream_kernel=None),
        guess("normalization-15", "after-7", "digits 15, a normalization of 7 taps built before",
              extra_words=48),
        guess("normalization-15", "twice", "digits 15, its normalization built twice",
              extra_words=96),
        guess("normalization-15", "first", "digits 7, network 15 in its first stage", data_kernel=7,
              network={"norm_kernel": (15, 7)}),
        guess("normalization-15", "second", "digits 7, network 15 in its second stage",
              data_kernel=7, network={"norm_kernel": (7, 15)}),
        guess("normalization-15", "data-first", "digits 15, network 15 in its first stage",
              network={"norm_kernel": (15, 7)}),
        guess("normalization-15", "data-second", "digits 15, network 15 in its second stage",
              network={"norm_kernel": (7, 15)}),
        guess("normalization-15", "second-run", "digits 15, no start-up words", **no_words),
        *(guess("normalization-15", f"taps-{n}", f"digits {n}", data_kernel=n)
          for n in (3, 5, 9, 11, 13, 17, 19, 21)),
        # 21 taps are what the report's picture of these digits shows.
        guess("normalization-15", "21-network-15", "digits 21, network 15", data_kernel=21,
              network=net15),
        guess("normalization-15", "21-after-7", "digits 21, a normalization of 7 taps built before",
              data_kernel=21, extra_words=48),
        guess("normalization-15", "21-after-15",
              "digits 21, a normalization of 15 taps built before", data_kernel=21, extra_words=96),
        guess("normalization-15", "21-second-run", "digits 21, no start-up words", data_kernel=21,
              **no_words),
        guess("normalization-15", "21-both", "both 21", data_kernel=21,
              network={"norm_kernel": 21}),
        guess("normalization-15", "21-both-second-run", "both 21, no start-up words",
              data_kernel=21, network={"norm_kernel": 21}, **no_words),
        *(guess("normalization-15", f"21-stream-of-{n or 'none'}",
                f"digits 21, random numbers as for {n or 'plain digits'}", data_kernel=21,
                stream_kernel=n) for n in (7, None, 15)),
        *after("normalization-15", 3, "21-", "digits 21", data_kernel=21),
    ]  # fmt: skip
    nll: dict[str, Any] = {"loss": "nll", "network": {}}
    losses = [
        guess("mse", "sum", "MSE, summed, behind a tanh"),
        guess("mse", "mean", "MSE, averaged over classes, behind a tanh",
              optimizers=_sgd(lr=1e-4)),
        guess("mse", "no-tanh", "MSE, summed, no tanh", network={"log_softmax": None}),
        guess("mse", "no-tanh-mean", "MSE, averaged, no tanh", network={"log_softmax": None},
              optimizers=_sgd(lr=1e-4)),
        guess("mse", "plain", "MSE, summed, behind a tanh, plain digits", data_kernel=None),
        guess("mse", "log-softmax", "MSE, summed, of the log-softmax", network={}),
        guess("mse", "relu", "MSE, summed, behind a tanh, ReLU in all three",
              network=_MSE_OUTPUT | {"activation": relu}),
        guess("mse", "second-run", "MSE, summed, behind a tanh, no start-up words", **no_words),
        guess("mse", "nll-exact", "NLL of the exact log-softmax", loss="nll",
              network={"log_softmax": "exact"}),
        guess("mse", "nll-exact-mean", "NLL of the exact log-softmax, averaged over the classes",
              loss="nll", network={"log_softmax": "exact"}, optimizers=_sgd(lr=1e-4)),
        guess("mse", "nll-tanh", "NLL behind a tanh and the log-softmax", loss="nll",
              network={"output_activation": "tanh"}),
        guess("mse", "nll-second-run", "NLL, no start-up words", **nll, **no_words),
        *(guess("mse", f"nll-taps-{n}", f"NLL, digits {n}", data_kernel=n, **nll)
          for n in (9, 11)),
        *(one for k in (1, 2, 3) for one in after("mse", k, "nll-", "NLL", **nll)),
    ]  # fmt: skip
    return {"normalization-15": fifteens, "relu": relus, "mse": losses}


#: For each experiment whose printed numbers are not met, the configurations that were tried.
CANDIDATES: dict[str, list[Experiment]] = _candidates()


#: All of these, by name.
EVERY: dict[str, Experiment] = EXPERIMENTS | {
    e.name: e for group in (*CANDIDATES.values(), *CHOICES.values()) for e in group
}


def select(names: Sequence[str]) -> list[Experiment]:
    """The experiments of these names, :data:`CANDIDATES` included, in this order.

    Raises:
        ValueError: for an unknown name; the message suggests close ones.
    """
    import difflib

    known = EVERY
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"there is no experiment {name!r}{hint}")
    return [known[name] for name in dict.fromkeys(names)]


@dataclass
class Parts:
    """What :func:`mnist_ops.training.fit` needs for one run of an experiment."""

    model: nn.Sequential
    optimizers: dict[int, torch.optim.Optimizer]
    generator: torch7.Generator
    criterion: training.Criterion
    transform: Any


def _optimizer(parameters: Sequence[Tensor], options: Mapping[str, Any]) -> torch.optim.Optimizer:
    rest = {key: value for key, value in options.items() if key != "name"}
    optimizer: torch.optim.Optimizer = _OPTIMIZERS[options["name"]](parameters, **rest)
    return optimizer


def _transform(experiment: Experiment, generator: torch7.Generator) -> Any:
    if not (experiment.rotation or experiment.noise or experiment.augmentation):
        return None
    from ..mnist import transforms

    steps: list[Any] = []
    if experiment.rotation:
        steps.append(transforms.RandomRotation(experiment.rotation, generator))
    if experiment.noise:
        steps.append(transforms.GaussianNoise(experiment.noise, generator))
    if experiment.augmentation:
        steps.append(transforms.RandomAffine(generator, **experiment.augmentation))
    return steps[0] if len(steps) == 1 else transforms.Compose(*steps)


def build(
    experiment: Experiment,
    seed: int = 1,
    device: torch.device | str = "cpu",
    perturbed_weight: int | None = None,
) -> Parts:
    """Network, optimizers, generator, loss and augmentation, as before the first epoch.

    Args:
        experiment: what to build.
        seed: of the run's only stream of random numbers.
        device: where the network lives.
        perturbed_weight: add 1e-15 to the first convolution's weight with this index, to see how
            far rounding alone carries.
    """
    kernel = experiment.stream_kernel
    if isinstance(kernel, str):
        kernel = experiment.data_kernel
    generator = torch7.start(seed, kernel, experiment.startup_words)
    generator.consume(experiment.extra_words)
    dtype = getattr(torch, experiment.dtype)
    model = models.convnet(dtype=dtype, device=device, generator=generator, **experiment.network)
    parameters = list(model.parameters())
    if perturbed_weight is not None:
        with torch.no_grad():
            parameters[0].view(-1)[perturbed_weight] += 1e-15
    return Parts(
        model,
        {epoch: _optimizer(parameters, o) for epoch, o in experiment.optimizers.items()},
        generator,
        _CRITERIA[experiment.loss],
        _transform(experiment, generator),
    )


def describe_engine(experiment: Experiment, device: torch.device | str = "cpu") -> str:
    """What will run the training steps, from the first epoch on: a line."""
    parts = build(experiment, device=device)
    return training.choose_engine(
        parts.model, parts.optimizers[1], parts.criterion, experiment.batch_size, parts.transform
    ).description


def digits(
    kernel: int | None,
    root: str | None,
    limit: int | None,
    small: bool = False,
    validation: int = 0,
) -> data.Splits:
    """The digits with local normalization of ``kernel`` taps: the caller's own copy.

    They are computed once for the runs that follow each other. ``small`` and ``validation``: see
    :class:`Experiment`.
    """
    kept = _digits(kernel, root, limit, small, validation, _stamp(root))
    return replace(
        kept,
        train_images=kept.train_images.clone(),
        train_labels=kept.train_labels.clone(),
        test_images=kept.test_images.clone(),
        test_labels=kept.test_labels.clone(),
    )


def _stamp(root: str | None) -> Any:
    """What changes when the files of a data folder do."""
    if root is None:
        return None
    paths = (path for path in sorted(Path(root).expanduser().rglob("*ubyte*")) if path.is_file())
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths)


@lru_cache(maxsize=1)
def _digits(
    kernel: int | None,
    root: str | None,
    limit: int | None,
    small: bool,
    validation: int,
    stamp: Any,
) -> data.Splits:
    """For those who change nothing: 250 MB that are not copied."""
    normalization, taps = ("global", 7) if kernel is None else ("contrastive", kernel)
    if not small and not validation:
        return data.prepare(normalization, taps, root, limit)
    first = SMALL_SET if small else None
    splits = data.prepare(normalization, taps, root, first, own_statistics=small)
    images, labels = splits.train_images, splits.train_labels
    if validation:
        splits = replace(
            splits,
            train_images=images[:-validation],
            train_labels=labels[:-validation],
            test_images=images[-validation:],
            test_labels=labels[-validation:],
        )
    return replace(
        splits,
        train_images=splits.train_images[:limit],
        train_labels=splits.train_labels[:limit],
        test_images=splits.test_images[:limit],
        test_labels=splits.test_labels[:limit],
    )


def _begin_with(
    path: Path, folder: Path, epoch: int, expected: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Make a folder's checkpoint of another run's; ``expected`` are that one's settings."""
    state = training.load_checkpoint(path)
    found = state["settings"] | {"epoch": state["epoch"]}
    for name, value in {**expected, "epoch": epoch}.items():
        if found.get(name) != value:
            raise training.CheckpointError(
                f"{path} was made with {name} = {found.get(name)}, this run begins with {value}"
            )
    folder.mkdir(parents=True, exist_ok=True)
    training.save_checkpoint(folder / training.CHECKPOINT, state | {"settings": dict(settings)})


def train(
    experiment: Experiment,
    seed: int = 1,
    epochs: int | None = None,
    limit: int | None = None,
    device: torch.device | str = "cpu",
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    perturbed_weight: int | None = None,
    root: str | os.PathLike[str] | None = None,
    start: str | os.PathLike[str] | None = None,
    **options: Any,
) -> tuple[list[training.EpochResult], nn.Sequential]:
    """Run one experiment.

    Args:
        experiment: which one.
        seed: as for :func:`build`, as are ``device`` and ``perturbed_weight``.
        epochs: instead of the experiment's own number.
        limit: use the first ``limit`` digits of each split.
        device: cpu, cuda or cuda:N.
        folder: for checkpoints, see :func:`mnist_ops.training.fit`.
        resume: continue from the checkpoint in ``folder``.
        perturbed_weight: see :func:`build`.
        root: a folder with other data, see :func:`mnist_ops.mnist.data.load`.
        start: unless ``resume``, begin with this checkpoint, of the same run of the experiment that
            this one ``continues``. Needs ``folder``.
        options: further arguments of :func:`mnist_ops.training.fit`.

    Returns:
        The epochs' results and the trained network.
    """
    parts = build(experiment, seed, device, perturbed_weight)
    folder_of_data = None if root is None else str(root)
    splits = _digits(
        experiment.data_kernel,
        folder_of_data,
        limit,
        experiment.small,
        experiment.validation,
        _stamp(folder_of_data),
    )
    run: dict[str, Any] = {"seed": seed, "limit": limit, "perturbed_weight": perturbed_weight}
    # What predictions from a checkpoint must normalise images with.
    if root is not None or experiment.small:
        run |= {"mean": splits.mean, "std": splits.std}
    settings = experiment.settings() | run
    if start is not None and not resume:
        if folder is None or experiment.switch is None or not experiment.continues:
            raise ValueError("train: start needs a folder and an experiment that continues one")
        base = replace(EVERY[experiment.continues], dtype=experiment.dtype).settings()
        _begin_with(Path(start), Path(folder), experiment.switch - 1, base | run, settings)
        resume = True
    history = training.fit(
        parts.model,
        (splits.train_images, splits.train_labels),
        (splits.test_images, splits.test_labels),
        epochs=experiment.epochs if epochs is None else epochs,
        optimizer=parts.optimizers,
        generator=parts.generator,
        criterion=parts.criterion,
        batch_size=experiment.batch_size,
        transform=parts.transform,
        folder=folder,
        resume=resume,
        settings=settings,
        **options,
    )
    return history, parts.model
