"""Layers in a file of Torch7 as modules: what :func:`load_net` builds.

Every function here says what torch/nn's own code makes of a layer's fields, those that older
versions wrote or left out included.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from .. import nn as ops_nn
from . import losses
from ._layers import _Power, _Scale, _Sqrt, _View, _WholeSample
from .files import BadFileError, Reader, Torch7Object, guarded, parse, read

__all__ = ["build"]

# Layers that share their weights share the file's bytes, but become modules of their own.
_MAX_SHARING = 16
_MAX_SHARED_BYTES = 2**26
# Pixels of padding in all of a network's layers: a number in a file could ask for any memory.
_MAX_PADDING = 1024
_MAX_SIZES = 64


class _Layer:
    """A layer of the file with checked access to its fields."""

    def __init__(self, source: Any, path: str, network: _Network) -> None:
        #: ``"3.1"``: the first layer of the third.
        self.path = path
        self.where = f"layer {path}" if path else "its object"
        if not isinstance(source, Torch7Object):
            raise BadFileError(f"{self.where} is no layer but {_short(source)}")
        self.source = source
        self.network = network
        self.is_cudnn = source.class_name.startswith("cudnn.")

    def bad(self, what: str) -> BadFileError:
        return BadFileError(f"{self.where} ({self.source.class_name}): {what}")

    def has(self, field: str) -> bool:
        return self.source.fields.get(field) is not None

    def number(self, field: str, default: float | None = None) -> float:
        value = self.source.fields.get(field, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.bad(f"{field} must be a number, got {_short(value)}")
        return value

    def whole(self, field: str, least: int, default: int | None = None) -> int:
        value = self.number(field, default)
        if not isinstance(value, int) or not least <= value < 2**31:
            raise self.bad(f"{field} must be a whole number >= {least}, got {value}")
        return value

    def pair(self, field: str, least: int, default: int | None = None) -> tuple[int, int]:
        """Height, then width, as torch has them: kW and kH for ``"k?"``."""
        height, width = (
            self.whole(field.replace("?", side), least, default) for side in ("H", "W")
        )
        return height, width

    def padding(self, *pixels: int) -> None:
        """Count what the layer adds to each side of an image."""
        self.network.padding += sum(max(each, 0) for each in pixels)
        if self.network.padding > _MAX_PADDING:
            raise self.bad(f"the layers pad images by more than {_MAX_PADDING} pixels")

    def flag(self, field: str, default: bool) -> bool:
        value = self.source.fields.get(field, default)
        if not isinstance(value, bool):
            raise self.bad(f"{field} must be true or false, got {_short(value)}")
        return value

    def tensor(self, field: str, length: int | None = None) -> Tensor:
        value = self.source.fields.get(field)
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
            raise self.bad(f"{field} must be a floating point tensor, got {_short(value)}")
        if length is not None and value.shape != (length,):
            raise self.bad(f"{field} must have shape ({length},), got {tuple(value.shape)}")
        # An expanded tensor of a few bytes could ask for any amount of memory here, and a thousand
        # layers could each copy the same large one.
        self.network.budget -= value.numel() * value.element_size()
        if self.network.budget < 0:
            raise self.bad("the layers' tensors are many times larger than the file")
        return value

    def sizes(self) -> list[int]:
        value = self.source.fields.get("size")
        if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.dim() != 1:
            raise self.bad(f"size must be a torch.LongStorage, got {_short(value)}")
        sizes = value[: _MAX_SIZES + 1].tolist()
        known = [size for size in sizes if size != -1]
        if not 1 <= len(sizes) <= _MAX_SIZES or len(sizes) - len(known) > 1:
            raise self.bad(f"cannot make the size {sizes[:8]}")
        if any(size < 1 for size in known) or math.prod(known) >= 2**60:
            raise self.bad(f"cannot make the size {sizes[:8]}")
        return sizes

    def modules(self) -> list[_Layer]:
        children = self.source.fields.get("modules")
        if children == {}:
            return []
        if not isinstance(children, list):
            raise self.bad(f"modules must be a list of layers, got {_short(children)}")
        prefix = f"{self.path}." if self.path else ""
        return [_Layer(child, f"{prefix}{i}", self.network) for i, child in enumerate(children, 1)]


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    if isinstance(value, (dict, list)):
        return "a table"
    return "nothing" if value is None else repr(value)[:60]


class _Network:
    """Turns layers of the file into modules.

    Args:
        budget: bytes that its tensors may have.
        approximate: whether softmax and log-softmax take the approximate exponential.
    """

    def __init__(self, budget: int, approximate: bool) -> None:
        self.budget = budget
        self.approximate = approximate
        self.padding = 0
        self.seen: set[int] = set()

    def build(self, layer: _Layer) -> nn.Module:
        make = _LAYERS.get(layer.source.class_name)
        if make is None:
            raise BadFileError(
                f"{layer.where} is of the class {layer.source.class_name}, "
                f"which is not supported; supported are {', '.join(sorted(_LAYERS))}"
            )
        # Also what ends a network that contains itself.
        if id(layer.source) in self.seen:
            raise layer.bad("it occurs twice in the network")
        self.seen.add(id(layer.source))
        try:
            return make(layer)
        except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
            raise layer.bad(str(error).splitlines()[0]) from None


def _flattens(layer: _Layer, after: _Layer | None) -> bool:
    """Whether a view makes the matrix that the linear layer after it needs.

    There is one such matrix, whichever class made it: the plain module is known everywhere.
    """
    if layer.source.class_name not in ("nn.View", "nn.Reshape") or after is None:
        return False
    weight = after.source.fields.get("weight")
    if after.source.class_name != "nn.Linear" or not isinstance(weight, Tensor):
        return False
    return layer.sizes() in ([-1], list(weight.shape[1:]))


def _sequential(layer: _Layer) -> nn.Module:
    children = layer.modules()
    modules = []
    for child, after in zip(children, [*children, None][1:], strict=True):
        module = layer.network.build(child)
        modules.append(nn.Flatten() if _flattens(child, after) else module)
    return nn.Sequential(*modules)


def _set(
    module: nn.Conv2d | nn.Linear | nn.BatchNorm1d | nn.BatchNorm2d, **values: Tensor | None
) -> nn.Module:
    """Copy into parameters and buffers."""
    with torch.no_grad():
        for name, value in values.items():
            if value is not None:
                own = getattr(module, name)
                own.copy_(value.reshape(own.shape))
    return module


def _bias(layer: _Layer, outputs: int) -> Tensor | None:
    return layer.tensor("bias", outputs) if layer.has("bias") else None


def _convolution(layer: _Layer) -> nn.Module:
    kernel, stride = layer.pair("k?", 1), layer.pair("d?", 1, 1)
    if layer.has("padding") and not layer.is_cudnn:
        # The field's name before June 2015: where it is there, torch/nn does not look at others.
        padding = (layer.whole("padding", 0),) * 2
    else:
        padding = layer.pair("pad?", 0, 0)
    layer.padding(max(padding))
    inputs, outputs = layer.whole("nInputPlane", 1), layer.whole("nOutputPlane", 1)
    groups = layer.whole("groups", 1, 1) if layer.is_cudnn else 1
    if inputs % groups or outputs % groups:
        raise layer.bad(f"{groups} groups do not divide {inputs} and {outputs} planes")
    weight, bias = layer.tensor("weight"), _bias(layer, outputs)
    inner = inputs // groups
    flat, full = (outputs, inner * math.prod(kernel)), (outputs, inner, *kernel)
    if weight.shape not in (flat, full):
        raise layer.bad(f"weight must have shape {flat} or {full}, got {tuple(weight.shape)}")
    module = skip_init(
        nn.Conv2d,
        inputs,
        outputs,
        kernel,
        stride=stride,
        padding=padding,
        groups=groups,
        bias=bias is not None,
        dtype=weight.dtype,
    )
    return _set(module, weight=weight, bias=bias)


def _linear(layer: _Layer) -> nn.Module:
    weight = layer.tensor("weight")
    if weight.dim() != 2:
        raise layer.bad(f"weight must have two dimensions, got shape {tuple(weight.shape)}")
    outputs, inputs = weight.shape
    bias = _bias(layer, outputs)
    module = skip_init(nn.Linear, inputs, outputs, bias=bias is not None, dtype=weight.dtype)
    return _set(module, weight=weight, bias=bias)


def _batch_normalization(layer: _Layer, kind: type[nn.BatchNorm1d | nn.BatchNorm2d]) -> nn.Module:
    mean = layer.tensor("running_mean")
    features, eps = mean.numel(), layer.number("eps", 1e-5)
    if mean.dim() != 1:
        raise layer.bad(f"running_mean must have one dimension, got shape {tuple(mean.shape)}")
    if layer.source.version < 2 and layer.has("running_std"):
        # Until 2016 the inverse of the deviation was kept, by this name.
        variance = layer.tensor("running_std", features).pow(-2) - eps
    else:
        variance = layer.tensor("running_var", features)
    affine = layer.has("weight")
    weight = layer.tensor("weight", features) if affine else None
    module = kind(
        features, eps, layer.number("momentum", 0.1), affine=affine, device="cpu", dtype=mean.dtype
    )
    bias = _bias(layer, features)
    if affine and bias is None:
        bias = torch.zeros(features, dtype=mean.dtype, device="cpu")
    return _set(module, weight=weight, bias=bias, running_mean=mean, running_var=variance)


def _windows(layer: _Layer) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], bool]:
    kernel = layer.pair("k?", 1)
    padding = layer.pair("pad?", 0, 0)
    if any(2 * pad > size for pad, size in zip(padding, kernel, strict=True)):
        raise layer.bad(f"the padding {padding} is more than half of the window {kernel}")
    ceil_mode = layer.flag("ceil_mode", False)
    if layer.is_cudnn and ceil_mode and padding != (0, 0):
        # torch/nn leaves out a last window that begins in the padding, cudnn.torch does not.
        raise layer.bad("ceil_mode with padding is not supported")
    return kernel, layer.pair("d?", 1), padding, ceil_mode


def _max_pooling(layer: _Layer) -> nn.Module:
    kernel, stride, padding, ceil_mode = _windows(layer)
    return nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil_mode)


def _average_pooling(layer: _Layer) -> nn.Module:
    kernel, stride, padding, ceil_mode = _windows(layer)
    if not layer.has("ceil_mode"):
        padding = (0, 0)  # torch/nn takes it for a file of before September 2015
    if layer.is_cudnn:
        if ceil_mode:
            raise layer.bad("ceil_mode is not supported: what cuDNN divides by is not documented")
        if not layer.flag("divide", True):
            raise layer.bad("divide must be true")
        return nn.AvgPool2d(kernel, stride, padding)
    counts = layer.flag("count_include_pad", not layer.has("ceil_mode"))
    if layer.flag("divide", False):
        return nn.AvgPool2d(kernel, stride, padding, ceil_mode, counts)
    # Files of before March 2015 have no such field: sums. Where windows are cut, torch/nn's sum is
    # the mean of what is left, times the size of a whole window.
    if padding == (0, 0) and not ceil_mode:
        return nn.AvgPool2d(kernel, stride, divisor_override=1)
    mean = nn.AvgPool2d(kernel, stride, padding, ceil_mode, counts)
    return nn.Sequential(mean, _Scale(math.prod(kernel)))


def _lp_pooling(layer: _Layer) -> nn.Module:
    """Torch7 makes it of a power, the windows' sums (means times a constant) and a root."""
    parts = layer.modules()
    names = [part.source.class_name.removeprefix("nn.") for part in parts]
    if names[1:2] == ["SpatialAveragePooling"] and len(names) == 3 + ("MulConstant" in names[2:3]):
        pool = parts[1]
        kernel, stride, padding, ceil_mode = _windows(pool)
        factor = 1.0 if pool.flag("divide", False) else math.prod(kernel)
        if len(parts) == 4:
            factor *= parts[2].number("constant_scalar")
        norm_type = 0.0
        if names[0] == "Square" and names[-1] == "Sqrt" and not parts[-1].number("eps", 0):
            norm_type = 2.0
        elif names[0] == names[-1] == "Power":
            norm_type = float(parts[0].number("pow"))
            if not math.isclose(norm_type * parts[-1].number("pow"), 1.0):
                norm_type = 0.0
        # Torch7's powers of negative numbers are signed or not real where they are not even.
        even = norm_type > 0 and norm_type % 2 == 0
        if even and factor == math.prod(kernel) and padding == (0, 0) and not ceil_mode:
            return ops_nn.LPPool2d(norm_type, kernel, stride)
    if not parts:
        raise layer.bad("it is made of nothing")
    return nn.Sequential(*(layer.network.build(part) for part in parts))


