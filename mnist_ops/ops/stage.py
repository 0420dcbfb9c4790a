"""A stage of the networks, activation to normalization, in one: everything Python knows of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._common import (
    autocast_to_float32,
    check_images,
    compute_type,
    direct,
    empty_images,
    register_autograd,
    register_by_output,
    register_fake,
    register_image_vmap,
    replace_in_eager,
)
from ._public import batch, public
from .local_norm import (
    kernel_beside,
    normalization_backward_jvp,
    refuse_kernel_gradient,
    refuse_kernel_tangent,
)
from .windows import check_that_they_fit, output_size, windows_for

_ops = torch.ops.mnist_ops
_stage2d = direct("stage2d", check_that_they_fit("stage2d"))
_stage2d_grad = direct("stage2d_backward")
_activate = direct("activate")
_lp_pool2d = direct("lp_pool2d")
_subtractive_norm2d = direct("subtractive_norm2d")

#: The activations that a stage can begin with.
ACTIVATIONS = ("tanh", "relu", "sigmoid", "identity")


@public(batch)
def stage2d(
    input: Tensor,
    kernel: Tensor,
    activation: str = "tanh",
    norm_type: float = 2.0,
    kernel_size: int | tuple[int, int] = 2,
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    ceil_mode: bool = False,
) -> Tensor:
    r"""What follows a convolution in the reports' networks: squash, pool, normalize.

    .. math:: y = \Big(\sum_{\text{window}} |\operatorname{act}(x)|^p\Big)^{1/p}, \qquad
              z_c = y_c - \frac{\frac{1}{C} \sum_{c'} u \star y_{c'}}{u \star 1}

    It is ``subtractive_norm2d(lp_pool2d(act(input), norm_type, kernel_size, ...), kernel)`` but for
    rounding: :func:`lp_pool2d` and :func:`subtractive_norm2d` have the formulas, conventions and
    :math:`u`. On CUDA it is one kernel that reads the input once and writes the output once, and
    the backward pass reads the input again and computes the rest anew: for a 1-D kernel and 2 x 2
    windows with p = 2 that leave nothing over, as in the reports' networks, if a pooled map fits
    into a block's shared memory. Elsewhere the three operators run, on a CPU on a few images at a
    time. Training on a CPU keeps tanh(input) or sigmoid(input), in float32 and float64.

    Half types are computed in float32 from the input to the output, where the three operators round
    after each step. Differentiable twice; the third derivative is an error.

    Args:
        input: what the convolution gives: (N, C, H, W) or one image (C, H, W); float64, float32,
            float16 or bfloat16.
        kernel: weights of the normalization, as in :func:`subtractive_norm2d`.
        activation: ``"tanh"``, ``"relu"``, ``"sigmoid"`` or ``"identity"``.
        norm_type: the p of the pooling, as in :func:`lp_pool2d`.
        kernel_size: height and width of its windows, in pixels; one int or two.
        stride: distance between windows, in pixels; default ``kernel_size``.
        padding: as in :func:`lp_pool2d`. Nothing lies there, whatever the activation makes of 0.
        ceil_mode: as in :func:`lp_pool2d`.

    Returns:
        (N, C, H_out, W_out) or (C, H_out, W_out) as from :func:`lp_pool2d`, in the memory format of
        the input (channels_last stays channels_last).

    Raises:
        TypeError: a tensor is not floating-point, a size is no int.
        ValueError: the activation is none of the above, or as in :func:`lp_pool2d` and
            :func:`subtractive_norm2d`.
        RuntimeError: the kernel's sum is 0, as in :func:`subtractive_norm2d`.

    Source:
        Report 1, section 3.1: ``nn.Tanh``, ``nn.SpatialLPPooling`` and
        ``nn.SpatialSubtractiveNormalization`` of Torch7, one after the other. Under autocast it
        runs in float32.

    Example:
        >>> import torch, mnist_ops
        >>> maps = torch.randn(8, 64, 28, 28)
        >>> mnist_ops.stage2d(maps, mnist_ops.gaussian1d(7)).shape
        torch.Size([8, 64, 14, 14])
    """
    op = "stage2d"
    check_images(op, input)
    check_activation(op, activation)
    windows = windows_for(op, norm_type, kernel_size, stride, padding, ceil_mode, input.dtype)
    return _stage2d(input, kernel_beside(op, input, kernel), activation, *windows)


def check_activation(op: str, activation: object) -> None:
    """Refuse what is not the name of an activation."""
    if activation not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"{op}: activation must be one of {known}, got {activation!r}")


# ------------------------------------------------------------------------------------------ fake


@register_fake("stage2d")
def _(input, kernel, activation, norm_type, kernel_size, stride, padding, ceil_mode):
    size = output_size("stage2d", input, norm_type, kernel_size, stride, padding, ceil_mode)
    return empty_images(input, *size)


@register_fake("stage2d_backward")
def _(grad_output, input, kernel, activation, norm_type, kernel_size, stride, padding, ceil_mode):
    return empty_images(input, *input.shape[-2:])


@register_fake("activate")
def _(input, activation):
    check_images("activate", input)
    return empty_images(input, *input.shape[-2:]).to(compute_type(input.dtype))


@register_fake("activate_backward")
def _(grad_output, output, activation):
    check_images("activate_backward", output)
    return empty_images(output, *output.shape[-2:])


# -------------------------------------------------------------------------------------- autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    refuse_kernel_gradient(inputs[1])
    ctx.save_for_backward(*inputs[:2])
    ctx.options = inputs[2:]


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    grad_input = _stage2d_grad(grad_output, *ctx.saved_tensors, *ctx.options)
    return grad_input, None, None, None, None, None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    refuse_kernel_gradient(inputs[2])
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _slope(activation: str, a: Tensor) -> tuple[Tensor, Tensor]:
    """Return da/dx of a = act(x), and its derivative with respect to a."""
    if activation == "tanh":
        return 1 - a * a, -2 * a
    if activation == "sigmoid":
        return a * (1 - a), 1 - 2 * a
    one, zero = torch.ones_like(a), torch.zeros_like(a)
    return torch.where(a <= 0, zero, one) if activation == "relu" else one, zero


def _second_order(
    v: Tensor, g: Tensor, x: Tensor, kernel: Tensor, activation: str, *windows: Any
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum of ``v * stage2d_backward(g, x)`` with respect to g and x.

    With S the normalization, y = P(a) the pooling and h = P'(a)^T S^T g, the backward is act'(x) h:
    the chain rule over the operators that a stage is made of, each of which has a derivative.
    """
    dtype = x.dtype
    wide = compute_type(dtype)
    v, g, x = v.to(wide), g.to(wide), x.to(wide)
    a = _ops.activate(x, activation)
    slope, bend = _slope(activation, a)
    y = _ops.lp_pool2d(a, *windows)
    grad_y = _ops.subtractive_norm2d_backward(g, kernel)
    h = _ops.lp_pool2d_backward(grad_y, a, y, *windows)
    grad_grad_y, grad_a = _ops.lp_pool2d_double_backward(v * slope, grad_y, a, y, *windows)
    grad_g = _ops.subtractive_norm2d(grad_grad_y, kernel)
    grad_x = slope * (grad_a + v * h * bend)
    return grad_g.to(dtype), grad_x.to(dtype)


