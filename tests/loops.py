"""Every operator once more, as float64 loops written for reading: the tests' independent truth.

They follow the formulas of the docstrings, one output at a time, and share nothing with the
kernels. Images are (N, C, H, W).
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def window_count(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """How many windows lie along one dimension, found by laying them down one after the other."""
    count = 0
    while True:
        start = count * stride - padding
        if ceil_mode:
            # A window counts as long as something of the padded image is not covered yet and it
            # starts inside the image or its left padding.
            covered = start - stride + kernel if count else -padding
            if count and (covered >= size + padding or start >= size):
                return count
        elif start + kernel > size + padding:
            return count
        count += 1


def lp_pool_nd(
    x: Tensor,
    p: float,
    kernel: list[int],
    stride: list[int],
    sides: list[tuple[int, int]],
    gaps: list[int],
    ceil_mode: bool = False,
) -> Tensor:
    """Of one channel (L,), (H, W) or (D, H, W), with a padding before and after, and gaps."""
    starts = []
    for size, k, step, (before, after), gap in zip(
        x.shape, kernel, stride, sides, gaps, strict=True
    ):
        span, first, places = gap * (k - 1) + 1, -before, []
        while first + span <= size + after or (
            # The last window may reach over the end, where something is left to cover.
            ceil_mode and (places[-1] + span < size + after if places else True) and first < size
        ):
            places.append(first)
            first += step
        starts.append(places)
    out = torch.zeros([len(places) for places in starts], dtype=torch.float64)
    for index in itertools.product(*(range(len(places)) for places in starts)):
        total, largest = 0.0, 0.0
        for tap in itertools.product(*map(range, kernel)):
            place = [starts[d][index[d]] + tap[d] * gaps[d] for d in range(x.dim())]
            if all(0 <= i < size for i, size in zip(place, x.shape, strict=True)):
                value = abs(x[tuple(place)].item())
                largest = max(largest, value)
                total += 0.0 if math.isinf(p) else value**p
        out[index] = largest if math.isinf(p) else total ** (1 / p)
    return out


def lp_pool2d(
    x: Tensor,
    p: float,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    ceil_mode: bool = False,
) -> Tensor:
    k, pad = pair(kernel_size), pair(padding)
    s = k if stride is None else pair(stride)
    n, c, height, width = x.shape
    values = x.double().tolist()
    oh_count = window_count(height, k[0], s[0], pad[0], ceil_mode)
    ow_count = window_count(width, k[1], s[1], pad[1], ceil_mode)
    out = torch.zeros(n, c, oh_count, ow_count, dtype=torch.float64)
    for i, j, oh, ow in itertools.product(range(n), range(c), range(oh_count), range(ow_count)):
        window = [
            abs(values[i][j][h][w])
            for h in range(oh * s[0] - pad[0], oh * s[0] - pad[0] + k[0])
            for w in range(ow * s[1] - pad[1], ow * s[1] - pad[1] + k[1])
            if 0 <= h < height and 0 <= w < width
        ]
        largest = max(window, default=0.0)
        if any(math.isnan(v) for v in window):
            value = math.nan
        elif math.isinf(p) or largest == 0 or math.isinf(largest):
            value = largest
        else:
            value = largest * sum((v / largest) ** p for v in window) ** (1 / p)
        out[i, j, oh, ow] = value
    return out


def correlate(plane: Tensor, kernel: Tensor) -> Tensor:
    """Zero-padded cross-correlation of one (H, W) plane, of the same size."""
    kernel = kernel.double()
    if kernel.dim() == 1:
        kernel = torch.outer(kernel, kernel)
    kernel = kernel / kernel.sum()
    height, width = plane.shape
    k_h, k_w = kernel.shape
    out = torch.zeros(height, width, dtype=torch.float64)
    for h, w in itertools.product(range(height), range(width)):
        for i, j in itertools.product(range(k_h), range(k_w)):
            row, column = h + i - k_h // 2, w + j - k_w // 2
            if 0 <= row < height and 0 <= column < width:
                out[h, w] += kernel[i, j] * plane[row, column]
    return out


def subtractive_norm2d(x: Tensor, kernel: Tensor) -> Tensor:
    x = x.double()
    coef = correlate(torch.ones(x.shape[2:], dtype=torch.float64), kernel)
    return torch.stack([image - correlate(image.mean(0), kernel) / coef for image in x])


def divisive_norm2d(
    x: Tensor, kernel: Tensor, threshold: float = 1e-4, threshold_value: float | None = None
) -> Tensor:
    x = x.double()
    value = threshold if threshold_value is None else threshold_value
    coef = correlate(torch.ones(x.shape[2:], dtype=torch.float64), kernel)
    results = []
    for image in x:
        s = correlate((image**2).mean(0), kernel).sqrt() / coef
        results.append(image / torch.where(s > threshold, s, torch.full_like(s, value)))
    return torch.stack(results)


def contrastive_norm2d(
    x: Tensor, kernel: Tensor, threshold: float = 1e-4, threshold_value: float | None = None
) -> Tensor:
    return divisive_norm2d(subtractive_norm2d(x, kernel), kernel, threshold, threshold_value)


def norm_in_long_double(
    name: str, x: Tensor, kernel: Tensor, threshold: float, value: float, grad: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """divisive_norm2d or contrastive_norm2d with a separable kernel, and the gradient.

    In NumPy's long double, whose range holds the squares of every dtype's numbers.
    """
    wide = np.longdouble
    unit = kernel.numpy().astype(wide)
    unit /= unit.sum()
    radius, (height, width) = len(unit) // 2, x.shape[-2:]

    def band(size):
        matrix = np.zeros((size, size), dtype=wide)
        for i in range(size):
            for k in range(len(unit)):
                if 0 <= i + k - radius < size:
                    matrix[i, i + k - radius] = unit[k]
        return matrix

    rows, columns = band(height), band(width)

    def blur(plane):
        return np.einsum("ih,nhw,jw->nij", rows, plane, columns)[:, None]

    def adjoint(plane):
        return np.einsum("hi,nhw,wj->nij", rows, plane[:, 0], columns)[:, None]

    channels = wide(x.shape[1])
    z, g = (t.double().numpy().astype(wide) for t in (x, grad))
    coef = blur(np.ones((1, height, width), dtype=wide))
    if name == "contrastive_norm2d":
        z = z - blur(z.sum(1)) / channels / coef
    s = np.sqrt(blur((z * z).sum(1)) / channels) / coef
    above = s > threshold
    d = np.where(above, s, wide(value))
    safe = np.where(above, s, wide(1))
    h = np.where(above, (g * z).sum(1, keepdims=True) / (safe**3 * coef**2), wide(0))
    gz = g / d - z * adjoint(h) / channels
    if name == "contrastive_norm2d":
        gz = gz - adjoint(gz.sum(1, keepdims=True) / coef) / channels
    return z / d, gz


def assert_close_at_any_scale(ours: Tensor, expected: np.ndarray, tolerance: float) -> None:
    """Compare images, relative to the largest number of each that their dtype holds."""
    info = torch.finfo(ours.dtype)
    for image, reference in zip(ours.cpu().double().numpy(), expected, strict=True):
        scale = np.abs(reference).max()
        if scale > np.longdouble(info.max):
            continue
        error = np.abs(image.astype(np.longdouble) - reference).max()
        assert error <= tolerance * scale + np.longdouble(info.smallest_normal), (error, scale)


def stage2d(
    x: Tensor,
    kernel: Tensor,
    activation: str = "tanh",
    norm_type: float = 2.0,
    kernel_size: int | tuple[int, int] = 2,
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    ceil_mode: bool = False,
) -> Tensor:
    squash = {
        "tanh": math.tanh,
        "relu": lambda v: v if v > 0 or math.isnan(v) else 0.0,
        "sigmoid": lambda v: 1 / (1 + math.exp(-v)),
        "identity": lambda v: v,
    }[activation]
    values = [squash(v) for v in x.double().flatten().tolist()]
    a = torch.tensor(values, dtype=torch.float64).reshape(x.shape)
    pooled = lp_pool2d(a, norm_type, kernel_size, stride, padding, ceil_mode)
    return subtractive_norm2d(pooled, kernel)


def sigmoid(x: Tensor) -> Tensor:
    values = [
        1 / (1 + math.exp(-v)) if v > -700 else math.exp(v) for v in x.double().flatten().tolist()
    ]
    return torch.tensor(values, dtype=torch.float64).reshape(x.shape)


def log_softmax(x: Tensor, dim: int = -1, beta: float = 1.0) -> Tensor:
    rows = (beta * x.double()).movedim(dim, -1)
    out = []
    for row in rows.reshape(-1, rows.shape[-1]).tolist():
        largest = max(row)
        total = math.fsum(math.exp(v - largest) for v in row)
        out.append([v - largest - math.log(total) for v in row])
    return torch.tensor(out, dtype=torch.float64).reshape(rows.shape).movedim(-1, dim)


def softmax(x: Tensor, dim: int = -1, beta: float = 1.0) -> Tensor:
    return log_softmax(x, dim, beta).exp()


def softmax_nll(x: Tensor, target: Tensor, beta: float = 1.0) -> Tensor:
    """Losses of scores (N, C), one for each row."""
    logs = log_softmax(x, 1, beta)
    return torch.stack([-row[t] for row, t in zip(logs, target.tolist(), strict=True)])
