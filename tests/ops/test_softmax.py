"""Sigmoid, softmax, log-softmax and softmax + NLL against loops and the reports' formulas."""

from __future__ import annotations

import math

import loops
import numpy as np
import pytest
import torch
from conftest import torch7_cases, torch7_tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import mnist_ops

INF = float("inf")
BETAS = [1.0, -1.0, 0.7, -2.5, 0.0]
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 3e-6,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def close(actual, expected, dtype):
    torch.testing.assert_close(
        actual.detach().cpu().double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


# ----------------------------------------------------------------------------------------- sigmoid


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_sigmoid_equals_the_loops(device, dtype):
    x = (20 * torch.randn(2, 70, 3, 5, dtype=torch.float64)).to(dtype)
    expected = loops.sigmoid(x)
    for layout in LAYOUTS:
        leaf = x.to(device).to(memory_format=layout).requires_grad_()
        y = mnist_ops.sigmoid(leaf)
        assert y.is_contiguous(memory_format=layout)
        close(y, expected, dtype)
        (grad,) = torch.autograd.grad(y, leaf, torch.full_like(y, 2.0))
        # From the rounded output, as the fused backward has it.
        saved = y.detach().cpu().double()
        close(grad, 2 * saved * (1 - saved), dtype)


def test_sigmoid_over_its_whole_range(device):
    for dtype, limit, ulps in ((torch.float32, 87.0, 3), (torch.float64, 700.0, 3)):
        x = torch.linspace(-limit, limit, 200001, dtype=dtype, device=device)
        y = mnist_ops.sigmoid(x).cpu().double()
        expected = loops.sigmoid(x.cpu())
        assert ((y - expected).abs() / expected).max() < ulps * torch.finfo(dtype).eps
    for dtype, last in ((torch.float32, 104), (torch.float64, 745)):  # subnormal numbers
        x = torch.linspace(-last, -last * 0.84, 1001, dtype=dtype, device=device)
        y = mnist_ops.sigmoid(x).cpu()
        smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
        steps = (y.double() - loops.sigmoid(x.cpu())).abs() / smallest
        assert ((steps <= 1) | (y >= torch.finfo(dtype).tiny)).all()
    extremes = torch.tensor([-INF, INF, float("nan"), -1e30, 1e30], device=device)
    assert mnist_ops.sigmoid(extremes).tolist()[:2] == [0, 1]
    assert mnist_ops.sigmoid(extremes)[2].isnan()
    assert mnist_ops.sigmoid(extremes).tolist()[3:] == [0, 1]


def test_sigmoid_gradients(device):
    x = torch.randn(3, 4, dtype=torch.float64, device=device, requires_grad=True)
    assert gradcheck(mnist_ops.sigmoid, (x,))
    assert gradgradcheck(mnist_ops.sigmoid, (x,))


# --------------------------------------------------------------------------- softmax, log-softmax


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("beta", BETAS)
def test_equals_the_loops(device, name, dtype, beta):
    x = (3 * torch.randn(2, 7, 5, 6, dtype=torch.float64)).to(dtype)
    for dim in (0, 1, -1, -2):
        expected = getattr(loops, name)(x, dim, beta)
        for layout in LAYOUTS:
            leaf = x.to(device).to(memory_format=layout).requires_grad_()
            y = getattr(mnist_ops, name)(leaf, dim, beta)
            assert y.is_contiguous(memory_format=layout)
            close(y, expected, dtype)
            g = torch.randn(x.shape, dtype=torch.float64).to(dtype)
            (grad,) = torch.autograd.grad(y, leaf, g.to(device))
            assert grad.is_contiguous(memory_format=layout)
            saved, g = y.detach().cpu().double(), g.double()
            if name == "softmax":
                formula = beta * saved * (g - (g * saved).sum(dim, keepdim=True))
            else:
                formula = beta * (g - saved.exp() * g.sum(dim, keepdim=True))
            close(grad, formula, dtype)


@pytest.mark.parametrize("size", [1, 2, 10, 31, 32, 33, 1000, 1025, 5000])
def test_sizes_of_the_dimension(device, size):
    x = 4 * torch.randn(3, size, dtype=torch.float64, device=device)
    for name in ("softmax", "log_softmax"):
        y = getattr(mnist_ops, name)(x)
        torch.testing.assert_close(y, getattr(F, name)(x, dim=-1), rtol=1e-12, atol=1e-12)
        across = getattr(mnist_ops, name)(x.t().contiguous(), 0)
        torch.testing.assert_close(across, y.t(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_gradients(device, name):
    x = torch.randn(3, 4, 5, dtype=torch.float64, device=device, requires_grad=True)
    for dim in range(3):
        for beta in (1.0, -1.7):

            def apply(t):
                return getattr(mnist_ops, name)(t, dim, beta)

            assert gradcheck(apply, (x,))
            assert gradgradcheck(apply, (x,))


def test_the_reports_derivatives(device):
    """y_i = exp(-b x_i) / sum: dy_i/dx_i = -b y_i (1 - y_i), dy_i/dx_j = +b y_i y_j."""
    b = 1.7
    x = torch.randn(6, dtype=torch.float64, device=device)
    y = mnist_ops.softmax(x, beta=-b)
    torch.testing.assert_close(y, torch.exp(-b * x) / torch.exp(-b * x).sum())
    jacobian = torch.autograd.functional.jacobian(lambda t: mnist_ops.softmax(t, beta=-b), x)
    expected = b * torch.outer(y, y)
    expected.diagonal().copy_(-b * y * (1 - y))
    torch.testing.assert_close(jacobian, expected)


def test_extreme_inputs(device):
    large = torch.tensor([1e4, 1e4, -1e4], device=device)
    assert mnist_ops.softmax(large).tolist() == [0.5, 0.5, 0.0]
    assert mnist_ops.log_softmax(large)[2].item() == pytest.approx(-2e4, rel=1e-4)
    masked = torch.tensor([0.0, -INF], device=device)
    assert mnist_ops.softmax(masked).tolist() == [1, 0]
    assert mnist_ops.log_softmax(masked).tolist() == [0, -INF]
    for row in ([-INF, -INF], [INF, 0.0], [float("nan"), 0.0]):
        x = torch.tensor(row, device=device)
        assert mnist_ops.softmax(x).isnan().all(), row  # as in PyTorch
        assert F.softmax(x, -1).isnan().all()


def test_scalars_and_vectors(device):
    scalar = torch.tensor(3.0, device=device, requires_grad=True)
    assert mnist_ops.softmax(scalar).item() == 1 and mnist_ops.log_softmax(scalar).item() == 0
    mnist_ops.softmax(scalar, dim=0).backward()
    assert scalar.grad.item() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [6, 40])
def test_gradient_of_what_is_no_logarithm_of_a_share(device, dtype, columns):
    """An output as large as the type has them: infinite, as in PyTorch, not NaN."""
    y = torch.zeros(2, columns, device=device, dtype=dtype)
    y[0], grad = torch.finfo(dtype).max, torch.ones_like(y)
    for dim in (0, 1):
        result = torch.ops.mnist_ops.log_softmax_backward(grad, y, dim, 1.0)
        assert (result[0] == -math.inf).all()
        assert (result[1] == 1 - y.shape[dim]).all()


@pytest.mark.parametrize(
    "case",
    [case for case in torch7_cases("modules") if case["name"].startswith("logsoftmax")],
    ids=lambda case: case["name"],
)
def test_exact_log_softmax_is_near_torch7s_approximate_one(device, case):
    """The original's exponential is approximate (1e-4); the exact one must be that near to it."""
    x = torch7_tensor(case["input"]).to(device).requires_grad_()
    y = mnist_ops.log_softmax(x)
    (grad,) = torch.autograd.grad(y, x, torch7_tensor(case["gradOutput"]).to(device))
    torch.testing.assert_close(y.detach().cpu(), torch7_tensor(case["output"]), rtol=0, atol=2e-4)
    torch.testing.assert_close(grad.cpu(), torch7_tensor(case["gradInput"]), rtol=0, atol=1e-3)


# ------------------------------------------------------------------------------------ softmax_nll


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("beta", BETAS)
def test_nll_equals_the_loops(device, dtype, beta):
    x = (3 * torch.randn(9, 10, dtype=torch.float64)).to(dtype)
    target = torch.arange(9)
    expected = loops.softmax_nll(x, target, beta)
    leaf = x.to(device).requires_grad_()
    for reduction, reduce in (("none", torch.clone), ("sum", torch.sum), ("mean", torch.mean)):
        loss = mnist_ops.softmax_nll(leaf, target.to(device), beta, reduction)
        assert loss.dtype == dtype
        close(loss, reduce(expected), dtype)
    (grad,) = torch.autograd.grad(loss, leaf)
    y = loops.softmax(x, 1, beta)
    close(grad, beta * (y - F.one_hot(target, 10)) / 9, dtype)


def test_nll_of_images_and_vectors(device):
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    target = torch.randint(5, (2, 3, 4))
    expected = F.cross_entropy(0.5 * x, target, reduction="none")
    for layout in LAYOUTS:
        leaf = x.to(device).to(memory_format=layout).requires_grad_()
        loss = mnist_ops.softmax_nll(leaf, target.to(device), 0.5, "none")
        torch.testing.assert_close(loss.detach().cpu(), expected, rtol=1e-12, atol=1e-12)
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        assert grad.is_contiguous(memory_format=layout)
        y = F.softmax(0.5 * x, 1)
        formula = 0.5 * (y - F.one_hot(target, 5).movedim(-1, 1))
        torch.testing.assert_close(grad.cpu(), formula, rtol=1e-12, atol=1e-12)
    vector, index = x[0, :, 0, 0].to(device), target[0, 0, 0].to(device)
    one = mnist_ops.softmax_nll(vector, index, 0.5)
    assert one.dim() == 0 and one.item() == pytest.approx(expected[0, 0, 0].item())
    as_bytes = mnist_ops.softmax_nll(x.to(device), target.to(device).to(torch.uint8), 0.5, "none")
    torch.testing.assert_close(as_bytes.cpu(), expected, rtol=1e-12, atol=1e-12)


def test_nll_gradients(device):
    x = torch.randn(4, 6, dtype=torch.float64, device=device, requires_grad=True)
    target = torch.tensor([0, 5, 2, 2], device=device)
    for reduction in ("none", "mean", "sum"):

        def loss(t):
            return mnist_ops.softmax_nll(t, target, -1.3, reduction)

        assert gradcheck(loss, (x,))
        assert gradgradcheck(loss, (x,))


def test_nll_keeps_digits_where_both_terms_are_large(device):
    x = torch.tensor([[1000.0, 1000.5]], device=device)
    loss = mnist_ops.softmax_nll(x, torch.tensor([1], device=device))
    assert loss.item() == pytest.approx(
        loops.softmax_nll(x.cpu(), torch.tensor([1])).item(), rel=1e-5
    )


def test_nll_of_nothing(device):
    x = torch.zeros(0, 3, device=device, requires_grad=True)
    target = torch.zeros(0, dtype=torch.long, device=device)
    assert mnist_ops.softmax_nll(x, target, reduction="sum").item() == 0
    assert mnist_ops.softmax_nll(x, target).isnan()  # the mean of nothing, as in PyTorch
    assert mnist_ops.softmax_nll(x, target, reduction="none").shape == (0,)
    mnist_ops.softmax_nll(x, target, reduction="sum").backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("wrong", [-1, 10, 255, 2**62, -(2**62)])
def test_nll_target_out_of_range(device, wrong):
    x = torch.zeros(3, 10, device=device, requires_grad=True)
    target = torch.tensor([0, wrong, 1], device=device)
    if device == "cpu":
        with pytest.raises(RuntimeError, match=rf"in \[0, 10\) or ignore_index, -100, got {wrong}"):
            mnist_ops.softmax_nll(x, target)
    else:
        loss = mnist_ops.softmax_nll(x, target, reduction="none")
        loss.nansum().backward()
        assert loss.isnan().tolist() == [False, True, False]
        assert x.grad.isnan().all(1).tolist()[1] or (x.grad[1] == 0).all()
        assert x.grad[[0, 2]].isfinite().all()


# ------------------------------------------------------------- digits, long rows, hard numbers


# How often a row is repeated within a line, and the dimension of the lines: every way the CPU goes.
WAYS = [(1, -1), (4, -1), (20, -1), (1, 0), (20, 0)]


def exact_log_softmax(x: torch.Tensor, beta: float, dim: int) -> torch.Tensor:
    """By differences, which are exact in numbers of 64 bits' mantissa, and never overflow."""
    rows = x.double().movedim(dim, -1).numpy().astype(np.longdouble)
    rounded = np.longdouble(beta if x.dtype == torch.float64 else np.float32(beta))
    largest = (rows.max if beta >= 0 else rows.min)(-1, keepdims=True)
    below = rounded * (rows - largest)
    logs = below - np.log(np.exp(below).sum(-1, keepdims=True))
    return torch.from_numpy(logs.astype(np.float64)).movedim(-1, dim)


def losses_and_gradient(x: torch.Tensor, targets: torch.Tensor, beta: float, dim: int, device: str):
    """softmax_nll of the lines of a matrix, along either dimension."""
    leaf = x.to(device).requires_grad_()
    if dim == 0:
        loss = mnist_ops.softmax_nll(leaf[None], targets[None].to(device), beta, "none")[0]
    else:
        loss = mnist_ops.softmax_nll(leaf, targets.to(device), beta, "none")
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach().cpu(), grad.cpu()


def within_two_ulps(actual: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor, eps: float):
    """``expected`` where it is infinite in the type, else within two units at the given scale."""
    assert not actual.isnan().any()
    reachable = expected.clamp(-torch.finfo(actual.dtype).max, torch.finfo(actual.dtype).max)
    finite = reachable == expected
    overflown = ~finite & actual.isinf()
    error = (actual.double() - reachable).abs()
    assert ((error <= 2 * eps * scale) | overflown).all(), (error / (eps * scale)).max()
    assert (actual[finite] * 0 == 0).all()


@pytest.mark.parametrize("beta", [1.0, -1.0, 0.7, -2.5, 1e-3])
@pytest.mark.parametrize("offset", [1e2, 1e4, -1e4, 1e7, 1e30])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_common_offset_costs_no_digits(device, dtype, offset, beta):
    """Not in the results, not in the gradients: x_i - max is exact, where log sum exp is not."""
    eps = torch.finfo(dtype).eps
    if offset > torch.finfo(dtype).max:
        pytest.skip(f"{offset} is none of the numbers of {dtype}")
    generator = torch.Generator().manual_seed(3)
    for repeats, dim in WAYS:
        x = torch.randn(6, 10, dtype=torch.float64, generator=generator).repeat(1, repeats)
        x = (x * min(1.0, 100 / abs(offset) / eps) + offset).to(dtype)
        g = torch.randn(x.shape, dtype=torch.float64, generator=generator).to(dtype)
        if dim == 0:
            x, g = x.t().contiguous(), g.t().contiguous()
        expected = exact_log_softmax(x, beta, dim)
        scale = expected.abs().amax(dim, keepdim=True)
        leaf = x.to(device).requires_grad_()
        y = mnist_ops.log_softmax(leaf, dim, beta)
        within_two_ulps(y.detach().cpu(), expected, scale, eps)
        (grad,) = torch.autograd.grad(y, leaf, g.to(device))
        total = g.double().sum(dim, keepdim=True)
        # The fused backward starts from the output, rounded.
        saved = y.detach().cpu().double().exp()
        formula = beta * (g.double() - saved * total)
        scale_g = abs(beta) * (g.double().abs() + total.abs() + 1)
        assert ((grad.cpu().double() - formula).abs() <= 4 * eps * scale_g).all()
        targets = torch.arange(6) % x.shape[dim]
        loss, grad = losses_and_gradient(x, targets, beta, dim, device)
        at = targets.unsqueeze(dim)
        within_two_ulps(loss, -expected.gather(dim, at).squeeze(dim), scale.squeeze(dim), eps)
        hot = torch.zeros_like(expected).scatter_(dim, at, 1.0)
        formula = beta * (expected.exp() - hot)
        # exp of a rounded number: its error is that number's.
        scale_g = abs(beta) * (1 + expected.abs() * expected.exp())
        assert ((grad.double() - formula).abs() <= 4 * eps * scale_g).all()


@pytest.mark.parametrize("beta", [1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 1e-38, 3e38, 0.0, 1e-50])
@pytest.mark.parametrize("repeats, dim", WAYS)
def test_rows_from_end_to_end_of_the_range(device, repeats, dim, beta):
    """beta x overflows, or x less the largest does; what can be represented must come out."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.tensor([3e38, 3e38, -3e38], dtype=torch.float64).repeat(6, repeats).to(dtype)
        if dim == 0:
            x = x.t().contiguous()
        expected = exact_log_softmax(x, beta, dim)
        y = mnist_ops.log_softmax(x.to(device), dim, beta).cpu()
        scale = torch.where(expected.abs() < 1e30, 10.0, expected.abs())
        within_two_ulps(y, expected, scale, torch.finfo(dtype).eps)
        shares = mnist_ops.softmax(x.to(device), dim, beta).cpu().double()
        assert ((shares - expected.exp()).abs() <= 4 * torch.finfo(dtype).eps).all()
        loss, grad = losses_and_gradient(x, torch.full((6,), 2), beta, dim, device)
        chosen = -expected.select(dim, 2)
        scale = torch.where(chosen < 1e30, 10.0, chosen)
        within_two_ulps(loss, chosen, scale, torch.finfo(dtype).eps)
        hot = torch.zeros_like(expected)
        hot.select(dim, 2).fill_(1.0)
        formula = torch.tensor(beta).to(torch.float32) * (expected.exp() - hot)
        torch.testing.assert_close(
            grad.double(), formula.double(), rtol=4 * torch.finfo(dtype).eps, atol=1e-40
        )


@pytest.mark.parametrize("size", [3, 10, 33, 40, 100])
@pytest.mark.parametrize("beta", [1.0, -1.0])
def test_the_largest_may_be_anywhere(device, size, beta):
    """A maximum that is passed over is an exponential that overflows."""
    x = beta * 1e4 * torch.eye(size, device=device)
    expected = 1e4 * (torch.eye(size) - 1)
    targets = torch.arange(size, device=device).roll(1)
    for dim in (0, 1):
        assert torch.equal(mnist_ops.softmax(x, dim, beta).cpu(), torch.eye(size))
        assert torch.equal(mnist_ops.log_softmax(x, dim, beta).cpu(), expected)
    loss = mnist_ops.softmax_nll(x, targets, beta, "none")
    assert (loss == 1e4).all()
    assert (mnist_ops.softmax_nll(x[None], targets[None], beta, "none") == 1e4).all()


@pytest.mark.parametrize("repeats, dim", WAYS)
@pytest.mark.parametrize("beta", [1.0, -1.0, 0.7, -0.7, 0.0])
def test_rows_that_are_not_finite_are_those_of_pytorch(device, repeats, dim, beta):
    nan = float("nan")
    for place in (0, 3, 9):
        for special in (nan, INF, -INF):
            for fill in (None, special, -INF):
                x = torch.linspace(-2, 2, 10) if fill is None else torch.full((10,), fill)
                x[place] = special
                x = x.repeat(3, repeats)
                x[1] = torch.linspace(-1, 1, x.shape[1])  # a row beside them stays as it is
                if dim == 0:
                    x = x.t().contiguous()
                for name in ("softmax", "log_softmax"):
                    theirs = getattr(F, name)(beta * x, dim)
                    ours = getattr(mnist_ops, name)(x.to(device), dim, beta).cpu()
                    torch.testing.assert_close(ours, theirs, equal_nan=True)
                rows = x if dim == -1 else x.t()
                target = torch.tensor([place, 2, (place + 1) % 10])
                theirs = F.cross_entropy(beta * rows, target, reduction="none")
                ours, _ = losses_and_gradient(x, target, beta, dim, device)
                torch.testing.assert_close(ours, theirs, equal_nan=True)


def check_long_rows(device: str = "cpu") -> None:
    """Sums of millions of float32 numbers, in every way they are added up: within 1e-6."""
    ones = torch.full((1 << 27,), 0.3, device=device)
    share = mnist_ops.softmax(ones)
    assert share.min().item() == share.max().item() == pytest.approx(2.0**-27, rel=1e-6)
    del ones, share

    # Equal numbers, whose sum is off in the same direction every time, beside one that is larger.
    n, low = 5_000_000, -1.3
    total = 1 + (n - 1) * math.exp(np.float32(low))
    for shape, dim in (((1, n), 1), ((n, 2), 0)):
        x = torch.full(shape, low, device=device)
        x.select(dim, n // 3).zero_()
        y = mnist_ops.softmax(x, dim)
        assert y.max().item() == pytest.approx(1 / total, rel=1e-6)
        logs = mnist_ops.log_softmax(x, dim)
        assert logs.max().item() == pytest.approx(-math.log(total), abs=2e-6)
        scores, targets = (x, [n // 3]) if dim == 1 else (x[None], [[n // 3, n // 3]])
        targets = torch.tensor(targets, device=device)
        loss = mnist_ops.softmax_nll(scores, targets, reduction="none")
        for value in loss.flatten().tolist():
            assert value == pytest.approx(math.log(total), abs=2e-6)
        # sum g = 0.1 n, and sum g y = 0.3 with this y that is 3 / n everywhere.
        g, equal = torch.full_like(x, 0.1), torch.full_like(x, 3 / n)
        grad = torch.ops.mnist_ops.log_softmax_backward(g, equal.log(), dim, 1.0)
        assert grad.min().item() == pytest.approx(0.1 - 0.3, rel=1e-6)
        grad = torch.ops.mnist_ops.softmax_backward(g, equal, dim, 1.0)
        assert grad.max().item() == pytest.approx(3 / n * (0.1 - 0.3), rel=1e-6)
        assert grad.min().item() == pytest.approx(3 / n * (0.1 - 0.3), rel=1e-6)


def test_long_rows(device):
    check_long_rows(device)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_millions_of_losses_are_added_up_well(device, reduction):
    n = 3_000_000
    x = torch.tensor([[0.0, 1.3]]).expand(n, 2).to(device)
    target = torch.zeros(n, dtype=torch.long, device=device)
    one = math.log(1 + math.exp(np.float32(1.3)))
    loss = mnist_ops.softmax_nll(x, target, 1.0, reduction).item()
    assert loss == pytest.approx(one if reduction == "mean" else n * one, rel=1e-6)


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input": torch.ones(3, dtype=torch.int64)}, TypeError, "input must be float64"),
        ({"input": 3.0}, TypeError, "input must be a Tensor, got float"),
        ({"dim": 2}, IndexError, r"dim must be in \[-2, 1\], got 2"),
        ({"dim": -3}, IndexError, r"dim must be in \[-2, 1\], got -3"),
        ({"dim": 0.0}, TypeError, "dim must be an int"),
        ({"beta": float("nan")}, ValueError, "beta must be finite, got nan"),
        ({"beta": INF}, ValueError, "beta must be finite, got inf"),
        ({"beta": "1"}, TypeError, "beta must be a number, got str"),
    ],
    ids=str,
)
def test_errors_name_the_argument(name, arguments, error, message):
    with pytest.raises(error, match=f"{name}: {message}"):
        getattr(mnist_ops, name)(**{"input": torch.ones(2, 3), **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"target": torch.zeros(2, dtype=torch.bool)},
            TypeError,
            "target must be integer class indices or probabilities, got torch.b",
        ),
        ({"target": [0, 1]}, TypeError, "target must be a Tensor, got list"),
        (
            {"target": torch.zeros(3, dtype=torch.long)},
            ValueError,
            r"target must have the shape \(2,\)",
        ),
        ({"input": torch.tensor(1.0)}, ValueError, "got a scalar"),
        ({"reduction": "avg"}, ValueError, "reduction must be 'mean', 'sum' or 'none', got 'avg'"),
        ({"beta": INF}, ValueError, "beta must be finite"),
        ({"input": torch.ones(2, 0)}, ValueError, "input has no classes"),
    ],
    ids=str,
)
def test_nll_errors_name_the_argument(arguments, error, message):
    call = {"input": torch.ones(2, 3), "target": torch.zeros(2, dtype=torch.long), **arguments}
    with pytest.raises(error, match=message):
        mnist_ops.softmax_nll(**call)


def test_errors_of_the_registered_operators():
    ops = torch.ops.mnist_ops
    x = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="dim must be in"):
        ops.softmax(x, 5, 1.0)
    with pytest.raises(RuntimeError, match="grad_output must have the shape of output"):
        ops.softmax_backward(torch.ones(3), x, 1, 1.0)
    with pytest.raises(RuntimeError, match="grad_output must have the dtype of output"):
        ops.log_softmax_backward(x.double(), x, 1, 1.0)
    with pytest.raises(RuntimeError, match="grad_output must have the shape of output"):
        ops.sigmoid_backward(torch.ones(3), x)
    target = torch.zeros(2, dtype=torch.long)
    with pytest.raises(RuntimeError, match="target must be int64"):
        ops.softmax_nll(x, target.int(), None, 1.0, "none", -100, 0.0)
    with pytest.raises(RuntimeError, match="reduction must be 'mean', 'sum' or 'none', got 'max'"):
        ops.softmax_nll(x, target, None, 1.0, "max", -100, 0.0)
    options = None, 1.0, "mean", -100, 0.0
    loss, total = ops.softmax_nll(x, target, *options)
    backward = ops.softmax_nll_backward
    for call, message in (
        ((loss.expand(2), x, target, total, *options), "grad_loss must have the shape of the loss"),
        ((loss.double(), x, target, total, *options), "grad_loss must have the dtype of input"),
        ((loss, x, target, total.expand(1), *options), "total must be a scalar"),
        ((loss, x, target, total.double(), *options), "total must be Float, got Double"),
    ):
        with pytest.raises(RuntimeError, match=f"softmax_nll_backward: {message}"):
            backward(*call)


@pytest.mark.parametrize("beta", [float("nan"), INF, -INF, 1e39, -1e39])
def test_beta_must_be_a_number_in_the_type_to_compute_in(beta):
    ops = torch.ops.mnist_ops
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x, target = torch.ones(2, 3, dtype=dtype), torch.zeros(2, dtype=torch.long)
        options = None, beta, "none", -100, 0.0
        total = torch.ones(0)
        for call in (
            lambda: ops.softmax(x, 1, beta),
            lambda: ops.log_softmax(x, 1, beta),
            lambda: ops.softmax_backward(x, x, 1, beta),
            lambda: ops.log_softmax_backward(x, x, 1, beta),
            lambda: ops.softmax_nll(x, target, *options),
            lambda: ops.softmax_nll_backward(x[:, 0], x, target, total, *options),
        ):
            with pytest.raises(RuntimeError, match=r"beta must be finite in Float, got"):
                call()
    x = torch.tensor([1e-39, 0.0], dtype=torch.float64)
    torch.testing.assert_close(ops.softmax(x, 0, 1e39), F.softmax(1e39 * x, 0))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (0, 3), (3, 0), (2, 0, 3), (1,) * 20], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_registered_operators_take_any_shape(device, shape, dtype):
    ops = torch.ops.mnist_ops
    x = torch.ones(shape, dtype=dtype, device=device)
    for dim in {0, -1, max(len(shape), 1) - 1}:
        for name in ("softmax", "log_softmax"):
            y = getattr(ops, name)(x, dim, -2.0)
            assert torch.equal(y, getattr(F, name)(-2 * x, dim))
            grad = getattr(ops, f"{name}_backward")(x, y, dim, -2.0)
            assert grad.shape == x.shape and (grad == 0).all()  # one element, or none
    assert ops.sigmoid_backward(x, ops.sigmoid(x)).shape == x.shape
    for dim in (2**63 - 1, -(2**63), 20, -21):
        with pytest.raises(RuntimeError, match="dim must be in"):
            ops.softmax(x, dim, 1.0)
        with pytest.raises(RuntimeError, match="dim must be in"):
            ops.log_softmax_backward(x, x, dim, 1.0)


def test_memory_that_overlaps_or_has_gaps(device):
    """Elements that share memory, repeated ones and conjugates that are not resolved."""
    ops = torch.ops.mnist_ops
    base = torch.randn(60, dtype=torch.float64, device=device)
    imaginary = torch.imag(torch.complex(base, 2 * base).conj())
    assert imaginary.is_neg()
    for x in (
        base.as_strided((4, 3), (1, 2)),
        base[:3].expand(4, 3),
        base[:4, None].expand(4, 3),
        base.as_strided((4, 3), (0, 0)),
        base.as_strided((4, 3), (1, 17), 5),
        imaginary[:12].view(4, 3),
    ):
        torch.testing.assert_close(ops.sigmoid(x), torch.sigmoid(x))
        torch.testing.assert_close(ops.sigmoid_backward(x, x), x * x * (1 - x))
        for dim in (0, 1):
            total = x.sum(dim, keepdim=True)
            torch.testing.assert_close(ops.softmax(x, dim, 1.0), F.softmax(x, dim))
            torch.testing.assert_close(ops.log_softmax(x, dim, 1.0), F.log_softmax(x, dim))
            torch.testing.assert_close(
                ops.log_softmax_backward(x, x, dim, 1.0), x - x.exp() * total
            )
        target = torch.tensor([2], device=device).expand(4)
        options = None, 1.0, "none", -100, 0.0
        loss, total = ops.softmax_nll(x, target, *options)
        torch.testing.assert_close(loss, F.cross_entropy(x, target, reduction="none"))
        one = torch.tensor(2.0, dtype=torch.float64, device=device).expand(4)
        grad = ops.softmax_nll_backward(one, x, target, total, *options)
        torch.testing.assert_close(grad, 2 * (F.softmax(x, 1) - F.one_hot(target, 3)))


# -------------------------------------------------------------------------------------- properties


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_shape_dimension_and_strides(data):
    draw = data.draw
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    shape = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    name = draw(st.sampled_from(["softmax", "log_softmax", "sigmoid"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    x = torch.randn([2 * size for size in shape], generator=generator).to(dtype)
    x = x[tuple(slice(None, None, 2) for _ in shape)]
    x = x.permute(draw(st.permutations(range(len(shape)))))
    if draw(st.booleans()):
        x = x.contiguous()
    x.requires_grad_()
    if name == "sigmoid":
        y, expected = mnist_ops.sigmoid(x), loops.sigmoid(x.detach())
    else:
        dim = draw(st.integers(-x.dim(), x.dim() - 1))
        beta = draw(st.sampled_from(BETAS))
        y = getattr(mnist_ops, name)(x, dim, beta)
        assert y.shape == x.shape
        if not x.numel():
            return
        expected = getattr(loops, name)(x.detach(), dim, beta)
    assert y.stride() == torch.empty_like(x).stride()
    close(y, expected, dtype)
    y.sum().backward()
    assert x.grad.shape == x.shape and x.grad.isfinite().all()


def test_modules_are_the_functions(device):
    x = torch.randn(4, 10, device=device)
    target = torch.tensor([1, 2, 3, 9], device=device)
    nn = mnist_ops.nn
    assert torch.equal(nn.Sigmoid()(x), mnist_ops.sigmoid(x))
    assert torch.equal(nn.Softmax(0, -2.0)(x), mnist_ops.softmax(x, 0, -2.0))
    assert torch.equal(nn.LogSoftmax(beta=0.5)(x), mnist_ops.log_softmax(x, -1, 0.5))
    loss = nn.SoftmaxNLLLoss(0.5, "sum")
    assert torch.equal(loss(x, target), mnist_ops.softmax_nll(x, target, 0.5, "sum"))
    assert repr(nn.Softmax(0, -2.0)) == "Softmax(dim=0, beta=-2.0)"
