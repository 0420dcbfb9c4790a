"""LP pooling against loops, the original system's vectors, and PyTorch's wrong answers."""

from __future__ import annotations

import itertools
import math
import re

import loops
import pytest
import torch
from conftest import thinned, torch7_cases, torch7_tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import mnist_ops
from mnist_ops import lp_pool2d

INF = float("inf")
LAYOUTS = [torch.contiguous_format, torch.channels_last]
NORMS = [1, 2, 3, 4, 1.5, 0.5, INF]
WINDOWS = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": (2, 3), "stride": (3, 2), "padding": (1, 0)},
    {"kernel_size": 2, "stride": 3, "ceil_mode": True},
    {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
]
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_the_loops(device, p, window, dtype):
    x = (3 * torch.randn(2, 3, 7, 9, dtype=torch.float64)).to(dtype)
    x[0, 0] = 0
    expected = loops.lp_pool2d(x, p, **window)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = lp_pool2d(x.to(device).to(memory_format=layout), p, **window)
        assert y.dtype == dtype and y.is_contiguous(memory_format=layout)
        torch.testing.assert_close(
            y.cpu().double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )


@pytest.mark.parametrize(("p", "window", "layout"), thinned(NORMS, WINDOWS, LAYOUTS, keep=4))
def test_gradients(device, p, window, layout):
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64, device=device)
    x += 0.2 * x.sign()  # clear of 0, where the derivative is a convention
    leaf = x.contiguous(memory_format=layout).requires_grad_()

    def pool(t):
        return lp_pool2d(t, p, **window)

    assert gradcheck(pool, (leaf,))
    assert gradgradcheck(pool, (leaf,))
    (grad,) = torch.autograd.grad(pool(leaf).sum(), leaf)
    assert grad.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("case", torch7_cases("lppooling"), ids=lambda case: case["name"])
def test_equals_torch7(device, case):
    p, k, s = map(int, re.match(r"p(\d)_k(\d)s(\d)", case["name"]).groups())
    x = torch7_tensor(case["input"]).to(device).requires_grad_()
    tolerance = 1e-12 if x.dtype == torch.float64 else 1e-6
    y = lp_pool2d(x, p, k, s)
    (grad,) = torch.autograd.grad(y, x, torch7_tensor(case["gradOutput"]).to(device))
    expected, expected_grad = torch7_tensor(case["output"]), torch7_tensor(case["gradInput"])
    if p % 2 == 1 and "signed" in case["name"]:
        # The original raises x itself to p. The two agree in windows without a negative element.
        windows = x.detach().cpu().unfold(-2, k, s).unfold(-2, k, s)
        same = (windows >= 0).all(-1).all(-1)
        assert not y.isnan().any() and not grad.isnan().any()
        torch.testing.assert_close(y.detach().cpu()[same], expected[same], rtol=0, atol=tolerance)
        reference = loops.lp_pool2d(x.detach().cpu()[None], p, k, s)[0]
        torch.testing.assert_close(y.detach().cpu(), reference, rtol=0, atol=tolerance)
    else:
        torch.testing.assert_close(y.detach().cpu(), expected, rtol=0, atol=tolerance)
        torch.testing.assert_close(grad.cpu(), expected_grad, rtol=0, atol=tolerance)


# --------------------------------------------------- the README's table of PyTorch's wrong answers
# Each of these tests ours, and pins down what PyTorch answers: where PyTorch mends one, the test
# says so, and the README's table is to be changed.


@pytest.mark.parametrize("p", [3.0, 1.5])
def test_signed_input_where_pytorch_gives_nan(device, p):
    x = torch.tensor([[[[-1.0, -2.0], [0.5, 0.25]]]], device=device, requires_grad=True)
    assert F.lp_pool2d(x, p, 2).isnan().all()
    y = lp_pool2d(x, p, 2)
    expected = sum(v**p for v in (1.0, 2.0, 0.5, 0.25)) ** (1 / p)
    assert y.item() == pytest.approx(expected, rel=1e-6)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.isfinite().all() and grad[0, 0, 0, 0] < 0 < grad[0, 0, 1, 1]


def test_zero_window_gradient_where_pytorch_gives_nan(device):
    x = torch.zeros(1, 1, 2, 2, device=device, requires_grad=True)
    (theirs,) = torch.autograd.grad(F.lp_pool2d(x, 0.5, 2).sum(), x)
    assert theirs.isnan().all()
    for p in NORMS:
        y = lp_pool2d(x, p, 2)
        (ours,) = torch.autograd.grad(y.sum(), x)
        assert y.item() == 0 and (ours == 0).all()


def test_ceil_mode_where_pytorch_gives_4_everywhere(device):
    x = torch.ones(1, 1, 3, 3, device=device)
    assert F.lp_pool2d(x, 1, 2, ceil_mode=True).flatten().tolist() == [4, 4, 4, 4]
    assert lp_pool2d(x, 1, 2, ceil_mode=True).flatten().tolist() == [4, 2, 2, 1]


