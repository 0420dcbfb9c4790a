"""Torch7's criteria, its log-softmax and softmax of 2016, and its dropout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops._common import check_number
from .random import Generator

__all__ = [
    "Dropout",
    "LogSoftmax",
    "Softmax",
    "class_targets",
    "log_softmax",
    "mse_loss",
    "multi_margin_loss",
    "nll_loss",
]


def _approximate_exponential(z: Tensor) -> Tensor:
    """Torch7's exp(-z) for z >= 0, ``THExpMinusApprox``, in float64."""
    z = z.double()
    w = 1.0 + z * (0.125 + z * (0.0078125 + z * (0.00032552083 + z * 1.0172526e-5)))
    w = w.square().square().square()
    return torch.where(z < 13.0, w.reciprocal(), 0.0)


class _ApproximateLogSoftmax(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor) -> Tensor:
        # Torch7 keeps the maximum and its differences in the input's type and sums in double.
        largest = input.amax(-1, keepdim=True)
        total = _approximate_exponential(largest - input).sum(-1, keepdim=True)
        return (input - (largest + total.log())).to(input.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (output,) = ctx.saved_tensors
        change = (tangent * output.double().exp()).sum(-1, keepdim=True)
        return (tangent - change).to(tangent.dtype)

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
    ``grad - exp(output) * grad.sum(-1)``, as in Torch7, and so is forward mode; a numerical
    gradient differs by up to about 1e-4. Use :func:`mnist_ops.log_softmax` wherever digits need not
    match.

    Args:
        input: floating point, ``(..., classes)`` with at least one class. Sums run in float64.

    Returns:
        Same shape and dtype.

    Source: Torch7 ``nn.LogSoftMax`` and ``THExpMinusApprox``.
    """
    return _ApproximateLogSoftmax.apply(input)


@torch.fx.wrap  # one node of its graphs, which hold no choice
def _log_softmax_over_classes(input: Tensor) -> Tensor:
    return ops.log_softmax(input, 1) if input.dim() == 4 else log_softmax(input)


@torch.fx.wrap
def _softmax_over_classes(input: Tensor) -> Tensor:
    dim = 1 if input.dim() == 4 else -1
    e = _approximate_exponential(input.amax(dim, keepdim=True) - input)
    return (e / e.sum(dim, keepdim=True)).to(input.dtype)


class LogSoftmax(nn.Module):
    """Torch7's ``nn.LogSoftMax``. See :func:`log_softmax`.

    Maps ``(N, C, H, W)`` are normalised over C, with the exact exponential: torch/nn takes them
    since October 2016, when it had no other.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``(..., classes)``, or maps ``(N, C, H, W)``, to the same shape."""
        return _log_softmax_over_classes(input)


class Softmax(nn.Module):
    """Torch7's ``nn.SoftMax`` until 2 May 2016, with the approximate exponential.

    With the e of :func:`log_softmax` it is ``e / e.sum()`` over the classes. The gradient is that
    of what is computed, not of the exact function.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``(..., classes)``, or maps ``(N, C, H, W)`` over C, to the same shape."""
        return _softmax_over_classes(input)


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
