"""local_mean2d against loops, SciPy, piq and what subtractive_norm2d subtracts."""

from __future__ import annotations

import doctest
import math

import loops
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from mnist_ops import gaussian1d, gaussian2d, local_mean2d, subtractive_norm2d
from mnist_ops.ops import local_mean

MODES = {"zeros": "constant", "reflect": "mirror", "replicate": "nearest"}  # SciPy's names
KERNELS = [gaussian1d(5), gaussian2d((3, 5)), torch.rand(5, 3, dtype=torch.float64)]
kernels = pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: str(tuple(k.shape)))
channels = pytest.mark.parametrize("channels", ["all", "each"])


def images(device: str = "cpu", **options) -> torch.Tensor:
    return torch.randn(2, 3, 6, 7, dtype=torch.float64, device=device, **options)


def correlated(image: torch.Tensor, kernel: torch.Tensor, mode: str) -> torch.Tensor:
    """The image with what lies beyond its border, correlated by loops."""
    (height, width), (top, left) = image.shape, (kernel.shape[0] // 2, kernel.shape[-1] // 2)

    def inside(i: int, size: int) -> int | None:
        if 0 <= i < size:
            return i
        if mode == "reflect":
            return -i if i < 0 else 2 * size - 2 - i
        return min(max(i, 0), size - 1) if mode == "replicate" else None

    padded = torch.zeros(height + 2 * top, width + 2 * left, dtype=image.dtype)
    for h in range(-top, height + top):
        for w in range(-left, width + left):
            place = inside(h, height), inside(w, width)
            if None not in place:
                padded[h + top, w + left] = image[place]
    result = loops.correlate(padded, kernel)[top : top + height, left : left + width]
    if mode == "renormalized":
        result = result / loops.correlate(torch.ones(height, width), kernel)
    return result


@kernels
@pytest.mark.parametrize("mode", ["renormalized", *MODES])
def test_equals_the_loops(device, kernel, mode):
    x = images()
    y = local_mean2d(x.to(device), kernel, "each", mode).cpu()
    for image, result in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True):
        torch.testing.assert_close(result, correlated(image, kernel, mode))
    of_all = local_mean2d(x.to(device), kernel, "all", mode).cpu()
    assert of_all.shape == (2, 1, 6, 7)
    torch.testing.assert_close(of_all, y.mean(1, keepdim=True))


@kernels
@pytest.mark.parametrize("mode", list(MODES))
def test_equals_scipy(kernel, mode):
    ndimage = pytest.importorskip("scipy.ndimage")
    x = images()
    weights = kernel if kernel.dim() == 2 else torch.outer(kernel, kernel)
    weights = weights / weights.sum()
    y = local_mean2d(x, kernel, "each", mode)
    for image, result in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True):
        expected = ndimage.correlate(image.numpy(), weights.numpy(), mode=MODES[mode])
        torch.testing.assert_close(result, torch.from_numpy(expected))


@kernels
def test_it_is_what_is_subtracted(device, kernel):
    x = images(device)
    mean = local_mean2d(x, kernel.to(device))
    torch.testing.assert_close(x - mean, subtractive_norm2d(x, kernel.to(device)))
    torch.testing.assert_close(local_mean2d(x[0], kernel.to(device)), mean[0])


def test_weights_are_as_exact_as_the_images(device):
    x, kernel = torch.rand(2, 5, 5, dtype=torch.float64, device=device), torch.rand(3).half()
    torch.testing.assert_close(local_mean2d(x, kernel), local_mean2d(x, kernel.double()))


# MSCN coefficients (BRISQUE) of the picture below by piq 0.8.0, the argument that
# _natural_scene_statistics() hands to _ggd_parameters(); 7 x 7 taps, zeros beyond the border.
PIQ = """
 1.5169739  0.9254134  0.1916735 -0.2154828 -0.0488164  0.4589306  0.8205807  0.7620091  0.5425549
-0.0961098 -0.0220108  0.6610484  1.0157284  0.6988676  0.0244170 -0.2977361  0.2197900  1.2064792
 1.0879174  0.4465586 -0.4838054 -0.7643945 -0.0364910  1.0547923  1.4518786  1.0461982  0.6605961
-0.2189741  0.1021197  1.0524219  1.4962520  0.7838975 -0.2062554 -0.5238435 -0.1221855  0.5907249
 0.8611035  0.2752931 -0.4831725 -0.5151034  0.1915607  0.6864203  0.5315766 -0.1977587 -0.7243169
-0.1654650  0.4677486  1.3598107  1.1496666  0.1014727 -0.9487557 -1.3887678 -0.6355326  0.8788310
 0.7669918  0.3655736 -0.0607857 -0.1774176  0.0143463  0.2662563  0.2931375  0.2538937  0.6268280
 0.3248406  1.1087417  1.3579820  0.7987203 -0.2262163 -0.8268741  0.0631383  1.3013328  1.9841527
"""