def test_padding_which_pytorch_does_not_have(device):
    with pytest.raises(TypeError):
        F.lp_pool2d(torch.ones(1, 1, 2, 2), 2, 2, padding=1)
    y = lp_pool2d(torch.ones(1, 1, 2, 2, device=device), 1, 2, padding=1)
    assert y.flatten().tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("dtype", "value", "theirs"),
    [(torch.float16, 300.0, INF), (torch.float32, 1e20, INF), (torch.float32, 1e-25, 0.0)],
    ids=str,
)
def test_range_where_pytorch_overflows_or_underflows(device, dtype, value, theirs):
    x = torch.full((1, 1, 2, 2), value, dtype=dtype, device=device, requires_grad=True)
    assert F.lp_pool2d(x, 2, 2).item() == theirs
    for p in (2, 3, 1.5):
        y = lp_pool2d(x, p, 2)
        assert y.item() == pytest.approx(value * 4 ** (1 / p), rel=1e-3)
        (grad,) = torch.autograd.grad(y.sum(), x)
        expected = torch.full_like(grad, 4 ** (1 / p - 1))
        torch.testing.assert_close(grad, expected, rtol=2e-3, atol=0)


# ------------------------------------------------------------------------------------- conventions


def test_gradient_is_zero_at_zero_inside_a_window(device):
    for p in NORMS:
        x = torch.tensor([[[[0.0, 3.0], [4.0, -0.0]]]], device=device, requires_grad=True)
        (grad,) = torch.autograd.grad(lp_pool2d(x, p, 2).sum(), x)
        assert grad[0, 0, 0, 0] == 0 and grad[0, 0, 1, 1] == 0
        assert grad.isfinite().all()


def test_infinity_norm_shares_the_gradient_among_equal_maxima(device):
    x = torch.tensor([[[[2.0, -2.0], [1.0, 2.0]]]], device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(lp_pool2d(x, INF, 2).sum(), x)
    torch.testing.assert_close(grad.cpu(), torch.tensor([[[[1.0, -1.0], [0.0, 1.0]]]]) / 3)


def test_nan_and_infinity_pass_through(device):
    for p in NORMS:
        nan = float("nan")
        x = torch.tensor([[[[1.0, nan]]], [[[nan, 1.0]]], [[[1.0, -INF]]]], device=device)
        y = lp_pool2d(x, p, (1, 2))
        assert y[:2].isnan().all() and (y[2] == INF).all(), p


def test_third_derivative_says_that_it_is_not_offered(device):
    x = torch.rand(1, 1, 2, 2, dtype=torch.float64, device=device, requires_grad=True)
    (first,) = torch.autograd.grad(lp_pool2d(x, 3, 2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivative of lp_pool2d is not offered"):
        second.sum().backward()


def test_large_windows_and_every_gap_between_them(device):
    x = torch.randn(1, 2, 9, 9, dtype=torch.float64, device=device)
    torch.testing.assert_close(
        lp_pool2d(x, 2, 9).cpu().flatten(), x.cpu().flatten(2).norm(dim=-1).flatten()
    )
    for kernel, stride in itertools.product((1, 2, 5), (1, 3, 7)):
        y = lp_pool2d(x, 3, kernel, stride)
        torch.testing.assert_close(y.cpu(), loops.lp_pool2d(x.cpu(), 3, kernel, stride))


# ----------------------------------------------------------------------------- nothing in an image

EMPTY = [
    ((1, 1, 4, 0), (2, 2), (1, 1)),
    ((1, 1, 0, 4), (2, 2), (1, 1)),
    ((2, 3, 0, 0), (2, 4), (1, 2)),
    ((2, 3, 0, 5), (2, 1), (1, 0)),
    ((3, 0, 4), (2, 2), (1, 1)),
    ((0, 3, 4, 4), (2, 2), (0, 0)),
    ((2, 0, 4, 4), (2, 2), (1, 1)),
    ((0, 4, 4), (2, 2), (0, 0)),
    ((0, 0, 0, 0), (2, 2), (1, 1)),
]


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("shape", "kernel", "padding"), EMPTY, ids=str)
def test_images_of_nothing(device, shape, kernel, padding, dtype, p):
    """A window without an element has the norm 0; what is empty has an empty gradient."""
    for ceil_mode, last in itertools.product((False, True), LAYOUTS[: len(shape) - 2]):
        x = torch.zeros(shape, dtype=dtype, device=device)
        x = x.contiguous(memory_format=last).requires_grad_()
        y = lp_pool2d(x, p, kernel, 1, padding, ceil_mode)
        sizes = zip(shape[-2:], kernel, padding, strict=True)
        pooled = [loops.window_count(n, k, 1, pad, ceil_mode) for n, k, pad in sizes]
        assert y.shape == (*shape[:-2], *pooled) and (y == 0).all()
        (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        assert grad.shape == shape
        grad_output = torch.ones_like(y).requires_grad_()
        (grad,) = torch.autograd.grad(y, x, grad_output, create_graph=True)
        second = torch.autograd.grad(grad.sum(), (grad_output, x))
        assert (second[0] == 0).all() and second[1].shape == shape


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"norm_type": -1.0}, ValueError, "lp_pool2d: norm_type must be > 0, got -1.0"),
        ({"norm_type": 0}, ValueError, "norm_type must be > 0, got 0"),
        ({"norm_type": float("nan")}, ValueError, "norm_type must be > 0, got nan"),
        ({"norm_type": -INF}, ValueError, "norm_type must be > 0, got -inf"),
        ({"norm_type": "2"}, TypeError, "norm_type must be a number, got str"),
        ({"kernel_size": 0}, ValueError, r"kernel_size must be positive, got \(0, 0\)"),
        ({"kernel_size": 2.0}, TypeError, "kernel_size must be an int or two ints"),
        ({"kernel_size": (2, 2, 2)}, TypeError, "kernel_size must be an int or two ints"),
        ({"kernel_size": 9}, ValueError, r"does not fit into an image of \(4, 5\)"),
        ({"stride": 0}, ValueError, "stride must be positive"),
        ({"padding": 2}, ValueError, "padding must be between 0 and half of kernel_size"),
        ({"padding": -1}, ValueError, "padding must be between 0 and half of kernel_size"),
        ({"input": torch.ones(4, 5)}, ValueError, r"must be \(N, C, H, W\) or \(C, H, W\)"),
        ({"input": torch.ones(1, 4, 5, dtype=torch.int32)}, TypeError, "got torch.int32"),
        ({"input": torch.ones(1, 4, 5, dtype=torch.cfloat)}, TypeError, "got torch.complex64"),
        ({"input": [[1.0]]}, TypeError, "input must be a Tensor, got list"),
        ({"input": torch.ones(1, 1, 0, 5)}, ValueError, "does not fit into an image"),
    ],
    ids=str,
)
def test_errors_name_the_argument(arguments, error, message):
    call = {"input": torch.ones(1, 1, 4, 5), "norm_type": 2, "kernel_size": 2, **arguments}
    with pytest.raises(error, match=message):
        lp_pool2d(**call)