def _zero_padding(layer: _Layer) -> nn.Module:
    left, right, top, bottom = (layer.number(f"pad_{side}") for side in "lrtb")
    sides = left, right, top, bottom
    if not all(isinstance(side, int) and abs(side) < 2**31 for side in sides):
        raise layer.bad(f"pad_l, pad_r, pad_t and pad_b must be whole numbers, got {sides}")
    layer.padding(*map(int, sides))
    return nn.ZeroPad2d((int(left), int(right), int(top), int(bottom)))


def _threshold(layer: _Layer) -> nn.Module:
    default = 0.0 if layer.source.class_name == "nn.ReLU" else 1e-6
    threshold, value = layer.number("threshold", default), layer.number("val", 0)
    return nn.ReLU() if threshold == 0 and value == 0 else nn.Threshold(threshold, value)


def _hard_tanh(layer: _Layer) -> nn.Module:
    low, high = layer.number("min_val", -1), layer.number("max_val", 1)
    if not low < high:
        raise layer.bad(f"min_val must be less than max_val, got {low} and {high}")
    return nn.Hardtanh(low, high)


def _clipped_relu(layer: _Layer) -> nn.Module:
    ceiling = layer.number("ceiling")
    if not ceiling > 0:
        raise layer.bad(f"ceiling must be > 0, got {ceiling}")
    return nn.Hardtanh(0, ceiling)


