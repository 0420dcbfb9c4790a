"""Generalized means: LP pooling with average, and GeM2d."""

from __future__ import annotations

import doctest
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from mnist_ops import lp_pool2d, nn


@pytest.mark.parametrize("p", [1, 2, 3, 0.7])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_equals_the_composition(device, p, size, padding, ceil_mode):
    """Every pixel that lies on the image counts, and no other."""
    x = torch.rand(2, 3, 6, 7, dtype=torch.float64, device=device) + 0.1
    windows = size, 2, padding, ceil_mode
    y = lp_pool2d(-x, p, *windows, average=True)
    mean = F.avg_pool2d(x.pow(p), *windows, count_include_pad=False)
    torch.testing.assert_close(y, mean.pow(1 / p))


def test_the_mean_of_large_p_is_the_maximum(device):
    x = torch.rand(2, 3, 6, 6, device=device)
    y = lp_pool2d(x, math.inf, 3, average=True)
    torch.testing.assert_close(y, F.max_pool2d(x, 3), rtol=0, atol=0)
    torch.testing.assert_close(lp_pool2d(1e30 * x, 40, 3, average=True) / 1e30, y, rtol=0.1, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_round_once(device, dtype):
    x = torch.rand(2, 3, 6, 6, device=device).to(dtype)
    y = lp_pool2d(x, 3, 3, average=True)
    torch.testing.assert_close(
        y, lp_pool2d(x.float(), 3, 3, average=True).to(dtype), rtol=0, atol=0
    )


def test_gradients_of_the_mean(device):
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64, device=device, requires_grad=True)

    def mean(t):
        return lp_pool2d(t, 3, 3, 2, 1, average=True)

    gradcheck(mean, x, check_forward_ad=True)
    gradgradcheck(mean, x)


def test_the_mean_where_the_norm_overflows(device):
    """n^(1/p) is 10^57 here, and the norm beyond float32; then 10^2894."""
    x = torch.rand(1, 28, 28, device=device) + 0.5
    expected = x.double().pow(0.05).mean().pow(20).float()
    torch.testing.assert_close(lp_pool2d(x, 0.05, 28, average=True).flatten(), expected[None])
    y = nn.GeM2d(0.05, learnable=False)(x)
    torch.testing.assert_close(y.flatten(), expected[None])
    geometric = x.double().log().mean().exp().float()
    y = lp_pool2d(1e30 * x, 1e-3, 28, average=True)
    torch.testing.assert_close(y.flatten(), 1e30 * geometric[None], rtol=1e-3, atol=0)


def test_gem_of_no_pixels_and_of_small_ones_in_half(device):
    for learnable in (False, True):
        with pytest.raises(ValueError, match="GeM2d: input has no pixels"):
            nn.GeM2d(learnable=learnable)(torch.ones(1, 2, 0, 4, device=device))
        pool = nn.GeM2d(learnable=learnable, eps=1e-9).to(device)
        x = torch.zeros(1, 2, 3, 3, dtype=torch.float16, device=device, requires_grad=True)
        y = pool(x)
        y.sum().backward()
        assert y.isfinite().all() and x.grad is not None and x.grad.isfinite().all()


def test_dilation_of_one_in_any_form():
    x = torch.rand(1, 4, 4)
    torch.testing.assert_close(
        lp_pool2d(x, 2, 2, dilation=(1, 1), average=True), lp_pool2d(x, 2, 2, average=True)
    )
    for wrong in (1.0, True):
        with pytest.raises(TypeError, match="lp_pool2d: dilation must be"):
            lp_pool2d(x, 2, 2, dilation=wrong)  # type: ignore[arg-type]


def test_what_the_mean_is_not_offered_with():
    for options in ({"dilation": 2}, {"padding": ((0, 1), (0, 1))}):
        with pytest.raises(ValueError, match="lp_pool2d: average is not offered with dilation or"):
            lp_pool2d(torch.ones(1, 4, 4), 2, 2, average=True, **options)


@pytest.mark.parametrize("learnable", [False, True])
def test_gem(device, learnable):
    gem = nn.GeM2d(2.5, learnable).to(device)
    x = torch.randn(2, 3, 5, 7, device=device, requires_grad=True)
    expected = x.clamp(min=1e-6).pow(2.5).mean((-2, -1), keepdim=True).pow(1 / 2.5)
    torch.testing.assert_close(gem(x), expected)
    torch.testing.assert_close(gem(x[0]), expected[0])
    half = gem(x.half())
    torch.testing.assert_close(half, gem(x.half().float()).half(), rtol=0, atol=0)
    (ours,) = torch.autograd.grad(gem(x).sum(), x)
    (theirs,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(ours, theirs)
    assert repr(gem) == f"GeM2d(p=2.5, learnable={learnable}, eps=1e-06)"
    assert [name for name, _ in gem.named_parameters()] == (["p"] if learnable else [])


def test_gradient_of_p(device):
    gem = nn.GeM2d(2.5).double().to(device)
    for scale in (1.0, 1e-5):
        x = scale * torch.rand(2, 3, 4, 4, dtype=torch.float64, device=device)

        def pool(p, x=x, scale=scale):
            return torch.func.functional_call(gem, {"p": p}, (x,)) / scale

        p = torch.tensor(2.5, dtype=torch.float64, device=device, requires_grad=True)
        gradcheck(pool, p)
        gradgradcheck(pool, p)


def test_p_is_saved_and_small_pixels_are_in_range(device):
    gem = nn.GeM2d(60.0).to(device)
    x = torch.full((1, 2, 4, 4), 1e-5, device=device)  # to the 60th power: 0 in float32
    torch.testing.assert_close(gem(x), x[..., :1, :1])
    file = io.BytesIO()
    torch.save(gem.state_dict(), file)
    file.seek(0)
    other = nn.GeM2d().to(device)
    other.load_state_dict(torch.load(file))
    assert other.p.item() == 60.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 0}, "GeM2d: p must be > 0, and finite to be learned, got 0"),
        ({"p": math.inf}, "GeM2d: p must be > 0, and finite to be learned, got inf"),
        ({"eps": 0}, "GeM2d: eps must be > 0, got 0"),
        ({"eps": math.inf}, "GeM2d: eps must be finite, got inf"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        nn.GeM2d(**arguments)


def test_examples():
    results = doctest.testmod(nn)
    assert results.attempted > 0 and results.failed == 0