@pytest.mark.parametrize("whole", [False, True])
def test_equals_piq(device, whole):
    i, j = torch.arange(8.0).double()[:, None], torch.arange(9.0).double()
    x = 255 * (0.5 + 0.3 * torch.sin(i * j / 7) + 0.2 * torch.cos(3 * i - j))
    window = gaussian1d(7, sigma=1 / 6)
    window = torch.outer(window, window) if whole else window
    x = x[None].to(device)
    mean, square = (local_mean2d(v, window, padding_mode="zeros") for v in (x, x.square()))
    y = (x - mean) / ((square - mean.square()).abs().sqrt() + 1)
    expected = torch.tensor([float(v) for v in PIQ.split()], dtype=torch.float64).view(1, 8, 9)
    torch.testing.assert_close(y.cpu(), expected, rtol=0, atol=1e-6)


@kernels
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_special_values_stay_where_they_are(device, kernel, mode, layout):
    """Forward and backward: pixels that a NaN or an infinity does not reach have their numbers."""
    x = torch.randn(1, 2, 12, 14, dtype=torch.float64, device=device).to(memory_format=layout)
    special = x.clone()
    special[..., 0, 0], special[..., 6, 7], special[..., -1, 3] = math.inf, math.nan, -math.inf
    rows, columns = kernel.shape[0] // 2, kernel.shape[-1] // 2
    near = torch.zeros(12, 14, dtype=torch.bool, device=device)
    for h, w in ((0, 0), (6, 7), (11, 3)):
        near[max(h - rows, 0) : h + rows + 1, max(w - columns, 0) : w + columns + 1] = True

    def mean(x: torch.Tensor) -> torch.Tensor:
        return local_mean2d(x, kernel, "each", mode)

    def gradient(g: torch.Tensor) -> torch.Tensor:
        leaf = torch.zeros_like(g, requires_grad=True)
        return torch.autograd.grad(mean(leaf), leaf, g)[0]

    for f in (mean, gradient):
        usual, y = f(x), f(special)
        assert not y[..., near].isfinite().any(), f
        assert torch.equal(y[..., ~near], usual[..., ~near]), f


@channels
@pytest.mark.parametrize("mode", [*MODES, "renormalized"])
def test_derivatives(device, channels, mode):
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, device=device, requires_grad=True)

    def mean(x):
        return local_mean2d(x, KERNELS[1], channels, mode)

    assert gradcheck(mean, x, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(lambda x: mean(x) ** 3, x)
    examples = torch.stack([x.detach(), 2 * x.detach()])
    torch.testing.assert_close(
        torch.func.vmap(mean)(examples), torch.stack([mean(e) for e in examples])
    )
    compiled = torch.compile(mean, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), mean(x))


@channels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_round_once(device, channels, dtype):
    x = images(device).to(dtype).to(memory_format=torch.channels_last)
    expected = local_mean2d(x.float(), KERNELS[0], channels).to(dtype)
    with torch.autocast(device, dtype=dtype):
        y = local_mean2d(x, KERNELS[0], channels)
    layout = torch.channels_last if channels == "each" else torch.contiguous_format
    assert y.dtype == dtype and y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


@channels
@pytest.mark.parametrize("shape", [(0, 3, 6, 7), (2, 0, 6, 7), (2, 3, 0, 7)], ids=str)
def test_images_of_nothing(device, channels, shape):
    x = torch.ones(shape, device=device, requires_grad=True)
    y = local_mean2d(x, KERNELS[0], channels)
    assert torch.autograd.grad(y.sum(), x)[0].shape == shape
    assert y.shape == ((*shape[:1], 1, *shape[2:]) if channels == "all" else shape)
    assert (y == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": "some"}, "channels must be one of all, each, got 'some'"),
        ({"padding_mode": "wrap"}, "padding_mode must be one of renormalized, .* got 'wrap'"),
        ({"kernel": torch.ones(4)}, r"kernel sizes must be odd, got \(4,\)"),
        (
            {"kernel": torch.ones(13), "padding_mode": "reflect"},
            r"kernel \(13,\) is too large to reflect images of \(6, 7\)",
        ),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=f"local_mean2d: {message}"):
        local_mean2d(**{"input": images(), "kernel": KERNELS[0], **options})


def test_errors_of_the_registered_operators():
    ops, x = torch.ops.mnist_ops, images()
    for name in ("local_mean2d", "local_mean2d_backward"):
        operator = getattr(ops, name)
        for kernel, mode, message in (
            (torch.ones(3), "wrap", "padding_mode must be 'renormalized', .* got 'wrap'"),
            (torch.ones(2), "zeros", r"kernel sizes must be odd, got \(2\)"),
            (torch.ones(3, 3), "renormalized", r".* can be renormalized, got the shape \(3, 3\)"),
            (torch.ones(13), "reflect", r"kernel \(13\) is too large to reflect .* \(6, 7\)"),
            (torch.tensor([1.0, 0, -1]), "zeros", "the kernel's sum must be finite and not 0"),
        ):
            with pytest.raises(RuntimeError, match=f"^{name}: {message}"):
                operator(x, kernel, mode)
        with pytest.raises(RuntimeError, match="derivative"):
            operator(x, torch.ones(3, requires_grad=True), "zeros")


def test_example():
    results = doctest.testmod(local_mean)
    assert results.attempted > 0 and results.failed == 0