def _dropout(layer: _Layer) -> nn.Module:
    p = layer.number("p")
    if not 0 <= p < 1:
        raise layer.bad(f"p must be in [0, 1), got {p}")
    if layer.flag("stochastic_inference", False) and p > 0:
        raise layer.bad("stochastic_inference is not supported")
    if not layer.flag("v2", False) and p > 0:
        raise layer.bad("its first version, which scales when it predicts, is not supported")
    return nn.Dropout(p)


def _reshape(layer: _Layer) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Unflatten(1, layer.sizes()))


def _view(layer: _Layer) -> nn.Module:
    sizes = layer.sizes()
    if not layer.has("numInputDims"):
        return nn.Flatten() if sizes == [-1] else _View(sizes, None)
    return _View(sizes, layer.whole("numInputDims", 1))


def _softmax(layer: _Layer, log: bool) -> nn.Module:
    """Over a batch's second dimension, also of maps."""
    if not layer.network.approximate:
        return ops_nn.LogSoftmax(dim=1) if log else ops_nn.Softmax(dim=1)
    return losses.LogSoftmax() if log else losses.Softmax()


def _cudnn_softmax(layer: _Layer, log: bool, spatial: bool) -> nn.Module:
    fields = layer.source.fields
    log = log or fields.get("algorithm") == "CUDNN_SOFTMAX_LOG"
    module = ops_nn.LogSoftmax(dim=1) if log else ops_nn.Softmax(dim=1)
    if spatial and fields.get("mode") != "CUDNN_SOFTMAX_MODE_INSTANCE":
        return module
    return _WholeSample(module)


