"""The training loop: online SGD, accuracies counted as in the reports, checkpoints, resuming.

::

    >>> from mnist_ops.mnist import data, models
    >>> from mnist_ops.torch7 import optim
    >>> from mnist_ops import torch7, training
    >>> digits = data.prepare()
    >>> generator = torch7.start(seed=1)
    >>> model = models.convnet(dtype=torch.float64, generator=generator)
    >>> sgd = optim.SGD(model.parameters(), lr=1e-3, lr_decay=1e-7)
    >>> history = training.fit(
    ...     model,
    ...     (digits.train_images, digits.train_labels),
    ...     (digits.test_images, digits.test_labels),
    ...     epochs=1, optimizer=sgd, generator=generator, folder="runs/original",
    ... )

After every epoch ``folder`` holds ``checkpoint.pt``, from which ``resume=True`` continues to
bit-identical results, and ``log.csv``. Optimizers may take turns: ``optimizer={1: sgd, 6: lbfgs}``
trains epochs 1 to 5 with one and goes on with the other.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import torch7
from .._extra import need
from ..ops._common import check_integer
from . import online
from ._files import (
    DamagedFileError,
    FolderInUseError,
    locked,
    read_torch,
    write_atomically,
    write_text,
    write_torch,
)

need(__name__, "filelock", "tqdm")

__all__ = [
    "AutogradEngine",
    "CheckpointError",
    "ConfusionMatrix",
    "DamagedFileError",
    "Engine",
    "EpochResult",
    "FolderInUseError",
    "choose_engine",
    "evaluate",
    "fit",
    "load_checkpoint",
    "load_latest",
    "locked",
    "read_torch",
    "save_checkpoint",
    "write_atomically",
    "write_text",
    "write_torch",
]

#: A loss per sample: ``criterion(output, target, reduction="none")`` of shape ``(N,)``.
Criterion = Callable[..., Tensor]

CHECKPOINT = "checkpoint.pt"
# The one before, an epoch older: to go on from where a disk has damaged the newest. It costs as
# much space again and no time, as it is the old file under another name.
BACKUP_CHECKPOINT = "checkpoint.backup.pt"
# Of an earlier run in the same folder.
PREVIOUS_CHECKPOINT = "checkpoint.previous.pt"
LOG = "log.csv"
_CHECKPOINT_FORMAT = 1
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
#: What every checkpoint holds, beside its optimizers.
_PARTS = {
    "epoch": int,
    "settings": dict,
    "model": dict,
    "generator": dict,
    "torch_rng": Tensor,
    "cuda_rng": list,
    "history": list,
}
# The figure shows the training accuracy within an epoch: at most so many points an epoch, each
# over at least so many samples.
_CURVE_POINTS = 60
_CURVE_SAMPLES = 50


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged or belongs to another run; the message says which."""


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


class Engine(Protocol):
    """What runs the training steps. :func:`fit` hands it one chunk of an epoch at a time."""

    description: str

    def run(self, images: Tensor, labels: Tensor, order: Tensor) -> tuple[Tensor, ...]:
        """Train on ``images[order]``, one step per batch, in order.

        Args:
            images: the whole training set, on the CPU.
            labels: its classes, int64.
            order: int64 ``(M,)``, the samples to use; a multiple of the batch size except at the
                epoch's end.

        Returns:
            On the CPU the losses ``(M,)`` and the predicted classes ``(M,)`` int64, each sample's
            from before its own update. Where the optimizer needs a closure and evaluates batches
            several times there are E >= M of both, in the order of evaluation, and a third tensor
            ``(E,)`` int64 names their samples, as ``order`` does.
        """


