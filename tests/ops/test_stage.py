"""A stage in one operator: against loops, and against the three operators it stands for."""

from __future__ import annotations

import itertools

import loops
import pytest
import torch
from conftest import thinned
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import mnist_ops
from mnist_ops import gaussian1d, lp_pool2d, stage2d, subtractive_norm2d

INF = float("inf")
NORMS = [1, 2, 3, 0.5, INF]
ACTIVATIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": mnist_ops.sigmoid,
    "identity": lambda x: x,
}
WINDOWS = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": (2, 3), "stride": (3, 2), "padding": (1, 0)},
    {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
]
KERNELS = {
    "gaussian1d(7)": gaussian1d(7),
    "asymmetric 5": torch.tensor([0.1, 0.7, 1.0, 0.3, 0.2], dtype=torch.float64),
    "asymmetric 3x5": torch.arange(1.0, 16.0, dtype=torch.float64).reshape(3, 5),
    "larger than the map": torch.ones(11, 9, dtype=torch.float64),
}
# Half types round once, at the end: their tolerance is half a unit in the last place, and a little.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.float16: 5e-4,
    torch.bfloat16: 4e-3,
}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def unfused(
    x: Tensor, kernel: Tensor, activation: str = "tanh", norm_type: float = 2, **window
) -> Tensor:
    """The three operators."""
    a = ACTIVATIONS[activation](x)
    return subtractive_norm2d(lp_pool2d(a, norm_type, **{"kernel_size": 2, **window}), kernel)


@pytest.mark.parametrize(
    ("activation", "p", "dtype"), thinned(ACTIVATIONS, NORMS, TOLERANCE, keep=4)
)
def test_equals_the_loops(device, activation, p, dtype):
    x = (2 * torch.randn(2, 3, 7, 10, dtype=torch.float64)).to(dtype)
    x[0, 0] = 0
    for window, kernel in zip(WINDOWS, KERNELS.values(), strict=True):
        expected = loops.stage2d(x, kernel, activation, p, **window)
        for layout in LAYOUTS:
            given_x = x.to(device).to(memory_format=layout)
            y = stage2d(given_x, kernel.to(device), activation, p, **window)
            assert y.dtype == dtype and y.is_contiguous(memory_format=layout)
            # p = 0.5 makes numbers of up to 40 from ones of up to 5.
            atol = TOLERANCE[dtype] * max(4.0, expected.abs().max().item())
            torch.testing.assert_close(y.cpu().double(), expected, rtol=TOLERANCE[dtype], atol=atol)


@pytest.mark.parametrize(
    ("activation", "p", "layout"), thinned(ACTIVATIONS, NORMS, LAYOUTS, keep=4)
)
def test_gradients(device, activation, p, layout):
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64, device=device)
    x += 0.2 * x.sign()  # clear of 0, where the derivative is a convention
    for window, kernel in zip(WINDOWS, KERNELS.values(), strict=True):
        leaf = x.contiguous(memory_format=layout).requires_grad_()
        there = kernel.to(device)

        def stage(t, there=there, window=window):
            return stage2d(t, there, activation, p, **window)

        assert gradcheck(stage, (leaf,))
        assert gradgradcheck(stage, (leaf,))
        (grad,) = torch.autograd.grad(stage(leaf).sum(), leaf)
        assert grad.is_contiguous(memory_format=layout)


# Sizes at which kernels change: rows in packs of 4 and 2 and of no such number, heights that leave
# a row over, more channels than a block has, several of them, one.
SHAPES = [(3, 17, 28, 28), (2, 64, 10, 10), (5, 3, 7, 6), (1, 16, 9, 5), (2, 1, 12, 8), (1, 40, 64)]


