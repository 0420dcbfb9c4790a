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

import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import _libraries, torch7
from .. import _torch_private as private
from .. import nn as ops_nn
from ..ops._common import check_integer, check_number, pair
from ..ops.lp_pool import check_windows
from ..ops.softmax import check_beta
from ..torch7.optim import SGD

__all__ = ["OnlineSGD", "OptimizerEngine", "SharedLaunches", "UnsupportedError"]

LOSSES = ("nll", "multi_margin", "mse")

# Dropout's random numbers are drawn for a piece of a run at a time: at most this many.
_NUMBERS_AT_ONCE = 1 << 21


class UnsupportedError(ValueError):
    """The network or the optimizer is none that the engine knows; :attr:`reason` says what."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"OnlineSGD: {reason}; use the autograd loop (training.AutogradEngine)")
        self.reason = reason


class OnlineSGD:
    r"""Stochastic gradient descent with batch size 1, entirely in C++ or CUDA.

    For each sample in turn: forward, loss, prediction, backward, update. With t counting samples
    from 0, weight decay :math:`\lambda`, momentum m and dampening d:

    .. math::
        g &\leftarrow \nabla f(w) + \lambda w \\
        v &\leftarrow m v + (1 - d)\, g \quad (v = g \text{ in the first step}) \\
        w &\leftarrow w - \frac{lr}{1 + t \cdot lr\_decay}\, u, \qquad
        u = g + m v \text{ (Nesterov)},\ v \text{ (momentum)},\ g \text{ (neither)}

    This is :class:`mnist_ops.torch7.optim.SGD` behind autograd, but for rounding (1e-12 relative in
    float64 after 100 steps) and for the time it takes. CPU and CUDA differ by rounding, too; on
    either one a run can be repeated bit for bit.

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
            for each, as may ``lr_decay`` and ``weight_decay``.
        lr_decay: see above; the reports use 1e-7.
        weight_decay: 0 switches it off, as for ``momentum``.
        momentum: m.
        dampening: d, equal to ``momentum`` unless given, as in Torch7.
        nesterov: needs ``momentum > 0`` and ``dampening=0``.
        threads: how many threads of PyTorch's pool may share the work of a sample on the CPU. The
            results do not depend on it.

    Attributes:
        description: what runs, in a line.
        chunk: a good number of samples for one call of :meth:`run`: few enough for Ctrl-C, enough
            for the work before the first and after the last of them to be lost in the rest.
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
        threads: int = 1,
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
        _check_finite(numbers)
        if nesterov and (momentum == 0.0 or dampening != 0.0):
            raise ValueError(
                "OnlineSGD: nesterov needs momentum > 0 and dampening 0, "
                f"got momentum {momentum} and dampening {dampening}"
            )
        threads = check_integer("OnlineSGD", "threads", threads, 1)
        self.model = model
        self.loss = loss
        self.lr = float(numbers["lr"])
        self.lr_decay = float(numbers["lr_decay"])
        self.weight_decay = float(numbers["weight_decay"])
        self.momentum = float(momentum)
        self.dampening = float(dampening)
        self.nesterov = bool(nesterov)
        self.threads = threads
        self.steps = 0
        self.velocities: list[Tensor] = []
        # The operator that runs several models, and this one as one of them; None: the CPU's.
        self._operator: Any = None
        self._placed: dict[str, tuple[Any, object, Tensor]] = {}
        self._read_model()
        self._device = self._parameters[0].device
        dtype = str(self._parameters[0].dtype).removeprefix("torch.")
        if self._device.type == "cuda":
            self._operator = torch.ops.mnist_ops.online_sgd_models
            how = f"{self._device}, persistent kernel"
        else:
            how = f"cpu, {threads} thread{'s' if threads > 1 else ''}"
        self.description = f"compiled online SGD, {dtype}, {how}, batch size 1"

    def _start_several(
        self, models: Sequence[nn.Module], loss: str, rates: dict[str, Any], others: tuple[Any, ...]
    ) -> None:
        """Make an engine for each model, and see that they can share their launches."""
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
        self.engines = [
            OnlineSGD(model, loss, *numbers, *others)
            for model, *numbers in zip(models, *rates.values(), strict=True)
        ]
        first = self.engines[0]
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
            if engine._layout() != first._layout():
                raise ValueError(
                    f"OnlineSGD: model {i} differs from model 0 in its layers, shapes, dtype or "
                    "device"
                )
        self.model = nn.ModuleList(models)
        self.loss, self.threads, self.nesterov = first.loss, first.threads, first.nesterov
        self.momentum, self.dampening = first.momentum, first.dampening
        self.description = f"{first.description}, {len(models)} models at once"

    def _layout(self) -> tuple[Any, ...]:
        """What models that run together must have in common."""
        kernels = [tuple(kernel.shape) for kernel in self._kernels]
        shapes = [tuple(parameter.shape) for parameter in self._parameters]
        return self._network, shapes, kernels, self._parameters[0].dtype, self._device

    @property
    def dtype(self) -> torch.dtype:
        """The network's."""
        return (self.engines or [self])[0]._parameters[0].dtype

    @property
    def chunk(self) -> int:
        """A good number of samples for one call of :meth:`run`."""
        engine = self.engines[0] if self.engines else self
        return 200 if engine._operator is None else 2000

    def _read_model(self) -> None:
        """Turn the module into the engine's text, and refuse what it cannot say."""
        lines: list[str] = []
        self._parameters: list[nn.Parameter] = []
        self._kernels: list[Tensor] = []
        self._dropouts: list[torch7.Dropout] = []
        seen: set[int] = set()
        dtype = next((p.dtype for p in self.model.parameters()), torch.float64)
        for name, module in _layers(self.model):
            lines.append(f"{_line(name, module, dtype)} {' '.join(name.split())}")
            for parameter_name, parameter in module.named_parameters():
                where = f"layer {name!r} ({type(module).__name__})"
                if id(parameter) in seen:
                    raise UnsupportedError(
                        f"{where} shares its {parameter_name} with another layer"
                    )
                if not parameter.requires_grad:
                    raise UnsupportedError(f"{where} has a frozen {parameter_name}")
                if parameter.device.type not in ("cpu", "cuda"):
                    raise UnsupportedError(
                        f"{where} is on {parameter.device}, the engine runs on the CPU and on CUDA"
                    )
                missing = _libraries.CUDA_MISSING
                if not parameter.is_cuda:
                    missing = "the CPU's are not loaded" * (_libraries.CPU_CAPABILITY == "none")
                if missing:
                    raise UnsupportedError(f"{where} is on {parameter.device}: {missing}")
                if parameter.dtype not in (torch.float64, torch.float32):
                    raise UnsupportedError(f"{where} is {parameter.dtype}, not float64 or float32")
                seen.add(id(parameter))
                self._parameters.append(parameter)
            if type(module) is ops_nn.SubtractiveNorm2d:
                self._kernels.append(module.kernel)
            if isinstance(module, torch7.Dropout) and module.p > 0:
                self._dropouts.append(module)
        if not self._parameters:
            raise UnsupportedError("the network has no parameters")
        devices = {tensor.device for tensor in (*self._parameters, *self._kernels)}
        if len(devices) > 1:
            names = ", ".join(sorted(map(str, devices)))
            raise UnsupportedError(f"the network must be on one device, got {names}")
        dtypes = {parameter.dtype for parameter in self._parameters}
        if len(dtypes) > 1:
            names = ", ".join(sorted(map(str, dtypes)))
            raise UnsupportedError(f"the parameters must have one dtype, got {names}")
        if len({id(module.generator) for module in self._dropouts}) > 1:
            raise UnsupportedError("the Dropout layers must draw from one generator")
        self._network = "\n".join(lines)

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
        if self.engines and order.dim() == 1:
            order = order.expand(len(engines), -1)
        elif self.engines and (order.dim() != 2 or len(order) != len(engines)):
            raise RuntimeError(
                f"online_sgd: order must be int64 (M,) or ({len(engines)}, M), "
                f"got {order.dtype} {tuple(order.shape)}"
            )
        if engines[0]._operator is not None:
            images = engines[0]._place("images", images)
            labels = engines[0]._place("labels", labels)
        nothing = torch.empty(0, dtype=torch.float64, device="cpu")
        if not engines[0]._dropouts or order.dim() not in (1, 2) or images.dim() < 2:
            return self._run(images, labels, order, nothing)
        # One sample's numbers come together, layer after layer, as the original draws them.
        generators = [engine._dropouts[0].generator for engine in engines]
        per_sample = engines[0]._numbers_per_sample(images)
        results = []
        at_once = max(1, _NUMBERS_AT_ONCE // (per_sample * len(engines)))
        for piece in order.split(at_once, dim=-1):
            before = [generator.get_state() for generator in generators]
            size = (piece.shape[-1], per_sample)
            uniform = torch.stack([engine._uniform(size) for engine in engines])
            try:
                results.append(self._run(images, labels, piece, uniform))
            except Exception:
                for generator, state in zip(generators, before, strict=True):
                    generator.set_state(state)
                raise
        losses, predictions = zip(*results, strict=True)
        return torch.cat(losses, dim=-1), torch.cat(predictions, dim=-1)

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

    def check(self, images: Tensor) -> None:
        """See whether the network can run on such images, as :meth:`run` would find out.

        A run plans every layer for the images' shape. This plans one of no steps; nothing changes.

        Raises:
            UnsupportedError: if it cannot; PyTorch may run such a network nevertheless.
        """
        sample = images[:1].detach()
        count = len(sample)
        labels, order = (torch.zeros(size, dtype=torch.int64, device="cpu") for size in (count, 0))
        try:
            self._check_data(sample, labels, order)
            device = (self.engines or [self])[0]._device
            if self.engines:
                order = order.expand(len(self.engines), -1)
            uniform = torch.empty(0, dtype=torch.float64, device="cpu")
            self._run_now(sample.to(device), labels.to(device), order, uniform)
        except RuntimeError as error:
            raise UnsupportedError(str(error).splitlines()[0]) from None

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

    def _run(
        self, images: Tensor, labels: Tensor, order: Tensor, uniform: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Steps of which the random numbers are drawn; OptimizerEngine may share them."""
        return self._run_now(images, labels, order, uniform)

    def _run_now(
        self, images: Tensor, labels: Tensor, order: Tensor, uniform: Tensor
    ) -> tuple[Tensor, Tensor]:
        engines = self.engines or [self]
        if engines[0]._operator is not None:
            orders = order if self.engines else order.unsqueeze(0)
            losses, predictions = _run_together(engines, images, labels, orders, uniform)
            return (losses, predictions) if self.engines else (losses[0], predictions[0])
        if self.engines:
            return _run_in_turn(engines, images, labels, order, uniform)
        started = bool(self.velocities)
        velocities = self._next_velocities()
        with torch.no_grad():
            result = torch.ops.mnist_ops.online_sgd(
                [parameter.detach() for parameter in self._parameters],
                velocities,
                self._network,
                self._kernels,
                images,
                labels,
                order,
                uniform,
                LOSSES.index(self.loss),
                self.steps,
                self.lr,
                self.lr_decay,
                self.weight_decay,
                self.momentum,
                self.dampening,
                self.nesterov,
                started,
                self.threads,
            )
        self._advance(velocities, len(order))
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
        parameter = self._parameters[0]
        sample = parameter.new_zeros((1, *images.shape[1:]), requires_grad=False)
        try:
            with torch.no_grad():
                self.model.eval()(sample)  # in evaluation mode nothing is drawn
        finally:
            self.model.train()
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
            True,
        )
    for engine, each in zip(engines, velocities, strict=True):
        engine._advance(each, orders.shape[1])
    return result


def _run_in_turn(
    engines: Sequence[OnlineSGD], images: Tensor, labels: Tensor, order: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the engines one after the other; all or none of them change."""
    results, undo = [], []
    numbers = uniform if uniform.dim() == 3 else uniform.expand(len(engines), -1)
    for engine, own_order, own_numbers in zip(engines, order, numbers, strict=True):
        values = [parameter.detach().clone() for parameter in engine._parameters]
        velocities = [velocity.clone() for velocity in engine.velocities]
        undo.append((engine, values, velocities, engine.steps))
        try:
            results.append(engine._run_now(images, labels, own_order, own_numbers))
        except Exception:
            for changed, values, velocities, steps in undo[:-1]:
                with torch.no_grad():
                    for parameter, value in zip(changed._parameters, values, strict=True):
                        parameter.copy_(value)
                changed.velocities, changed.steps = velocities, steps
            raise
    losses, predictions = zip(*results, strict=True)
    return torch.stack(losses), torch.stack(predictions)


@dataclass
class _SharedCall:
    """What one engine wants to run, and what came of it."""

    engine: OnlineSGD
    images: Tensor
    labels: Tensor
    order: Tensor
    uniform: Tensor
    result: tuple[Tensor, Tensor] | None = None
    error: BaseException | None = None

    def kind(self) -> str:
        """Calls of one kind can be one."""
        e = self.engine
        others = (e.loss, e.nesterov, e.momentum > 0, tuple(self.order.shape))
        return repr((*e._layout(), *others))


class SharedLaunches:
    """Lets training loops in several threads run their steps together.

    One network cannot fill a GPU. Loops that were written for one network each go on as they are,
    in a thread each: every call of their engines waits until all the others have called, too, and
    those of one kind become one call for several models, as of :class:`OnlineSGD` with a list. The
    results are, bit for bit, those of each loop alone.

    Args:
        members: how many loops there are. Each of them calls :meth:`leave` at its end, however it
            ends: the others wait for it.

    Example::

        >>> shared = SharedLaunches(len(runs))
        >>> def train(run):
        ...     try:
        ...         engine = OptimizerEngine(run.model, run.optimizer, shared=shared)
        ...         fit(run.model, ..., engine=engine)
        ...     finally:
        ...         shared.leave()
        >>> threads = [threading.Thread(target=train, args=(run,)) for run in runs]
    """

    def __init__(self, members: int) -> None:
        self._members = check_integer("SharedLaunches", "members", members, 1)
        self._waiting: list[_SharedCall] = []
        self._condition = threading.Condition()
        self._stopped = False
        # What the engines have moved to the device, once for all of them.
        self._placed: dict[str, tuple[Any, object, Tensor]] = {}

    def leave(self) -> None:
        """One member will call no more."""
        with self._condition:
            self._members -= 1
            self._serve_if_all_wait()

    def stop(self) -> None:
        """Make every call that waits, and every later one, raise an ``InterruptedError``."""
        with self._condition:
            self._stopped = True
            self._condition.notify_all()

    def _run(
        self, engine: OnlineSGD, images: Tensor, labels: Tensor, order: Tensor, uniform: Tensor
    ) -> tuple[Tensor, Tensor]:
        call = _SharedCall(engine, images, labels, order, uniform)
        with self._condition:
            self._waiting.append(call)
            self._serve_if_all_wait()
            while call.result is None and call.error is None and not self._stopped:
                self._condition.wait()
        if call.error is not None:
            raise call.error
        if call.result is None:
            raise InterruptedError("the runs that share their launches were stopped")
        return call.result

    def _serve_if_all_wait(self) -> None:
        if not self._waiting or len(self._waiting) < self._members or self._stopped:
            return
        calls, self._waiting = self._waiting, []
        kinds: dict[str, list[_SharedCall]] = {}
        for call in calls:
            kinds.setdefault(call.kind(), []).append(call)
        for alike in kinds.values():
            try:
                losses, predictions = self._run_as_one(alike)
                for call, *result in zip(alike, losses, predictions, strict=True):
                    call.result = (result[0], result[1])
            except BaseException as error:  # it belongs to the threads whose calls these are
                for call in alike:
                    call.error = error
        self._condition.notify_all()

    @staticmethod
    def _run_as_one(calls: Sequence[_SharedCall]) -> tuple[Tensor, Tensor]:
        first = calls[0]
        images, labels = first.images, first.labels
        orders = [call.order for call in calls]
        if any(call.images is not images or call.labels is not labels for call in calls):
            images = torch.cat([call.images for call in calls])
            labels = torch.cat([call.labels for call in calls])
            begin = 0
            for i, call in enumerate(calls):
                orders[i] = orders[i] + begin
                begin += len(call.images)
        uniform = first.uniform
        if uniform.numel():
            uniform = torch.cat([call.uniform for call in calls])
        engines = [call.engine for call in calls]
        run = _run_in_turn if first.engine._operator is None else _run_together
        return run(engines, images, labels, torch.stack(orders), uniform)


class OptimizerEngine(OnlineSGD):
    """:class:`OnlineSGD` with its settings and state in a :class:`mnist_ops.torch7.optim.SGD`.

    Steps, velocities and learning rate are read from the optimizer before each run and written back
    after it, so that the two ways of training can take turns, and checkpoints of the optimizer are
    checkpoints of the run.

    Args:
        model: as for :class:`OnlineSGD`.
        optimizer: exactly a ``SGD``, one group with all of the model's parameters.
        criterion: :func:`mnist_ops.torch7.nll_loss`, ``multi_margin_loss`` or ``mse_loss``.
        transform: applied to each image ``(1, C, H, W)`` before use, for augmentation, or, where it
            has a true attribute ``batched``, to all images of a run at once. Together with dropout
            each sample's random numbers are the transform's, then dropout's, as they are used; one
            that has ``draw(image)`` and ``apply_numbers(images, numbers)``, as those of
            :mod:`mnist_ops.mnist.transforms`, is then applied to many samples at once, too.
        threads: as for :class:`OnlineSGD`.
        shared: of several runs in threads of one process, see :class:`SharedLaunches`.

    Raises:
        UnsupportedError: if the network, optimizer or criterion is none that the engine knows.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Callable[..., Tensor] = torch7.nll_loss,
        transform: Callable[[Tensor], Tensor] | None = None,
        threads: int = 1,
        shared: SharedLaunches | None = None,
    ) -> None:
        if not isinstance(optimizer, SGD) or type(optimizer).step is not SGD.step:
            raise UnsupportedError(f"the optimizer is {type(optimizer).__name__}, not SGD")
        if len(optimizer.param_groups) != 1:
            raise UnsupportedError("the optimizer has several parameter groups")
        loss = next((text for known, text in _CRITERIA.items() if known is criterion), None)
        if loss is None:
            name = getattr(criterion, "__name__", type(criterion).__name__)
            raise UnsupportedError(f"the criterion {name} is not one of the engine's")
        self.optimizer = optimizer
        self.transform = transform
        self._drawn: Tensor | None = None
        settings = {name: optimizer.param_groups[0][name] for name in _SETTINGS}
        super().__init__(model, loss, threads=threads, **settings)
        if {id(p) for p in optimizer.param_groups[0]["params"]} != set(map(id, self._parameters)):
            raise UnsupportedError("the optimizer's parameters are not those of the network")
        self.shared = shared
        if shared is not None:
            self._placed = shared._placed

    def run(self, images: Tensor, labels: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`OnlineSGD.run`; the results are on the CPU."""
        group, state = self.optimizer.param_groups[0], self.optimizer.state
        _check_finite({name: group[name] for name in _SETTINGS if name != "nesterov"})
        for name in _SETTINGS:
            setattr(self, name, group[name])
        self.steps = group["steps"]
        self.velocities = [state[p]["velocity"] for p in self._parameters if "velocity" in state[p]]
        if self.transform is not None:
            self.model.train()
            samples = images.index_select(0, order).to(self._parameters[0].dtype)
            images = self._transformed(samples)
            labels = labels.index_select(0, order)
            order = torch.arange(len(order), device="cpu")
        losses, predictions = super().run(images, labels, order)
        group["steps"] = self.steps
        for parameter, velocity in zip(self._parameters, self.velocities, strict=False):
            state[parameter]["velocity"] = velocity
        return losses.cpu(), predictions.cpu()

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

    def _run(
        self, images: Tensor, labels: Tensor, order: Tensor, uniform: Tensor
    ) -> tuple[Tensor, Tensor]:
        run = self._run_now if self.shared is None else partial(self.shared._run, self)
        return run(images, labels, order, uniform)


_SETTINGS = ("lr", "lr_decay", "weight_decay", "momentum", "dampening", "nesterov")
_CRITERIA: dict[Callable[..., Tensor], str] = {
    torch7.nll_loss: "nll",
    torch7.multi_margin_loss: "multi_margin",
    torch7.mse_loss: "mse",
}


def _layers(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers in the order of forward, with their names in the model."""
    if private.has_hooks(module):
        raise UnsupportedError(f"layer {name or type(module).__name__!r} has hooks")
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        # named_children would leave out a layer that comes a second time.
        for child_name, child in module.named_modules(remove_duplicate=False):
            if child is not module and "." not in child_name:
                yield from _layers(child, f"{name}.{child_name}" if name else child_name)
    elif type(module) is ops_nn.Stage2d:
        yield from _layers(module.unfused(), name)
    elif not isinstance(module, nn.Identity):
        yield name or type(module).__name__, module


def _check_finite(numbers: dict[str, Any]) -> None:
    for name, value in numbers.items():
        if not 0.0 <= check_number("OnlineSGD", name, value) < math.inf:
            raise ValueError(f"OnlineSGD: {name} must be >= 0 and finite, got {value}")


def _number(value: float) -> str:
    """A number as C++ streams read it, to the last bit."""
    return "inf" if math.isinf(value) else repr(float(value))


def _line(name: str, module: nn.Module, dtype: torch.dtype) -> str:
    """One layer in the engine's words; csrc/online/network_text.h lists them."""
    kind = type(module)
    where = f"layer {name!r} ({kind.__name__})"

    def need(condition: bool, what: str) -> None:
        if not condition:
            raise UnsupportedError(f"{where} {what}")

    def pool(module: Any) -> str:
        stride = module.kernel_size if module.stride is None else module.stride
        values = (module.kernel_size, stride, module.padding)
        numbers = [n for value in values for n in pair(where, "kernel_size", value)]
        return " ".join(map(str, [*numbers, int(module.ceil_mode)]))

    if isinstance(module, nn.Conv2d) and kind is nn.Conv2d:
        need(pair(where, "stride", module.stride) == [1, 1], f"has stride {module.stride}, not 1")
        need(pair(where, "dilation", module.dilation) == [1, 1], f"has dilation {module.dilation}")
        need(module.groups == 1, f"has {module.groups} groups")
        need(module.padding_mode == "zeros", f"has padding_mode {module.padding_mode!r}")
        kernel = pair(where, "kernel_size", module.kernel_size)
        if module.padding == "valid":
            padding = [0, 0]
        elif module.padding == "same":
            need(all(k % 2 == 1 for k in kernel), "has padding 'same' of an even kernel")
            padding = [k // 2 for k in kernel]
        else:
            padding = pair(where, "padding", module.padding)
        numbers = [module.out_channels, *kernel, *padding, int(module.bias is not None)]
        return "conv2d " + " ".join(map(str, numbers))
    if isinstance(module, nn.Linear) and kind is nn.Linear:
        return f"linear {module.out_features} {int(module.bias is not None)}"
    if kind in _PLAIN:
        return _PLAIN[kind]
    if isinstance(module, ops_nn.LPPool2d) and kind is ops_nn.LPPool2d:
        options = (module.kernel_size, module.stride, module.padding, module.ceil_mode)
        p, *_ = check_windows(where, module.norm_type, *options, dtype)
        return f"lp_pool2d {_number(p)} {pool(module)}"
    if isinstance(module, nn.MaxPool2d) and kind is nn.MaxPool2d:
        need(pair(where, "dilation", module.dilation) == [1, 1], f"has dilation {module.dilation}")
        need(not module.return_indices, "has return_indices")
        return f"max_pool2d {pool(module)}"
    if isinstance(module, nn.AvgPool2d) and kind is nn.AvgPool2d:
        divisor = module.divisor_override or 0
        return f"avg_pool2d {pool(module)} {int(module.count_include_pad)} {divisor}"
    if isinstance(module, nn.Flatten) and kind is nn.Flatten:
        need(
            module.start_dim == 1 and module.end_dim == -1,
            f"flattens the dimensions {module.start_dim} to {module.end_dim}, not 1 to -1",
        )
        return "flatten"
    if isinstance(module, torch7.Dropout) and kind is torch7.Dropout:
        return f"dropout {_number(module.p)}" if module.p > 0 else "identity"
    if isinstance(module, (nn.LogSoftmax, ops_nn.LogSoftmax)) and kind in (
        nn.LogSoftmax,
        ops_nn.LogSoftmax,
    ):
        need(module.dim in (1, -1), f"normalises dimension {module.dim}, not the classes (1 or -1)")
        return f"log_softmax {_number(check_beta(where, getattr(module, 'beta', 1.0), dtype))}"
    raise UnsupportedError(f"{where} is not one of the engine's layers")


_PLAIN: dict[type[nn.Module], str] = {
    nn.Tanh: "tanh",
    nn.ReLU: "relu",
    nn.Sigmoid: "sigmoid",
    ops_nn.Sigmoid: "sigmoid",
    ops_nn.SubtractiveNorm2d: "subtractive_norm2d",
    torch7.LogSoftmax: "log_softmax_torch7",
}


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
