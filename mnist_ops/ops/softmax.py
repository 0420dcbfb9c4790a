"""Softmax, log-softmax and softmax + NLL with their fused backwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._common import (
    autocast_to_float32,
    batch_first,
    check_floating,
    check_int,
    check_number,
    check_same_device,
    compute_type,
    direct,
    is_channels_last,
    register_autograd,
    register_by_output,
    register_fake,
    sum_of_tangents,
)
from ._public import public

_ops = torch.ops.mnist_ops


def _check(op: str) -> Callable[..., None]:
    def check(input: Tensor, dim: int, beta: float) -> None:
        _dim(op, input, dim)
        check_beta(op, beta, input.dtype)

    return check


_softmax = direct("softmax", _check("softmax"))
_log_softmax = direct("log_softmax", _check("log_softmax"))


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
    return _softmax(input, check_int(op, "dim", dim), check_number(op, "beta", beta))


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
    return _log_softmax(input, check_int(op, "dim", dim), check_number(op, "beta", beta))


def _rows(arguments: dict[str, Any]) -> list[int]:
    # A loss that is reduced has parts of all.
    rows = arguments["input"].dim() > 1 and arguments.get("reduction") == "none"
    return [0] if rows else []


@public(_rows)
def softmax_nll(
    input: Tensor,
    target: Tensor,
    beta: float = 1.0,
    reduction: str = "mean",
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Cross entropy of :func:`softmax` and a target, one pass each way.

    .. math:: \ell = \sum_c a_c \Big(\log \sum_k e^{\beta x_k} - \beta x_c\Big), \qquad
              \frac{\partial \ell}{\partial x_i} =
              \beta \Big(y_i \sum_c a_c - a_i\Big), \qquad
              a_c = w_c \Big((1 - s)\, p_c + \frac{s}{C}\Big)

    with y the softmax, w the weights, s ``label_smoothing``, and p the probabilities of the target:
    1 for its class t. Without weights and smoothing that is the negative log-likelihood
    :math:`\ell = \log \sum_k e^{\beta x_k} - \beta x_t`. With ``beta=1`` the function is
    ``torch.nn.functional.cross_entropy``.

    Args:
        input: scores (C,), (N, C) or (N, C, d1, ...); float64, float32, float16 or bfloat16.
        target: class indices in [0, C) or ``ignore_index``, of the shape of ``input`` without its
            class dimension, of any integer dtype; or probabilities p of the shape of ``input``,
            floating-point, which are converted to the dtype of ``input``.
        beta: as in :func:`softmax`.
        reduction: ``"mean"``, the sum over the sum of all :math:`w_t` (over the number of losses
            where targets are probabilities), ``"sum"``, or ``"none"``.
        weight: w, a weight for each class (C,); default 1.
        ignore_index: a class index that stands for no target: loss and gradient are 0, and the mean
            leaves it out. Negative where targets are probabilities.
        label_smoothing: s, in [0, 1].

    Returns:
        A scalar, or with ``"none"`` a loss for each target, in the dtype of ``input``. A mean over
        nothing is NaN.

    Raises:
        TypeError: ``input`` or ``weight`` is not floating-point, ``target`` neither that nor
            integer.
        ValueError: the shapes do not fit, ``beta`` is not finite, no such reduction,
            ``label_smoothing`` or ``ignore_index`` is out of range.
        RuntimeError: a target is out of range (on the CPU; on CUDA, where checking would have to
            wait for the device, loss and gradient of that row are NaN), or on another device; a
            derivative with respect to ``weight`` is asked for.

    Source:
        Torch7's ``nn.LogSoftMax`` followed by ``nn.ClassNLLCriterion``; PyTorch's
        ``cross_entropy``. Differentiable any number of times with respect to ``input`` and
        probabilities. Under autocast it runs in float32.

    Example:
        >>> import torch, mnist_ops
        >>> mnist_ops.softmax_nll(torch.zeros(4, 10), torch.tensor([0, 1, 2, -100]))
        tensor(2.3026)
    """
    op = "softmax_nll"
    if weight is not None or getattr(target, "dtype", None) is not torch.int64:
        _check_nll(input, target, weight, beta, reduction, ignore_index, label_smoothing)
        target = target.to(input.dtype if target.is_floating_point() else torch.int64)
        weight = None if weight is None else weight.to(compute_type(input.dtype))
    beta = check_number(op, "beta", beta)
    ignore_index, label_smoothing = check_smoothing(op, ignore_index, label_smoothing)
    return _softmax_nll(input, target, weight, beta, reduction, ignore_index, label_smoothing)[0]