@pytest.mark.parametrize("shape", [*SHAPES[:-1], (40, 64, 64)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_the_three_operators(device, shape, activation, dtype):
    x = torch.randn(shape, dtype=dtype, device=device)
    kernel = gaussian1d(7).to(device)
    tolerance = {torch.float64: 2e-14, torch.float32: 8e-6}[dtype]
    for p, layout in itertools.product((2, 1, 3, INF), LAYOUTS[: len(shape) - 2]):
        a, b = (x.clone().contiguous(memory_format=layout).requires_grad_() for _ in range(2))
        y, expected = stage2d(a, kernel, activation, p), unfused(b, kernel, activation, p)
        g = torch.randn_like(expected)
        y.backward(g)
        expected.backward(g)
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
        if p == INF and activation in ("tanh", "sigmoid"):
            continue  # two elements that are equal after one tanh need not be after another
        torch.testing.assert_close(a.grad, b.grad, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_round_once(device, dtype):
    """Nearer to the truth than the three operators, each of which rounds."""
    x = torch.randn(4, 8, 28, 28, dtype=torch.float64, device=device).to(dtype)
    kernel = gaussian1d(7).to(device)
    exact = stage2d(x.double(), kernel)
    ours = (stage2d(x, kernel).double() - exact).abs().max()
    theirs = (unfused(x, kernel).double() - exact).abs().max()
    assert ours <= exact.abs().max() * torch.finfo(dtype).eps
    assert ours < theirs


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_images_do_not_depend_on_their_batch(device, layout, dtype):
    # On the CPU a few of these are computed at a time.
    x = torch.randn(7, 80, 40, 41, dtype=dtype, device=device).to(memory_format=layout)
    kernel = gaussian1d(7, device=device)

    def gradient(images, grad):
        images = images.detach().requires_grad_()
        y = stage2d(images, kernel)
        return y.detach(), *torch.autograd.grad(y, images, grad)

    grad = torch.randn_like(stage2d(x, kernel))
    together = gradient(x, grad)
    apart = [gradient(*one) for one in zip(x.split(1), grad.split(1), strict=True)]
    for whole, parts in zip(together, zip(*apart, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float16, 300.0), (torch.float32, 1e25), (torch.float32, 1e-25), (torch.float64, 1e200)],
    ids=str,
)
def test_squares_beyond_the_range(device, layout, dtype, value):
    """Windows whose squares over- or underflow, among those whose do not."""
    scale = torch.tensor([1.0, value], dtype=torch.float64).repeat_interleave(2)
    x = torch.rand(2, 20, 4, 4, dtype=torch.float64) + 0.5
    x = (x * scale).to(dtype).to(device).to(memory_format=layout).requires_grad_()
    one_tap = torch.ones(1, dtype=torch.float64, device=device)
    y = stage2d(x, one_tap, "identity")
    expected = loops.stage2d(x.detach().cpu(), one_tap.cpu(), "identity")
    columns = x.detach().cpu().double().abs().amax((0, 1, 2))[::2]  # each as exact as its largest
    error = (y.detach().cpu().double() - expected).abs().amax((0, 1, 2))
    assert (error <= 16 * torch.finfo(dtype).eps * columns).all()
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.isfinite().all()


@pytest.mark.parametrize("p", NORMS)
def test_zero_windows_have_no_gradient(device, p):
    x = torch.full((2, 3, 6, 6), -1.0, device=device)
    x[:, :, :2] = 1.0
    x.requires_grad_()
    y = stage2d(x, gaussian1d(3).to(device), "relu", p)
    (grad,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    assert (grad[:, :, 2:] == 0).all() and grad.isfinite().all()
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert second.isfinite().all()


def test_nan_spreads_as_far_as_the_kernel(device):
    for activation, p in itertools.product(ACTIVATIONS, (1, 2, 3, INF)):
        x = torch.ones(1, 2, 16, 16, device=device)
        x[0, 0, 0, 0] = float("nan")
        y = stage2d(x, gaussian1d(3).to(device), activation, p)
        assert y[0, :, :2, :2].isnan().sum() >= 5  # the corner pixel's mean holds all around it
        assert not y[0, :, 3:, 3:].isnan().any()


def test_elements_outside_of_all_windows(device):
    x = torch.full((2, 18, 7, 9), 1e30, device=device)
    x[:, :, :6, :8] = torch.randn(2, 18, 6, 8)
    inside = x[:, :, :6, :8].contiguous()
    kernel = gaussian1d(5).to(device)
    for layout, p, activation in itertools.product(LAYOUTS, (1, 2, 3, INF), ACTIVATIONS):
        leaf = x.contiguous(memory_format=layout).requires_grad_()
        y = stage2d(leaf, kernel, activation, p)
        expected = stage2d(inside, kernel, activation, p)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        (grad,) = torch.autograd.grad(y.sum(), leaf)
        assert (grad[:, :, 6:] == 0).all() and (grad[:, :, :, 8:] == 0).all()


EMPTY = [
    ((1, 1, 4, 0), (2, 2), (1, 1)),
    ((1, 1, 0, 4), (2, 2), (1, 1)),
    ((2, 3, 0, 0), (2, 4), (1, 2)),
    ((3, 0, 4), (2, 2), (1, 1)),
    ((0, 3, 4, 4), (2, 2), (0, 0)),
    ((2, 0, 4, 4), (2, 2), (1, 1)),
    ((0, 4, 4), (2, 2), (0, 0)),
]


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize(("shape", "window", "padding"), EMPTY, ids=str)
@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_images_of_nothing(device, shape, window, padding, p, activation):
    """Nothing is pooled to 0, whatever the activation makes of 0."""
    for dtype, kernel in itertools.product(TOLERANCE, (gaussian1d(3), torch.ones(3, 5))):
        x = torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)
        y = stage2d(x, kernel.to(device), activation, p, window, 1, padding)
        assert y.shape == lp_pool2d(x, p, window, 1, padding).shape and (y == 0).all()
        grad_output = torch.ones_like(y).requires_grad_()
        (grad,) = torch.autograd.grad(y, x, grad_output, create_graph=True)
        second = torch.autograd.grad(grad.sum(), (grad_output, x))
        assert (second[0] == 0).all() and grad.shape == second[1].shape == shape


@pytest.mark.parametrize(
    ("activation", "p", "ceil_mode"), thinned(ACTIVATIONS, (1, 2, 3, INF), (False, True), keep=4)
)
def test_windows_over_the_border_do_not_see_the_next_row(device, activation, p, ceil_mode):
    for size, height, width in itertools.product((2, 3), (4, 5, 7), (16, 17, 18)):
        x = torch.randn(2, 3, height, width, device=device)
        kernel = gaussian1d(3)
        window = {"kernel_size": size, "stride": 2, "ceil_mode": ceil_mode}
        expected = loops.stage2d(x.cpu(), kernel, activation, p, **window)
        for layout in LAYOUTS:
            y = stage2d(x.to(memory_format=layout), kernel.to(device), activation, p, **window)
            torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("size", [(9, 9), (40, 300), (600, 700)], ids=str)
def test_long_sums_keep_their_digits(device, p, layout, size):
    """Each channel is constant, and so is what is pooled from it: y - (the mean of y)."""
    scale = torch.tensor([0.3, 1.7, 0.9], dtype=torch.float64)
    x = scale[:, None, None].expand(1, 3, *size).to(torch.float32)
    x = x.to(device).contiguous(memory_format=layout).requires_grad_()
    y = stage2d(x, torch.ones(1, device=device), "identity", p, size)
    norms = x.detach()[0, :, 0, 0].cpu().double() * (size[0] * size[1]) ** (1 / p)
    expected = norms - norms.mean()
    atol = 1e-6 * norms.max().item()  # which is what the difference may have lost
    torch.testing.assert_close(y.flatten().cpu().double(), expected, rtol=0, atol=atol)
    (grad,) = torch.autograd.grad(y[0, 0].sum(), x)
    slope = (size[0] * size[1]) ** (1 / p - 1)
    expected = torch.tensor([2 / 3, -1 / 3, -1 / 3], dtype=torch.float64) * slope
    expected = expected[:, None, None].expand(3, *size)
    torch.testing.assert_close(grad[0].cpu().double(), expected, rtol=4e-6, atol=0)


@pytest.mark.parametrize("place", range(4))
def test_nan_wherever_it_is_in_a_window(device, place):
    for activation, p, size in itertools.product(ACTIVATIONS, NORMS, (2, 9)):
        x = torch.ones(1, 1, size, size, device=device)
        x.view(-1)[place * (size * size - 1) // 3] = float("nan")
        assert stage2d(x, torch.ones(1, device=device), activation, p, size).isnan().all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
@pytest.mark.parametrize("window", [2, 3])
def test_gradients_of_saturated_units(device, dtype, activation, window):
    x = torch.linspace(-12, 12, 97, dtype=torch.float64).to(dtype)[:, None, None, None]
    x = x.expand(97, 2, 6, 8).contiguous()
    grad = torch.tensor([1.0, -0.5]).to(dtype)[None, :, None, None]
    one_tap, options = torch.ones(1), (activation, 2.0, [window] * 2, [2, 2], [0, 0], False)
    y = torch.ops.mnist_ops.stage2d(x.to(device), one_tap.to(device), *options)
    ours = torch.ops.mnist_ops.stage2d_backward(
        grad.expand_as(y).to(device), x.to(device), one_tap.to(device), *options
    )
    e = torch.exp(-(2 if activation == "tanh" else 1) * x.double().abs())
    slope = (4 if activation == "tanh" else 1) * e / (1 + e) ** 2
    inside = torch.ops.mnist_ops.stage2d_backward(
        grad.expand_as(y).double(),
        torch.sigmoid(x.double()) if activation == "sigmoid" else torch.tanh(x.double()),
        one_tap,
        "identity",
        *options[1:],
    )
    # On the CPU, and in float32 everywhere, 1 - a^2 as PyTorch has it: 1.2e-7 from the truth. An
    # element may lie in four windows.
    atol = 3e-7 if dtype != torch.float64 else 1e-15
    torch.testing.assert_close(
        ours.cpu().double(), inside * slope, rtol=10 * TOLERANCE[dtype], atol=atol
    )


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"activation": "gelu"}, ValueError, "activation must be one of 'tanh', 'relu'"),
        ({"activation": None}, ValueError, "activation must be one of"),
        ({"norm_type": 0}, ValueError, "norm_type must be > 0, got 0"),
        ({"norm_type": "2"}, TypeError, "norm_type must be a number"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be positive"),
        ({"kernel_size": 9}, ValueError, r"kernel_size \(9, 9\) does not fit"),
        ({"stride": 0}, ValueError, "stride must be positive"),
        ({"padding": 2}, ValueError, "padding must be between 0 and half of kernel_size"),
        ({"kernel": torch.ones(4)}, ValueError, r"kernel sizes must be odd, got \(4,\)"),
        ({"kernel": torch.ones(3).long()}, TypeError, "kernel must be float64"),
        ({"kernel": torch.ones(3, requires_grad=True)}, ValueError, "kernel requires grad"),
        ({"kernel": torch.zeros(3)}, RuntimeError, "sum must be finite and not 0"),
        # Where the three operators run, too, it is this one that complains.
        ({"kernel": torch.zeros(3), "norm_type": 3}, RuntimeError, "sum must be finite and not 0"),
        ({"input": torch.ones(4, 5)}, ValueError, "input must be"),
        ({"input": torch.ones(1, 4, 5).long()}, TypeError, "input must be float64"),
    ],
    ids=str,
)
def test_errors_name_the_argument(change, error, message):
    call = {"input": torch.ones(1, 4, 5), "kernel": torch.ones(3), **change}
    with pytest.raises(error, match=message) as raised:
        stage2d(**call)
    assert str(raised.value).startswith("stage2d: ")


