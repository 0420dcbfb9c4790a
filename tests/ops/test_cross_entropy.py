"""softmax_nll in the place of cross_entropy: PyTorch's own samples, derivatives, errors."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import mnist_ops

op_db = pytest.importorskip(
    "torch.testing._internal.common_methods_invocations",
    reason="this torch comes without samples of its operators",
).op_db

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def samples(name: str, device: str, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, dict]]:
    (info,) = (o for o in op_db if o.name == f"nn.functional.{name}")
    for sample in info.sample_inputs(device, dtype, requires_grad=False):
        (target,) = sample.args
        yield sample.input, target, dict(sample.kwargs)


def value_and_gradients(function: Any, x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_()]
    if target.is_floating_point():
        leaves.append(target.clone().requires_grad_())
        target = leaves[1]
    y = function(leaves[0], target)
    g = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    return y.detach(), *torch.autograd.grad(y, leaves, g)


def assert_equal(ours: Any, theirs: Any, x: Tensor, target: Tensor, kwargs: Any) -> None:
    for a, b in zip(
        value_and_gradients(ours, x, target), value_and_gradients(theirs, x, target), strict=True
    ):
        tolerance = TOLERANCE[x.dtype]
        torch.testing.assert_close(
            a,
            b,
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda m: f"{tuple(x.shape)} {target.dtype} {kwargs}: {m}",
        )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_pytorchs_samples_of_cross_entropy(device, dtype):
    count = 0
    for x, target, kwargs in samples("cross_entropy", device, dtype):
        count += 1
        assert_equal(
            lambda x, t, kwargs=kwargs: mnist_ops.softmax_nll(x, t, **kwargs),
            lambda x, t, kwargs=kwargs: F.cross_entropy(x, t, **kwargs),
            x,
            target,
            kwargs,
        )
    assert count > 20


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_pytorchs_samples_of_nll_loss(device, dtype):
    """Of logarithms of probabilities, whose log-softmax they are."""
    count = 0
    for x, target, kwargs in samples("nll_loss", device, dtype):
        count += 1
        logs = F.log_softmax(x.double(), min(1, x.dim() - 1)).to(dtype)
        ours = mnist_ops.softmax_nll(logs, target, **kwargs)
        theirs = F.nll_loss(logs, target, **kwargs)
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert count > 10


# Of every kind: ignored targets, weights, smoothing, probabilities.
OPTIONS: list[dict[str, Any]] = [
    {"ignore_index": 2},
    {"weight": True},
    {"label_smoothing": 0.3},
    {"weight": True, "label_smoothing": 0.3, "ignore_index": 1},
    {"probabilities": True},
    {"probabilities": True, "weight": True, "label_smoothing": 0.3},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)
# The ways of the kernels: rows short and long, lines, vectors.
SHAPES = [(6, 5), (3, 70), (2, 5, 3), (2, 70, 2, 2), (5,), (7, 64), (2, 3, 600)]


def prepared(
    options: dict[str, Any], shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    kwargs = dict(options)
    x = 3 * torch.randn(shape, dtype=torch.float64, device=device)
    class_dim = min(1, len(shape) - 1)
    classes = shape[class_dim]
    target = torch.randint(classes, (*shape[:1], *shape[2:]) if len(shape) > 1 else ())
    if len(shape) > 1:
        target.view(-1)[::3] = options.get("ignore_index", -100)
    target.view(-1)[-1] = 0  # one that counts
    if kwargs.pop("probabilities", False):
        target = torch.rand(shape, dtype=torch.float64).to(dtype)
    if "weight" in kwargs:
        kwargs["weight"] = torch.rand(classes, dtype=torch.float64, device=device).to(dtype)
    return x.to(dtype), target.to(device), kwargs


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float16], ids=str)
@every_option
def test_equals_cross_entropy_in_float64(device, options, dtype):
    for shape in SHAPES:
        for reduction in ("mean", "sum", "none"):
            x, target, kwargs = prepared(options, shape, device, dtype)
            wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
            leaf, reference = (t.clone().requires_grad_() for t in (x, x.double()))
            loss = mnist_ops.softmax_nll(leaf, target, 0.7, reduction, **kwargs)
            truth = target.double() if target.is_floating_point() else target
            expected = F.cross_entropy(0.7 * reference, truth, reduction=reduction, **wide)
            loss.sum().backward()
            expected.sum().backward()
            tolerance = (32 if dtype is torch.float64 else 8) * torch.finfo(dtype).eps
            for a, b in ((loss, expected), (leaf.grad, reference.grad)):
                scale = 1 + b.detach().abs().max()
                assert ((a - b).abs() <= tolerance * scale).all(), (shape, reduction)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@every_option
def test_derivatives(device, options, reduction):
    for shape in ((3, 3), (2, 2, 2), (3,)):
        x, target, kwargs = prepared(options, shape, device)
        leaves = [x.requires_grad_()]
        if target.is_floating_point():
            leaves.append(target.requires_grad_())

        def loss(x: Tensor, t: Tensor = target, kwargs: Any = kwargs) -> Tensor:
            return mnist_ops.softmax_nll(x, t, -1.3, reduction, **kwargs)

        assert gradcheck(
            loss,
            leaves,
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
        )
        assert gradgradcheck(loss, leaves, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@every_option
def test_vmap(device, options, reduction):
    """Over every argument; weights, too."""
    for shape in ((3, 4, 5), (3, 5), (3, 2, 5, 2)):
        cases = [prepared(options, shape[1:], device) for _ in range(3)]
        x, target = (torch.stack([c[i] for c in cases]) for i in (0, 1))
        names = [name for name in ("weight",) if name in cases[0][2]]
        weights = [torch.stack([c[2][name] for c in cases]) for name in names]
        rest = {k: v for k, v in cases[0][2].items() if k != "weight"}

        def loss(x: Tensor, t: Tensor, *w: Tensor, rest: Any = rest) -> Tensor:
            weight = w[0] if w else None
            return mnist_ops.softmax_nll(x, t, 0.7, reduction, weight=weight, **rest)

        each = [loss(*a) for a in zip(x, target, *weights, strict=True)]
        torch.testing.assert_close(torch.vmap(loss)(x, target, *weights), torch.stack(each))
        gradient = torch.func.grad(lambda *a: loss(*a).sum())
        each = [gradient(*a) for a in zip(x, target, *weights, strict=True)]
        torch.testing.assert_close(torch.vmap(gradient)(x, target, *weights), torch.stack(each))
        one = [w[0] for w in weights]
        in_dims = (0, None, *(None for _ in one))
        expected = torch.stack([loss(t, target[0], *one) for t in x])
        torch.testing.assert_close(torch.vmap(loss, in_dims)(x, target[0], *one), expected)


@every_option
def test_opcheck(device, options):
    ops = torch.ops.mnist_ops
    x, target, kwargs = prepared(options, (2, 5, 3), device)
    rest = kwargs.get("ignore_index", -100), kwargs.get("label_smoothing", 0.0)
    arguments = target, kwargs.get("weight"), 0.7, "mean", *rest
    loss, total = ops.softmax_nll(x, *arguments)
    torch.library.opcheck(ops.softmax_nll.default, (x.clone().requires_grad_(), *arguments))
    backward = torch.randn_like(loss), x, target, total, *arguments[1:]
    torch.library.opcheck(ops.softmax_nll_backward.default, backward)


@every_option
def test_compiled(device, options):
    torch.compiler.reset()
    x, target, kwargs = prepared(options, (4, 5), device)

    def step(x: Tensor) -> Tensor:
        return torch.autograd.grad(mnist_ops.softmax_nll(x, target, **kwargs), x)[0]

    leaf = x.requires_grad_()
    compiled = torch.compile(
        lambda x: mnist_ops.softmax_nll(x, target, **kwargs), backend="aot_eager", fullgraph=True
    )
    (gradient,) = torch.autograd.grad(compiled(leaf), leaf)
    torch.testing.assert_close(gradient, step(leaf))


def test_nothing_to_learn_from(device):
    """The mean over nothing is NaN, the gradient 0, as in PyTorch."""
    for x, target in (
        (torch.randn(3, 4, device=device), torch.full((3,), -100, device=device)),
        (torch.randn(0, 4, device=device), torch.zeros(0, dtype=torch.long, device=device)),
        (torch.randn(0, 4, device=device), torch.zeros(0, 4, device=device)),
    ):
        for reduction in ("mean", "sum", "none"):
            assert_equal(
                lambda x, t, r=reduction: mnist_ops.softmax_nll(x, t, reduction=r),
                lambda x, t, r=reduction: F.cross_entropy(x, t, reduction=r),
                x,
                target,
                reduction,
            )


def test_an_ignored_row_may_hold_anything(device):
    x = torch.tensor([[math.inf, 1.0], [1.0, 2.0]], device=device, requires_grad=True)
    target = torch.tensor([-100, 1], device=device)
    loss = mnist_ops.softmax_nll(x, target)
    torch.testing.assert_close(loss, F.cross_entropy(x[1:], target[1:]))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("smoothing", (0.0, 0.3, 1.0))
def test_mean_over_weights_that_are_all_0(device, dtype, smoothing):
    """NaN, also where the smoothed losses have a sum, and NaN for its gradient, as in PyTorch."""
    x = torch.randn(4, 3, device=device, dtype=dtype, requires_grad=True)
    weight = torch.tensor([0.0, 1.0, 2.0], device=device, dtype=dtype)
    target = torch.zeros(4, dtype=torch.int64, device=device)
    options = {"weight": weight, "label_smoothing": smoothing}
    loss = mnist_ops.softmax_nll(x, target, **options)
    assert loss.isnan() and F.cross_entropy(x, target, **options).isnan()
    assert torch.autograd.grad(loss, x)[0].isnan().all()
    rows = torch.vmap(lambda v: mnist_ops.softmax_nll(v, target, **options))(x.detach()[None])
    assert rows.isnan().all()


@pytest.mark.parametrize("row", [(math.inf, 0.5), (math.nan, 0.5), (-math.inf, -math.inf)], ids=str)
def test_rows_without_a_softmax_have_no_gradient_either(device, row):
    """NaN in the whole row, ignored or of weight 0, as in PyTorch, and in no other row."""
    for shape in SHAPES[:-2]:
        class_dim = min(1, len(shape) - 1)
        x, target, _ = prepared({}, shape, device)
        rows = x.movedim(class_dim, -1)
        broken = rows if len(shape) == 1 else rows[:2]
        broken[..., 0], broken[..., 1:] = row
        for options in ({}, {"label_smoothing": 0.3}, {"weight": torch.zeros(shape[class_dim])}):
            if "weight" in options:
                options["weight"] = options["weight"].to(x)
            for grad in (1.0, math.inf):
                leaf, reference = (x.clone().requires_grad_() for _ in range(2))
                for function, at in ((mnist_ops.softmax_nll, leaf), (F.cross_entropy, reference)):
                    loss = function(at, target, reduction="none", **options)
                    loss.backward(torch.full_like(loss, grad))
                torch.testing.assert_close(leaf.grad, reference.grad, equal_nan=True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": torch.ones(2)}, ValueError, r"weight must have the shape \(3,\) .* got \(2,\)"),
        ({"weight": torch.ones(3, 1)}, ValueError, r"weight must have .* got \(3, 1\)"),
        ({"weight": torch.ones(3, dtype=torch.int)}, TypeError, "weight must be float64, "),
        ({"weight": [1.0, 1.0, 1.0]}, TypeError, "weight must be a Tensor, got list"),
        ({"target": torch.ones(2)}, ValueError, r"target must have the shape \(2, 3\) for prob"),
        ({"target": torch.ones(2, 3).long()}, ValueError, r".* the shape \(2,\) for class indices"),
        ({"target": torch.ones(2, 3).bool()}, TypeError, "target must be integer class indices or"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be in"),
        ({"label_smoothing": math.nan}, ValueError, "label_smoothing must be in"),
        ({"label_smoothing": "no"}, TypeError, "label_smoothing must be a number, got str"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index must be an int, got 1.0"),
        (
            {"target": torch.ones(2, 3), "ignore_index": 1},
            ValueError,
            "ignore_index must be negative where target has probabilities, got 1",
        ),
        ({"target": torch.tensor([0, -1])}, RuntimeError, r"target must be in \[0, 3\) or ignore_"),
    ],
    ids=str,
)
def test_errors_name_the_argument(arguments, error, message):
    call = {"input": torch.ones(2, 3), "target": torch.zeros(2, dtype=torch.long), **arguments}
    with pytest.raises(error, match=f"softmax_nll: {message}"):
        mnist_ops.softmax_nll(**call)


def test_errors_of_the_registered_operator():
    call = torch.ops.mnist_ops.softmax_nll
    x, t = torch.ones(2, 3), torch.zeros(2, dtype=torch.long)
    for arguments, message in (
        ((x, x.double(), None, 1.0, "none", -100, 0.0), "target must be int64 class indices or"),
        ((x, x[:, :2], None, 1.0, "none", -100, 0.0), "target must have the shape of input"),
        ((x, x, None, 1.0, "none", 1, 0.0), "ignore_index must be negative"),
        ((x, t, torch.ones(2), 1.0, "none", -100, 0.0), r"weight must have the shape \(3\), got"),
        ((x, t, x[0].double(), 1.0, "none", -100, 0.0), "weight must be Float, got Double"),
        ((x, t, None, 1.0, "none", -100, 1.1), r"label_smoothing must be in \[0, 1\], got 1.1"),
        ((x, t, None, 1.0, "none", -100, math.nan), "label_smoothing must be in"),
    ):
        with pytest.raises(RuntimeError, match=f"softmax_nll: {message}"):
            call(*arguments)


def test_no_derivative_by_the_weights(device):
    x, target, kwargs = prepared({"weight": True}, (4, 3), device)
    weight = kwargs["weight"].requires_grad_()
    with pytest.raises(RuntimeError, match="no derivative with respect to weight"):
        mnist_ops.softmax_nll(x, target, weight=weight).backward()
    with pytest.raises(RuntimeError, match="no derivative with respect to weight"):
        torch.func.jvp(
            lambda w: mnist_ops.softmax_nll(x, target, weight=w), (weight,), (weight.detach(),)
        )
    with torch.no_grad():
        assert mnist_ops.softmax_nll(x, target, weight=weight).isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_option
def test_autocast(device, options, dtype):
    x, target, kwargs = prepared(options, (4, 5), device, dtype)
    with torch.autocast(device, dtype=dtype):
        loss = mnist_ops.softmax_nll(x, target, **kwargs)
    assert loss.dtype == torch.float32
    wide = {k: v.float() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    truth = target.float() if target.is_floating_point() else target
    torch.testing.assert_close(loss, F.cross_entropy(x.float(), truth, **wide))


def test_module(device):
    x, target, kwargs = prepared(OPTIONS[3], (6, 5), device)
    module = mnist_ops.nn.SoftmaxNLLLoss(0.7, "sum", **kwargs)
    expected = mnist_ops.softmax_nll(x, target, 0.7, "sum", **kwargs)
    assert torch.equal(module(x, target), expected)
    assert torch.equal(copy.deepcopy(module)(x, target), expected)
    assert list(module.state_dict()) == ["weight"]
    text = "SoftmaxNLLLoss(beta=0.7, reduction='sum', ignore_index=1, label_smoothing=0.3)"
    assert repr(module) == text
