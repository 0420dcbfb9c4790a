"""What the operator families share: argument checks, memory layout, batching rules of vmap."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _torch_private as private
from .._libraries import CPU_CAPABILITY, CUDA_MISSING

# Python's registrations for the operators whose schemas are in csrc/library.cpp.
_library = torch.library.Library("mnist_ops", "FRAGMENT")

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_floating(op: str, name: str, tensor: object) -> None:
    """Refuse what is not a floating-point tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{op}: {name} must be float64, float32, float16 or bfloat16, got {tensor.dtype}"
        )


def check_images(op: str, tensor: object) -> None:
    """Refuse what is not a floating-point image or batch of images."""
    check_floating(op, "input", tensor)
    assert isinstance(tensor, Tensor)
    if not 3 <= tensor.dim() <= 4:
        raise ValueError(
            f"{op}: input must be (N, C, H, W) or (C, H, W), got the shape {tuple(tensor.shape)}"
        )


def check_number(op: str, name: str, value: object) -> float:
    """Return a real number as a float; NaN and infinity are the caller's to judge."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{op}: {name} is too large for a float") from error


def check_finite(op: str, name: str, value: object, least: float = -math.inf) -> float:
    """Return a finite number of at least ``least``."""
    number = check_number(op, name, value)
    if not (math.isfinite(number) and number >= least):
        bound = f">= {least:g} and " if least > -math.inf else ""
        raise ValueError(f"{op}: {name} must be {bound}finite, got {value}")
    return number


def check_int(op: str, name: str, value: Any, kind: str = "an int") -> int:
    """Return what is an int for PyTorch: NumPy's integers, too, and all that has __index__."""
    if type(value) is not int:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{op}: {name} must be {kind}, got {value!r}")
        try:
            value = operator.index(value)
        except TypeError as error:  # a tensor of floats or of several elements
            raise TypeError(f"{op}: {name} must be {kind}, got {value!r}") from error
    if not -(2**63) <= value < 2**63:  # Python refuses to print one of thousands of digits
        raise ValueError(f"{op}: {name} must fit 64 bits, got an int of {value.bit_length()}")
    return value


def pair(op: str, name: str, value: Any) -> list[int]:
    """Return [height, width] from one int or two."""
    return sizes(op, name, value, 2)


def sizes(op: str, name: str, value: Any, count: int) -> list[int]:
    """Return ``count`` ints from so many or one; a sequence of one counts as one, as in torch."""
    if type(value) is int:
        return [check_int(op, name, value)] * count
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    kind = ("an int", "an int or two ints", "an int or three ints")[count - 1]
    if len(values) not in (1, count):
        raise TypeError(f"{op}: {name} must be {kind}, got {value!r}")
    values = [check_int(op, name, v, kind) for v in values]
    return values * count if len(values) == 1 else values


def compute_type(dtype: torch.dtype) -> torch.dtype:
    """The type that kernels compute in: float32 for half types."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _check_tensors(name: str) -> Callable[[Sequence[Any]], list[tuple[str, Tensor]]]:
    """Return what refuses None in the place of a tensor of ``mnist_ops::name``.

    The dispatcher takes None for one. The arguments that are tensors come back with their names.
    """
    arguments = private.arguments(getattr(torch.ops.mnist_ops, name).default)
    places = [(i, a.name) for i, a in enumerate(arguments) if str(a.type) == "Tensor"]

    def check(values: Sequence[Any]) -> list[tuple[str, Tensor]]:
        tensors = [(argument, values[i]) for i, argument in places]
        for argument, value in tensors:
            if value is None:
                raise TypeError(f"{name}: {argument} must be a Tensor, got None")
        return tensors

    return check


def register_fake(name: str) -> Callable[[Callable[..., Any]], None]:
    """Decorate the fake kernel of ``mnist_ops::name``, which also checks dtypes and devices.

    A call with tensors on the CPU and on the meta device comes here, too, and would be given memory
    without values.
    """
    names = [a.name for a in private.arguments(getattr(torch.ops.mnist_ops, name).default)]
    check = _check_tensors(name)

    def register(fake: Callable[..., Any]) -> None:
        def checked(*args: Any, **kwargs: Any) -> Any:
            values = [*args, *(kwargs[key] for key in names[len(args) :])]
            tensors = check(values)
            for other, tensor in tensors:
                check_same_device(name, other, tensor, *tensors[0])
                if other != "target":
                    check_floating(name, other, tensor)
            return fake(*values)

        torch.library.register_fake(f"mnist_ops::{name}", checked)

    return register


def check_same_device(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse two arguments on different devices."""
    if tensor.device != other.device:
        raise RuntimeError(
            f"{op}: {name} is on {tensor.device} and {other_name} on {other.device}; they must be "
            "on the same device"
        )


