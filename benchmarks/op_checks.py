"""What only a device can show of the operators: agreement, graphs, repetition, streams.

    python benchmarks/op_checks.py CHECK [--device cuda] [--quick]

    agreement     result and gradient on the device against those on the CPU; float64 to 1e-12 of
                  the largest magnitude, the others to a few of their own rounding errors
    graphs        forward and backward captured in a CUDA graph; its replays on new input, bit for
                  bit what eager calls give
    determinism   20 runs of forward and backward, bit for bit the same
    streams       on a stream of its own, behind work that takes a while, the same bits; on a second
                  device too, and the current device is the same before and after
    once          forward and backward once: nothing is compared; for compute-sanitizer, which
                  watches

One line for each operator, dtype and memory format. The exit status is 0 where everything holds, 1
where something does not, 77 where the check has no meaning here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mnist_ops
from mnist_ops import _torch_private
from mnist_ops.lab import command_line

SKIPPED = 77
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: How far a result on the device may be from the CPU's, in terms of the largest magnitude. Sums
#: have up to 70,001 terms, in another order; half types round the result, and with it the gradient.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3.2e-2,
}
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Check:
    """One operator on one kind of input."""

    name: str
    function: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name} {'x'.join(map(str, self.shape))} {dtype} {self.layout}"

    def input(self, device: torch.device) -> Tensor:
        """Random input, made on the CPU: the same on every device."""
        x = torch.randn(self.shape, dtype=torch.float64).to(device, self.dtype)
        return x.contiguous(memory_format=FORMATS[self.layout]) if x.dim() == 4 else x

    def run(self, x: Tensor, grad_output: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Result and gradient; without a gradient of the result, of half the sum of its squares."""
        leaf = x.detach().requires_grad_()
        y = self.function(leaf)
        grad_output = y.detach() if grad_output is None else grad_output
        (grad,) = torch.autograd.grad(y, leaf, grad_output)
        return y.detach(), grad


def operators(device: torch.device) -> dict[str, tuple[Callable[[Tensor], Tensor], bool]]:
    """Every operator, by name, with whether it takes images alone.

    Constants are on the device already: a copy from the CPU has no place in a graph.
    """
    kernel = mnist_ops.gaussian1d(7).to(device)
    wide = mnist_ops.gaussian2d((3, 9)).to(device)
    targets: dict[tuple[int, ...], Tensor] = {}

    def nll(x: Tensor) -> Tensor:
        shape = (x.shape[0], *x.shape[2:])
        if shape not in targets:
            count = torch.Size(shape).numel()
            targets[shape] = (torch.arange(count, device=device) % x.shape[1]).reshape(shape)
        return mnist_ops.softmax_nll(x, targets[shape], beta=-1.5)

    found: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {}
    for p in (1.0, 2.0, 3.0, float("inf")):
        square: dict[str, Any] = {"norm_type": p, "kernel_size": 2}
        overlapping: dict[str, Any] = {"norm_type": p, "kernel_size": 3, "stride": 2, "padding": 1}
        found[f"lp_pool2d p={p:g} 2x2/2"] = (partial(mnist_ops.lp_pool2d, **square), True)
        overlapping["ceil_mode"] = True
        found[f"lp_pool2d p={p:g} 3x3/2"] = (partial(mnist_ops.lp_pool2d, **overlapping), True)
    power = torch.tensor(2.5, device=device)
    for average in (False, True):
        options = {"norm_type": power, "kernel_size": 3, "stride": 2, "average": average}
        name = f"lp_pool2d_tensor_p {'mean' if average else 'norm'} 3x3/2"
        found[name] = (partial(mnist_ops.lp_pool2d, **options), True)
    for kind in ("subtractive", "divisive", "contrastive"):
        function = getattr(mnist_ops, f"{kind}_norm2d")
        found[f"{kind}_norm2d 7"] = (partial(function, kernel=kernel), True)
        found[f"{kind}_norm2d 3x9"] = (partial(function, kernel=wide), True)
    for mode, taps in (("renormalized", kernel), ("replicate", wide)):
        mean = partial(mnist_ops.local_mean2d, kernel=taps, channels="each", padding_mode=mode)
        found[f"local_mean2d {mode}"] = (mean, True)
    stage = partial(mnist_ops.stage2d, kernel=kernel)
    found["stage2d tanh 2x2/2"] = (stage, True)
    found["stage2d relu p=1 3x3/2"] = (
        partial(stage, activation="relu", norm_type=1.0, kernel_size=3, stride=2),
        True,
    )
    found["sigmoid"] = (mnist_ops.sigmoid, False)
    for name in ("softmax", "log_softmax"):
        function = getattr(mnist_ops, name)
        found[f"{name} dim=1"] = (partial(function, dim=1, beta=-2.0), False)
        found[f"{name} dim=-1"] = (function, False)
    found["softmax_nll"] = (nll, False)
    return found