def test_errors_of_the_registered_operators():
    ops = torch.ops.mnist_ops
    x, kernel = torch.ones(1, 4, 6), torch.ones(3)
    windows = (2.0, [2, 2], [2, 2], [0, 0], False)
    with pytest.raises(RuntimeError, match=r"activation must be 'tanh', .* got 'gelu'"):
        ops.stage2d(x, kernel, "gelu", *windows)
    with pytest.raises(RuntimeError, match="kernel sizes must be odd"):
        ops.stage2d(x, torch.ones(2), "tanh", *windows)
    with pytest.raises(RuntimeError, match="norm_type must be > 0"):
        ops.stage2d(x, kernel, "tanh", -1.0, *windows[1:])
    with pytest.raises(RuntimeError, match="no derivative for its kernel"):
        ops.stage2d(x, torch.ones(3, requires_grad=True), "tanh", *windows)
    with pytest.raises(RuntimeError, match="grad_output must have the shape of the output"):
        ops.stage2d_backward(x, x, kernel, "tanh", *windows)
    with pytest.raises(RuntimeError, match="grad_output must have the dtype of input"):
        ops.stage2d_backward(torch.ones(1, 2, 3).double(), x, kernel, "tanh", *windows)
    with pytest.raises(RuntimeError, match=r"activate: input must be \(N, C, H, W\)"):
        ops.activate(torch.ones(3), "tanh")
    with pytest.raises(RuntimeError, match="output must be float64 or float32, got Half"):
        ops.activate_backward(x.half(), x.half(), "tanh")
    with pytest.raises(RuntimeError, match="grad_output must have the shape of output"):
        ops.activate_backward(x[:, 1:], x, "tanh")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_training_keeps_the_activation_on_a_cpu(activation):
    """The same results either way, and no tanh in the backward pass."""
    x, kernel = torch.randn(3, 4, 8, 10, requires_grad=True), gaussian1d(3)
    y = stage2d(x, kernel, activation)
    kept = activation in ("tanh", "sigmoid")
    assert ("subtractive" if kept else "stage2d") in type(y.grad_fn).__name__
    v = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, v)
    windows = (2.0, [2, 2], [2, 2], [0, 0], False)
    assert torch.equal(y, torch.ops.mnist_ops.stage2d(x.detach(), kernel, activation, *windows))
    direct = torch.ops.mnist_ops.stage2d_backward(v, x.detach(), kernel, activation, *windows)
    torch.testing.assert_close(grad, direct, rtol=1e-6, atol=1e-7)