def is_channels_last(tensor: Tensor) -> bool:
    """Whether channels are innermost in memory; the rule of ``is_channels_last`` in common.h."""
    if tensor.dim() != 4 or tensor.numel() == 0:
        return False
    size, stride = tensor.shape, tensor.stride()
    if size[1] == 1 or stride[1] != 1:
        return False
    inner = size[1]
    for d in (3, 2, 0):
        if size[d] != 1:
            if stride[d] < inner:
                return False
            inner = stride[d] * size[d]
        elif d != 0 and stride[d] < size[1]:
            return False
    return True


def empty_images(like: Tensor, height: Any, width: Any) -> Tensor:
    """Images like ``like`` of another size, in the layout the kernels give them."""
    return torch.empty(
        (*like.shape[:-2], height, width),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last if is_channels_last(like) else torch.contiguous_format,
    )


def autocast_to_float32(name: str) -> None:
    """Run ``mnist_ops::name`` in float32 under autocast, as PyTorch does with its kin."""
    for device in ("cpu", "cuda"):
        torch.library.register_autocast(f"mnist_ops::{name}", device, torch.float32)


def batch_first(tensor: Tensor, in_dim: int | None, batch_size: int) -> Tensor:
    """Return a vmapped tensor with its batch dimension first, adding one where it has none."""
    if in_dim is None:
        return tensor.expand(batch_size, *tensor.shape)
    return tensor.movedim(in_dim, 0)


#: How the autograd functions for eager PyTorch that register_autograd made are called.
_eager_functions: dict[str, Callable[..., Any]] = {}


#: Exactly these are plain tensors: no proxies of tracers, subclasses, FakeTensors or DTensors.
PLAIN = frozenset((Tensor, torch.nn.Parameter))


def direct(name: str, check: Callable[..., object] = lambda *args: None) -> Callable[..., Any]:
    """Return ``torch.ops.mnist_ops.<name>``, on a shorter way where there is one.

    The Autograd kernels are Python (see ``register_autograd``), and a call of the operator goes
    from Python through the dispatcher into Python again. For plain tensors in eager PyTorch,
    outside of ``torch.func``, ``torch.jit.trace`` and forward-mode AD, what that kernel would do is
    done at once; under autocast only where no gradient is to come. A small sigmoid takes 1.8 us so,
    6.8 otherwise.

    ``check(*args)`` refuses, in better words, what kernels refuse, too. On the shorter way it is
    called where they did: for a small ``softmax_nll`` it would take a fifth of the time.
    """
    op = getattr(torch.ops.mnist_ops, name).default
    dispatch, past_eager = private.entry(op), private.past_eager
    autograd, exclude, is_excluded = private.AUTOGRAD, private.exclude, private.is_excluded
    is_grad_enabled, autocast = torch.is_grad_enabled, private.autocast
    # Whether there are kernels; elsewhere the operators are what definitions.py says.
    on_cpu, on_cuda = CPU_CAPABILITY != "none", not CUDA_MISSING
    # The places in args of the others that can require grad.
    others = [i for i, a in enumerate(private.arguments(op)) if i > 0 and "Tensor" in str(a.type)]

    # Arguments that are handed on as they came are not copied: 0.06 us less than with names.
    def call(*args: Any) -> Any:
        input = args[0]
        if type(input) not in PLAIN or past_eager():
            check(*args)
            return op(*args)
        # Asking for the name of the device would take a quarter of the call's time.
        has_kernels = on_cpu if input.is_cpu else on_cuda and input.is_cuda
        if not has_kernels:
            check(*args)
        before = is_excluded(autograd)
        try:
            requires_grad = input.requires_grad
            for i in others:
                requires_grad = requires_grad or (args[i] is not None and args[i].requires_grad)
            if requires_grad and is_grad_enabled():
                return (_eager_functions[name] if has_kernels and not autocast() else op)(*args)
            exclude(autograd, True)
            return dispatch(*args)
        except Exception:
            try:
                check(*args)
            except Exception as better:
                raise better from None
            raise
        finally:
            exclude(autograd, before)

    return call


