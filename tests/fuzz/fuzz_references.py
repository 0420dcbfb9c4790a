"""What the operators promise: which arguments are refused, and what the others give, in float64.

The fuzzer's independent truth. The values are compositions of PyTorch's own differentiable
operators, so that first and second derivatives and forward mode come from PyTorch's autograd.
``tests/loops.py`` has the same once more as loops, too slow for thousands of calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from loops import window_count
from torch import Tensor
from torch.nn import functional as F

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
EPS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class Refused(Exception):
    """These arguments are outside of what is documented: an error must be raised."""


class Unclear(Exception):
    """Nothing is promised (or rounding decides): any result and any proper error will do."""


# ----------------------------------------------------------------------------------- the functions


def lp_pool2d(
    x: Tensor,
    p: float | Tensor,
    kernel: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    average: bool = False,
) -> Tensor:
    """Gather every window, then take norms; p of a number, or of each channel (C,)."""
    counts = [
        window_count(x.shape[d - 2], kernel[d], stride[d], padding[d], ceil_mode) for d in range(2)
    ]
    if x.numel() == 0 or 0 in counts:
        zero = 0 * x.sum() + ((0 * p).nan_to_num().sum() if isinstance(p, Tensor) else 0)
        return x.new_zeros((*x.shape[:-2], *counts)) + zero
    grids = []
    for d, count in enumerate(counts):
        size = x.shape[d - 2]
        first = torch.arange(count) * stride[d] - padding[d]
        last = (first + kernel[d]).clamp(max=size)
        first = first.clamp(min=0)
        longest = max(0, int((last - first).max()))
        index = first[:, None] + torch.arange(longest)
        grids.append((index.clamp(0, max(size - 1, 0)), index < last[:, None]))
    (rows, row_fits), (columns, column_fits) = grids
    fits = row_fits[:, None, :, None] & column_fits[None, :, None, :]
    windows = torch.where(fits, x[..., rows[:, None, :, None], columns[None, :, None, :]], 0.0)
    windows = windows.flatten(-2)
    count = fits.flatten(-2).sum(-1) if average else torch.ones(())
    a = windows.abs()
    if isinstance(p, Tensor):
        # Powers of numbers below 1 vanish before the largest p; with p = inf they have no gradient.
        p = p.clamp(max=2.0**57)[:, None, None]
    elif p == 1:
        return a.sum(-1) / count
    elif math.isinf(p):
        return a.amax(-1)
    largest = a.detach().amax(-1, keepdim=True)
    plain = (largest > 0) & largest.isfinite()
    r = windows / torch.where(plain, largest, 1.0)
    if isinstance(p, float) and p == 2:
        total = (r * r).sum(-1)
    else:
        # Where x is 0 the derivatives are 0 by convention.
        each = p[..., None] if isinstance(p, Tensor) else p
        total = (torch.where(r != 0, r.abs(), 1.0) ** each * (r != 0)).sum(-1)
    plain, largest = plain.squeeze(-1), largest.squeeze(-1)
    mean = torch.where(plain, total, 1.0) / count
    norm = mean.sqrt() if isinstance(p, float) and p == 2 else mean ** (1 / p)
    result = torch.where(plain, torch.where(plain, largest, 1.0) * norm, largest)
    return torch.where(p > 0, result, math.nan) if isinstance(p, Tensor) else result


lp_pool2d_tensor_p = lp_pool2d


def correlate(plane: Tensor, kernel: Tensor) -> Tensor:
    """(N, 1, H, W) with the kernel divided by its sum."""
    kernel = kernel.double()
    if kernel.dim() == 1:
        kernel = torch.outer(kernel, kernel)
    kernel = kernel / kernel.sum()
    return F.conv2d(plane, kernel[None, None], padding=(kernel.shape[0] // 2, kernel.shape[1] // 2))


def batched(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of images, or of one; nothing happens to none."""

    def call(x: Tensor, *args: Any) -> Tensor:
        if x.numel() == 0:
            return x.clone(memory_format=torch.contiguous_format)
        return function(x, *args) if x.dim() == 4 else function(x.unsqueeze(0), *args).squeeze(0)

    return call


def coefficients(x: Tensor, kernel: Tensor) -> Tensor:
    """What the kernel's weights inside the image sum to, (1, 1, H, W)."""
    return correlate(torch.ones((1, 1, *x.shape[-2:]), dtype=torch.float64), kernel)


