"""The operators as modules, to be used like those of :mod:`torch.nn`."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops
from .ops._common import check_finite, check_int, check_number, compute_type
from .ops.local_norm import check_kernel, check_thresholds
from .ops.lp_pool_tensor import check_powers
from .ops.softmax import check_beta, check_reduction, check_smoothing
from .ops.stage import check_activation
from .ops.windows import check_layout, check_norm_type, check_windows

__all__ = [
    "ContrastiveNorm2d",
    "DivisiveNorm2d",
    "GeM2d",
    "LPPool1d",
    "LPPool2d",
    "LPPool3d",
    "LogSoftmax",
    "Sigmoid",
    "Softmax",
    "SoftmaxNLLLoss",
    "Stage2d",
    "SubtractiveNorm2d",
]


def _keep_power(module: torch.nn.Module, name: str, p: float | Tensor, learned: bool) -> None:
    """Refuse what is no p; keep a number, a parameter, or a tensor that is a buffer."""
    op = type(module).__name__
    values = [p]
    if isinstance(p, Tensor):
        check_powers(op, p, p.numel(), name)
        values = [] if p.is_meta else p.flatten().tolist()
    if not all(value > 0 and (value < math.inf or not learned) for value in values):
        raise ValueError(f"{op}: {name} must be > 0, and finite to be learned, got {p}")
    if learned and not isinstance(p, torch.nn.Parameter):
        p = torch.nn.Parameter(torch.as_tensor(p))
    if isinstance(p, Tensor) and not learned:
        module.register_buffer(name, p)
    else:
        setattr(module, name, p)


def _shown(p: float | Tensor) -> str:
    """What extra_repr says of a number or tensor p."""
    if not isinstance(p, Tensor):
        return str(p)
    return f"a tensor {tuple(p.shape)}" if p.dim() or p.is_meta else f"{p.item():g}"


class _LPPool(torch.nn.Module):
    """What the poolings of sequences, images and volumes share."""

    _dims: int
    _function: Callable[..., Tensor]
    norm_type: float | Tensor

    def __init__(
        self,
        norm_type: float | Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        dilation: Any = 1,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not isinstance(norm_type, Tensor):
            check_norm_type(name, norm_type, torch.float64)
        check_layout(name, self._dims, kernel_size, stride, padding, dilation)
        _keep_power(self, "norm_type", norm_type, isinstance(norm_type, torch.nn.Parameter))
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding = padding
        self.ceil_mode = ceil_mode
        self.dilation = dilation

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("dilation", 1)  # pickles from before there was one

    def forward(self, input: Tensor) -> Tensor:
        """Pool a batch, or one example without N."""
        windows = self.kernel_size, self.stride, self.padding, self.ceil_mode, self.dilation
        return type(self)._function(input, self.norm_type, *windows)

    def extra_repr(self) -> str:
        """Return the arguments, as in the constructor."""
        dilation = "" if self.dilation == 1 else f", dilation={self.dilation}"
        return (
            f"norm_type={_shown(self.norm_type)}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, ceil_mode={self.ceil_mode}{dilation}"
        )


class LPPool1d(_LPPool):
    """LP pooling of sequences. See :func:`mnist_ops.lp_pool1d`.

    A ``norm_type`` that is a parameter is learned; another tensor is a buffer.
    """

    _dims = 1
    _function = staticmethod(ops.lp_pool1d)


class LPPool2d(_LPPool):
    """LP pooling of images. See :func:`mnist_ops.lp_pool2d`.

    A ``norm_type`` that is a parameter is learned; another tensor is a buffer.
    """

    _dims = 2
    _function = staticmethod(ops.lp_pool2d)
    average = False  # of pickles from before there was one

    def __init__(
        self,
        norm_type: float | Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        dilation: Any = 1,
        average: bool = False,
    ) -> None:
        super().__init__(norm_type, kernel_size, stride, padding, ceil_mode, dilation)
        self.average = average

    def forward(self, input: Tensor) -> Tensor:
        """Pool a batch, or one image without N."""
        # Through a method of the parent's for the arguments, a small call takes 0.3 us of 6.4 more.
        windows = self.kernel_size, self.stride, self.padding, self.ceil_mode, self.dilation
        return ops.lp_pool2d(input, self.norm_type, *windows, self.average)

    def extra_repr(self) -> str:
        """Return the arguments, as in the constructor."""
        return super().extra_repr() + ", average=True" * self.average


class LPPool3d(_LPPool):
    """LP pooling of volumes. See :func:`mnist_ops.lp_pool3d`.

    A ``norm_type`` that is a parameter is learned; another tensor is a buffer.
    """

    _dims = 3
    _function = staticmethod(ops.lp_pool3d)


class GeM2d(torch.nn.Module):
    r"""Generalized-mean pooling over whole maps, as the descriptors of image retrieval use it.

    .. math:: y = \Big(\frac{1}{HW} \sum_{h, w} \max(x_{hw}, \epsilon)^p\Big)^{1/p}

    It is :func:`mnist_ops.lp_pool2d` with ``average``.

    Args:
        p: 1 is average pooling; the larger, the closer to max pooling. Any number > 0, or a tensor
            with one for each channel.
        learnable: make p a parameter; a tensor that is not learned is a buffer.
        eps: what smaller pixels are raised to, > 0.

    Source:
        Radenovic, Tolias and Chum, "Fine-tuning CNN image retrieval with no human annotation",
        TPAMI 2018.

    Example:
        >>> import torch
        >>> from mnist_ops import nn
        >>> nn.GeM2d(learnable=False)(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
        tensor([[[2.9240]]])
    """

    p: float | Tensor

    def __init__(self, p: float | Tensor = 3.0, learnable: bool = True, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = check_finite("GeM2d", "eps", eps)
        if not self.eps > 0:
            raise ValueError(f"GeM2d: eps must be > 0, got {eps}")
        p = p.detach().clone() if isinstance(p, Tensor) else check_number("GeM2d", "p", p)
        _keep_power(self, "p", p, learnable)

    def forward(self, input: Tensor) -> Tensor:
        """Pool (N, C, H, W) to (N, C, 1, 1), or (C, H, W) to (C, 1, 1)."""
        height, width = input.shape[-2:]
        if height * width == 0:
            raise ValueError(f"GeM2d: input has no pixels, its shape is {tuple(input.shape)}")
        x = input.to(compute_type(input.dtype)).clamp(min=self.eps)
        return ops.lp_pool2d(x, self.p, (height, width), average=True).to(input.dtype)

    def extra_repr(self) -> str:
        """Return the arguments, as in the constructor."""
        learnable = isinstance(self.p, torch.nn.Parameter)
        return f"p={_shown(self.p)}, learnable={learnable}, eps={self.eps:g}"


class SubtractiveNorm2d(torch.nn.Module):
    """Subtractive local normalization. See :func:`mnist_ops.subtractive_norm2d`.

    ``kernel`` is a buffer, float64 whatever the module is cast to, and part of what the module is:
    it is in the ``state_dict``, and a state with another kernel is refused (states from before it
    was saved load). Another may be assigned to it. Where a buffer loses its values, on the meta
    device and by ``to_empty``, the kernel is restored.
    """

    # 2: the kernel is in the state.
    _version = 2
    kernel: Tensor

    def __init__(self, kernel: Tensor) -> None:
        super().__init__()
        self.register_buffer("kernel", None)
        self.kernel = kernel

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "kernel" and isinstance(value, Tensor):
            self._exact = self._checked(value)
            self._has_values = not value.is_meta
            value = self._exact.to(value.device, copy=True)
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.register_buffer("kernel", self.kernel)  # of pickles of version 1

    def _checked(self, kernel: Tensor) -> Tensor:
        """Refuse what is no kernel; return a float64 copy, on the CPU where it has values."""
        name = type(self).__name__
        device = "meta" if check_kernel(name, kernel).is_meta else "cpu"
        exact = kernel.detach().to(device, torch.float64, copy=True)
        if not exact.is_meta:
            total = exact.sum().item()
            if total == 0 or not math.isfinite(total):
                raise ValueError(f"{name}: the kernel's sum must be finite and not 0, got {total}")
        return exact

    def reset_parameters(self) -> None:
        """Restore the kernel's values, as PyTorch's wrappers ask of a module after ``to_empty``."""
        if self._has_values:
            self.register_buffer("kernel", self._exact.to(self.kernel.device, copy=True))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = self.kernel
        if self._has_values and not before.is_meta:
            self._exact = before.to("cpu", torch.float64, copy=True)  # it may have been written to
        result = super()._apply(fn, recurse)
        after = self.kernel
        # .half() and .float() round the weights, which are normalised in float64; to_empty loses
        # them.
        if self._has_values and after is not before and not after.is_meta:
            self.register_buffer("kernel", self._exact.to(after.device, copy=True))
        return result

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}kernel"
        # States of version 1 have no kernel.
        complete = key in state_dict or (local_metadata.get("version") or 1) < 2
        if key in state_dict:
            try:
                self._load_kernel(
                    state_dict[key], local_metadata.get("assign_to_params_buffers", False)
                )
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{key}: {error}")
        others = {k: v for k, v in state_dict.items() if k != key}  # nothing is left to copy
        super()._load_from_state_dict(
            others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if complete and key in missing_keys:
            missing_keys.remove(key)

    def _load_kernel(self, saved: Tensor, assign: bool) -> None:
        """Refuse a kernel that is not this module's; take it where this module has no values."""
        name, mine = type(self).__name__, self.kernel
        check_kernel(name, saved)
        if saved.shape != mine.shape:
            raise ValueError(
                f"the state was saved with a kernel of the shape {tuple(saved.shape)}, this {name} "
                f"has one of {tuple(mine.shape)}"
            )
        if saved.is_meta:
            return
        if not self._has_values:
            self.kernel = saved.to(saved.device if assign or mine.is_meta else mine.device)
            return
        exact = self._exact.to(saved.dtype)  # rounded to another dtype it is the same kernel
        if not torch.equal(saved.detach().cpu(), exact):
            raise ValueError(
                f"the state was saved with another kernel, {_brief(saved)}, than this {name} has, "
                f"{_brief(exact)}"
            )
        if mine.is_meta and assign:
            self.register_buffer("kernel", self._exact.to(saved.device, copy=True))

    def _kernel(self) -> Tensor:
        if not self._has_values and not self.kernel.is_meta:
            raise RuntimeError(
                f"{type(self).__name__}: the kernel was given on the meta device and has no values "
                "yet: load a state or assign kernel"
            )
        return self.kernel

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, H, W) or (C, H, W)."""
        return ops.subtractive_norm2d(input, self._kernel())

    def extra_repr(self) -> str:
        """Return the kernel's shape."""
        return f"kernel_size={tuple(self._exact.shape)}"


