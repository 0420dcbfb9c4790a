"""The operators written in PyTorch's own operations: a second opinion on every kernel."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mnist_ops
from mnist_ops import _torch_private, gaussian1d, gaussian2d
from mnist_ops.ops.definitions import DEFINITIONS

WINDOWS = [
    ([2, 2], [2, 2], [0, 0], False),
    ([3, 2], [1, 2], [1, 1], False),
    ([3, 3], [2, 2], [1, 0], True),
    ([2, 3], [3, 2], [0, 1], True),
]
THRESHOLDS = [(0.0, 1.0), (1e-4, 1e-4), (0.5, 0.25)]
CASES = [
    *(("lp_pool2d", (p, *w)) for p in (0.5, 1.0, 2.0, 3.0, math.inf) for w in WINDOWS),
    *(("subtractive_norm2d", (k,)) for k in (gaussian1d(3), gaussian2d(5))),
    *(
        ("local_mean2d", (kernel, mode))
        for kernel in (gaussian1d(5), gaussian1d(13), gaussian2d((3, 7)))
        for mode in ("renormalized", "zeros", "reflect", "replicate")
        if mode != "renormalized" or kernel.dim() == 1
    ),
    *(
        (name, (k, *t))
        for name in ("divisive_norm2d", "contrastive_norm2d")
        for k in (gaussian1d(5), gaussian2d(3))
        for t in THRESHOLDS
    ),
    *(
        ("stage2d", (gaussian1d(3), activation, 2.0, *windows))
        for activation in ("tanh", "relu", "sigmoid", "identity")
        for windows in WINDOWS[:3]
    ),
    ("sigmoid", ()),
    *((name, (d, b)) for name in ("softmax", "log_softmax") for d in (1, 3) for b in (1.0, -2.5)),
    *(
        ("softmax_nll", (None, weight, 1.5, reduction, 1, smoothing))
        for reduction in ("mean", "sum", "none")
        for weight in (None, torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))
        for smoothing in (0.0, 0.2)
    ),
]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("name", "arguments"), CASES, ids=str)
def test_kernels_compute_what_is_defined(name, arguments, zeros):
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    if zeros:
        x[:, :, :4] = 0
    if name == "softmax_nll":
        arguments = (torch.randint(3, (2, 7, 8)), *arguments[1:])

    def both(function):
        leaf = x.clone().requires_grad_()
        result = function(leaf, *arguments)
        result = result[0] if isinstance(result, tuple) else result
        grad = torch.linspace(-1, 1, result.numel(), dtype=x.dtype).view_as(result)
        result.backward(grad)
        return result.detach(), leaf.grad

    expected = both(DEFINITIONS[name])
    torch.testing.assert_close(
        both(getattr(torch.ops.mnist_ops, name)), expected, rtol=1e-12, atol=1e-12
    )


def test_devices_without_kernels_have_the_definitions():
    for name in DEFINITIONS:
        rows = _torch_private.dispatch_table(f"mnist_ops::{name}")
        for device in ("MPS", "XPU", "PrivateUse1"):
            for key in (device, f"Autograd{device}"):
                assert "definitions.py" in rows[key], (name, key, rows[key])


# Tests that hold the operators against loops, PyTorch and vectors of Torch7, not against bits.
ELSEWHERE = {
    "test_lp_pool.py": "(equals_the_loops and (float32 or torch.float16)) or vectors",
    "test_local_norm.py": "(equals_the_loops and (float32 or torch.float16)) or vectors",
    "test_local_mean.py": "equals_the_loops or equals_piq or derivatives",
    "test_stage.py": "equals_the_loops and float32",
    "test_softmax.py": "sigmoid_equals or nll_gradients",  # others look at layouts
}


def test_the_operators_without_their_kernels():
    """The operators' own tests, with the definitions on the CPU; their user is told once."""
    code = """
import sys, pytest, torch, mnist_ops
model = mnist_ops.nn.Stage2d(mnist_ops.gaussian1d(3))
x = torch.randn(1, 2, 8, 8, requires_grad=True)
for _ in range(2):
    model(x).sum().backward()
hessian = torch.func.hessian(lambda x: mnist_ops.lp_pool2d(x, 3, 2).sum())
print(tuple(hessian(x.detach()[0, :, :2, :2]).shape), mnist_ops.build_info()["cpu_capability"])
sys.exit(pytest.main(sys.argv[1:]))
"""
    chosen = " or ".join(f"({file} and ({tests}))" for file, tests in ELSEWHERE.items())
    files = [str(Path(__file__).with_name(file)) for file in ELSEWHERE]
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", f"({chosen}) and not cuda"]
    result = subprocess.run(
        [sys.executable, "-c", code, *options, *files],
        env={**os.environ, "MNIST_OPS_CPU_CAPABILITY": "none"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert result.stdout.startswith("(2, 2, 2, 2, 2, 2) none"), result.stderr
    assert result.stderr.count("mnist_ops: there are no kernels for cpu") == 1
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) > 150, result.stdout[-500:]
    assert mnist_ops.build_info()["cpu_capability"] != "none"