def test_errors_of_the_registered_operators():
    ops = torch.ops.mnist_ops
    x = torch.ones(1, 1, 4, 4)
    windows = ([2, 2], [2, 2], [0, 0], False)
    with pytest.raises(RuntimeError, match="norm_type must be > 0, got -2"):
        ops.lp_pool2d(x, -2.0, *windows)
    with pytest.raises(RuntimeError, match="must have two elements"):
        ops.lp_pool2d(x, 2.0, [2], [2, 2], [0, 0], False)
    with pytest.raises(RuntimeError, match="does not fit"):
        ops.lp_pool2d(x, 2.0, [5, 5], [2, 2], [0, 0], False)
    with pytest.raises(RuntimeError, match="expected float64, float32, float16 or bfloat16"):
        ops.lp_pool2d(x.int(), 2.0, *windows)
    y = ops.lp_pool2d(x, 2.0, *windows)
    for bad in (torch.ones(1, 1, 3, 3), torch.ones(1, 2, 2)):
        with pytest.raises(RuntimeError, match="must have the shape of the output"):
            ops.lp_pool2d_backward(bad, x, y, 2.0, *windows)
        with pytest.raises(RuntimeError, match="must have the shape of the output"):
            ops.lp_pool2d_backward(y, x, bad, 2.0, *windows)
    with pytest.raises(RuntimeError, match="must have the dtype of input"):
        ops.lp_pool2d_backward(y.double(), x, y, 2.0, *windows)
    with pytest.raises(RuntimeError, match="grad_grad_input must have the shape of input"):
        ops.lp_pool2d_double_backward(torch.ones(1, 1, 4, 5), y, x, y, 2.0, *windows)


# -------------------------------------------------------------------------------------- properties


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_shape_stride_and_norm(data):
    draw = data.draw
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    shape = [
        draw(st.integers(0, 3)),
        draw(st.integers(0, 4)),
        *draw(st.tuples(st.integers(1, 7), st.integers(1, 7))),
    ]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    x = torch.randn(*[2 * size for size in shape], generator=generator).to(dtype)
    # Any strides: every second element, dimensions permuted in memory.
    order = draw(st.permutations(range(4)))
    x = x[tuple(slice(None, None, 2) for _ in shape)].permute(order).contiguous()
    x = x.permute([order.index(d) for d in range(4)])
    p = draw(st.sampled_from(NORMS))
    kernel = draw(st.tuples(st.integers(0, 4), st.integers(1, 4)))
    stride = draw(st.one_of(st.none(), st.tuples(st.integers(1, 4), st.integers(1, 4))))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    ceil_mode = draw(st.booleans())
    arguments = (p, kernel, stride, padding, ceil_mode)
    fits = min(kernel) > 0 and all(
        s + 2 * pad >= k for s, k, pad in zip(x.shape[2:], kernel, padding, strict=True)
    )
    if not fits:
        with pytest.raises(ValueError, match=r"^lp_pool2d: "):
            lp_pool2d(x, *arguments)
        return
    x.requires_grad_()
    y = lp_pool2d(x, *arguments)
    torch.testing.assert_close(
        y.detach().double(),
        loops.lp_pool2d(x.detach(), *arguments),
        rtol=2 * TOLERANCE[dtype],
        atol=2 * TOLERANCE[dtype],
    )
    y.sum().backward()
    assert x.grad.shape == x.shape and x.grad.isfinite().all()