def register_autograd(name: str, backward: Any, jvp: Any, setup_context: Any = None) -> None:
    """Register the derivatives of ``mnist_ops::name``, for autograd and for ``torch.func``.

    ``backward`` and ``setup_context`` are what ``torch.library.register_autograd`` takes.
    ``jvp(ctx, *tangents)`` is forward mode: with ``ctx.saved_tensors`` and ``ctx.options`` as
    ``backward`` has them, and a tangent for each argument (None where there is none), it returns
    that of each result. Both are written with differentiable operators, which makes derivatives of
    derivatives in either mode.

    PyTorch's own registration offers no forward mode. It also builds on ``autograd.Function``,
    which handles all levels of nested ``torch.func`` transforms at once and cannot do so in the
    middle of a dispatch: ``grad`` of a registered operator is an error there (pytorch/pytorch
    issues 168393 and 179652). An Autograd kernel is called once for each level, as those in C++
    are, so it needs the function that handles one; with it per-sample gradients, ``vmap(grad(f))``,
    and Hessians work.
    """
    op = getattr(torch.ops.mnist_ops, name).default
    dispatch = private.entry(op)
    autograd, exclude, is_excluded = private.AUTOGRAD, private.exclude, private.is_excluded

    def eager(ctx: Any, *args: Any) -> Any:
        before = is_excluded(autograd)
        try:
            exclude(autograd, True)
            output = dispatch(*args)
        finally:
            exclude(autograd, before)
        if setup_context is not None:
            setup_context(ctx, args, output)
        return output

    def forward(ctx: Any, *args: Any) -> Any:
        # autograd.Function turns both modes off in here; an outer level of torch.func, which this
        # call may be passed on to, has to record them.
        with private.below_autograd(), torch.enable_grad(), private.set_forward_mode(True):
            output = eager(ctx, *args)
        ctx.set_materialize_grads(False)  # a tangent that is not there is None, not zeros
        ctx.save_for_forward(*(getattr(ctx, "to_save", None) or ()))
        return output

    def gradients(ctx: Any, *grads: Tensor | None) -> Any:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx, *grads)

    def tangents_of(ctx: Any, *tangents: Tensor | None) -> Any:
        # Again for outer levels. The tensors of this level have tangents, which are here.
        with private.set_forward_mode(True):
            primal = SimpleNamespace(
                saved_tensors=tuple(
                    forward_ad.unpack_dual(t, level=0).primal for t in ctx.saved_tensors
                ),
                options=getattr(ctx, "options", ()),
            )
            return jvp(primal, *tangents)

    def function(suffix: str, **methods: Any) -> Any:
        methods = {key: staticmethod(method) for key, method in methods.items()}
        return type(f"{name}_{suffix}", (private.SingleLevelFunction,), methods)

    _eager_functions[name] = function("eager_autograd", forward=eager, backward=backward).apply
    within_dispatch = function("autograd", forward=forward, backward=gradients, jvp=tangents_of)

    check = _check_tensors(name)

    def kernel(keyset: Any, *args: Any) -> Any:
        # Called in any case: it sees for itself who requires grad and who has a tangent.
        check(args)
        with private.single_level():
            return within_dispatch.apply(*args)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


