"""What every operator promises: opcheck, compile, export, vmap, autocast, layouts, threads."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conftest import first_of_each, other_capabilities, thinned
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import mnist_ops
from mnist_ops import _torch_private, gaussian1d, gaussian2d

KERNEL = gaussian1d(3)
POWERS = torch.tensor([0.7, 1.0, 2.0, 3.5], dtype=torch.float64)  # one p for each channel


@dataclass(frozen=True)
class Operator:
    """One public function with arguments that fit images (2, 4, 5, 6)."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def __call__(self, x: Tensor) -> Tensor:
        moved = {
            k: v.to(x.device) if isinstance(v, Tensor) else v for k, v in self.arguments.items()
        }
        return getattr(mnist_ops, self.name)(x, **moved)

    def __str__(self) -> str:
        shown = (f"{k}={v}" for k, v in self.arguments.items() if not isinstance(v, Tensor))
        return f"{self.name}({', '.join(shown)})"


OPERATORS = [
    Operator("lp_pool2d", {"norm_type": 2, "kernel_size": 2}),
    Operator("lp_pool2d", {"norm_type": 1, "kernel_size": 3, "stride": 2, "padding": 1}),
    Operator("lp_pool2d", {"norm_type": 3.5, "kernel_size": (2, 3), "ceil_mode": True}),
    Operator("lp_pool2d", {"norm_type": float("inf"), "kernel_size": 2, "stride": 1}),
    Operator("lp_pool2d", {"norm_type": POWERS, "kernel_size": 2}),
    Operator(
        "lp_pool2d",
        {"norm_type": POWERS, "kernel_size": (5, 4), "padding": 1, "stride": 1, "average": True},
    ),
    Operator("subtractive_norm2d", {"kernel": KERNEL}),
    Operator("local_mean2d", {"kernel": KERNEL}),
    Operator("local_mean2d", {"kernel": gaussian2d((3, 5)), "channels": "each"}),
    Operator(
        "local_mean2d",
        {"kernel": gaussian2d((3, 5)), "channels": "each", "padding_mode": "reflect"},
    ),
    Operator("local_mean2d", {"kernel": gaussian1d(5), "padding_mode": "replicate"}),
    Operator("divisive_norm2d", {"kernel": KERNEL, "threshold": 0.5}),
    Operator("divisive_norm2d", {"kernel": gaussian2d((3, 5))}),
    Operator("contrastive_norm2d", {"kernel": KERNEL, "threshold_value": 2.0}),
    Operator("stage2d", {"kernel": KERNEL}),
    Operator("stage2d", {"kernel": KERNEL, "activation": "relu", "norm_type": 1}),
    Operator(
        "stage2d",
        {
            "kernel": gaussian2d((3, 5)),
            "activation": "sigmoid",
            "norm_type": 3.5,
            "kernel_size": (2, 3),
            "stride": 2,
            "padding": (0, 1),
            "ceil_mode": True,
        },
    ),
    Operator(
        "stage2d",
        {
            "kernel": KERNEL,
            "activation": "identity",
            "norm_type": float("inf"),
            "kernel_size": 3,
            "stride": 1,
        },
    ),
    Operator("sigmoid"),
    Operator("softmax", {"dim": 1, "beta": -2.0}),
    Operator("softmax", {"dim": 3}),
    Operator("log_softmax", {"dim": 1, "beta": 0.5}),
    Operator("softmax_nll", {"target": torch.arange(60).reshape(2, 5, 6) % 4, "beta": -1.5}),
]
every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=str)
one_of_each = pytest.mark.parametrize("operator", first_of_each(OPERATORS))


def images(device: str, dtype: torch.dtype = torch.float64, **options: Any) -> Tensor:
    return torch.randn(2, 4, 5, 6, dtype=dtype, device=device, **options)


# ----------------------------------------------------------------------------------------- opcheck