def _kernel_norm(layer: _Layer, kind: type[ops_nn.DivisiveNorm2d]) -> nn.Module:
    threshold = layer.number("threshold", 1e-4)
    return kind(layer.tensor("kernel"), threshold, layer.number("thresval", threshold))


_LAYERS: dict[str, Callable[[_Layer], nn.Module]] = {
    "nn.BatchNormalization": partial(_batch_normalization, kind=nn.BatchNorm1d),
    "nn.Dropout": _dropout,
    "nn.HardTanh": _hard_tanh,
    "nn.Identity": lambda layer: nn.Identity(),
    "nn.Linear": _linear,
    "nn.LogSoftMax": partial(_softmax, log=True),
    "nn.MulConstant": lambda layer: _Scale(layer.number("constant_scalar")),
    "nn.Power": lambda layer: _Power(layer.number("pow")),
    "nn.ReLU": _threshold,
    "nn.Reshape": _reshape,
    "nn.Sequential": _sequential,
    "nn.Sigmoid": lambda layer: ops_nn.Sigmoid(),
    "nn.SoftMax": partial(_softmax, log=False),
    "nn.SpatialAveragePooling": _average_pooling,
    "nn.SpatialBatchNormalization": partial(_batch_normalization, kind=nn.BatchNorm2d),
    "nn.SpatialContrastiveNormalization": partial(_kernel_norm, kind=ops_nn.ContrastiveNorm2d),
    "nn.SpatialConvolution": _convolution,
    "nn.SpatialConvolutionMM": _convolution,
    "nn.SpatialDivisiveNormalization": partial(_kernel_norm, kind=ops_nn.DivisiveNorm2d),
    "nn.SpatialLPPooling": _lp_pooling,
    "nn.SpatialLogSoftMax": partial(_softmax, log=True),
    "nn.SpatialMaxPooling": _max_pooling,
    "nn.SpatialSoftMax": partial(_softmax, log=False),
    "nn.SpatialSubtractiveNormalization": lambda layer: ops_nn.SubtractiveNorm2d(
        layer.tensor("kernel")
    ),
    "nn.SpatialZeroPadding": _zero_padding,
    "nn.Sqrt": lambda layer: _Sqrt(layer.number("eps", 0)),
    "nn.Square": lambda layer: _Power(2),
    "nn.Tanh": lambda layer: nn.Tanh(),
    "nn.Threshold": _threshold,
    "nn.View": _view,
    "cudnn.ClippedReLU": _clipped_relu,
    "cudnn.LogSoftMax": partial(_cudnn_softmax, log=True, spatial=False),
    "cudnn.ReLU": lambda layer: nn.ReLU(),
    "cudnn.SoftMax": partial(_cudnn_softmax, log=False, spatial=False),
    "cudnn.SpatialLogSoftMax": partial(_cudnn_softmax, log=True, spatial=True),
    "cudnn.SpatialSoftMax": partial(_cudnn_softmax, log=False, spatial=True),
}
# The same fields in both packages.
_LAYERS |= {
    f"cudnn.{name}": _LAYERS[f"nn.{name}"]
    for name in (
        "BatchNormalization",
        "Sigmoid",
        "SpatialAveragePooling",
        "SpatialBatchNormalization",
        "SpatialConvolution",
        "SpatialMaxPooling",
        "Tanh",
    )
}


