"""What the benchmark of the operators measures: cases, sizes, the bytes that must move, the order.

A ``Case`` is one operator with its options and what one would write without it; a ``Setting`` is a
case at one shape, dtype and memory format. ``settings`` lists them, the most important first, so
that a run that is cut off has measured what matters.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import mnist_ops

#: A function of the input and of the constants that ``Case.constants`` makes for it.
Function = Callable[..., Tensor]

DIRECTIONS = ("forward", "backward", "forward+backward")


def no_constants(x: Tensor) -> tuple[Tensor, ...]:
    """The constants of an operator that has none."""
    return ()


@dataclass(frozen=True, eq=False)
class Case:
    """One operator with its options.

    Attributes:
        family: the operator's name; a figure is drawn for each.
        options: what tells it from other cases of the family.
        ours: this library's function.
        eager: PyTorch's ways to compute the same, by name. The fastest one counts.
        compiled: what ``torch.compile`` is given, by name; the fastest counts.
        output: the shape of the result.
        saved: what the backward pass cannot do without besides the gradient of the output:
            ``"input"``, ``"output"`` (where either will do, the one it is), or nothing.
        constants: further arguments of all these functions, from the input.
        reference: in float64, what the results are compared with; default the first of ``eager``.
        indices: bytes of integer input for each row of the input.
    """

    family: str
    options: str
    ours: Function
    eager: dict[str, Function]
    compiled: dict[str, Function]
    output: Callable[[tuple[int, ...]], tuple[int, ...]] = tuple
    saved: str = "input"
    constants: Callable[[Tensor], tuple[Tensor, ...]] = no_constants
    reference: Function | None = None
    indices: int = 0

    @property
    def name(self) -> str:
        """Family and options."""
        return f"{self.family} {self.options}".strip()

    def bytes_moved(self, shape: tuple[int, ...], dtype: torch.dtype, direction: str) -> int:
        """The bytes any implementation must move: each input read once, each result written once.

        Forward: input, output. Backward: gradient of the output, what is ``saved``, gradient of the
        input. Class indices are read both ways. Forward and backward: the sum, for the gradient of
        the output is not there before the output is.
        """
        x, y = math.prod(shape), math.prod(self.output(shape))
        read_again = {"input": x, "output": y, "": 0}[self.saved]
        indices = self.indices * shape[0]
        forward = (x + y) * dtype.itemsize + indices
        backward = (y + read_again + x) * dtype.itemsize + indices
        return {
            "forward": forward,
            "backward": backward,
            "forward+backward": forward + backward,
        }[direction]


# ------------------------------------------------------------------------------------- LP pooling


def _pooling(p: float, size: int, stride: int) -> Case:
    window: dict[str, Any] = {"kernel_size": size, "stride": stride}

    def pooled(x: Tensor) -> Tensor:  # the sum of a window
        return F.avg_pool2d(x, **window, divisor_override=1)

    eager: dict[str, Function]
    if p == 1:
        eager = {"avg_pool2d": lambda x: pooled(x.abs())}
    elif p == 2:
        eager = {
            "avg_pool2d": lambda x: pooled(x.square()).sqrt(),
            "F.lp_pool2d": lambda x: F.lp_pool2d(x, 2.0, **window),
        }
    elif p == math.inf:  # which gives the gradient to one of several equals: marked in half types
        eager = {"max_pool2d": lambda x: F.max_pool2d(x.abs(), **window)}
    else:
        eager = {"avg_pool2d": lambda x: pooled(x.abs().pow(p)).pow(1 / p)}

    def shared_maxima(x: Tensor) -> Tensor:  # amax shares the gradient among equals, as we do
        return x.abs().unfold(2, size, stride).unfold(3, size, stride).amax((-1, -2))

    def output(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:2], *((side - size) // stride + 1 for side in shape[2:]))

    return Case(
        "lp_pool2d",
        f"p={p:g} {size}x{size}/{stride}",
        lambda x: mnist_ops.lp_pool2d(x, p, **window),
        eager,
        {name: eager[name] for name in list(eager)[:1]},
        output=output,
        reference=shared_maxima if p == math.inf else None,
    )


def _generalized_mean(x: Tensor, p: Tensor) -> Tensor:
    """GeM over whole maps, as everyone copies it; here p gets no gradient, which ours computes."""
    return F.avg_pool2d(x.clamp(min=1e-6).pow(p), x.shape[-2:]).pow(1 / p)


GEM = Case(
    "lp_pool2d",
    "GeM, p in a tensor",
    lambda x, p: mnist_ops.lp_pool2d(x.clamp(min=1e-6), p, tuple(x.shape[-2:]), average=True),
    {"avg_pool2d": _generalized_mean},
    {"avg_pool2d": _generalized_mean},
    output=lambda shape: (*shape[:2], 1, 1),
    constants=lambda x: (torch.full((), 3.0, dtype=x.dtype, device=x.device),),
)


# ---------------------------------------------------------------------------- local normalization


@functools.lru_cache(maxsize=64)
def _normalization_constants(
    size: int, height: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """The kernel as we take it, its taps summing to 1, their product, the border's correction."""
    kernel = mnist_ops.gaussian1d(size)
    taps = kernel / kernel.sum()
    ones = torch.ones(1, 1, height, width, dtype=torch.float64)
    coefficient = F.conv2d(ones, torch.outer(taps, taps)[None, None], padding=size // 2)
    rest = (taps, torch.outer(taps, taps)[None, None], coefficient)
    return (kernel.to(device), *(t.to(device, dtype) for t in rest))


def _normalization(kind: str, size: int) -> Case:
    """Cases of the three normalizations: the channel mean first, then a blur of that one plane."""
    half = size // 2
    kernel = mnist_ops.gaussian1d(size)
    weights = (kernel / kernel.sum()).tolist()

    def separable(plane: Tensor, taps: Tensor, kernel2d: Tensor) -> Tensor:
        rows = F.conv2d(plane, taps[None, None, None], padding=(0, half))
        return F.conv2d(rows, taps[None, None, :, None], padding=(half, 0))

    def whole(plane: Tensor, taps: Tensor, kernel2d: Tensor) -> Tensor:
        return F.conv2d(plane, kernel2d, padding=half)

    # No convolution, which a compiler leaves to a library: sums it can fuse with what is around.
    def shifted(plane: Tensor, taps: Tensor, kernel2d: Tensor) -> Tensor:
        height, width = plane.shape[-2:]
        wide = F.pad(plane, (half, half, 0, 0))
        rows = sum(w * wide[..., i : i + width] for i, w in enumerate(weights))
        tall = F.pad(rows, (0, 0, half, half))
        return sum(w * tall[..., i : i + height, :] for i, w in enumerate(weights))

    def squares(x: Tensor) -> Tensor:
        return x.square().mean(1, keepdim=True)

    def norms(x: Tensor) -> Tensor:  # without a tensor of squares
        return torch.linalg.vector_norm(x, dim=1, keepdim=True).square() / x.shape[1]

    def composed(blur: Function, energy: Function) -> Function:
        def subtract(x: Tensor, constants: tuple[Tensor, ...]) -> Tensor:
            taps, kernel2d, coefficient = constants
            return x - blur(x.mean(1, keepdim=True), taps, kernel2d) / coefficient

        def divide(x: Tensor, constants: tuple[Tensor, ...]) -> Tensor:
            taps, kernel2d, coefficient = constants
            deviation = blur(energy(x), taps, kernel2d).sqrt() / coefficient
            return x / deviation.clamp_min(1e-4)

        def run(x: Tensor, _: Tensor, *constants: Tensor) -> Tensor:
            if kind != "divisive":
                x = subtract(x, constants)
            return x if kind == "subtractive" else divide(x, constants)

        return run

    eager = {
        "separable": composed(separable, squares),
        "2-d kernel": composed(whole, squares),
    }
    if kind != "subtractive":
        eager["separable, vector_norm"] = composed(separable, norms)
    operator = getattr(mnist_ops, f"{kind}_norm2d")
    return Case(
        f"{kind}_norm2d",
        f"{size} taps",
        lambda x, kernel, *_: operator(x, kernel),
        eager,
        {"separable": eager["separable"], "shifted": composed(shifted, squares)},
        saved="" if kind == "subtractive" else "input",
        constants=lambda x: _normalization_constants(size, *x.shape[-2:], x.dtype, x.device),
    )


def _local_mean() -> Case:
    """A blur of each plane, zeros beyond the border, as PyTorch's users copy it."""
    size, half = 7, 3
    weights = mnist_ops.gaussian1d(size, sigma=1 / 6, normalize=True).tolist()

    def whole(x: Tensor, taps: Tensor) -> Tensor:
        kernel = torch.outer(taps, taps).expand(x.shape[1], 1, size, size)
        return F.conv2d(x, kernel, padding=half, groups=x.shape[1])

    def separable(x: Tensor, taps: Tensor) -> Tensor:
        rows, columns = (taps.expand(x.shape[1], 1, size).unsqueeze(d) for d in (2, 3))
        blurred = F.conv2d(x, rows, padding=(0, half), groups=x.shape[1])
        return F.conv2d(blurred, columns, padding=(half, 0), groups=x.shape[1])

    def shifted(x: Tensor, taps: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        wide = F.pad(x, (half, half, half, half))
        rows = sum(w * wide[..., i : i + width] for i, w in enumerate(weights))
        return sum(w * rows[..., i : i + height, :] for i, w in enumerate(weights))

    eager: dict[str, Function] = {"separable": separable, "2-d kernel": whole}
    return Case(
        "local_mean2d",
        f"{size} taps",
        lambda x, taps: mnist_ops.local_mean2d(x, taps, "each", "zeros"),
        eager,
        {"separable": separable, "shifted": shifted},
        saved="",
        constants=lambda x: (torch.tensor(weights, dtype=x.dtype, device=x.device),),
    )


# ------------------------------------------------------------------------------------------ stage


def _stage() -> Case:
    """What follows a convolution of the networks: tanh, pool 2x2 with p = 2, normalize."""
    pooling, normalization = POOLINGS[2.0, 2], NORMALIZATIONS["subtractive", 7]

    def composed(pool: Function, normalize: Function) -> Function:
        return lambda x, *constants: normalize(pool(torch.tanh(x)), *constants)

    def constants(x: Tensor) -> tuple[Tensor, ...]:
        return _normalization_constants(7, x.shape[2] // 2, x.shape[3] // 2, x.dtype, x.device)

    pool = pooling.eager["avg_pool2d"]
    return Case(
        "stage2d",
        "tanh p=2 2x2/2 7 taps",
        lambda x, kernel, *_: mnist_ops.stage2d(x, kernel, "tanh"),
        {
            "PyTorch": composed(pool, normalization.eager["separable"]),
            "three operators": composed(pooling.ours, normalization.ours),
        },
        {name: composed(pool, blurred) for name, blurred in normalization.compiled.items()},
        output=pooling.output,
        constants=constants,
    )


# ------------------------------------------------------------------------------ softmax, sigmoid


def _softmax(name: str, beta: float = 1.0, dim: int = -1) -> Case:
    ours, theirs = getattr(mnist_ops, name), getattr(torch, name)

    def eager(x: Tensor) -> Tensor:
        return theirs(x if beta == 1 else beta * x, dim)

    options = ([] if beta == 1 else [f"beta={beta:g}"]) + ([] if dim == -1 else [f"dim={dim}"])
    functions: dict[str, Function] = {f"torch.{name}": eager}
    return Case(
        name,
        " ".join(options),
        lambda x: ours(x, dim=dim, beta=beta),
        functions,
        functions,
        saved="output",
    )


_CROSS_ENTROPY: dict[str, Function] = {
    "cross_entropy": lambda x, target: F.cross_entropy(x, target)
}
_NLL = Case(
    "softmax_nll",
    "",
    lambda x, target: mnist_ops.softmax_nll(x, target),
    _CROSS_ENTROPY,
    _CROSS_ENTROPY,
    output=lambda shape: (),
    constants=lambda x: (torch.arange(len(x), device=x.device) % x.shape[1],),
    indices=8,
)

_SIGMOIDS: dict[str, Function] = {"torch.sigmoid": lambda x: torch.sigmoid(x)}
_SIGMOID = Case("sigmoid", "", lambda x: mnist_ops.sigmoid(x), _SIGMOIDS, _SIGMOIDS, saved="output")

POOLINGS = {(p, size): _pooling(p, size, 2) for size in (2, 3) for p in (2.0, 1.0, 3.0, math.inf)}
NORMALIZATIONS = {
    (kind, size): _normalization(kind, size)
    for size in (7, 15)
    for kind in ("subtractive", "contrastive", "divisive")
}
LOCAL_MEAN = _local_mean()
STAGE = _stage()
SOFTMAXES = {name: _softmax(name) for name in ("softmax", "log_softmax")} | {"softmax_nll": _NLL}
GIBBS = _softmax("softmax", beta=-2.0)
ACROSS_CHANNELS = _softmax("softmax", dim=1)

CASES = [
    *POOLINGS.values(),
    GEM,
    *NORMALIZATIONS.values(),
    LOCAL_MEAN,
    STAGE,
    *SOFTMAXES.values(),
    GIBBS,
    ACROSS_CHANNELS,
    _SIGMOID,
]


# ------------------------------------------------------------------------------------------ peers

#: Other libraries for CUDA: for each of the families that they have, module and function.
PEERS = {
    "QuACK": {
        "softmax": ("quack.softmax", "softmax"),
        "softmax_nll": ("quack.cross_entropy", "cross_entropy"),
    },
    "Liger": {
        "softmax": ("liger_kernel.transformers.functional", "liger_softmax"),
        "softmax_nll": ("liger_kernel.transformers.functional", "liger_cross_entropy"),
    },
}


def peers(case: Case) -> dict[str, Function | str]:
    """The other libraries' functions for a case, or the reason why there is none."""
    found: dict[str, Function | str] = {}
    for name, families in PEERS.items():
        if case.family not in families or case.options:
            continue
        module, attribute = families[case.family]
        try:
            function = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # not installed, or not for this torch
            found[name] = f"{module}.{attribute}: {type(error).__name__}: {error}"
            continue
        found[name] = _copying(function) if function.__name__ == "liger_cross_entropy" else function
    return found


def _copying(function: Function) -> Function:
    """A function that spoils its input where that needs a gradient: of a copy."""

    def copying(x: Tensor, *rest: Tensor) -> Tensor:
        return function(x.clone() if x.requires_grad else x, *rest)

    return copying


# --------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Setting:
    """A case at one size; ``sweep`` marks those that a figure shows against the size."""

    case: Case
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    directions: tuple[str, ...] = field(default=("forward", "backward"), compare=False)
    sweep: bool = field(default=False, compare=False)

    @property
    def elements(self) -> int:
        """Of the input."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        layout = " channels_last" if self.channels_last else ""
        size = "x".join(map(str, self.shape))
        return f"{self.case.name} {size} {str(self.dtype).removeprefix('torch.')}{layout}"


def _batch(elements: int, *each: int) -> tuple[int, ...]:
    """Rows or images of that shape, as many as make up that many elements."""
    return (max(1, elements // math.prod(each)), *each)


def _sweep_shape(case: Case, elements: int) -> tuple[int, ...]:
    """The reports' maps for the layers of the reports, 1000 classes for the softmax."""
    if case.family in ("lp_pool2d", "stage2d"):
        return _batch(elements, 64, 28, 28)
    if case.family.endswith("norm2d"):
        return _batch(elements, 64, 14, 14)
    if case.family == "sigmoid":
        return (elements,)
    return _batch(elements, 10 if case.family == "softmax_nll" else 1000)


#: One case of every family: measured first, against the size, and in every dtype.
HEADLINES = [
    POOLINGS[2.0, 2],
    NORMALIZATIONS["subtractive", 7],
    STAGE,
    NORMALIZATIONS["contrastive", 7],
    SOFTMAXES["softmax_nll"],
    SOFTMAXES["softmax"],
    _SIGMOID,
    NORMALIZATIONS["divisive", 7],
    SOFTMAXES["log_softmax"],
]

#: Elements of the input for (headlines, variants, the sweep between one image and the headline).
SIZES = {
    "cuda": (2**28, 2**24, (2**20, 2**24, 2**18, 2**22, 2**26)),
    "cpu": (2**22, 2**20, (2**20, 2**18)),
    "quick": (2**16, 2**14, ()),
}


def _variants(elements: int) -> list[tuple[Case, tuple[int, ...], bool]]:
    """Options, memory formats, channels and columns at one number of elements."""
    maps = _batch(elements, 64, 28, 28)
    found: list[tuple[Case, tuple[int, ...], bool]] = []
    first = POOLINGS[2.0, 2]
    found += [(POOLINGS[2.0, 3], maps, False), (first, maps, True)]
    found += [(STAGE, maps, True), (STAGE, _batch(elements, 64, 10, 10), False)]
    found += [
        (NORMALIZATIONS[kind, 7], _batch(elements, 64, 32, 32), last)
        for last in (False, True)
        for kind in ("contrastive", "subtractive", "divisive")
    ]
    found += [(case, maps, False) for case in POOLINGS.values() if case is not first]
    for columns in (131072, 100, 10, 32768, 4096):
        for name, case in SOFTMAXES.items():
            if columns <= elements and (name, columns) != ("softmax_nll", 10):
                found.append((case, _batch(elements, columns), False))
    for channels in (1, 512, 3, 16, 256):
        for kind in ("contrastive", "subtractive", "divisive"):
            if kind == "contrastive" or channels in (1, 512):
                found.append((NORMALIZATIONS[kind, 7], _batch(elements, channels, 32, 32), False))
    side = math.isqrt(elements // 64)
    found += [
        (NORMALIZATIONS[kind, 15], _batch(elements, 64, 32, 32), False)
        for kind in ("contrastive", "subtractive", "divisive")
    ]
    found += [
        (NORMALIZATIONS["contrastive", 7], (1, 64, side, side), False),
        (NORMALIZATIONS["contrastive", 7], _batch(elements, 512, 32, 32), True),
        (LOCAL_MEAN, _batch(elements, 32, 32, 32), False),
        (LOCAL_MEAN, (1, 1, math.isqrt(elements), math.isqrt(elements)), False),
        (GIBBS, _batch(elements, 1000), False),
        (ACROSS_CHANNELS, maps, False),
        (GEM, _batch(elements, 512, 14, 14), False),
    ]
    found += [(case, maps, True) for case in POOLINGS.values() if case is not first]
    return list(dict.fromkeys(found))


def settings(device: str, quick: bool = False) -> list[Setting]:
    """Everything to measure on a device, the most important first.

    Headlines in float32 and, on CUDA, bfloat16; the reports' own maps, one image; half of the
    sweep; the variants; the other half; on CUDA then headlines in float16 and the variants in
    bfloat16.
    """
    large, middle, sweep = SIZES["quick" if quick else device]
    half = [torch.bfloat16, torch.float16] if device == "cuda" else []
    found: list[Setting] = []

    def headlines(elements: int, dtype: torch.dtype, *directions: str) -> None:
        found.extend(
            Setting(c, _sweep_shape(c, elements), dtype, False, directions, sweep=True)
            for c in HEADLINES
        )

    both = ("forward", "backward")
    headlines(large, torch.float32, *DIRECTIONS)
    for dtype in half[:1]:
        headlines(large, dtype, *both)
    headlines(1000, torch.float32, *both)  # at least one image
    for elements in sweep[:2]:
        headlines(elements, torch.float32, *both)
    found += [Setting(c, shape, torch.float32, last) for c, shape, last in _variants(middle)]
    for elements in sweep[2:]:
        headlines(elements, torch.float32, *both)
    for dtype in half[1:]:
        headlines(large, dtype, *both)
    for dtype in half[:1]:
        found += [Setting(c, shape, dtype, last) for c, shape, last in _variants(middle)]
    return list(dict.fromkeys(found))


def peer_settings(device: str, quick: bool = False) -> list[Setting]:
    """Rows of 1,024 to 262,144 columns of what the peers have, in float32 and bfloat16."""
    large, *_ = SIZES["quick" if quick else device]
    return [
        Setting(SOFTMAXES[family], _batch(large, columns), dtype)
        for columns in (1024, 4096, 16384, 65536, 262144)
        if columns <= large
        for family in ("softmax", "softmax_nll")
        for dtype in (torch.float32, torch.bfloat16)
    ]
