"""Random calls of the operators: what is called how, and what must come of it."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import fuzz_references as references
import torch
from fuzz_arguments import ALIKE, PAIRS, PUBLIC, RAW, Args, Draw, absurd, describe, draw_arguments
from fuzz_references import EPS, Refused, Unclear
from torch import Tensor

import mnist_ops

#: What a call may raise. Everything else is a finding; so is an error that blames itself.
PROPER = (TypeError, ValueError, IndexError, RuntimeError)
IMPROPER_TEXT = re.compile(r"INTERNAL ASSERT|please report a bug|Unknown exception", re.IGNORECASE)


# -------------------------------------------------------------------------------------- what comes


@dataclass
class Expected:
    """A result in float64, and how large the terms are whose rounding errors it has."""

    value: Tensor
    scale: Any
    dtype: torch.dtype


def on_cpu(tensor: Tensor) -> Tensor:
    """In float64; zeros of the shape for a tensor without values."""
    if tensor.is_meta:
        return torch.zeros(tensor.shape, dtype=torch.float64)
    return tensor.detach().to(torch.float64)


def gradients(
    function: Callable[[Tensor], Tensor], x: Tensor, g: Tensor, v: Tensor | None
) -> list[Tensor]:
    """[gx], or with v [gg, gx2]: the gradients of sum(v * gx)."""
    x, g = x.clone().requires_grad_(), g.clone().requires_grad_()
    zero = [torch.zeros_like(g), torch.zeros_like(x)]
    y = function(x)
    if v is None:
        return [torch.autograd.grad(y, x, g)[0]]
    (gx,) = torch.autograd.grad(y, x, g, create_graph=True)
    if not gx.requires_grad:
        return zero
    found = torch.autograd.grad(gx, (g, x), v, allow_unused=True)
    return [z if f is None else f for z, f in zip(zero, found, strict=True)]


def powers_gradient(
    x: Tensor, rest: tuple[Any, ...], g: Tensor, given: Tensor, dtype: torch.dtype
) -> Expected:
    """What a tensor norm_type's gradient is."""
    p = rest[0].clone().requires_grad_()
    (by_channel,) = torch.autograd.grad(references.lp_pool2d(x, p, *rest[1:]), p, g)
    scale = references.scale("lp_pool2d", "gp", x, rest, g, g)
    # Computed in the type of the images, whatever p is.
    scale *= max(1.0, EPS[torch.promote_types(dtype, torch.float32)] / EPS[given.dtype])
    return Expected(by_channel.sum_to_size(given.shape), scale, given.dtype)