def registered_calls(
    device: str, dtype: torch.dtype, width: int = 6
) -> list[tuple[str, tuple[Any, ...]]]:
    """Every registered operator with arguments, backward operators too."""
    ops = torch.ops.mnist_ops
    x, kernel = images(device, dtype)[..., :width].contiguous(), KERNEL.to(device)
    sides = [2, min(2, width)]
    calls: list[tuple[str, tuple[Any, ...]]] = []
    for p in (1.0, 2.0, 3.0, float("inf")):
        windows = (p, sides, [2, 1], [1, 0], True)
        y = ops.lp_pool2d(x, *windows)
        calls += [
            ("lp_pool2d", (x, *windows)),
            ("lp_pool2d_backward", (torch.randn_like(y), x, y, *windows)),
            ("lp_pool2d_jvp", (torch.randn_like(x), x, y, *windows)),
            (
                "lp_pool2d_double_backward",
                (torch.randn_like(x), torch.randn_like(y), x, y, *windows),
            ),
        ]
    p = POWERS.to(device, torch.float64 if dtype is torch.float64 else torch.float32)
    for average in (False, True):
        rest = (sides, [2, 1], [1, 0], True, average)
        y = ops.lp_pool2d_tensor_p(x, p, *rest)
        calls += [
            ("lp_pool2d_tensor_p", (x, p, *rest)),
            ("lp_pool2d_tensor_p_backward", (torch.randn_like(y), x, p, *rest)),
        ]
    g = torch.randn_like(x)
    calls += [("subtractive_norm2d", (x, kernel)), ("subtractive_norm2d_backward", (g, kernel))]
    modes = ("renormalized", "zeros", "replicate", "reflect")
    for mode in modes[: 4 if width > 1 else 3]:  # there is nothing to reflect
        calls += [("local_mean2d", (x, kernel, mode)), ("local_mean2d_backward", (g, kernel, mode))]
    for name in ("divisive_norm2d", "contrastive_norm2d"):
        calls += [
            (name, (x, kernel, 0.5, 0.7)),
            (f"{name}_backward", (g, x, kernel, 0.5, 0.7)),
        ]
    for activation, p in (("tanh", 2.0), ("relu", 1.0), ("sigmoid", 3.0), ("identity", math.inf)):
        options = (activation, p, sides, [2, 1], [1, 0], True)
        y = ops.stage2d(x, kernel, *options)
        calls += [
            ("stage2d", (x, kernel, *options)),
            ("stage2d_backward", (torch.randn_like(y), x, kernel, *options)),
        ]
        a = ops.activate(x, activation)
        calls += [
            ("activate", (x, activation)),
            ("activate_backward", (torch.randn_like(a), a, activation)),
        ]
    calls += [("sigmoid", (x,)), ("sigmoid_backward", (g, ops.sigmoid(x)))]
    for name in ("softmax", "log_softmax"):
        y = getattr(ops, name)(x, 1, -2.0)
        calls += [(name, (x, 1, -2.0)), (f"{name}_backward", (g, y, 1, -2.0))]
    target = torch.arange(10 * width, device=device).reshape(2, 5, width) % 4
    for reduction in ("none", "mean", "sum"):
        options = None, -1.5, reduction, -100, 0.0
        loss, total = ops.softmax_nll(x, target, *options)
        calls += [
            ("softmax_nll", (x, target, *options)),
            ("softmax_nll_backward", (torch.randn_like(loss), x, target, total, *options)),
        ]
    return calls


def test_every_schema_is_checked():
    """No operator of the library is missing from the list that opcheck runs over."""
    schemas = _torch_private.operators("mnist_ops")
    checked = {name for name, _ in registered_calls("cpu", torch.float32)}
    assert {s for s in schemas if "sgd" not in s} == checked
    for schema in schemas:
        if not schema.endswith(("backward", "jvp")) and "sgd" not in schema:
            assert f"{schema}_backward" in schemas


@pytest.mark.parametrize(
    ("layout", "grad"), thinned((torch.contiguous_format, torch.channels_last), (False, True))
)
def test_opcheck(device, layout, grad):
    for name, arguments in registered_calls(device, torch.float64):
        prepared = [
            a.to(memory_format=layout) if isinstance(a, Tensor) and a.dim() == 4 else a
            for a in arguments
        ]
        # The kernel of a normalization and the divisor of a mean are constants.
        constants = {3} if name == "softmax_nll_backward" else set()
        constants |= {1, 2} if "norm2d" in name or "mean2d" in name else set()
        constants |= {"stage2d": {1}, "stage2d_backward": {2}}.get(name, set())
        differentiable = [
            a.detach().clone().requires_grad_()
            if grad and isinstance(a, Tensor) and a.is_floating_point() and i not in constants
            else a
            for i, a in enumerate(prepared)
        ]
        if grad and name in ("divisive_norm2d_backward", "contrastive_norm2d_backward"):
            differentiable[1] = prepared[1].detach().clone().requires_grad_()
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if name != "lp_pool2d_double_backward" or not grad:  # its derivative is an error
            tests.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(
            getattr(torch.ops.mnist_ops, name).default, tuple(differentiable), test_utils=tests
        )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_strides_of_dimensions_of_size_1_say_nothing(device, layout):
    """Images of one column, each tensor in turn with a stride of 0 there, or a large one."""
    for name, arguments in registered_calls(device, torch.float64, width=1):
        op = getattr(torch.ops.mnist_ops, name)
        given = [
            a.to(memory_format=layout) if isinstance(a, Tensor) and a.dim() == 4 else a
            for a in arguments
        ]
        expected = op(*given)
        for i, a in enumerate(given):
            if isinstance(a, Tensor) and a.dim() == 4:
                for stride in (0, 1, 1000):
                    view = a.as_strided(a.shape, (*a.stride()[:3], stride))
                    result = op(*given[:i], view, *given[i + 1 :])
                    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last, None], ids=str)
