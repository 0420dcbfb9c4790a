"""Where the windows of pooling lie: argument checks, sizes, layouts that need no padding."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _torch_private as private
from ._common import check_number, compute_type, pair, sizes

#: A padding before and after, for each of two dimensions.
Sides = tuple[tuple[int, int], tuple[int, int]]

#: kernel_size, stride, padding, ceil_mode, as they are given.
Places = tuple[Any, Any, Any, Any]


def check_windows(
    op: str,
    norm_type: Any,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    ceil_mode: Any,
    dtype: torch.dtype = torch.float64,
    dims: int = 2,
) -> tuple[float, list[int], list[int], list[int], bool]:
    """Refuse windows that no image of dtype could have; return them as the operators take them."""
    p = check_norm_type(op, norm_type, dtype)
    kernel, steps = check_kernel_and_stride(op, kernel_size, stride, dims)
    pads = sizes(op, "padding", padding, dims)
    if not all(0 <= pads[d] <= kernel[d] // 2 for d in range(dims)):
        raise ValueError(
            f"{op}: padding must be between 0 and half of kernel_size, got {tuple(pads)} with "
            f"kernel_size {tuple(kernel)}"
        )
    return p, kernel, steps, pads, bool(ceil_mode)


_known_windows = functools.lru_cache(maxsize=256, typed=True)(check_windows)
_PLAIN = frozenset((str, int, float, bool, type(None), torch.dtype))


def windows_for(*arguments: Any) -> tuple[float, list[int], list[int], list[int], bool]:
    """As :func:`check_windows`, once for plain numbers: it takes longer than a small pooling."""
    if private.is_dynamo() or not _PLAIN.issuperset(map(type, arguments)):
        return check_windows(*arguments)
    return _known_windows(*arguments)


def check_norm_type(op: str, norm_type: Any, dtype: torch.dtype) -> float:
    """Refuse what is no p in the type that dtype is computed in; return it as operators take it."""
    p = check_number(op, "norm_type", norm_type)
    if not p > 0:
        raise ValueError(f"{op}: norm_type must be > 0, got {norm_type}")
    if not 1e-30 < p < 1e30:
        wide = compute_type(dtype)
        info = torch.finfo(wide)
        if p < info.smallest_normal:
            raise ValueError(
                f"{op}: norm_type must be at least {info.smallest_normal:.3g}, the smallest normal "
                f"number of the type that is computed in, {wide}, got {norm_type}"
            )
        if p > info.max:
            p = INFINITE
    return p


def check_kernel_and_stride(
    op: str, kernel_size: Any, stride: Any, dims: int
) -> tuple[list[int], list[int]]:
    """Refuse sizes that no window could have; return one for each dimension."""
    kernel = sizes(op, "kernel_size", kernel_size, dims)
    steps = kernel if stride is None else sizes(op, "stride", stride, dims)
    for name, values in (("kernel_size", kernel), ("stride", steps)):
        if min(values) < 1:
            raise ValueError(f"{op}: {name} must be positive, got {tuple(values)}")
        if max(values) >= 2**31:  # no image's size, and clear of overflow, as in lp_pool.h
            raise ValueError(f"{op}: {name} must be below 2^31, got {max(values)}")
    return kernel, steps


def has_gaps(op: str, dilation: Any, dims: int) -> bool:
    """Whether the elements of a window are not neighbours."""
    if type(dilation) is int and dilation == 1:
        return False
    return any(gap != 1 for gap in sizes(op, "dilation", dilation, dims))


def has_sides(padding: Any) -> bool:
    """Whether a padding says (before, after) for each dimension."""
    return isinstance(padding, (tuple, list)) and any(isinstance(p, (tuple, list)) for p in padding)


def check_layout(
    op: str, dims: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any
) -> tuple[list[int], list[int], list[list[int]], list[int]]:
    """Refuse windows of any padding and dilation; return sizes, strides, (before, after), gaps."""
    kernel, steps = check_kernel_and_stride(op, kernel_size, stride, dims)
    gaps = sizes(op, "dilation", dilation, dims)
    if not all(1 <= gap < 2**31 for gap in gaps):
        raise ValueError(f"{op}: dilation must be positive and below 2^31, got {tuple(gaps)}")
    if not has_sides(padding):  # of half the size at most, as ever
        padding = check_windows(op, 1, kernel, steps, padding, False, dims=dims)[3]
        return kernel, steps, [[pad, pad] for pad in padding], gaps
    if len(padding) != dims or not all(
        isinstance(p, (tuple, list)) and len(p) == 2 for p in padding
    ):
        raise TypeError(
            f"{op}: padding must be an int, {dims} ints or {dims} pairs of ints, got {padding!r}"
        )
    sides = [pair(op, "padding", p) for p in padding]
    if not all(0 <= pad < 2**31 for side in sides for pad in side):
        raise ValueError(f"{op}: padding must be >= 0 and below 2^31, got {padding!r}")
    return kernel, steps, sides, gaps


def lay_out(
    op: str,
    input: Tensor,
    dims: int,
    dilation: Any,
    places: Places,
) -> tuple[Tensor, Places]:
    """Return images whose windows need no padding or dilation, and these windows.

    Zeros are put on, or pixels that no window holds taken off, so that the windows fit exactly.
    Those with gaps are laid side by side. Neither changes a norm, nor the gradient of a pixel.
    """
    kernel_size, stride, padding, ceil_mode = places
    kernel, steps, sides, gaps = check_layout(op, dims, kernel_size, stride, padding, dilation)
    spans = [gap * (k - 1) + 1 for gap, k in zip(gaps, kernel, strict=True)]
    first = input.dim() - dims
    around: list[int] = []
    for d, (span, step, (before, after)) in enumerate(zip(spans, steps, sides, strict=True)):
        size = input.shape[first + d]
        if size + before + after < span:
            raise ValueError(
                f"{op}: kernel_size {tuple(kernel)} with dilation {tuple(gaps)} does not fit into "
                f"an image of {tuple(input.shape[first:])} with padding {tuple(map(tuple, sides))}"
            )
        count = pooled_size(size, span, step, before, ceil_mode, after)
        around = [before, (count - 1) * step + span - size - before, *around]
    images = F.pad(input, around)
    for d, (span, gap) in enumerate(zip(spans, gaps, strict=True), first):
        if gap > 1:
            windows = images.unfold(d, span, steps[d - first])[..., ::gap]
            images = windows.movedim(-1, d + 1).flatten(d, d + 1)
            steps[d - first] = kernel[d - first]
    return images, (kernel, steps, 0, False)


#: What the operators are given for p = inf. They take it for that, as all p of :func:`is_infinite`;
#: inf itself cannot be read again from what AOTInductor writes.
INFINITE = sys.float_info.max


def is_infinite(p: float, dtype: torch.dtype) -> bool:
    """Whether an operator takes p for inf, as ``usable_norm_type`` of lp_pool.h does."""
    return p > (2.0**57 if dtype is torch.float64 else 2.0**28)


def pooled_size(
    size: Any, kernel: int, stride: int, padding: int, ceil_mode: bool, after: int | None = None
) -> Any:
    """Windows along one dimension of ``size`` pixels; after them may be another padding."""
    room = size + padding + (padding if after is None else after) - kernel
    pooled = (room + (stride - 1 if ceil_mode else 0)) // stride + 1
    # A window that is not whole must start inside the image or its left padding.
    if ceil_mode and (pooled - 1) * stride >= size + padding:
        pooled = room // stride + 1
    return pooled


def check_fit(op: str, input: Tensor, kernel: list[int], padding: list[int]) -> None:
    """Refuse windows that do not fit into a sequence, an image or a volume."""
    extent = input.shape[-len(kernel) :]
    for pixels, size, pad in zip(extent, kernel, padding, strict=True):
        if pixels + 2 * pad < size:
            image = "an image of " if len(kernel) == 2 else ""
            raise ValueError(
                f"{op}: kernel_size {tuple(kernel)} does not fit into {image}{tuple(extent)} with "
                f"padding {tuple(padding)}"
            )


def check_that_they_fit(op: str) -> Callable[..., None]:
    """As :func:`check_fit`, of the arguments of an operator that ends with windows."""
    return lambda *args: check_fit(op, args[0], args[-4], args[-2])


def output_size(
    op: str,
    input: Tensor,
    norm_type: float,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil: bool,
) -> list[Any]:
    """Return [height, width] of the pooled map; refuse windows that no kernel takes."""
    check_windows(op, norm_type, kernel, stride, padding, ceil, input.dtype)
    check_fit(op, input, kernel, padding)
    image = input.shape[-2:]
    return [pooled_size(image[i], kernel[i], stride[i], padding[i], ceil) for i in range(2)]
