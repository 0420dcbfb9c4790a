"""Online SGD, one sample at a time, in compiled code: the reports' training without Python in it.

:class:`OnlineSGD` trains an ordinary module in place, sample after sample, on the CPU or on CUDA,
or several modules of one shape side by side::

    >>> import torch
    >>> from mnist_ops.mnist import models
    >>> from mnist_ops.training import online
    >>> model = models.convnet(dtype=torch.float64)
    >>> engine = online.OnlineSGD(model, loss="nll", lr=1e-3, lr_decay=1e-7)
    >>> images, labels = torch.randn(50, 1, 32, 32), torch.randint(0, 10, (50,))
    >>> losses, predictions = engine.run(images, labels, torch.randperm(50))
    >>> losses.shape
    torch.Size([50])
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import _torch_private as private
from ..ops._common import check_finite, check_integer
from .metrics import evaluating
from .network_text import UnsupportedError, read

__all__ = ["OnlineSGD", "UnsupportedError"]

LOSSES = ("nll", "multi_margin", "mse")

# Dropout's random numbers are drawn for a piece of a run at a time: at most this many.
_NUMBERS_AT_ONCE = 1 << 21

# How often, and with how many steps each time, threads="auto" times one thread and all of them.
_TRIALS, _TRIAL_STEPS = 3, 16


class OnlineSGD:
    """Stochastic gradient descent with batch size 1, entirely in C++ or CUDA.

    For each sample in turn: forward, loss, prediction, backward, update. The steps are those of
    :class:`mnist_ops.torch7.optim.SGD` behind autograd, but for rounding (1e-12 relative in float64
    after 100 steps) and for the time it takes. CPU and CUDA differ by rounding, too; on either one
    a run can be repeated bit for bit.

    On CUDA all of the device works on one sample: the step is a short list of phases, with every
    layer's work shared out among all multiprocessors, and nothing comes back to the host between
    samples. One network cannot fill such a device; given a list of models, it works on one sample
    of each of them at the same time.

    Args:
        model: a ``torch.nn.Sequential``, nested or not, in float64 or float32, trained in place;
            or a list of such modules of the same layers and shapes, on one device, each with its
            own parameters and, where there is dropout, its own generator. Its layers may be
            ``Conv2d`` (stride 1, no dilation, no groups, zero padding), ``Linear``, ``Tanh``,
            ``ReLU``, ``Sigmoid`` (PyTorch's or this library's),
            :class:`mnist_ops.nn.LPPool2d`, ``MaxPool2d`` (no dilation), ``AvgPool2d``,
            :class:`mnist_ops.nn.SubtractiveNorm2d`, :class:`mnist_ops.nn.Stage2d` (its three
            layers, one after the other), ``Flatten``, ``Identity``,
            :class:`mnist_ops.torch7.Dropout`, and ``LogSoftmax`` over the classes (PyTorch's,
            :class:`mnist_ops.nn.LogSoftmax` or :class:`mnist_ops.torch7.LogSoftmax`). Every
            parameter is trained.
        loss: ``"nll"``, ``"multi_margin"`` or ``"mse"``: :func:`mnist_ops.torch7.nll_loss`,
            :func:`~mnist_ops.torch7.multi_margin_loss`, :func:`~mnist_ops.torch7.mse_loss`.
        lr: learning rate of the first step. With a list of models it may be a sequence with one
            for each, as may ``lr_decay`` (the reports' is 1e-7) and ``weight_decay``.
        lr_decay, weight_decay, momentum, dampening, nesterov: as for
            :class:`mnist_ops.torch7.optim.SGD`.
        threads: how many threads of PyTorch's pool may share the work of a sample on the CPU;
            ``"auto"``: one or all of them, whichever is faster when the first images come (a second
            thread gains on an idle core and loses on a busy one). The results do not depend on it.

    Attributes:
        steps: samples used so far.
        velocities: one tensor for each parameter, or an empty list without momentum or before the
            first step; with a list of models, see ``engines``.
        engines: with a list of models, one ``OnlineSGD`` for each, which holds its state.

    Raises:
        UnsupportedError: (a ``ValueError``) for a layer, loss, dtype or device that the engine does
            not know; the message names it. Such networks train with
            :class:`mnist_ops.training.AutogradEngine`.
        TypeError, ValueError: for an impossible argument.

    Source: the training loop of both reports: Torch7's ``optim.sgd`` on one sample at a time.

    Example::

        >>> engine = OnlineSGD(model, lr=1e-3, lr_decay=1e-7)
        >>> for chunk in torch.randperm(len(images)).split(1000):  # Ctrl-C works between chunks
        ...     losses, predictions = engine.run(images, labels, chunk)
        >>> seeds = [models.convnet(generator=torch7.start(seed)) for seed in (1, 2, 3)]
        >>> engine = OnlineSGD(seeds, lr=[1e-3, 1e-3, 1e-4])
        >>> losses, predictions = engine.run(images, labels, torch.randperm(len(images)))
        >>> losses.shape
        torch.Size([3, 50])
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        loss: str = "nll",
        lr: float | Sequence[float] = 1e-3,
        lr_decay: float | Sequence[float] = 1e-7,
        weight_decay: float | Sequence[float] = 0.0,
        momentum: float = 0.0,
        dampening: float | None = None,
        nesterov: bool = False,
        threads: int | Literal["auto"] = 1,
    ) -> None:
        self.engines: list[OnlineSGD] = []
        if isinstance(model, (list, tuple)):
            rates = {"lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay}
            others = (momentum, dampening, nesterov, threads)
            self._start_several(model, loss, rates, others)
            return
        assert isinstance(model, nn.Module)
        if loss not in LOSSES:
            known = ", ".join(map(repr, LOSSES))
            raise ValueError(f"OnlineSGD: loss must be {known}, got {loss!r}")
        dampening = momentum if dampening is None else dampening
        numbers: dict[str, Any] = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "dampening": dampening,
        }
        self.lr, self.lr_decay, self.weight_decay, self.momentum, self.dampening = (
            check_finite("OnlineSGD", name, value, 0.0) for name, value in numbers.items()
        )
        if nesterov and (momentum == 0.0 or dampening != 0.0):
            raise ValueError(
                "OnlineSGD: nesterov needs momentum > 0 and dampening 0, "
                f"got momentum {momentum} and dampening {dampening}"
            )
        if threads != "auto":
            if isinstance(threads, str):
                raise TypeError(f"OnlineSGD: threads must be an int or 'auto', got {threads!r}")
            threads = check_integer("OnlineSGD", "threads", threads, 1)
        self.model = model
        self.loss = loss
        self.nesterov = bool(nesterov)
        self.threads: int | Literal["auto"] = threads
        self.steps = 0
        self.velocities: list[Tensor] = []
        # The operator that runs several models, and this one as one of them; None: the CPU's.
        self._operator: Any = None
        self._placed: dict[str, tuple[Any, object, Tensor]] = {}
        self._network, self._parameters, self._kernels, self._dropouts = read(model)
        self._device = self._parameters[0].device
        if self._device.type == "cuda":
            self._operator = torch.ops.mnist_ops.online_sgd_models

    def _start_several(
        self, models: Sequence[nn.Module], loss: str, rates: dict[str, Any], others: tuple[Any, ...]
    ) -> None:
        """Make an engine for each model."""
        if not models:
            raise ValueError("OnlineSGD: model must be a module or a list of one at least, got []")
        for name, value in rates.items():
            if isinstance(value, Iterable) and not isinstance(value, str):
                value = rates[name] = list(value)
                if len(value) != len(models):
                    raise ValueError(
                        f"OnlineSGD: {name} must be one number or one for each of {len(models)} "
                        f"models, got {len(value)}"
                    )
            else:
                rates[name] = [value] * len(models)
        self._join(
            [
                OnlineSGD(model, loss, *numbers, *others)
                for model, *numbers in zip(models, *rates.values(), strict=True)
            ]
        )

    @classmethod
    def of_engines(cls, engines: Sequence[OnlineSGD]) -> OnlineSGD:
        """Several engines as the one that a list of their models makes, which shares their state.

        Raises:
            ValueError: as for a list of models, and if their loss or kind of momentum differs.
        """
        several = cls.__new__(cls)
        several._join(engines)
        return several

    def _join(self, engines: Sequence[OnlineSGD]) -> None:
        """Take engines that can make their steps in one call; refuse others."""
        self.engines = list(engines)
        first, layout = self.engines[0], self.engines[0]._layout()
        seen: set[int] = set()
        generators: set[int] = set()
        for i, engine in enumerate(self.engines):
            ids = {id(parameter) for parameter in engine._parameters}
            if ids & seen:
                raise ValueError(f"OnlineSGD: model {i} shares parameters with one before it")
            seen |= ids
            if engine._dropouts:
                if id(engine._dropouts[0].generator) in generators:
                    raise ValueError(f"OnlineSGD: model {i} shares its generator with another one")
                generators.add(id(engine._dropouts[0].generator))
            if engine._layout() != layout:
                raise ValueError(
                    f"OnlineSGD: model {i} differs from model 0 in its layers, shapes, dtype, "
                    "device, loss or kind of momentum"
                )
        self.model = nn.ModuleList([engine.model for engine in self.engines])
        self.loss, self.nesterov = first.loss, first.nesterov
        self.momentum, self.dampening = first.momentum, first.dampening

    def _layout(self) -> tuple[Any, ...]:
        """What models that run together must have in common."""
        kernels = tuple(tuple(kernel.shape) for kernel in self._kernels)
        shapes = tuple(tuple(parameter.shape) for parameter in self._parameters)
        where = self._parameters[0].dtype, self._device
        return self._network, shapes, kernels, *where, self.loss, self.nesterov, self.momentum > 0

    @property
    def description(self) -> str:
        """What runs, in a line."""
        if self.engines:
            return f"{self.engines[0].description}, {len(self.engines)} models at once"
        if self._device.type == "cuda":
            how = f"{self._device}, persistent kernel"
        elif self.threads == "auto":
            how = "cpu, 1 thread or all"
        else:
            how = f"cpu, {self.threads} thread{'s' if self.threads != 1 else ''}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"compiled online SGD, {dtype}, {how}, batch size 1"

    @property
    def dtype(self) -> torch.dtype:
        """The network's."""
        return (self.engines or [self])[0]._parameters[0].dtype

    @property
    def chunk(self) -> int:
        """A good number of samples for one call of :meth:`run`.

        Few enough for Ctrl-C, enough for the work before the first and after the last of them to
        be lost in the rest.
        """
        engine = self.engines[0] if self.engines else self
        return 200 if engine._operator is None else 2000

    def run(self, images: Tensor, labels: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Train on ``images[order]``, one step per sample, in order.

        The interpreter's lock is released meanwhile; Ctrl-C waits for the end of the call, so give
        long orders in pieces. The module is put into training mode.

        Args:
            images: ``(N, C, H, W)``, or ``(N, features)`` for a network of vectors, float64 or
                float32; cast to the network's dtype sample by sample. For a network on CUDA they
                may be on the CPU: they are moved once, and again when another tensor comes or this
                one has changed.
            labels: int64 ``(N,)``, classes from 0.
            order: int64 ``(M,)``, the samples to use, each in ``[0, N)``; with a list of models
                also ``(models, M)``, an order for each.

        Returns:
            The losses ``(M,)`` in the network's dtype and the predicted classes ``(M,)`` int64,
            each sample's from before its own update; with a list of models ``(models, M)``. Both
            are on the network's device.

        Raises:
            TypeError: for an argument that is no tensor.
            RuntimeError: if shapes, dtypes, devices or values do not fit; nothing has changed then.
        """
        self._check_data(images, labels, order)
        engines = self.engines or [self]
        for engine in engines:
            engine.model.train()
        orders = order.expand(len(engines), -1) if order.dim() == 1 else order
        if engines[0]._operator is not None:
            images = engines[0]._place("images", images)
            labels = engines[0]._place("labels", labels)
        if images.dim() >= 2 and len(images) and order.numel():
            self._choose_threads(images)
        nothing = torch.empty(0, dtype=torch.float64, device="cpu")
        if not engines[0]._dropouts or images.dim() < 2:
            return self._results(_steps(engines, images, labels, orders, nothing))
        # One sample's numbers come together, layer after layer, as the original draws them.
        generators = [engine._dropouts[0].generator for engine in engines]
        per_sample = engines[0]._numbers_per_sample(images)
        results = []
        at_once = max(1, _NUMBERS_AT_ONCE // (per_sample * len(engines)))
        for piece in orders.split(at_once, dim=-1):
            before = [generator.get_state() for generator in generators]
            size = (piece.shape[-1], per_sample)
            uniform = torch.stack([engine._uniform(size) for engine in engines])
            try:
                results.append(_steps(engines, images, labels, piece, uniform))
            except Exception:
                for generator, state in zip(generators, before, strict=True):
                    generator.set_state(state)
                raise
        losses, predictions = zip(*results, strict=True)
        return self._results((torch.cat(losses, dim=-1), torch.cat(predictions, dim=-1)))

    def _results(self, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Losses and predictions, a row for each model where there is a list of them."""
        return found if self.engines else (found[0][0], found[1][0])

    def _uniform(self, size: tuple[int, int]) -> Tensor:
        """The next samples' numbers for dropout."""
        return self._dropouts[0].generator.uniform(0.0, 1.0, size)

    def _check_data(self, images: Tensor, labels: Tensor, order: Tensor) -> None:
        """Refuse what is elsewhere or of another dtype before anything is drawn or moved."""
        device = (self.engines or [self])[0]._device
        for name, tensor, dtypes in (
            ("images", images, (torch.float64, torch.float32)),
            ("labels", labels, (torch.int64,)),
            ("order", order, (torch.int64,)),
        ):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"OnlineSGD.run: {name} must be a Tensor, got {type(tensor)}")
            if tensor.device != device and tensor.device.type != "cpu":
                raise RuntimeError(f"online_sgd: {name} must be on {device}, got {tensor.device}")
            if tensor.dtype not in dtypes or tensor.layout != torch.strided:
                known = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                raise RuntimeError(
                    f"online_sgd: {name} must be {known}, got {tensor.dtype} {tuple(tensor.shape)} "
                    f"({tensor.layout})"
                )
        several = f" or ({len(self.engines)}, M)" if self.engines else ""
        if order.dim() != 1 and (not several or order.shape[:-1] != (len(self.engines),)):
            raise RuntimeError(
                f"online_sgd: order must be int64 (M,){several}, "
                f"got {order.dtype} {tuple(order.shape)}"
            )

    def check(self, images: Tensor) -> None:
        """See whether the network can run on such images, as :meth:`run` would find out.

        A run plans every layer for the images' shape. This plans one of no steps; nothing changes,
        but that ``threads="auto"`` makes its choice.

        Raises:
            UnsupportedError: if it cannot; PyTorch may run such a network nevertheless.
        """
        sample = images[:1].detach()
        count = len(sample)
        labels, order = (torch.zeros(size, dtype=torch.int64, device="cpu") for size in (count, 0))
        engines = self.engines or [self]
        try:
            self._check_data(sample, labels, order)
            sample, labels = sample.to(engines[0]._device), labels.to(engines[0]._device)
            uniform = torch.empty(0, dtype=torch.float64, device="cpu")
            _steps(engines, sample, labels, order.expand(len(engines), -1), uniform)
        except RuntimeError as error:
            raise UnsupportedError(str(error).splitlines()[0]) from None
        if count:
            self._choose_threads(sample)

    def _choose_threads(self, images: Tensor) -> None:
        """Settle on one thread or all of them: time both on images like these, on a copy."""
        for engine in self.engines or [self]:
            if engine.threads != "auto":
                continue
            every = torch.get_num_threads()
            engine.threads = 1
            if every > 1 and engine._operator is None:
                times: dict[int, list[float]] = {1: [], every: []}
                for _ in range(_TRIALS):
                    for threads, seconds in times.items():
                        seconds.append(engine._time_steps(images, threads))
                engine.threads = 1 if min(times[1]) <= min(times[every]) else every

    def _time_steps(self, images: Tensor, threads: int) -> float:
        """The seconds that a few steps take; they are made on copies and change nothing."""
        numbers = self._numbers_per_sample(images) if self._dropouts else 0
        order = torch.zeros(_TRIAL_STEPS, dtype=torch.int64, device="cpu")
        uniform = torch.zeros(_TRIAL_STEPS * numbers, dtype=torch.float64, device="cpu")
        copies = [parameter.detach().clone() for parameter in self._parameters]
        velocities = [torch.zeros_like(copy) for copy in copies] if self.momentum else []
        before = time.perf_counter()
        self._call(copies, velocities, images[:1], order[:1], order, uniform, threads)
        return time.perf_counter() - before

    def _place(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor on the network's device; a copy is kept for the next call."""
        if tensor.device == self._device:
            return tensor
        known = self._placed.get(name)
        version = private.version(tensor)
        if known is not None and known[0]() is tensor and known[1] == version:
            return known[2]
        moved = tensor.to(self._device)
        self._placed[name] = (weakref.ref(tensor), version, moved)
        return moved

    def _call(
        self,
        parameters: list[Tensor],
        velocities: list[Tensor],
        images: Tensor,
        labels: Tensor,
        order: Tensor,
        uniform: Tensor,
        threads: int,
    ) -> tuple[Tensor, Tensor]:
        """Call the CPU's operator."""
        rates = self.lr, self.lr_decay, self.weight_decay, self.momentum, self.dampening
        data = images, labels, order, uniform, LOSSES.index(self.loss), self.steps
        started = bool(self.velocities)
        with torch.no_grad():
            result: tuple[Tensor, Tensor] = torch.ops.mnist_ops.online_sgd(
                *(parameters, velocities, self._network, self._kernels),
                *(*data, *rates, self.nesterov, started, threads),
            )
        return result

    def _next_velocities(self) -> list[Tensor]:
        """Those there are, or zeros where the first step is still to come."""
        if not self.momentum or self.velocities:
            return self.velocities if self.momentum else []
        return [
            torch.zeros_like(p, requires_grad=False, memory_format=torch.contiguous_format)
            for p in self._parameters
        ]

    def _advance(self, velocities: list[Tensor], count: int) -> None:
        """Take note of steps that were made."""
        if velocities and count > 0:  # after no step the next one is still the first
            self.velocities = velocities
        self.steps += count
        # A graph that autograd recorded before holds the old values: let it notice.
        torch.autograd.graph.increment_version(self._parameters)

    def _numbers_per_sample(self, images: Tensor) -> int:
        """How many random numbers one forward pass draws: one per element that dropout sees."""
        counts: list[int] = []
        handles = [
            module.register_forward_pre_hook(lambda _, inputs: counts.append(inputs[0].numel()))
            for module in self._dropouts
        ]
        sample = self._parameters[0].new_zeros((1, *images.shape[1:]), requires_grad=False)
        try:
            with evaluating(self.model), torch.no_grad():  # nothing is drawn then
                self.model(sample)
        finally:
            for handle in handles:
                handle.remove()
        return sum(counts)

    def state_dict(self) -> dict[str, Any]:
        """The steps, velocities and, where there is dropout, its generator's state.

        Ints, strings and tensors, fit for ``torch.load(weights_only=True)``. The parameters are in
        the model's own ``state_dict``. With a list of models: their states, in a list.
        """
        if self.engines:
            return {"engines": [engine.state_dict() for engine in self.engines]}
        generator = self._dropouts[0].generator.get_state() if self._dropouts else None
        return {
            "steps": self.steps,
            "velocities": [velocity.clone() for velocity in self.velocities],
            "generator": generator,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that :meth:`state_dict` returned.

        Raises:
            ValueError: if it belongs to another network or another kind of run.
        """
        if self.engines or "engines" in state:
            states = state.get("engines", [])
            if len(states) != len(self.engines):
                raise ValueError(
                    f"OnlineSGD.load_state_dict: the state is of {len(states) or 'no list of'} "
                    f"models, not of {len(self.engines) or 'one'}"
                )
            for engine, one in zip(self.engines, states, strict=True):
                engine.load_state_dict(one)
            return
        velocities = list(state["velocities"])
        shapes = [tuple(velocity.shape) for velocity in velocities]
        if velocities and shapes != [tuple(p.shape) for p in self._parameters]:
            raise ValueError("OnlineSGD.load_state_dict: the velocities are of another network")
        if bool(velocities) != (self.momentum > 0 and state["steps"] > 0):
            raise ValueError(
                "OnlineSGD.load_state_dict: the velocities do not go with the momentum"
            )
        if (state["generator"] is None) != (not self._dropouts):
            raise ValueError("OnlineSGD.load_state_dict: the state is of another network's dropout")
        self.steps = int(state["steps"])
        self.velocities = [
            velocity.to(parameter.device, parameter.dtype, copy=True).contiguous()
            for velocity, parameter in zip(velocities, self._parameters, strict=False)
        ]
        if self._dropouts:
            self._dropouts[0].generator.set_state(state["generator"])


def _steps(
    engines: Sequence[OnlineSGD], images: Tensor, labels: Tensor, orders: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Make steps of which the random numbers are drawn, ``(models, M, numbers)`` or none."""
    run = _run_in_turn if engines[0]._operator is None else _run_together
    return run(engines, images, labels, orders, uniform)


def _run_together(
    engines: Sequence[OnlineSGD], images: Tensor, labels: Tensor, orders: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the engines of one device in one call of the operator for several models."""
    first = engines[0]
    velocities = [engine._next_velocities() for engine in engines]
    settings = [
        (e.lr, e.lr_decay, e.weight_decay, e.momentum, e.dampening, e.steps, bool(e.velocities))
        for e in engines
    ]
    with torch.no_grad():
        result = first._operator(
            [parameter.detach() for engine in engines for parameter in engine._parameters],
            [velocity for each in velocities for velocity in each],
            first._network,
            [kernel for engine in engines for kernel in engine._kernels],
            images,
            labels,
            orders.to(first._device),
            uniform.to(first._device),
            LOSSES.index(first.loss),
            torch.tensor(settings, dtype=torch.float64, device="cpu"),
            first.nesterov,
        )
    for engine, each in zip(engines, velocities, strict=True):
        engine._advance(each, orders.shape[1])
    return result


def _run_in_turn(
    engines: Sequence[OnlineSGD], images: Tensor, labels: Tensor, orders: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the engines one after the other; all or none of them change."""
    results, changed, undo = [], [], []
    numbers = uniform if uniform.dim() == 3 else uniform.expand(len(engines), -1)
    for engine, order, own_numbers in zip(engines, orders, numbers, strict=True):
        parameters = [parameter.detach() for parameter in engine._parameters]
        velocities = engine._next_velocities()
        if len(engines) > 1:
            undo.append([(now, now.clone()) for now in (*parameters, *velocities)])
        threads = 1 if isinstance(engine.threads, str) else engine.threads  # without steps: any
        data = images, labels, order, own_numbers, threads
        try:
            results.append(engine._call(parameters, velocities, *data))
        except Exception:
            for now, before in (pair for pairs in undo[:-1] for pair in pairs):
                now.copy_(before)
            raise
        changed.append(velocities)
    for engine, velocities in zip(engines, changed, strict=True):
        engine._advance(velocities, orders.shape[1])
    losses, predictions = zip(*results, strict=True)
    return torch.stack(losses), torch.stack(predictions)


def _fake(parameters, velocities, network, kernels, images, labels, order, uniform, *options):
    tensors = (*parameters, *velocities, *kernels, images, labels, order, uniform)
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        raise RuntimeError(
            f"online_sgd: all tensors must be on one device, got {', '.join(devices)}"
        )
    return parameters[0].new_empty(order.shape), order.new_empty(order.shape)


for _name in ("online_sgd", "online_sgd_models"):
    torch.library.register_fake(f"mnist_ops::{_name}", _fake)
