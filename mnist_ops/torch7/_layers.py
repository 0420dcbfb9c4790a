"""Layers of Torch7 that PyTorch has no module for, as :func:`load_net` builds them.

Checkpoints compare the text of a network: another name of a class would be another network.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class _Power(nn.Module):
    """``nn.Power``: signed where the exponent is odd, NaN where a root is not real."""

    def __init__(self, exponent: float) -> None:
        super().__init__()
        self.exponent = exponent

    def forward(self, input: Tensor) -> Tensor:
        return input.pow(self.exponent)

    def extra_repr(self) -> str:
        return f"{self.exponent}"


class _Sqrt(nn.Module):
    """``nn.Sqrt``: the root of ``input + eps``; its gradient is 0 where it is 0."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, input: Tensor) -> Tensor:
        square = input + self.eps
        zero = square == 0
        return torch.where(zero, 0, torch.where(zero, 1, square).sqrt())

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class _Scale(nn.Module):
    """``nn.MulConstant``."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, input: Tensor) -> Tensor:
        return input * self.factor

    def extra_repr(self) -> str:
        return f"{self.factor}"


class _View(nn.Module):
    """``nn.View``, for a batch of any size.

    Args:
        sizes: of the result, less the batch; one may be -1.
        dimensions: of a sample, ``numInputDims``; what comes before is the batch.
    """

    def __init__(self, sizes: list[int], dimensions: int | None) -> None:
        super().__init__()
        self.sizes = sizes
        self.dimensions = dimensions

    def forward(self, input: Tensor) -> Tensor:
        shape = input.shape
        sample = len(shape) if self.dimensions is None else self.dimensions
        if self.dimensions is not None and len(shape) <= sample:
            return input.reshape(self.sizes)
        if -1 not in self.sizes:
            # What is left of the sample's numbers joins the batch.
            inner = math.prod(shape[len(shape) - sample :])
            whole, rest = divmod(inner, math.prod(self.sizes))
            if rest:
                raise RuntimeError(f"cannot view the shape {tuple(shape)} as {self.sizes}")
            return input.reshape(whole * math.prod(shape[: len(shape) - sample]), *self.sizes)
        if self.dimensions is not None:
            # Flattened first: of no samples, -1 could not be told.
            return input.flatten(0, len(shape) - sample - 1).flatten(1).unflatten(1, self.sizes)
        if self.sizes[0] == -1 and len(self.sizes) > 1:  # it is the batch
            return input.reshape(self.sizes)
        # Torch7 would join all samples here: such a network takes one at a time.
        return input.flatten(1).unflatten(1, self.sizes)

    def extra_repr(self) -> str:
        return f"{self.sizes}, dimensions={self.dimensions}"


class _WholeSample(nn.Module):
    """A softmax over all numbers of a sample, as ``cudnn.SoftMax`` has it for maps."""

    def __init__(self, rows: nn.Module) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, input: Tensor) -> Tensor:
        return self.rows(input.flatten(1)).view_as(input)
