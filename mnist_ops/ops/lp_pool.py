"""LP pooling: everything Python knows of it."""

from __future__ import annotations

import functools
import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import (
    _library,
    backward_jvp,
    check_images,
    check_number,
    compute_type,
    direct,
    empty_images,
    pair,
    refuse_lone_tangent,
    register_autograd,
    register_fake,
    register_image_vmap,
    sizes,
    sum_of_tangents,
)
from ._public import planes, public

#: A padding before and after, for each of two dimensions.
Sides = tuple[tuple[int, int], tuple[int, int]]

#: kernel_size, stride, padding, ceil_mode, as they are given.
Places = tuple[Any, Any, Any, Any]

_ops = torch.ops.mnist_ops
_lp_pool2d = direct("lp_pool2d")
_lp_pool2d_grad = direct("lp_pool2d_backward")


@public(planes)
def lp_pool2d(
    input: Tensor,
    norm_type: float,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] | Sides = 0,
    ceil_mode: bool = False,
    dilation: int | tuple[int, int] = 1,
    average: bool = False,
) -> Tensor:
    r"""LP pooling: the p-norm of each window of each channel.

    .. math:: y = \Big(\sum_{x \in \text{window}} |x|^p\Big)^{1/p}

    With p = 1 it is sum pooling of the magnitudes, with p = 2 the root of the pooled energy (the
    reports' pooling), with p = inf max pooling of the magnitudes. Windows are clipped to the image:
    padding and the overhang of ``ceil_mode`` add nothing to the sum. Large and small windows are
    scaled before they are raised to p, so the result overflows or underflows only where the norm
    itself does.

    Gradient: :math:`\partial y / \partial x = \operatorname{sign}(x)\,(|x| / y)^{p-1}`. Where that
    is not defined it is 0: at x = 0, for every p, and in windows that are all 0. With p = inf the
    gradient is shared evenly among equal maxima. Differentiable twice; the third derivative is an
    error.

    Args:
        input: images (N, C, H, W) or one image (C, H, W); float64, float32, float16 or bfloat16
            (the half types are computed in float32). Three dimensions are always one image: a batch
            of sequences (N, C, L) is for :func:`lp_pool1d`.
        norm_type: p, any number > 0, or ``float("inf")``. 1, 2 and inf have kernels of their own.
            In the type that is computed in (float32 unless the input is float64), p above its range
            is taken as inf, and p below its smallest normal number (1.2e-38 in float32) is refused.
        kernel_size: height and width of a window, in pixels; one int or two.
        stride: distance between windows, in pixels; default ``kernel_size``.
        padding: how far windows reach over each border, in pixels, at most half of ``kernel_size``;
            or ``((top, bottom), (left, right))``, of any size, for which a padded copy is made.
        ceil_mode: keep a last window that only partly lies on the image, as PyTorch's poolings do.
        dilation: distance between the elements of a window, in pixels; one int or two. Where it is
            not 1 a copy of all windows is made.
        average: divide the sum by the number of pixels of the window that lie on the image, as
            ``avg_pool2d(..., count_include_pad=False)`` counts: a generalized mean (GeM),
            :math:`(\frac{1}{n} \sum |x|^p)^{1/p}`. Not with ``dilation`` or a padding by sides.
            For small p it is computed in float64, and refused where :math:`n^{1/p}` leaves its
            range.

    Returns:
        (N, C, H_out, W_out) or (C, H_out, W_out) with
        ``H_out = floor((H + top + bottom - span) / stride) + 1``, where a window spans
        ``dilation * (kernel_size - 1) + 1`` pixels (``ceil`` with ``ceil_mode``, without windows
        that would start beyond the image), in the memory format of the input (channels_last stays
        channels_last, without ``dilation``).

    Raises:
        TypeError: ``input`` is no floating-point tensor, a size is no int.
        ValueError: p is not > 0, a size or the padding is out of range, the window does not fit,
            ``average`` with ``dilation`` or a padding by sides.

    Source:
        Torch7's ``nn.SpatialLPPooling``, which raises x itself (not \|x\|) to p; the two agree for
        even p and for x >= 0. ONNX's ``LpPool`` has the same padding and dilation. Under autocast
        it runs in the dtype of its input.

    Example:
        >>> import torch, mnist_ops
        >>> mnist_ops.lp_pool2d(torch.tensor([[[3.0, -4.0], [0.0, 0.0]]]), 2, kernel_size=2)
        tensor([[[5.]]])
    """
    op = "lp_pool2d"
    check_images(op, input)
    places: Places = kernel_size, stride, padding, ceil_mode
    if has_gaps(op, dilation, 2) or has_sides(padding):
        if average:
            raise ValueError(f"{op}: average is not offered with dilation or a padding by sides")
        input, places = lay_out(op, input, 2, dilation, places)
    windows = windows_for(op, norm_type, *places, input.dtype)
    check_fit(op, input, windows[1], windows[3])
    if average:
        p, kernel = windows[:2]
        digits = math.log2(kernel[0] * kernel[1]) / p  # by which the norm is above the mean
        if digits > 1000:
            raise ValueError(f"{op}: norm_type {p:g} is too small for the average of {kernel}")
        wide = input.to(torch.float64 if digits > 20 else compute_type(input.dtype))
        return (_lp_pool2d(wide, *windows) * _share(wide, *windows)).to(input.dtype)
    return _lp_pool2d(input, *windows)


