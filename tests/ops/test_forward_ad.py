"""Forward-mode AD of every operator, alone and nested with reverse mode and vmap.

The truth is PyTorch's own differentiation of the same functions written with its operators, and
finite differences (gradcheck).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import thinned
from test_operators import OPERATORS, Operator, every_operator, one_of_each, registered_calls
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vmap
from torch.nn import functional as F

import mnist_ops
from mnist_ops import gaussian1d, gaussian2d
from mnist_ops.mnist import models

# -------------------------------------------------- the operators, in PyTorch's differentiable ones


def pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def lp_pool2d(
    x: Tensor,
    norm_type: float | Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    average: bool = False,
) -> Tensor:
    size, pad = pair(kernel_size), pair(padding)
    step = size if stride is None else pair(stride)
    height, width = mnist_ops.lp_pool2d(x.detach(), 1, size, step, pad, ceil_mode).shape[-2:]
    below = max((height - 1) * step[0] + size[0] - x.shape[-2] - pad[0], 0)
    right = max((width - 1) * step[1] + size[1] - x.shape[-1] - pad[1], 0)

    def windows_of(image: Tensor) -> Tensor:
        padded = F.pad(image, (pad[1], right, pad[0], below))
        windows = padded.unfold(-2, size[0], step[0]).unfold(-2, size[1], step[1])
        return windows[..., :height, :width, :, :].flatten(-2)

    windows = windows_of(x)
    if not isinstance(norm_type, Tensor) and math.isinf(norm_type):
        return windows.abs().amax(-1)
    p = torch.as_tensor(norm_type, dtype=x.dtype, device=x.device)
    p = p[:, None, None] if p.dim() == 1 else p  # of each channel
    # A power of 0 has no derivative, and padding no influence.
    outside = windows == 0
    magnitudes = torch.where(outside, 1.0, windows).abs()
    sums = torch.where(outside, 0.0, magnitudes ** p[..., None]).sum(-1)
    return (sums / windows_of(torch.ones_like(x)).sum(-1) if average else sums) ** (1 / p)


def blur(plane: Tensor, kernel: Tensor) -> Tensor:
    weights = torch.outer(kernel, kernel) if kernel.dim() == 1 else kernel
    weights = (weights / weights.sum()).to(plane.dtype)[None, None]
    return F.conv2d(plane, weights, padding=(weights.shape[2] // 2, weights.shape[3] // 2))


def subtractive_norm2d(x: Tensor, kernel: Tensor) -> Tensor:
    coef = blur(torch.ones_like(x[:, :1]), kernel)
    return x - blur(x.mean(1, keepdim=True), kernel) / coef


def local_mean2d(
    x: Tensor, kernel: Tensor, channels: str = "all", padding_mode: str = "renormalized"
) -> Tensor:
    planes = x.flatten(0, -3).unsqueeze(1)
    height, width = kernel.shape[0] // 2, kernel.shape[-1] // 2
    mode = padding_mode if padding_mode in ("reflect", "replicate") else "constant"
    padded = F.pad(planes, (width, width, height, height), mode)
    means = blur(padded, kernel)[..., height : padded.shape[-2] - height, :]
    means = means[..., width : padded.shape[-1] - width].reshape(x.shape)
    if padding_mode == "renormalized":
        means = means / blur(torch.ones_like(planes[:1]), kernel)[0]
    return means.mean(-3, keepdim=True) if channels == "all" else means


def divisive_norm2d(
    x: Tensor, kernel: Tensor, threshold: float = 1e-4, threshold_value: float | None = None
) -> Tensor:
    coef = blur(torch.ones_like(x[:, :1]), kernel)
    s = blur((x * x).mean(1, keepdim=True), kernel).sqrt() / coef
    return x / torch.where(s > threshold, s, threshold_value or threshold)


def contrastive_norm2d(x: Tensor, kernel: Tensor, *args: Any, **options: Any) -> Tensor:
    return divisive_norm2d(subtractive_norm2d(x, kernel), kernel, *args, **options)


def stage2d(
    x: Tensor,
    kernel: Tensor,
    activation: str = "tanh",
    norm_type: float = 2.0,
    kernel_size: Any = 2,
    *args: Any,
    **options: Any,
) -> Tensor:
    squash = {"tanh": torch.tanh, "relu": F.relu, "sigmoid": torch.sigmoid}
    a = squash.get(activation, lambda t: t)(x)
    return subtractive_norm2d(lp_pool2d(a, norm_type, kernel_size, *args, **options), kernel)


def softmax(x: Tensor, dim: int = -1, beta: float = 1.0) -> Tensor:
    return torch.softmax(beta * x, dim)


def log_softmax(x: Tensor, dim: int = -1, beta: float = 1.0) -> Tensor:
    return torch.log_softmax(beta * x, dim)


def softmax_nll(x: Tensor, target: Tensor, beta: float = 1.0, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(beta * x, target, reduction=reduction)


sigmoid = torch.sigmoid


def both(operator: Operator, image: Tensor) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The operator and PyTorch's composition, for images like this one."""
    arguments = {
        k: v.to(image.device) if isinstance(v, Tensor) else v for k, v in operator.arguments.items()
    }
    if isinstance(arguments.get("norm_type"), Tensor):
        arguments["norm_type"] = arguments["norm_type"][: image.shape[-3]]  # one a channel
    if operator.name == "softmax_nll":
        classes = image.shape[:1] + image.shape[2:]
        count = math.prod(classes)
        arguments["target"] = torch.arange(count, device=image.device).reshape(classes) % 4
    ours, theirs = getattr(mnist_ops, operator.name), globals()[operator.name]
    return lambda x: ours(x, **arguments), lambda x: theirs(x, **arguments)