def test_tensors_without_their_storage_are_refused(device, layout):
    """One element too few: nothing is read beyond the end. None: in no dense order."""
    for name, arguments in registered_calls(device, torch.float32):
        tensors = [i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.numel() > 0]
        for i in tensors:
            short = arguments[i].clone()
            if short.dim() == 4 and layout is None:
                short = short.mT.contiguous().mT
            elif short.dim() == 4:
                short = short.to(memory_format=layout)
            storage = short.untyped_storage()
            storage.resize_(storage.nbytes() - short.element_size())
            given = (*arguments[:i], short, *arguments[i + 1 :])
            with pytest.raises(RuntimeError, match="of its storage, which has"):
                getattr(torch.ops.mnist_ops, name)(*given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fake_kernels_say_what_the_kernels_do(device, dtype):
    """Shape, strides, dtype, for layouts in which nothing is where one would think."""
    for name, arguments in registered_calls(device, dtype):
        for change in (
            lambda t: t,
            lambda t: t.to(memory_format=torch.channels_last),
            lambda t: t.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
            lambda t: torch.stack([t, t], -1)[..., 0],
        ):
            real = [change(a) if isinstance(a, Tensor) and a.dim() == 4 else a for a in arguments]
            operator = getattr(torch.ops.mnist_ops, name)
            with _torch_private.fake_mode() as mode:
                fake = operator(
                    *(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in real)
                )
            outcome = operator(*real)
            pairs = (
                zip(fake, outcome, strict=True) if isinstance(fake, tuple) else [(fake, outcome)]
            )
            for f, r in pairs:
                assert f.shape == r.shape and f.stride() == r.stride(), name
                assert f.dtype == r.dtype and f.device == r.device, name


# ------------------------------------------------------------------------------- compile, export


@pytest.fixture(autouse=True)
def _forget_compiled() -> None:
    # The operators share one test function, whose recompilations Dynamo counts.
    torch.compiler.reset()


@one_of_each
def test_compile_fullgraph(device, operator):
    def value_and_gradient(x: Tensor) -> Tensor:
        return (operator(x * 2) * 3).sum()

    compiled = torch.compile(value_and_gradient, fullgraph=True, backend="aot_eager", dynamic=False)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = images(device).to(memory_format=layout)
        expected_x, actual_x = (x.clone().requires_grad_() for _ in range(2))
        expected, actual = value_and_gradient(expected_x), compiled(actual_x)
        expected.backward()
        actual.backward()
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        torch.testing.assert_close(actual_x.grad, expected_x.grad, rtol=0, atol=0)


def test_compile_with_inductor(device):
    """A whole stage, through the default backend, with code generated around the operators."""

    def stage(x: Tensor) -> Tensor:
        y = mnist_ops.lp_pool2d(torch.tanh(x), 2, 2)
        y = mnist_ops.subtractive_norm2d(y, KERNEL.to(x.device))
        return mnist_ops.log_softmax(y.flatten(1)).sum()

    x = images(device, torch.float32)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    stage(a).backward()
    torch.compile(stage, fullgraph=True)(b).backward()
    torch.testing.assert_close(b.grad, a.grad)


def test_compile_with_dynamic_shapes(device):
    def stage(x: Tensor) -> Tensor:
        y = mnist_ops.contrastive_norm2d(mnist_ops.lp_pool2d(x, 2, 2), KERNEL.to(x.device))
        return mnist_ops.softmax(mnist_ops.sigmoid(y), 1, -0.5)

    compiled = torch.compile(stage, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 3, 8, 8), (3, 2, 9, 12), (5, 4, 6, 7)):
        x = torch.randn(shape, device=device)
        torch.testing.assert_close(compiled(x), stage(x), rtol=0, atol=0)


