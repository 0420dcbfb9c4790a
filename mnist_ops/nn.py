"""The operators as modules, to be used like those of :mod:`torch.nn`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops
from .ops.local_norm import check_kernel, check_thresholds
from .ops.lp_pool import check_windows
from .ops.stage import check_activation

__all__ = [
    "ContrastiveNorm2d",
    "DivisiveNorm2d",
    "LPPool2d",
    "LogSoftmax",
    "Sigmoid",
    "Softmax",
    "SoftmaxNLLLoss",
    "Stage2d",
    "SubtractiveNorm2d",
]


class LPPool2d(torch.nn.Module):
    """LP pooling. See :func:`mnist_ops.lp_pool2d`."""

    def __init__(
        self,
        norm_type: float,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__()
        check_windows("LPPool2d", norm_type, kernel_size, stride, padding, ceil_mode)
        self.norm_type = norm_type
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding = padding
        self.ceil_mode = ceil_mode

    def forward(self, input: Tensor) -> Tensor:
        """Pool (N, C, H, W) or (C, H, W)."""
        return ops.lp_pool2d(
            input, self.norm_type, self.kernel_size, self.stride, self.padding, self.ceil_mode
        )

    def extra_repr(self) -> str:
        """Return the arguments, as in the constructor."""
        return (
            f"norm_type={self.norm_type}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, ceil_mode={self.ceil_mode}"
        )


class SubtractiveNorm2d(torch.nn.Module):
    """Subtractive local normalization. See :func:`mnist_ops.subtractive_norm2d`.

    ``kernel`` is a constant of the module: it moves between devices with it, but is not in the
    ``state_dict`` and stays float64 when the module is cast.
    """

    kernel: Tensor

    def __init__(self, kernel: Tensor) -> None:
        super().__init__()
        name = type(self).__name__
        self._exact = check_kernel(name, kernel).to("cpu", torch.float64, copy=True)
        total = self._exact.sum().item()
        if total == 0 or total != total or abs(total) == float("inf"):
            raise ValueError(f"{name}: the kernel's sum must be finite and not 0, got {total}")
        self.register_buffer("kernel", self._exact.to(kernel.device, copy=True), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # .half() and .float() would round the weights, which are normalised in float64.
        result = super()._apply(fn, recurse)
        if self.kernel.dtype != torch.float64:
            self.kernel = self._exact.to(self.kernel.device)
        return result

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, H, W) or (C, H, W)."""
        return ops.subtractive_norm2d(input, self.kernel)

    def extra_repr(self) -> str:
        """Return the kernel's shape."""
        return f"kernel_size={tuple(self._exact.shape)}"


class DivisiveNorm2d(SubtractiveNorm2d):
    """Divisive local normalization. See :func:`mnist_ops.divisive_norm2d`.

    ``kernel`` is kept as in :class:`SubtractiveNorm2d`.
    """

    def __init__(
        self, kernel: Tensor, threshold: float = 1e-4, threshold_value: float | None = None
    ) -> None:
        super().__init__(kernel)
        self.threshold, self.threshold_value = check_thresholds(
            type(self).__name__, threshold, threshold_value
        )

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, H, W) or (C, H, W)."""
        return ops.divisive_norm2d(input, self.kernel, self.threshold, self.threshold_value)

    def extra_repr(self) -> str:
        """Return the kernel's shape and the thresholds."""
        return (
            f"{super().extra_repr()}, threshold={self.threshold}, "
            f"threshold_value={self.threshold_value}"
        )


class ContrastiveNorm2d(DivisiveNorm2d):
    """Local contrast normalization. See :func:`mnist_ops.contrastive_norm2d`.

    ``kernel`` is kept as in :class:`SubtractiveNorm2d`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, H, W) or (C, H, W)."""
        return ops.contrastive_norm2d(input, self.kernel, self.threshold, self.threshold_value)


class Stage2d(SubtractiveNorm2d):
    """Activation, LP pooling and subtractive normalization. See :func:`mnist_ops.stage2d`.

    ``kernel`` is kept as in :class:`SubtractiveNorm2d`.
    """

    def __init__(
        self,
        kernel: Tensor,
        activation: str = "tanh",
        norm_type: float = 2.0,
        kernel_size: int | tuple[int, int] = 2,
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__(kernel)
        check_activation("Stage2d", activation)
        check_windows("Stage2d", norm_type, kernel_size, stride, padding, ceil_mode)
        self.activation = activation
        self.norm_type = norm_type
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding = padding
        self.ceil_mode = ceil_mode

    def forward(self, input: Tensor) -> Tensor:
        """Take (N, C, H, W) or (C, H, W) through the stage."""
        return ops.stage2d(input, self.kernel, self.activation, *self._windows())

    def unfused(self) -> torch.nn.Sequential:
        """Return three modules, ``activation``, ``pool`` and ``norm``, that compute the same."""
        return torch.nn.Sequential(
            OrderedDict(
                activation=_ACTIVATIONS[self.activation](),
                pool=LPPool2d(*self._windows()),
                norm=SubtractiveNorm2d(self.kernel),
            )
        )

    def _windows(self) -> tuple[Any, ...]:
        return self.norm_type, self.kernel_size, self.stride, self.padding, self.ceil_mode

    def extra_repr(self) -> str:
        """Return the arguments, as in the constructor, and the kernel's shape."""
        return (
            f"kernel={tuple(self._exact.shape)}, activation={self.activation!r}, "
            f"norm_type={self.norm_type}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, ceil_mode={self.ceil_mode}"
        )


class Sigmoid(torch.nn.Module):
    """Logistic sigmoid. See :func:`mnist_ops.sigmoid`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply to every element."""
        return ops.sigmoid(input)


class Softmax(torch.nn.Module):
    """Softmax of ``beta * input``. See :func:`mnist_ops.softmax`."""

    def __init__(self, dim: int = -1, beta: float = 1.0) -> None:
        super().__init__()
        self.dim = dim
        self.beta = beta

    def forward(self, input: Tensor) -> Tensor:
        """Apply along ``dim``."""
        return ops.softmax(input, self.dim, self.beta)

    def extra_repr(self) -> str:
        """Return the arguments, as in the constructor."""
        return f"dim={self.dim}, beta={self.beta}"


class LogSoftmax(Softmax):
    """Log-softmax of ``beta * input``. See :func:`mnist_ops.log_softmax`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply along ``dim``."""
        return ops.log_softmax(input, self.dim, self.beta)


class SoftmaxNLLLoss(torch.nn.Module):
    """Negative log-likelihood under softmax. See :func:`mnist_ops.softmax_nll`."""

    def __init__(self, beta: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        self.beta = beta
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Compute the loss of scores (N, C, ...) against classes (N, ...)."""
        return ops.softmax_nll(input, target, self.beta, self.reduction)

    def extra_repr(self) -> str:
        """Return the arguments, as in the constructor."""
        return f"beta={self.beta}, reduction={self.reduction!r}"


_ACTIVATIONS: dict[str, Callable[[], torch.nn.Module]] = {
    "tanh": torch.nn.Tanh,
    "relu": torch.nn.ReLU,
    "sigmoid": Sigmoid,
    "identity": torch.nn.Identity,
}
