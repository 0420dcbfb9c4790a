"""What trains on a batch: autograd with an optimizer, or the compiled engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .. import torch7
from ..ops._common import check_finite
from ..torch7.optim import SGD
from . import online
from .averaging import AveragedSGD
from .metrics import predicted_classes

#: A loss per sample: ``criterion(output, target, reduction="none")`` of shape ``(N,)``.
Criterion = Callable[..., Tensor]


class Engine(Protocol):
    """What runs the training steps. :func:`fit` hands it one chunk of an epoch at a time."""

    @property
    def description(self) -> str:
        """What runs, in a line."""

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
        results = torch.cat(losses).cpu(), predicted_classes(torch.cat(outputs)).cpu()
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


class OptimizerEngine(online.OnlineSGD):
    """The compiled engine with its settings and state in a :class:`mnist_ops.torch7.optim.SGD`.

    Steps, velocities and learning rate are read from the optimizer before each run and written back
    after it, so that the two ways of training can take turns, and checkpoints of the optimizer are
    checkpoints of the run.

    Args:
        model: as for :class:`~mnist_ops.training.online.OnlineSGD`.
        optimizer: a ``SGD`` or :class:`AveragedSGD`, no subclass, one group with all of the
            model's parameters.
        criterion: :func:`mnist_ops.torch7.nll_loss`, ``multi_margin_loss`` or ``mse_loss``.
        transform: applied to each image ``(1, C, H, W)`` before use, for augmentation, or, where it
            has a true attribute ``batched``, to all images of a run at once. Together with dropout
            each sample's random numbers are the transform's, then dropout's, as they are used; one
            that has ``draw(image)`` and ``apply_numbers(images, numbers)``, as those of
            :mod:`mnist_ops.mnist.transforms`, is then applied to many samples at once, too.
        threads: as for :class:`~mnist_ops.training.online.OnlineSGD`.

    Raises:
        UnsupportedError: if the network, optimizer or criterion is none that the engine knows.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Callable[..., Tensor] = torch7.nll_loss,
        transform: Callable[[Tensor], Tensor] | None = None,
        threads: int | Literal["auto"] = 1,
    ) -> None:
        # A subclass may have overridden any part of the step.
        if type(optimizer) not in (SGD, AveragedSGD):
            raise online.UnsupportedError(f"the optimizer is {type(optimizer).__name__}, not SGD")
        if len(optimizer.param_groups) != 1:
            raise online.UnsupportedError("the optimizer has several parameter groups")
        loss = next((text for known, text in _CRITERIA.items() if known is criterion), None)
        if loss is None:
            name = getattr(criterion, "__name__", type(criterion).__name__)
            raise online.UnsupportedError(f"the criterion {name} is not one of the engine's")
        self.optimizer = optimizer
        self.transform = transform
        self._drawn: Tensor | None = None
        settings = {name: optimizer.param_groups[0][name] for name in _SETTINGS}
        super().__init__(model, loss, threads=threads, **settings)
        if {id(p) for p in optimizer.param_groups[0]["params"]} != set(map(id, self._parameters)):
            raise online.UnsupportedError("the optimizer's parameters are not those of the network")

    def run(self, images: Tensor, labels: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`~mnist_ops.training.online.OnlineSGD.run`; the results are on the CPU."""
        self._read_optimizer()
        losses, predictions = super().run(*self._prepared(images, labels, order))
        self._write_optimizer()
        return losses.cpu(), predictions.cpu()

    def _read_optimizer(self) -> None:
        group, state = self.optimizer.param_groups[0], self.optimizer.state
        for name in _SETTINGS:
            if name != "nesterov":
                check_finite("OnlineSGD", name, group[name], 0.0)
            setattr(self, name, group[name])
        self.steps = group["steps"]
        self.velocities = [state[p]["velocity"] for p in self._parameters if "velocity" in state[p]]

    def _write_optimizer(self) -> None:
        self.optimizer.param_groups[0]["steps"] = self.steps
        for parameter, velocity in zip(self._parameters, self.velocities, strict=False):
            self.optimizer.state[parameter]["velocity"] = velocity

    def _prepared(
        self, images: Tensor, labels: Tensor, order: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a run is of: with a transform its images, transformed and in their order."""
        if self.transform is None:
            return images, labels, order
        self.model.train()
        samples = images.index_select(0, order).to(self.dtype)
        labels = labels.index_select(0, order)
        return self._transformed(samples), labels, torch.arange(len(order), device="cpu")

    def _transformed(self, samples: Tensor) -> Tensor:
        """The samples after the transform; with dropout, each one's numbers for it follow."""
        transform = self.transform
        assert transform is not None
        # A transform that gives the same bits for many samples at once says so.
        batched = getattr(transform, "batched", False)
        if not self._dropouts or not len(samples):
            pieces = [samples] if batched else samples.split(1)
            return torch.cat([transform(piece) for piece in pieces])
        draw = getattr(transform, "draw", None) if batched else None
        per_sample = self._numbers_per_sample(samples)
        results, drawn = [], []
        for sample in samples.split(1):
            results.append((draw or transform)(sample))
            drawn.append(super()._uniform((1, per_sample)))
        self._drawn = torch.cat(drawn)
        if draw is None:
            return torch.cat(results)
        images: Tensor = transform.apply_numbers(samples, torch.cat(results))  # type: ignore[attr-defined]
        return images

    def _uniform(self, size: tuple[int, int]) -> Tensor:
        if self._drawn is None:
            return super()._uniform(size)
        first, self._drawn = self._drawn[: size[0]], self._drawn[size[0] :]
        return first


_SETTINGS = ("lr", "lr_decay", "weight_decay", "momentum", "dampening", "nesterov")
_CRITERIA: dict[Callable[..., Tensor], str] = {
    torch7.nll_loss: "nll",
    torch7.multi_margin_loss: "multi_margin",
    torch7.mse_loss: "mse",
}


class Steps(NamedTuple):
    """What a training loop wants to be run: ``engine.run(images, labels, order)``."""

    engine: Engine
    images: Tensor
    labels: Tensor
    order: Tensor

    def kind(self) -> Any:
        """Steps of one kind can be those of several models in one run."""
        engine = self.engine
        if not isinstance(engine, OptimizerEngine):
            return id(engine)
        engine._read_optimizer()
        # Images as they are are shared, transformed ones copied.
        shared = (id(self.images), id(self.labels)) if engine.transform is None else ()
        return *engine._layout(), *shared, self.images.shape[1:], len(self.order)


def run_steps(alike: Sequence[Steps]) -> list[tuple[Tensor, ...]]:
    """Run steps of one kind, those of several models together; the results of each engine's run."""
    engines = [steps.engine for steps in alike if isinstance(steps.engine, OptimizerEngine)]
    if len(engines) < 2:
        return [engine.run(*data) for engine, *data in alike]
    for engine in engines:
        engine._read_optimizer()
    every = [engine._prepared(*data) for engine, (_, *data) in zip(engines, alike, strict=True)]
    images, labels, _ = every[0]
    orders = torch.stack([order for *_, order in every])
    if engines[0].transform is not None:
        images, labels = (torch.cat([one[i] for one in every]) for i in range(2))
        orders = torch.arange(len(images), device="cpu").view(orders.shape)
    losses, predictions = online.OnlineSGD.of_engines(engines).run(images, labels, orders)
    for engine in engines:
        engine._write_optimizer()
    return list(zip(losses.cpu(), predictions.cpu(), strict=True))


def choose_engine(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    criterion: Criterion = torch7.nll_loss,
    batch_size: int = 1,
    transform: Callable[[Tensor], Tensor] | None = None,
    images: Tensor | None = None,
) -> Engine:
    """The compiled engine where it can run the steps, else autograd; arguments as for :func:`fit`.

    :class:`mnist_ops.training.online.OnlineSGD` is taken for batch size 1 with ``SGD``, one of the
    criteria of :mod:`mnist_ops.torch7`, and a network of layers that it knows, on the CPU or on
    CUDA. ``images``, the training set, tell whether it knows them for images of that shape, too:
    PyTorch pools where it finds a window outside. The ``description`` says which one it is and, at
    batch size 1, why not the compiled one. On the CPU it runs with ``threads="auto"``: a second
    thread gains 1.6 to 1.8 times on two idle cores and loses ten times on busy ones.
    """
    reason = ""
    if batch_size == 1:
        try:
            compiled = OptimizerEngine(model, optimizer, criterion, transform, "auto")
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
