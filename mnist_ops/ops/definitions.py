"""Every operator written in PyTorch's own operations, a few lines each.

They say what the kernels compute, tests hold the kernels against them, and they are what runs on
a device that has no kernels (Apple's MPS, Intel's XPU, AMD's ROCm, CUDA where no kernels were
compiled). There they are registered as the operators' Autograd kernels, so that PyTorch
differentiates them itself. ``MNIST_OPS_CPU_CAPABILITY=none`` takes them on the CPU, too.

Each takes what its operator's schema lists, with windows as pairs.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._libraries import CPU_CAPABILITY, CUDA_MISSING
from . import local_mean, lp_pool_tensor
from ._common import compute_type, is_channels_last
from .softmax import line_weights
from .windows import is_infinite, output_size

__all__ = ["DEFINITIONS"]

_library = torch.library.Library("mnist_ops", "FRAGMENT")

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}


def lp_pool2d(
    input: Tensor, p: float, kernel: list[int], stride: list[int], padding: list[int], ceil: bool
) -> Tensor:
    """The p-norm of each window: scaled by its largest magnitude, which changes no result."""
    sizes = output_size("lp_pool2d", input, p, kernel, stride, padding, ceil)
    x = input.abs()
    missing: list[int] = []
    for size, out, k, s, pad in zip(x.shape[-2:], sizes, kernel, stride, padding, strict=True):
        missing = [pad, max(0, (out - 1) * s + k - size - pad), *missing]
    windows = F.pad(x, missing).unfold(-2, kernel[0], stride[0]).unfold(-2, kernel[1], stride[1])
    windows = windows[..., : sizes[0], : sizes[1], :, :].flatten(-2)
    if is_infinite(p, x.dtype):
        return windows.amax(-1)
    scale = windows.detach().amax(-1, keepdim=True)
    scale = torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
    total = lp_pool_tensor.Quotient(windows, scale).power(p).sum(-1)
    positive = total != 0  # the root of 0 has no derivative that is finite for every p
    root = torch.where(positive, torch.where(positive, total, 1.0) ** (1 / p), 0.0)
    return scale.squeeze(-1) * root


def _blur(plane: Tensor, kernel: Tensor) -> Tensor:
    """Correlate with the normalised kernel, and with it where the image is 1 everywhere."""
    weights = kernel.to(plane.device, torch.promote_types(kernel.dtype, torch.float32))
    weights = weights if weights.dim() == 2 else torch.outer(weights, weights)
    weights = (weights / weights.sum())[None, None].to(plane.dtype)
    around = [size // 2 for size in weights.shape[-2:]]
    blurred = F.conv2d(torch.cat([plane, torch.ones_like(plane)]), weights, padding=around)
    return torch.stack(blurred.chunk(2))


def subtractive_norm2d(input: Tensor, kernel: Tensor) -> Tensor:
    """X minus the mean of its neighbourhood over all channels."""
    if input.numel() == 0:
        return input.clone()
    images = input if input.dim() == 4 else input[None]
    blurred, ones = _blur(images.mean(1, keepdim=True), kernel)
    return (images - blurred / ones).view_as(input)


def divisive_norm2d(input: Tensor, kernel: Tensor, threshold: float, value: float) -> Tensor:
    """X over the deviation of its neighbourhood over all channels, where that is large enough."""
    if input.numel() == 0:
        return input.clone()
    images = input if input.dim() == 4 else input[None]
    scale = images.detach().abs().amax((1, 2, 3), keepdim=True)
    scale = torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
    blurred, ones = _blur((images / scale).square().mean(1, keepdim=True), kernel)
    positive = blurred > 0
    root = torch.where(positive, torch.where(positive, blurred, 1.0).sqrt(), 0.0)
    deviation = scale * root / ones
    large = (deviation > threshold) | deviation.isnan()
    return (images / torch.where(large, deviation, value)).view_as(input)


def contrastive_norm2d(input: Tensor, kernel: Tensor, threshold: float, value: float) -> Tensor:
    """Divisive of subtractive normalization."""
    return divisive_norm2d(subtractive_norm2d(input, kernel), kernel, threshold, value)


def stage2d(input: Tensor, kernel: Tensor, activation: str, *windows: Any) -> Tensor:
    """Activation, LP pooling, subtractive normalization."""
    return subtractive_norm2d(lp_pool2d(_ACTIVATIONS[activation](input), *windows), kernel)


def softmax(input: Tensor, dim: int, beta: float) -> Tensor:
    """Softmax of beta x."""
    return torch.softmax(beta * input, dim)


def log_softmax(input: Tensor, dim: int, beta: float) -> Tensor:
    """Its logarithm."""
    return torch.log_softmax(beta * input, dim)


def softmax_nll(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    beta: float,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """The loss, and what its mean divides by."""
    loss = F.cross_entropy(
        beta * input,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    if reduction != "mean":
        return loss, input.new_empty(0)
    lines = input.sum(min(1, input.dim() - 1)).shape
    return loss, line_weights(lines, target, weight, ignore_index, input.dtype).sum()


DEFINITIONS: dict[str, Callable[..., Any]] = {
    "lp_pool2d": lp_pool2d,
    "lp_pool2d_tensor_p": lp_pool_tensor.definition,
    "local_mean2d": local_mean.definition,
    "subtractive_norm2d": subtractive_norm2d,
    "divisive_norm2d": divisive_norm2d,
    "contrastive_norm2d": contrastive_norm2d,
    "stage2d": stage2d,
    "sigmoid": torch.sigmoid,
    "softmax": softmax,
    "log_softmax": log_softmax,
    "softmax_nll": softmax_nll,
}


@functools.cache
def _warn(device: str) -> None:
    reason = f" ({CUDA_MISSING})" if device == "cuda" else ""
    warnings.warn(
        f"mnist_ops: there are no kernels for {device}{reason}; the operators run there as several "
        "of PyTorch's own, which takes more time and memory",
        stacklevel=4,
    )


def _on_device(definition: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(input: Tensor, *args: Any) -> Any:
        _warn(input.device.type)
        results = definition(input.to(compute_type(input.dtype)), *args)
        layout = torch.channels_last if is_channels_last(input) else torch.contiguous_format
        if not isinstance(results, tuple):
            return results.to(input.dtype).contiguous(memory_format=layout)
        return (results[0].to(input.dtype), *results[1:])

    return kernel


for _key, _without in (
    ("CPU", CPU_CAPABILITY == "none"),
    ("CUDA", bool(CUDA_MISSING)),
    *((key, True) for key in ("MPS", "XPU", "PrivateUse1")),
):
    if _without:
        for _name, _definition in DEFINITIONS.items():
            for _kind in (_key, f"Autograd{_key}"):
                _library.impl(_name, _on_device(_definition), _kind)