def test_module_refuses_what_no_image_could_have():
    for bad in ({"norm_type": -1.0}, {"kernel_size": 0}, {"padding": 2}):
        with pytest.raises(ValueError, match=r"LPPool2d: \w+ must be"):
            mnist_ops.nn.LPPool2d(**{"norm_type": 2, "kernel_size": 2, **bad})


def test_module_is_the_function(device):
    module = mnist_ops.nn.LPPool2d(3, (2, 3), stride=2, padding=1, ceil_mode=True)
    x = torch.randn(2, 3, 8, 8, device=device)
    assert torch.equal(module(x), lp_pool2d(x, 3, (2, 3), 2, 1, True))
    assert "norm_type=3, kernel_size=(2, 3), stride=2, padding=1, ceil_mode=True" in repr(module)


# ------------------------------------------------------------ batches, bands, powers of the CPU's


def windows_of(x, size, stride):
    """(N, C, OH, OW, size * size): every window of every channel, in float64."""
    return x.double().unfold(2, size, stride).unfold(3, size, stride).flatten(-2)


@pytest.mark.parametrize("p", [1, 2, 3, 4, 0.5, 2.5, 7.3, INF])
@pytest.mark.parametrize(
    ("shape", "size", "stride"),
    [
        ((1, 1, 300, 201), 3, 2),  # more rows than a thread takes at a time
        ((1, 2, 41, 1300), 2, 2),  # rows longer than a batch, one row left over
        ((2, 600, 7, 9), 3, 2),  # more channels than a batch
        ((2, 3, 60, 60), 5, 3),
        ((1, 2, 64, 64), 20, 4),  # windows too large to gather in one cache
    ],
    ids=str,
)
def test_many_windows(device, p, shape, size, stride):
    x = torch.randn(shape, device=device)
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = x.clone(memory_format=layout).requires_grad_()
        y = lp_pool2d(leaf, p, size, stride)
        truth = x.double().requires_grad_()
        magnitudes = windows_of(truth, size, stride).abs()
        if p == INF:
            expected = magnitudes.amax(-1)
        else:
            expected = magnitudes.pow(p).sum(-1).pow(1 / p)
        torch.testing.assert_close(y.detach().double(), expected.detach(), rtol=2e-6, atol=0)
        grad = torch.randn(y.shape, device=device)
        (ours,) = torch.autograd.grad(y, leaf, grad)
        (theirs,) = torch.autograd.grad(expected, truth, grad.double())
        # Windows that share an element may cancel: relative to the largest of the gradients.
        atol = 2e-6 * theirs.abs().max().item()
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("p", [1, 2, 3, 4, 0.5, 1.5, 2.5, 7.3, 40.0, INF])
def test_norms_of_large_and_small_numbers(device, p, dtype):
    """Relative errors near those of one rounding, wherever the result can be represented."""
    largest = {torch.float32: 36, torch.float64: 300}[dtype]
    exponents = torch.arange(-largest, largest + 1, 4, dtype=torch.float64)
    x = torch.randn(len(exponents), 8, 8, dtype=torch.float64) * 10 ** exponents[:, None, None]
    x = x.to(dtype)
    scale = x.double().abs().amax((1, 2), keepdim=True)  # the reference overflows without
    windows = windows_of((x.double() / scale).unsqueeze(0), 2, 2)[0].abs()
    expected = windows.amax(-1) if p == INF else windows.pow(p).sum(-1).pow(1 / p)
    leaf = x.to(device).requires_grad_()
    y = lp_pool2d(leaf, p, 2)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.detach().cpu().double() / scale, expected, rtol=8 * eps, atol=0)
    # sum over a window of x dy/dx is y: the norm is homogeneous.
    (grad,) = torch.autograd.grad(y.sum(), leaf)
    assert grad.isfinite().all()
    moment = windows_of((x.double() / scale * grad.cpu().double()).unsqueeze(0), 2, 2)[0].sum(-1)
    torch.testing.assert_close(moment, expected, rtol=max(30, 4 * min(p, 40)) * eps, atol=0)


@pytest.mark.parametrize("p", NORMS)
def test_nan_stays_wherever_it_is(device, p):
    for place in range(4):
        x = torch.ones(1, 2, 2, device=device)
        x.view(-1)[place] = float("nan")
        x.requires_grad_()
        y = lp_pool2d(x, p, 2)
        assert y.isnan().all()
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert grad.view(-1)[place].isnan() or p == 1  # the sign of NaN is taken as 0