def _check_nll(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    beta: Any,
    reduction: str,
    ignore_index: Any,
    label_smoothing: Any,
) -> None:
    op = "softmax_nll"
    check_floating(op, "input", input)
    if not isinstance(target, Tensor):
        raise TypeError(f"{op}: target must be a Tensor, got {type(target).__name__}")
    check_reduction(op, reduction)
    check_same_device(op, "target", target, "input", input)
    if weight is not None:
        check_floating(op, "weight", weight)
        check_same_device(op, "weight", weight, "input", input)
    _check_shapes(op, input, target, weight)
    ignore_index, label_smoothing = check_smoothing(op, ignore_index, label_smoothing)
    if target.is_floating_point() and ignore_index >= 0:
        raise ValueError(
            f"{op}: ignore_index must be negative where target has probabilities, got "
            f"{ignore_index}"
        )
    check_beta(op, beta, input.dtype)


_softmax_nll = direct("softmax_nll", _check_nll)
_softmax_nll_grad = direct("softmax_nll_backward")


def _class_dim(input: Tensor) -> int:
    return 0 if input.dim() == 1 else 1


def _lines(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of ``input`` without its classes."""
    return (*shape[:1], *shape[2:]) if len(shape) > 1 else ()


def _check_shapes(op: str, input: Tensor, target: Tensor, weight: Tensor | None) -> None:
    probabilities = target.dtype is not torch.int64 and target.is_floating_point()
    if target.is_complex() or target.dtype == torch.bool:
        raise TypeError(
            f"{op}: target must be integer class indices or probabilities, got {target.dtype}"
        )
    shape = tuple(input.shape)  # a slice of a torch.Size takes five times as long
    if not shape:
        raise ValueError(f"{op}: input must be (C,), (N, C) or (N, C, d1, ...), got a scalar")
    expected = shape if probabilities else _lines(shape)
    if target.shape != expected:
        kind = "probabilities" if probabilities else "class indices"
        raise ValueError(
            f"{op}: target must have the shape {expected} for {kind} and an input of {shape}, "
            f"got {tuple(target.shape)}"
        )
    classes = shape[_class_dim(input)]
    if classes == 0:
        raise ValueError(f"{op}: input has no classes, its shape is {shape}")
    if weight is not None and weight.shape != (classes,):
        raise ValueError(
            f"{op}: weight must have the shape ({classes},) for an input of {shape}, "
            f"got {tuple(weight.shape)}"
        )


def check_smoothing(op: str, ignore_index: Any, label_smoothing: Any) -> tuple[int, float]:
    """Return both of them as numbers."""
    label_smoothing = check_number(op, "label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}")
    return check_int(op, "ignore_index", ignore_index), label_smoothing


def _dim(op: str, input: Tensor, dim: int) -> int:
    check_floating(op, "input", input)
    dim = check_int(op, "dim", dim)
    dims = input.dim() or 1
    if not -dims <= dim < dims:
        raise IndexError(f"{op}: dim must be in [{-dims}, {dims - 1}], got {dim}")
    return dim


def check_beta(op: str, beta: Any, dtype: torch.dtype = torch.float64) -> float:
    """Refuse a factor that is not finite where it is computed with."""
    beta = check_number(op, "beta", beta)
    if not -1e30 < beta < 1e30:
        wide = compute_type(dtype)
        if not abs(beta) <= torch.finfo(wide).max:
            kind = "" if not math.isfinite(beta) else f" in the type that is computed in, {wide}"
            raise ValueError(f"{op}: beta must be finite{kind}, got {beta}")
    return beta


def check_reduction(op: str, reduction: object) -> None:
    """Refuse what is not the name of a reduction."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


# --------------------------------------------------------------------------- softmax, log_softmax


def _register(name: str, *derivatives: Any) -> None:
    """Register what Python knows of an operator and its backward; see register_by_output."""
    register_by_output(name, *derivatives)
    for tensors, each in enumerate((name, f"{name}_backward"), start=1):
        _register_fake_and_vmap(each, tensors)
    autocast_to_float32(name)


def _register_fake_and_vmap(name: str, tensors: int) -> None:
    op = getattr(_ops, name)

    def fake(*args: Any) -> Tensor:
        output, dim = args[tensors - 1 : tensors + 1]
        _dim(name, output, dim)
        return torch.empty_like(output)

    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        dim, beta = args[tensors:]
        batched = [batch_first(args[i], in_dims[i], info.batch_size) for i in range(tensors)]
        if batched[0].dim() == 1:  # scalars, which are softmax vectors of length 1
            return op(*(b.unsqueeze(1) for b in batched), 1, beta).squeeze(1), 0
        return op(*batched, dim + 1 if dim >= 0 else dim, beta), 0

    register_fake(name)(fake)
    torch.library.register_vmap(f"mnist_ops::{name}", vmap)


def _softmax_by_output(v: Tensor, g: Tensor, y: Tensor, dim: int, beta: float) -> Tensor:
    return beta * (v * (g - (g * y).sum(dim, keepdim=True)) - g * (v * y).sum(dim, keepdim=True))


def _softmax_second_order(t: Tensor, g: Tensor, y: Tensor, dim: int, beta: float) -> Tensor:
    return beta * (t * (g - (g * y).sum(dim, keepdim=True)) - y * (g * t).sum(dim, keepdim=True))


def _log_softmax_directional(v: Tensor, log_y: Tensor, dim: int, beta: float) -> Tensor:
    return beta * (v - (v * log_y.exp()).sum(dim, keepdim=True))


def _log_softmax_second_order(v: Tensor, g: Tensor, log_y: Tensor, dim: int, beta: float) -> Tensor:
    # The same in both modes: it is diagonal.
    return -beta * v * log_y.exp() * g.sum(dim, keepdim=True)


# The derivative of softmax is symmetric.
_register("softmax", _ops.softmax_backward, _softmax_by_output, _softmax_second_order)
_register(
    "log_softmax", _log_softmax_directional, _log_softmax_second_order, _log_softmax_second_order
)

# ------------------------------------------------------------------------------------ softmax_nll


@register_fake("softmax_nll")
def _(input, target, weight, beta, reduction, ignore_index, label_smoothing):
    _check_shapes("softmax_nll", input, target, weight)
    if weight is not None:
        check_same_device("softmax_nll", "weight", weight, "input", input)
    loss = input.new_empty(_lines(input.shape) if reduction == "none" else ())
    shape = () if reduction == "mean" else (0,)
    return loss, input.new_empty(shape, dtype=compute_type(input.dtype))


@register_fake("softmax_nll_backward")
def _(grad_loss, input, target, total, weight, *_):
    if weight is not None:
        check_same_device("softmax_nll_backward", "weight", weight, "input", input)
    layout = torch.channels_last if is_channels_last(input) else torch.contiguous_format
    return torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=layout)


