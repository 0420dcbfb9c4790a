"""Translations of the operators for ``torch.onnx.export``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18

from .ops.windows import is_infinite, pooled_size

__all__ = ["translations"]

op: Any = opset18  # takes lists and numbers for tensors, which its annotations do not say


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    r"""Return what ``torch.onnx.export`` needs to write the operators in ONNX's own.

    LP pooling becomes ``LpPool`` for p = 1, 2, 3, ..., ``MaxPool`` of the magnitudes for p = inf,
    and for other p the root of an ``AveragePool`` of \|x\|^p. Other operators become standard ones.
    A runtime does not scale windows: where \|x\|^p, or the square of a pixel, leaves the range of
    the dtype, so does the result. Height and width must be fixed where ``ceil_mode`` is set; the
    batch may be dynamic.

    Returns:
        The ``custom_translation_table`` for ``torch.onnx.export(..., dynamo=True)``.

    Raises:
        ValueError: (in the exporter) ``ceil_mode`` is set and height or width is dynamic.

    Source:
        ONNX's operators of version 18. The module needs onnxscript, as PyTorch's exporter does, and
        onnxruntime to run the result; it convolves and pools in float32, not in float64.

    Example:
        >>> import torch, mnist_ops.onnx
        >>> program = torch.onnx.export(
        ...     mnist_ops.nn.LPPool2d(2, 2).eval(), (torch.zeros(1, 3, 8, 8),), dynamo=True,
        ...     verbose=False,
        ...     custom_translation_table=mnist_ops.onnx.translations(),
        ... )
        >>> [node.op_type for node in program.model.graph]
        ['LpPool']
    """
    ops = torch.ops.mnist_ops
    return {
        ops.lp_pool2d.default: lp_pool2d,
        ops.lp_pool2d_tensor_p.default: lp_pool2d_tensor_p,
        ops.local_mean2d.default: local_mean2d,
        ops.subtractive_norm2d.default: subtractive_norm2d,
        ops.divisive_norm2d.default: divisive_norm2d,
        ops.contrastive_norm2d.default: contrastive_norm2d,
        ops.stage2d.default: stage2d,
        ops.sigmoid.default: sigmoid,
        ops.softmax.default: softmax,
        ops.log_softmax.default: log_softmax,
        ops.softmax_nll.default: softmax_nll,
    }


# The exporter calls these with values of its graph, for parameters without annotation, and numbers,
# for those with one; it records the operators that they call.


def _widen(x: Any) -> Any:
    """Half types as float32, which the kernels compute in."""
    half = x.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    return op.Cast(x, to=ir.DataType.FLOAT) if half else x


def _batched(function: Callable[..., Any], x: Any, *args: Any) -> Any:
    """Apply to images (N, C, H, W) or one image (C, H, W), and in the type computed in."""
    wide = _widen(x)
    single = len(x.shape) == 3
    y = function(op.Unsqueeze(wide, [0]) if single else wide, x.shape[-2:], *args)
    y = op.Squeeze(y, [0]) if single else y
    return y if wide is x else op.CastLike(y, x)


def _lp_pool(
    x: Any,
    sizes: Sequence[Any],
    p: float,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
) -> Any:
    windows = _windows(sizes, kernel, stride, padding, ceil_mode)
    if is_infinite(p, torch.float32):
        return op.MaxPool(op.Abs(x), **windows)[0]
    if p == int(p):
        return op.LpPool(x, p=int(p), **windows)
    means = op.AveragePool(op.Pow(op.Abs(x), p), count_include_pad=1, **windows)
    return op.Pow(op.Mul(means, float(math.prod(kernel))), 1 / p)


def _pool_by_tensor(
    x: Any, sizes: Sequence[Any], norm_type: Any, average: bool, kernel: Sequence[int], *places: Any
) -> Any:
    p = op.CastLike(op.Unsqueeze(norm_type, [1, 2]), x)
    windows = _windows(sizes, kernel, *places)
    means = op.AveragePool(op.Pow(op.Abs(x), p), count_include_pad=int(not average), **windows)
    sums = means if average else op.Mul(means, float(math.prod(kernel)))
    return op.Pow(sums, op.Reciprocal(p))


def _windows(
    sizes: Sequence[Any],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
) -> dict[str, Sequence[int]]:
    """Of a pooling, as attributes."""
    ends = list(padding)
    if ceil_mode:
        if not all(isinstance(size, int) for size in sizes):
            raise ValueError("lp_pool2d: ceil_mode needs a fixed height and width in ONNX")
        # Runtimes differ in what ceil_mode is; a padding that leaves no remainder is plain.
        for d, size in enumerate(sizes):
            count = pooled_size(size, kernel[d], stride[d], padding[d], True)
            ends[d] = max(padding[d], (count - 1) * stride[d] + kernel[d] - size - padding[d])
    return {"kernel_shape": kernel, "strides": stride, "pads": [*padding, *ends]}


def _unit(kernel: Any) -> Any:
    """A normalization's kernel as the weights of a convolution, with the sum 1."""
    weights = _widen(kernel)
    if len(kernel.shape) == 1:
        weights = op.Mul(op.Unsqueeze(weights, [1]), weights)
    return op.Unsqueeze(op.Div(weights, op.ReduceSum(weights, keepdims=0)), [0, 1])