# Images, matrices, dtypes: tails everywhere; rows within a warp, a block, and many turns of one.
SIZES: dict[str, tuple[list[tuple[int, ...]], list[tuple[int, ...]], int]] = {
    "full": ([(9, 64, 45, 46), (2, 3, 33, 31)], [(300, 10), (65, 5003), (3, 70001)], 4),
    "once": ([(2, 5, 9, 11), (1, 70, 17, 19)], [(70, 10), (7, 33), (3, 5003)], 3),
    "quick": ([(2, 5, 9, 11)], [(7, 33)], 2),
}


def checks(device: torch.device, size: str) -> Iterator[Check]:
    """Operators, dtypes, sizes, memory formats."""
    images, matrices, dtypes = SIZES[size]
    for name, (function, images_only) in operators(device).items():
        for dtype in DTYPES[:dtypes]:
            for shape in images:
                for layout in FORMATS:
                    yield Check(name, function, shape, dtype, layout)
            for shape in [] if images_only else matrices:
                yield Check(name, function, shape, dtype, "NCHW")


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> str:
    """Nothing, or what differs; bit for bit, with NaN equal to NaN."""
    for name, x, y in zip(("result", "gradient"), a, b, strict=True):
        if x.device == y.device and torch.equal(x, y):
            continue
        x, y = x.cpu(), y.cpu()
        if not torch.equal(x.nan_to_num(7e7), y.nan_to_num(7e7)) or x.isnan().ne(y.isnan()).any():
            far = (x.double() - y.double()).abs().max().item()
            return f"{name} DIFFERS in {int((x != y).sum())} of {x.numel()} by up to {far:.3g}"
    return ""