@batched
def subtractive_norm2d(x: Tensor, kernel: Tensor) -> Tensor:
    return x - correlate(x.mean(1, keepdim=True), kernel) / coefficients(x, kernel)


def deviations(x: Tensor, kernel: Tensor) -> Tensor:
    energy = correlate((x * x).mean(1, keepdim=True), kernel)
    positive = energy > 0
    root = torch.where(positive, torch.where(positive, energy, 1.0).sqrt(), energy * 0)
    return root / coefficients(x, kernel)


@batched
def divisive_norm2d(x: Tensor, kernel: Tensor, threshold: float, value: float) -> Tensor:
    # Images far from 1 would leave float64's range in their squares.
    unit = x.detach().abs().amax()
    unit = unit if 0 < unit < math.inf else torch.ones((), dtype=torch.float64)
    s = deviations(x / unit, kernel)
    return (x / unit) / torch.where(s > threshold / unit, s, (value / unit).expand_as(s))


@batched
def contrastive_norm2d(x: Tensor, kernel: Tensor, threshold: float, value: float) -> Tensor:
    return divisive_norm2d(subtractive_norm2d(x, kernel), kernel, threshold, value)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x * 1,
}


def stage2d(x: Tensor, kernel: Tensor, activation: str, *windows: Any) -> Tensor:
    return subtractive_norm2d(lp_pool2d(ACTIVATIONS[activation](x), *windows), kernel)


def local_mean2d(x: Tensor, kernel: Tensor, channels: str, mode: str) -> Tensor:
    if x.numel() == 0:
        shape = x.shape if channels == "each" else (*x.shape[:-3], 1, *x.shape[-2:])
        return x.new_zeros(shape) + 0 * x.sum()
    maps = x if channels == "each" else x.mean(-3, keepdim=True)
    planes = maps.reshape(-1, 1, *x.shape[-2:])
    if mode in ("reflect", "replicate"):
        h, w = kernel.shape[0] // 2, kernel.shape[-1] // 2
        wide = correlate(F.pad(planes, (w, w, h, h), mode=mode), kernel)
        means = wide[..., h : h + x.shape[-2], w : w + x.shape[-1]]
    else:
        means = correlate(planes, kernel) / (coefficients(x, kernel) if mode[0] == "r" else 1)
    return means.reshape(maps.shape)


def softmax_nll(x: Tensor, target: Tensor, beta: float, reduction: str, *others: Any) -> Tensor:
    weight, ignored, smoothing = others
    options = {"ignore_index": ignored, "label_smoothing": smoothing}
    return F.cross_entropy(beta * x, target, weight, reduction=reduction, **options)


# --------------------------------------------------------------------------------- what is refused


