"""LP pooling: everything Python knows of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._common import (
    check_images,
    check_number,
    direct,
    empty_images,
    not_offered,
    pair,
    register_autograd,
    register_image_vmap,
)

_ops = torch.ops.mnist_ops
_lp_pool2d = direct("lp_pool2d")
_lp_pool2d_grad = direct("lp_pool2d_backward")


def lp_pool2d(
    input: Tensor,
    norm_type: float,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    ceil_mode: bool = False,
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
            (the half types are computed in float32).
        norm_type: p, any number > 0, or ``float("inf")``. 1, 2 and inf have kernels of their own.
        kernel_size: height and width of a window, in pixels; one int or two.
        stride: distance between windows, in pixels; default ``kernel_size``.
        padding: how far windows reach over each border, in pixels, at most half of ``kernel_size``.
        ceil_mode: keep a last window that only partly lies on the image, as PyTorch's poolings do.

    Returns:
        (N, C, H_out, W_out) or (C, H_out, W_out) with
        ``H_out = floor((H + 2 * padding - kernel_size) / stride) + 1`` (``ceil`` with
        ``ceil_mode``, without windows that would start beyond the image), in the memory format of
        the input (channels_last stays channels_last).

    Raises:
        TypeError: ``input`` is no floating-point tensor, a size is no int.
        ValueError: p is not > 0, a size or the padding is out of range, the window does not fit.

    Source:
        Torch7's ``nn.SpatialLPPooling``, which raises x itself (not \|x\|) to p; the two agree for
        even p and for x >= 0. Under autocast it runs in the dtype of its input.

    Example:
        >>> import torch, mnist_ops
        >>> mnist_ops.lp_pool2d(torch.tensor([[[3.0, -4.0], [0.0, 0.0]]]), 2, kernel_size=2)
        tensor([[[5.]]])
    """
    op = "lp_pool2d"
    check_images(op, input)
    windows = check_windows(op, norm_type, kernel_size, stride, padding, ceil_mode)
    check_fit(op, input, windows[1], windows[3])
    return _lp_pool2d(input, *windows)


def check_windows(
    op: str, norm_type: Any, kernel_size: Any, stride: Any, padding: Any, ceil_mode: Any
) -> tuple[float, list[int], list[int], list[int], bool]:
    """Refuse windows that no image could have; return them as the operators take them."""
    p = check_number(op, "norm_type", norm_type)
    if not p > 0:
        raise ValueError(f"{op}: norm_type must be > 0, got {norm_type}")
    kernel = pair(op, "kernel_size", kernel_size)
    steps = kernel if stride is None else pair(op, "stride", stride)
    pads = pair(op, "padding", padding)
    for name, values in (("kernel_size", kernel), ("stride", steps)):
        if values[0] < 1 or values[1] < 1:
            raise ValueError(f"{op}: {name} must be positive, got {tuple(values)}")
    if not (0 <= pads[0] <= kernel[0] // 2 and 0 <= pads[1] <= kernel[1] // 2):
        raise ValueError(
            f"{op}: padding must be between 0 and half of kernel_size, got {tuple(pads)} with "
            f"kernel_size {tuple(kernel)}"
        )
    return p, kernel, steps, pads, bool(ceil_mode)


def _pooled(size: Any, kernel: int, stride: int, padding: int, ceil_mode: bool) -> Any:
    span = size + 2 * padding - kernel
    pooled = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    # The last window must start inside the image or its left padding.
    if ceil_mode and (pooled - 1) * stride >= size + padding:
        pooled -= 1
    return pooled


def check_fit(op: str, input: Tensor, kernel: list[int], padding: list[int]) -> None:
    """Refuse windows that do not fit into the image."""
    *_, height, width = input.shape
    if height + 2 * padding[0] < kernel[0] or width + 2 * padding[1] < kernel[1]:
        raise ValueError(
            f"{op}: kernel_size {tuple(kernel)} does not fit into an image of {(height, width)} "
            f"with padding {tuple(padding)}"
        )


def output_size(
    op: str, input: Tensor, kernel: list[int], stride: list[int], padding: list[int], ceil: bool
) -> list[Any]:
    """Return [height, width] of the pooled map; refuse windows that do not fit."""
    check_fit(op, input, kernel, padding)
    sizes = input.shape[-2:]
    return [_pooled(sizes[i], kernel[i], stride[i], padding[i], ceil) for i in range(2)]


# ------------------------------------------------------------------------------------------ fake


@torch.library.register_fake("mnist_ops::lp_pool2d")
def _(input, norm_type, kernel_size, stride, padding, ceil_mode):
    size = output_size("lp_pool2d", input, kernel_size, stride, padding, ceil_mode)
    return empty_images(input, *size)


@torch.library.register_fake("mnist_ops::lp_pool2d_backward")
def _(grad_output, input, output, norm_type, kernel_size, stride, padding, ceil_mode):
    return empty_images(input, *input.shape[-2:])


@torch.library.register_fake("mnist_ops::lp_pool2d_double_backward")
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
    # result, so it gets no gradient of its own.
    grad_grad_output, grad_input = _ops.lp_pool2d_double_backward(
        grad_grad_input, *ctx.saved_tensors, *ctx.options
    )
    return grad_grad_output, grad_input, None, None, None, None, None, None


register_autograd("lp_pool2d", _backward, setup_context=_save)
register_autograd("lp_pool2d_backward", _double_backward, setup_context=_save_backward)
not_offered("lp_pool2d_double_backward", "the third derivative of lp_pool2d")

# ------------------------------------------------------------------------------------------ vmap

register_image_vmap("lp_pool2d", images=1)
register_image_vmap("lp_pool2d_backward", images=3)
register_image_vmap("lp_pool2d_double_backward", images=4)