@pytest.mark.parametrize("channels", [1, 7, 8, 19])
def test_extreme_numbers_among_others_in_either_layout(device, channels):
    """2 x 2 windows in float32 have loops of their own, which must leave these to others."""
    x = torch.randn(3, channels, 6, 18)
    x[0, 0, :2, :3] = 1e25
    x[0, -1, 2:4, 5:9] *= 1e-25
    x[1, :, 2:4, 2:4] = 0
    x[1, 0, 0, 17], x[1, -1, 5, 0], x[2, 0, 5, 17] = math.nan, math.inf, -math.inf
    grad = torch.randn(3, channels, 3, 9)
    grad[2, 0, 1, 4], grad[2, -1, 2, 0] = 1e25, 0
    wide = x.double().to(device).requires_grad_()
    expected = mnist_ops.lp_pool2d(wide, 2, 2)
    expected.backward(grad.double().to(device))
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = x.to(device).to(memory_format=layout).clone().requires_grad_()
        y = mnist_ops.lp_pool2d(leaf, 2, 2)
        y.backward(grad.to(device).to(memory_format=layout))
        same = {"rtol": 1e-6, "atol": 0, "equal_nan": True, "check_dtype": False}
        torch.testing.assert_close(y, expected, **same)
        torch.testing.assert_close(leaf.grad, wide.grad, **same)


# -------------------------------------------------------------- borders, and windows of many pixels


@pytest.mark.parametrize("p", [1, 2, 3, 1.5, INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_windows_over_the_border_do_not_see_the_next_row(device, p, dtype, ceil_mode):
    """Heights and widths that leave a row, a column or half a window over, in both layouts."""
    for size, stride, height, width in itertools.product((2, 3), (2,), (4, 5), (16, 17, 19)):
        x = torch.randn(2, 3, height, width, dtype=dtype, device=device)
        expected = loops.lp_pool2d(x.cpu(), p, size, stride, 0, ceil_mode)
        slopes = torch.zeros_like(x, dtype=torch.float64, device="cpu")
        for oh, ow in itertools.product(*map(range, expected.shape[2:])):
            place = (..., slice(2 * oh, 2 * oh + size), slice(2 * ow, 2 * ow + size))
            window = x.cpu().double()[place]
            ratio = window.abs() / expected[:, :, oh, ow, None, None]
            slopes[place] += window.sign() * ((ratio == 1.0) if p == INF else ratio ** (p - 1))
        for layout in LAYOUTS:
            leaf = x.clone(memory_format=layout).requires_grad_()
            y = lp_pool2d(leaf, p, size, stride, 0, ceil_mode)
            (grad,) = torch.autograd.grad(y.sum(), leaf)
            tolerance = 10 * TOLERANCE[dtype]
            close = {"rtol": tolerance, "atol": tolerance}
            torch.testing.assert_close(y.detach().cpu().double(), expected, **close)
            torch.testing.assert_close(grad.cpu().double(), slopes, **close)


def reference(x, p, kernel):
    """Windows with stride 1 as autograd's own operators, in float64."""
    windows = x.unfold(2, kernel[0], 1).unfold(3, kernel[1], 1).flatten(-2)
    return windows.abs().amax(-1) if p == INF else windows.abs().pow(p).sum(-1).pow(1 / p)


@pytest.mark.parametrize("p", [*NORMS, 2.5])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_windows_too_large_to_gather(device, p, layout):
    """17000 elements of a window: they are not copied, on the CPU, but looked at in place."""
    kernel = (130, 131)
    x = torch.randn(1, 2, 131, 131, dtype=torch.float64, device=device)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 3e-6)):
        leaf = x.to(dtype).contiguous(memory_format=layout).requires_grad_()
        wide = leaf.detach().double().requires_grad_()
        y, expected = lp_pool2d(leaf, p, kernel, 1), reference(wide, p, kernel)
        assert y.is_contiguous(memory_format=layout)
        grad = torch.randn(y.shape, dtype=torch.float64, device=device).to(dtype)
        direction = torch.randn(x.shape, dtype=torch.float64, device=device).to(dtype)
        results = []
        for one, out in ((leaf, y), (wide, expected)):
            g = grad.to(out.dtype).requires_grad_()
            (first,) = torch.autograd.grad(out, one, g, create_graph=True)
            second = torch.autograd.grad(
                (first * direction.to(out.dtype)).sum(), (g, one), allow_unused=True
            )
            results.append([out, first, *second])
        # |x|^p for p < 2 has no second derivative that is to be compared near 0.
        for i, (ours, theirs) in enumerate(zip(*results, strict=True)):
            if theirs is None or (i == 3 and p < 2):
                continue
            atol = tolerance * theirs.abs().max().item()
            torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=atol)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("place", [0, 77, 130 * 65, 130 * 130 - 1])
def test_nan_and_infinity_in_a_large_window(device, p, place):
    x = torch.ones(1, 130, 130, device=device)
    for value in (math.nan, INF, -INF):
        x.view(-1)[place] = value
        y = lp_pool2d(x, p, 130)
        torch.testing.assert_close(y.flatten(), y.new_tensor([abs(value)]), equal_nan=True)
        grad = torch.ops.mnist_ops.lp_pool2d_backward(
            torch.ones_like(y), x, y, float(p), [130, 130], [130, 130], [0, 0], False
        )
        if p not in (1, INF):  # infinity over infinity
            assert grad.view(-1)[place].isnan()
        elif value == value:
            assert grad.view(-1)[place] == (1 if value > 0 else -1)


