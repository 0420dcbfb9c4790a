"""Every experiment of the two reports, by name: what was tried, exactly enough to run it again.

::

    >>> from mnist_ops.lab import experiments
    >>> experiments.EXPERIMENTS["relu"].network
    {'activation': 'relu'}
    >>> history = experiments.train(experiments.EXPERIMENTS["original"], limit=100)

They are data, in ``experiments.json``. ``examples/reproduce.py`` runs them side by side, with
figures and statistics; the numbers that the reports printed are in :mod:`mnist_ops.lab.reports`.
"""

from __future__ import annotations

import copy
import difflib
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

_CONTENT: dict[str, Any] = reports.read("experiments.json")
#: The scripts' default: ``optim.sgd`` with these options.
SGD: dict[str, Any] = _CONTENT["optimizers"]["sgd"]

#: By which two machines' pixels differ: the normalization in float32 is off by 4.6e-8 from that in
#: float64 (root mean square over 2,000 digits), and the errors of two of them add up.
PIXEL_ERROR = 6.5e-8
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
# Random words of the original run's digits and network after the start-up, and of one shuffle.
_WORDS_OF_A_RUN = 48 + 312_268
_WORDS_OF_A_SHUFFLE = 59_999


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
            its weights at the ends of its epochs, while ``model.pt`` holds the last weights) and
            options.
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
        pixel_errors: 0, or the seed of normal errors of the normalised digits' pixels with the
            standard deviation :data:`PIXEL_ERROR`: another machine's rounding.
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
    pixel_errors: int = 0
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
                    ("pixel_errors", 0),
                )
                if getattr(self, name) != default
            },
        }

    @property
    def training_digits(self) -> int:
        """How many digits an epoch has."""
        return (SMALL_SET[0] if self.small else data.COUNTS["train"]) - self.validation

    @property
    def switch(self) -> int | None:
        """The first epoch of the second optimizer."""
        return min((epoch for epoch in self.optimizers if epoch > 1), default=None)


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that settings have."""
    if isinstance(value, dict):
        return {key: _tuples(each) for key, each in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _cosine(lr: float, epochs: int) -> dict[int, dict[str, Any]]:
    """SGD with a rate for each epoch, from ``lr`` down half a cosine."""
    return {
        e: {"name": "sgd", "lr": lr * 0.5 * (1 + math.cos(math.pi * (e - 1) / epochs))}
        for e in range(1, epochs + 1)
    }


def _table(number: str, column: str) -> dict[int, tuple[float | None, float | None]]:
    """The printed numbers by the epochs that they belong to."""
    shift = reports.EPOCH_SHIFT.get(number, 0)
    return {epoch - shift: pair for epoch, pair in reports.TABLES[number][column].items()}


def _reported(place: str) -> Mapping[int, tuple[float | None, float | None]]:
    """The numbers of ``"table 3.2 none"``, ``"figure best_theta0.2"`` or ``"log dropout"``."""
    kind, *rest = place.split()
    if kind == "table":
        return _table(*rest)
    known: Mapping[str, Any] = reports.FIGURES if kind == "figure" else reports.LOGS
    numbers: Mapping[int, tuple[float | None, float | None]] = known[rest[0]]
    return numbers


def _experiment(base: Mapping[str, Any], row: Mapping[str, Any]) -> Experiment:
    """A row of ``experiments.json``, with the fields of ``base`` where it says nothing."""
    fields = {**base, **row}
    optimizers: dict[int, Any] = {}
    if "cosine" in fields:
        optimizers = _cosine(fields.pop("cosine"), fields["epochs"])
    if "sgd" in row:
        optimizers = {1: SGD | fields.pop("sgd")}
    for first, options in row.get("optimizers", {}).items():
        named = _CONTENT["optimizers"].get(options) if isinstance(options, str) else options
        before = {epoch: each for epoch, each in optimizers.items() if epoch < int(first)}
        optimizers = before | {int(first): named}
    if optimizers:
        fields["optimizers"] = optimizers
    if "after" in row:
        fields["extra_words"] = _WORDS_OF_A_RUN + fields.pop("after") * _WORDS_OF_A_SHUFFLE
    if "reported" in row:
        places = [_reported(place).items() for place in row["reported"]]
        fields["reported"] = dict(sorted(pair for place in places for pair in place))
    return Experiment(**{name: _tuples(value) for name, value in fields.items()})


def _variants(part: str, **common: Any) -> dict[str, list[Experiment]]:
    """Variants of experiments, by these experiments' names."""
    return {
        name: [
            _experiment(vars(EXPERIMENTS[name]) | common, row | {"name": f"{name}--{row['name']}"})
            for row in rows
        ]
        for name, rows in _CONTENT[part].items()
    }


def _every() -> list[Experiment]:
    groups = [dict(group) for group in _CONTENT["groups"]]
    return [_experiment(group, row) for group in groups for row in group.pop("experiments")]


#: Every experiment by name, in the reports' order, and one beyond them.
EXPERIMENTS: dict[str, Experiment] = {e.name: e for e in _every()}

#: What an experiment was chosen from: half as long, tested on the last 5,000 training digits.
CHOICES: dict[str, list[Experiment]] = _variants(
    "choices", epochs=8, validation=5000, note="a choice: its test digits are training digits"
)

#: The runs of which the authors published logs, with digits as other machines round them.
ROUNDINGS: dict[str, list[Experiment]] = _variants("roundings", note="another rounding")