def like(tensor: Any, other: Tensor | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Refuse a gradient that is not of a tensor's shape and dtype."""
    references.floating(tensor)
    shape = other.shape if isinstance(other, Tensor) else other
    if tensor.shape != shape or tensor.dtype != dtype:
        raise Refused("another shape or dtype")
    return tensor


def finite(*tensors: Tensor, within: torch.dtype | None = None) -> None:
    """No derivative is promised at infinity, nor where the result is infinite in its dtype."""
    tensors = tuple(t for t in tensors if not t.is_meta)
    if not all(t.isfinite().all() for t in tensors):
        raise Unclear("derivatives at infinity or NaN")
    if within is not None and references.magnitude(*tensors) > torch.finfo(within).max / 2:
        raise Unclear("derivatives of a result that overflows")


def expected_of_raw(name: str, args: Args, saved: tuple[Any, ...]) -> list[Expected]:
    """What ``torch.ops.mnist_ops.<name>`` must give; raises Refused or Unclear.

    ``saved`` are the tensors that a backward operator was handed by its forward: nothing is
    promised for others.
    """
    base = name.removesuffix("_double_backward").removesuffix("_backward")
    given = [t for t in args.values() if isinstance(t, Tensor)]
    if name == "lp_pool2d_tensor_p_backward" and any(t.requires_grad for t in given):
        raise Unclear("composed of PyTorch's operators, which check less")
    if any(isinstance(t, Tensor) and references.too_large(t) for t in args.values()):
        raise Unclear("more than there is memory for")
    forward_args = dict(args)
    if base in ALIKE and name != base:
        return expected_of_alike(base, args)
    if base == "subtractive_norm2d" and name != base:
        forward_args["input"] = args["grad_output"]
    promise = references.promise(base, forward_args, raw=True)
    x, dtype = forward_args["input"], forward_args["input"].dtype
    wide, rest = on_cpu(x), promise.reference_args
    if name == base:
        y = promise.function(wide)
        scale = references.scale(base, "y", wide, rest, wide, wide)
        return [Expected(y.detach(), scale, dtype)]
    g_name = "grad_loss" if base == "softmax_nll" else "grad_output"
    y = promise.function(wide)
    g = like(args[g_name], y, dtype)
    finite(x, g)
    finite(y, g, within=dtype)
    if base == "lp_pool2d":
        like(args["output"], y, dtype)
    if any(all(value is not own for value in args.values()) for own in saved):
        # The gradient's own shape and dtype were looked at.
        raise Unclear("what the forward did not give")
    v = None
    if name.endswith("_double_backward"):
        v = like(args["grad_grad_input"], x, dtype)
        finite(v)
    wide_g, wide_v = on_cpu(g), None if v is None else on_cpu(v)
    kinds = ("gx",) if v is None else ("gg", "gx2")
    other = wide_g if wide_v is None else wide_v
    expected = [
        Expected(value, references.scale(base, kind, wide, rest, wide_g, other), dtype)
        for kind, value in zip(
            kinds, gradients(promise.function, wide, wide_g, wide_v), strict=True
        )
    ]
    if base == "lp_pool2d_tensor_p":
        expected.append(powers_gradient(wide, rest, wide_g, args["norm_type"], dtype))
    return expected


def expected_of_alike(base: str, args: Args) -> list[Expected]:
    """The backward operators of functions that keep their output."""
    stand_in = {"input": args["output"], **args}
    rest = references.promise(base, stand_in, raw=True).reference_args
    output = args["output"]
    g = on_cpu(like(args["grad_output"], output, output.dtype))
    y = on_cpu(output)
    finite(output, args["grad_output"])
    terms = references.magnitude(g) * max(1.0, references.magnitude(y))
    if base == "sigmoid":
        return [Expected(g * y * (1 - y), terms * max(1.0, references.magnitude(y)), output.dtype)]
    dim, beta = rest
    if base == "softmax":
        value, size = beta * y * (g - (g * y).sum(dim, keepdim=True)), references.magnitude(y)
        size = min(size, 1e150) ** 2
    else:
        e = y.exp()
        value, size = beta * (g - e * g.sum(dim, keepdim=True)), 1 + references.magnitude(e)
        size *= 1 + references.magnitude(y)
    if not math.isfinite(size):
        raise Unclear("overflow")
    scale = abs(beta) * terms * max(1.0, size) * max(1, y.numel())
    return [Expected(value, scale, output.dtype)]


def compare(what: str, got: Any, expected: Expected) -> str | None:
    """What is wrong with a result; None where nothing is."""
    if not isinstance(got, Tensor):
        return f"{what} is a {type(got).__name__}"
    if got.dtype != expected.dtype or got.shape != expected.value.shape:
        wanted = f"{expected.dtype} {tuple(expected.value.shape)}"
        return f"{what} is {got.dtype} {tuple(got.shape)}, not {wanted}"
    if got.is_meta or got.numel() == 0:
        return None
    info = torch.finfo(got.dtype)
    actual, want = got.detach().to(torch.float64), expected.value
    tolerance = EPS[got.dtype]
    if isinstance(expected.scale, float) and not math.isfinite(expected.scale):
        return None
    bound = tolerance * (3 * want.abs() + expected.scale) + 2 * info.tiny
    bound = bound.nan_to_num(nan=math.inf)
    same = (actual - want).abs() <= bound
    if not bool(same.all()):
        same |= (actual == want) | (actual.isnan() & want.isnan())
        # What rounds to infinity, or nearly: both will do.
        over = want.abs() * (1 + 4 * tolerance) > info.max
        same |= over & (actual.sign() == want.sign()) & (actual.abs() > info.max / 4)
    if bool(same.all()):
        return None
    i = int((~same).flatten().to(torch.uint8).argmax())
    a, w = float(actual.flatten()[i]), float(want.flatten()[i])
    b = float(torch.broadcast_to(bound, want.shape).flatten()[i])
    return f"{what}: element {i} of {want.numel()} is {a!r}, must be {w!r} within {b:.2g}"


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def same_bits(one: Any, other: Any) -> bool:
    return all(
        a.is_meta or a.layout is not torch.strided or torch.equal(bits(a), bits(b))
        for a, b in zip(listed(one), listed(other), strict=True)
    )


def listed(result: Any) -> list[Any]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


# -------------------------------------------------------------------------------------------- cases


@dataclass
class Case:
    """One call: how it is written, and a function that makes it and returns what is wrong."""

    name: str
    text: Callable[[], str]
    run: Callable[[], tuple[str, str | None]]  # ("valid" | "refused" | "unclear", what is wrong)


def judged(
    draw: Draw, call: Callable[[], Any], expect: Callable[[], list[Expected]], raw: bool
) -> tuple[str, str | None]:
    """Make a call, and hold it against what must come."""
    try:
        expected: list[Expected] | None = expect()
        outcome = "valid"
    except Refused:
        expected, outcome = None, "refused"
    except Unclear:
        expected, outcome = None, "unclear"
    proper = (*PROPER, OverflowError) if raw else PROPER  # the dispatcher's own, for 2**70
    try:
        result = call()
    except proper as error:
        if IMPROPER_TEXT.search(str(error)):
            return outcome, f"an error that blames itself: {first_line(error)}"
        if outcome == "valid":
            return outcome, f"{type(error).__name__} for valid arguments: {first_line(error)}"
        if draw.changed():
            return outcome, "an input was modified by a call that failed"
        return outcome, None
    except (Exception, MemoryError) as error:
        return outcome, f"{type(error).__name__} is no proper error: {first_line(error)}"
    if draw.changed():
        return outcome, "an input was modified"
    if outcome == "refused":
        return outcome, "arguments that are not documented were taken"
    if not same_bits(result, call()):
        return outcome, "a second call gave other bits"
    for i, want in enumerate(expected or ()):
        wrong = compare(f"result {i}", listed(result)[i], want)
        if wrong:
            return outcome, wrong
    return outcome, None


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:300]


