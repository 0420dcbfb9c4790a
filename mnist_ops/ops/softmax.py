"""Softmax, log-softmax and softmax + NLL with their fused backwards."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._common import (
    autocast_to_float32,
    backward_jvp,
    batch_first,
    check_floating,
    check_int,
    check_number,
    check_same_device,
    compute_type,
    direct,
    is_channels_last,
    refuse_lone_tangent,
    register_autograd,
    register_fake,
)
from ._public import public

_ops = torch.ops.mnist_ops
_softmax = direct("softmax")
_softmax_grad = direct("softmax_backward")
_log_softmax = direct("log_softmax")
_log_softmax_grad = direct("log_softmax_backward")
_softmax_nll = direct("softmax_nll")
_softmax_nll_grad = direct("softmax_nll_backward")


def _other_dims(arguments: dict[str, Any]) -> list[int]:
    dims = range(arguments["input"].dim())
    return [d for d in dims if d != arguments.get("dim", -1) % len(dims)]


@public(_other_dims)
def softmax(input: Tensor, dim: int = -1, beta: float = 1.0) -> Tensor:
    r"""Softmax of ``beta * input`` along one dimension.

    .. math:: y_i = \frac{e^{\beta x_i}}{\sum_k e^{\beta x_k}}, \qquad
              \frac{\partial y_i}{\partial x_j} = \beta\, y_i (\delta_{ij} - y_j)

    The reports' Gibbs form :math:`e^{-b x_i} / \sum_k e^{-b x_k}` is ``beta=-b``.

    Args:
        input: a tensor of any shape; float64, float32, float16 or bfloat16 (the half types are
            computed in float32).
        dim: the dimension that sums to 1.
        beta: what the input is multiplied by, an inverse temperature; any number that is finite in
            the type that is computed in.

    Returns:
        A tensor of the shape, dtype and memory format of ``input``.

    Raises:
        TypeError: ``input`` is no floating-point tensor, ``beta`` no number.
        ValueError: ``beta`` is not finite.
        IndexError: there is no such dimension.

    Source:
        Section 2 of report 1, which derives the derivatives for :math:`e^{-b x}` after writing
        :math:`e^x`, and section 1.2 of report 2, whose i = j case has the wrong sign; Torch7's
        ``nn.SoftMax``. Differentiable any number of times. Under autocast it runs in float32.

    Example:
        >>> import torch, mnist_ops
        >>> mnist_ops.softmax(torch.tensor([0.0, 0.0]), beta=-2.0)
        tensor([0.5000, 0.5000])
    """
    op = "softmax"
    return _softmax(input, _dim(op, input, dim), check_beta(op, beta, input.dtype))


@public(_other_dims)
def log_softmax(input: Tensor, dim: int = -1, beta: float = 1.0) -> Tensor:
    r"""Logarithm of :func:`softmax`, computed without taking a logarithm of a small number.

    .. math:: l_i = \beta x_i - \log \sum_k e^{\beta x_k}, \qquad
              \frac{\partial E}{\partial x_i} =
              \beta \Big(g_i - e^{l_i} \sum_k g_k\Big)

    Args:
        input: as in :func:`softmax`.
        dim: as in :func:`softmax`.
        beta: as in :func:`softmax`.

    Returns:
        A tensor of the shape, dtype and memory format of ``input``.

    Raises:
        TypeError, ValueError, IndexError: as in :func:`softmax`.

    Source:
        Torch7's ``nn.LogSoftMax`` with an exact exponential; the approximate one that the original
        system used is ``mnist_ops.torch7.log_softmax``. Differentiable any number of times. Under
        autocast it runs in float32.

    Example:
        >>> import torch, mnist_ops
        >>> mnist_ops.log_softmax(torch.tensor([0.0, 0.0]))
        tensor([-0.6931, -0.6931])
    """
    op = "log_softmax"
    return _log_softmax(input, _dim(op, input, dim), check_beta(op, beta, input.dtype))


def _rows(arguments: dict[str, Any]) -> list[int]:
    # A loss that is reduced has parts of all.
    rows = arguments["input"].dim() > 1 and arguments.get("reduction") == "none"
    return [0] if rows else []


@public(_rows)
def softmax_nll(
    input: Tensor, target: Tensor, beta: float = 1.0, reduction: str = "mean"
) -> Tensor:
    r"""Negative log-likelihood of the target classes under :func:`softmax`, one pass each way.

    .. math:: \ell = \log \sum_k e^{\beta x_k} - \beta x_t, \qquad
              \frac{\partial \ell}{\partial x_i} =
              \beta \Big(\frac{e^{\beta x_i}}{\sum_k e^{\beta x_k}} - \delta_{it}\Big)

    Args:
        input: scores (C,), (N, C) or (N, C, d1, ...); float64, float32, float16 or bfloat16.
        target: class indices in [0, C), of the shape of ``input`` without its class dimension; any
            integer dtype.
        beta: as in :func:`softmax`.
        reduction: ``"mean"`` over all targets, ``"sum"``, or ``"none"``.

    Returns:
        A scalar, or with ``"none"`` a loss for each target, in the dtype of ``input``.

    Raises:
        TypeError: ``input`` is not floating-point, ``target`` not integer.
        ValueError: the shapes do not fit, ``beta`` is not finite, no such reduction.
        RuntimeError: a target is out of range (on the CPU; on CUDA, where checking would have to
            wait for the device, loss and gradient of that row are NaN), or on another device.

    Source:
        Torch7's ``nn.LogSoftMax`` followed by ``nn.ClassNLLCriterion``. Differentiable any number
        of times. Under autocast it runs in float32.

    Example:
        >>> import torch, mnist_ops
        >>> mnist_ops.softmax_nll(torch.zeros(4, 10), torch.tensor([0, 1, 2, 3]))
        tensor(2.3026)
    """
    op = "softmax_nll"
    check_floating(op, "input", input)
    if not isinstance(target, Tensor):
        raise TypeError(f"{op}: target must be a Tensor, got {type(target).__name__}")
    _check_target(op, input, target)
    check_reduction(op, reduction)
    check_same_device(op, "target", target, "input", input)
    if target.dtype is not torch.int64:
        target = target.long()
    return _softmax_nll(input, target, check_beta(op, beta, input.dtype), reduction)[0]


def _check_target(op: str, input: Tensor, target: Tensor) -> None:
    if target.dtype is not torch.int64 and (
        target.is_floating_point() or target.is_complex() or target.dtype == torch.bool
    ):
        raise TypeError(f"{op}: target must be integer class indices, got {target.dtype}")
    shape = tuple(input.shape)  # a slice of a torch.Size takes five times as long
    if not shape:
        raise ValueError(f"{op}: input must be (C,), (N, C) or (N, C, d1, ...), got a scalar")
    class_dim = min(1, len(shape) - 1)
    expected = shape[:class_dim] + shape[class_dim + 1 :]
    if target.shape != expected:
        raise ValueError(
            f"{op}: target must have the shape {expected} for an input of {shape}, "
            f"got {tuple(target.shape)}"
        )
    if shape[class_dim] == 0:
        raise ValueError(f"{op}: input has no classes, its shape is {shape}")


def _dim(op: str, input: Tensor, dim: int) -> int:
    check_floating(op, "input", input)
    dim = check_int(op, "dim", dim)
    dims = max(input.dim(), 1)
    if not -dims <= dim < dims:
        raise IndexError(f"{op}: dim must be in [{-dims}, {dims - 1}], got {dim}")
    return dim


def check_beta(op: str, beta: Any, dtype: torch.dtype = torch.float64) -> float:
    """Refuse a factor that is not finite where it is computed with."""
    beta = check_number(op, "beta", beta)
    if not -1e30 < beta < 1e30:
        if not math.isfinite(beta):
            raise ValueError(f"{op}: beta must be finite, got {beta}")
        wide = compute_type(dtype)
        if not abs(beta) <= torch.finfo(wide).max:
            raise ValueError(
                f"{op}: beta must be finite in the type that is computed in, {wide}, got {beta}"
            )
    return beta


def check_reduction(op: str, reduction: object) -> None:
    """Refuse what is not the name of a reduction."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


