"""The training loop: :func:`fit` and :func:`evaluate`."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial, wraps
from inspect import currentframe, signature
from pathlib import Path
from typing import Any, ParamSpec, TypeAlias, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor, nn

from .. import torch7
from ..ops._common import check_finite, check_integer
from ._files import FolderInUseError, locked
from .checkpoint import (
    BACKUP_CHECKPOINT,
    CHECKPOINT,
    PREVIOUS_CHECKPOINT,
    CheckpointError,
    TrainingState,
    describe_run,
    listed,
    load_latest,
)
from .engine import Criterion, Engine, Steps, choose_engine, run_steps
from .metrics import ConfusionMatrix, EpochResult, evaluating, predicted_classes

P = ParamSpec("P")
T = TypeVar("T")

# The figure shows the training accuracy within an epoch: at most so many points an epoch, each
# over at least so many samples.
_CURVE_POINTS = 60
_CURVE_SAMPLES = 50


def progress_bar(
    description: str, total: int, unit: str, show: bool | None, initial: int = 0
) -> Any:
    """A bar on standard error or in a notebook; ``show=None``: only where somebody sees it."""
    from tqdm import auto, notebook

    if show is None:
        show = sys.stderr.isatty() or issubclass(auto.tqdm, notebook.tqdm_notebook)
    return auto.tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        disable=not show,
        leave=False,
        dynamic_ncols=True,
        file=sys.stderr,
    )


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
        progress: show a bar; ``None``: on a terminal or in a notebook.

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
    bars = progress_bar("testing", len(images), " digits", progress)
    with evaluating(model), torch.no_grad(), bars as bar:
        for batch, target in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            target = target.to(parameter.device)
            output = model(batch.to(parameter.device, parameter.dtype))
            total += float(criterion(output, target, reduction="none").sum())
            confusion = confusion or ConfusionMatrix(output.shape[-1])
            confusion.add(predicted_classes(output), target)
            bar.update(len(batch))
    assert confusion is not None
    return confusion, total / len(images)


def _active(optimizers: Mapping[int, Any], epoch: int) -> int:
    """The first epoch of the optimizer in charge of ``epoch``."""
    return max(first for first in optimizers if first <= epoch)


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Deterministic convolutions without TF32: a run on the GPU can be repeated, too.

    These settings are the process's, not the thread's: whoever comes first makes them, whoever
    leaves last takes them back.
    """
    global _loops_under_way
    with _repeatable_lock:
        if _loops_under_way == 0:
            _repeatable_settings.enter_context(
                torch.backends.cudnn.flags(
                    enabled=True, benchmark=False, deterministic=True, allow_tf32=False
                )
            )
        _loops_under_way += 1
    try:
        yield
    finally:
        with _repeatable_lock:
            _loops_under_way -= 1
            if _loops_under_way == 0:
                _repeatable_settings.close()


_repeatable_lock = threading.Lock()
_repeatable_settings = contextlib.ExitStack()
_loops_under_way = 0


#: A training loop in pieces: it yields what is to be run next and is sent what came of it.
Loop: TypeAlias = Generator[Steps, tuple[Tensor, ...], T]


def side_by_side(loops: Sequence[Loop[T]]) -> list[T]:
    """Run several training loops in turns: what their engines can run together is one run.

    One network cannot fill a GPU. Loops that were written for one network each, as
    :func:`fitting`, go on as they are, and steps of :class:`OptimizerEngine` s for networks of the
    same layers become steps of an :class:`~mnist_ops.training.online.OnlineSGD` with a list of
    models. The results are, bit for bit, those of each loop alone, as long as no two of them draw
    from one random generator.

    Args:
        loops: as many as one likes, of any length and kind. What one raises ends all of them; an
            error in a run is raised in those that took part in it.

    Returns:
        What each loop returns.

    Example::

        >>> loops = [training.fitting(run.model, ..., generator=run.generator) for run in runs]
        >>> histories = training.side_by_side(loops)
    """
    results: dict[int, T] = {}
    with repeatable():
        try:
            moves: dict[int, Callable[[], Steps]] = {
                i: partial(next, loop) for i, loop in enumerate(loops)
            }
            while moves:
                wanted: dict[Any, dict[int, Steps]] = {}
                then: dict[int, Callable[[], Steps]] = {}
                for i, move in moves.items():
                    try:
                        steps = move()
                    except StopIteration as end:
                        results[i] = end.value
                        continue
                    # An error belongs to the loops that asked for what cannot be done.
                    try:
                        wanted.setdefault(steps.kind(), {})[i] = steps
                    except BaseException as error:
                        then[i] = partial(loops[i].throw, error)
                for alike in wanted.values():
                    try:
                        came = run_steps(list(alike.values()))
                    except BaseException as error:
                        then |= {i: partial(loops[i].throw, error) for i in alike}
                    else:
                        then |= {
                            i: partial(loops[i].send, result)
                            for i, result in zip(alike, came, strict=True)
                        }
                moves = then
        finally:
            for loop in loops:
                loop.close()
    return [results[i] for i in range(len(loops))]