def _is_approximate(reader: Reader) -> bool:
    """Whether torch/nn wrote the file when its softmax was approximate, as far as can be told."""
    if any(name.startswith(("torch.Cuda", "cudnn.")) for name in reader.classes):
        return False
    for found in reader.objects:
        fields = found.fields
        if "stochastic_inference" in fields:  # since September 2016
            return False
        if found.class_name == "nn.HardTanh" and "inplace" in fields:  # since June 2016
            return False
    for found in reader.objects:
        output = found.fields.get("output")
        if found.class_name != "nn.LogSoftMax" or not isinstance(output, Tensor):
            continue
        if (known := _agrees_with_approximation(output)) is not None:
            return known
    return True


def _agrees_with_approximation(output: Tensor) -> bool | None:
    """Which of the two log-softmaxes made ``output``; None where it does not tell.

    The input is known but for a constant, so that both can be computed again.
    """
    if not output.is_floating_point() or output.dim() not in (1, 2) or output.numel() > 10**6:
        return None
    if output.numel() == 0 or not output.isfinite().all():
        return None
    exact = torch.log_softmax(output.double(), -1)
    approximate = losses.log_softmax(output.double())
    difference = float((exact - approximate).abs().max())
    errors = [float((output - each).abs().max()) for each in (exact, approximate)]
    if min(errors) >= 0.1 * difference:
        return None
    return errors[1] < errors[0]