def _blur(plane: Any, unit: Any) -> Any:
    """Correlate planes (N, 1, H, W) with such weights, zero beyond the border."""
    return op.Conv(plane, op.CastLike(unit, plane), auto_pad="SAME_UPPER")


def _coverage(x: Any, unit: Any) -> Any:
    """The blurred image that is 1 everywhere: how much of the kernel lies on the image."""
    ones = op.Expand(op.CastLike(1.0, x), op.Shape(x, start=2))
    return _blur(op.Unsqueeze(ones, [0, 1]), unit)


def _local_mean(x: Any, sizes: Sequence[Any], kernel: Any, padding_mode: str) -> Any:
    unit, planes = _unit(kernel), op.Reshape(x, [-1, 1, 0, 0])
    if padding_mode in ("reflect", "replicate"):
        around = [0, 0, kernel.shape[0] // 2, kernel.shape[-1] // 2]
        mode = "edge" if padding_mode == "replicate" else padding_mode
        means = op.Conv(op.Pad(planes, around * 2, mode=mode), op.CastLike(unit, x))
    else:
        means = _blur(planes, unit)
    if padding_mode == "renormalized":
        means = op.Div(means, _coverage(x, unit))
    return op.Reshape(means, op.Shape(x))


def _subtractive(x: Any, sizes: Sequence[Any], unit: Any) -> Any:
    mean = _blur(op.ReduceMean(x, [1]), unit)
    return op.Sub(x, op.Div(mean, _coverage(x, unit)))


def _divisive(x: Any, sizes: Sequence[Any], unit: Any, threshold: float, value: float) -> Any:
    energy = _blur(op.ReduceMean(op.Mul(x, x), [1]), unit)
    deviation = op.Div(op.Sqrt(op.Relu(energy)), _coverage(x, unit))
    large = op.Greater(deviation, op.CastLike(threshold, x))
    return op.Div(x, op.Where(large, deviation, op.CastLike(value, x)))


def _contrastive(x: Any, sizes: Sequence[Any], unit: Any, *thresholds: float) -> Any:
    return _divisive(_subtractive(x, sizes, unit), sizes, unit, *thresholds)


def _stage(x: Any, sizes: Sequence[Any], unit: Any, activation: str, *windows: Any) -> Any:
    if activation != "identity":
        x = {"tanh": op.Tanh, "relu": op.Relu, "sigmoid": op.Sigmoid}[activation](x)
    return _subtractive(_lp_pool(x, sizes, *windows), sizes, unit)


def lp_pool2d(
    input,
    norm_type: float,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
):
    """See :func:`mnist_ops.lp_pool2d`."""
    return _batched(_lp_pool, input, norm_type, kernel_size, stride, padding, ceil_mode)


def lp_pool2d_tensor_p(
    input,
    norm_type,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    average: bool,
):
    """See :func:`mnist_ops.lp_pool2d`, with p in a tensor."""
    places = kernel_size, stride, padding, ceil_mode
    return _batched(_pool_by_tensor, input, norm_type, average, *places)


def local_mean2d(input, kernel, padding_mode: str):
    """See :func:`mnist_ops.local_mean2d`."""
    return _batched(_local_mean, input, kernel, padding_mode)


def subtractive_norm2d(input, kernel):
    """See :func:`mnist_ops.subtractive_norm2d`."""
    return _batched(_subtractive, input, _unit(kernel))


def divisive_norm2d(input, kernel, threshold: float, threshold_value: float):
    """See :func:`mnist_ops.divisive_norm2d`."""
    return _batched(_divisive, input, _unit(kernel), threshold, threshold_value)


def contrastive_norm2d(input, kernel, threshold: float, threshold_value: float):
    """See :func:`mnist_ops.contrastive_norm2d`."""
    return _batched(_contrastive, input, _unit(kernel), threshold, threshold_value)


def stage2d(
    input,
    kernel,
    activation: str,
    norm_type: float,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
):
    """See :func:`mnist_ops.stage2d`."""
    windows = norm_type, kernel_size, stride, padding, ceil_mode
    return _batched(_stage, input, _unit(kernel), activation, *windows)


def sigmoid(input):
    """See :func:`mnist_ops.sigmoid`."""
    return op.CastLike(op.Sigmoid(_widen(input)), input)


def _scaled(x: Any, beta: float) -> Any:
    return op.Mul(_widen(x), op.CastLike(beta, _widen(x)))


def softmax(input, dim: int, beta: float):
    """See :func:`mnist_ops.softmax`."""
    return op.CastLike(op.Softmax(_scaled(input, beta), axis=dim), input)


def log_softmax(input, dim: int, beta: float):
    """See :func:`mnist_ops.log_softmax`."""
    return op.CastLike(op.LogSoftmax(_scaled(input, beta), axis=dim), input)


def softmax_nll(
    input,
    target,
    weight,
    beta: float,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
):
    """See :func:`mnist_ops.softmax_nll`; the second result serves its gradient."""
    dim = min(1, len(input.shape) - 1)
    logs = op.LogSoftmax(_scaled(input, beta), axis=dim)
    weighted = logs
    if weight is not None:
        sizes = [-1, *(1,) * (len(input.shape) - 1 - dim)]
        weighted = op.Mul(logs, op.Reshape(weight, sizes))
    loss = op.ReduceSum(weighted, [dim], keepdims=0)
    ones = op.Expand(op.CastLike(1.0, logs), op.Shape(loss))
    rest = op.Mul(loss, op.CastLike(label_smoothing / input.shape[dim], logs))
    share = op.CastLike(1 - label_smoothing, logs)
    if target.dtype is ir.DataType.INT64:
        counts = op.Not(op.Equal(target, ignore_index))
        index = op.Where(counts, target, 0)
        chosen = op.GatherElements(weighted, op.Unsqueeze(index, [dim]), axis=dim)
        loss = op.Add(op.Mul(op.Squeeze(chosen, [dim]), share), rest)
        zeros = op.CastLike(0.0, logs)
        loss = op.Where(counts, loss, zeros)
        each = op.Where(counts, ones if weight is None else op.Gather(weight, index), zeros)
    else:
        hit = op.ReduceSum(op.Mul(weighted, _widen(target)), [dim], keepdims=0)
        loss, each = op.Add(op.Mul(hit, share), rest), ones
    loss = op.Neg(loss)
    total = op.ReduceSum(each, keepdims=0)
    if reduction != "none":
        loss = op.ReduceSum(loss, keepdims=0)
        loss = op.Div(loss, total) if reduction == "mean" else loss
    return op.CastLike(loss, input), total