def replace_in_eager(name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Let ``make(f)`` do what f, the autograd function of :func:`direct`, would do."""
    _eager_functions[name] = make(_eager_functions[name])


def sum_of_tangents(*terms: Tensor | None) -> Tensor | None:
    """Add up what each argument's tangent gives; None where an argument has no tangent."""
    total: Tensor | None = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


def backward_jvp(
    name: str,
    second_order: Callable[..., Tensor],
    refuse: Callable[..., None] = lambda tangent, *others: None,
) -> Callable[..., Tensor | None]:
    """Return the forward mode of an operator that is linear in its first argument.

    Args:
        name: the operator, which takes the tensors that are saved, and then ``ctx.options``.
        second_order: what a tangent of the second argument adds, given that tangent, the saved
            tensors and the options.
        refuse: raises where tangents of the second and later arguments go unused.
    """
    op = getattr(torch.ops.mnist_ops, name)

    def jvp(
        ctx: Any, first: Tensor | None, tangent: Tensor | None, *others: Tensor | None
    ) -> Tensor | None:
        refuse(tangent, *others)
        by_first = by_second = None
        if first is not None:
            by_first = op(first, *ctx.saved_tensors[1:], *ctx.options)
        if tangent is not None:
            by_second = second_order(tangent, *ctx.saved_tensors, *ctx.options)
        return sum_of_tangents(by_first, by_second)

    return jvp


def register_by_output(
    name: str,
    directional: Callable[..., Tensor],
    by_output: Callable[..., Tensor],
    second_order: Callable[..., Tensor],
) -> None:
    """Register the derivatives of an operator whose backward takes its output, and those of that.

    Args:
        name: the operator, y = name(input, *options), with ``name_backward(g, y, *options)``.
        directional: its derivative in the direction v, of (v, y, *options).
        by_output: of (v, g, y, *options), the gradient of v times the backward of g by y.
        second_order: of (t, g, y, *options), what a tangent t of y adds to the backward of g.
    """
    backward_name = f"{name}_backward"
    gradient = direct(backward_name)
    others = (None,) * (len(private.arguments(getattr(torch.ops.mnist_ops, name).default)) - 1)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.options = inputs[1:]

    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return gradient(grad_output, *ctx.saved_tensors, *ctx.options), *others

    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return directional(tangent, *ctx.saved_tensors, *ctx.options)

    def save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.options = inputs[2:]

    def double_backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        g, y = ctx.saved_tensors
        by_grad = directional(v, y, *ctx.options)
        return by_grad, by_output(v, g, y, *ctx.options), *others

    register_autograd(name, backward, jvp, save)
    forward_mode = backward_jvp(backward_name, second_order)
    register_autograd(backward_name, double_backward, forward_mode, save_backward)


def refuse_lone_tangent(name: str, result: str, tangent: Tensor | None, of: Tensor | None) -> None:
    """Refuse a tangent of a saved result without one of the input that it is a function of."""
    if tangent is not None and of is None:
        raise RuntimeError(
            f"mnist_ops: {name} takes {result} as a function of input, and no derivative with "
            f"respect to {result} alone is offered: give input a tangent, too"
        )


def register_image_vmap(name: str, images: int, other_tensors: int = 0) -> None:
    """Register a vmap rule by which images become one larger batch.

    The operator's first ``images`` arguments, and all of its results, are images; then come
    ``other_tensors`` tensors, which may be batched too (then there is one call for each), and
    arguments that are not tensors.
    """
    op = getattr(torch.ops.mnist_ops, name)

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        batched = [batch_first(args[i], in_dims[i], size) for i in range(images)]
        tensors = range(images, images + other_tensors)
        if any(in_dims[i] is not None for i in tensors):
            others = [batch_first(args[i], in_dims[i], size) for i in tensors]
            rest = args[tensors.stop :]
            if size == 0:  # the shape of what is not there
                one = op(*(b.new_ones(b.shape[1:]) for b in (*batched, *others)), *rest)
                return one.new_empty((0, *one.shape)), 0
            return torch.stack(
                [op(*(b[j] for b in batched), *(t[j] for t in others), *rest) for j in range(size)]
            ), 0
        per_example = batched[0].shape[1:-3]  # () or (N,)
        merged = [b.flatten(0, 1) if per_example else b for b in batched]
        result = op(*merged, *args[images:])
        outputs = result if isinstance(result, tuple) else (result,)
        split = tuple(r.reshape(size, *per_example, *r.shape[1:]) for r in outputs)
        return (split, (0,) * len(split)) if isinstance(result, tuple) else (split[0], 0)

    torch.library.register_vmap(f"mnist_ops::{name}", rule)


def check_integer(op: str, name: str, value: object, least: int) -> int:
    """Return an integer of at least ``least``."""
    number = check_int(op, name, value)
    if number < least:
        raise ValueError(f"{op}: {name} must be >= {least}, got {number}")
    return number
