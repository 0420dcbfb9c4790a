"""Online SGD of the original network, microseconds a sample: engine, eager, compiled, floor.

    python benchmarks/bench_online_sgd.py [--rounds 15] [--threads 1] [--json FILE]
    python benchmarks/bench_online_sgd.py --device cuda [--models 1,2,4,8,16,32,64] [--json FILE]

Every round times each contender once, on the same samples, one after the other in one process, so
that whatever else the machine does meets all of them. Printed are medians over the rounds, of the
time on the wall and of the processor's time - the same on a quiet machine; on a busy one the second
leaves out the waiting - and ratios as medians of each round's ratio. All contenders give a loss and
a prediction for each sample.

Contenders
    engine        ``OnlineSGD``, float32 and float64; once more with 2 threads where there are two
    eager         the step as a good user of PyTorch would write it, float32: ``F.lp_pool2d``, the
                  normalization as channel mean and a blur of that one plane with ``F.conv2d``,
                  ``torch.optim.SGD(fused=True)``
    tuned eager   the same with LP pooling as square, average, root, which F.lp_pool2d could be
    compiled      forward and backward of the latter under ``torch.compile``, the same optimizer
    floor         the step's multiplications at the rate of ``torch.mm``, measured in the same round
                  with the network's own matrix products, and with one large square product: what a
                  step would take if im2col, tanh, pooling, normalization, the fully connected
                  weights' way through memory and the loop itself cost nothing

On CUDA, without TF32, timed with the device idle before and after
    persistent    ``OnlineSGD``, float32 and float64
    tuned eager   as above, on the device
    captured      the same step, forward, backward and update, as one ``torch.cuda.CUDAGraph`` that
                  is replayed for each sample: PyTorch's own operators without the interpreter
    compiled      ``torch.compile(mode="reduce-overhead")`` of its forward and backward
    floor         the step's multiplications at the rate of ``torch.mm`` for a large product

    and the samples a second of all models together against how many of them share the device
    (``OnlineSGD`` of a list), which on the CPU is what ``--models`` alone gives, too.

What the profile said (time stamps around every layer; AMD Zen 4, one thread; microseconds in
float32 / float64, of about 720 / 1530 in all)
    The second convolution takes 570 / 1170: forward 185 / 375, weight gradient with update and the
    copy of the weights for the input gradient 200 / 415, input gradient 185 / 380. These are 110 /
    55 GFLOP/s, within a few percent of what the multipliers can do. A first version stood at
    960 / 2080; what made the difference, in the order of gain:
    - in the weight gradient, tiles over all taps of a row of the kernel instead of one tap's
      channels (8 rows of float64 made two tiles of 4, too short to hide the multipliers' latency),
      and longer runs in the forward: 446 to 375 and 540 to 415 in float64;
    - the fully connected layer's backward in the reverse order of forward, so that it meets the
      rows still in cache, and with explicit vectors: 103 / 120 to 16 / 32;
    - whether squares overflowed as one mask for a whole plane (the compiler had made it one
      comparison a number): pooling 53 / 82 to 16 / 54;
    - starting the sum from the bias, not from a filled map: the first convolution 36 / 83 to
      27 / 55.
    A convolution of our own, in place of im2col, GEMM and col2im, was the decision before: no
    copies, and a rate above the GEMM library's at these shapes, which is how the engine gets below
    the floor. What is left beside the second convolution: the first one 52 / 105, tanh 30 / 87, the
    fully connected layer 28 / 80 (bound by memory), pooling 18 / 58, normalization 14 / 20.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_ops import build_info, gaussian1d, torch7
from mnist_ops.lab import command_line
from mnist_ops.lab.runner import processor
from mnist_ops.mnist import models
from mnist_ops.training import write_text
from mnist_ops.training.online import OnlineSGD

#: The exit status of a benchmark that has no meaning here.
SKIPPED = 77

# Multiplications and additions of one step: each convolution's forward and gradients (none for the
# images), and the fully connected layers'.
CONV1 = 2 * 64 * 25 * 784
CONV2 = 2 * 64 * 1600 * 100
LINEAR = 2 * (1600 * 128 + 128 * 10)
FLOP = 2 * CONV1 + 3 * CONV2 + 3 * LINEAR

# The products M x N x K behind them, each with its share of the floor.
PRODUCTS = {
    "conv1": (64, 784, 25, False, False),
    "conv1 weight": (64, 25, 784, False, True),
    "conv2": (64, 100, 1600, False, False),
    "conv2 weight": (64, 1600, 100, False, True),
    "conv2 input": (1600, 100, 64, True, False),
}


class Eager(nn.Module):
    """The original network from PyTorch's own operators, with nothing done twice."""

    def __init__(self, tuned: bool) -> None:
        super().__init__()
        self.tuned = tuned
        self.conv1, self.conv2 = nn.Conv2d(1, 64, 5), nn.Conv2d(64, 64, 5)
        self.linear1, self.linear2 = nn.Linear(1600, 128), nn.Linear(128, 10)
        taps = gaussian1d(7)
        kernel = torch.outer(taps, taps)
        self.register_buffer("kernel", (kernel / kernel.sum()).float()[None, None])
        for size in (14, 5):
            ones = torch.ones(1, 1, size, size)
            self.register_buffer(f"coefficient{size}", F.conv2d(ones, self.kernel, padding=3))

    def normalize(self, x: Tensor, coefficient: Tensor) -> Tensor:
        """Subtract the blurred channel mean: one plane is blurred, not 64."""
        return x - F.conv2d(x.mean(1, keepdim=True), self.kernel, padding=3) / coefficient

    def pool(self, x: Tensor) -> Tensor:
        """L2 pooling of 2 x 2 windows."""
        if self.tuned:
            return (F.avg_pool2d(x.square(), 2) * 4).sqrt()
        return F.lp_pool2d(x, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 32, 32) to (N, 10)."""
        x = self.normalize(self.pool(torch.tanh(self.conv1(x))), self.coefficient14)
        x = self.normalize(self.pool(torch.tanh(self.conv2(x))), self.coefficient5)
        return F.log_softmax(self.linear2(torch.tanh(self.linear1(x.flatten(1)))), 1)


Runner = Callable[[Tensor, Tensor], None]


def eager_runner(
    tuned: bool, compiled: bool, device: str = "cpu", compile_mode: str | None = None
) -> Runner:
    """Train an Eager network on the samples given to the function that is returned."""
    model = Eager(tuned).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, fused=True)

    def forward(image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        output = model(image)
        return F.nll_loss(output, label), output.detach().argmax(1)

    step = torch.compile(forward, mode=compile_mode) if compiled else forward

    def run(images: Tensor, labels: Tensor) -> None:
        results = []
        for image, label in zip(images.split(1), labels.split(1), strict=True):
            if compile_mode is not None:
                torch.compiler.cudagraph_mark_step_begin()
            optimizer.zero_grad()
            loss, prediction = step(image, label)
            loss.backward()
            optimizer.step()
            # The next replay of a graph writes to the same memory.
            results.append((loss.detach().clone(), prediction.clone()))

    return run


def captured_runner(device: str) -> Runner:
    """The same step as one CUDA graph of PyTorch's operators; inputs are copied into its memory."""
    model = Eager(tuned=True).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, fused=True)
    image, label = torch.zeros(1, 1, 32, 32, device=device), torch.zeros(1, device=device).long()

    def step() -> tuple[Tensor, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        output = model(image)
        loss = F.nll_loss(output, label)
        loss.backward()
        optimizer.step()
        return loss.detach(), output.detach().argmax(1)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, prediction = step()

    # A graph keeps none of the tensors alive whose memory it uses.
    def run(images: Tensor, labels: Tensor, kept: tuple[Any, ...] = (model, optimizer)) -> None:
        results = []
        for one, its_label in zip(images.split(1), labels.split(1), strict=True):
            image.copy_(one)
            label.copy_(its_label)
            graph.replay()
            results.append((loss.clone(), prediction.clone()))

    return run


def engine_runner(dtype: torch.dtype, threads: int, device: str = "cpu", count: int = 0) -> Runner:
    """Train the library's network with the engine; with a count, so many of them at once."""
    networks = [
        models.convnet(dtype=dtype, device=device, generator=torch7.start(seed=seed))
        for seed in range(1, max(count, 1) + 1)
    ]
    engine = OnlineSGD(networks if count else networks[0], threads=threads)

    def run(images: Tensor, labels: Tensor) -> None:
        engine.run(images, labels, torch.arange(len(images), device=images.device))

    return run


def product_seconds(
    dtype: torch.dtype, m: int, n: int, k: int, ta: bool, tb: bool
) -> tuple[float, float]:
    """Wall and processor seconds of one (m, k) x (k, n) product on warm operands."""
    a = torch.randn((k, m) if ta else (m, k), dtype=dtype)
    b = torch.randn((n, k) if tb else (k, n), dtype=dtype)
    a, b = a.t() if ta else a, b.t() if tb else b
    out = torch.empty(m, n, dtype=dtype)
    torch.mm(a, b, out=out)
    repeats = max(1, int(4e8 / (2 * m * n * k)))
    wall, processor_time = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        torch.mm(a, b, out=out)
    wall, processor_time = time.perf_counter() - wall, time.process_time() - processor_time
    return wall / repeats, processor_time / repeats


def floors(dtype: torch.dtype) -> list[tuple[float, float]]:
    """The floor in microseconds, by the network's own products and by a square one."""
    own = [product_seconds(dtype, *product) for product in PRODUCTS.values()]
    flop = sum(2 * m * n * k for m, n, k, _, _ in PRODUCTS.values())
    square = product_seconds(dtype, 1024, 1024, 1024, False, False)
    result = []
    for seconds, work in ((map(sum, zip(*own, strict=True)), flop), (square, 2 * 1024**3)):
        wall, cpu = (FLOP / (work / s) * 1e6 for s in seconds)
        result.append((wall, cpu))
    return result


def seconds(run: Callable[[], Any], device: str) -> float:
    """On the wall, with the device idle before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def square_rate(dtype: torch.dtype, device: str, size: int) -> float:
    """Floating-point operations a second of one large matrix product."""
    a = torch.randn(size, size, dtype=dtype, device=device)
    b = torch.randn_like(a)
    best = min(seconds(lambda: torch.mm(a, b), device) for _ in range(5))
    return 2 * size**3 / best


def median_times(runners: dict[str, Runner], args: argparse.Namespace) -> dict[str, list[float]]:
    """Microseconds a step of each contender in each round; one that fails is left out, and told."""
    torch.manual_seed(0)
    images = torch.randn(args.samples, 1, 32, 32, device=args.device)
    labels = torch.randint(0, 10, (args.samples,), device=args.device)
    for name, run in list(runners.items()):
        try:
            for _ in range(3):  # compilers, caches, allocators
                run(images[:20], labels[:20])
            seconds(lambda run=run: run(images, labels), args.device)  # type: ignore[misc]
        except Exception as error:
            print(f"{name} does not run: {str(error).splitlines()[0][:200]}", file=sys.stderr)
            del runners[name]
    rows: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(args.rounds):
        for name, run in runners.items():
            took = seconds(lambda run=run: run(images, labels), args.device)  # type: ignore[misc]
            rows[name].append(took / args.samples * 1e6)
    return rows


def several_models(args: argparse.Namespace) -> dict[str, Any]:
    """Samples a second of all models together, against how many of them there are."""
    runners = {}
    for dtype in (torch.float32, torch.float64):
        for count in args.models:
            name = f"{count} models {str(dtype).removeprefix('torch.')}"
            runners[name] = engine_runner(dtype, args.threads, args.device, count=count)
    rows = median_times(runners, args)
    print(f"\n{'models at once':30s} {'us a step':>10s} {'samples/s':>12s} {'gain':>6s}")
    rates: dict[str, float] = {}
    for name, times in rows.items():
        count, _, dtype_name = name.split()
        step = statistics.median(times)
        rates[name] = int(count) / step * 1e6
        alone = rates.get(f"1 models {dtype_name}")
        gain = f"{rates[name] / alone:6.2f}" if alone else ""
        print(f"{name:30s} {step:10.1f} {rates[name]:12.0f} {gain}")
    return {"microseconds": rows, "samples a second": rates}


def on_cuda(args: argparse.Namespace) -> dict[str, Any]:
    """The table of one model on CUDA."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    runners = {
        f"persistent {name}": engine_runner(dtype, 1, "cuda")
        for name, dtype in (("float32", torch.float32), ("float64", torch.float64))
    }
    runners["tuned eager float32"] = eager_runner(True, False, "cuda")
    try:
        runners["captured float32"] = captured_runner("cuda")
    except Exception as error:
        print(f"no capture: {str(error).splitlines()[0][:200]}", file=sys.stderr)
    if not args.no_compile:
        runners["compiled float32"] = eager_runner(True, True, "cuda", "reduce-overhead")
    rows = median_times(runners, args)
    floors_us = {}
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        floors_us[f"floor {name}"] = FLOP / square_rate(dtype, "cuda", 4096) * 1e6
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.rounds} rounds of "
        f"{args.samples} samples, {FLOP / 1e6:.1f} MFLOP a sample"
    )
    print(f"{'microseconds a step':30s} {'median':>8s} {'best':>8s} {'s an epoch':>11s}")
    for name, times in rows.items():
        step = statistics.median(times)
        print(f"{name:30s} {step:8.1f} {min(times):8.1f} {step * 0.06:11.2f}")
    for name, step in floors_us.items():
        print(f"{name:30s} {step:8.2f}")
    return {"microseconds": rows, "floors": floors_us, "device": torch.cuda.get_device_name()}