@one_of_each
def test_export(device, operator):
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return operator(x)

    x = images(device)
    program = torch.export.export(Module(), (x,))
    torch.testing.assert_close(program.module()(x), operator(x), rtol=0, atol=0)
    assert any(f"mnist_ops.{operator.name}" in str(n.target) for n in program.graph.nodes)


# ---------------------------------------------------------------------------- ways through PyTorch

CLASSES = torch.tensor([0, 1])
REFUSED = {
    "sigmoid": lambda x: mnist_ops.sigmoid(x.int()),
    "softmax dim": lambda x: mnist_ops.softmax(x, 4),
    "softmax dtype": lambda x: mnist_ops.softmax(x.int()),
    "log_softmax": lambda x: mnist_ops.log_softmax(x, beta=1e39),
    "softmax_nll shape": lambda x: mnist_ops.softmax_nll(x[..., 0, 0], CLASSES[:1].to(x.device)),
    "softmax_nll device": lambda x: mnist_ops.softmax_nll(x[..., 0, 0], CLASSES.to("meta")),
    "softmax_nll target": lambda x: mnist_ops.softmax_nll(x[..., 0, 0], [0, 1]),
    "softmax_nll reduction": lambda x: mnist_ops.softmax_nll(
        x[..., 0, 0], CLASSES.to(x.device), reduction="max"
    ),
    "lp_pool2d": lambda x: mnist_ops.lp_pool2d(x, 2, 7),
    "stage2d": lambda x: mnist_ops.stage2d(x, KERNEL, kernel_size=7),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_refused_in_the_same_words_on_every_way(device, call):
    """Plain tensors are checked when kernels have refused them, others before that."""
    x = torch.randn(2, 4, 5, 6, device=device)
    private = _torch_private
    seen = set()
    for tensor in (x, x.clone().requires_grad_(), torch.nn.Parameter(x)):
        for mode in (contextlib.nullcontext, torch.inference_mode, forward_ad.dual_level):
            with mode():
                before = private.is_excluded(private.AUTOGRAD)
                with pytest.raises((TypeError, ValueError, IndexError, RuntimeError)) as caught:
                    call(tensor)
                assert private.is_excluded(private.AUTOGRAD) == before
                assert caught.value.__cause__ is None
                assert caught.value.__context__ is None or caught.value.__suppress_context__
                seen.add((caught.type, str(caught.value)))
    assert len(seen) == 1
    assert next(iter(seen))[1].split(":")[0] in {operator.name for operator in OPERATORS}


@every_operator
def test_within_a_dispatch_mode_autograd_is_as_it_was(device, operator):
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    x = torch.randn(2, 4, 5, 6, device=device)
    expected = operator(x)
    for mode in (contextlib.nullcontext, torch.no_grad, torch.inference_mode):
        for tensor in (x, x.clone().requires_grad_()):
            seen: list[str] = []
            with mode(), Mode():
                y = operator(tensor)
            assert any(name.startswith("mnist_ops.") for name in seen)
            assert torch.equal(y, expected)
            assert y.requires_grad == (mode is contextlib.nullcontext and tensor is not x)
    assert not _torch_private.is_excluded(_torch_private.AUTOGRAD)


# ---------------------------------------------------------------------------------- vmap, autocast


@every_operator
def test_vmap(device, operator):
    x = torch.randn(3, 2, 4, 5, 6, dtype=torch.float64, device=device)
    expected = torch.stack([operator(example) for example in x])
    for dim in (0, 2):
        y = torch.func.vmap(operator, in_dims=dim)(x.movedim(0, dim))
        torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)


@every_operator
def test_per_sample_gradients(device, operator):
    x = torch.randn(3, 2, 4, 5, 6, dtype=torch.float64, device=device)

    def loss(example: Tensor) -> Tensor:
        return operator(example).pow(3).sum()

    gradients = torch.func.vmap(torch.func.grad(loss))(x)
    for example, gradient in zip(x, gradients, strict=True):
        leaf = example.clone().requires_grad_()
        loss(leaf).backward()
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-12, atol=1e-12)


