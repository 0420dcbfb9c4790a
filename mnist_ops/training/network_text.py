"""A network in the compiled engine's words: a line for each layer, as network_text.h reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _libraries, torch7
from .. import _torch_private as private
from .. import nn as ops_nn
from ..ops._common import pair
from ..ops.softmax import check_beta
from ..ops.windows import check_windows, has_sides


class UnsupportedError(ValueError):
    """The network or the optimizer is none that the engine knows; :attr:`reason` says what."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"OnlineSGD: {reason}; use the autograd loop (training.AutogradEngine)")
        self.reason = reason


class Network(NamedTuple):
    """A module as the engine takes it: the text, and the tensors that its lines take in turn."""

    text: str
    parameters: list[nn.Parameter]
    kernels: list[Tensor]
    dropouts: list[torch7.Dropout]


def read(model: nn.Module) -> Network:
    """Turn a module into the engine's text, and refuse what it cannot say."""
    lines: list[str] = []
    parameters: list[nn.Parameter] = []
    kernels: list[Tensor] = []
    dropouts: list[torch7.Dropout] = []
    seen: set[int] = set()
    dtype = next((p.dtype for p in model.parameters()), torch.float64)
    for name, module in layers(model):
        lines.append(f"{line(name, module, dtype)} {' '.join(name.split())}")
        where = f"layer {name!r} ({type(module).__name__})"
        for parameter_name, parameter in module.named_parameters():
            if id(parameter) in seen:
                raise UnsupportedError(f"{where} shares its {parameter_name} with another layer")
            if not parameter.requires_grad:
                raise UnsupportedError(f"{where} has a frozen {parameter_name}")
            if parameter.device.type not in ("cpu", "cuda"):
                raise UnsupportedError(
                    f"{where} is on {parameter.device}, the engine runs on the CPU and on CUDA"
                )
            missing = _libraries.CUDA_MISSING
            if not parameter.is_cuda:
                missing = "the CPU's are not loaded" * (_libraries.CPU_CAPABILITY == "none")
            if missing:
                raise UnsupportedError(f"{where} is on {parameter.device}: {missing}")
            if parameter.dtype not in (torch.float64, torch.float32):
                raise UnsupportedError(f"{where} is {parameter.dtype}, not float64 or float32")
            seen.add(id(parameter))
            parameters.append(parameter)
        if type(module) is ops_nn.SubtractiveNorm2d:
            kernels.append(module.kernel)
        if isinstance(module, torch7.Dropout) and module.p > 0:
            dropouts.append(module)
    if not parameters:
        raise UnsupportedError("the network has no parameters")
    devices = {tensor.device for tensor in (*parameters, *kernels)}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise UnsupportedError(f"the network must be on one device, got {names}")
    dtypes = {parameter.dtype for parameter in parameters}
    if len(dtypes) > 1:
        names = ", ".join(sorted(map(str, dtypes)))
        raise UnsupportedError(f"the parameters must have one dtype, got {names}")
    if len({id(module.generator) for module in dropouts}) > 1:
        raise UnsupportedError("the Dropout layers must draw from one generator")
    return Network("\n".join(lines), parameters, kernels, dropouts)


def layers(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers in the order of forward, with their names in the model."""
    if private.has_hooks(module):
        raise UnsupportedError(f"layer {name or type(module).__name__!r} has hooks")
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        # named_children would leave out a layer that comes a second time.
        for child_name, child in module.named_modules(remove_duplicate=False):
            if child is not module and "." not in child_name:
                yield from layers(child, f"{name}.{child_name}" if name else child_name)
    elif type(module) is ops_nn.Stage2d:
        yield from layers(module.unfused(), name)
    elif not isinstance(module, nn.Identity):
        yield name or type(module).__name__, module


def line(name: str, module: Any, dtype: torch.dtype) -> str:
    """One layer in the engine's words; csrc/online/network_text.h lists them."""
    kind: type[nn.Module] = type(module)
    where = f"layer {name!r} ({kind.__name__})"

    def need(condition: bool, what: str) -> None:
        if not condition:
            raise UnsupportedError(f"{where} {what}")

    def pool() -> str:
        stride = module.kernel_size if module.stride is None else module.stride
        values = (module.kernel_size, stride, module.padding)
        numbers = [n for value in values for n in pair(where, "kernel_size", value)]
        return " ".join(map(str, [*numbers, int(module.ceil_mode)]))

    if kind is nn.Conv2d:
        need(pair(where, "stride", module.stride) == [1, 1], f"has stride {module.stride}, not 1")
        need(pair(where, "dilation", module.dilation) == [1, 1], f"has dilation {module.dilation}")
        need(module.groups == 1, f"has {module.groups} groups")
        need(module.padding_mode == "zeros", f"has padding_mode {module.padding_mode!r}")
        kernel = pair(where, "kernel_size", module.kernel_size)
        if module.padding == "valid":
            padding = [0, 0]
        elif module.padding == "same":
            need(all(k % 2 == 1 for k in kernel), "has padding 'same' of an even kernel")
            padding = [k // 2 for k in kernel]
        else:
            padding = pair(where, "padding", module.padding)
        numbers = [module.out_channels, *kernel, *padding, int(module.bias is not None)]
        return "conv2d " + " ".join(map(str, numbers))
    if kind is nn.Linear:
        return f"linear {module.out_features} {int(module.bias is not None)}"
    if kind in _PLAIN:
        return _PLAIN[kind]
    if kind is ops_nn.LPPool2d:
        need(not has_sides(module.padding), f"has padding {module.padding}")
        options = (module.kernel_size, module.stride, module.padding, module.ceil_mode)
        p, *_ = check_windows(where, module.norm_type, *options, dtype)
        need(pair(where, "dilation", module.dilation) == [1, 1], f"has dilation {module.dilation}")
        return f"lp_pool2d {float(p)!r} {pool()}"
    if kind is nn.MaxPool2d:
        need(pair(where, "dilation", module.dilation) == [1, 1], f"has dilation {module.dilation}")
        need(not module.return_indices, "has return_indices")
        return f"max_pool2d {pool()}"
    if kind is nn.AvgPool2d:
        divisor = module.divisor_override or 0
        return f"avg_pool2d {pool()} {int(module.count_include_pad)} {divisor}"
    if kind is nn.Flatten:
        need(
            module.start_dim == 1 and module.end_dim == -1,
            f"flattens the dimensions {module.start_dim} to {module.end_dim}, not 1 to -1",
        )
        return "flatten"
    if kind is torch7.Dropout:
        return f"dropout {float(module.p)!r}" if module.p > 0 else "identity"
    if kind in (nn.LogSoftmax, ops_nn.LogSoftmax):
        need(module.dim in (1, -1), f"normalises dimension {module.dim}, not the classes (1 or -1)")
        beta = check_beta(where, getattr(module, "beta", 1.0), dtype)
        return f"log_softmax {float(beta)!r}"
    raise UnsupportedError(f"{where} is not one of the engine's layers")


_PLAIN: dict[type[nn.Module], str] = {
    nn.Tanh: "tanh",
    nn.ReLU: "relu",
    nn.Sigmoid: "sigmoid",
    ops_nn.Sigmoid: "sigmoid",
    ops_nn.SubtractiveNorm2d: "subtractive_norm2d",
    torch7.LogSoftmax: "log_softmax_torch7",
}
