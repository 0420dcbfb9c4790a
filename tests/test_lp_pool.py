"""LP pooling against loops, the original system's vectors, and PyTorch's wrong answers."""

from __future__ import annotations

import itertools
import math
import re

import loops
import pytest
import torch
from conftest import torch7_cases, torch7_tensor
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


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_gradients(device, p, window):
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64, device=device)
    x += 0.2 * x.sign()  # clear of 0, where the derivative is a convention
    for layout in (torch.contiguous_format, torch.channels_last):
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