class AutogradEngine:
    """One forward pass, backward pass and optimizer step per batch, through PyTorch's autograd.

    An optimizer that needs a closure (:class:`torch.optim.LBFGS`, or one with a true attribute
    ``needs_closure``) decides itself how many passes a step has. The batch is transformed once
    before them; dropout draws in each.

    Args:
        model: as for :func:`fit`; samples are cast to its dtype and moved to its device.
        optimizer: the one whose steps follow.
        criterion: as for :func:`fit`.
        batch_size: gradients are averaged over a batch.
        transform: applied to each batch ``(N, C, H, W)`` before use, for augmentation.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Criterion = torch7.nll_loss,
        batch_size: int = 1,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.criterion = criterion
        self.batch_size = batch_size
        self.transform = transform
        self.needs_closure = isinstance(optimizer, torch.optim.LBFGS) or bool(
            getattr(optimizer, "needs_closure", False)
        )
        parameter = next(model.parameters())
        dtype = str(parameter.dtype).removeprefix("torch.")
        where = "cpu" if parameter.device.type == "cpu" else str(parameter.device)
        threads = f", {torch.get_num_threads()} threads" if where == "cpu" else ""
        self.description = f"PyTorch autograd, {dtype}, {where}{threads}, batch size {batch_size}"

    def run(self, images: Tensor, labels: Tensor, order: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Engine.run`."""
        parameter = next(self.model.parameters())
        samples = images.index_select(0, order).to(parameter.device, parameter.dtype)
        targets = labels.index_select(0, order).to(parameter.device)
        self.model.train()
        outputs: list[Tensor] = []
        losses: list[Tensor] = []
        evaluated: list[Tensor] = []
        batches = zip(*(x.split(self.batch_size) for x in (samples, targets, order)), strict=True)
        for batch, target, indices in batches:
            if self.transform is not None:
                batch = self.transform(batch)
            before = len(losses)
            closure: Callable[[], Any] = partial(self._evaluate, batch, target, outputs, losses)
            if self.needs_closure:
                self.optimizer.step(closure)
            else:
                closure()
                self.optimizer.step()
            evaluated += [indices] * (len(losses) - before)
        results = torch.cat(losses).cpu(), _predict(torch.cat(outputs)).cpu()
        return (*results, torch.cat(evaluated)) if self.needs_closure else results

    def _evaluate(
        self, batch: Tensor, target: Tensor, outputs: list[Tensor], losses: list[Tensor]
    ) -> Tensor:
        """The batch's mean loss, with its gradients; what it was made of joins the lists."""
        self.optimizer.zero_grad()
        output = self.model(batch)
        loss = self.criterion(output, target, reduction="none")
        mean = loss.mean()
        mean.backward()
        outputs.append(output.detach())
        losses.append(loss.detach())
        return mean


def choose_engine(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    criterion: Criterion = torch7.nll_loss,
    batch_size: int = 1,
    transform: Callable[[Tensor], Tensor] | None = None,
    shared: online.SharedLaunches | None = None,
    images: Tensor | None = None,
) -> Engine:
    """The compiled engine where it can run the steps, else autograd; arguments as for :func:`fit`.

    :class:`mnist_ops.training.online.OnlineSGD` is taken for batch size 1 with ``SGD``, one of the
    criteria of :mod:`mnist_ops.torch7`, and a network of layers that it knows, on the CPU or on
    CUDA. ``images``, the training set, tell whether it knows them for images of that shape, too:
    PyTorch pools where it finds a window outside. The ``description`` says which one it is and, at
    batch size 1, why not the compiled one. On the CPU it runs on one thread: a second one gains 1.6
    to 1.8 times on two idle cores and loses ten times on busy ones;
    ``fit(engine=online.OptimizerEngine(..., threads=2))`` asks for it.
    """
    reason = ""
    if batch_size == 1:
        try:
            compiled = online.OptimizerEngine(model, optimizer, criterion, transform, shared=shared)
            if images is not None:
                # A transform is given images of the network's dtype.
                sample = images[:1]
                compiled.check(sample if transform is None else sample.to(compiled.dtype))
            return compiled
        except online.UnsupportedError as error:
            reason = f" (not compiled: {error.reason})"
    engine = AutogradEngine(model, optimizer, criterion, batch_size, transform)
    engine.description += reason
    return engine


def _predict(output: Tensor) -> Tensor:
    """The class of the largest output, compared in float32 as Torch7's confusion matrix does."""
    return output.float().argmax(-1)