# What is saved is in the order of the arguments of softmax_nll_backward; the tensors before the
# options, among which is None in the place of a weight that is not there.


def _keep(ctx: Any, tensors: Sequence[Tensor], weight: Tensor | None, options: Any) -> None:
    weights = () if weight is None else (weight,)
    ctx.save_for_backward(*tensors, *weights)
    ctx.options = options if weights else (None, *options)


def _save_nll(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    total = output[1]
    ctx.mark_non_differentiable(total)
    ctx.set_materialize_grads(False)
    _keep(ctx, (*inputs[:2], total), inputs[2], inputs[3:])


def _save_nll_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _keep(ctx, inputs[:4], inputs[4], inputs[5:])


class _Nll:
    """The loss written with differentiable operators, for derivatives that no kernel computes."""

    def __init__(self, input: Tensor, target: Tensor, total: Tensor, *options: Any) -> None:
        weight, self.beta, self.reduction, ignore_index, smoothing = options
        self.input, self.total, self.dim = input, total, _class_dim(input)
        classes = input.shape[self.dim]
        #: What a changes by with probabilities.
        self.slope: Any = 1 - smoothing
        if weight is not None:
            sizes = (classes, *(1,) * (input.dim() - 1 - self.dim))
            self.slope = weight.to(input.dtype).reshape(sizes) * (1 - smoothing)
        if target.is_floating_point():
            a = target * (1 - smoothing) + smoothing / classes
        else:
            index = target.unsqueeze(self.dim)
            a = torch.zeros_like(input) + smoothing / classes
            hit = torch.scatter(
                torch.zeros_like(input), self.dim, index.clamp(0, classes - 1), 1 - smoothing
            )
            a = torch.where((index >= 0) & (index < classes), a + hit, math.nan)
            a = torch.where(index == ignore_index, 0.0, a)
        self.a = a if weight is None else a * weight.to(input.dtype).reshape(sizes)
        self.whole = self.a.sum(self.dim, keepdim=True)
        self.y = _ops.softmax(input, self.dim, self.beta)

    def reduce(self, losses: Tensor) -> Tensor:
        if self.reduction == "none":
            return losses
        total = losses.sum()
        return (total / self.total).to(total.dtype) if self.reduction == "mean" else total

    def factors(self, grad_loss: Tensor) -> Tensor:
        """The gradient of each line's loss, to be multiplied by what has classes."""
        lines = _lines(self.input.shape)
        grad = _spread(grad_loss, self.total, lines, self.reduction).to(self.input.dtype)
        return grad.unsqueeze(self.dim)

    def directional(self, v: Tensor) -> Tensor:
        """What the derivative of the loss makes of v."""
        change = (v * self.y).sum(self.dim, keepdim=True) * self.whole
        return self.reduce(self.beta * (change.squeeze(self.dim) - (v * self.a).sum(self.dim)))

    def curvature(self, v: Tensor, g: Tensor) -> Tensor:
        """Second derivative of the loss times g in the direction v, a symmetric matrix."""
        y = _ops.softmax_backward(v, self.y, self.dim, self.beta)
        return self.beta * self.factors(g) * self.whole * y

    def by_probabilities(self) -> Tensor:
        """What each loss changes by with the probabilities of the target."""
        return -self.slope * _ops.log_softmax(self.input, self.dim, self.beta)


def _refuse_derivative(name: str, **of: Any) -> None:
    for argument, derivative in of.items():
        if derivative is not None and derivative is not False:
            raise RuntimeError(f"mnist_ops: {name} offers no derivative with respect to {argument}")


def _nll_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    _, target_needs_it, weight_needs_it, *_ = ctx.needs_input_grad
    _refuse_derivative("softmax_nll", weight=weight_needs_it)
    by_input = by_target = None
    if grad_loss is not None:
        saved = *ctx.saved_tensors, *ctx.options
        by_input = _softmax_nll_grad(grad_loss, *saved)
        if target_needs_it:
            nll = _Nll(*saved)
            by_target = nll.factors(grad_loss) * nll.by_probabilities()
    return by_input, by_target, *(None,) * 5


def _nll_jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, None]:
    tangent, of_target, of_weight, *_ = tangents
    _refuse_derivative("softmax_nll", weight=of_weight)
    nll = _Nll(*ctx.saved_tensors, *ctx.options)
    by_input = by_target = None
    if tangent is not None:
        by_input = nll.directional(tangent)
    if of_target is not None:
        by_target = nll.reduce((of_target * nll.by_probabilities()).sum(nll.dim))
    return sum_of_tangents(by_input, by_target), None