# ------------------------------------------------------------------------------------------ fake


def _fake_forward(input, dim, beta):
    _dim("softmax", input, dim)
    return torch.empty_like(input)


def _fake_backward(grad_output, output, dim, beta):
    _dim("softmax_backward", output, dim)
    return torch.empty_like(output)


for _name in ("softmax", "log_softmax"):
    register_fake(_name)(_fake_forward)
    register_fake(f"{_name}_backward")(_fake_backward)


@register_fake("softmax_nll")
def _(input, target, beta, reduction):
    wide = compute_type(input.dtype)
    _check_target("softmax_nll", input, target)
    loss = input.new_empty(target.shape if reduction == "none" else ())
    largest, log_sum = (input.new_empty(target.shape, dtype=wide) for _ in range(2))
    return loss, largest, log_sum


@register_fake("softmax_nll_backward")
def _(grad_loss, input, target, largest, log_sum, beta, reduction):
    layout = torch.channels_last if is_channels_last(input) else torch.contiguous_format
    return torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=layout)


# -------------------------------------------------------------------------------------- autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)
    ctx.options = inputs[1:]


def _softmax_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
    return _softmax_grad(grad_output, *ctx.saved_tensors, *ctx.options), None, None


def _log_softmax_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
    return _log_softmax_grad(grad_output, *ctx.saved_tensors, *ctx.options), None, None


