"""Torch7's random numbers, initialisation, log-softmax and criteria: what makes digits match.

A run of the original scripts is one stream of 32-bit words from a Mersenne Twister, drawn in a
fixed order: start-up, the layers' initial values, then one shuffle before each epoch. This module
draws the same words in the same order::

    >>> from mnist_ops.mnist import models
    >>> from mnist_ops import torch7
    >>> generator = torch7.start(seed=1)            # as the script stands before it builds the net
    >>> model = models.convnet(dtype=torch.float64, generator=generator)
    >>> generator.randperm(60000)[:3]
    tensor([27186, 35875, 55840])

Torch7 counts classes and indices from 1; everything here counts from 0.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from typing import Any, BinaryIO, SupportsIndex

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import nn as ops_nn
from .. import ops
from ..ops._common import check_integer, check_number

__all__ = [
    "Dropout",
    "Generator",
    "LogSoftmax",
    "Softmax",
    "class_targets",
    "initialize",
    "load_net",
    "log_softmax",
    "mse_loss",
    "multi_margin_loss",
    "nll_loss",
    "normalization_words",
    "start",
]

# Loading Torch7's ``nn`` package builds one Linear(1, 2): two weights and two biases.
STARTUP_WORDS = 4


class Generator:
    """Torch7's random number generator (``torch.Generator``, ``lib/TH/THRandom.c``).

    A Mersenne Twister (MT19937) with the classic seeding, so its words are those of
    :class:`numpy.random.RandomState` of the same seed; the distributions on top are Torch7's own.

    Args:
        seed: an integer in ``[0, 2**32)``. ``generator.seed`` keeps it.

    Raises:
        TypeError, ValueError: if ``seed`` is not such an integer.

    Example::

        >>> Generator(1).random32(2)
        array([1791095845, 4282876139], dtype=uint64)
    """

    def __init__(self, seed: int = 1) -> None:
        self.manual_seed(seed)

    def manual_seed(self, seed: int) -> Generator:
        """Start again from ``seed`` and forget the second half of a pair of normals."""
        if isinstance(seed, bool) or not isinstance(seed, SupportsIndex):
            raise TypeError(f"Generator: seed must be an int, got {seed!r}")
        seed = operator.index(seed)
        if not 0 <= seed < 2**32:
            raise ValueError(f"Generator: seed must be in [0, 2**32), got {hex(seed)}")
        self.seed = seed
        self._words: Any = np.random.MT19937()
        # MT19937(seed) would hash the seed first; RandomState seeds as Torch7 does.
        state: Any = np.random.RandomState(seed).get_state(legacy=False)
        self._words.state = state
        self._second_normal: float | None = None
        return self

    def random32(self, size: int) -> np.ndarray:
        """The next ``size`` raw 32-bit words, as uint64."""
        return self._words.random_raw(size)

    def consume(self, count: int) -> None:
        """Skip ``count`` words."""
        count = check_integer("Generator.consume", "count", count, 0)
        self._words.random_raw(count, output=False)

    def _unit(self, size: int) -> np.ndarray:
        return self.random32(size) * 2.0**-32

    def uniform(self, low: float = 0.0, high: float = 1.0, size: int | Sequence[int] = 1) -> Tensor:
        """``word * 2**-32 * (high - low) + low``, float64, row-major in shape ``size``."""
        shape = _shape("Generator.uniform", size)
        values = self._unit(math.prod(shape)) * (high - low) + low
        return torch.from_numpy(values.reshape(shape))

    def normal(self, mean: float = 0.0, std: float = 1.0, size: int | Sequence[int] = 1) -> Tensor:
        """Normal numbers, float64, by Box and Muller's method.

        With two uniforms x, y and rho = sqrt(-2 log(1 - y)) the first is rho cos(2 pi x), the
        second rho sin(2 pi x). A second half that is left over serves the next call.
        """
        shape = _shape("Generator.normal", size)
        count = math.prod(shape)
        values = np.empty(count)
        start = 0
        if count and self._second_normal is not None:
            values[0], start, self._second_normal = self._second_normal, 1, None
        pairs = (count - start + 1) // 2
        if pairs:
            unit = self._unit(2 * pairs).reshape(pairs, 2)
            angle = 2.0 * math.pi * unit[:, 0]
            radius = np.sqrt(-2.0 * np.log(1.0 - unit[:, 1]))
            halves = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)
            values[start:] = halves[: count - start]
            if (count - start) % 2:
                self._second_normal = float(halves[-1])
        return torch.from_numpy((values * std + mean).reshape(shape))

    def bernoulli(self, p: float = 0.5, size: int | Sequence[int] = 1) -> Tensor:
        """1 where a uniform number is ``<= p``, else 0, float64."""
        return (self.uniform(0.0, 1.0, size) <= p).to(torch.float64)

    def randperm(self, n: int) -> Tensor:
        """A permutation of ``0 .. n-1``, int64: for i in 0 .. n-2, swap i and i + word mod (n-i).

        Consumes ``n - 1`` words.
        """
        n = check_integer("Generator.randperm", "n", n, 0)
        order = list(range(n))
        if n > 1:
            offsets = self.random32(n - 1) % np.arange(n, 1, -1, dtype=np.uint64)
            # Each swap depends on those before it, so this loop cannot become array code.
            for i, j in enumerate((offsets.astype(np.int64) + np.arange(n - 1)).tolist()):
                order[i], order[j] = order[j], order[i]
        return torch.tensor(order, dtype=torch.int64, device="cpu")

    def get_state(self) -> dict[str, Any]:
        """The state as ints and tensors, fit for ``torch.load(weights_only=True)``."""
        state = self._words.state["state"]
        second = [] if self._second_normal is None else [self._second_normal]
        return {
            "seed": self.seed,
            "key": torch.from_numpy(state["key"].astype(np.int64)),
            "position": int(state["pos"]),
            "second_normal": torch.tensor(second, dtype=torch.float64, device="cpu"),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a state that :meth:`get_state` returned.

        Raises:
            ValueError: if it is not one; nothing has changed then.
        """
        try:
            key = state["key"].numpy().astype(np.uint32)
            position, seed = int(state["position"]), int(state["seed"])
            second = state["second_normal"].tolist()
            whole = key.shape == (624,) and 0 <= position <= 624 and len(second) <= 1
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            whole = False
        if not whole:
            raise ValueError("Generator.set_state: state must be one that get_state returned")
        self._words.state = {
            "bit_generator": "MT19937",
            "state": {"key": key, "pos": position},
        }
        self.seed = seed
        self._second_normal = second[0] if second else None