def _progress_bar(description: str, total: int, unit: str, show: bool) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        disable=not show,
        leave=False,
        dynamic_ncols=True,
        file=sys.stderr,
    )


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards, in any case, each module's own mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    criterion: Criterion = torch7.nll_loss,
    batch_size: int = 100,
    progress: bool | None = False,
) -> tuple[ConfusionMatrix, float]:
    """Predict every image without training.

    Args:
        model: in evaluation mode meanwhile; images are cast to its dtype and moved to its device.
        images: ``(N, C, H, W)``, N >= 1.
        labels: ``(N,)`` int64.
        criterion: as for :func:`fit`.
        batch_size: images at a time; it does not change the result beyond rounding.
        progress: show a bar; ``None``: on a terminal only.

    Returns:
        The confusion matrix and the mean loss.
    """
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(
            "evaluate: images must hold one image at least and one for each label, "
            f"got {len(images)} and {len(labels)}"
        )
    batch_size = check_integer("evaluate", "batch_size", batch_size, 1)
    parameter = next(model.parameters())
    confusion: ConfusionMatrix | None = None
    total = 0.0
    show = sys.stderr.isatty() if progress is None else progress
    bars = _progress_bar("testing", len(images), " digits", show)
    with _evaluating(model), torch.no_grad(), bars as bar:
        for batch, target in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            target = target.to(parameter.device)
            output = model(batch.to(parameter.device, parameter.dtype))
            total += float(criterion(output, target, reduction="none").sum())
            confusion = confusion or ConfusionMatrix(output.shape[-1])
            confusion.add(_predict(output), target)
            bar.update(len(batch))
    assert confusion is not None
    return confusion, total / len(images)


def save_checkpoint(
    path: str | os.PathLike[str], state: dict[str, Any], keep: Path | None = None
) -> None:
    """Save ``state`` as :func:`torch.save` does, atomically: never a truncated file at ``path``.

    Args:
        path: the file.
        state: what to save.
        keep: what the file that was there is called afterwards; unless given it is lost.
    """
    write_torch(path, state, keep)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load what :func:`fit` saved, onto the CPU. Nothing but data is ever unpickled.

    Every byte is compared with the checksums in the file first, which ``torch.load`` does not.

    Raises:
        CheckpointError: if the file is missing, damaged or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}")
    try:
        state = read_torch(path)
    except DamagedFileError:
        raise CheckpointError(f"{path} is damaged or not a checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(state, dict) or state.get("format") != _CHECKPOINT_FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this version of mnist_ops")
    for name, kind in _PARTS.items():
        if not isinstance(state.get(name), kind):
            raise CheckpointError(f"{path} is not a checkpoint: it holds no {name}")
    return state