def test_vmap_over_every_tensor_argument(device):
    kernels = torch.rand(3, 5, dtype=torch.float64, device=device) + 0.1
    x = images(device)
    y = torch.func.vmap(mnist_ops.subtractive_norm2d, in_dims=(None, 0))(x, kernels)
    expected = torch.stack([mnist_ops.subtractive_norm2d(x, k) for k in kernels])
    torch.testing.assert_close(y, expected)
    scores = torch.randn(6, 5, dtype=torch.float64, device=device)
    target = torch.arange(6, device=device) % 5
    y = torch.func.vmap(mnist_ops.softmax_nll)(scores, target)
    torch.testing.assert_close(y, mnist_ops.softmax_nll(scores, target, reduction="none"))
    y = torch.func.vmap(mnist_ops.softmax_nll, in_dims=(None, 0))(scores[0], target)
    torch.testing.assert_close(
        y, mnist_ops.softmax_nll(scores[:1].expand(6, 5), target, reduction="none")
    )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_vmap_over_reduced_losses(device, reduction):
    scores = torch.randn(3, 4, 5, 2, dtype=torch.float64, device=device)
    target = torch.arange(24, device=device).reshape(3, 4, 2) % 5

    def loss(x: Tensor, t: Tensor) -> Tensor:
        return mnist_ops.softmax_nll(x, t, -1.5, reduction)

    y = torch.func.vmap(loss)(scores, target)
    torch.testing.assert_close(
        y, torch.stack([loss(*each) for each in zip(scores, target, strict=True)])
    )
    gradient = torch.func.vmap(torch.func.grad(lambda x, t: loss(x, t).pow(2).sum()))
    leaf = scores.clone().requires_grad_()
    torch.stack([loss(*each) for each in zip(leaf, target, strict=True)]).pow(2).sum().backward()
    torch.testing.assert_close(gradient(scores, target), leaf.grad)


def test_second_derivatives_through_torch_func(device):
    target = torch.tensor(2, device=device)
    x = torch.randn(5, dtype=torch.float64, device=device)
    hessian = torch.func.jacrev(torch.func.grad(lambda t: mnist_ops.softmax_nll(t, target)))(x)
    y = torch.softmax(x, 0)
    torch.testing.assert_close(hessian, torch.diag(y) - torch.outer(y, y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_operator
def test_autocast(device, operator, dtype):
    """As in PyTorch: normalization and softmax in float32, the rest in the dtype that comes."""
    x = images(device, dtype, requires_grad=True)
    with torch.autocast(device, dtype=dtype):
        y = operator(x)
    widens = operator.name not in ("lp_pool2d", "local_mean2d", "sigmoid")
    assert y.dtype == (torch.float32 if widens else dtype)
    y.sum().backward()
    assert x.grad.dtype == dtype and x.grad.isfinite().all()
    expected = operator(x.detach().float() if widens else x.detach())
    torch.testing.assert_close(y.detach(), expected, rtol=0, atol=0)


# --------------------------------------------------------------- shapes, layouts, threads, indices


@every_operator
@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (2, 0, 5, 6)], ids=str)
def test_empty(device, operator, shape):
    if operator.name == "softmax_nll":
        if shape[1] == 0:
            return  # no classes: an error, tested with the others
        operator = Operator("softmax_nll", {"target": torch.zeros(0, 5, 6, dtype=torch.long)})
    if isinstance(operator.arguments.get("norm_type"), Tensor):
        arguments = {**operator.arguments, "norm_type": POWERS[: shape[1]]}
        operator = Operator(operator.name, arguments)
    x = torch.zeros(shape, device=device, requires_grad=True)
    y = operator(x)
    y.sum().backward()
    assert x.grad.shape == x.shape


# The others work element by element or along a dimension: there is no batch to leave out.
@pytest.mark.parametrize("operator", [o for o in OPERATORS if o.name.endswith("2d")], ids=str)
def test_unbatched_is_a_batch_of_one(device, operator):
    x = images(device)
    y = operator(x)
    for image, expected in zip(x, y, strict=True):
        leaf = image.clone().requires_grad_()
        assert torch.equal(operator(leaf), expected)
        operator(leaf).sum().backward()
        assert leaf.grad.shape == image.shape


@every_operator
def test_layout_does_not_change_the_result(device, operator):
    base = images(device)
    expected_leaf = base.clone().requires_grad_()
    expected = operator(expected_leaf)
    expected.pow(2).sum().backward()
    for x in (
        base.to(memory_format=torch.channels_last),
        base.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
        torch.stack([base, base], -1)[..., 0],
        torch.cat([base, base], 2)[:, :, :5],
        torch.cat([base, base], 1).to(memory_format=torch.channels_last)[:, :4],
    ):
        leaf = x.detach().requires_grad_()
        y = operator(leaf)
        torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
        y.pow(2).sum().backward()
        torch.testing.assert_close(leaf.grad, expected_leaf.grad, rtol=1e-12, atol=1e-12)