def _double_backward(ctx: Any, grad_grad_input: Tensor) -> tuple[Tensor | None, ...]:
    grad_g, grad_x = _second_order(grad_grad_input, *ctx.saved_tensors, *ctx.options)
    return grad_g, grad_x, *(None,) * (1 + len(ctx.options))


def _jvp(ctx: Any, tangent: Tensor, kernel_tangent: Tensor | None, *rest: None) -> Tensor:
    """The chain rule once more; the operators of a stage are differentiable in either mode."""
    refuse_kernel_tangent(kernel_tangent)
    x, kernel = ctx.saved_tensors
    activation, *windows = ctx.options
    a = _ops.activate(x.to(compute_type(x.dtype)), activation)
    y = _ops.lp_pool2d(a, *windows)
    pooled = _ops.lp_pool2d_jvp(_activate_directional(tangent, a, activation), a, y, *windows)
    return _ops.subtractive_norm2d(pooled, kernel).to(x.dtype)


def _activate_directional(v: Tensor, output: Tensor, activation: str) -> Tensor:
    return _ops.activate_backward(v.to(output.dtype), output, activation)


def _activate_second_order(v: Tensor, grad: Tensor, output: Tensor, activation: str) -> Tensor:
    return v * grad * _slope(activation, output)[1]


register_by_output(
    "activate", _activate_directional, _activate_second_order, _activate_second_order
)
register_autograd("stage2d", _backward, _jvp, setup_context=_save)
register_autograd(
    "stage2d_backward",
    _double_backward,
    normalization_backward_jvp("stage2d_backward", _second_order),
    setup_context=_save_backward,
)


def _keep_activation(fused: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def train(input: Tensor, kernel: Tensor, activation: str, *windows: Any) -> Tensor:
        # On a CPU it takes longer to make tanh once more than to read it.
        costly = activation in ("tanh", "sigmoid") and input.dtype in (torch.float64, torch.float32)
        if not (input.is_cpu and costly):
            return fused(input, kernel, activation, *windows)
        refuse_kernel_gradient(kernel)
        return _subtractive_norm2d(_lp_pool2d(_activate(input, activation), *windows), kernel)

    return train


replace_in_eager("stage2d", _keep_activation)

# -------------------------------------------------------------------------------- vmap, autocast

register_image_vmap("stage2d", images=1, other_tensors=1)
register_image_vmap("stage2d_backward", images=2, other_tensors=1)
register_image_vmap("activate", images=1)
register_image_vmap("activate_backward", images=2)
autocast_to_float32("stage2d")
