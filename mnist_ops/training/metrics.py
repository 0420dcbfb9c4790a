"""What is counted of an epoch: accuracies, as Torch7 counts them, losses and times."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..ops._common import check_integer
from ._files import write_text

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def predicted_classes(output: Tensor) -> Tensor:
    """The class of the largest output, compared in float32 as Torch7's confusion matrix does."""
    return output.float().argmax(-1)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards, in any case, each module's own mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


class ConfusionMatrix:
    """Counts of (true class, predicted class); Torch7's ``optim.ConfusionMatrix``.

    Attributes:
        counts: int64, ``(classes, classes)``; row: true class, column: predicted class.
    """

    def __init__(self, num_classes: int = 10) -> None:
        size = check_integer("ConfusionMatrix", "num_classes", num_classes, 1)
        self.counts = torch.zeros(size, size, dtype=torch.int64, device="cpu")

    @classmethod
    def from_counts(cls, counts: Sequence[Sequence[int]]) -> ConfusionMatrix:
        """The matrix with these counts, as in :attr:`EpochResult.confusion`.

        Raises:
            ValueError: if they are not as many rows as columns of counts.
        """
        matrix = cls(len(counts))
        try:
            given = torch.tensor(counts, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            given = torch.empty(0, device="cpu")
        if given.shape != matrix.counts.shape or given.dtype != torch.int64 or given.min() < 0:
            raise ValueError(
                "ConfusionMatrix.from_counts: counts must be a square of integers >= 0, "
                f"got {counts!r:.100}"
            )
        matrix.counts += given
        return matrix

    def add(self, predictions: Tensor, targets: Tensor) -> None:
        """Count predicted and true classes, both ``(N,)`` integers from 0.

        Raises:
            TypeError: if one of them is no tensor of integers.
            ValueError: if their shapes differ or a class is none of the matrix's.
        """
        classes = len(self.counts)
        for name, tensor in (("predictions", predictions), ("targets", targets)):
            if not isinstance(tensor, Tensor) or tensor.dtype not in _INTEGERS:
                kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(
                    f"ConfusionMatrix.add: {name} must be a Tensor of integers, got {kind}"
                )
            if tensor.dim() != 1 or tensor.shape != targets.shape:
                raise ValueError(
                    f"ConfusionMatrix.add: predictions and targets must be (N,), "
                    f"got {tuple(predictions.shape)} and {tuple(targets.shape)}"
                )
            wrong = tensor[(tensor < 0) | (tensor >= classes)]
            if len(wrong):
                raise ValueError(
                    f"ConfusionMatrix.add: {name} must be in [0, {classes}), got {int(wrong[0])}"
                )
        cells = targets.to("cpu", torch.int64) * classes + predictions.to("cpu", torch.int64)
        self.counts += torch.bincount(cells, minlength=classes**2).view(classes, classes)

    @property
    def total(self) -> float:
        """The fraction of all samples predicted right, the reports' accuracy; NaN of none."""
        return float(self.counts.trace() / self.counts.sum().double())

    @property
    def per_class(self) -> Tensor:
        """For each true class the fraction predicted right, NaN for a class without samples."""
        return self.counts.diagonal() / self.counts.sum(1).double()

    @property
    def average_row(self) -> float:
        """The mean of :attr:`per_class` over the classes that have samples."""
        return float(self.per_class.nanmean())

    @property
    def average_union(self) -> float:
        """The mean over classes of hits / (true or predicted), for classes that have samples."""
        hits = self.counts.diagonal()
        union = self.counts.sum(0) + self.counts.sum(1) - hits
        present = self.counts.sum(1) > 0
        return float((hits[present] / union[present].double()).mean())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the counts as CSV, one row per true class."""
        rows = [",".join(map(str, row)) for row in self.counts.tolist()]
        write_text(path, "\n".join(rows) + "\n")

    def __str__(self) -> str:
        width = max(5, len(str(int(self.counts.max()))) + 1)
        classes = "".join(f"{i:{width}d}" for i in range(len(self.counts)))
        lines = [f"true \\ predicted {classes}    right"]
        for i, (row, right) in enumerate(zip(self.counts, self.per_class, strict=True)):
            cells = "".join(f"{int(count):{width}d}" for count in row)
            lines.append(f"{i:16d} {cells} {100 * float(right):6.2f} %")
        lines.append(
            f"right: {100 * self.total:.2f} %, {100 * self.average_row:.2f} % over classes"
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class EpochResult:
    """What one epoch gave. Accuracies are in %.

    ``train_accuracy`` is online: each digit is predicted before its own update. ``train_loss`` is
    the mean of these predictions' losses and ``curve`` the accuracy of consecutive pieces of the
    epoch. Optimizers that evaluate a batch several times a step, as CG and L-BFGS do, count with
    every evaluation. ``learning_rate`` is that of the epoch's first step; None, an empty cell in
    ``log.csv``, for an optimizer without one, as CG. ``confusion`` holds the test set's counts,
    row: true class, column: predicted class; ``train_confusion`` those of the online predictions,
    empty in what earlier versions saved. Of a run that has diverged the losses are NaN or infinite,
    everything else is as of any run.
    """

    epoch: int
    train_accuracy: float
    test_accuracy: float
    train_loss: float
    test_loss: float
    learning_rate: float | None
    seconds: float
    curve: list[float]
    confusion: list[list[int]]
    train_confusion: list[list[int]] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch:3d}: training {self.train_accuracy:.2f} %, "
            f"test {self.test_accuracy:.2f} %, loss {self.train_loss:.4f}, {self.seconds:.1f} s"
        )