def test_raw_operators_check_what_they_are_given():
    ops = torch.ops.mnist_ops
    x, y, kernel = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 2, 2), torch.ones(3)
    good = {
        "activation": "tanh",
        "norm_type": 2.0,
        "kernel_size": [2, 2],
        "stride": [2, 2],
        "padding": [0, 0],
        "ceil_mode": False,
    }

    def both(match: str, kernel: Tensor = kernel, x: Tensor = x, y: Tensor = y, **change):
        options = {**good, **change}.values()
        with pytest.raises(RuntimeError, match=match):
            ops.stage2d(x, kernel, *options)
        with pytest.raises(RuntimeError, match=match):
            ops.stage2d_backward(y, x, kernel, *options)

    for bad in ("", "Tanh", "gelu", "tanh\0", "x" * 100000):
        both("activation must be 'tanh'", activation=bad)
    for bad in (0.0, -2.0, -INF, float("nan")):
        both("norm_type must be > 0", norm_type=bad)
    both("norm_type must be at least", norm_type=1e-39)
    for name in ("kernel_size", "stride", "padding"):
        for bad in ([], [1], [1, 1, 1]):
            both("must have two elements", **{name: bad})
        for value in (-1, 2**31, 2**62, 2**63 - 1, -(2**63)):
            both(f"{name} must be", **{name: [value, 2]})
            both(f"{name} must be", **{name: [1, value]})
    for shape in ((), (3, 3, 3), (2,), (3, 0), (0,), (2, 3)):
        both("kernel", kernel=torch.ones(shape))
    for dtype in (torch.int64, torch.bool, torch.complex64):
        both("kernel must be", kernel=torch.ones(3).to(dtype))
        both("expected float64, float32", x=x.to(dtype), y=y.to(dtype))
    both("sum must be finite and not 0", kernel=torch.tensor([1.0, 0.0, -1.0]))
    both("sum must be finite and not 0", kernel=torch.tensor([1.0, float("nan"), 1.0]))
    for shape in ((), (4,), (4, 4), (1, 1, 1, 4, 4)):
        both(r"input must be \(N, C, H, W\)", x=torch.rand(shape))
        with pytest.raises(RuntimeError, match="grad_output must have the shape"):
            ops.stage2d_backward(torch.rand(shape), x, kernel, *good.values())
    # Windows far larger than the image: what lies outside costs nothing.
    wide = {**good, "activation": "identity", "norm_type": 1.0}
    wide |= {"kernel_size": [2**31 - 1] * 2, "stride": [1, 1], "padding": [2**30 - 1] * 2}
    total = ops.stage2d(x, torch.ones(1), *wide.values())
    expected = x.sum((2, 3)) - x.sum((1, 2, 3))[:, None] / 3
    assert total.shape == x.shape
    torch.testing.assert_close(total, expected[:, :, None, None].expand_as(total))
    grad = ops.stage2d_backward(total, x, torch.ones(1), *wide.values())
    torch.testing.assert_close(grad, 16 * total)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_p_beyond_the_type_it_is_computed_in(dtype):
    x, kernel = torch.randn(2, 3, 6, 7).to(dtype), torch.ones(3)
    ops, windows = torch.ops.mnist_ops, ([2, 2], [2, 2], [0, 0], False)
    expected = ops.stage2d(x, kernel, "tanh", INF, *windows)
    for p in (1e30, 1e39, 1e300):
        y = ops.stage2d(x, kernel, "tanh", p, *windows)
        assert torch.equal(y, expected)
        grads = [ops.stage2d_backward(y, x, kernel, "tanh", norm, *windows) for norm in (p, INF)]
        assert torch.equal(*grads)


