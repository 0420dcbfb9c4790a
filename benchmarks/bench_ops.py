"""The operators against what one would write without them, with pytest-benchmark.

    pytest benchmarks/bench_ops.py --benchmark-group-by=group --benchmark-columns=median,iqr,rounds

Each group is one operator at one size, forward, or forward and backward. In it:

    mnist_ops   this library
    eager       PyTorch as a good user writes it: its own operator where there is one; for the
                normalizations the channel mean first, then a separable blur of that one plane
    compile     the same under torch.compile
    floor       a copy that moves the bytes the operator has to move: every input read once, every
                output written once, at the speed torch.clone has here

Compare medians within a group, on a machine that does nothing else; the order of the cases is not
interleaved, so repeat the run before you believe a small difference. MNIST_OPS_BENCH_THREADS sets
the threads (default: torch's), which are printed with the group.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import mnist_ops

if "MNIST_OPS_BENCH_THREADS" in os.environ:
    torch.set_num_threads(int(os.environ["MNIST_OPS_BENCH_THREADS"]))

DEVICES = ["cpu"] + (["cuda"] if mnist_ops.build_info()["cuda"] == "available" else [])
KERNEL = mnist_ops.gaussian1d(7)


def blur(plane: Tensor) -> Tensor:
    taps = (KERNEL / KERNEL.sum()).to(plane)
    return F.conv2d(
        F.conv2d(plane, taps[None, None, None], padding=(0, 3)),
        taps[None, None, :, None],
        padding=(3, 0),
    )


def eager_subtractive(x: Tensor) -> Tensor:
    return x - blur(x.mean(1, keepdim=True)) / blur(torch.ones_like(x[:1, :1]))


def eager_divisive(x: Tensor) -> Tensor:
    s = blur(x.square().mean(1, keepdim=True)).sqrt() / blur(torch.ones_like(x[:1, :1]))
    return x / torch.where(s > 1e-4, s, 1e-4)


TARGETS: dict[tuple[int, str], Tensor] = {}


def targets(x: Tensor) -> Tensor:
    return TARGETS.setdefault(
        (len(x), x.device.type), torch.arange(len(x), device=x.device) % x.shape[1]
    )


@dataclass(frozen=True)
class Case:
    """One operator at one size; ours and theirs take the input alone."""

    name: str
    shape: tuple[int, ...]
    ours: Callable[[Tensor], Tensor]
    theirs: Callable[[Tensor], Tensor]


CASES = [
    Case(
        "lp_pool2d p=2",
        (64, 64, 28, 28),
        lambda x: mnist_ops.lp_pool2d(x, 2, 2),
        lambda x: F.lp_pool2d(x, 2.0, 2),
    ),
    Case(
        "lp_pool2d p=3",
        (64, 64, 28, 28),
        lambda x: mnist_ops.lp_pool2d(x, 3, 2),
        lambda x: F.avg_pool2d(x.abs() ** 3, 2).mul(4) ** (1 / 3),
    ),
    Case(
        "subtractive_norm2d",
        (64, 64, 14, 14),
        lambda x: mnist_ops.subtractive_norm2d(x, KERNEL),
        eager_subtractive,
    ),
    Case(
        "contrastive_norm2d",
        (64, 64, 14, 14),
        lambda x: mnist_ops.contrastive_norm2d(x, KERNEL),
        lambda x: eager_divisive(eager_subtractive(x)),
    ),
    Case("sigmoid", (1 << 22,), mnist_ops.sigmoid, torch.sigmoid),
    Case(
        "softmax",
        (4096, 1000),
        lambda x: mnist_ops.softmax(x, beta=-2.0),
        lambda x: torch.softmax(-2.0 * x, -1),
    ),
    Case(
        "softmax_nll",
        (60000, 10),
        lambda x: mnist_ops.softmax_nll(x, targets(x)),
        lambda x: F.cross_entropy(x, targets(x)),
    ),
]


def forward_and_backward(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    grad = torch.randn_like(function(x)).detach()

    def run() -> None:
        x.grad = None
        function(x).backward(grad)

    return run


def floor(case: Case, x: Tensor, backward: bool) -> Callable[[], None]:
    """Copies of as many bytes as the operator must read and write.

    Forward: input and output once. Backward: the gradient of the output, the input (or the output,
    as large or smaller) and the gradient of the input.
    """
    moved = x.numel() + case.ours(x.detach()).numel()
    if backward:
        moved += case.ours(x.detach()).numel() + 2 * x.numel()
    source = torch.empty(moved // 2, dtype=x.dtype, device=x.device).normal_()
    target = torch.empty_like(source)

    def run() -> None:
        target.copy_(source)

    return run


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("implementation", ["mnist_ops", "eager", "compile", "floor"])
def test_operator(benchmark, implementation, case, direction, dtype, device):
    torch._dynamo.reset()
    backward = direction != "forward"
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    benchmark.group = f"{case.name} {case.shape} {dtype} {direction} on {device}{threads}"
    x = torch.randn(case.shape, dtype=dtype, device=device, requires_grad=backward)
    if implementation == "floor":
        run = floor(case, x, backward)
    else:
        function = case.ours if implementation == "mnist_ops" else case.theirs
        if implementation == "compile":
            function = torch.compile(function, fullgraph=True, dynamic=False)
        run = forward_and_backward(function, x) if backward else (lambda: function(x))

    def timed() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    timed()
    benchmark.pedantic(timed, rounds=15, iterations=3, warmup_rounds=3)
