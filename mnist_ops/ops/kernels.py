"""Gaussian kernels, as Torch7's image package makes them."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import FLOATING, check_int, check_number, pair


def gaussian1d(
    size: int,
    sigma: float = 0.25,
    amplitude: float = 1.0,
    center: float = 0.5,
    normalize: bool = False,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | int = "cpu",
) -> Tensor:
    r"""Sample a Gaussian at ``size`` points.

    .. math:: k_i = a \exp\!\Big(-\frac12 \Big(
              \frac{i + 1 - (\text{center} \cdot n + 0.5)}{\sigma n}\Big)^2\Big),
              \qquad i = 0 \ldots n - 1

    Args:
        size: n, the number of taps; odd for a kernel of the normalizations.
        sigma: standard deviation in units of ``size``.
        amplitude: the largest value, a.
        center: position of the maximum in units of ``size``; 0.5 is the middle.
        normalize: divide by the sum (``amplitude`` then cancels).
        dtype: of the result; it is computed in float64.
        device: of the result. The default is the CPU, whatever PyTorch's default device is: the
            operators move a kernel to the device of their input.

    Returns:
        A tensor (size,).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: ``size`` < 1, ``sigma`` <= 0.

    Source:
        Torch7's ``image.gaussian1D``.

    Example:
        >>> import mnist_ops
        >>> mnist_ops.gaussian1d(3)
        tensor([0.4111, 1.0000, 0.4111], dtype=torch.float64)
    """
    op = "gaussian1d"
    size = check_int(op, "size", size)
    if not 1 <= size < 2**31:
        raise ValueError(f"{op}: size must be positive and below 2^31, got {size}")
    sigma, amplitude = check_number(op, "sigma", sigma), check_number(op, "amplitude", amplitude)
    center = check_number(op, "center", center)
    if not sigma > 0:
        raise ValueError(f"{op}: sigma must be > 0, got {sigma}")
    check_dtype(op, dtype)
    i = torch.arange(1, size + 1, dtype=torch.float64, device="cpu")
    kernel = amplitude * torch.exp(-(((i - (center * size + 0.5)) / (sigma * size)) ** 2) / 2)
    return (kernel / kernel.sum() if normalize else kernel).to(device, dtype)


def check_dtype(op: str, dtype: object) -> None:
    """Refuse a type that no kernel can have."""
    if not isinstance(dtype, torch.dtype) or dtype not in FLOATING:
        raise TypeError(f"{op}: dtype must be float64, float32, float16 or bfloat16, got {dtype!r}")


def gaussian2d(
    size: int | tuple[int, int],
    sigma: float = 0.25,
    amplitude: float = 1.0,
    center: float = 0.5,
    normalize: bool = False,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | int = "cpu",
) -> Tensor:
    """Sample a Gaussian on a grid: ``amplitude`` times the outer product of two :func:`gaussian1d`.

    Args:
        size: height and width; one int or two.
        sigma: as in :func:`gaussian1d`, in units of each side.
        amplitude: the largest value.
        center: as in :func:`gaussian1d`, in units of each side.
        normalize: divide by the sum.
        dtype: as in :func:`gaussian1d`.
        device: as in :func:`gaussian1d`.

    Returns:
        A tensor (height, width).

    Raises:
        TypeError, ValueError: as in :func:`gaussian1d`.

    Source:
        Torch7's ``image.gaussian``.

    Example:
        >>> import mnist_ops
        >>> mnist_ops.gaussian2d(3)[1]
        tensor([0.4111, 1.0000, 0.4111], dtype=torch.float64)
    """
    op = "gaussian2d"
    height, width = pair(op, "size", size)
    check_dtype(op, dtype)
    rows = gaussian1d(height, sigma, 1.0, center)
    columns = gaussian1d(width, sigma, 1.0, center)
    kernel = check_number(op, "amplitude", amplitude) * torch.outer(rows, columns)
    return (kernel / kernel.sum() if normalize else kernel).to(device, dtype)
