"""Torch7's random numbers, initialisation, log-softmax and criteria: what makes digits match.

A run of the original scripts is one stream of 32-bit words from a Mersenne Twister, drawn in a
fixed order: start-up, the layers' initial values, then one shuffle before each epoch. This module
draws the same words in the same order::

    >>> from mnist_ops.mnist import models
    >>> from mnist_ops import torch7
    >>> generator = torch7.start(seed=1)            # as the script stands before it builds the net
    >>> model = models.convnet(dtype=torch.float64, generator=generator)
    >>> generator.randperm(60000)[:3]
    tensor([27186, 35875, 55840])

Torch7 counts classes and indices from 1; everything here counts from 0.
"""

from __future__ import annotations

from .initialization import STARTUP_WORDS, initialize, normalization_words, start
from .losses import (
    Dropout,
    LogSoftmax,
    Softmax,
    class_targets,
    log_softmax,
    mse_loss,
    multi_margin_loss,
    nll_loss,
)
from .network import load_net
from .random import Generator

__all__ = [
    "STARTUP_WORDS",
    "Dropout",
    "Generator",
    "LogSoftmax",
    "Softmax",
    "class_targets",
    "initialize",
    "load_net",
    "log_softmax",
    "mse_loss",
    "multi_margin_loss",
    "nll_loss",
    "normalization_words",
    "start",
]