def _brief(kernel: Tensor) -> str:
    """A kernel's shape and first values, to be told from another in a message."""
    values = ", ".join(f"{v:.6g}" for v in kernel.flatten()[:4].tolist())
    return f"{tuple(kernel.shape)} [{values}{', ...' if kernel.numel() > 4 else ''}]"


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
        return ops.divisive_norm2d(input, self._kernel(), self.threshold, self.threshold_value)

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
        return ops.contrastive_norm2d(input, self._kernel(), self.threshold, self.threshold_value)


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
        return ops.stage2d(input, self._kernel(), self.activation, *self._windows())

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
        self.dim = check_int(type(self).__name__, "dim", dim)
        self.beta = check_beta(type(self).__name__, beta)

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
    """Cross entropy of a softmax and targets. See :func:`mnist_ops.softmax_nll`.

    ``weight`` is a buffer, as in ``torch.nn.CrossEntropyLoss``.
    """

    weight: Tensor | None

    def __init__(
        self,
        beta: float = 1.0,
        reduction: str = "mean",
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        op = "SoftmaxNLLLoss"
        self.beta = check_beta(op, beta)
        check_reduction(op, reduction)
        self.reduction = reduction
        self.ignore_index, self.label_smoothing = check_smoothing(op, ignore_index, label_smoothing)
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Compute the loss of scores (N, C, ...) against classes (N, ...) or probabilities."""
        return ops.softmax_nll(
            input,
            target,
            self.beta,
            self.reduction,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    def extra_repr(self) -> str:
        """Return the arguments, as in the constructor."""
        text = f"beta={self.beta}, reduction={self.reduction!r}"
        if self.ignore_index != -100:
            text += f", ignore_index={self.ignore_index}"
        return text + (f", label_smoothing={self.label_smoothing}" if self.label_smoothing else "")


_ACTIVATIONS: dict[str, Callable[[], torch.nn.Module]] = {
    "tanh": torch.nn.Tanh,
    "relu": torch.nn.ReLU,
    "sigmoid": Sigmoid,
    "identity": torch.nn.Identity,
}