def _shape(name: str, size: int | Sequence[int]) -> tuple[int, ...]:
    sizes = size if isinstance(size, Sequence) else [size]
    shape = tuple(check_integer(name, "size", n, 0) for n in sizes)
    check_integer(name, "size", math.prod(shape), 0)
    return shape


def start(seed: int = 1, data_kernel_size: int | None = 7) -> Generator:
    """A generator as the original script has it when it begins to build the network.

    Args:
        seed: the script's ``-seed``.
        data_kernel_size: taps of the kernel of the data's contrastive normalization, whose layers
            draw initial values of their own; ``None`` for data normalised globally only.
    """
    generator = Generator(seed)
    generator.consume(STARTUP_WORDS)
    if data_kernel_size is not None:
        # Contrastive = subtractive (one estimator) then divisive (two estimators).
        generator.consume(3 * normalization_words((data_kernel_size,), channels=1))
    return generator


def normalization_words(kernel_shape: Sequence[int], channels: int) -> int:
    """Random words consumed when Torch7 builds one mean or standard-deviation estimator.

    The estimator is made of convolutions that draw initial values before the kernel overwrites
    them: for a 1-D kernel of n taps a depth-wise row filter (C n weights, C biases) and a column
    filter (C n weights, 1 bias); for a 2-D kernel one convolution.
    """
    if len(kernel_shape) == 1:
        return 2 * channels * kernel_shape[0] + channels + 1
    return channels * math.prod(kernel_shape) + 1


def initialize(model: nn.Module, generator: Generator, in_channels: int = 1) -> nn.Module:
    """Give ``model`` Torch7's initial values, drawn from ``generator`` in Torch7's order.

    Layer by layer in the order of definition: ``Conv2d`` draws its weight (row-major), then its
    bias, uniform in +-1/sqrt(kH kW C_in); ``Linear`` likewise in +-1/sqrt(in_features). The
    normalization layers have no parameters but consume words (:func:`normalization_words`): a
    subtractive one, alone or at the end of a :class:`mnist_ops.nn.Stage2d`, builds one estimator, a
    divisive one two, a contrastive one three.

    The numbers are drawn in float64 and rounded to the parameters' dtype.

    Args:
        model: made of ``Conv2d``, ``Linear`` and layers without parameters.
        generator: where the words come from.
        in_channels: channels of the network's input, for a normalization before any convolution.

    Returns:
        ``model``, changed in place.

    Raises:
        TypeError: if another layer has parameters: Torch7's draws for it are not known here.
    """
    estimators = {
        ops_nn.SubtractiveNorm2d: 1,
        ops_nn.Stage2d: 1,
        ops_nn.DivisiveNorm2d: 2,
        ops_nn.ContrastiveNorm2d: 3,
    }
    channels = in_channels
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            bound = 1.0 / math.sqrt(module.weight[0].numel())
            with torch.no_grad():
                module.weight.copy_(generator.uniform(-bound, bound, module.weight.shape))
                if module.bias is not None:
                    module.bias.copy_(generator.uniform(-bound, bound, module.bias.shape))
            if isinstance(module, nn.Conv2d):
                channels = module.out_channels
        elif type(module) in estimators:
            words = normalization_words(module.kernel.shape, channels)
            generator.consume(estimators[type(module)] * words)
        elif next(module.parameters(recurse=False), None) is not None:
            raise TypeError(
                f"initialize: layer {name!r} is a {type(module).__name__}; "
                "Torch7's initial values are known for Conv2d and Linear only"
            )
    return model