#: For each experiment whose printed numbers are not met, the configurations that were tried:
#: another configuration; the same without the start-up words, as in a second run within one
#: process; and a run that goes on with the random numbers after an original run of some epochs, its
#: digits normalised anew or still there.
CANDIDATES: dict[str, list[Experiment]] = _variants("guesses", epochs=1, note="a guess")


@dataclass(frozen=True)
class Table:
    """A printed table.

    Attributes:
        number: in report 1.
        columns: the report's headings and the experiments behind them.
        printed: for each column the accuracies as printed.
        shift: how much too high the table numbers its epochs; here they are counted right.
    """

    number: str
    columns: Mapping[str, str]
    printed: Mapping[str, Mapping[int, tuple[float | None, float | None]]]
    shift: int = 0

    @property
    def epochs(self) -> list[int]:
        """Those that are printed, the same in every column."""
        return sorted(next(iter(self.printed.values())))


def _make_table(number: str, columns: Mapping[str, Sequence[str]]) -> Table:
    printed = {heading: _table(number, key) for heading, (key, _) in columns.items()}
    names = {heading: name for heading, (_, name) in columns.items()}
    return Table(number, names, printed, reports.EPOCH_SHIFT.get(number, 0))


#: Report 1's tables by number.
TABLES: dict[str, Table] = {
    number: _make_table(number, entry["columns"]) for number, entry in _CONTENT["tables"].items()
}


#: All of these, by name.
EVERY: dict[str, Experiment] = EXPERIMENTS | {
    e.name: e
    for group in (*CANDIDATES.values(), *CHOICES.values(), *ROUNDINGS.values())
    for e in group
}


def select(names: Sequence[str]) -> list[Experiment]:
    """The experiments of these names, :data:`CANDIDATES` included, in this order.

    Raises:
        ValueError: for an unknown name; the message suggests close ones.
    """
    for name in names:
        if name not in EVERY:
            close = difflib.get_close_matches(name, EVERY)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"there is no experiment {name!r}{hint}")
    return [EVERY[name] for name in dict.fromkeys(names)]


@dataclass
class Parts:
    """What :func:`mnist_ops.training.fit` needs for one run of an experiment."""

    model: nn.Sequential
    optimizers: dict[int, torch.optim.Optimizer]
    generator: torch7.Generator
    criterion: training.Criterion
    transform: Any


def _optimizer(parameters: Sequence[Tensor], name: str, **options: Any) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = _OPTIMIZERS[name](parameters, **options)
    return optimizer


def _transform(experiment: Experiment, generator: torch7.Generator) -> Any:
    from ..mnist import transforms

    steps: list[Any] = []
    if experiment.rotation:
        steps.append(transforms.RandomRotation(experiment.rotation, generator))
    if experiment.noise:
        steps.append(transforms.GaussianNoise(experiment.noise, generator))
    if experiment.augmentation:
        steps.append(transforms.RandomAffine(generator, **experiment.augmentation))
    return transforms.Compose(*steps) if len(steps) > 1 else steps[0] if steps else None


def build(
    experiment: Experiment,
    seed: int = 1,
    device: torch.device | str = "cpu",
    perturbed_weight: int | None = None,
) -> Parts:
    """Network, optimizers, generator, loss and augmentation, as before the first epoch.

    ``seed`` is that of the run's only stream of random numbers. ``perturbed_weight``: add 1e-15 to
    the first convolution's weight with this index, to see how far rounding alone carries.
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
        {epoch: _optimizer(parameters, **o) for epoch, o in experiment.optimizers.items()},
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
    return copy.deepcopy(_digits(kernel, root, limit, small, validation, _stamp(root)))


def _stamp(root: str | None) -> Any:
    """What changes when the files of a data folder do."""
    if root is None:
        return None
    paths = (path for path in sorted(Path(root).expanduser().rglob("*ubyte*")) if path.is_file())
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths)


def _with_errors(splits: data.Splits, seed: int) -> data.Splits:
    """Digits as another machine might round them; see :class:`Experiment`."""
    if seed == 0:
        return splits
    generator = torch.Generator().manual_seed(seed)
    train, test = (
        images + PIXEL_ERROR * torch.randn(images.shape, generator=generator)
        for images in (splits.train_images, splits.test_images)
    )
    return replace(splits, train_images=train, test_images=test)


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
    if not small:
        return data.prepare(normalization, taps, root, limit, validation=validation)
    first, first_test = (size if limit is None else min(size, limit) for size in SMALL_SET)
    return data.prepare(normalization, taps, root, (first, first_test), SMALL_SET[0])


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
    training.write_torch(folder / training.CHECKPOINT, state | {"settings": dict(settings)})


def training_loop(
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
) -> training.Loop[tuple[list[training.EpochResult], nn.Sequential]]:
    """Run one experiment: ``train`` does so at once, ``training_loop`` makes a loop of it.

    ``seed``, ``device`` and ``perturbed_weight`` are as for :func:`build`, ``folder``, ``resume``
    and ``options`` as for :func:`mnist_ops.training.fit`, ``root`` as for
    :func:`mnist_ops.mnist.data.load`. ``epochs`` replaces the experiment's own number; ``limit``:
    the first digits of each split. Unless ``resume``, a run in a folder may ``start`` with a
    checkpoint: that of the same run of the experiment that this one ``continues``.

    Returns:
        The epochs' results and the trained network.
    """
    parts = build(experiment, seed, device, perturbed_weight)
    e, source = experiment, None if root is None else str(root)
    splits = _digits(e.data_kernel, source, limit, e.small, e.validation, _stamp(source))
    splits = _with_errors(splits, e.pixel_errors)
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
    history = yield from training.fitting(
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


train = training.alone(training_loop, "train")
