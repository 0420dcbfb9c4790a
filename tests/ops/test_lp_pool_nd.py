"""LP pooling of sequences and volumes; padding on each side, and dilation."""

from __future__ import annotations

import math
import random
from importlib import import_module
from typing import Any

import loops
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from mnist_ops import lp_pool1d, lp_pool2d, lp_pool3d, nn

FUNCTIONS = {1: lp_pool1d, 2: lp_pool2d, 3: lp_pool3d}
SHAPES = {1: (9,), 2: (6, 8), 3: (5, 4, 6)}
MODULES = {1: nn.LPPool1d, 2: nn.LPPool2d, 3: nn.LPPool3d}


def images(dims: int, **options: Any) -> Tensor:
    return torch.randn(2, 3, *SHAPES[dims], dtype=torch.float64, **options)


def random_windows(dims: int, seed: int) -> dict[str, Any]:
    """Arguments of any kind, for which at least one window fits."""
    draw = random.Random(seed)
    kernel = [draw.randint(1, 3) for _ in range(dims)]
    sides = [(draw.randint(0, 4), draw.randint(0, 4)) for _ in range(dims)]
    if seed % 3 == 0:
        sides = [(k // 2, k // 2) for k in kernel]
    padding = [pad for pad, _ in sides] if seed % 6 == 0 else [tuple(side) for side in sides]
    return {
        "kernel_size": tuple(kernel),
        "stride": tuple(draw.randint(1, 4) for _ in range(dims)),
        "padding": tuple(padding),
        "ceil_mode": draw.random() < 0.5,
        "dilation": tuple(draw.randint(1, 2) for _ in range(dims)) if seed % 2 else 1,
    }


@pytest.mark.parametrize("p", [1, 2, 3, 2.5, math.inf])
@pytest.mark.parametrize("dims", FUNCTIONS)
def test_equals_the_loops(device, dims, p):
    for seed in range(12):
        windows = random_windows(dims, seed)
        x = images(dims)
        y = FUNCTIONS[dims](x.to(device), p, **windows).cpu()
        sides = [(s, s) if isinstance(s, int) else s for s in windows["padding"]]
        gaps = windows["dilation"]
        expected = loops.lp_pool_nd(
            x[1, 2],
            p,
            list(windows["kernel_size"]),
            list(windows["stride"]),
            sides,
            [gaps] * dims if isinstance(gaps, int) else list(gaps),
            windows["ceil_mode"],
        )
        torch.testing.assert_close(y[1, 2], expected, msg=lambda m, w=windows: f"{w}: {m}")
        unbatched = FUNCTIONS[dims](x[1].to(device), p, **windows).cpu()
        torch.testing.assert_close(unbatched, y[1], rtol=0, atol=0)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_equals_pytorch_where_it_is_right(device, dims):
    """Positive numbers, in windows of whole images."""
    theirs = getattr(torch.nn.functional, f"lp_pool{dims}d")
    x = images(dims, device=device).abs()
    for p in (1.5, 2, 3):
        for size, stride in ((2, None), (2, 1), (3, 2)):
            torch.testing.assert_close(
                FUNCTIONS[dims](x, p, size, stride), theirs(x, p, size, stride)
            )


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("dims", FUNCTIONS)
def test_gradients(device, dims, p):
    x = images(dims, device=device, requires_grad=True)
    for windows in ({"kernel_size": 2, "stride": 1}, random_windows(dims, 1)):

        def pool(t: Tensor, windows=windows) -> Tensor:
            return FUNCTIONS[dims](t[:1, :2], p, **windows)

        gradcheck(pool, x, check_forward_ad=True, fast_mode=True)
        gradgradcheck(pool, x, fast_mode=True)


def test_gradient_of_a_volume_is_zero_where_it_is_zero(device):
    x = torch.zeros(1, 1, 2, 2, 2, device=device)
    x[0, 0, 1, 1, 1] = -3.0
    x.requires_grad_()
    lp_pool3d(x, 0.5, 2).sum().backward()
    expected = torch.zeros(1, 1, 2, 2, 2)
    expected[0, 0, 1, 1, 1] = -1.0
    torch.testing.assert_close(x.grad.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_round_once(device, dtype):
    x = torch.randn(2, 3, 4, 6, 6, device=device).to(dtype)
    y = lp_pool3d(x, 3, 2)
    assert y.dtype == dtype
    torch.testing.assert_close(y, lp_pool3d(x.float(), 3, 2).to(dtype), rtol=0, atol=0)


def test_large_and_small_volumes(device):
    for value in (1e25, 1e-30):
        x = torch.full((1, 1, 2, 2, 2), value, device=device)
        torch.testing.assert_close(lp_pool3d(x, 3, 2), 2 * x[:, :, :1, :1, :1])


def test_a_sequence_is_not_copied():
    x = images(1)
    seen = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(str(op))
            return op(*args, **(kwargs or {}))

    with Seen():
        lp_pool1d(x, 2, 2)
    copies = [op for op in seen if "clone" in op or "copy" in op or "constant_pad" in op]
    assert any("lp_pool2d" in op for op in seen) and not copies


@pytest.mark.parametrize("shape", [(0, 3, 4, 4, 4), (2, 0, 4, 4, 4)], ids=str)
def test_empty(device, shape):
    for dims, function in FUNCTIONS.items():
        for extra in ({}, {"dilation": 2, "stride": 1}, {"padding": ((1, 0),) * dims}):
            x = torch.zeros(shape[: 2 + dims], device=device, requires_grad=True)
            y = function(x, 2, 2, **extra)
            y.sum().backward()
            assert y.shape[:2] == shape[:2] and x.grad.shape == x.shape


def test_channels_last_stays_with_a_padding_on_each_side(device):
    x = torch.randn(2, 4, 6, 8, device=device).to(memory_format=torch.channels_last)
    y = lp_pool2d(x, 2, 2, padding=((0, 1), (3, 0)))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dims", FUNCTIONS)
def test_compile_export_vmap_fx(device, dims):
    torch.compiler.reset()
    windows = random_windows(dims, 1)
    module = MODULES[dims](2.5, **windows)
    x = images(dims, device=device)
    expected = module(x)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.func.vmap(module)(x), expected)
    graph = torch.fx.symbolic_trace(module)
    assert FUNCTIONS[dims] in [node.target for node in graph.graph.nodes]
    torch.testing.assert_close(graph(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dims", FUNCTIONS)
def test_modules(dims):
    module = MODULES[dims](3, 2, stride=1, padding=1, ceil_mode=True, dilation=2)
    assert repr(module) == (
        f"LPPool{dims}d(norm_type=3, kernel_size=2, stride=1, padding=1, ceil_mode=True, "
        "dilation=2)"
    )
    x = images(dims)
    expected = FUNCTIONS[dims](x, 3, 2, 1, 1, True, 2)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=0)


def test_a_module_pickled_before_there_was_dilation():
    module = nn.LPPool2d(2, 2)
    state = {k: v for k, v in module.__dict__.items() if k != "dilation"}
    old = nn.LPPool2d.__new__(nn.LPPool2d)
    old.__setstate__(state)
    x = images(2)
    torch.testing.assert_close(old(x), module(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dims", "arguments", "error", "message"),
    [
        (1, {"kernel_size": (2, 2)}, TypeError, r"lp_pool1d: kernel_size must be an int, got"),
        (
            1,
            {"input": torch.ones(3)},
            ValueError,
            r"must be \(N, C, L\) or \(C, L\), got the shape",
        ),
        (1, {"input": [1.0]}, TypeError, "lp_pool1d: input must be a Tensor, got list"),
        (1, {"kernel_size": 8}, ValueError, r"kernel_size \(8,\) does not fit into \(4,\)"),
        (1, {"padding": 2}, ValueError, r"between 0 and half of kernel_size, got \(2,\)"),
        (1, {"norm_type": 0}, ValueError, "lp_pool1d: norm_type must be > 0, got 0"),
        (
            2,
            {"dilation": 0},
            ValueError,
            r"dilation must be positive and below 2\^31, got \(0, 0\)",
        ),
        (2, {"dilation": 4}, ValueError, r"dilation \(4, 4\) does not fit into an image of"),
        (
            2,
            {"padding": ((1, 1), 1)},
            TypeError,
            "padding must be an int, 2 ints or 2 pairs of int",
        ),
        (2, {"padding": ((1, -1), (0, 0))}, ValueError, r"padding must be >= 0 and below 2\^31"),
        (3, {"stride": (1, 2)}, TypeError, "stride must be an int or three ints"),
        (3, {"input": torch.ones(1, 4, 4)}, ValueError, r"\(N, C, D, H, W\) or \(C, D, H, W\)"),
        (3, {"input": torch.ones(1, 4, 4, 4, dtype=torch.int32)}, TypeError, "got torch.int32"),
    ],
    ids=str,
)
def test_errors_name_the_argument(dims, arguments, error, message):
    call = {"input": torch.ones(1, 1, *[4] * dims), "norm_type": 2, "kernel_size": 2, **arguments}
    with pytest.raises(error, match=message):
        FUNCTIONS[dims](**call)
    module = {k: v for k, v in call.items() if k != "input"}
    if "input" not in arguments and "fit" not in message:
        with pytest.raises(error, match=message.replace(f"lp_pool{dims}d", f"LPPool{dims}d")):
            MODULES[dims](**module)


# ------------------------------------------------------------------------------- ONNX's node tests


def test_node_tests_of_onnx(monkeypatch):
    """ONNX's own tests of LpPool, made by its package: node, input, output."""
    node = pytest.importorskip(
        "onnx.backend.test.case.node", reason="there is no onnx, which makes the cases"
    )
    from onnx.helper import get_attribute_value

    # Those of all operators take ten seconds.
    monkeypatch.setattr(
        node, "import_recursive", lambda package: import_module(f"{package.__name__}.lppool")
    )
    cases = node.collect_testcases("LpPool")
    assert len(cases) >= 8
    for case in cases:
        (node,) = case.model.graph.node
        given = {a.name: get_attribute_value(a) for a in node.attribute}
        kernel = given["kernel_shape"]
        dims = len(kernel)
        stride = given.get("strides", [1] * dims)
        ((x,), (expected,)) = case.data_sets[0]
        pads = given.get("pads", [0] * 2 * dims)
        same = given.get("auto_pad", b"NOTSET").decode()
        if same in ("SAME_UPPER", "SAME_LOWER"):
            sizes = x.shape[2:]
            missing = [
                max(0, (math.ceil(n / s) - 1) * s + k - n)
                for n, s, k in zip(sizes, stride, kernel, strict=True)
            ]
            lesser, greater = [m // 2 for m in missing], [m - m // 2 for m in missing]
            pads = [*lesser, *greater] if same == "SAME_UPPER" else [*greater, *lesser]
        y = FUNCTIONS[dims](
            torch.from_numpy(x),
            given.get("p", 2),
            kernel,
            stride,
            tuple(zip(pads[:dims], pads[dims:], strict=True)),
            bool(given.get("ceil_mode", 0)),
            given.get("dilations", 1),
        )
        torch.testing.assert_close(
            y, torch.from_numpy(expected), msg=lambda m, c=case: f"{c.name}: {m}"
        )