def small(device: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """Images without zeros and ties, where p-norms have kinks."""
    return torch.randn(2, 4, 3, 4, dtype=dtype, device=device)


def score(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A scalar whose second derivatives need both derivatives of f."""
    return lambda x: f(x).pow(3).sum()


Function = Callable[[Tensor], Tensor]
LAYOUTS = torch.contiguous_format, torch.channels_last


def compositions(x: Tensor) -> dict[str, Callable[[Function], Tensor]]:
    v, w = torch.randn_like(x), torch.randn_like(x)
    few = torch.stack([v, w])

    def tangent(f: Function, x: Tensor, v: Tensor) -> Tensor:
        return jvp(f, (x,), (v,))[1]

    def with_duals(f: Function) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent

    def reverse_over_duals(f: Function) -> Tensor:
        leaf = x.clone().requires_grad_()
        with forward_ad.dual_level():
            t = forward_ad.unpack_dual(f(forward_ad.make_dual(leaf, v))).tangent
            if not t.requires_grad:  # of a linear function
                return torch.zeros_like(x)
            return torch.autograd.grad(t.pow(2).sum(), leaf)[0]

    def duals_over_reverse(f: Function) -> Tensor:
        leaf = x.clone().requires_grad_()
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(leaf, v)
            (g,) = torch.autograd.grad(score(f)(dual), dual, create_graph=True)
            return forward_ad.unpack_dual(g).tangent.detach()

    def without_grad(f: Function) -> Tensor:
        with torch.no_grad():
            return tangent(f, x, v)

    return {
        "jvp": lambda f: tangent(f, x, v),
        "jvp under no_grad": without_grad,
        "jvp(jvp)": lambda f: tangent(lambda t: tangent(f, t, v), x, w),
        "jvp(grad)": lambda f: tangent(grad(score(f)), x, v),
        "grad(jvp)": lambda f: grad(lambda t: tangent(f, t, v).pow(2).sum())(x),
        "vmap(jvp) over tangents": lambda f: vmap(lambda t: tangent(f, x, t))(few),
        "vmap(jvp) over both": lambda f: vmap(lambda t: tangent(f, t, t))(few),
        "jvp(vmap)": lambda f: tangent(vmap(f), few, few.flip(0)),
        "jvp(vmap(grad))": lambda f: tangent(vmap(grad(score(f))), few, few.flip(0)),
        "vmap(jvp(grad))": lambda f: vmap(lambda t: tangent(grad(score(f)), x, t))(few),
        "vmap(grad(jvp))": lambda f: vmap(
            grad(lambda t: tangent(f, t, torch.ones_like(t)).pow(2).sum())
        )(few),
        "make_dual": with_duals,
        "backward of a tangent": reverse_over_duals,
        "tangent of a gradient": duals_over_reverse,
        "linearize": lambda f: linearize(f, x)[1](v),
        "autograd.functional.jvp": lambda f: torch.autograd.functional.jvp(f, x, v)[1],
    }


@pytest.mark.parametrize(("operator", "layout"), thinned(OPERATORS, LAYOUTS))
def test_compositions(device, operator, layout):
    x = small(device).to(memory_format=layout)
    ours, theirs = both(operator, x)
    torch.testing.assert_close(ours(x), theirs(x))
    computations = compositions(x)
    for name, compute in computations.items():
        # Softmax's own tangent cannot be differentiated by backward(), only by grad().
        own = computations["grad(jvp)"] if name == "backward of a tangent" else compute
        expected = own(theirs)
        actual = compute(ours)
        torch.testing.assert_close(
            actual, expected, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )
        linear = name in ("jvp(jvp)", "grad(jvp)", "vmap(grad(jvp))", "backward of a tangent")
        assert linear or actual.abs().max() > 0, name


@one_of_each
def test_jacobians_and_hessians(device, operator):
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64, device=device)
    ours, theirs = both(operator, x)
    for matrix in (
        jacfwd,
        lambda f: jacfwd(jacfwd(f)),
        lambda f: jacrev(jacfwd(f)),
        lambda f: jacfwd(jacrev(f)),
        lambda f: hessian(score(f)),
        lambda f: jacfwd(jacfwd(score(f))),
        lambda f: jacrev(jacfwd(score(f))),
    ):
        torch.testing.assert_close(matrix(ours)(x), matrix(theirs)(x), rtol=1e-8, atol=1e-9)
    batch = torch.stack([x, x.flip(-1)])
    torch.testing.assert_close(
        vmap(hessian(score(ours)))(batch), vmap(hessian(score(theirs)))(batch), rtol=1e-8, atol=1e-9
    )


WINDOWS: list[dict[str, Any]] = [
    {"norm_type": p, **windows}
    for p in (1, 1.5, 2, 3, math.inf)
    for windows in (
        {"kernel_size": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": (2, 3), "stride": 1, "ceil_mode": True},
    )
]
CASES = [
    *(Operator("lp_pool2d", windows) for windows in WINDOWS),
    *(
        Operator("stage2d", {"kernel": gaussian1d(3), "activation": activation, **windows})
        for activation in ("tanh", "relu", "sigmoid", "identity")
        for windows in WINDOWS[1::4]
    ),
    *(
        Operator(name, {"kernel": kernel, **options})
        for kernel in (gaussian1d(3), gaussian2d((3, 5)), torch.tensor([0.1, 0.7, 0.3]))
        for name, options in (
            ("subtractive_norm2d", {}),
            ("divisive_norm2d", {"threshold": 0.9, "threshold_value": 1.5}),
            ("contrastive_norm2d", {"threshold": 1e-4}),
        )
    ),
    *(
        Operator(name, {"dim": dim, "beta": -1.5})
        for name in ("softmax", "log_softmax")
        for dim in (0, 1, -1)
    ),
    *(
        Operator("softmax_nll", {"target": torch.zeros(()), "reduction": reduction})
        for reduction in ("none", "mean", "sum")
    ),
    Operator("sigmoid"),
]


@pytest.mark.parametrize(("operator", "layout"), thinned(CASES, LAYOUTS))
def test_finite_differences(device, operator, layout):
    """gradcheck in forward mode, batched and not, and of reverse mode's own tangents."""
    shape = (2, 5, 1, 2) if operator.name == "softmax_nll" else (1, 2, 3, 4)
    x = torch.randn(shape, dtype=torch.float64, device=device).to(memory_format=layout)
    leaf = x.requires_grad_()
    f, _ = both(operator, x)
    assert gradcheck(
        f,
        leaf,
        check_forward_ad=True,
        check_backward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    # Its batched check differentiates a third time.
    assert gradgradcheck(f, leaf, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_finite_differences_of_single_images_and_vectors(device):
    x = torch.randn(2, 3, 4, dtype=torch.float64, device=device, requires_grad=True)
    for operator in OPERATORS:
        if operator.name.endswith("2d"):
            assert gradcheck(both(operator, x)[0], x, check_forward_ad=True), operator
    row = torch.randn(5, dtype=torch.float64, device=device, requires_grad=True)
    scalar = row[0].detach().requires_grad_()
    for f in (mnist_ops.softmax, mnist_ops.log_softmax, mnist_ops.sigmoid):
        for leaf in (row, scalar):
            assert gradcheck(f, leaf, check_forward_ad=True)
            assert gradgradcheck(f, leaf, check_fwd_over_rev=True)
    target = torch.tensor(2, device=device)
    assert gradcheck(lambda t: mnist_ops.softmax_nll(t, target), row, check_forward_ad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@every_operator
def test_dtypes(device, operator, dtype):
    """Tangents have the dtype of what they belong to, and its accuracy."""
    x = small(device, dtype)
    v = torch.randn_like(x)
    ours, _ = both(operator, x)
    y, t = jvp(ours, (x,), (v,))
    assert t.dtype == y.dtype == dtype and t.shape == y.shape
    # Of the same point in float64; the reference rounds nothing.
    _, expected = jvp(both(operator, x.double())[0], (x.double(),), (v.double(),))
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1.5e-1}[dtype]
    scale = expected.abs().max().clamp(min=1)
    torch.testing.assert_close(t.double() / scale, expected / scale, rtol=tolerance, atol=tolerance)
    gradient = jvp(grad(lambda t: ours(t).sum()), (x,), (v,))[1]
    assert gradient.dtype == dtype


# What each operator takes as a constant, or as a function of another argument.
CONSTANTS = {
    "lp_pool2d_backward": {2},
    "lp_pool2d_jvp": {2},
    "lp_pool2d_double_backward": {2, 3},
    "subtractive_norm2d": {1},
    "subtractive_norm2d_backward": {1},
    "local_mean2d": {1},
    "local_mean2d_backward": {1},
    "divisive_norm2d": {1},
    "divisive_norm2d_backward": {2},
    "contrastive_norm2d": {1},
    "contrastive_norm2d_backward": {2},
    "stage2d": {1},
    "stage2d_backward": {2},
}


def test_raw_operators(device):
    """Each one's tangent by every argument, against the transposed of its gradient.

    gradcheck cannot be asked: arguments that are functions of others would be changed alone.
    """
    for name, arguments in registered_calls(device, torch.float64):
        op = getattr(torch.ops.mnist_ops, name)
        # softmax_nll_backward's argument behind the target is what the forward saved.
        constants = {3} if name == "softmax_nll_backward" else CONSTANTS.get(name, set())
        for i, argument in enumerate(arguments):
            if not isinstance(argument, Tensor) or not argument.is_floating_point():
                continue

            def f(t: Tensor, op=op, i=i, arguments=arguments) -> Any:
                result = op(*arguments[:i], t, *arguments[i + 1 :])
                return result[0] if isinstance(result, tuple) else result

            v = torch.randn_like(argument)
            if i in constants:
                with pytest.raises(RuntimeError, match="derivative"):
                    jvp(f, (argument,), (v,))
                continue
            y, t = jvp(f, (argument,), (v,))
            w = torch.randn_like(y)
            if name == "lp_pool2d_double_backward":
                # Its gradient is not offered; in what it offers a tangent by it is linear.
                expected = f(v) if i == 0 else torch.zeros_like(y)
                torch.testing.assert_close(t, expected, msg=name)
                continue
            leaf = argument.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(f(leaf), leaf, w)
            torch.testing.assert_close((w * t).sum(), (gradient * v).sum(), msg=name)


def test_tangents_by_two_arguments(device):
    """The second derivatives again, through the raw backward operators and saved results."""
    x = small(device)
    for p in (2.0, 3.0):
        windows = (p, [2, 2], [1, 2], [1, 0], True)
        g = torch.randn_like(torch.ops.mnist_ops.lp_pool2d(x, *windows))

        def backward(g: Tensor, x: Tensor, windows=windows) -> Tensor:
            y = torch.ops.mnist_ops.lp_pool2d(x, *windows)
            return torch.ops.mnist_ops.lp_pool2d_backward(g, x, y, *windows)

        assert gradcheck(
            backward, (g.requires_grad_(), x.clone().requires_grad_()), check_forward_ad=True
        )

        def directional(v: Tensor, x: Tensor, windows=windows) -> Tensor:
            y = torch.ops.mnist_ops.lp_pool2d(x, *windows)
            return torch.ops.mnist_ops.lp_pool2d_jvp(v, x, y, *windows)

        leaves = torch.randn_like(x).requires_grad_(), x.clone().requires_grad_()
        assert gradcheck(directional, leaves, check_forward_ad=True)


# ------------------------------------------------------------------------------- what cannot work


def test_third_derivatives_of_pooling_are_an_error(device):
    x = torch.rand(1, 1, 2, 2, dtype=torch.float64, device=device) + 1
    kernel = gaussian1d(1).to(device)
    for f in (
        lambda t: mnist_ops.lp_pool2d(t, 3, 2).pow(2).sum(),
        lambda t: mnist_ops.stage2d(t, kernel, norm_type=3).pow(2).sum(),
    ):
        for third in (
            lambda t, f=f: jacfwd(hessian(f))(t),
            lambda t, f=f: jacrev(hessian(f))(t),
            lambda t, f=f: grad(lambda u: hessian(f)(u).sum())(t),
        ):
            with pytest.raises(RuntimeError, match="third derivative of lp_pool2d is not offered"):
                third(x)


@pytest.mark.parametrize("name", ["subtractive_norm2d", "divisive_norm2d", "stage2d"])
def test_a_kernel_with_a_tangent_is_refused(device, name):
    x, kernel = small(device), gaussian1d(3).to(device)
    function = getattr(mnist_ops, name)
    with pytest.raises(RuntimeError, match="no derivative for its kernel"):
        jvp(lambda k: function(x, k), (kernel,), (torch.ones_like(kernel),))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(kernel, torch.ones_like(kernel))
        with pytest.raises(RuntimeError, match="no derivative for its kernel"):
            function(x, dual)
    # One without is no obstacle.
    assert jvp(lambda t: function(t, kernel), (x,), (x,))[1].abs().max() > 0


def test_integers_have_no_tangents(device):
    x = small(device)
    target = torch.zeros(2, 3, 4, dtype=torch.long, device=device)
    with pytest.raises((RuntimeError, ValueError)):
        jvp(lambda t: mnist_ops.softmax_nll(x, t), (target,), (target,))


# --------------------------------------------------------------------- elsewhere than in eager mode


@one_of_each
def test_compiled(device, operator):
    """In Dynamo's graphs no Python variable tells that there are tangents."""
    torch.compiler.reset()
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64, device=device)
    ours, _ = both(operator, x)

    def f(t: Tensor) -> Tensor:
        return jvp(lambda u: ours(u) * u.sum(), (t,), (t,))[1]

    torch.testing.assert_close(torch.compile(f, backend="aot_eager")(x), f(x))


# ----------------------------------------------------------------------------- modules and networks


def reference_network(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    for i in (1, 2):
        x = F.conv2d(x, parameters[f"conv{i}.weight"], parameters[f"conv{i}.bias"])
        x = stage2d(x, gaussian1d(3).to(x))
    x = torch.tanh(F.linear(x.flatten(1), parameters["linear1.weight"], parameters["linear1.bias"]))
    return F.log_softmax(F.linear(x, parameters["linear2.weight"], parameters["linear2.bias"]), -1)


@pytest.mark.parametrize("fused", [True, False])
def test_network(device, fused):
    model = models.convnet(
        (2, 3, 4),
        kernel_size=3,
        norm_kernel=3,
        image_size=14,
        num_classes=3,
        log_softmax="exact",
        dtype=torch.float64,
        device=device,
        fused=fused,
    )
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    x = torch.randn(2, 1, 14, 14, dtype=torch.float64, device=device)
    tangents = {k: torch.randn_like(v) for k, v in parameters.items()}

    def ours(p: dict[str, Tensor]) -> Tensor:
        return functional_call(model, p, (x,))

    def theirs(p: dict[str, Tensor]) -> Tensor:
        return reference_network(p, x)

    for make in (
        lambda f: jvp(f, (parameters,), (tangents,))[1],
        lambda f: jvp(grad(lambda p: f(p)[:, 0].sum()), (parameters,), (tangents,))[1],
        lambda f: hessian(lambda b: f({**parameters, "conv1.bias": b})[:, 0].sum())(
            parameters["conv1.bias"]
        ),
    ):
        torch.testing.assert_close(make(ours), make(theirs), rtol=1e-8, atol=1e-10)


def test_modules(device):
    kernel = gaussian1d(3)
    x, v = small(device), torch.randn(2, 4, 3, 4, dtype=torch.float64, device=device)
    for module, reference in (
        (mnist_ops.nn.LPPool2d(3, 2), lambda t: lp_pool2d(t, 3, 2)),
        (mnist_ops.nn.Stage2d(kernel), lambda t: stage2d(t, kernel.to(t))),
        (mnist_ops.nn.SubtractiveNorm2d(kernel), lambda t: subtractive_norm2d(t, kernel.to(t))),
        (mnist_ops.nn.DivisiveNorm2d(kernel), lambda t: divisive_norm2d(t, kernel.to(t))),
        (mnist_ops.nn.ContrastiveNorm2d(kernel), lambda t: contrastive_norm2d(t, kernel.to(t))),
        (mnist_ops.nn.Sigmoid(), torch.sigmoid),
        (mnist_ops.nn.Softmax(1), lambda t: torch.softmax(t, 1)),
        (mnist_ops.nn.LogSoftmax(1), lambda t: torch.log_softmax(t, 1)),
    ):
        module = module.to(device)
        torch.testing.assert_close(jvp(module, (x,), (v,)), jvp(reference, (x,), (v,)))


# ------------------------------------------------------------------------------------ empty images


@pytest.mark.parametrize("shape", [(0, 4, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)], ids=str)
@pytest.mark.parametrize("name", ["subtractive_norm2d", "divisive_norm2d", "contrastive_norm2d"])
def test_second_derivatives_of_empty_images(device, name, shape):
    kernel = gaussian1d(3).to(device)
    x = torch.zeros(shape, dtype=torch.float64, device=device, requires_grad=True)

    def f(t: Tensor) -> Tensor:
        return getattr(mnist_ops, name)(t, kernel)

    (g,) = torch.autograd.grad(f(x).pow(3).sum(), x, create_graph=True)
    (gg,) = torch.autograd.grad(g.pow(3).sum(), x, create_graph=True)
    (ggg,) = torch.autograd.grad(gg.sum(), x)
    assert gg.shape == ggg.shape == x.shape
    assert jvp(f, (x.detach(),), (x.detach(),))[1].shape == x.shape
    assert hessian(score(f))(x.detach()).shape == (*shape, *shape)


@every_operator
@pytest.mark.parametrize("shape", [(0, 2, 4, 5, 6), (3, 0, 4, 5, 6), (3, 2, 0, 5, 6)], ids=str)
def test_vmap_over_nothing(device, operator, shape):
    """A batch without examples, examples without images, images without channels."""
    x = torch.zeros(shape, dtype=torch.float64, device=device)
    f, _ = both(operator, x[0] if len(x) else torch.zeros(shape[1:], device=device))
    if operator.name == "softmax_nll" and shape[2] == 0:
        return  # no classes: an error, tested with the others
    if shape[0] == 0:
        example = torch.zeros(shape[1:], dtype=torch.float64, device=device)
        expected = f(example).new_zeros((0, *f(example).shape))
    else:
        expected = torch.stack([f(example) for example in x])
    y = vmap(f)(x)
    assert y.shape == expected.shape
    assert vmap(grad(lambda t: f(t).sum()))(x).shape == x.shape
    if 0 not in shape[:1]:
        assert vmap(lambda t: jvp(f, (t,), (t,))[1])(x).shape == y.shape
        second = vmap(grad(lambda t: grad(score(f))(t).pow(2).sum()))(x)
        assert second.shape == x.shape
