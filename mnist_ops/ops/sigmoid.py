"""The sigmoid with its fused backward: everything Python knows of it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ._common import batch_first, check_floating, direct, register_by_output, register_fake
from ._public import public

_ops = torch.ops.mnist_ops
_sigmoid = direct("sigmoid", functools.partial(check_floating, "sigmoid", "input"))


@public(lambda arguments: range(arguments["input"].dim()))
def sigmoid(input: Tensor) -> Tensor:
    r"""Logistic sigmoid, element by element, with its backward in one kernel.

    .. math:: y = \frac{1}{1 + e^{-x}}, \qquad
              \frac{\partial E}{\partial x} = \frac{\partial E}{\partial y}\, y\, (1 - y)

    Args:
        input: a tensor of any shape; float64, float32, float16 or bfloat16 (the half types are
            computed in float32).

    Returns:
        A tensor of the shape, dtype and memory format of ``input``.

    Raises:
        TypeError: ``input`` is no floating-point tensor.

    Source:
        Equation 1.1 of report 1, section 1.1 of report 2 (whose intermediate step has
        1 / (1 - e^-x) by mistake); Torch7's ``nn.Sigmoid``. Differentiable any number of times.

    Example:
        >>> import torch, mnist_ops
        >>> mnist_ops.sigmoid(torch.tensor([0.0]))
        tensor([0.5000])
    """
    return _sigmoid(input)


@register_fake("sigmoid")
def _(input):
    return torch.empty_like(input)


@register_fake("sigmoid_backward")
def _(grad_output, output):
    return torch.empty_like(output)


def _second_order(v: Tensor, grad_output: Tensor, output: Tensor) -> Tensor:
    return v * grad_output * (1 - 2 * output)


# Element by element: each derivative is symmetric.
register_by_output("sigmoid", _ops.sigmoid_backward, _second_order, _second_order)


def _sigmoid_vmap(info, in_dims, input):
    return _ops.sigmoid(input), in_dims[0]


def _sigmoid_backward_vmap(info, in_dims, grad_output, output):
    args = (
        batch_first(t, d, info.batch_size)
        for t, d in zip((grad_output, output), in_dims, strict=True)
    )
    return _ops.sigmoid_backward(*args), 0


torch.library.register_vmap("mnist_ops::sigmoid", _sigmoid_vmap)
torch.library.register_vmap("mnist_ops::sigmoid_backward", _sigmoid_backward_vmap)