class Library:
    """Where the raw operators are: the CPU's, or the emulated CUDA kernels."""

    def __init__(self, namespace: str = "mnist_ops", configure: Any = None) -> None:
        self.namespace, self.configure = namespace, configure
        self.ops = getattr(torch.ops, namespace)

    @property
    def emulated(self) -> bool:
        return self.configure is not None


def raw_case(draw: Draw, library: Library, hostile: bool) -> Case:
    """A call of ``torch.ops.mnist_ops``."""
    name = draw.random.choice(RAW)
    base = name.removesuffix("_backward").removesuffix("_double")
    op = getattr(library.ops, name)
    forward = getattr(library.ops, base)
    args, saved = draw_arguments(draw, base, raw=True, tame=name != base), ()
    if name != base:
        args, saved = backward_arguments(draw, base, name, args, forward)
    if hostile:
        for _ in range(draw.random.choice((1, 1, 1, 2))):
            key = draw.random.choice(list(args))
            args[key] = absurd(draw, args[key])
    positional = list(args.values())
    if hostile and draw.chance(0.03):
        positional = positional[:-1] if draw.chance(0.5) else [*positional, 1]

    def text() -> str:
        return f"torch.ops.{library.namespace}.{name}({', '.join(map(describe, positional))})"

    def expect() -> list[Expected]:
        if len(positional) != len(args):
            raise Refused("another number of arguments")
        if library.emulated:
            return emulated_expectation(name, args, saved)
        return expected_of_raw(name, args, saved)

    def run() -> tuple[str, str | None]:
        if library.configure is not None:
            library.configure(draw.random)
        outcome, wrong = judged(draw, lambda: op(*positional), expect, raw=True)
        # What is differentiated again is composed, and lies as its parts do.
        recorded = any(isinstance(a, Tensor) and a.requires_grad for a in positional)
        if outcome == "valid" and not wrong and not library.emulated and not recorded:
            wrong = wrong_layout(op, positional)
        return outcome, wrong

    return Case(name, text, run)