def _nll_double_backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    _refuse_derivative("softmax_nll_backward", total=ctx.needs_input_grad[3])
    _refuse_derivative("softmax_nll_backward", weight=ctx.needs_input_grad[4])
    g, *saved = ctx.saved_tensors
    nll = _Nll(*saved, *ctx.options)
    by_target = None
    if ctx.needs_input_grad[2]:
        change = (v * nll.y).sum(nll.dim, keepdim=True) - v
        by_target = nll.beta * nll.factors(g) * nll.slope * change
    return nll.directional(v), nll.curvature(v, g), by_target, *(None,) * 6


def _nll_backward_jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
    of_grad, of_input, of_target, of_total, of_weight, *_ = tangents
    _refuse_derivative("softmax_nll_backward", total=of_total, weight=of_weight)
    g, *saved = ctx.saved_tensors
    by_grad = by_input = by_target = None
    if of_grad is not None:
        by_grad = _ops.softmax_nll_backward(of_grad, *saved, *ctx.options)
    nll = _Nll(*saved, *ctx.options)
    if of_input is not None:
        by_input = nll.curvature(of_input, g)
    if of_target is not None:
        a = nll.slope * of_target
        change = nll.y * a.sum(nll.dim, keepdim=True) - a
        by_target = nll.beta * nll.factors(g) * change
    return sum_of_tangents(by_grad, by_input, by_target)


