"""The names of torch that the package uses though they are not public, all in this one place.

Each says what it is for and what happens where torch has it no longer. What cannot be done
without ends the import with an error that names it. Not here are the methods that
``torch.nn.Module`` calls on its subclasses (``_apply``, ``_load_from_state_dict``).
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def _required(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        raise ImportError(
            f"mnist_ops needs {owner.__name__}.{name}, a private name that torch "
            f"{torch.__version__} does not have: install another torch or a newer mnist_ops"
        ) from None


def _optional(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


# The context in which the dispatcher skips autograd: what an Autograd kernel calls the kernels in.
# There is no other way to reach them: an error.
below_autograd: Callable[[], Any] = _required(torch._C, "_AutoDispatchBelowAutograd")

# The same for tensors of the CPU and of CUDA, without an object: 0.1 us where the context takes
# 0.3, an eighth of a small call. What exclude sets holds for the thread; is_excluded says what to
# restore. Without these names exclude does nothing: the Autograd kernel, which then comes, enters
# the context.
AUTOGRAD: Any = getattr(getattr(torch._C, "DispatchKey", None), "AutogradFunctionality", None)
exclude: Any = getattr(torch._C, "_dispatch_tls_set_dispatch_key_excluded", None)
is_excluded: Any = getattr(torch._C, "_dispatch_tls_is_dispatch_key_excluded", None)
if None in (AUTOGRAD, exclude, is_excluded):
    exclude, is_excluded = (lambda key, value: None), (lambda key: False)

# Switches the recording of tangents on within an autograd function, for the outer levels of nested
# transforms. Without it derivatives would be 0 there and nobody told: an error.
set_forward_mode: Callable[[bool], Any] = _required(forward_ad, "_set_fwd_grad_enabled")

# The autograd function that handles one level of nested torch.func transforms, and what allows it
# to be called among them. Without them PyTorch's own take their place: autograd and forward mode
# work, torch.func.grad of an operator is PyTorch's error.
SingleLevelFunction: Any = getattr(torch.autograd.function, "_SingleLevelFunction", None)
single_level: Any = _optional(
    "torch._functorch.autograd_function", "enable_single_level_autograd_function"
)
if SingleLevelFunction is None or single_level is None:
    SingleLevelFunction, single_level = torch.autograd.Function, contextlib.nullcontext

# Not None within torch.func's transforms. Without it every call counts as being within one and
# takes the longer way through the dispatcher.
transforms: Callable[[], Any] = _optional("torch._C._functorch", "peek_interpreter_stack") or (
    lambda: True
)

# Whether autocast is on for some device. Without it the devices with kernels are asked.
autocast: Callable[[], bool] = getattr(
    torch._C,
    "_is_any_autocast_enabled",
    lambda: any(map(torch.is_autocast_enabled, ("cpu", "cuda"))),
)

# Whether torch.jit.trace records; what torch.jit.is_tracing() asks in three times the time.
is_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)

# As a name of this module: two lookups less in every call.
is_dynamo = torch.compiler.is_dynamo_compiling


def within_dual_level() -> bool:
    """Whether tensors can have tangents now: within ``forward_ad.dual_level`` or ``func.jvp``.

    Without ``_current_level`` every tensor may have one, and calls take the longer way.
    """
    return getattr(forward_ad, "_current_level", 0) >= 0


def past_eager() -> bool:
    """Whether Dynamo or torch.jit traces, torch.func transforms, or tensors can have tangents."""
    return is_dynamo() or is_tracing() or transforms() is not None or within_dual_level()


def entry(op: Any) -> Callable[..., Any]:
    """What calling an operator calls, a microsecond sooner; without ``_op`` the operator itself."""
    return getattr(op, "_op", op)


def arguments(op: Any) -> Any:
    """The arguments in an operator's schema. There is no other way to learn them: an error."""
    return _required(op, "_schema").arguments


def foreach(name: str) -> Callable[..., Any]:
    """``Tensor.<name>`` for a list of tensors in one call; in a loop without ``_foreach_<name>``.

    At batch size 1 a loop over a network's parameters costs more than the arithmetic.
    """
    one = getattr(Tensor, name)

    def loop(tensors: Any, other: Any, **options: Any) -> list[Tensor]:
        others = other if isinstance(other, (list, tuple)) else [other] * len(tensors)
        return [one(t, o, **options) for t, o in zip(tensors, others, strict=True)]

    return getattr(torch, f"_foreach_{name}", loop)


def version(tensor: Tensor) -> object:
    """A number that changes when the tensor is written to, to see whether a copy still holds.

    Where there is none, as of tensors made in ``torch.inference_mode()``, it never holds.
    """
    try:
        return tensor._version
    except (AttributeError, RuntimeError):
        return object()


def has_hooks(module: nn.Module) -> bool:
    """Whether forward or backward hooks are registered; yes where nobody can tell."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind, True) for kind in kinds)


# What follows only tests and benchmarks call; where it is gone, an error says so when they do.


def operators(namespace: str) -> set[str]:
    """The names of all operators in a namespace, those that were never called as well."""
    schemas = _required(torch._C, "_jit_get_all_schemas")()
    names = (schema.name.split("::") for schema in schemas)
    return {name for space, name in names if space == namespace}


def dispatch_table(op: str) -> dict[str, str]:
    """For each dispatch key where the kernel of an operator was registered."""
    table = _required(torch._C, "_dispatch_dump_table")(op)
    return dict(line.split(": ", 1) for line in table.splitlines() if ": " in line)


def fake_mode() -> Any:
    """The mode in which tensors have no values and operators run their fake kernels."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def negated(tensor: Tensor) -> Tensor:
    """A view whose values are negated when they are read."""
    return _required(torch, "_neg_view")(tensor)


def sleep_on_gpu(cycles: int) -> None:
    """Keep the current stream busy."""
    _required(torch.cuda, "_sleep")(cycles)