def _share(
    input: Tensor, p: float, kernel: list[int], stride: list[int], padding: list[int], ceil: bool
) -> Tensor:
    """The p-th root of 1 / n, with n pixels of each window on the image; (H_out, W_out)."""
    counts = []
    for size, span, step, pad in zip(input.shape[-2:], kernel, stride, padding, strict=True):
        windows = torch.arange(pooled_size(size, span, step, pad, ceil), device=input.device)
        first = windows * step - pad
        counts.append((first + span).clamp(max=size) - first.clamp(min=0))
    pixels = (counts[0][:, None] * counts[1]).clamp(min=1)
    return pixels.to(input.dtype) ** (-1 / p)


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
    if torch.compiler.is_compiling() or not _PLAIN.issuperset(map(type, arguments)):
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


# ---------------------------------------------------------------------------- forward-mode kernel
#
# What lp_pool2d's derivative makes of a tangent is the first result of the double backward. It is
# an operator of its own because it has derivatives that the second result has not.

_library.define(
    "lp_pool2d_jvp(Tensor tangent, Tensor input, Tensor output, float norm_type, "
    "int[] kernel_size, int[] stride, int[] padding, bool ceil_mode) -> Tensor"
)


def _directional(tangent: Tensor, input: Tensor, output: Tensor, *windows: Any) -> Tensor:
    # The second argument has a part in the second result alone.
    return _ops.lp_pool2d_double_backward(tangent, output, input, output, *windows)[0]


for _key in ("CPU", "CUDA"):
    _library.impl("lp_pool2d_jvp", _directional, _key)

# ------------------------------------------------------------------------------------------ fake


@register_fake("lp_pool2d")
def _(input, norm_type, kernel_size, stride, padding, ceil_mode):
    size = output_size("lp_pool2d", input, norm_type, kernel_size, stride, padding, ceil_mode)
    return empty_images(input, *size)


@register_fake("lp_pool2d_backward")
def _(grad_output, input, output, norm_type, kernel_size, stride, padding, ceil_mode):
    return empty_images(input, *input.shape[-2:])


@register_fake("lp_pool2d_jvp")
def _(tangent, input, output, norm_type, kernel_size, stride, padding, ceil_mode):
    return empty_images(input, *output.shape[-2:])


@register_fake("lp_pool2d_double_backward")
def _(grad_grad_input, grad_output, input, output, norm_type, kernel_size, stride, padding, ceil):
    return empty_images(input, *output.shape[-2:]), empty_images(input, *input.shape[-2:])


# -------------------------------------------------------------------------------------- autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)
    ctx.options = inputs[1:]


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, output = ctx.saved_tensors
    grad_input = _lp_pool2d_grad(grad_output, input, output, *ctx.options)
    return grad_input, None, None, None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _double_backward(ctx: Any, grad_grad_input: Tensor) -> tuple[Tensor | None, ...]:
    # The saved output is a function of the input; what flows through it is part of the second
    # result, so it gets no gradient of its own. Tangents do the same below.
    grad_grad_output, grad_input = _ops.lp_pool2d_double_backward(
        grad_grad_input, *ctx.saved_tensors, *ctx.options
    )
    return grad_grad_output, grad_input, None, None, None, None, None, None


