"""Means of neighbourhoods, from which other local normalizations are a few lines each."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import check_images, compute_type, direct
from ._public import batch, planes, public
from .local_norm import kernel_beside, register_linear

_local_mean2d = direct("local_mean2d")

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
        kernel: as in :func:`subtractive_norm2d`. Give a product of two as the one: it takes 2 k
            steps where (k, k) takes k^2.
        channels: ``"all"``, one mean over all channels, or ``"each"``, one for each of them.
        padding_mode: what lies beyond the border: ``"renormalized"``, ``"zeros"``, or the image
            again, ``"reflect"`` (without its border pixels, which needs more pixels than half of
            the kernel) or ``"replicate"``, as in :func:`torch.nn.functional.pad`.

    Returns:
        (N, 1, H, W) or (1, H, W), or, with ``"each"``, a tensor of the shape and memory format of
        ``input``; in its dtype.

    Raises:
        TypeError: ``input`` or ``kernel`` is no floating-point tensor.
        ValueError: a shape is wrong, ``kernel`` has an even size or requires grad, ``channels`` or
            ``padding_mode`` is none of the above, an image is too small to be reflected.
        RuntimeError: as in :func:`subtractive_norm2d`.

    Source:
        Torch7's ``nn.SpatialSubtractiveNormalization``; MATLAB's ``imfilter``. Differentiable any
        number of times. Autocast changes nothing.

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
    wide, maps = compute_type(input.dtype), input
    if channels == "all" and input.shape[-3] != 1:
        add_up = torch.mean if input.shape[-3] else torch.sum  # the mean of no channels is 0
        maps = add_up(input, -3, keepdim=True, dtype=wide)
    if padding_mode == "renormalized" and kernel.dim() == 2:  # not a product of two dimensions' own
        ones = maps.new_ones((1, *maps.shape[-2:]), dtype=wide)
        means = _local_mean2d(maps.to(wide), kernel, "zeros") / _local_mean2d(ones, kernel, "zeros")
    else:
        means = _local_mean2d(maps, kernel, padding_mode)
    return means.to(input.dtype)


# -------------------------------------------------------------------------- in PyTorch's operators


def definition(input: Tensor, kernel: Tensor, padding_mode: str) -> Tensor:
    """The mean of each plane, for devices without kernels."""
    if input.numel() == 0:
        return input.clone()
    # Sums and products alone: a convolution of float32 may run in TF32.
    values = kernel.to(torch.promote_types(kernel.dtype, input.dtype))
    weights = (values / values.sum()).to(input.dtype)
    height, width = kernel.shape[0] // 2, kernel.shape[-1] // 2
    around = (width, width, height, height)
    mode = padding_mode if padding_mode in ("reflect", "replicate") else "constant"
    means = _correlated(F.pad(input, around, mode=mode), weights)
    if padding_mode == "renormalized":
        ones = input.new_ones(input.shape[-2:])
        means = means / _correlated(F.pad(ones, around), weights)
    return means


def _correlated(padded: Tensor, weights: Tensor) -> Tensor:
    """Correlate images, padded already, with a separable or a whole kernel."""
    if weights.dim() == 1:
        return _along(_along(padded, weights, -1), weights, -2)
    height = padded.shape[-2] - weights.shape[0] + 1
    rows = (_along(padded.narrow(-2, i, height), row, -1) for i, row in enumerate(weights))
    return functools.reduce(torch.add, rows)


def _along(padded: Tensor, taps: Tensor, dim: int) -> Tensor:
    """Correlate along one dimension."""
    size = padded.shape[dim] - taps.shape[0] + 1
    terms = (padded.narrow(dim, i, size) * tap for i, tap in enumerate(taps))
    return functools.reduce(torch.add, terms)


register_linear("local_mean2d", "local_mean2d_backward")
register_linear("local_mean2d_backward", "local_mean2d")