def exact_norm(x, p):
    """Of a whole image, each channel, in float64."""
    return x.double().abs().pow(p).flatten(-2).sum(-1).pow(1 / p)


@pytest.mark.parametrize("p", [1, 2, 3, 4, 1.5])
@pytest.mark.parametrize("shape", [(1, 2048, 2048), (1, 1, 3_000_000), (8, 260, 250)], ids=str)
def test_long_sums_keep_their_digits(device, p, shape):
    """One accumulator in float32 would be off by 1e-3 at 2048 x 2048."""
    kernel = shape[-2:]
    options = (float(p), list(kernel), list(kernel), [0, 0], False)
    for x in (torch.randn(shape), torch.full(shape, 0.3)):
        for layout in LAYOUTS[: 2 if shape[0] > 1 else 1]:
            leaf = x.to(device)[None].to(memory_format=layout)
            y = lp_pool2d(leaf, p, kernel)
            expected = exact_norm(x, p)
            torch.testing.assert_close(y.flatten().cpu().double(), expected, rtol=1e-6, atol=0)
            # The gradient with respect to grad_output in the direction of x is y itself.
            directional, _ = torch.ops.mnist_ops.lp_pool2d_double_backward(
                leaf, torch.ones_like(y), leaf, y, *options
            )
            # y was rounded, and is in it to the power 1 - p.
            torch.testing.assert_close(
                directional.flatten().cpu().double(), expected, rtol=2e-6, atol=0
            )


@pytest.mark.parametrize("size", [9, 20, 100])
@pytest.mark.parametrize("p", [1, 2, 3, 4, 1.5])
def test_sums_of_a_gathered_window_keep_their_digits(device, p, size):
    for fill in (0.3, 1.7, None):
        x = torch.randn(2, 5, size, size) if fill is None else torch.full((2, 5, size, size), fill)
        for dtype, layout in itertools.product(TOLERANCE, LAYOUTS):
            given = x.to(dtype).to(device).to(memory_format=layout)
            y = lp_pool2d(given, p, size).flatten().cpu().double()
            rtol = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, TOLERANCE[dtype])
            torch.testing.assert_close(y, exact_norm(given.cpu(), p).flatten(), rtol=rtol, atol=0)


def test_ties_are_counted_beyond_the_whole_numbers_of_float32(device):
    size = 4200  # 17.6 million equal elements; float32 counts to 16.8
    x = torch.ones(1, 1, size, size, device=device)
    y = torch.ones(1, 1, 1, 1, device=device)
    directional, _ = torch.ops.mnist_ops.lp_pool2d_double_backward(
        x, y, x, y, INF, [size, size], [size, size], [0, 0], False
    )
    assert directional.item() == pytest.approx(1.0, rel=1e-6)


