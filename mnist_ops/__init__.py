"""Torch7's classic vision layers as PyTorch operators with C++ and CUDA kernels.

The operators are here and, as modules, in :mod:`mnist_ops.nn`. On them stand, each on those before
it, :mod:`mnist_ops.torch7` (what else Torch7 computes), :mod:`mnist_ops.mnist` (the digits and
networks), :mod:`mnist_ops.training` (the loop) and :mod:`mnist_ops.lab` (every experiment of two
reports of 2016). They load when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from . import _libraries  # isort: skip  # registers the operators that ops refers to
from . import nn
from ._version import __version__
from .ops import (
    contrastive_norm2d,
    divisive_norm2d,
    gaussian1d,
    gaussian2d,
    local_mean2d,
    log_softmax,
    lp_pool1d,
    lp_pool2d,
    lp_pool3d,
    sigmoid,
    softmax,
    softmax_nll,
    stage2d,
    subtractive_norm2d,
)

build_info = _libraries.build_info

_LAZY = ("lab", "mnist", "torch7", "training")

__all__ = [
    "__version__",
    "build_info",
    "contrastive_norm2d",
    "divisive_norm2d",
    "gaussian1d",
    "gaussian2d",
    "local_mean2d",
    "log_softmax",
    "lp_pool1d",
    "lp_pool2d",
    "lp_pool3d",
    "nn",
    "sigmoid",
    "softmax",
    "softmax_nll",
    "stage2d",
    "subtractive_norm2d",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    """Import a submodule when it is first used: torchvision and the rest take seconds."""
    if name in _LAZY or name == "onnx":  # not in __all__: it needs the extra onnx
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