def alone(loop: Callable[P, Loop[T]], name: str) -> Callable[P, T]:
    """The function ``name`` that makes a loop and runs it by itself.

    Its docstring is that of ``loop``, whose return annotation must be a :data:`Loop`.
    """

    @wraps(loop)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return side_by_side([loop(*args, **kwargs)])[0]

    *_, result = get_args(get_type_hints(loop)["return"])
    run.__signature__ = signature(loop).replace(return_annotation=result)  # type: ignore[attr-defined]
    run.__annotations__ = {**loop.__annotations__, "return": result}
    run.__name__ = run.__qualname__ = name
    return run


def _warn(message: str) -> None:
    """A warning at the line that has called this package."""
    package, level, frame = f"{__name__.partition('.')[0]}.", 1, currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith(package):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


_folders_of_loops: set[Path] = set()


@contextlib.contextmanager
def _locked_for_one_loop(folder: Path) -> Iterator[None]:
    """The folder's lock, which whoever called may hold already, but no loop beside this one."""
    with locked(folder):
        path = folder.resolve()
        if path in _folders_of_loops:
            raise FolderInUseError(f"another training loop is at work in {folder}")
        _folders_of_loops.add(path)
        try:
            yield
        finally:
            _folders_of_loops.remove(path)


def fitting(
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
    chunk: int | None = None,
    progress: bool | None = None,
    verbose: bool = True,
    on_progress: Callable[[int], object] | None = None,
    on_epoch: Callable[[EpochResult], object] | None = None,
) -> Loop[list[EpochResult]]:
    """Train ``model`` until ``epochs`` epochs are complete, and test it after each.

    ``fit`` does so at once; ``fitting`` makes a loop of it for :func:`side_by_side`.

    Each epoch draws a shuffle from ``generator``, goes once through the training set, counting
    predictions before each update (the reports' training accuracy), then through the test set.

    Args:
        model: on the device and in the dtype to compute in.
        train: images ``(N, C, H, W)`` and labels ``(N,)`` int64 of the training set, on the CPU.
        test: the same of the test set.
        epochs: in all, those of a resumed run included.
        optimizer: its step follows every batch, see :class:`mnist_ops.torch7.optim.SGD`; one that
            needs a closure evaluates the batch as often as it likes, see :class:`AutogradEngine`.
            One with a context manager ``averaged()`` is tested within it; checkpoints hold the
            weights outside. Or a mapping from the first epoch to the optimizer that is in charge
            from then on: ``{1: sgd, 6: lbfgs}``.
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
            (of :class:`OnlineSGD` with any) the results are those of an uninterrupted run, bit for
            bit. Optimizers that were not yet in charge may be others than those of the run that
            made it.
        settings: what else defines the run (numbers, strings), kept in the checkpoint; resuming
            with other settings is refused, as it is with another network, dtype, criterion, batch
            size, transform module, with other data or other options of an optimizer.
        engine: runs the steps; :func:`choose_engine` picks one unless given, and another one for
            each optimizer of a mapping.
        chunk: samples handed to the engine at a time; unless given about 200, or the ``chunk`` that
            the engine wishes for.
        progress: show progress bars on standard error; ``None``: on a terminal or in a notebook.
        verbose: print the engine's description and one line per epoch to standard output.
        on_progress: called after each chunk with the number of samples just trained.
        on_epoch: called with each new epoch's result, after its checkpoint has been written.

    Returns:
        One :class:`EpochResult` per epoch, those before a resume included.

    Raises:
        ValueError: for an impossible argument, images or weights that are not finite.
        CheckpointError: if ``resume`` finds no usable checkpoint.
        FolderInUseError: if another process, another thread or another loop trains in ``folder``.
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
            f"got the epochs {listed(list(optimizers)) or 'none'}"
        )
    if engine is not None and len(optimizers) > 1:
        raise ValueError("fit: engine must not be given with several optimizers")
    engines = {
        first: engine or choose_engine(model, one, criterion, batch_size, transform, train[0])
        for first, one in sorted(optimizers.items())
    }
    if chunk is None:
        chunk = max(8 * batch_size, *(getattr(one, "chunk", 200) for one in engines.values()))
    chunk = batch_size * max(1, min(chunk, len(train[0]) + batch_size) // batch_size)
    definition = {}
    if folder is not None:
        folder = Path(folder)
        definition = describe_run(model, train, test, optimizers, criterion, batch_size, transform)
    run = TrainingState(model, optimizers, generator, dict(settings or {}), definition, [])
    if not resume:
        for name, parameter in model.named_parameters():
            _check_finite(f"the network's {name}", parameter)

    with contextlib.ExitStack() as stack:
        if folder is not None:
            if resume and not folder.is_dir():
                raise CheckpointError(f"there is no checkpoint at {folder / CHECKPOINT}")
            stack.enter_context(_locked_for_one_loop(folder))
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
            while len(run.history) < epochs:
                epoch = len(run.history) + 1
                if active != _active(optimizers, epoch):
                    active = epoch
                    if verbose:
                        print(f"epoch {epoch:3d}: {engines[active].description}", flush=True)
                result = yield from _one_epoch(
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
                    progress,
                    on_progress,
                )
                if _diverged(result) and not any(map(_diverged, run.history)):
                    _warn(
                        f"the run has diverged in epoch {epoch}: training loss "
                        f"{result.train_loss}, test loss {result.test_loss}"
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
    return check_finite("fit", "the learning rate", rate, 0.0)


def _percent(confusion: ConfusionMatrix) -> float:
    """The accuracy in %, rounded once."""
    return 100.0 * int(confusion.counts.trace()) / int(confusion.counts.sum())


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
    progress: bool | None,
    on_progress: Callable[[int], object] | None,
) -> Loop[EpochResult]:
    start = time.perf_counter()
    rate = _learning_rate(optimizer)
    images, labels = train
    parts: list[tuple[Tensor, Tensor, Tensor]] = []  # losses, predictions and true classes
    right = predicted = 0
    with progress_bar(description, len(order), " digits", progress) as bar:
        for piece in order.split(chunk):
            losses, predictions, *others = yield Steps(engine, images, labels, piece)
            targets = labels.index_select(0, others[0] if others else piece)
            parts.append((losses.double(), predictions, targets))
            right += int((predictions == targets).sum())
            predicted += len(predictions)
            bar.set_postfix_str(f"training {100.0 * right / predicted:.2f} %", refresh=False)
            bar.update(len(piece))
            if on_progress is not None:
                on_progress(len(piece))
    losses, predictions, targets = map(torch.cat, zip(*parts, strict=True))
    percent = (predictions == targets).double().mul(100.0)
    curve = percent.split(max(_CURVE_SAMPLES, -(-len(percent) // _CURVE_POINTS)))
    averaged = getattr(optimizer, "averaged", contextlib.nullcontext)
    with averaged():
        confusion, test_loss = evaluate(model, *test, criterion, progress=progress)
    train_confusion = ConfusionMatrix(len(confusion.counts))
    train_confusion.add(predictions, targets)
    return EpochResult(
        epoch=epoch,
        train_accuracy=_percent(train_confusion),
        test_accuracy=_percent(confusion),
        train_loss=float(losses.mean()),
        test_loss=test_loss,
        learning_rate=rate,
        seconds=time.perf_counter() - start,
        curve=[float(part.mean()) for part in curve],
        confusion=confusion.counts.tolist(),
        train_confusion=train_confusion.counts.tolist(),
    )


fit = alone(fitting, "fit")