def emulated_expectation(name: str, args: Args, saved: tuple[Any, ...]) -> list[Expected]:
    """CUDA cannot look at values, and has no Python beside it."""
    if any(isinstance(v, Tensor) and (v.is_meta or v.requires_grad) for v in args.values()):
        raise Unclear("what the emulation does not have")
    try:
        return expected_of_raw(name, args, saved)
    except Refused as error:
        if "out of range" in str(error):
            raise Unclear("NaN, on CUDA") from None
        raise


def backward_arguments(
    draw: Draw, base: str, name: str, args: Args, forward: Callable[..., Any]
) -> tuple[Args, tuple[Any, ...]]:
    """Arguments of a backward operator, in the order of its schema, and what the forward saved."""
    x = args["input"]
    dtype = x.dtype
    if base in ALIKE:
        y = forward(*args.values())
        output = draw.tensor(tuple(y.shape), dtype)
        g = draw.tensor(tuple(y.shape), dtype)
        if output.stride() != x.stride() or draw.chance(0.5):
            output = y
        else:
            output = output.clone(memory_format=torch.preserve_format).copy_(y)
            draw.memory = [(now, now.clone()) for now, _ in draw.memory]
        rest = list(args.items())[1:]
        return {"grad_output": g, "output": output, **dict(rest)}, ()
    if base == "subtractive_norm2d":
        return {"grad_output": x, "kernel": args["kernel"]}, ()
    if base == "softmax_nll":
        try:
            loss, *others = forward(*args.values())
        except RuntimeError:  # no classes, or a target out of range: anything will do
            loss, others = x.sum(), [x.clone()]
        g = draw.tensor(tuple(loss.shape), dtype, layout=None if loss.dim() else "contiguous")
        saved = {f"saved{i}": tensor for i, tensor in enumerate(others)}
        first = {"grad_loss": g, "input": x, "target": args["target"]}
        kept = (*args.values(), *others)
        options = {key: value for key, value in args.items() if key not in ("input", "target")}
        return {**first, **saved, **options}, kept
    try:
        y = forward(*args.values())
    except RuntimeError:  # windows that do not fit
        y = x.clone()
    g = draw.tensor(tuple(y.shape), dtype, draw.random.choice(("normal", "zeros")))
    if base != "lp_pool2d":
        return {"grad_output": g, **args}, ()
    rest = dict(list(args.items())[1:])
    result: Args = {"grad_output": g, "input": x, "output": y, **rest}
    if name.endswith("_double_backward"):
        result = {"grad_grad_input": draw.tensor(tuple(x.shape), dtype), **result}
    return result, (x, y, *rest.values())


def overlaps(x: Tensor) -> bool:
    """Whether two elements may lie at one address."""
    reach = 0
    for step, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if step <= reach:
                return True
            reach += (size - 1) * step
    return False


def wrong_layout(op: Any, positional: list[Any]) -> str | None:
    """Hold a result's shape, dtype and strides against what the fake kernel says."""
    if not any(isinstance(a, Tensor) and a.is_floating_point() for a in positional):
        return None
    fake = [
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta")
        if isinstance(a, Tensor)
        else a
        for a in positional
    ]
    for i, (real, said) in enumerate(zip(listed(op(*positional)), listed(op(*fake)), strict=True)):
        same = real.shape == said.shape and real.dtype == said.dtype
        # The stride of a dimension of one element means nothing.
        steps = [
            [s for s, n in zip(t.stride(), t.shape, strict=True) if n != 1] for t in (real, said)
        ]
        if not same or (real.numel() and steps[0] != steps[1]):
            shown = [f"{t.dtype} {tuple(t.shape)} with strides {t.stride()}" for t in (real, said)]
            return f"result {i} is {shown[0]}, but the fake kernel says {shown[1]}"
    return None


