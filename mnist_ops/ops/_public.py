"""What the public functions take beside plain tensors: proxies of torch.fx, and DTensors."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Collection
from typing import Any, ParamSpec

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ._common import PLAIN, is_channels_last

_P = ParamSpec("_P")


def public(
    shardable: Callable[[dict[str, Any]], Collection[int]],
) -> Callable[[Callable[_P, Tensor]], Callable[_P, Tensor]]:
    """Decorate a public function, whose first argument is ``input``.

    What has ``__torch_function__`` is asked first, as PyTorch's functions do: torch.fx records the
    call as one node. A DTensor is computed shard by shard.

    Args:
        shardable: from the arguments by name, the dimensions of ``input`` that may be divided among
            devices: each part is computed without the others, and the result has these dimensions
            in the same places. Over others the input is gathered first. ``target``, and a
            ``threshold`` for each image, are divided as ``input`` is, other tensors are gathered.
    """

    def decorate(function: Callable[_P, Tensor]) -> Callable[_P, Tensor]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> Tensor:
            kind = type(args[0] if args else kwargs.get("input"))
            if kind not in PLAIN:
                values = (*args, *kwargs.values())
                if has_torch_function(values):
                    return handle_torch_function(call, values, *args, **kwargs)
                # Who has a DTensor has imported this module; import mnist_ops should not.
                distributed = sys.modules.get("torch.distributed.tensor")
                if distributed and issubclass(kind, distributed.DTensor):
                    arguments = signature.bind(*args, **kwargs).arguments
                    return _by_shards(distributed, function, shardable(arguments), arguments)
            return function(*args, **kwargs)

        return call

    return decorate


def _by_shards(
    distributed: Any,
    function: Callable[..., Tensor],
    shardable: Collection[int],
    arguments: dict[str, Any],
) -> Tensor:
    input = arguments["input"]
    mesh, whole = input.device_mesh, distributed.Replicate()
    places = [p if p.is_shard() and p.dim in shardable else whole for p in input.placements]
    local = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, distributed.DTensor):
            if name in ("input", "target") or (name == "threshold" and value.dim()):
                local[name] = value.redistribute(mesh, places).to_local()
            else:  # each device has its images' part of the gradient
                parts = [distributed.Partial() if p.is_shard() else whole for p in places]
                gathered = value.redistribute(mesh, [whole] * mesh.ndim)
                local[name] = gathered.to_local(grad_placements=parts)
    result = function(**local)
    shape = list(result.shape)
    for place in places:
        if place.is_shard():
            shape[place.dim] = input.shape[place.dim]
    layout = torch.channels_last if is_channels_last(result) else torch.contiguous_format
    strides = torch.empty(shape, device="meta", memory_format=layout).stride()
    return distributed.DTensor.from_local(
        result, mesh, places, run_check=False, shape=torch.Size(shape), stride=strides
    )


def planes(arguments: dict[str, Any]) -> Collection[int]:
    """The dimensions of images but for height and width."""
    return range(arguments["input"].dim() - 2)


def batch(arguments: dict[str, Any]) -> Collection[int]:
    """The first dimension of a batch of images, none of a single image."""
    return range(arguments["input"].dim() - 3)
