"""The operators, one module for each family: function, fake kernel, autograd, vmap, autocast."""

from . import definitions  # noqa: F401  # for devices without kernels
from .kernels import gaussian1d, gaussian2d
from .local_mean import local_mean2d
from .local_norm import contrastive_norm2d, divisive_norm2d, subtractive_norm2d
from .lp_pool import lp_pool2d
from .lp_pool_nd import lp_pool1d, lp_pool3d
from .sigmoid import sigmoid
from .softmax import log_softmax, softmax, softmax_nll
from .stage import stage2d

__all__ = [
    "contrastive_norm2d",
    "divisive_norm2d",
    "gaussian1d",
    "gaussian2d",
    "local_mean2d",
    "log_softmax",
    "lp_pool1d",
    "lp_pool2d",
    "lp_pool3d",
    "sigmoid",
    "softmax",
    "softmax_nll",
    "stage2d",
    "subtractive_norm2d",
]