# ----------------------------------------------------------------------- p at the ends of its range


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("p", [1e4, 1e6, 3e7, 1e12, 1e30, 1e39, 1e300])
def test_large_p_is_nearly_infinity(device, dtype, p):
    """Equal maxima share the gradient, whatever y, which is rounded, says to the power p - 1."""
    x = torch.tensor([[[1.0, -1.0, 0.5, 2.0], [1.0, 1.0, 0.0, -0.25]]], dtype=dtype, device=device)
    windows = ([2, 2], [2, 2], [0, 0], False)
    y = torch.ops.mnist_ops.lp_pool2d(x, p, *windows)
    expected = torch.tensor([[[4.0 ** (1 / p), 2.0]]], dtype=torch.float64)
    torch.testing.assert_close(y.cpu().double(), expected, rtol=TOLERANCE[dtype], atol=0)
    grad = torch.ops.mnist_ops.lp_pool2d_backward(torch.ones_like(y), x, y, p, *windows)
    share = 4.0 ** (1 / p - 1)
    slopes = [[[share, -share, 0.0, 1.0], [share, share, 0.0, 0.0]]]
    slopes = torch.tensor(slopes, dtype=torch.float64)
    torch.testing.assert_close(grad.cpu().double(), slopes, rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("p", [1e3, 2e3, 1e5, 1e8])
def test_large_p_in_large_windows(device, p):
    x = torch.rand(1, 1, 131, 130, device=device)
    x[0, 0, 3, 7] = x[0, 0, 99, 2] = 1.5
    kernel = [131, 130]
    y = torch.ops.mnist_ops.lp_pool2d(x, p, kernel, kernel, [0, 0], False)
    assert y.item() == pytest.approx(1.5 * 2 ** (1 / p), rel=1e-6)
    grad = torch.ops.mnist_ops.lp_pool2d_backward(y / y, x, y, p, kernel, kernel, [0, 0], False)
    share = 2 ** (1 / p - 1)
    assert grad[0, 0, 3, 7].item() == pytest.approx(share, rel=2e-4)
    assert grad[0, 0, 99, 2].item() == pytest.approx(share, rel=2e-4)
    assert grad.sum().item() == pytest.approx(2 * share, rel=2e-4)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("p", [9e-4, 1e-10, 1e-30, 2e-38])
def test_small_p_overflows_to_infinity_and_not_to_nan(device, dtype, p):
    """Two elements that are not 0: 2^(1/p). One alone: its magnitude."""
    x = torch.tensor([[[1.0, 0.0, 0.0, 0.0], [0.0, -3.0, 0.0, -3.0]]], dtype=dtype, device=device)
    large = torch.zeros(1, 131, 131, dtype=dtype, device=device)
    large[0, 5, 5], large[0, 7, 7] = 1.0, -2.0
    ops = torch.ops.mnist_ops
    for image, size, expected in ((x, 2, [INF, 3.0]), (large, 131, [INF])):
        windows = ([size, size], [size, size], [0, 0], False)
        y = ops.lp_pool2d(image, p, *windows)
        assert y.flatten().tolist() == expected
        grad = ops.lp_pool2d_backward(torch.ones_like(y), image, y, p, *windows)
        overflowed = grad[..., :2] if size == 2 else grad
        inside = image[..., :2] if size == 2 else image
        # (|x| / y)^(p - 1), which grows as 1 / y falls; 0 by convention at x = 0.
        expected_grad = torch.where(inside == 0, 0.0, inside.double().sign() * INF)
        assert torch.equal(overflowed.double(), expected_grad)
        if size == 2:
            assert grad[0, :, 2:].flatten().tolist() == [0.0, 0.0, 0.0, -1.0]


def power_mean(x, p, average):
    """y and dy/dx of one window by way of logarithms, which nothing leaves the range of."""
    logs = x.double().abs().log()
    n = x.numel() if average else 1
    log_y = ((p * logs).logsumexp(0) - math.log(n)) / p
    return log_y.exp(), x.double().sign() * ((p - 1) * (logs - log_y)).exp() / n


@pytest.mark.parametrize("p", [0.03, 0.1, 0.5, 0.9, 1.1, 1.5, 1.9, 2.5, 7.3])
@pytest.mark.parametrize("kind", ["number", "average", "tensor", "tensor average"])
@pytest.mark.parametrize("windows", [1, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_quotients_below_the_range(device, dtype, windows, kind, p):
    """|x| / y of a window reaches from 1 to 1e-76, in float64 to 1e-500."""
    limits = torch.finfo(dtype)
    generator, compared = torch.Generator().manual_seed(3), 0
    for _ in range(20):
        exponents = torch.rand(4, generator=generator, dtype=torch.float64) * 1.8 - 0.9
        sizes = (exponents * math.log(limits.max)).exp()
        values = (sizes * torch.tensor([1, -1, 1, -1])).to(dtype)
        x = values.view(1, 2, 2).repeat(windows, 1, 1, 1).to(device).requires_grad_()
        number = torch.tensor(p, dtype=dtype)  # 0.1 is another number in float32
        norm = number.to(device) if "tensor" in kind else p
        y = lp_pool2d(x, norm, 2, average="average" in kind)
        expected, slopes = power_mean(values, float(number), "average" in kind)
        if expected > limits.max / 1000:
            continue
        (gradient,) = torch.autograd.grad(y.sum(), x)
        tolerance = {torch.float32: 3e-5, torch.float64: 1e-12}[dtype] * max(1, 1 / p)
        torch.testing.assert_close(y[0].cpu().double().squeeze(), expected, rtol=tolerance, atol=0)
        inside = (slopes.abs() > 100 * limits.tiny) & (slopes.abs() < limits.max / 1000)
        ours = gradient[0].flatten().cpu().double()
        torch.testing.assert_close(ours[inside], slopes[inside], rtol=tolerance, atol=0)
        compared += int(inside.sum())
    assert compared > 20


@pytest.mark.parametrize("p", [1.5, 2000, 1e5])
def test_derivatives_in_a_direction_where_rounding_counts(device, p):
    """r^(p-1) magnifies the rounding of y by p, and r^(p-2) of small r is large for p < 2."""
    spread = 3 / p if p > 2 else 1
    generator = torch.Generator().manual_seed(0)
    x, v = torch.rand(2, 1, 1, 3, 3, generator=generator, dtype=torch.float64)
    x = 1 + spread * x
    if p < 2:
        x.view(-1)[0] = 1e-42
        x.view(-1)[1] = 1e30
    single = x.float()
    wide, narrow = [], []
    for results, image in ((wide, single.double()), (narrow, single)):
        leaf = image.to(device).requires_grad_()
        direction = v.to(leaf)
        y = lp_pool2d(leaf, p, 3)
        (first,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad((first * direction).sum(), leaf)
        tangent = torch.func.jvp(lambda t: lp_pool2d(t, p, 3), (leaf.detach(),), (direction,))[1]
        results += [first.detach(), second, tangent]
    for one, other in zip(narrow, wide, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-6 * p + 1e-4, atol=1e-44)


def test_p_of_a_tenth_in_windows_of_many_elements(device):
    x = torch.rand(1, 1, 12, 12, device=device) + 0.5
    y = lp_pool2d(x, 0.1, 12)
    assert y.item() == pytest.approx(exact_norm(x.cpu(), 0.1).item(), rel=1e-4)
    assert lp_pool2d(x.repeat(1, 1, 20, 20), 0.1, 240).item() == INF  # 1e47


@pytest.mark.parametrize("op", ["lp_pool2d", "lp_pool2d_backward", "lp_pool2d_double_backward"])
def test_p_beyond_the_type_it_is_computed_in(op):
    x = torch.rand(1, 1, 4, 4) + 0.5
    y = lp_pool2d(x, INF, 2)
    tensors = {"lp_pool2d": [x], "lp_pool2d_backward": [y, x, y]}.get(op, [x, y, x, y])
    windows = ([2, 2], [2, 2], [0, 0], False)
    call = getattr(torch.ops.mnist_ops, op)
    for bad in (math.nan, 0.0, -1.0, -INF):
        with pytest.raises(RuntimeError, match=f"^{op}: norm_type must be > 0, got "):
            call(*tensors, bad, *windows)
    for dtype in TOLERANCE:
        given = [t.to(dtype) for t in tensors]
        bad = 1e-310 if dtype == torch.float64 else 1e-39
        with pytest.raises(RuntimeError, match=f"^{op}: norm_type must be at least .* normal"):
            call(*given, bad, *windows)
        for large in (1e39, 1.7e308):
            pair = [call(*given, p, *windows) for p in (large, INF)]
            for ours, limit in zip(
                *(r if isinstance(r, tuple) else (r,) for r in pair), strict=True
            ):
                assert torch.equal(ours, limit)


# --------------------------------------------------------------- what the raw operators are given

HUGE = [2**31, 2**62, 2**63 - 1, -(2**63)]


@pytest.mark.parametrize("op", ["lp_pool2d", "lp_pool2d_backward", "lp_pool2d_double_backward"])
def test_raw_operators_check_their_windows(op):
    x, y = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 2, 2)
    tensors = {"lp_pool2d": [x], "lp_pool2d_backward": [y, x, y]}.get(op, [x, y, x, y])
    call = getattr(torch.ops.mnist_ops, op)
    good = {"kernel_size": [2, 2], "stride": [2, 2], "padding": [0, 0]}
    for name in good:
        for bad in ([], [2], [2, 2, 2], [2] * 9):
            with pytest.raises(RuntimeError, match="must have two elements"):
                call(*tensors, 2.0, *{**good, name: bad}.values(), False)
        absurd = [-1, *HUGE] + ([0] if name != "padding" else [2])
        for value, both in itertools.product(absurd, (False, True)):
            bad = [value, value] if both else [2 if name != "padding" else 0, value]
            with pytest.raises(RuntimeError, match=f"^{op}: {name} must be"):
                call(*tensors, 2.0, *{**good, name: bad}.values(), False)
    # The largest windows that pass: padding almost reaches 2^30.
    kernel = [2**31 - 1] * 2
    for ceil_mode in (False, True):
        y = torch.ops.mnist_ops.lp_pool2d(x, 2.0, kernel, kernel, [2**30 - 1] * 2, ceil_mode)
        torch.testing.assert_close(y.flatten(), x.flatten(2).norm(dim=-1).flatten())


def test_raw_operators_check_their_tensors():
    ops = torch.ops.mnist_ops
    windows = (2.0, [2, 2], [2, 2], [0, 0], False)
    x, y = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 2, 2)
    for shape in ((), (4,), (4, 4), (1, 1, 1, 4, 4)):
        bad = torch.rand(shape)
        with pytest.raises(RuntimeError, match=r"input must be \(N, C, H, W\) or \(C, H, W\)"):
            ops.lp_pool2d(bad, *windows)
        with pytest.raises(RuntimeError, match="must have the shape of"):
            ops.lp_pool2d_backward(bad, x, y, *windows)
        with pytest.raises(RuntimeError, match="must have the shape of"):
            ops.lp_pool2d_backward(y, x, bad, *windows)
        for i in range(4):
            with pytest.raises(RuntimeError, match=r"must (be|have)"):
                ops.lp_pool2d_double_backward(
                    *[bad if i == j else t for j, t in enumerate((x, y, x, y))], *windows
                )
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.uint8):
        with pytest.raises(RuntimeError, match="expected float64, float32, float16 or bfloat16"):
            ops.lp_pool2d(x.to(dtype), *windows)
        with pytest.raises(RuntimeError, match=r"expected float64|dtype of input"):
            ops.lp_pool2d_backward(y, x.to(dtype), y, *windows)
        with pytest.raises(RuntimeError, match="must have the dtype of input"):
            ops.lp_pool2d_backward(y, x, y.to(dtype), *windows)
        with pytest.raises(RuntimeError, match="must have the dtype of input"):
            ops.lp_pool2d_double_backward(x.to(dtype), y, x, y, *windows)
    # An output of more elements than there are addresses, from an input of none.
    many = torch.empty(2**30, 2**30, 0, 0)
    with pytest.raises(RuntimeError, match="too large a shape"):
        ops.lp_pool2d(many, 2.0, [2, 2], [1, 1], [1, 1], False)