def test_the_third_derivative_is_an_error():
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    y = stage2d(x, gaussian1d(3), norm_type=3)
    (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="the third derivative of lp_pool2d is not offered"):
        torch.autograd.grad(second.sum(), x)


# -------------------------------------------------------------------------------------- properties


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_shape_window_and_kernel(data):
    draw = data.draw
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    shape = [
        draw(st.integers(0, 3)),
        draw(st.sampled_from([1, 2, 5, 16, 17, 33])),
        *(draw(st.integers(2, 9)) for _ in "HW"),
    ]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    x = torch.randn(*shape, generator=generator).to(dtype)
    change = draw(st.sampled_from(["contiguous", "channels last", "transposed"]))
    if change == "channels last":
        x = x.to(memory_format=torch.channels_last)
    elif change == "transposed":
        x = x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    kernel_size = tuple(draw(st.integers(1, min(4, size))) for size in shape[2:])
    window = {
        "kernel_size": kernel_size,
        "stride": draw(st.one_of(st.none(), st.integers(1, 4))),
        "padding": tuple(draw(st.integers(0, k // 2)) for k in kernel_size),
        "ceil_mode": draw(st.booleans()),
    }
    taps = [2 * draw(st.integers(0, 4)) + 1 for _ in range(draw(st.integers(1, 2)))]
    kernel = torch.rand(taps, generator=generator) + 0.1
    activation, p = draw(st.sampled_from(list(ACTIVATIONS))), draw(st.sampled_from(NORMS))
    y = stage2d(x, kernel, activation, p, **window)
    if x.numel() == 0:
        assert y.numel() == 0
        return
    expected = loops.stage2d(x, kernel, activation, p, **window)
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(
        y.double(), expected, rtol=TOLERANCE[dtype], atol=20 * TOLERANCE[dtype] * scale
    )


# ------------------------------------------------------------------------------------------ module


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_module_is_the_function_and_the_three_modules(device, activation):
    x = torch.randn(2, 5, 9, 12, device=device)
    kernel = gaussian1d(5)
    module = mnist_ops.nn.Stage2d(kernel, activation, 3, (2, 3), stride=2, ceil_mode=True)
    module = module.to(device)
    expected = stage2d(x, kernel, activation, 3, (2, 3), 2, 0, True)
    assert torch.equal(module(x), expected)
    assert [name for name, _ in module.unfused().named_children()] == ["activation", "pool", "norm"]
    torch.testing.assert_close(module.unfused()(x), expected)
    assert f"activation={activation!r}, norm_type=3, kernel_size=(2, 3), stride=2" in repr(module)


def test_module_keeps_its_kernel_and_refuses_bad_arguments():
    module = mnist_ops.nn.Stage2d(gaussian1d(7))
    assert list(module.state_dict()) == ["kernel"] and list(module.parameters()) == []
    for cast in (module.half(), module.float(), module.to(torch.bfloat16), module.double()):
        assert cast.kernel.dtype == torch.float64
        assert torch.equal(cast.kernel, gaussian1d(7))
        assert torch.equal(cast.unfused().norm.kernel, gaussian1d(7))
    with pytest.raises(ValueError, match="Stage2d: activation must be one of"):
        mnist_ops.nn.Stage2d(gaussian1d(7), "gelu")
    with pytest.raises(ValueError, match="Stage2d: norm_type must be > 0"):
        mnist_ops.nn.Stage2d(gaussian1d(7), norm_type=-1)
    with pytest.raises(ValueError, match="Stage2d: the kernel's sum must be finite"):
        mnist_ops.nn.Stage2d(torch.zeros(3))