def build(root: Any, reader: Reader, size: int, log_softmax: str) -> nn.Sequential:
    """The module for the layer ``root`` that ``reader`` found in a file of ``size`` bytes."""
    approximate = log_softmax == "approximate" or (
        log_softmax == "auto" and _is_approximate(reader)
    )
    budget = min(_MAX_SHARING * size, size + _MAX_SHARED_BYTES)
    network = _Network(budget, approximate)
    module = network.build(_Layer(root, "", network))
    dtypes = {parameter.dtype for parameter in (*module.parameters(), *_statistics(module))}
    if dtypes == {torch.float16, torch.float32}:  # as cudnn keeps batch normalization
        module = module.float()
    elif len(dtypes) > 1:
        raise BadFileError(f"its layers have several dtypes: {', '.join(sorted(map(str, dtypes)))}")
    if not isinstance(module, nn.Sequential):
        module = nn.Sequential(module)
    return module.eval()


def _statistics(module: nn.Module) -> list[Tensor]:
    """The running means of batch normalization, which may have no parameters."""
    return [
        each.running_mean
        for each in module.modules()
        if isinstance(each, (nn.BatchNorm1d, nn.BatchNorm2d)) and each.running_mean is not None
    ]


def load_net(
    file: str | os.PathLike[str] | BinaryIO, max_bytes: int | None = None, log_softmax: str = "auto"
) -> nn.Sequential:
    """The network in a file of Torch7, as a module in evaluation mode, for batches.

    Supported are ``nn.Sequential``, nested or not, ``SpatialConvolution`` and
    ``SpatialConvolutionMM``, ``Linear``, ``Tanh``, ``HardTanh``, ``ReLU``, ``Threshold``,
    ``Sigmoid``, ``Square``, ``Sqrt``, ``Power``, ``MulConstant``, ``SpatialLPPooling``,
    ``SpatialMaxPooling``, ``SpatialAveragePooling``, ``SpatialZeroPadding``,
    ``SpatialSubtractiveNormalization``, ``SpatialDivisiveNormalization``,
    ``SpatialContrastiveNormalization``, ``BatchNormalization`` and ``SpatialBatchNormalization``,
    ``Reshape`` and ``View``, ``Dropout`` (its second version), ``LogSoftMax``, ``SoftMax``,
    ``SpatialLogSoftMax``, ``SpatialSoftMax`` and ``Identity``, and their counterparts in ``cudnn``.
    Every layer computes what torch/nn's code makes of the fields in the file, those of older
    versions included. The parameters keep their dtype: float64 for a ``torch.DoubleTensor``,
    float32 for a ``torch.FloatTensor`` or ``torch.CudaTensor``; a network of half and single
    precision becomes float32. Gradients and outputs that the file may hold are left out.

    Until 27 April 2016 torch/nn computed ``LogSoftMax``, until 2 May 2016 ``SoftMax``, with an
    approximate exponential on the CPU (:func:`mnist_ops.torch7.log_softmax`; log-probabilities
    differ by up to 2e-4); on CUDA never. A file does not record its date. ``"auto"`` takes

    - the exact functions where the file holds tensors of CUDA, layers of ``cudnn``, or fields that
      torch/nn had only later (``Dropout``'s ``stochastic_inference``, ``HardTanh``'s ``inplace``);
    - whichever agrees with the output of a ``LogSoftMax`` that the file holds, if one does and the
      two differ there;
    - else the approximate ones, as this package is about networks of February 2016.

    Args:
        file: as for :func:`mnist_ops.torch7.files.load`.
        max_bytes: as for :func:`mnist_ops.torch7.files.load`.
        log_softmax: ``"auto"``, or ``"approximate"`` or ``"exact"`` for what is known otherwise.

    Raises:
        Torch7FileError: as for :func:`mnist_ops.torch7.files.load`; if the object is no network; if
            a layer is of another class or its fields do not fit together. The message names the
            file and the layer, counted from 1 as in Torch7.
        ValueError: for another ``log_softmax``.

    Source: torch/nn's Lua code from 2012 to 2017, and cudnn.torch's.

    Example::

        >>> model = load_net("model.net")
        >>> training.evaluate(model, digits.test_images, digits.test_labels)
    """
    if log_softmax not in ("auto", "approximate", "exact"):
        raise ValueError(
            f"load_net: log_softmax must be 'auto', 'approximate' or 'exact', got {log_softmax!r}"
        )
    name, content = read(file, max_bytes)
    root, reader = guarded(name, lambda: parse(content))
    size = len(content)
    content = reader.content = b""  # its numbers have been copied
    return guarded(f"{name}:", lambda: build(root, reader, size, log_softmax))
