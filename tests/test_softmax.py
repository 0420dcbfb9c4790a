"""Sigmoid, softmax, log-softmax and softmax + NLL against loops and the reports' formulas."""

from __future__ import annotations

import loops
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
        with pytest.raises(RuntimeError, match=rf"target must be in \[0, 10\), got {wrong}"):
            mnist_ops.softmax_nll(x, target)
    else:
        loss = mnist_ops.softmax_nll(x, target, reduction="none")
        loss.nansum().backward()
        assert loss.isnan().tolist() == [False, True, False]
        assert x.grad.isnan().all(1).tolist()[1] or (x.grad[1] == 0).all()
        assert x.grad[[0, 2]].isfinite().all()


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
            {"target": torch.zeros(2)},
            TypeError,
            "target must be integer class indices, got torch.f",
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
        ({"input": torch.ones(2, 0)}, RuntimeError, "input has no classes"),
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
        ops.softmax_nll(x, target.int(), 1.0, "none")
    with pytest.raises(RuntimeError, match="reduction must be 'mean', 'sum' or 'none', got 'max'"):
        ops.softmax_nll(x, target, 1.0, "max")
    loss, logsumexp = ops.softmax_nll(x, target, 1.0, "none")
    backward = ops.softmax_nll_backward
    with pytest.raises(RuntimeError, match="grad_loss must have the shape of target"):
        backward(torch.ones(3), x, target, logsumexp, 1.0, "none")
    with pytest.raises(RuntimeError, match="grad_loss must be a scalar"):
        backward(loss, x, target, logsumexp, 1.0, "mean")
    with pytest.raises(RuntimeError, match="grad_loss must have the dtype of input"):
        backward(loss.sum().double(), x, target, logsumexp, 1.0, "sum")
    with pytest.raises(RuntimeError, match="logsumexp must have the shape of target"):
        backward(loss, x, target, logsumexp[:1], 1.0, "none")
    with pytest.raises(RuntimeError, match="logsumexp must be Float"):
        backward(loss, x, target, logsumexp.double(), 1.0, "none")


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
