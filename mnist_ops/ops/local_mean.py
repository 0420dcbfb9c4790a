"""Means of neighbourhoods, from which other local normalizations are a few lines each."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import check_images, compute_type
from ._public import batch, planes, public
from .local_norm import kernel_beside

_CHANNELS = ("all", "each")
_PADDING_MODES = ("renormalized", "zeros", "reflect", "replicate")


def _shardable(arguments: dict[str, Any]) -> Collection[int]:
    return (planes if arguments.get("channels") == "each" else batch)(arguments)


@public(_shardable)
def local_mean2d(
    input: Tensor, kernel: Tensor, channels: str = "all", padding_mode: str = "renormalized"
) -> Tensor:
    r"""Weighted mean of each pixel's neighbourhood: what :func:`subtractive_norm2d` subtracts.

    With :math:`u` the kernel divided by its sum and :math:`\star` the cross-correlation of the same
    size, it is :math:`u \star x` of each channel, or of the mean of all channels. With
    ``"renormalized"`` it is :math:`(u \star x) / (u \star 1)` with zeros beyond the border: the
    mean over the pixels that are there.

    Args:
        input: images (N, C, H, W) or one image (C, H, W); float64, float32, float16 or bfloat16
            (the half types are computed in float32).
        kernel: as in :func:`subtractive_norm2d`.
        channels: ``"all"``, one mean over all channels, or ``"each"``, one for each of them.
        padding_mode: what lies beyond the border: ``"renormalized"``, ``"zeros"``, or the image
            again, ``"reflect"`` (without its border pixels, which needs more pixels than half of
            the kernel) or ``"replicate"``, as in :func:`torch.nn.functional.pad`.

    Returns:
        (N, 1, H, W) or (1, H, W), or, with ``"each"``, the shape of ``input``; contiguous, in its
        dtype.

    Raises:
        TypeError: ``input`` or ``kernel`` is no floating-point tensor.
        ValueError: a shape is wrong, ``kernel`` has an even size or requires grad, ``channels`` or
            ``padding_mode`` is none of the above, an image is too small to be reflected.

    Source:
        Torch7's ``nn.SpatialSubtractiveNormalization``; MATLAB's ``imfilter``. It is made of
        PyTorch's own operations, one multiplication and addition for each tap, so it is
        differentiable any number of times, in either mode. Not in TF32, nor in half types under
        autocast.

    Example:
        >>> import torch, mnist_ops
        >>> x = torch.arange(4.0).reshape(1, 1, 4)
        >>> mnist_ops.local_mean2d(x, torch.ones(1, 3), padding_mode="replicate")
        tensor([[[0.3333, 1.0000, 2.0000, 2.6667]]])
    """
    op = "local_mean2d"
    check_images(op, input)
    kernel = kernel_beside(op, input, kernel)
    for name, value, known in (
        ("channels", channels, _CHANNELS),
        ("padding_mode", padding_mode, _PADDING_MODES),
    ):
        if value not in known:
            raise ValueError(f"{op}: {name} must be one of {', '.join(known)}, got {value!r}")
    height, width = kernel.shape[0] // 2, kernel.shape[-1] // 2
    if padding_mode == "reflect" and (height >= input.shape[-2] or width >= input.shape[-1]):
        raise ValueError(
            f"{op}: kernel {tuple(kernel.shape)} is too large to reflect images of "
            f"{tuple(input.shape[-2:])}"
        )
    maps = input.to(compute_type(input.dtype))
    maps = maps.mean(-3, keepdim=True) if channels == "all" else maps
    if input.numel() == 0:
        return torch.zeros_like(maps, dtype=input.dtype) + input.sum()
    # Sums and products alone: a convolution of float32 may run in TF32, and in half under autocast.
    wide = kernel.to(torch.promote_types(kernel.dtype, maps.dtype))
    weights = (wide / wide.sum()).to(maps.dtype)
    around = (width, width, height, height)
    mode = padding_mode if padding_mode in ("reflect", "replicate") else "constant"
    means = _correlated(F.pad(maps, around, mode=mode), weights)
    if padding_mode == "renormalized":
        ones = maps.new_ones(maps.shape[-2:])
        means = means / _correlated(F.pad(ones, around), weights)
    return means.to(input.dtype).contiguous()


def _correlated(padded: Tensor, weights: Tensor) -> Tensor:
    """Correlate images, padded already, with a separable or a whole kernel."""
    if weights.dim() == 1:
        return _along(_along(padded, weights, -1), weights, -2)
    rows = weights.shape[0]
    height = padded.shape[-2] - rows + 1
    total = _along(padded.narrow(-2, 0, height), weights[0], -1)
    for i in range(1, rows):
        total = total + _along(padded.narrow(-2, i, height), weights[i], -1)
    return total


def _along(padded: Tensor, taps: Tensor, dim: int) -> Tensor:
    """Correlate along one dimension."""
    size = padded.shape[dim] - taps.shape[0] + 1
    total = padded.narrow(dim, 0, size) * taps[0]
    for i in range(1, taps.shape[0]):
        total = total + padded.narrow(dim, i, size) * taps[i]
    return total
