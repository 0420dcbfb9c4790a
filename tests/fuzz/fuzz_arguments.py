"""Random arguments for the operators: tensors of every layout, valid options, and absurd ones."""

from __future__ import annotations

import math
import random
from typing import Any

import fuzz_references as references
import numpy as np
import torch
from fuzz_references import FLOATING
from torch import Tensor

from mnist_ops import _torch_private

Args = dict[str, Any]
ALIKE = ("sigmoid", "softmax", "log_softmax")  # of any shape, and each has a layout of its own
IMAGES = ("lp_pool2d", "subtractive_norm2d", "divisive_norm2d", "contrastive_norm2d", "stage2d")
FORWARD = (*IMAGES, *ALIKE, "softmax_nll")
PUBLIC = (*FORWARD, "local_mean2d")
OPERATORS = (*FORWARD, "lp_pool2d_tensor_p")
RAW = (*OPERATORS, *(f"{name}_backward" for name in OPERATORS), "lp_pool2d_double_backward")
POWERS = (1, 1.0, 2, 2.0, 2.0, 3.0, 4, 2.5, 1.5, 0.5, 7, math.inf)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
REFUSED_DTYPES = (
    *INTEGERS,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
NUMBERS = (
    0, 1, -1, 2, 3, 7, 0.0, -0.0, 0.5, 1e-3, math.nan, math.inf, -math.inf, 1e39, -1e39, 1e-39,
    1e-46, 1e308, 5e-324, 2**31, 2**62, 2**63, -(2**63) - 1, 10**400, True, None, "1", "", b"1",
    [1], [], (1.0,), 1j, {}, torch.float32, torch.tensor(2.0), np.float32(1.5), np.int64(1),
)  # fmt: skip
PAIRS = (
    0, 1, -1, 2, 3, 2**31 - 1, 2**31, 2**62, 2**63 - 1, 2**63, -(2**63), 10**30, [], [1], [2, 2, 2],
    [0, 2], [2, 0], [-1, 1], [2**62, 2], [2, 2**62], [2**31 - 1, 2**31 - 1], [2**30, 2], (2, 2.5),
    None, "22", "2", True, [None, 1], ["1", "1"], [[1], [1]], 2.0, math.nan, torch.Size([2, 2]),
    np.int64(2), np.array([2, 2]), torch.tensor([1, 1]), {}, [math.inf, 1], [10**30, 1], (1, True),
)  # fmt: skip
BOOLS = (True, False, None, 0, 1, 2, "", "x", [], 2**70, math.nan, torch.tensor(True))
TEXTS = ("tanh", "relu", "mean", "none", "", "TANH", "tanh ", None, 3, b"tanh", "\0", "tanh\0")
TEXTS += ("all", "zeros")
TEXTS += ("ü" * 300, ["mean"], True, math.nan, "\ud800")  # type: ignore[assignment]


def describe(value: Any) -> str:
    """An argument as it is printed for a finding."""
    if not isinstance(value, Tensor):
        text = repr(value)
        return text if len(text) < 400 else f"{text[:400]}... ({len(text)} characters)"
    where = "" if value.device.type == "cpu" else f", {value.device.type}"
    grad = ", requires_grad" if value.requires_grad else ""
    dtype = str(value.dtype).removeprefix("torch.")
    if value.layout is not torch.strided:
        return f"{dtype}{tuple(value.shape)}[{value.layout}]"
    strides = "" if value.is_contiguous() else f", strides {value.stride()}"
    offset = f", offset {value.storage_offset()}" if value.storage_offset() else ""
    shown = ""
    if value.numel() <= 4 and not value.is_meta and not value.is_neg():
        shown = f", values {value.detach().flatten().tolist()}"
    return f"{dtype}{tuple(value.shape)}{strides}{offset}{where}{grad}{shown}"


class Draw:
    """What a seed and the number of a call decide."""

    def __init__(self, seed: int, number: int) -> None:
        self.random = random.Random(f"{seed}/{number}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))
        self.memory: list[tuple[Tensor, Tensor]] = []  # what tensors lie in, and as it was

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def dtype(self) -> torch.dtype:
        return self.random.choices(FLOATING, (4, 5, 2, 2))[0]

    def shape(self, dims: int, largest: int = 6) -> tuple[int, ...]:
        """Mostly small sizes, sometimes a long last dimension, sometimes 0."""
        sizes = [self.random.choice((1, 2, 2, 3, 3, 4, largest)) for _ in range(dims)]
        if dims and self.chance(0.2):
            sizes[self.random.randrange(dims)] = self.random.choice((5, 8, 9, 17, 33))
        if dims and self.chance(0.08):
            sizes[self.random.randrange(dims)] = 0
        while math.prod(sizes) > 3000:
            sizes[sizes.index(max(sizes))] //= 2
        return tuple(sizes)

    def image_shape(self) -> tuple[int, ...]:
        n, c = self.random.choice((1, 2, 3)), self.random.choice((1, 1, 2, 3, 4, 8, 9, 17))
        h, w = (self.random.choice((1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 17, 33)) for _ in range(2))
        while n * c * h * w > 3000:
            n, c, h = 1, max(1, c // 2), max(1, h // 2)
        sizes = [n, c, h, w]
        if self.chance(0.06):
            sizes[self.random.randrange(4)] = 0
        return tuple(sizes if self.chance(0.8) else sizes[1:])

    def values(self, kind: str, count: int, dtype: torch.dtype) -> Tensor:
        """Numbers in float64 that ``dtype`` can hold."""
        x = torch.randn(count, dtype=torch.float64, generator=self.generator)
        if kind == "ties":
            x = (x * 1.5).round()
        elif kind == "zeros":
            x = x * (torch.rand(count, generator=self.generator) > 0.4)
        elif kind == "constant":
            x = torch.full_like(x, self.random.choice((0.0, 1.0, -2.5)))
        elif kind == "scaled":
            reach = {torch.float64: 60, torch.float32: 12, torch.bfloat16: 12}.get(dtype, 2)
            x = x * 10.0 ** self.random.randint(-reach, reach)
        elif kind == "extreme":
            reach = {torch.float64: 300, torch.float32: 37, torch.bfloat16: 37}.get(dtype, 4)
            x = x * 10.0 ** self.random.choice((-reach, reach))
        elif kind == "offset":
            x = x + self.random.choice((100.0, -1000.0, 1e4 if dtype != torch.float16 else 1e3))
        elif kind == "special":
            info = torch.finfo(dtype)
            chosen = torch.tensor(
                [math.inf, -math.inf, math.nan, 0.0, -0.0, info.max, info.min, info.tiny, 1.0],
                dtype=torch.float64,
            )
            some = torch.randint(0, 9, (count,), generator=self.generator)
            rare = torch.rand(count, generator=self.generator) < self.random.choice((0.05, 0.3))
            x = torch.where(rare, chosen[some], x)
        return x

    def tensor(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        kind: str = "normal",
        layout: str | None = None,
    ) -> Tensor:
        """Values in memory in some layout, with NaN before, between and after them."""
        if layout is None:
            layouts = ("contiguous", "channels_last", "transposed", "sliced", "offset", "expanded")
            layouts += ("overlapping", "negated")
            layout = self.random.choices(layouts, (8, 5, 3, 3, 3, 2, 1, 0.5))[0]
        dims = len(shape)
        order = list(reversed(range(dims)))  # from the innermost in memory to the outermost
        if layout == "channels_last" and dims >= 3:
            order = [dims - 3, dims - 1, dims - 2, *reversed(range(dims - 3))]
        elif layout == "transposed":
            self.random.shuffle(order)
        distance = self.random.choice((2, 3)) if layout == "sliced" else 1
        strides = [0] * dims
        for d in order:
            strides[d] = distance
            distance *= max(1, shape[d])
            if layout == "sliced" and self.chance(0.5):
                distance += self.random.choice((1, 4))
            if shape[d] == 1 and self.chance(0.1):
                strides[d] = self.random.choice((0, 1, 5, 2**40))  # never walked along
        shared = dims > 0 and layout in ("expanded", "overlapping")
        if shared and layout == "expanded":
            strides[self.random.randrange(dims)] = 0
        elif shared:
            strides = [self.random.choice((0, 1, 1, 2, 3)) for _ in strides]
        plain = layout in ("contiguous", "channels_last")
        offset = 0 if plain and self.chance(0.7) else self.random.randrange(1, 9)
        need = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if 0 in shape:
            need = 0
        memory = torch.full((offset + need + 5,), math.nan, dtype=torch.float64).to(dtype)
        view = memory.as_strided(shape, strides, offset)
        if shared:
            memory[offset : offset + need] = self.values(kind, need, dtype).to(dtype)
        else:
            view.copy_(self.values(kind, math.prod(shape), dtype).reshape(shape))
        self.memory.append((memory, memory.clone()))
        if layout == "negated" and dtype in (torch.float64, torch.float32):
            view = _torch_private.negated(view)
        return view

    def changed(self) -> bool:
        """Whether something that went in, or lies beside it, is not what it was."""
        return any(
            not torch.equal(now.view(torch.uint8), before.view(torch.uint8))
            for now, before in self.memory
        )


# ------------------------------------------------------------------------------- valid arguments


def draw_kernel(draw: Draw) -> Tensor:
    taps = (1, 3, 3, 5, 7, 15)
    if draw.chance(0.6):
        shape: tuple[int, ...] = (draw.random.choice(taps),)
    else:
        shape = (draw.random.choice(taps[:5]), draw.random.choice(taps[:5]))
    if draw.chance(0.3):
        dtype = draw.dtype()
    else:
        dtype = torch.float64
    kernel = draw.tensor(shape, dtype, layout=draw.random.choice(("contiguous", "sliced")))
    kernel.copy_(kernel.abs() + 0.05 if draw.chance(0.85) else kernel)
    draw.memory[-1] = (draw.memory[-1][0], draw.memory[-1][0].clone())
    return kernel


def draw_windows(draw: Draw, shape: tuple[int, ...], raw: bool) -> Args:
    kernel = [draw.random.choice((1, 2, 2, 3, 3, 4, 5, 7)) for _ in range(2)]
    padding = [draw.random.randint(0, k // 2) if draw.chance(0.4) else 0 for k in kernel]
    for d in range(2):  # mostly windows that fit
        if draw.chance(0.95):
            kernel[d] = max(1, min(kernel[d], shape[d - 2] + 2 * padding[d]))
            padding[d] = min(padding[d], kernel[d] // 2)
    stride: Any = list(kernel) if draw.chance(0.5) else [draw.random.randint(1, 4) for _ in "hw"]
    if not raw:
        if draw.chance(0.3):
            stride = None
        if kernel[0] == kernel[1]:
            kernel = draw.random.choice((kernel[0], tuple(kernel)))  # type: ignore[assignment]
    return {
        "norm_type": draw.random.choice(POWERS),
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "ceil_mode": draw.chance(0.3),
    }


def draw_numbers(
    draw: Draw, shape: tuple[int, ...], dtype: torch.dtype, known: tuple[float, ...]
) -> Tensor:
    """A tensor in the place of a number."""
    tensor = draw.tensor(shape, dtype, layout=draw.random.choice(("contiguous", "sliced")))
    values = [float(draw.random.choice(known)) for _ in range(tensor.numel())]
    tensor.copy_(torch.tensor(values, dtype=torch.float64).reshape(shape))
    draw.memory[-1] = (draw.memory[-1][0], draw.memory[-1][0].clone())
    return tensor


def draw_loss_options(draw: Draw, x: Tensor, raw: bool) -> Args:
    """What softmax_nll has beside scores, targets, beta and reduction, at times."""
    classes = x.shape[min(1, x.dim() - 1)]
    options: Args = {"weight": None, "ignore_index": -100, "label_smoothing": 0.0}
    if draw.chance(0.3):
        wide = torch.promote_types(x.dtype, torch.float32)
        layout = draw.random.choice(("contiguous", "sliced"))
        weight = draw.tensor((classes,), wide if raw else draw.dtype(), layout=layout)
        weight.copy_((weight.abs() + 0.3) * (weight > -1))
        draw.memory[-1] = (draw.memory[-1][0], draw.memory[-1][0].clone())
        options["weight"] = weight
    if draw.chance(0.3):
        options["ignore_index"] = draw.random.choice((0, 1, 2, -1, 255))
    if draw.chance(0.3):
        options["label_smoothing"] = draw.random.choice((0.1, 0.5, 1.0, 1e-3))
    return options


def draw_arguments(draw: Draw, name: str, raw: bool, tame: bool) -> Args:
    """Arguments of a forward operator; tame: none where derivatives are not numbers."""
    kinds = ("normal", "ties", "zeros", "scaled", "constant", "offset", "extreme", "special")
    kind = draw.random.choices(kinds, (8, 2, 2, 2, 1, 1, *((0, 0) if tame else (1, 2))))[0]
    dtype = draw.dtype()
    if name not in (*ALIKE, "softmax_nll"):
        shape = draw.image_shape()
        args = {"input": draw.tensor(shape, dtype, kind)}
        if not name.startswith("lp_pool2d"):
            args["kernel"] = draw_kernel(draw)
        if name == "local_mean2d":
            args["channels"] = draw.random.choice(("all", "each"))
            modes = ("renormalized", "zeros", "reflect", "replicate")
            return {**args, "padding_mode": draw.random.choice(modes)}
        if name.startswith("lp_pool2d") or name == "stage2d":
            if name == "stage2d":
                args["activation"] = draw.random.choice(tuple(references.ACTIVATIONS))
            args |= draw_windows(draw, shape, raw)
            average, powers = draw.chance(0.3), POWERS
            if not tame:
                powers = (*powers, -1.0, math.nan, 0.0)
            if name == "lp_pool2d_tensor_p":
                wide = torch.promote_types(dtype, torch.float32)
                args["norm_type"] = draw_numbers(draw, shape[-3:-2], wide, powers)
                args["average"] = average
            elif name == "lp_pool2d" and not raw:
                if draw.chance(0.3):
                    several = draw.random.choice(((), (1,), shape[-3:-2]))
                    args["norm_type"] = draw_numbers(draw, several, draw.dtype(), powers)
                if average:
                    args["average"] = True
        elif name != "subtractive_norm2d":
            args["threshold"] = draw.random.choice((1e-4, 0.5, 1.0, 0.0, 0.1))
            args["threshold_value"] = draw.random.choice((1e-4, 0.3, 1, 5.0))
            if not raw and args["threshold"] and draw.chance(0.5):
                args["threshold_value"] = None
                if draw.chance(0.5):
                    several = draw.random.choice(((), shape[:-3] or (1,)))
                    values = (1e-4, 0.5, 1.0, 0.1)
                    args["threshold"] = draw_numbers(draw, several, draw.dtype(), values)
        return args
    shape = draw.shape(draw.random.choice((0, 1, 2, 2, 2, 3, 4, 4, 5, 6)))
    if name == "sigmoid":
        return {"input": draw.tensor(shape, dtype, kind)}
    beta = draw.random.choice((1.0, 1.0, 1, -1.0, -2.5, 0.5, 3.0, 0.0))
    if name != "softmax_nll":
        x = draw.tensor(shape, dtype, kind)
        dims = max(1, len(shape))
        return {"input": x, "dim": draw.random.randrange(-dims, dims), "beta": beta}
    shape = shape or (3,)
    x = draw.tensor(shape, dtype, kind)
    classes = shape[min(1, len(shape) - 1)]
    left = shape[:1] + shape[2:] if len(shape) > 1 else ()
    options = draw_loss_options(draw, x, raw)
    layout = draw.random.choice(("contiguous", "transposed", "sliced"))
    if draw.chance(0.25):
        target = draw.tensor(shape, dtype if raw else draw.dtype(), layout=layout)
        options["ignore_index"] = min(-1, options["ignore_index"])
    else:
        integers = torch.int64 if raw else draw.random.choice(INTEGERS)
        target = draw.tensor(left, integers, layout=layout)
        chosen = torch.randint(0, max(1, classes), left, generator=draw.generator)
        if draw.chance(0.4) and chosen.numel():
            chosen.view(-1)[:2] = options["ignore_index"]
        if draw.chance(0.05) and chosen.numel():
            chosen.view(-1)[0] = draw.random.choice((-1, classes, 100, -100))
        target.copy_(chosen)
        draw.memory[-1] = (draw.memory[-1][0], draw.memory[-1][0].clone())
    reduction = draw.random.choice(("none", "mean", "sum"))
    weight = options.pop("weight")
    options = {"weight": weight, "beta": beta, "reduction": reduction, **options}
    return {"input": x, "target": target, **options}


# ------------------------------------------------------------------------------ absurd arguments


def absurd(draw: Draw, value: Any) -> Any:
    """Something else in the place of an argument."""
    pick = draw.random.choice
    if isinstance(value, Tensor):
        return absurd_tensor(draw, value)
    if isinstance(value, bool):
        return pick(BOOLS)
    if isinstance(value, (int, float)):
        return pick(PAIRS if draw.chance(0.1) else NUMBERS)
    if isinstance(value, str):
        return pick(TEXTS)
    if isinstance(value, (list, tuple)) and len(value) == 2 and draw.chance(0.5):
        changed = list(value)
        changed[pick((0, 1))] = pick(
            (0, -1, 1, 2, 3, 100, 2**30, 2**31 - 1, 2**31, 2**62, -(2**62))
        )
        return changed
    return pick(PAIRS)


def absurd_tensor(draw: Draw, value: Tensor) -> Any:
    if value.numel() > 10**5:  # one that was made absurd before
        value = torch.zeros(3)
    pick, shape = draw.random.choice, tuple(value.shape)
    what = pick(
        ("dtype", "dtype", "shape", "shape", "meta", "meta", "floating", "nothing", "leaf", "odd")
    )
    if what == "dtype":
        return draw.tensor(shape, torch.float32).to(pick(REFUSED_DTYPES))
    if what == "floating":
        return draw.tensor(shape, draw.dtype(), "special")
    if what == "meta":
        return torch.empty_strided(shape, value.stride(), dtype=value.dtype, device="meta")
    if what == "leaf" and value.is_floating_point():
        return value.clone().requires_grad_()
    if what == "shape":
        sizes = list(shape)
        change = pick(("more", "fewer", "zero", "other", "any", "swapped", "huge"))
        if change == "more":
            sizes.insert(pick((0, len(sizes))), pick((0, 1, 2)))
        elif change == "fewer" and sizes:
            sizes.pop(draw.random.randrange(len(sizes)))
        elif change in ("zero", "other") and sizes:
            d = draw.random.randrange(len(sizes))
            sizes[d] = 0 if change == "zero" else sizes[d] + pick((1, 2, -1) if sizes[d] else (1,))
        elif change == "any":
            sizes = list(draw.shape(pick((0, 1, 2, 3, 4, 5, 6))))
        elif change == "huge" and sizes and value.dtype in FLOATING:
            # One number, expanded to more than any memory holds.
            sizes[draw.random.randrange(len(sizes))] = pick((2**31, 2**40, 2**62))
            if math.prod(max(1, size) for size in sizes) < 2**62:
                return torch.ones((), dtype=value.dtype).expand(sizes)
            sizes = list(shape)
        else:
            draw.random.shuffle(sizes)
        return draw.tensor(tuple(sizes), torch.float32).to(value.dtype)
    if what == "odd":
        odd = pick(("sparse", "list", "parameter", "numpy", "nested"))
        if odd == "sparse" and value.is_floating_point() and value.dim():
            return torch.ones(shape).to_sparse()
        if odd == "parameter" and value.is_floating_point():
            return torch.nn.Parameter(value.clone())
        if odd == "numpy":
            return np.ones(shape, dtype=np.float32)
        if odd == "list":
            return [value]
    return pick((None, 1, 1.0, "tensor", [], True, torch.float32))