def _jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
    return _ops.lp_pool2d_jvp(tangent, *ctx.saved_tensors, *ctx.options)


def _second_order(*args: Any) -> Tensor:
    # The second derivative of the sum of grad_output * output is symmetric.
    return _ops.lp_pool2d_double_backward(*args)[1]


def _refuse(name: str) -> Any:
    """Refuse a tangent of the output, the third argument of ``name``, without the input's."""
    return lambda tangent, output_tangent, *_: refuse_lone_tangent(
        name, "output", output_tangent, tangent
    )


def _save_jvp(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _jvp_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tangent, input, output = ctx.saved_tensors
    by_tangent = _ops.lp_pool2d_backward(grad, input, output, *ctx.options)
    by_input = None
    if ctx.needs_input_grad[1]:
        _, by_input = _ops.lp_pool2d_double_backward(tangent, grad, input, output, *ctx.options)
    return by_tangent, by_input, *(None,) * (1 + len(ctx.options))


def _curvature(v: Tensor, w: Tensor, x: Tensor, y: Tensor, p: float, *windows: Any) -> Tensor:
    r"""Second derivative of the pooling in the directions v and w, a value for each window.

    With r = \|x\| / y and J the first derivative, it is (p - 1) / y (sum of r^(p - 2) v w -
    J v J w). At x = 0 the power is taken as 0 where p is not 2, as in the kernels.
    """
    if p == 1 or is_infinite(p, x.dtype):
        return torch.zeros_like(y)
    dtype = x.dtype
    wide = compute_type(dtype)
    v, w, x, y = (t.to(wide) for t in (v, w, x, y))
    pooled = y != 0
    divisor = torch.where(pooled, y, 1.0)
    if p == 2:
        # The derivative of the 1-norm of positive numbers sums up windows.
        ones = torch.ones_like(x)
        power_sum = _ops.lp_pool2d_jvp(v * w, ones, torch.ones_like(y), 1.0, *windows)
    else:
        inside = x != 0
        ratio = torch.where(inside, v * w / torch.where(inside, x, 1.0), 0.0)
        power_sum = y * _ops.lp_pool2d_jvp(ratio, x, y, p, *windows)
    both = (_ops.lp_pool2d_jvp(t, x, y, p, *windows) for t in (v, w))
    product = next(both) * next(both)
    return torch.where(pooled, (p - 1) * (power_sum - product) / divisor, 0.0).to(dtype)


def _save_double_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _no_third_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError("mnist_ops: the third derivative of lp_pool2d is not offered")


def _double_backward_jvp(
    ctx: Any, v_tangent: Tensor | None, grad_tangent: Tensor | None, *others: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    if any(tangent is not None for tangent in others):
        _no_third_derivative(ctx)
    v, grad_output, input, output = ctx.saved_tensors
    directional, by_v, by_grad = torch.zeros_like(output), None, None
    if v_tangent is not None:
        directional, by_v = _ops.lp_pool2d_double_backward(
            v_tangent, grad_output, input, output, *ctx.options
        )
    if grad_tangent is not None:
        _, by_grad = _ops.lp_pool2d_double_backward(v, grad_tangent, input, output, *ctx.options)
    return directional, sum_of_tangents(by_v, by_grad)


register_autograd("lp_pool2d", _backward, _jvp, setup_context=_save)
register_autograd(
    "lp_pool2d_backward",
    _double_backward,
    backward_jvp("lp_pool2d_backward", _second_order, _refuse("lp_pool2d_backward")),
    setup_context=_save_backward,
)
register_autograd(
    "lp_pool2d_jvp",
    _jvp_backward,
    backward_jvp("lp_pool2d_jvp", _curvature, _refuse("lp_pool2d_jvp")),
    setup_context=_save_jvp,
)
register_autograd(
    "lp_pool2d_double_backward",
    _no_third_derivative,
    _double_backward_jvp,
    setup_context=_save_double_backward,
)

# ------------------------------------------------------------------------------------------ vmap

register_image_vmap("lp_pool2d", images=1)
register_image_vmap("lp_pool2d_backward", images=3)
register_image_vmap("lp_pool2d_jvp", images=3)
register_image_vmap("lp_pool2d_double_backward", images=4)
