"""What trains on a batch: autograd with an optimizer, or the compiled engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import torch7
from . import online
from .metrics import predicted_classes

#: A loss per sample: ``criterion(output, target, reduction="none")`` of shape ``(N,)``.
Criterion = Callable[..., Tensor]


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