def apart(check: Check, found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str:
    """Nothing, or how far two results are from each other where that is too far."""
    for name, x, y in zip(("result", "gradient"), found, expected, strict=True):
        x, y = x.cpu().double(), y.cpu().double()
        finite = y.isfinite()
        if not torch.equal(x.isfinite(), finite):
            return f"{name} DIFFERS in what is finite"
        far, largest = (x - y)[finite].abs().max().item(), y[finite].abs().max().item()
        info = torch.finfo(check.dtype)
        least = info.tiny * info.eps  # the distance of denormal numbers: gradients of a mean are so
        if far > TOLERANCE[check.dtype] * largest + least:
            return f"{name} DIFFERS by {far:.3g}, the largest magnitude being {largest:.3g}"
    return ""


def agreement(check: Check, device: torch.device, quick: bool) -> str:
    """Run on the device and on the CPU, on the same input and gradient."""
    x = check.input(device)
    cpu = torch.device("cpu")
    reference = replace(check, function=operators(cpu)[check.name][0])
    # Not each its own result: where gradients cancel, as those of the squares of a normalized
    # image do, its last bit would be all that is left.
    grad = torch.randn(check.function(x).shape, dtype=torch.float64).to(check.dtype)
    return apart(check, check.run(x, grad.to(device)), reference.run(x.cpu(), grad))


def determinism(check: Check, device: torch.device, quick: bool) -> str:
    """Run 20 times on the same input."""
    x = check.input(device)
    first = check.run(x)
    for _ in range(4 if quick else 19):
        different = same(first, check.run(x))
        if different:
            return different
    return ""


def graphs(check: Check, device: torch.device, quick: bool) -> str:
    """Capture forward and backward, replay on new input, compare with eager calls."""
    static = check.input(device).requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        y = check.function(static)
        return y, torch.autograd.grad(y, static, torch.ones_like(y))[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as PyTorch asks for before a capture
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2 if quick else 5):
        new = check.input(device)
        with torch.no_grad():
            static.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        leaf = new.detach().requires_grad_()
        y = check.function(leaf)
        eager = (y.detach(), torch.autograd.grad(y, leaf, torch.ones_like(y))[0])
        different = same((captured[0].detach(), captured[1]), eager)
        if different:
            return different
    return ""


def streams(check: Check, device: torch.device, quick: bool) -> str:
    """Run on another stream while the input is still being made, and on another device."""
    x = check.input(device)
    expected = check.run(x)
    current = torch.cuda.current_device()
    stream = torch.cuda.Stream()
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # A millisecond or so: work launched elsewhere sees zeros.
        _torch_private.sleep_on_gpu(2_000_000)
        late.copy_(x)
        found = check.run(late)
    torch.cuda.synchronize()
    if torch.cuda.current_device() != current:
        return "current device DIFFERS afterwards"
    different = same(expected, found)
    if different or torch.cuda.device_count() < 2:
        return different
    other = torch.device("cuda", (current + 1) % torch.cuda.device_count())
    there = dict(operators(other))[check.name][0]
    moved = Check(check.name, there, check.shape, check.dtype, check.layout)
    found = moved.run(x.to(other))
    torch.cuda.synchronize(other)
    if torch.cuda.current_device() != current:
        return "current device DIFFERS after a call on another"
    return same(expected, found)


def once(check: Check, device: torch.device, quick: bool) -> str:
    """Run, and wait for it."""
    check.run(check.input(device))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return ""


CHECKS = {
    "once": once,
    "agreement": agreement,
    "graphs": graphs,
    "determinism": determinism,
    "streams": streams,
}
#: What a check says of an operator that passes it.
PASSED = {"once": "ran", "agreement": "within the tolerance"}


def main() -> int:
    """Check everything, say so line by line; the exit status."""
    cuda = mnist_ops.build_info()["cuda"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("check", choices=list(CHECKS))
    parser.add_argument("--device", default="cuda" if cuda == "available" else "cpu")
    parser.add_argument("--quick", action="store_true", help="few and small")
    args = parser.parse_args()
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu, cuda or cuda:N, got {args.device}")
    if device.type == "cpu" and args.check in ("agreement", "graphs", "streams"):
        print(f"skipped: {args.check} is a matter of CUDA: {cuda}")
        return SKIPPED
    if device.type == "cuda" and cuda != "available":
        print(f"skipped: {cuda}")
        return SKIPPED
    if args.check == "streams" and torch.cuda.device_count() < 2:
        print("one device: results on another one are not looked at")
    torch.manual_seed(0)
    size = "quick" if args.quick else "once" if args.check == "once" else "full"
    failed = count = 0
    for check in checks(device, size):
        count += 1
        try:
            different = CHECKS[args.check](check, device, args.quick)
        except Exception as error:
            different = f"FAILED {type(error).__name__}: {str(error).strip()[:300]}"
        failed += bool(different)
        print(
            f"{check}: {different or PASSED.get(args.check, 'the same bits')}",
            flush=True,
        )
        if different.startswith("FAILED") and device.type == "cuda":
            torch.cuda.synchronize()  # raises where the device is lost: no use to go on
    print(f"{args.check}: {count - failed} of {count} hold")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