def _softmax_jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
    # The derivative is symmetric.
    return _ops.softmax_backward(tangent, *ctx.saved_tensors, *ctx.options)


def _log_softmax_jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
    (log_y,) = ctx.saved_tensors
    dim, beta = ctx.options
    return _log_softmax_directional(tangent, log_y, dim, beta)


def _log_softmax_directional(v: Tensor, log_y: Tensor, dim: int, beta: float) -> Tensor:
    return beta * (v - (v * log_y.exp()).sum(dim, keepdim=True))


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.options = inputs[2:]


def _softmax_double_backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    g, y = ctx.saved_tensors
    dim, beta = ctx.options
    grad_y = beta * (v * (g - (g * y).sum(dim, keepdim=True)) - g * (v * y).sum(dim, keepdim=True))
    return _ops.softmax_backward(v, y, dim, beta), grad_y, None, None


def _log_softmax_double_backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    log_y = ctx.saved_tensors[1]
    grad_log_y = _log_softmax_second_order(v, *ctx.saved_tensors, *ctx.options)
    return _log_softmax_directional(v, log_y, *ctx.options), grad_log_y, None, None


def _softmax_second_order(t: Tensor, g: Tensor, y: Tensor, dim: int, beta: float) -> Tensor:
    return beta * (t * (g - (g * y).sum(dim, keepdim=True)) - y * (g * t).sum(dim, keepdim=True))


def _log_softmax_second_order(v: Tensor, g: Tensor, log_y: Tensor, dim: int, beta: float) -> Tensor:
    # The same in both modes: it is diagonal.
    return -beta * v * log_y.exp() * g.sum(dim, keepdim=True)


def _save_nll(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, target, *ctx.options = inputs
    saved = output[1:]
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, target, *saved)


def _nll_backward(
    ctx: Any, grad_loss: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, None, None, None]:
    grad = None
    if grad_loss is not None:
        grad = _softmax_nll_grad(grad_loss, *ctx.saved_tensors, *ctx.options)
    return grad, None, None, None


def _nll_jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    input, target, *saved = ctx.saved_tensors
    beta, reduction = ctx.options
    dim = 0 if input.dim() == 1 else 1
    y = _ops.softmax(input, dim, beta)
    return _nll_directional(tangent, y, target, beta, reduction), *(None,) * len(saved)


def _nll_directional(v: Tensor, y: Tensor, target: Tensor, beta: float, reduction: str) -> Tensor:
    """What the derivative of the loss makes of v, with y the softmax."""
    dim = 0 if y.dim() == 1 else 1
    chosen = v.gather(dim, target.unsqueeze(dim)).squeeze(dim)
    change = beta * ((v * y).sum(dim) - chosen)
    if reduction == "none":
        return change
    return change.mean() if reduction == "mean" else change.sum()


def _save_nll_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, beta, reduction = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = beta, reduction


def _nll_double_backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    # What was saved beside input and target is a function of the input; what flows through it is in
    # the input's gradient.
    g, input, target, *saved = ctx.saved_tensors
    beta, reduction = ctx.options
    y = _ops.softmax(input, _class_dim(input), beta)
    grad_g = _nll_directional(v, y, target, beta, reduction)
    grad_input = _nll_curvature(v, g, y, target, beta, reduction)
    return grad_g, grad_input, *(None,) * (3 + len(saved))


def _nll_curvature(
    v: Tensor, g: Tensor, y: Tensor, target: Tensor, beta: float, reduction: str
) -> Tensor:
    """Second derivative of the loss times g in the direction v, a symmetric matrix, given y."""
    dim = _class_dim(y)
    if reduction != "none":
        g = _spread(g, target, reduction)
    return beta * g.unsqueeze(dim) * _ops.softmax_backward(v, y, dim, beta)