def floating(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise Refused("no tensor")
    if value.layout is not torch.strided:
        raise Unclear("not strided")
    if value.dtype not in FLOATING:
        raise Refused("not floating-point")
    return value


def images(value: Any) -> Tensor:
    if floating(value).dim() not in (3, 4):
        raise Refused("no images")
    return value


def number(value: Any, raw: bool) -> float:
    if type(value) not in (int, float):
        # The dispatcher takes more for numbers than is documented, and so may we.
        raise Unclear("converted or refused") if _is_number_like(value) else Refused("no number")
    try:
        return float(value)
    except OverflowError:
        raise Refused("no float") from None


def _is_number_like(value: Any) -> bool:
    return isinstance(value, (bool, complex, Tensor)) or hasattr(value, "__float__")


def integer(value: Any) -> int:
    if isinstance(value, torch.dtype):
        raise Unclear("the dispatcher takes dtypes for their numbers")
    if type(value) is not int:
        raise Unclear("converted or refused") if _is_number_like(value) else Refused("no int")
    if not -(2**63) <= value < 2**63:
        raise Refused("no int64")
    return value


def text(value: Any, known: tuple[str, ...], raw: bool) -> None:
    if raw and isinstance(value, bytes):
        raise Unclear("the dispatcher takes bytes for a string")
    if not isinstance(value, str) or value not in known:
        raise Refused("another string")


def pair(value: Any, raw: bool) -> list[int]:
    if not isinstance(value, (list, tuple)):
        one = integer(value)
        if raw:
            raise Unclear("an int for a list")
        return [one, one]
    if len(value) == 1:
        raise Unclear("one number for two")
    if len(value) != 2:
        raise Refused("not two")
    return [integer(v) for v in value]


def windows(args: dict[str, Any], x: Tensor, raw: bool) -> tuple[Any, ...]:
    by_channel = isinstance(args["norm_type"], Tensor) and "activation" not in args
    if raw and "average" in args and not by_channel:
        raise Refused("no tensor")
    p = powers(args, x, raw) if by_channel else number(args["norm_type"], raw)
    if not by_channel and not p > 0:
        raise Refused("norm_type")
    kernel = pair(args["kernel_size"], raw)
    stride = kernel if args["stride"] is None and not raw else pair(args["stride"], raw)
    padding = args["padding"]
    if not raw and isinstance(padding, list) and all(isinstance(p, list) for p in padding):
        raise Unclear("a padding by sides, or as good as one")
    padding = pair(padding, raw)
    if type(args["ceil_mode"]) is not bool:
        raise Unclear("ceil_mode")
    if min(kernel) < 1 or min(stride) < 1 or min(padding) < 0:
        raise Refused("not positive")
    for d in range(2):
        if padding[d] > kernel[d] // 2 or x.shape[d - 2] + 2 * padding[d] < kernel[d]:
            raise Refused("does not fit")
    if max(*kernel, *stride) >= 2**31:
        raise Unclear("larger than what is documented")
    places = kernel, stride, padding, args["ceil_mode"]
    average = args.get("average", False)
    if type(average) is not bool:
        raise Unclear("average")
    if isinstance(p, Tensor):
        if (p.isfinite() & (p > 0) & ((p < 0.01) | (p > 1000))).any():
            raise Unclear("p is out of range, or as good as infinite")
        return p, *places, average
    if math.isfinite(p) and not 0.01 <= p <= 1000:
        raise Unclear("p is out of range, or as good as infinite")
    if average:
        digits = math.log2(kernel[0] * kernel[1]) / p
        largest = 0.0 if x.is_meta or too_large(x) else magnitude(x.double())
        most = 1023 if x.dtype == torch.float64 else 127
        if digits > 900 or (largest and digits + math.log2(largest) > most):
            raise Unclear("a mean far below the norm, which overflows")
    return (p, *places, True) if average else (p, *places)


def powers(args: dict[str, Any], x: Tensor, raw: bool) -> Tensor:
    """p of each channel, in float64."""
    p, wide = args["norm_type"], torch.promote_types(x.dtype, torch.float32)
    if not raw and p.is_floating_point() and p.dtype not in FLOATING:
        raise Unclear("converted")
    floating(p)
    if raw and "average" not in args:
        raise Unclear("a tensor in the place of a number")
    if p.device != x.device or p.dim() > 1 or (raw and p.dim() == 0):
        raise Refused("norm_type")
    if p.dim() and p.shape[0] != x.shape[-3] and (raw or p.shape[0] != 1):
        raise Refused("another number of channels")
    if raw and p.dtype != wide:
        raise Refused("norm_type's dtype")
    if p.is_meta:
        p = torch.ones(p.shape)
    return p.detach().to(wide).double().expand(x.shape[-3])


def norm_kernel(value: Any) -> Tensor:
    kernel = floating(value)
    if kernel.dim() not in (1, 2) or any(size % 2 == 0 for size in kernel.shape):
        raise Refused("no kernel")
    if kernel.requires_grad:
        raise Refused("a kernel that requires grad")
    return kernel


def well_conditioned(x: Tensor, kernel: Tensor) -> None:
    """Kernels of one sign: no rounding error is blown up by a sum that is nearly 0."""
    if kernel.is_meta:
        return
    values = kernel.double()
    if not values.isfinite().all():
        raise Unclear("a kernel of NaN")
    if not ((values >= 0).all() and values.sum() > 1e-3):
        raise Unclear("a kernel with a sum of 0 or parts of two signs")
    if x.numel() and not (coefficients(x, values) > 1e-3).all():
        raise Unclear("a kernel that has nothing inside the image")


def thresholds(args: dict[str, Any], x: Tensor | None, raw: bool) -> tuple[Any, Any]:
    if isinstance(args["threshold"], Tensor) and not raw and x is not None:
        return image_thresholds(args, x)
    threshold = number(args["threshold"], raw)
    value = args["threshold_value"]
    value = threshold if value is None and not raw else number(value, raw)
    if not threshold >= 0 or not value > 0:
        raise Refused("thresholds")
    if math.isinf(threshold) or math.isinf(value):
        raise Unclear("infinite") if raw else Refused("infinite")
    if value < 1e-30 or threshold > 1e30 or value > 1e30 or 0 < threshold < 1e-30:
        raise Unclear("0 or infinite in the type that is computed in")
    return threshold, value


def image_thresholds(args: dict[str, Any], x: Tensor) -> tuple[Tensor, Tensor]:
    """One for each image, (N, 1, 1, 1), which is also what is divided by."""
    t = floating(args["threshold"])
    images_there = x.shape[0] if x.dim() == 4 else 1
    if t.dim() > 1 or (t.dim() == 1 and t.shape[0] != images_there):
        raise Refused("another number of images")
    if args["threshold_value"] is not None or t.device != x.device:
        raise Refused("a value beside them, or another device")
    t = torch.ones(t.shape) if t.is_meta else t.detach()
    t = t.double().expand(images_there)[:, None, None, None]
    most = 1e200 if x.dtype == torch.float64 else 1e30
    if not ((t >= 1 / most) & (t <= most)).all():
        raise Unclear("0 or infinite in the type that is computed in")
    if x.is_meta or too_large(x) or t.numel() == 0:
        return t, t
    if magnitude(x.double()) / float(t.min()) > most:
        raise Unclear("images that are infinite in units of their threshold")
    return t, t


@dataclass
class Promise:
    """What a forward operator promises for its arguments."""

    function: Callable[[Tensor], Tensor]
    reference_args: tuple[Any, ...]  # as the functions above take them, after x


def too_large(tensor: Tensor) -> bool:
    """Whether the references would take too long, of empty images of a billion rows, too."""
    return max(tensor.numel(), *tensor.shape, 0) > 10**6


def promise(name: str, args: dict[str, Any], raw: bool) -> Promise:
    """What ``name`` promises for ``args``; raises Refused or Unclear."""
    problem: Unclear | None = None  # what is refused is looked for first

    def soft(check: Callable[[], Any]) -> Any:
        nonlocal problem
        try:
            return check()
        except Unclear as error:
            problem = problem or error
            return None

    x = soft(lambda: floating(args["input"]))
    numbers = ("ceil_mode", "beta", "dim", "norm_type", "threshold", "threshold_value")
    numbers += ("average", "ignore_index", "label_smoothing")
    tensors = [t for k, t in args.items() if isinstance(t, Tensor) and k not in numbers]
    kernel = args.get("kernel")
    own = [t for t in tensors if t is not kernel or raw or t.is_meta]
    if len({t.device.type for t in own}) > 1:
        raise Refused("on different devices")
    if x is not None and name not in ("softmax", "log_softmax", "sigmoid", "softmax_nll"):
        images(x)
    rest: tuple[Any, ...] | None = ()
    if name.startswith("lp_pool2d"):
        rest = None if x is None else soft(lambda: windows(args, x, raw))
    elif name == "stage2d":
        kernel = soft(lambda: norm_kernel(args["kernel"]))
        soft(lambda: text(args["activation"], tuple(ACTIVATIONS), raw))
        fits = None if x is None else soft(lambda: windows(args, x, raw))
        rest = None if fits is None or kernel is None else (kernel, args["activation"], *fits)
    elif name in ("subtractive_norm2d", "divisive_norm2d", "contrastive_norm2d"):
        kernel = soft(lambda: norm_kernel(args["kernel"]))
        limits = () if name[0] == "s" else soft(lambda: thresholds(args, x, raw))
        rest = None if limits is None or kernel is None else (kernel, *limits)
    elif name == "local_mean2d":
        rest = _mean_arguments(args, x, soft)
    elif name in ("softmax", "log_softmax", "softmax_nll"):
        rest = _softmax_arguments(name, args, x, raw, soft)
    if problem:
        raise problem
    assert rest is not None and x is not None
    if any(map(too_large, tensors)):
        raise Unclear("more than there is memory for")
    largest = 1e308 if x.dtype == torch.float64 else 3e38
    beta = 1.0 if x.is_meta else abs(args.get("beta", 1.0))
    if beta != 1 and beta * magnitude(x.double()) > largest:
        raise Unclear("beta times the input is infinite in the type that is computed in")
    if kernel is not None and x.is_meta:
        rest = (torch.ones(kernel.shape, dtype=torch.float64), *rest[1:])
    elif kernel is not None:
        like = x.detach().double()
        if name == "stage2d":
            if math.isinf(rest[2]) and x.dtype != torch.float64:
                a = ACTIVATIONS[rest[1]](like)
                if a.float().unique().numel() < a.unique().numel():
                    raise Unclear("activations that differ in float64 alone")
            like = lp_pool2d(like, *rest[2:])
        if like.numel() and (not like.isfinite().all() or magnitude(like) > largest * 1e-3):
            raise Unclear("the sum over the channels overflows, or is not a number")
        well_conditioned(like, kernel)
    function = {
        "sigmoid": torch.sigmoid,
        "softmax": lambda x, dim, beta: torch.softmax(beta * x, dim),
        "log_softmax": lambda x, dim, beta: torch.log_softmax(beta * x, dim),
    }.get(name) or globals()[name]
    return Promise(lambda x: function(x, *rest), rest)


def _mean_arguments(
    args: dict[str, Any], x: Tensor | None, soft: Callable[..., Any]
) -> tuple[Any, ...] | None:
    kernel = soft(lambda: norm_kernel(args["kernel"]))
    text(args["channels"], ("all", "each"), raw=False)
    text(args["padding_mode"], ("renormalized", "zeros", "reflect", "replicate"), raw=False)
    if x is None or kernel is None:
        return None
    if args["padding_mode"] == "reflect" and (
        kernel.shape[0] // 2 >= x.shape[-2] or kernel.shape[-1] // 2 >= x.shape[-1]
    ):
        raise Refused("too small to be reflected")
    return kernel, args["channels"], args["padding_mode"]


def _softmax_arguments(
    name: str, args: dict[str, Any], x: Tensor | None, raw: bool, soft: Callable[..., Any]
) -> tuple[Any, ...] | None:
    beta = soft(lambda: number(args["beta"], raw))
    if beta is not None and not math.isfinite(beta):
        if not raw:
            raise Refused("beta")
        soft(lambda: _raise(Unclear("beta")))
    if beta is not None and not (beta == 0 or 1e-30 < abs(beta) < 1e30):
        soft(lambda: _raise(Unclear("beta, in float32")))
    if name != "softmax_nll":
        dim = soft(lambda: integer(args["dim"]))
        if x is None or dim is None:
            return None
        dims = max(x.dim(), 1)
        if not -dims <= dim < dims:
            raise Refused("dim")
        return None if beta is None else (dim, beta)
    target, reduction = args["target"], args["reduction"]
    if not isinstance(target, Tensor):
        raise Refused("target")
    if target.layout is not torch.strided:
        soft(lambda: _raise(Unclear("sparse")))
        return None
    weight = args["weight"]
    ignored = soft(lambda: integer(args["ignore_index"]))
    smoothing = soft(lambda: number(args["label_smoothing"], raw))
    if smoothing is not None and not 0 <= smoothing <= 1:
        raise Refused("label_smoothing")
    soft(lambda: text(reduction, ("none", "mean", "sum"), raw))
    if target.is_complex() or target.dtype is torch.bool:
        raise Refused("target's dtype")
    weight = weight if weight is None else soft(lambda: floating(weight))
    if x is None or (weight is None and args["weight"] is not None):
        return None
    wide_dtype = torch.promote_types(x.dtype, torch.float32)
    if target.is_floating_point():
        if target.dtype not in FLOATING:
            soft(lambda: _raise(Unclear("converted")))
            return None
        if ignored is not None and ignored >= 0:
            raise Refused("ignore_index with probabilities")
        expected, dtypes = x.shape, (x.dtype,)
    else:
        expected = x.shape[:1] + x.shape[2:] if x.dim() > 1 else x.shape[1:]
        dtypes = (torch.int64,)
    if raw and (target.dtype not in dtypes or (weight is not None and weight.dtype != wide_dtype)):
        raise Refused("dtypes")
    classes = 0 if x.dim() == 0 else x.shape[min(1, x.dim() - 1)]
    if x.dim() == 0 or target.shape != expected or classes == 0:
        raise Refused("target's shape")
    if weight is not None and weight.shape != (classes,):
        raise Refused("weight's shape")
    if None in (ignored, smoothing, beta) or max(map(too_large, (x, target))):
        soft(lambda: _raise(Unclear("more than there is memory for")))
        return None
    if target.is_meta:
        target = torch.zeros(target.shape, dtype=dtypes[0])
    if weight is not None:
        weight = torch.ones(classes) if weight.is_meta else weight.detach()
        weight = weight.to(wide_dtype).double()
        if not ((weight == 0) | ((weight >= 0.01) & (weight <= 100))).all():
            soft(lambda: _raise(Unclear("weights that are negative, or overflow")))
    if target.is_floating_point():
        target = target.detach().to(x.dtype).double()
        if target.numel() and not target.abs().amax() < 100:
            soft(lambda: _raise(Unclear("probabilities that are none")))
    else:
        target = target.long()
        wrong = (target < 0) | (target >= classes)
        if (wrong & (target != ignored)).any():
            raise Refused("a target out of range")
    sizes = (x, target, beta, "sum", weight, ignored, smoothing)
    narrow = x.dtype == torch.float16 and reduction != "none" and not x.is_meta
    if narrow and 2 * abs(beta) * magnitude(x.double()) * _targets_scale(*sizes) > 6e4:
        soft(lambda: _raise(Unclear("losses that overflow where their mean does not")))
    if weight is not None and smoothing and reduction == "mean" and not target.is_floating_point():
        counted = target[target != ignored]
        if counted.numel() and not weight[counted].sum() > 0:
            soft(lambda: _raise(Unclear("losses over weights of 0: infinite, NaN in PyTorch")))
    plain = weight is None and smoothing == 0 and not target.is_floating_point()
    if not (plain or x.is_meta) and not magnitude_of_all(x.detach().double()) * abs(beta) < 1e30:
        soft(lambda: _raise(Unclear("0 times infinity")))
    return target, beta, reduction, weight, ignored, smoothing


def _raise(error: Exception) -> None:
    raise error


# -------------------------------------------------------------------------------- rounding errors


def magnitude(*tensors: Tensor) -> float:
    """The largest finite magnitude."""
    found = 0.0
    for tensor in tensors:
        if tensor.numel() == 0:
            continue
        sizes = tensor.detach().abs()
        largest = float(sizes.max())
        if not math.isfinite(largest):
            largest = float(torch.where(sizes.isfinite(), sizes, 0.0).max())
        found = max(found, largest)
    return found


def magnitude_of_all(tensor: Tensor) -> float:
    """The largest magnitude; infinite or NaN where an element is."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def scale(name: str, kind: str, x: Tensor, rest: tuple[Any, ...], g: Tensor, v: Tensor) -> Any:
    """How large the terms are whose rounding errors a result sums up, as a number or a tensor.

    ``kind`` is y (forward), gx (gradient), gg and gx2 (of the gradient with respect to g and x, in
    the direction v) or jvp (in the direction v). Raises Unclear where rounding decides.
    """
    order = {"y": 1.0, "gx": magnitude(g), "gg": magnitude(v), "jvp": magnitude(v)}
    weight = order.get(kind, magnitude(g) * magnitude(v))
    size = magnitude(x)
    if name == "sigmoid":
        return weight * (1 + size if kind == "y" else 1)
    if name in ("softmax", "log_softmax", "softmax_nll"):
        beta = abs(rest[1])
        # beta * x is rounded before the largest is subtracted, unless beta is a power of two.
        offset = 0.0 if math.frexp(beta)[0] == 0.5 else beta * size
        spread = beta * size if name != "softmax" else 0.0
        length = max(1, x.numel()) ** 0.5
        if name == "softmax_nll":
            length *= _targets_scale(x, *rest)
        power = {"y": 0, "gx": 1, "gg": 1, "jvp": 1}.get(kind, 2)
        return weight * (1 + offset + spread) * (beta**power) * length
    if name in ("lp_pool2d", "lp_pool2d_tensor_p", "stage2d"):
        return _window_scale(name, kind, x, rest, weight)
    kernel = rest[0]
    corner = 1 / float(coefficients(x, kernel).min()) if x.numel() else 1.0
    if name in ("subtractive_norm2d", "local_mean2d"):
        return corner * (size if kind == "y" else weight)
    return _divisive_scale(name, kind, x, rest, weight, corner)


def _window_scale(name: str, kind: str, x: Tensor, rest: tuple[Any, ...], weight: float) -> float:
    activation = rest[:2] if name == "stage2d" else ()
    p, kernel, stride, *_ = places = rest[len(activation) :]
    area = min(kernel[0], x.shape[-2]) * min(kernel[1], x.shape[-1])
    overlap = math.prod(-(-kernel[d] // stride[d]) for d in range(2) if stride[d] < kernel[d])
    overlap = min(overlap, 100)
    a = ACTIVATIONS[rest[1]](x) if name == "stage2d" else x
    if name == "stage2d" and x.numel():
        pooled = lp_pool2d(a, *places)
        corner = 1 / float(coefficients(pooled, rest[0]).min()) if pooled.numel() else 1.0
        weight *= corner**2
    if isinstance(p, Tensor):
        if kind in ("gg", "gx2") and p.isinf().any():
            raise Unclear("a second derivative of the largest p there is")
        p = p[(p > 0) & p.isfinite()]
        exponent = max(1.0, magnitude(p), magnitude(1 / p))
    else:
        exponent = 1.0 if math.isinf(p) else max(1.0, p, 1 / p)
    if kind == "y":
        # pow(sum, 1/p) has an error of its own for small p.
        return exponent * (magnitude(lp_pool2d(a, *places)) if name == "stage2d" else 0.0)
    if kind in ("gx", "gg", "jvp"):
        return weight * exponent * (overlap if kind == "gx" else area)
    norms = lp_pool2d(a, *places).detach()
    if kind == "gp":  # x ln x is at most 1 / e, the logarithm of all pixels below 10
        return magnitude(norms) * weight * exponent**2 * 10 * max(1, norms.numel())
    norms = norms[norms > 0]
    smallest = float(norms.min()) if norms.numel() else 1.0
    return weight * exponent**2 * overlap * area / min(smallest, 1e30)


def _targets_scale(x: Tensor, target: Tensor, _: float, reduction: str, *others: Any) -> float:
    """How large a loss may be, in units of one without weights."""
    weight, ignored, _ = others
    most = 1.0 if weight is None else max(1.0, magnitude(weight))
    if target.is_floating_point():
        return most * max(1.0, magnitude(target) * x.shape[min(1, x.dim() - 1)])
    if reduction == "mean" and target.numel():
        counted = target[target != ignored]
        total = counted.numel() if weight is None else float(weight[counted].sum())
        return most * target.numel() / total if total else most
    return most


def _divisive_scale(
    name: str, kind: str, x: Tensor, rest: tuple[Any, ...], weight: float, corner: float
) -> Any:
    kernel, threshold, value = rest
    if x.numel() == 0:
        return 0.0
    four = x if x.dim() == 4 else x.unsqueeze(0)
    z = subtractive_norm2d(four, kernel) if name[0] == "c" else four
    unit = max(magnitude(x), 1e-300)
    s = deviations(z / unit, kernel)
    near = threshold / unit
    noise = 2e-3 * near + (3e-5 * corner if name[0] == "c" else 0.0)
    if ((s - near).abs() <= noise)[s > 0].any() or (name[0] == "c" and (s <= noise).any()):
        raise Unclear("a deviation as good as the threshold")
    divisors = torch.where(s > near, s, torch.as_tensor(value / unit).double())
    if kind == "y":
        wide = (corner if name[0] == "c" else 0.0) / divisors
        return wide if x.dim() == 4 else wide.squeeze(0)
    smallest = float(divisors.min()) * unit
    ratio = unit / smallest
    if ratio > 100 and kind not in ("gx", "jvp"):
        raise Unclear("a second derivative of a small deviation")
    channels = four.shape[1]
    base = corner**2 * (1 + ratio**2) * (1 + ratio if name[0] == "c" else 1)
    if kind in ("gx", "gg", "jvp"):
        return weight / smallest * base * channels
    return weight / smallest**2 * base**2 * channels
