"""LP pooling: everything Python knows of it."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ._common import (
    _library,
    backward_jvp,
    check_images,
    compute_type,
    direct,
    empty_images,
    refuse_lone_tangent,
    register_autograd,
    register_fake,
    register_image_vmap,
    sum_of_tangents,
)
from ._public import batch, planes, public
from .lp_pool_tensor import pool_by_tensor
from .windows import (
    Places,
    Sides,
    check_fit,
    check_that_they_fit,
    has_gaps,
    has_sides,
    is_infinite,
    lay_out,
    output_size,
    pooled_size,
    windows_for,
)

_ops = torch.ops.mnist_ops
_lp_pool2d = direct("lp_pool2d", check_that_they_fit("lp_pool2d"))
_lp_pool2d_grad = direct("lp_pool2d_backward")


def _shardable(arguments: dict[str, Any]) -> Collection[int]:
    return (batch if isinstance(arguments["norm_type"], Tensor) else planes)(arguments)


@public(_shardable)
def lp_pool2d(
    input: Tensor,
    norm_type: float | Tensor,
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

    A tensor p has the gradient

    .. math:: \frac{\partial y}{\partial p} = \frac{y}{p} \sum_{x \in \text{window}}
              w_x \ln \frac{|x|}{y}, \qquad w_x = \frac{|x|^p}{\sum |x|^p}

    for the sum as well as for the mean of ``average``, 0 in windows that are all 0, summed in a
    fixed order. \|x\| / y comes by way of the window's largest magnitude, so it is as exact for
    small x as for large; with ``average`` and p < 1 the relative errors of y and of this gradient
    grow as 1 / p. The values of p are not looked at, which would have to wait for the device: where
    p is not > 0 the result is NaN. Differentiable any number of times, the second and further
    ones by PyTorch's own operators, which copy the windows.

    Args:
        input: images (N, C, H, W) or one image (C, H, W); float64, float32, float16 or bfloat16
            (the half types are computed in float32). Three dimensions are always one image: a batch
            of sequences (N, C, L) is for :func:`lp_pool1d`.
        norm_type: p, any number > 0, or ``float("inf")``. 1, 2 and inf have kernels of their own.
            In the type that is computed in (float32 unless the input is float64), p above its range
            is taken as inf, and p below its smallest normal number (1.2e-38 in float32) is refused.
            Or a floating-point tensor on the device of ``input``, 0-d or with one p for each
            channel, which has a gradient of its own (above).
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
            Numbers p are computed by way of the norm, which must be in range; where
            :math:`n^{1/p}` is above 256, as a tensor p is.

    Returns:
        (N, C, H_out, W_out) or (C, H_out, W_out) with
        ``H_out = floor((H + top + bottom - span) / stride) + 1``, where a window spans
        ``dilation * (kernel_size - 1) + 1`` pixels (``ceil`` with ``ceil_mode``, without windows
        that would start beyond the image), in the memory format of the input (channels_last stays
        channels_last, without ``dilation``).

    Raises:
        TypeError: ``input`` is no floating-point tensor, a size is no int.
        ValueError: p is not > 0, a size or the padding is out of range, the window does not fit,
            ``average`` with ``dilation`` or a padding by sides, ``norm_type`` has the shape of no p
            for each channel.
        RuntimeError: ``norm_type`` is a tensor on another device.

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
    number = 1 if isinstance(norm_type, Tensor) else norm_type
    windows = windows_for(op, number, *places, input.dtype)
    p, kernel = windows[:2]
    if not (average or isinstance(norm_type, Tensor)):
        return _lp_pool2d(input, *windows)
    check_fit(op, input, kernel, windows[3])
    if isinstance(norm_type, Tensor):
        return pool_by_tensor(op, input, norm_type, *windows[1:], average)
    wide = input.to(compute_type(input.dtype))
    if math.log2(kernel[0] * kernel[1]) / p > 8:  # binary digits by which the norm is above
        power = torch.full((), p, dtype=wide.dtype, device=input.device)
        return pool_by_tensor(op, input, power, *windows[1:], average)
    return (_lp_pool2d(wide, *windows) * _share(wide, *windows)).to(input.dtype)


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