def _spread(grad_loss: Tensor, total: Tensor, lines: Sequence[int], reduction: str) -> Tensor:
    """Return the gradient of each line's loss, given that of their sum or mean.

    ``grad_loss`` has the first dimensions of ``lines``, those that were not reduced.
    """
    if reduction == "none":
        return grad_loss
    if reduction == "mean":
        grad_loss = (grad_loss / total).to(grad_loss.dtype)
    reduced = len(lines) - grad_loss.dim()
    return grad_loss.reshape((*grad_loss.shape, *(1,) * reduced)).expand(lines)


register_autograd("softmax_nll", _nll_backward, _nll_jvp, _save_nll)
register_autograd(
    "softmax_nll_backward", _nll_double_backward, _nll_backward_jvp, _save_nll_backward
)


def _merge(tensor: Tensor, per_example: int) -> Tensor:
    """Return (B, N, ...) as (B * N, ...); (B, ...) of examples without N as it is."""
    return tensor.flatten(0, 1) if per_example > 1 else tensor


def line_weights(
    lines: Sequence[int], target: Tensor, weight: Tensor | None, ignore_index: int, dtype: Any
) -> Tensor:
    """What each loss adds to the divisor of the mean, of targets that fit."""
    if target.is_floating_point():
        return target.new_ones(lines, dtype=dtype)
    counts = target != ignore_index
    if weight is None:
        return counts.to(dtype)
    return torch.where(counts, weight[target.clamp(0, len(weight) - 1)].to(dtype), 0.0)


def _register_nll_vmap(name: str, place: int, batched: Any) -> None:
    """Register batched(tensors with their batch first, the weight, ...), one call for all.

    ``place`` is that of the weight, behind the tensors. There is a call for each of several.
    """
    op = getattr(_ops, name)

    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        tensors = [batch_first(args[i], in_dims[i], info.batch_size) for i in range(place)]
        weight, *options = args[place:]
        if weight is None or in_dims[place] is None:
            return batched(*tensors, weight, *options)
        weights = weight.movedim(in_dims[place], 0)
        if len(weights) == 0:
            return batched(*tensors, weight.new_ones(weights.shape[1:]), *options)
        results = [op(*each, *options) for each in zip(*tensors, weights, strict=True)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(each) for each in zip(*results, strict=True)), (0, 0)

    torch.library.register_vmap(f"mnist_ops::{name}", vmap)


def _batched_nll(input, target, weight, beta, reduction, *options):
    dims = input.dim() - 1
    merged = _merge(input, dims), _merge(target, dims)
    loss = _ops.softmax_nll(*merged, weight, beta, "none", *options)[0]
    lines = (len(input), *_lines(input.shape[1:]))
    loss = loss.reshape(lines)
    total = loss.new_empty((len(input), 0), dtype=compute_type(input.dtype))
    if reduction != "none":
        # Of an example that is a vector there is one loss: nothing is left to add up.
        rows = [loss]
        if reduction == "mean":
            rows.append(line_weights(lines, target, weight, options[0], total.dtype))
        loss, *totals = (r.flatten(1).sum(1) if r.dim() > 1 else r for r in rows)
        if totals:
            total = totals[0]
            loss = torch.where(total == 0, math.nan, loss / total).to(loss.dtype)
    return (loss, total), (0, 0)


def _batched_nll_backward(grad, input, target, total, weight, beta, reduction, *options):
    lines = (len(input), *_lines(input.shape[1:]))
    grad = _spread(grad, total, lines, reduction)
    merged = [_merge(t, input.dim() - 1) for t in (grad, input, target)]
    nothing = total.new_empty(0)
    result = _ops.softmax_nll_backward(*merged, nothing, weight, beta, "none", *options)
    return result.reshape(input.shape), 0


_register_nll_vmap("softmax_nll", 2, _batched_nll)
_register_nll_vmap("softmax_nll_backward", 4, _batched_nll_backward)
autocast_to_float32("softmax_nll")