def public_case(draw: Draw, hostile: bool) -> Case:
    """A call of a function of ``mnist_ops``, perhaps through autograd or torch.func."""
    if draw.chance(0.03):
        return gaussian_case(draw, hostile)
    name = draw.random.choice(PUBLIC)
    how = "forward"
    if not hostile:
        how = draw.random.choice(("forward", "module", "grad", "double", "jvp", "vmap"))
    args = draw_arguments(draw, name, raw=False, tame=how not in ("forward", "module"))
    no_module = name == "local_mean2d" or "average" in args
    p = args.get("norm_type")
    no_module |= isinstance(p, Tensor) and not bool((p.isfinite() & (p > 0)).all())
    if how == "module" and (no_module or isinstance(args.get("threshold"), Tensor)):
        how = "forward"
    if hostile:
        for _ in range(draw.random.choice((1, 1, 1, 2))):
            key = draw.random.choice(list(args))
            args[key] = absurd(draw, args[key])
    function = getattr(mnist_ops, name)

    def text() -> str:
        shown = ", ".join(f"{key}={describe(value)}" for key, value in args.items())
        return f"mnist_ops.{name}({shown})" + ("" if how == "forward" else f"  [{how}]")

    if how == "forward":

        def expect() -> list[Expected]:
            promise = references.promise(name, args, raw=False)
            x = on_cpu(args["input"])
            scale = references.scale(name, "y", x, promise.reference_args, x, x)
            return [Expected(promise.function(x).detach(), scale, args["input"].dtype)]

        # Where a second value is None it has its default.
        def call() -> Any:
            return function(**args)

        return Case(name, text, lambda: judged(draw, call, expect, raw=False))
    return Case(f"{name} [{how}]", text, lambda: derived(draw, name, how, args, function))


def gaussian_case(draw: Draw, hostile: bool) -> Case:
    """``gaussian1d``, or ``gaussian2d`` as its outer product."""
    two = draw.chance(0.5)
    size: Any = draw.random.randint(1, 9)
    sigma, center = draw.random.choice((0.25, 0.1, 3)), draw.random.choice((0.5, 0.2))
    args = [size, sigma, draw.random.choice((1.0, 2.5)), center, draw.chance(0.5)]
    valid = list(args)
    if hostile:
        i = draw.random.randrange(5)
        args[i] = draw.random.choice(PAIRS) if i == 0 else absurd(draw, args[i])
    name = "gaussian2d" if two else "gaussian1d"

    def expect() -> list[Expected]:
        if any(now is not before for now, before in zip(args, valid, strict=True)):
            raise Unclear("see the tests of kernels.py")
        i = torch.arange(1, size + 1, dtype=torch.float64)
        line = torch.exp(-(((i - (center * size + 0.5)) / (sigma * size)) ** 2) / 2)
        want = args[2] * (torch.outer(line, line) if two else line)
        return [Expected(want / want.sum() if args[4] else want, 1.0, torch.float64)]

    def text() -> str:
        return f"mnist_ops.{name}({', '.join(map(describe, args))})"

    function = getattr(mnist_ops, name)
    return Case(name, text, lambda: judged(draw, lambda: function(*args), expect, raw=False))