@every_operator
def test_expanded_gradients(device, operator):
    """sum().backward() hands over gradients with stride 0."""
    a = images(device, requires_grad=True)
    b = a.detach().clone().requires_grad_()
    y = operator(a)
    y.backward(torch.ones((), dtype=y.dtype, device=device).expand_as(y))
    operator(b).backward(torch.ones_like(y))
    torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)


@every_operator
def test_the_same_bits_every_time_with_any_number_of_threads(device, operator):
    x = torch.randn(9, 4, 45, 46, device=device)
    if operator.name == "softmax_nll":
        target = torch.randint(4, (9, 45, 46))
        operator = Operator("softmax_nll", {"target": target, "reduction": "none"})

    def run() -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        y = operator(leaf)
        y.pow(2).sum().backward()
        return y.detach(), leaf.grad

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run()
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for ours, theirs in zip(run(), expected, strict=True):
                assert torch.equal(ours, theirs), count
    finally:
        torch.set_num_threads(threads)


def test_current_stream_is_used(device):
    if device == "cpu":
        return  # there is one
    x = torch.randn(64, 64, 56, 56, device=device)
    expected = mnist_ops.contrastive_norm2d(mnist_ops.sigmoid(x), KERNEL.to(device))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _torch_private.sleep_on_gpu(10_000_000)
        late = x * 1
        y = mnist_ops.contrastive_norm2d(mnist_ops.sigmoid(late), KERNEL.to(device))
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y, expected)


LARGE = os.environ.get("MNIST_OPS_TEST_LARGE") == "1"


@pytest.mark.skipif(not LARGE, reason="set MNIST_OPS_TEST_LARGE=1: needs 12 GB and minutes")
@pytest.mark.parametrize(
    "name", ["sigmoid", "lp_pool2d", "subtractive_norm2d", "stage2d", "softmax"]
)
def test_more_than_two_to_the_31_elements(device, name):
    side = 5_840  # 64 * side^2 = 2.18e9 elements
    x = torch.zeros(1, 64, side, side, dtype=torch.bfloat16, device=device)
    corner = x[:, :, -4:, -4:]
    corner.copy_(torch.randn(1, 64, 4, 4))
    operator = {
        "sigmoid": Operator("sigmoid"),
        "lp_pool2d": Operator("lp_pool2d", {"norm_type": 2, "kernel_size": 2}),
        "subtractive_norm2d": Operator("subtractive_norm2d", {"kernel": torch.ones(1)}),
        "stage2d": Operator("stage2d", {"kernel": torch.ones(1)}),
        "softmax": Operator("softmax", {"dim": 1}),
    }[name]
    y = operator(x)
    size = operator(corner).shape[-1]
    assert torch.equal(y[:, :, -size:, -size:], operator(corner))


# ------------------------------------------------------------------------ the other CPU libraries


@pytest.mark.parametrize("capability", other_capabilities())
def test_other_kernels_agree(capability):
    """Another library of CPU kernels, in a process of its own, against the one in use here."""
    script = """
import sys, torch, mnist_ops, test_softmax
from test_operators import OPERATORS
assert mnist_ops.build_info()["cpu_capability"] == sys.argv[2]
test_softmax.check_long_rows()  # partial sums side by side depend on the instruction set
torch.manual_seed(1)
results = []
for operator in OPERATORS:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        x = torch.randn(2, 4, 5, 6, dtype=torch.float64).to(dtype).requires_grad_()
        y = operator(x)
        y.pow(2).sum().backward()
        results.append((y.detach(), x.grad))
torch.save(results, sys.argv[1])
"""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "results.pt")
        environment = {
            **os.environ,
            "MNIST_OPS_CPU_CAPABILITY": capability,
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        command = [sys.executable, "-c", script, path, capability]
        subprocess.run(command, env=environment, check=True)
        results = iter(torch.load(path))
    torch.manual_seed(1)
    for operator in OPERATORS:
        for dtype, tolerance in (
            (torch.float64, 1e-12),
            (torch.float32, 1e-5),
            (torch.float16, 1e-2),
            (torch.bfloat16, 6e-2),
        ):
            x = torch.randn(2, 4, 5, 6, dtype=torch.float64).to(dtype).requires_grad_()
            y = operator(x)
            y.pow(2).sum().backward()
            for ours, theirs in zip((y.detach(), x.grad), next(results), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