def load_net(file: str | os.PathLike[str] | BinaryIO, log_softmax: str = "auto") -> nn.Sequential:
    """The network in a file of Torch7. See :func:`mnist_ops.torch7.files.load_net`.

    Args:
        file: a path, or a file opened for reading bytes; packed with xz or gzip or not.
        log_softmax: ``"approximate"``, as torch/nn computed it on the CPU until April 2016,
            ``"exact"``, or ``"auto"``: what the file tells, and the former where it tells nothing.

    Returns:
        A module in evaluation mode, for batches.

    Raises:
        mnist_ops.torch7.files.Torch7FileError: (a ``ValueError``) for any file that is not one.
        ValueError: for another ``log_softmax``.
    """
    from . import files as torch7_files  # it needs this module's layers

    return torch7_files.load_net(file, log_softmax=log_softmax)


def _approximate_exponential(z: Tensor) -> Tensor:
    """Torch7's exp(-z) for z >= 0, ``THExpMinusApprox``, in float64."""
    z = z.double()
    w = 1.0 + z * (0.125 + z * (0.0078125 + z * (0.00032552083 + z * 1.0172526e-5)))
    w = w.square().square().square()
    return torch.where(z < 13.0, w.reciprocal(), 0.0)


class _ApproximateLogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(input: Tensor) -> Tensor:
        # Torch7 keeps the maximum and its differences in the input's type and sums in double.
        largest = input.amax(-1, keepdim=True)
        total = _approximate_exponential(largest - input).sum(-1, keepdim=True)
        return (input - (largest + total.log())).to(input.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (output,) = ctx.saved_tensors
        total = grad_output.double().sum(-1, keepdim=True)
        return (grad_output - output.double().exp() * total).to(grad_output.dtype)


def log_softmax(input: Tensor) -> Tensor:
    r"""Torch7's log-softmax over the last dimension, with its approximate exponential.

    With :math:`m = \max_j x_j` and :math:`z_j = m - x_j \ge 0`,

    .. math::
        y_i = x_i - m - \log \sum_j e_j, \qquad
        e_j = \Bigl(1 + \tfrac{z}{8} + \tfrac{z^2}{128} + 0.00032552083 z^3
              + 1.0172526\cdot 10^{-5} z^4\Bigr)^{-8}

    for :math:`z_j < 13`, else :math:`e_j = 0`. The backward is that of the exact function,
    ``grad - exp(output) * grad.sum(-1)``, as in Torch7, so a numerical gradient differs from it by
    up to about 1e-4. Use :func:`mnist_ops.log_softmax` wherever digits need not match.

    Args:
        input: floating point, ``(..., classes)`` with at least one class. Sums run in float64.

    Returns:
        Same shape and dtype.

    Source: Torch7 ``nn.LogSoftMax`` and ``THExpMinusApprox``.
    """
    return _ApproximateLogSoftmax.apply(input)


class LogSoftmax(nn.Module):
    """Torch7's ``nn.LogSoftMax``. See :func:`log_softmax`.

    Maps ``(N, C, H, W)`` are normalised over C, with the exact exponential: torch/nn takes them
    since October 2016, when it had no other.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``(..., classes)``, or maps ``(N, C, H, W)``, to the same shape."""
        return ops.log_softmax(input, 1) if input.dim() == 4 else log_softmax(input)


class Softmax(nn.Module):
    """Torch7's ``nn.SoftMax`` until 2 May 2016, with the approximate exponential.

    With the e of :func:`log_softmax` it is ``e / e.sum()`` over the classes. The gradient is that
    of what is computed, not of the exact function.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``(..., classes)``, or maps ``(N, C, H, W)`` over C, to the same shape."""
        dim = 1 if input.dim() == 4 else -1
        e = _approximate_exponential(input.amax(dim, keepdim=True) - input)
        return (e / e.sum(dim, keepdim=True)).to(input.dtype)


class Dropout(nn.Module):
    """Torch7's ``nn.Dropout``: keep where a uniform number ``<= 1 - p``, scale by ``1/(1 - p)``.

    Numbers are drawn from ``generator``, one per element of the input in row-major order, in
    training mode only.

    Args:
        p: the probability of dropping an element, in ``[0, 1)``.
        generator: shared with the rest of the run. It is not part of the ``state_dict``.
    """

    def __init__(self, p: float, generator: Generator) -> None:
        super().__init__()
        self.p = check_number("Dropout", "p", p)
        if not 0.0 <= self.p < 1.0:
            raise ValueError(f"Dropout: p must be in [0, 1), got {p}")
        self.generator = generator

    def forward(self, input: Tensor) -> Tensor:
        """Any shape to the same shape."""
        if not self.training or self.p == 0.0:
            return input
        keep = self.generator.bernoulli(1.0 - self.p, tuple(input.shape)) / (1.0 - self.p)
        return input * keep.to(input)

    def extra_repr(self) -> str:
        """Show ``p`` in the printed module."""
        return f"p={self.p}"


def class_targets(labels: Tensor, num_classes: int, dtype: torch.dtype | None = None) -> Tensor:
    """``(N,)`` class indices to ``(N, num_classes)``: +1 at the class, -1 elsewhere."""
    targets = torch.full((*labels.shape, num_classes), -1.0, dtype=dtype, device=labels.device)
    return targets.scatter_(-1, labels.unsqueeze(-1), 1.0)


def _reduce(name: str, losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        return losses.mean()
    raise ValueError(f"{name}: reduction must be 'none', 'sum' or 'mean', got {reduction!r}")


def _check_target(name: str, input: Tensor, target: Tensor, samples: Sequence[Any]) -> None:
    """Refuse targets that PyTorch would read only some of, repeat, or take for uninitialised."""
    if input.device != target.device:
        raise ValueError(f"{name}: target must be on {input.device}, got {target.device}")
    whole = target.shape == input.shape if target.is_floating_point() else True
    if tuple(samples) != tuple(input.shape[:-1]) or not whole:
        raise ValueError(
            f"{name}: target must have one class for each of {tuple(input.shape[:-1])} samples, "
            f"got the shape {tuple(target.shape)} for an input of {tuple(input.shape)}"
        )


def nll_loss(log_probs: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """``-log_probs[target]``; Torch7's ``nn.ClassNLLCriterion`` (which averages over a batch).

    Args:
        log_probs: ``(N, classes)`` or ``(classes,)``.
        target: class indices from 0, ``(N,)`` or a scalar.
        reduction: over samples: ``"mean"``, ``"sum"`` or ``"none"``.
    """
    _check_target("nll_loss", log_probs, target, target.shape)
    losses = -log_probs.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return _reduce("nll_loss", losses, reduction)


def multi_margin_loss(input: Tensor, target: Tensor, reduction: str = "sum") -> Tensor:
    """``sum over j != t of max(0, 1 - x_t + x_j) / classes``; Torch7's ``nn.MultiMarginCriterion``.

    Torch7 of 2016 never divides by the batch size, hence the default ``"sum"``.

    Args:
        input: scores (no log-softmax), ``(N, classes)`` or ``(classes,)``.
        target: class indices from 0, ``(N,)`` or a scalar.
        reduction: over samples: ``"mean"``, ``"sum"`` or ``"none"``.
    """
    _check_target("multi_margin_loss", input, target, target.shape)
    losses = F.multi_margin_loss(input, target, reduction="none")
    return _reduce("multi_margin_loss", losses, reduction)


def mse_loss(input: Tensor, target: Tensor, reduction: str = "sum") -> Tensor:
    """Sum over the classes of ``(x - t)**2``; ``nn.MSECriterion`` with ``sizeAverage = false``.

    Args:
        input: ``(N, classes)`` or ``(classes,)``, the output of a final tanh in the report.
        target: of the same shape and floating point; or class indices from 0, which stand for
            -1 with +1 at the class (:func:`class_targets`).
        reduction: over samples: ``"mean"``, ``"sum"`` or ``"none"``.
    """
    _check_target(
        "mse_loss", input, target, target.shape[: target.dim() - target.is_floating_point()]
    )
    if not target.is_floating_point():
        target = class_targets(target, input.shape[-1], input.dtype)
    return _reduce("mse_loss", (input - target).square().sum(-1), reduction)