def derived(
    draw: Draw, name: str, how: str, args: Args, function: Callable[..., Any]
) -> tuple[str, str | None]:
    """Modules, derivatives and batches of a public function."""
    x = args["input"]
    rest_args = {key: value for key, value in args.items() if key != "input"}
    try:
        promise = references.promise(name, args, raw=False)
        wide, rest = on_cpu(x), promise.reference_args
        y = promise.function(wide).detach()
        if how not in ("module", "vmap"):
            finite(x)
            finite(y, within=x.dtype)
        v = draw.tensor(tuple(x.shape), x.dtype, draw.random.choice(("normal", "zeros")))
        g = draw.tensor(tuple(y.shape), x.dtype)
        wide_g, wide_v = on_cpu(g), on_cpu(v)

        def scaled(kind: str) -> Any:
            return references.scale(name, kind, wide, rest, wide_g, wide_v)

        expected = [Expected(y, scaled("y"), x.dtype)]
        narrow = name == "stage2d" and x.dtype != torch.float64
        if narrow and math.isinf(rest[2]) and how in ("grad", "double", "jvp"):
            raise Unclear("which activation is the largest: rounding may make them equal")
        if how == "grad":
            values = gradients(promise.function, wide, wide_g, None)
            expected.append(Expected(values[0], scaled("gx"), x.dtype))
            if isinstance(args.get("norm_type"), Tensor):
                expected.append(powers_gradient(wide, rest, wide_g, args["norm_type"], x.dtype))
        elif how == "double":
            values = gradients(promise.function, wide, wide_g, wide_v)
            kinds = ("gg", "gx2")
            expected += [
                Expected(value, scaled(kind), x.dtype)
                for kind, value in zip(kinds, values, strict=True)
            ]
        elif how == "jvp":
            # The gradient with respect to g of the gradient in the direction v.
            value = gradients(promise.function, wide, wide_g, wide_v)[0]
            expected.append(Expected(value, scaled("jvp"), x.dtype))
    except (Refused, Unclear):
        return "unclear", None

    def on(x: Tensor) -> Any:
        return function(x, **rest_args)

    def call() -> Any:
        if how == "module":
            return module_of(name, args)(x, *((args["target"],) if "target" in args else ()))
        if how == "vmap":
            return batch_call(draw, name, args, function)
        if how == "jvp":
            # PyTorch lays the tangent out like x, which cannot be where elements share memory.
            return torch.func.jvp(on, (x.clone() if overlaps(x) else x,), (v,))
        leaf = x.detach().requires_grad_()
        if how == "grad" and isinstance(args.get("norm_type"), Tensor):
            p = args["norm_type"].detach().requires_grad_()
            y = function(**{**args, "input": leaf, "norm_type": p})
            return y, *torch.autograd.grad(y, (leaf, p), g)
        y = on(leaf)
        if how == "grad":
            return y, torch.autograd.grad(y, leaf, g)[0]
        direction = g.detach().requires_grad_()
        (gx,) = torch.autograd.grad(y, leaf, direction, create_graph=True)
        zero = (torch.zeros_like(direction), torch.zeros_like(leaf))
        if not gx.requires_grad:
            return y, *zero
        found = torch.autograd.grad(gx, (direction, leaf), v, allow_unused=True)
        return y, *(z if f is None else f for z, f in zip(zero, found, strict=True))

    return judged(draw, call, lambda: expected, raw=False)


def module_of(name: str, args: Args) -> torch.nn.Module:
    """The layer of ``mnist_ops.nn``."""
    layer = {
        "lp_pool2d": "LPPool2d",
        "subtractive_norm2d": "SubtractiveNorm2d",
        "divisive_norm2d": "DivisiveNorm2d",
        "contrastive_norm2d": "ContrastiveNorm2d",
        "stage2d": "Stage2d",
        "sigmoid": "Sigmoid",
        "softmax": "Softmax",
        "log_softmax": "LogSoftmax",
        "softmax_nll": "SoftmaxNLLLoss",
    }[name]
    options = {key: value for key, value in args.items() if key not in ("input", "target")}
    return getattr(mnist_ops.nn, layer)(**options)


def batch_call(draw: Draw, name: str, args: Args, function: Callable[..., Any]) -> Tensor:
    """vmap over copies of the input, of which one is returned and all must be the same."""
    x = args["input"]
    size = 2 + x.numel() % 2
    dim = x.dim() // 2
    copies = torch.stack([x] * size, dim)
    rest = {key: value for key, value in args.items() if key != "input"}
    results = torch.func.vmap(lambda one: function(one, **rest), in_dims=dim)(copies)
    # torch.mean adds up channels in an order that depends on the place in memory.
    near = functools.partial(torch.allclose, rtol=1e-2, atol=1e-5, equal_nan=True)
    alike = near if args.get("channels") == "all" else same_bits
    for other in results[1:]:
        assert alike(results[0], other), "examples of one batch differ"
    return results[0]