def _nll_second_order(v: Tensor, g: Tensor, input: Tensor, target: Tensor, *rest: Any) -> Tensor:
    *_, beta, reduction = rest
    y = _ops.softmax(input, _class_dim(input), beta)
    return _nll_curvature(v, g, y, target, beta, reduction)


def _refuse_saved(tangent: Tensor | None, *others: Tensor | None) -> None:
    for other in others:
        refuse_lone_tangent("softmax_nll_backward", "what softmax_nll saved", other, tangent)


def _class_dim(input: Tensor) -> int:
    return 0 if input.dim() == 1 else 1


def _spread(grad_loss: Tensor, target: Tensor, reduction: str) -> Tensor:
    """Return the gradient of each target's loss, given that of their sum or mean.

    ``grad_loss`` has the first dimensions of ``target``, those that were not reduced.
    """
    reduced = target.shape[grad_loss.dim() :]
    if reduction == "mean":
        grad_loss = grad_loss / reduced.numel()
    return grad_loss.reshape((*grad_loss.shape, *(1,) * len(reduced))).expand_as(target)


for _name, _backward, _jvp, _setup in (
    ("softmax", _softmax_backward, _softmax_jvp, _save),
    ("log_softmax", _log_softmax_backward, _log_softmax_jvp, _save),
    ("softmax_nll", _nll_backward, _nll_jvp, _save_nll),
):
    register_autograd(_name, _backward, _jvp, setup_context=_setup)
for _name, _double_backward, _second_order in (
    ("softmax_backward", _softmax_double_backward, _softmax_second_order),
    ("log_softmax_backward", _log_softmax_double_backward, _log_softmax_second_order),
):
    _forward_mode = backward_jvp(_name, _second_order)
    register_autograd(_name, _double_backward, _forward_mode, setup_context=_save_backward)
register_autograd(
    "softmax_nll_backward",
    _nll_double_backward,
    backward_jvp("softmax_nll_backward", _nll_second_order, _refuse_saved),
    setup_context=_save_nll_backward,
)

# -------------------------------------------------------------------------------- vmap, autocast


def _register_softmax_vmap(name: str, tensors: int) -> None:
    op = getattr(_ops, name)

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        dim, beta = args[tensors:]
        batched = [batch_first(args[i], in_dims[i], info.batch_size) for i in range(tensors)]
        if batched[0].dim() == 1:  # scalars, which are softmax vectors of length 1
            return op(*(b.unsqueeze(1) for b in batched), 1, beta).squeeze(1), 0
        return op(*batched, dim + 1 if dim >= 0 else dim, beta), 0

    torch.library.register_vmap(f"mnist_ops::{name}", rule)


def _merge(tensor: Tensor, per_example: int) -> Tensor:
    """Return (B, N, ...) as (B * N, ...); (B, ...) of examples without N as it is."""
    return tensor.flatten(0, 1) if per_example > 1 else tensor


def _softmax_nll_vmap(info, in_dims, input, target, beta, reduction):
    input = batch_first(input, in_dims[0], info.batch_size)
    target = batch_first(target, in_dims[1], info.batch_size)
    dims = input.dim() - 1
    merged = _merge(input, dims), _merge(target, dims)
    loss, *saved = (r.reshape(target.shape) for r in _ops.softmax_nll(*merged, beta, "none"))
    if reduction != "none":
        # Of an example that is a vector there is one loss: nothing is left to add up.
        rows = loss.flatten(1) if loss.dim() > 1 else loss.unsqueeze(1)
        loss = rows.mean(1) if reduction == "mean" else rows.sum(1)
    return (loss, *saved), (0, 0, 0)


def _softmax_nll_backward_vmap(info, in_dims, *args):
    *tensors, beta, reduction = args
    grad, *others = (
        batch_first(t, d, info.batch_size) for t, d in zip(tensors, in_dims[:5], strict=True)
    )
    input, target = others[:2]
    if reduction != "none":
        grad = _spread(grad, target, reduction)
    dims = input.dim() - 1
    result = _ops.softmax_nll_backward(*(_merge(t, dims) for t in (grad, *others)), beta, "none")
    return result.reshape(input.shape), 0


for _name in ("softmax", "log_softmax"):
    _register_softmax_vmap(_name, tensors=1)
    _register_softmax_vmap(f"{_name}_backward", tensors=2)
    autocast_to_float32(_name)
autocast_to_float32("softmax_nll")
torch.library.register_vmap("mnist_ops::softmax_nll", _softmax_nll_vmap)
torch.library.register_vmap("mnist_ops::softmax_nll_backward", _softmax_nll_backward_vmap)