def load_latest(folder: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint in a folder that is whole, and where it is.

    That is ``checkpoint.pt`` or, where that is damaged or missing, ``checkpoint.backup.pt``, which
    is an epoch older; a warning says so then.

    Raises:
        CheckpointError: if neither can be used.
    """
    path, backup = Path(folder, CHECKPOINT), Path(folder, BACKUP_CHECKPOINT)
    try:
        return path, load_checkpoint(path)
    except CheckpointError as error:
        try:
            state = load_checkpoint(backup)
        except CheckpointError:
            raise error from None
        warnings.warn(
            f"{error}; going on from {backup}, the state after epoch {state['epoch']}",
            stacklevel=2,
        )
        return backup, state


def _write_log(path: Path, history: Sequence[EpochResult]) -> None:
    """The whole history as CSV: always in step with the checkpoint, whatever was interrupted."""
    columns = [
        column.name
        for column in fields(EpochResult)
        if column.name not in ("curve", "confusion", "train_confusion")
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([getattr(result, name) for name in columns] for result in history)
    write_text(path, text.getvalue())


def _active(optimizers: Mapping[int, Any], epoch: int) -> int:
    """The first epoch of the optimizer in charge of ``epoch``."""
    return max(first for first in optimizers if first <= epoch)


@dataclass
class _Run:
    """Everything that changes while training, in one piece to save and restore."""

    model: nn.Module
    optimizers: dict[int, torch.optim.Optimizer]
    generator: torch7.Generator
    settings: dict[str, Any]
    definition: dict[str, Any]
    history: list[EpochResult]

    def save(self, folder: Path, keep: str = BACKUP_CHECKPOINT) -> None:
        states = {first: one.state_dict() for first, one in self.optimizers.items()}
        state = {
            "format": _CHECKPOINT_FORMAT,
            "epoch": len(self.history),
            "settings": self.settings,
            "definition": self.definition,
            "model": self.model.state_dict(),
            **({"optimizer": states[1]} if len(states) == 1 else {"optimizers": states}),
            "generator": self.generator.get_state(),
            # PyTorch's own generators serve torch.nn.Dropout and users' transforms.
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            "history": [asdict(result) for result in self.history],
        }
        save_checkpoint(folder / CHECKPOINT, state, folder / keep)
        _write_log(folder / LOG, self.history)

    def restore(self, folder: Path) -> None:
        path, state = load_latest(folder)
        saved = state["settings"]
        for name in sorted(saved.keys() | self.settings.keys()):
            _compare(path, name, saved.get(name), self.settings.get(name))
        try:
            states = state["optimizers"] if "optimizers" in state else {1: state["optimizer"]}
            # What has not been in charge yet may still change: one run can go on in many ways.
            used, known = (
                sorted(first for first in each if first <= max(1, state["epoch"]))
                for each in (states, self.optimizers)
            )
            if used != known:
                raise CheckpointError(
                    f"{path} was made with optimizers from epochs {_listed(used)}, "
                    f"this run has them from {_listed(known)}"
                )
            then = state.get("definition", {})  # missing where an earlier version saved
            parts = [(self.definition, then)]
            known_options, options = (each.get("optimizers", {}) for each in parts[0])
            parts += [(known_options[first], options.get(first, {})) for first in used]
            for ours, theirs in parts:
                for name, now in ours.items():
                    if name != "optimizers":
                        _compare(path, name, theirs.get(name, now), now)
            history = [EpochResult(**result) for result in state["history"]]
            self.model.load_state_dict(state["model"])
            for first in used:
                self.optimizers[first].load_state_dict(states[first])
            self.generator.set_state(state["generator"])
            torch.set_rng_state(state["torch_rng"])
            if state["cuda_rng"] and torch.cuda.is_available():
                torch.cuda.set_rng_state_all(state["cuda_rng"])
        except CheckpointError:
            raise
        except Exception as error:  # a state of another network, or one that nobody saved like this
            plain = isinstance(error, (RuntimeError, ValueError)) and str(error)
            reason = str(error).splitlines()[0] if plain else repr(error)
            raise CheckpointError(f"{path} does not fit this network: {reason}") from None
        if len(history) != state["epoch"]:
            raise CheckpointError(
                f"{path} is not a checkpoint: its history has {len(history)} epochs, "
                f"not {state['epoch']}"
            )
        self.history[:] = history
        if path.name != CHECKPOINT:  # the damaged one must not become the backup
            os.replace(path, folder / CHECKPOINT)
        _write_log(folder / LOG, self.history)


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def _compare(path: Path, name: str, then: Any, now: Any) -> None:
    """Refuse to go on with something else than what ``path`` was made with."""
    if then == now:
        return
    if name in ("network", "training data", "test data"):
        raise CheckpointError(f"{path} was made with another {name}: train in another folder")
    raise CheckpointError(
        f"{path} was made with {name} = {then}, this run has {now}: "
        "resume with the same settings or train in another folder"
    )


def _hash(*tensors: Tensor) -> str:
    """Of the tensors' values: a quarter of a second for the reports' training set."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(values.numpy().data)
    return digest.hexdigest()


def _name(thing: Any) -> str:
    """What a criterion or a transform is, as far as it tells the same in every process."""
    if isinstance(thing, nn.Module):
        return _ADDRESS.sub("", str(thing))
    name = getattr(thing, "__qualname__", type(thing).__name__)
    return "a function" if "<" in name else name


def _definition(
    model: nn.Module,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    optimizers: Mapping[int, torch.optim.Optimizer],
    criterion: Criterion,
    batch_size: int,
    transform: Callable[[Tensor], Tensor] | None,
) -> dict[str, Any]:
    """What defines a run's results beside its state, as numbers and strings."""
    changing = ("params", "param_names", "steps")
    named = {}
    for first, one in optimizers.items():
        options: dict[str, Any] = {"optimizer": type(one).__name__}
        for i, group in enumerate(one.param_groups):
            for key, value in group.items():
                plain = value is None or type(value) in (bool, int, float, str)
                if key not in changing:
                    label = key if len(one.param_groups) == 1 else f"{key} of group {i}"
                    options[label] = value if plain else _ADDRESS.sub("", repr(value))
        named[first] = options
    return {
        "network": _ADDRESS.sub("", str(model)),
        "dtype": str(next(model.parameters()).dtype),
        "training data": _hash(*train),
        "test data": _hash(*test),
        "criterion": _name(criterion),
        "batch size": batch_size,
        "transform": _name(transform) if isinstance(transform, nn.Module) else None,
        "optimizers": named,
    }


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def repeatable() -> contextlib.AbstractContextManager[None]:
    """Deterministic convolutions without TF32: a run on the GPU can be repeated, too."""
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )


