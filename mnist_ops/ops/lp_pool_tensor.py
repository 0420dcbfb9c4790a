"""LP pooling with a p for each channel, in a tensor that has a gradient of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .. import _torch_private as private
from ._common import (
    _library,
    batch_first,
    check_same_device,
    compute_type,
    direct,
    empty_images,
    register_autograd,
    register_fake,
)
from .windows import output_size

_ops = torch.ops.mnist_ops
_lp_pool2d_tensor_p = direct("lp_pool2d_tensor_p")


def check_powers(op: str, p: Tensor, channels: Any, name: str = "norm_type") -> None:
    """Refuse a tensor that is no p, or no p for each channel."""
    if not p.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating-point, got {p.dtype}")
    if p.dim() > 1 or (p.dim() == 1 and p.shape[0] not in (1, channels)):
        raise ValueError(
            f"{op}: {name} must be one number or one for each of {channels} channels, got the "
            f"shape {tuple(p.shape)}"
        )


def pool_by_tensor(
    op: str,
    input: Tensor,
    norm_type: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    average: bool = False,
) -> Tensor:
    """``lp_pool2d`` of checked images and windows."""
    channels = input.shape[-3]
    check_powers(op, norm_type, channels)
    check_same_device(op, "norm_type", norm_type, "input", input)
    p = norm_type.to(compute_type(input.dtype)).expand(channels)
    return _lp_pool2d_tensor_p(input, p, kernel, stride, padding, ceil_mode, average)


# -------------------------------------------------------------------------- in PyTorch's operators
#
# What the kernels compute, differentiable any number of times and in either mode: derivatives of
# derivatives are made of this, and devices without kernels run it.


class Quotient:
    """size / divisor of sizes, for powers below 2 that are in range where the quotient is not.

    It is value * scale ** 2, as ``Quotient`` of csrc/elementary.h. Where a size is 0 the quotient
    is 1, and ``positive`` false: 0 to a power has no derivative that is finite for every p.
    """

    def __init__(self, size: Tensor, divisor: Tensor) -> None:
        tiny, scale = (-1000, -538) if size.dtype is torch.float64 else (-100, -76)
        self.positive = size > 0
        is_tiny = self.positive & (size < divisor * 2.0**tiny)
        self.scale = torch.where(is_tiny, 2.0**scale, 1.0).to(size.dtype)
        value = (size / self.scale) / (divisor * self.scale)
        self.value = torch.where(self.positive, value, 1.0)

    def power(self, p: Tensor | float) -> Tensor:
        """Its p-th power; 0 where the size is 0, or the power far below the range."""
        counts = self.positive & ((self.scale == 1) | (torch.as_tensor(p) < 2))
        power = torch.where(counts, self.value, 1.0) ** p
        half = torch.where(counts, self.scale, 1.0) ** p
        return torch.where(counts, power * half * half, 0.0)

    def log(self) -> Tensor:
        """Its natural logarithm."""
        return self.value.log() + 2 * self.scale.log()


class _Windows:
    """m, S and n of csrc/lp_pool_tensor.h, and the windows (N, C, pixels, windows) themselves.

    Half types are computed in float32.
    """

    def __init__(
        self,
        input: Tensor,
        p: Tensor,
        kernel: list[int],
        stride: list[int],
        padding: list[int],
        ceil_mode: bool,
        average: bool,
    ) -> None:
        sizes = output_size("lp_pool2d", input, 1, kernel, stride, padding, ceil_mode)
        self.shape, self.dtype = (*input.shape[:-2], *sizes), input.dtype
        self.kernel, self.stride = tuple(kernel), tuple(stride)
        wide = compute_type(input.dtype)
        # Zeros put on, or pixels that no window holds taken off: the windows fit exactly.
        self.around: list[int] = []
        for d in range(2):
            after = (sizes[d] - 1) * stride[d] + kernel[d] - input.shape[d - 2] - padding[d]
            self.around = [padding[d], after, *self.around]
        self.x = self.unfolded(input)
        most = 2.0**57 if wide is torch.float64 else 2.0**28
        least = 1e-20 if wide is torch.float64 else 1e-10
        self.p = torch.where(p > 0, p.clamp(least, most), torch.nan)[:, None]
        largest = self.x.detach().abs().amax(-2)
        self.scaled = (largest > 0) & largest.isfinite()
        self.largest = largest
        self.scale = torch.where(self.scaled, largest, 1.0)
        self.s = Quotient(self.x.abs(), self.scale.unsqueeze(-2))
        # The root of a sum of 0 has no derivative that is finite for every p.
        self.sum = torch.where(self.scaled, self.s.power(self.p[..., None]).sum(-2), 1.0)
        self.average = average
        self.count: Tensor | float = 1.0
        if average:
            ones = torch.ones_like(input[..., :1, :, :]).detach()
            self.count = self.unfolded(ones[:1] if ones.dim() == 4 else ones).sum(-2)
        self.root = (self.sum / self.count) ** (1 / self.p)
        self.norm = torch.where(self.scaled, self.scale * self.root, largest * self.p)

    def unfolded(self, images: Tensor) -> Tensor:
        """The pixels of each window: (N, C, pixels, windows)."""
        padded = F.pad(images.to(compute_type(images.dtype)), self.around)
        self.padded = padded.shape[-2:]
        N, C = math.prod(images.shape[:-3]), images.shape[-3]
        planes = padded.reshape(N * C, 1, *self.padded)
        windows = F.unfold(planes, self.kernel, stride=self.stride)
        return windows.reshape(N, C, *windows.shape[1:])

    def folded(self, windows: Tensor) -> Tensor:
        """The sum, for each pixel of an image, over the windows that hold it."""
        planes = windows.flatten(0, 1)
        padded = F.fold(planes, self.padded, self.kernel, stride=self.stride)
        image = F.pad(padded, [-size for size in self.around])
        return image.reshape(*self.shape[:-2], *image.shape[-2:]).to(self.dtype)

    def slopes(self) -> Tensor:
        """dy/dx of each window."""
        powers = self.s.power(self.p[..., None] - 1)
        return torch.sign(self.x) * powers * (self.root / self.sum).unsqueeze(-2)

    def power_gradient(self) -> Tensor:
        """dy/dp of each window."""
        logs = self.p[..., None] * self.s.log()
        z = logs - (self.sum / self.count).log().unsqueeze(-2)
        if self.average:
            terms = torch.where(self.s.positive, _divergence(z), 0.0).sum(-2)
            terms = terms + (self.count - self.s.positive.sum(-2))  # zeros of the image
        else:
            terms = torch.where(self.s.positive, z * z.exp(), 0.0).sum(-2)
        gradient = self.norm * (terms / self.p / self.p / self.count)
        return torch.where(self.scaled | (self.largest == 0), gradient, torch.nan)


def _divergence(z: Tensor) -> Tensor:
    """1 + (z - 1) exp(z), by its series where that cancels."""
    near = z.abs() < 0.5
    inside, outside = torch.where(near, z, 0.0), torch.where(near, 1.0, z)
    series = torch.ones_like(z)
    for k in range(16, 1, -1):
        series = 1 + series * inside * (k / (k * k - 1))
    return torch.where(near, inside * inside / 2 * series, 1 + (outside - 1) * outside.exp())


def definition(input: Tensor, p: Tensor, *windows: Any) -> Tensor:
    """The p-norm or p-mean of each window."""
    if input.numel() == 0:
        size = output_size("lp_pool2d", input, 1, *windows[:-1])
        return input.sum() * p.sum() + input.new_zeros((*input.shape[:-2], *size))
    pooled = _Windows(input, p, *windows)
    return pooled.norm.reshape(pooled.shape).to(input.dtype)


def _gradients(
    grad_output: Tensor, input: Tensor, p: Tensor, *windows: Any
) -> tuple[Tensor, Tensor]:
    """What ``lp_pool2d_tensor_p_backward`` computes."""
    if input.numel() == 0:
        return input * grad_output.sum(), p * 0
    pooled = _Windows(input, p, *windows)
    grad = grad_output.to(p.dtype).reshape(pooled.norm.shape)
    by_p = (grad * pooled.power_gradient()).sum((0, 2))
    return pooled.folded(grad.unsqueeze(-2) * pooled.slopes()), by_p


def _tangent(ctx: Any, tangent: Tensor | None, p_tangent: Tensor | None, *_: None) -> Tensor:
    input, p = ctx.saved_tensors
    if input.numel() == 0:
        return definition(input, p, *ctx.options)
    pooled = _Windows(input, p, *ctx.options)
    result = torch.zeros_like(pooled.norm)
    if tangent is not None:
        result = result + (pooled.unfolded(tangent) * pooled.slopes()).sum(-2)
    if p_tangent is not None:
        result = result + p_tangent[:, None] * pooled.power_gradient()
    return result.reshape(pooled.shape).to(input.dtype)


# ------------------------------------------------------------------------------------------ fake


@register_fake("lp_pool2d_tensor_p")
def _(input, norm_type, kernel_size, stride, padding, ceil_mode, average):
    size = output_size("lp_pool2d", input, 1, kernel_size, stride, padding, ceil_mode)
    return empty_images(input, *size)


@register_fake("lp_pool2d_tensor_p_backward")
def _(grad_output, input, norm_type, kernel_size, stride, padding, ceil_mode, average):
    return empty_images(input, *input.shape[-2:]), torch.empty_like(norm_type)


# -------------------------------------------------------------------------------------- autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.options = inputs[2:]


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    grads = _ops.lp_pool2d_tensor_p_backward(grad_output, *ctx.saved_tensors, *ctx.options)
    return *grads, None, None, None, None, None


register_autograd("lp_pool2d_tensor_p", _backward, _tangent, setup_context=_save)


def _is_recorded(arguments: Sequence[Tensor | None]) -> bool:
    """Whether derivatives of what is computed from these are asked for, in either mode."""
    tensors = [t for t in arguments if t is not None]  # which the operator refuses
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return True
    return private.within_dual_level() and any(
        forward_ad.unpack_dual(t, level=0).tangent is not None for t in tensors
    )


_dispatch_backward = private.entry(_ops.lp_pool2d_tensor_p_backward.default)


def _autograd_backward(keyset: Any, *args: Any) -> Any:
    if _is_recorded(args[:3]):
        return _gradients(*args)
    with private.below_autograd():
        return _dispatch_backward(*args)


_library.impl("lp_pool2d_tensor_p_backward", _autograd_backward, "Autograd", with_keyset=True)

# ------------------------------------------------------------------------------------------ vmap


def _register_vmap(name: str, images: int) -> None:
    """Register a rule by which examples become further channels, each with its own p."""
    op = getattr(_ops, name)

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        tensors = [batch_first(args[i], in_dims[i], size) for i in range(images + 1)]
        merged = [t.movedim(0, -4).flatten(-4, -3) for t in tensors[:images]]
        result = op(*merged, tensors[images].flatten(), *args[images + 1 :])
        channels = tensors[images].shape[1]
        maps = result[0] if isinstance(result, tuple) else result
        split = maps.unflatten(-3, (size, channels)).movedim(-4, 0)
        if not isinstance(result, tuple):
            return split, 0
        return (split, result[1].reshape(size, channels)), (0, 0)

    torch.library.register_vmap(f"mnist_ops::{name}", rule)


_register_vmap("lp_pool2d_tensor_p", images=1)
_register_vmap("lp_pool2d_tensor_p_backward", images=2)