def device_main(args: argparse.Namespace) -> None:
    """Everything on CUDA, or several models on the CPU."""
    record: dict[str, Any] = {"torch": torch.__version__, "machine": processor()}
    if args.device == "cuda":
        record |= on_cuda(args)
        args.models = args.models or [1, 2, 4, 8, 16, 32, 64]
    if args.models:
        record["several models"] = several_models(args)
    if args.json:
        write_text(args.json, json.dumps(record, indent=1) + "\n")


def main() -> int:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    count = command_line.whole_number(1, 10**6)
    parser.add_argument("--rounds", type=count, default=15)
    parser.add_argument("--samples", type=count, help="timed at a time: 50, on CUDA 1000")
    parser.add_argument(
        "--models",
        type=lambda text: [count(number) for number in text.split(",")],
        help="numbers of models that train at once, as 1,2,4",
    )
    parser.add_argument("--threads", type=count, default=1, help="of PyTorch and of the engine")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    args = parser.parse_args()
    if args.device == "cuda" and build_info()["cuda"] != "available":
        print(f"skipped: {build_info()['cuda']}")
        return SKIPPED
    args.samples = args.samples or (1000 if args.device == "cuda" else 50)
    if args.device == "cuda" or args.models:
        torch.set_num_threads(args.threads)
        device_main(args)
        return 0
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images, labels = torch.randn(args.samples, 1, 32, 32), torch.randint(0, 10, (args.samples,))

    runners = {
        "engine float32": engine_runner(torch.float32, args.threads),
        "engine float64": engine_runner(torch.float64, args.threads),
        "eager float32": eager_runner(tuned=False, compiled=False),
        "tuned eager float32": eager_runner(tuned=True, compiled=False),
    }
    if not args.no_compile:
        runners["compiled float32"] = eager_runner(tuned=True, compiled=True)
    for run in runners.values():  # compilers, caches, allocators
        run(images[:20], labels[:20])

    def timed(run: Callable[[Tensor, Tensor], None]) -> tuple[float, float]:
        wall, processor_time = time.perf_counter(), time.process_time()
        run(images, labels)
        wall, processor_time = time.perf_counter() - wall, time.process_time() - processor_time
        return wall / args.samples * 1e6, processor_time / args.samples * 1e6

    two = None
    if args.threads == 1 and (os.cpu_count() or 1) > 1:
        two = {
            f"engine {name}, 2 threads": engine_runner(dtype, 2)
            for name, dtype in (("float32", torch.float32), ("float64", torch.float64))
        }
    rows: dict[str, list[tuple[float, float]]] = {}
    for _ in range(args.rounds):
        found = {name: timed(run) for name, run in runners.items()}
        for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
            found[f"floor {name}"], found[f"floor {name}, square"] = floors(dtype)
        if two:
            torch.set_num_threads(2)
            found |= {name: timed(run) for name, run in two.items()}
            torch.set_num_threads(1)
            time.sleep(0.02)  # a pool's threads spin for a while, on the next contender's time
        for name, value in found.items():
            rows.setdefault(name, []).append(value)

    print(
        f"{processor()}, torch {torch.__version__}, "
        f"{args.threads} thread(s), {args.rounds} rounds of {args.samples} samples, "
        f"{FLOP / 1e6:.1f} MFLOP a sample"
    )
    print(f"{'median microseconds':30s} {'wall':>8s} {'best':>8s} {'cpu':>8s}  GFLOP/s (cpu)")
    for name, row in rows.items():
        wall, cpu = (statistics.median(times) for times in zip(*row, strict=True))
        best = min(times[0] for times in row)
        print(f"{name:30s} {wall:8.0f} {best:8.0f} {cpu:8.0f} {FLOP / cpu / 1e3:8.1f}")

    def ratio(a: str, b: str, clock: int) -> float:
        pairs = zip(rows[a], rows[b], strict=True)
        return statistics.median(x[clock] / y[clock] for x, y in pairs)

    ratios = {
        "eager / engine, float32": ("eager float32", "engine float32"),
        "tuned eager / engine, float32": ("tuned eager float32", "engine float32"),
        "compiled / engine, float32": ("compiled float32", "engine float32"),
        "engine / floor, float32": ("engine float32", "floor float32"),
        "engine / floor, float64": ("engine float64", "floor float64"),
        "engine / square floor, float32": ("engine float32", "floor float32, square"),
        "engine / square floor, float64": ("engine float64", "floor float64, square"),
        "1 / 2 threads, float32": ("engine float32", "engine float32, 2 threads"),
        "1 / 2 threads, float64": ("engine float64", "engine float64, 2 threads"),
    }
    found_ratios = {
        name: (ratio(a, b, 0), ratio(a, b, 1))
        for name, (a, b) in ratios.items()
        if a in rows and b in rows
    }
    print(f"\n{'median ratio':30s} {'wall':>8s} {'cpu':>8s}")
    for name, (wall, cpu) in found_ratios.items():
        print(f"{name:30s} {wall:8.2f} {cpu if 'threads' not in name else float('nan'):8.2f}")
    if args.json:
        record = {
            "threads": args.threads,
            "wall and cpu microseconds": rows,
            "ratios": found_ratios,
        }
        record |= {"torch": torch.__version__, "machine": processor()}
        write_text(args.json, json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run(main))
