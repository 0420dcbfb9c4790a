"""LP pooling of sequences and of volumes, by that of images."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from ._common import check_floating, compute_type, direct
from ._public import public
from .lp_pool_tensor import check_powers, pool_by_tensor
from .windows import Places, check_fit, check_windows, has_gaps, has_sides, lay_out

_lp_pool2d = direct("lp_pool2d")  # what its function would check is checked here


def _checked(
    op: str, input: Tensor, shapes: str, dims: int, norm_type: Any, dilation: Any, places: Places
) -> tuple[Tensor, tuple[float | Tensor, list[int], list[int], list[int], bool]]:
    """Return the input, laid out where windows need it, and windows as check_windows does."""
    check_floating(op, "input", input)
    if not dims + 1 <= input.dim() <= dims + 2:
        raise ValueError(f"{op}: input must be {shapes}, got the shape {tuple(input.shape)}")
    if has_gaps(op, dilation, dims) or has_sides(places[2]):
        input, places = lay_out(op, input, dims, dilation, places)
    by_tensor = isinstance(norm_type, Tensor)
    p = 1 if by_tensor else norm_type
    windows = check_windows(op, p, *places, dtype=input.dtype, dims=dims)
    check_fit(op, input, windows[1], windows[3])
    if by_tensor:
        check_powers(op, norm_type, input.shape[-dims - 1])
        windows = (norm_type, *windows[1:])
    return input, windows


def _pooled(op: str, images: Tensor, p: float | Tensor, *windows: Any) -> Tensor:
    if isinstance(p, Tensor):
        return pool_by_tensor(op, images, p, *windows)
    return _lp_pool2d(images, p, *windows)


def _leading(dims: int) -> Any:
    def shardable(arguments: dict[str, Any]) -> Collection[int]:
        by_tensor = isinstance(arguments["norm_type"], Tensor)
        return range(arguments["input"].dim() - dims - by_tensor)  # p is that of all channels

    return shardable


@public(_leading(1))
def lp_pool1d(
    input: Tensor,
    norm_type: float | Tensor,
    kernel_size: int | tuple[int],
    stride: int | tuple[int] | None = None,
    padding: int | tuple[int] | tuple[tuple[int, int]] = 0,
    ceil_mode: bool = False,
    dilation: int | tuple[int] = 1,
) -> Tensor:
    r"""LP pooling of sequences: the p-norm of each window of each channel.

    .. math:: y = \Big(\sum_{x \in \text{window}} |x|^p\Big)^{1/p}

    It is :func:`lp_pool2d` of images of one row, which takes a view of the input.

    Args:
        input: sequences (N, C, L) or one (C, L); dtypes as in :func:`lp_pool2d`.
        norm_type: p, as in :func:`lp_pool2d`.
        kernel_size: length of a window.
        stride: distance between windows; default ``kernel_size``.
        padding: how far windows reach over both ends, at most half of ``kernel_size``; or
            ``((before, after),)``, of any size, for which a padded copy is made.
        ceil_mode: keep a last window that only partly lies on the sequence.
        dilation: distance between the elements of a window. Where it is not 1 a copy of all windows
            is made.

    Returns:
        (N, C, L_out) or (C, L_out), with L_out as H_out in :func:`lp_pool2d`.

    Raises:
        TypeError, ValueError: as in :func:`lp_pool2d`.

    Source:
        PyTorch's ``lp_pool1d``, which raises x itself to p; ONNX's ``LpPool``. Derivatives as in
        :func:`lp_pool2d`.

    Example:
        >>> import torch, mnist_ops
        >>> mnist_ops.lp_pool1d(torch.tensor([[3.0, -4.0, 6.0, 8.0]]), 2, kernel_size=2)
        tensor([[ 5., 10.]])
    """
    places = kernel_size, stride, padding, ceil_mode
    shapes = "(N, C, L) or (C, L)"
    input, windows = _checked("lp_pool1d", input, shapes, 1, norm_type, dilation, places)
    p, (kernel,), (step,), (pad,), ceil = windows
    rows = input.unsqueeze(-2)
    return _pooled("lp_pool1d", rows, p, [1, kernel], [1, step], [0, pad], ceil).squeeze(-2)


@public(_leading(3))
def lp_pool3d(
    input: Tensor,
    norm_type: float | Tensor,
    kernel_size: int | tuple[int, int, int],
    stride: int | tuple[int, int, int] | None = None,
    padding: int | tuple[int, int, int] | tuple[tuple[int, int], ...] = 0,
    ceil_mode: bool = False,
    dilation: int | tuple[int, int, int] = 1,
) -> Tensor:
    r"""LP pooling of volumes: the p-norm of each window of each channel.

    .. math:: y = \Big(\sum_{x \in \text{window}} |x|^p\Big)^{1/p}
              = \Big(\sum_d \Big(\sum_{h, w} |x_{dhw}|^p\Big)^{p/p}\Big)^{1/p}

    It is :func:`lp_pool2d` over height and width, and again over the depth of what that gives: a
    norm of norms is the norm. The gradient, too, is that of :func:`lp_pool2d`, but for ties with
    p = inf: it is shared evenly among slices with the same maximum, then within each of them.

    Args:
        input: volumes (N, C, D, H, W) or one (C, D, H, W); float64, float32, float16 or bfloat16
            (the half types are computed in float32 from the input to the result).
        norm_type: p, as in :func:`lp_pool2d`.
        kernel_size: depth, height and width of a window; one int or three.
        stride: distance between windows; default ``kernel_size``.
        padding: how far windows reach over each border, at most half of ``kernel_size``; or
            ``((front, back), (top, bottom), (left, right))``, of any size, for which a padded copy
            is made.
        ceil_mode: keep a last window that only partly lies on the volume.
        dilation: distance between the elements of a window. Where it is not 1 a copy of all windows
            is made.

    Returns:
        (N, C, D_out, H_out, W_out) or (C, D_out, H_out, W_out), contiguous, with sizes as H_out in
        :func:`lp_pool2d`.

    Raises:
        TypeError, ValueError: as in :func:`lp_pool2d`.

    Source:
        PyTorch's ``lp_pool3d``, which raises x itself to p; ONNX's ``LpPool``. Differentiable
        twice.

    Example:
        >>> import torch, mnist_ops
        >>> mnist_ops.lp_pool3d(torch.full((1, 2, 2, 2), 2.0), 3, kernel_size=2)
        tensor([[[[4.]]]])
    """
    places = kernel_size, stride, padding, ceil_mode
    op, shapes = "lp_pool3d", "(N, C, D, H, W) or (C, D, H, W)"
    input, windows = _checked(op, input, shapes, 3, norm_type, dilation, places)
    p, kernel, steps, pads, ceil = windows
    channels, slices = input.shape[-4:-2]
    maps = input.to(compute_type(input.dtype)).flatten(-4, -3)
    (_, *area), (_, *apart), (_, *margin) = kernel, steps, pads
    of_slices = p
    if isinstance(p, Tensor) and p.numel() > 1:  # each slice of a channel is one there
        of_slices = p.repeat_interleave(slices)
    maps = _pooled(op, maps, of_slices, area, apart, margin, ceil)
    height, width = maps.shape[-2:]
    columns = maps.reshape(*maps.shape[:-3], channels, slices, height * width)
    y = _pooled(op, columns, p, [kernel[0], 1], [steps[0], 1], [pads[0], 0], ceil)
    return y.unflatten(-1, (height, width)).to(input.dtype)
