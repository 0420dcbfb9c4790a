"""local_mean2d against loops, SciPy and what subtractive_norm2d subtracts."""

from __future__ import annotations

import doctest

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


@kernels
@pytest.mark.parametrize("mode", ["zeros", "renormalized"])
def test_equals_the_loops(device, kernel, mode):
    x = images()
    y = local_mean2d(x.to(device), kernel, "each", mode).cpu()
    coef = loops.correlate(torch.ones(6, 7), kernel) if mode == "renormalized" else 1.0
    for image, result in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True):
        torch.testing.assert_close(result, loops.correlate(image, kernel) / coef)
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
    assert y.dtype == dtype and y.is_contiguous()
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


def test_example():
    results = doctest.testmod(local_mean)
    assert results.attempted > 0 and results.failed == 0
