"""The initial values of Torch7's layers, and the random words that go by before them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from .. import nn as ops_nn
from .random import Generator

__all__ = ["initialize", "normalization_words", "start"]

# Loading Torch7's ``nn`` package builds one Linear(1, 2): two weights and two biases.
STARTUP_WORDS = 4


def start(
    seed: int = 1, data_kernel_size: int | None = 7, startup_words: int = STARTUP_WORDS
) -> Generator:
    """A generator as the original script has it when it begins to build the network.

    Args:
        seed: the script's ``-seed``.
        data_kernel_size: taps of the kernel of the data's contrastive normalization, whose layers
            draw initial values of their own; ``None`` for data normalised globally only.
        startup_words: drawn before anything else; 0 as in a second run within one process, where
            the layers' package is there before the seed is set.
    """
    generator = Generator(seed)
    generator.consume(startup_words)
    if data_kernel_size is not None:
        # Contrastive = subtractive (one estimator) then divisive (two estimators).
        generator.consume(3 * normalization_words((data_kernel_size,), channels=1))
    return generator


def normalization_words(kernel_shape: Sequence[int], channels: int) -> int:
    """Random words consumed when Torch7 builds one mean or standard-deviation estimator.

    The estimator is made of convolutions that draw initial values before the kernel overwrites
    them: for a 1-D kernel of n taps a depth-wise row filter (C n weights, C biases) and a column
    filter (C n weights, 1 bias); for a 2-D kernel one convolution.
    """
    if len(kernel_shape) == 1:
        return 2 * channels * kernel_shape[0] + channels + 1
    return channels * math.prod(kernel_shape) + 1


def initialize(model: nn.Module, generator: Generator, in_channels: int = 1) -> nn.Module:
    """Give ``model`` Torch7's initial values, drawn from ``generator`` in Torch7's order.

    Layer by layer in the order of definition: ``Conv2d`` draws its weight (row-major), then its
    bias, uniform in +-1/sqrt(kH kW C_in); ``Linear`` likewise in +-1/sqrt(in_features). The
    normalization layers have no parameters but consume words (:func:`normalization_words`): a
    subtractive one, alone or at the end of a :class:`mnist_ops.nn.Stage2d`, builds one estimator, a
    divisive one two, a contrastive one three.

    The numbers are drawn in float64 and rounded to the parameters' dtype.

    Args:
        model: made of ``Conv2d``, ``Linear`` and layers without parameters.
        generator: where the words come from.
        in_channels: channels of the network's input, for a normalization before any convolution.

    Returns:
        ``model``, changed in place.

    Raises:
        TypeError: if another layer has parameters: Torch7's draws for it are not known here.
    """
    estimators = {
        ops_nn.SubtractiveNorm2d: 1,
        ops_nn.Stage2d: 1,
        ops_nn.DivisiveNorm2d: 2,
        ops_nn.ContrastiveNorm2d: 3,
    }
    channels = in_channels
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            bound = 1.0 / math.sqrt(module.weight[0].numel())
            with torch.no_grad():
                module.weight.copy_(generator.uniform(-bound, bound, module.weight.shape))
                if module.bias is not None:
                    module.bias.copy_(generator.uniform(-bound, bound, module.bias.shape))
            if isinstance(module, nn.Conv2d):
                channels = module.out_channels
        elif type(module) in estimators:
            words = normalization_words(module.kernel.shape, channels)
            generator.consume(estimators[type(module)] * words)
        elif next(module.parameters(recurse=False), None) is not None:
            raise TypeError(
                f"initialize: layer {name!r} is a {type(module).__name__}; "
                "Torch7's initial values are known for Conv2d and Linear only"
            )
    return model