def _train_epoch(
    engine: Engine,
    images: Tensor,
    labels: Tensor,
    order: Tensor,
    chunk: int,
    description: str,
    show: bool,
    on_progress: Callable[[int], object] | None,
) -> tuple[float, float, list[float], tuple[Tensor, Tensor]]:
    """One pass: accuracy in %, mean loss, the accuracy's curve, predictions and their targets."""
    rights, all_losses, seen = [], [], []
    right = predicted = 0
    with _progress_bar(description, len(order), " digits", show) as bar:
        for piece in order.split(chunk):
            losses, predictions, *others = engine.run(images, labels, piece)
            samples = others[0] if others else piece
            seen.append((predictions, labels.index_select(0, samples)))
            rights.append(predictions == seen[-1][1])
            all_losses.append(losses.double())
            right += int(rights[-1].sum())
            predicted += len(predictions)
            bar.set_postfix_str(f"training {100.0 * right / predicted:.2f} %", refresh=False)
            bar.update(len(piece))
            if on_progress is not None:
                on_progress(len(piece))
    piece_size = max(_CURVE_SAMPLES, -(-predicted // _CURVE_POINTS))
    curve = torch.cat(rights).double().mul(100.0).split(piece_size)
    loss = float(torch.cat(all_losses).mean())
    both = torch.cat([one for one, _ in seen]), torch.cat([target for _, target in seen])
    return 100.0 * right / predicted, loss, [float(part.mean()) for part in curve], both


def fit(
    model: nn.Module,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    epochs: int,
    optimizer: torch.optim.Optimizer | Mapping[int, torch.optim.Optimizer],
    generator: torch7.Generator,
    criterion: Criterion = torch7.nll_loss,
    batch_size: int = 1,
    transform: Callable[[Tensor], Tensor] | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    settings: dict[str, Any] | None = None,
    engine: Engine | None = None,
    shared: online.SharedLaunches | None = None,
    chunk: int | None = None,
    progress: bool | None = None,
    verbose: bool = True,
    on_progress: Callable[[int], object] | None = None,
    on_epoch: Callable[[EpochResult], object] | None = None,
) -> list[EpochResult]:
    """Train ``model`` until ``epochs`` epochs are complete, and test it after each.

    Each epoch draws a shuffle from ``generator``, goes once through the training set, counting
    predictions before each update (the reports' training accuracy), then through the test set.

    Args:
        model: on the device and in the dtype to compute in.
        train: images ``(N, C, H, W)`` and labels ``(N,)`` int64 of the training set, on the CPU.
        test: the same of the test set.
        epochs: in all, those of a resumed run included.
        optimizer: its step follows every batch, see :class:`mnist_ops.torch7.optim.SGD`; one that
            needs a closure evaluates the batch as often as it likes, see :class:`AutogradEngine`.
            One with a context manager ``averaged()`` is tested within it. Or a mapping from the
            first epoch to the optimizer that is in charge from then on: ``{1: sgd, 6: lbfgs}``.
        generator: source of the shuffles.
        criterion: ``criterion(output, target, reduction="none")`` gives a loss per sample, as do
            those of :mod:`mnist_ops.torch7`; a batch's mean is minimised.
        batch_size: samples per step.
        transform: applied to each training batch before use, for augmentation.
        folder: where ``checkpoint.pt`` and ``log.csv`` go; ``None`` writes nothing. An earlier
            checkpoint there is kept as ``checkpoint.previous.pt`` when a new run starts, the one
            of the epoch before as ``checkpoint.backup.pt``, for ``resume`` where a disk has damaged
            the newest. The folder is locked meanwhile; what killed runs left half written in it
            is removed.
        resume: continue from ``folder``'s checkpoint. On the CPU with the same number of threads
            the results are those of an uninterrupted run, bit for bit. Optimizers that were not yet
            in charge may be others than those of the run that made it.
        settings: what else defines the run (numbers, strings), kept in the checkpoint; resuming
            with other settings is refused, as it is with another network, dtype, criterion, batch
            size, transform module, with other data or other options of an optimizer.
        engine: runs the steps; :func:`choose_engine` picks one unless given, and another one for
            each optimizer of a mapping.
        shared: of several calls in threads of one process, whose steps run together on a GPU, see
            :class:`mnist_ops.training.online.SharedLaunches`; each calls ``leave()`` afterwards.
        chunk: samples handed to the engine at a time; unless given about 200, or the ``chunk`` that
            the engine wishes for.
        progress: show progress bars on standard error; ``None``: on a terminal only.
        verbose: print the engine's description and one line per epoch to standard output.
        on_progress: called after each chunk with the number of samples just trained.
        on_epoch: called with each new epoch's result, after its checkpoint has been written.

    Returns:
        One :class:`EpochResult` per epoch, those before a resume included.

    Raises:
        ValueError: for an impossible argument, images or weights that are not finite.
        CheckpointError: if ``resume`` finds no usable checkpoint.
        FolderInUseError: if another process, or another thread, trains in ``folder``.
        KeyboardInterrupt: on Ctrl-C, with a message; the folder then holds the state after the
            last complete epoch.
    """
    epochs = check_integer("fit", "epochs", epochs, 0)
    batch_size = check_integer("fit", "batch_size", batch_size, 1)
    if chunk is not None:
        chunk = check_integer("fit", "chunk", chunk, 1)
    if resume and folder is None:
        raise ValueError("fit: resume needs a folder")
    for name, (images, labels) in (("train", train), ("test", test)):
        if len(images) != len(labels) or len(images) == 0:
            raise ValueError(
                f"fit: {name} must hold as many images as labels and one at least, "
                f"got {len(images)} and {len(labels)}"
            )
        _check_finite(f"{name} images", images)
    optimizers = dict(optimizer) if isinstance(optimizer, Mapping) else {1: optimizer}
    if 1 not in optimizers or not all(isinstance(e, int) and e >= 1 for e in optimizers):
        raise ValueError(
            "fit: optimizer must map 1, and later epochs, to optimizers, "
            f"got the epochs {_listed(list(optimizers)) or 'none'}"
        )
    if engine is not None and len(optimizers) > 1:
        raise ValueError("fit: engine must not be given with several optimizers")
    engines = {
        first: engine
        or choose_engine(model, one, criterion, batch_size, transform, shared, train[0])
        for first, one in sorted(optimizers.items())
    }
    if chunk is None:
        chunk = max(8 * batch_size, *(getattr(one, "chunk", 200) for one in engines.values()))
    chunk = batch_size * max(1, min(chunk, len(train[0]) + batch_size) // batch_size)
    show = sys.stderr.isatty() if progress is None else progress
    folder = None if folder is None else Path(folder)
    definition = (
        {}
        if folder is None
        else _definition(model, train, test, optimizers, criterion, batch_size, transform)
    )
    run = _Run(model, optimizers, generator, dict(settings or {}), definition, [])
    if not resume:
        for name, parameter in model.named_parameters():
            _check_finite(f"the network's {name}", parameter)

    with contextlib.ExitStack() as stack:
        if folder is not None:
            if resume and not folder.is_dir():
                raise CheckpointError(f"there is no checkpoint at {folder / CHECKPOINT}")
            stack.enter_context(locked(folder))
            if resume:
                run.restore(folder)
            else:
                # No backup of another run must be taken for one of this.
                (folder / BACKUP_CHECKPOINT).unlink(missing_ok=True)
                # Also before the first epoch, so that an interrupted run can always be resumed.
                run.save(folder, keep=PREVIOUS_CHECKPOINT)
        active = _active(optimizers, len(run.history) + 1)
        if verbose:
            print(f"training on {len(train[0])} digits: {engines[active].description}", flush=True)
        try:
            with repeatable():
                while len(run.history) < epochs:
                    epoch = len(run.history) + 1
                    if active != _active(optimizers, epoch):
                        active = epoch
                        if verbose:
                            print(f"epoch {epoch:3d}: {engines[active].description}", flush=True)
                    result = _one_epoch(
                        epoch,
                        model,
                        optimizers[active],
                        engines[active],
                        train,
                        test,
                        generator.randperm(len(train[0])),
                        criterion,
                        f"epoch {epoch}/{epochs}",
                        chunk,
                        show,
                        on_progress,
                    )
                    if _diverged(result) and not any(map(_diverged, run.history)):
                        warnings.warn(
                            f"the run has diverged in epoch {epoch}: training loss "
                            f"{result.train_loss}, test loss {result.test_loss}",
                            stacklevel=2,
                        )
                    run.history.append(result)
                    if folder is not None:
                        run.save(folder)
                    if verbose:
                        print(result, flush=True)
                    if on_epoch is not None:
                        on_epoch(result)
        except KeyboardInterrupt:
            message = "interrupted"
            if folder is not None:
                saved = load_latest(folder)[1]["epoch"]
                message += (
                    f"; {folder / CHECKPOINT} holds the state after epoch {saved}: resume from it"
                )
            raise KeyboardInterrupt(message) from None
        return run.history


def _learning_rate(optimizer: torch.optim.Optimizer) -> float | None:
    """Of the first group's next step; None where there is none."""
    group = optimizer.param_groups[0]
    if hasattr(optimizer, "rate"):
        rate = float(optimizer.rate(group))
    elif "lr" in group:
        rate = float(group["lr"])
    else:
        return None
    if not 0.0 <= rate < math.inf:
        raise ValueError(f"fit: the learning rate must be >= 0 and finite, got {rate}")
    return rate


def _diverged(result: EpochResult) -> bool:
    return not (math.isfinite(result.train_loss) and math.isfinite(result.test_loss))


def _check_finite(name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity, which would spread to every weight in a step."""
    if tensor.is_floating_point() and tensor.numel():
        lowest, highest = tensor.detach().aminmax()
        if not (lowest.isfinite() and highest.isfinite()):
            raise ValueError(f"fit: {name} must be finite, got NaN or infinity")


def _one_epoch(
    epoch: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    engine: Engine,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    order: Tensor,
    criterion: Criterion,
    description: str,
    chunk: int,
    show: bool,
    on_progress: Callable[[int], object] | None,
) -> EpochResult:
    start = time.perf_counter()
    rate = _learning_rate(optimizer)
    accuracy, loss, curve, online_predictions = _train_epoch(
        engine, *train, order, chunk, description, show, on_progress
    )
    averaged = getattr(optimizer, "averaged", contextlib.nullcontext)
    with averaged():
        confusion, test_loss = evaluate(model, *test, criterion, progress=show)
    train_confusion = ConfusionMatrix(len(confusion.counts))
    train_confusion.add(*online_predictions)
    return EpochResult(
        epoch=epoch,
        train_accuracy=accuracy,
        test_accuracy=100.0 * int(confusion.counts.trace()) / len(test[0]),
        train_loss=loss,
        test_loss=test_loss,
        learning_rate=rate,
        seconds=time.perf_counter() - start,
        curve=curve,
        confusion=confusion.counts.tolist(),
        train_confusion=train_confusion.counts.tolist(),
    )
