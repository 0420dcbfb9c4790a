"""The operators against what one would write without them.

    python benchmarks/bench_ops.py --json-out ops.json [--budget-s 500] [--match softmax] [--resume]
    pytest benchmarks/bench_ops.py -k "sigmoid and forward" --benchmark-group-by=group \
        --benchmark-columns=median,iqr,rounds

The first runs everything for one device in order of importance, until the budget is spent, prints a
table and lists what was left out. The second gives the same measurements to pytest-benchmark, one
group for each setting and direction; its JSON holds the rest in ``extra_info``.

Contenders
    mnist_ops   this library
    eager       PyTorch as a good user writes it, and of several good ways the fastest at this size:
                its own operator where there is one; for the normalizations the channel mean first,
                then a blur of that one plane, with the border's correction computed once; for
                stage2d also this library's own operators for its steps, one after the other
    compile     the same under torch.compile (fullgraph, static shapes), compiled before the timing;
                for the normalizations also with the blur as a sum of shifts, which it can fuse
    QuACK       with --peers, on CUDA, where it is installed: quack-kernels' softmax and its loss
    Liger       liger-kernel's, likewise; of its loss, which writes the gradient into its input,
                gradients start from a copy of the input
    copy        a copy that moves as many bytes as the operator has to: every input read once, every
                output written once, at the same size

PyTorch's defaults are left as they are, TF32 in CUDA's float32 convolutions among them.

Forward runs without autograd's records; backward is torch.autograd.grad of a graph built outside
the timing; forward+backward is both. Contenders take turns, round by round; quoted are medians over
the rounds, ratios as medians of each round's ratio. On CUDA blocks of calls are timed with device
events, over arguments that rotate through several times the L2 cache, which is overwritten before
each block; CUDA graphs are not used, for anyone. GB/s and percent count the bytes that must move,
the percent against a large copy in the same run. Below some 100,000 elements that bandwidth is no
bound on a CPU, whose caches are faster than its memory.

Before a setting is timed, results and gradients of all contenders are compared with float64 at both
ends of the batch; what lies beyond the tolerance of the dtype is marked, and where it is ours, the
exit status is 1.

The threads are torch's, or MNIST_OPS_BENCH_THREADS. Under pytest MNIST_OPS_BENCH_QUICK=1 takes
small sizes, MNIST_OPS_BENCH_COMPILE=0 leaves torch.compile out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import op_cases
import op_timing
import pytest
import torch
from op_cases import DIRECTIONS, Case, Function, Setting
from op_record import CONTENDERS, RECORD, brief, ours_failed, table, verdict
from op_timing import Call, Clock, Prepare
from torch import Tensor

import mnist_ops
from mnist_ops.lab import command_line, records
from mnist_ops.lab.runner import processor
from mnist_ops.training import write_text

#: ‖result - float64‖ / ‖float64‖ beyond which a result counts as wrong.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}


def default_device() -> str:
    """CUDA where the library can use it."""
    return "cuda" if mnist_ops.build_info()["cuda"] == "available" else "cpu"


def set_threads() -> None:
    """As many as MNIST_OPS_BENCH_THREADS says."""
    if "MNIST_OPS_BENCH_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["MNIST_OPS_BENCH_THREADS"]))


# ------------------------------------------------------------------------------------ contenders


@dataclass
class Arguments:
    """Rotating arguments of one setting: inputs, leaves that share their storage, gradients."""

    inputs: list[Tensor]
    leaves: list[Tensor]
    constants: list[tuple[Tensor, ...]]
    grads: list[Tensor]

    @classmethod
    def of(cls, setting: Setting, sets: int, device: str) -> Arguments:
        """As many sets of random arguments."""
        layout = torch.channels_last if setting.channels_last else torch.contiguous_format
        inputs, grads = [], []
        for _ in range(sets):
            x = torch.randn(setting.shape, dtype=setting.dtype, device=device)
            inputs.append(x.contiguous(memory_format=layout) if x.dim() == 4 else x)
            g = torch.randn(setting.case.output(setting.shape), dtype=setting.dtype, device=device)
            grads.append(g.contiguous(memory_format=layout) if g.dim() == 4 else g)
        return cls(
            inputs,
            [x.detach().requires_grad_() for x in inputs],
            [setting.case.constants(x) for x in inputs],
            grads,
        )

    def calls(self, function: Function, direction: str) -> Prepare:
        """Make a function that prepares n calls of a direction."""

        def forward(i: int) -> Call:
            return lambda: function(self.inputs[i], *self.constants[i])

        def backward(i: int) -> Call:
            y = function(self.leaves[i], *self.constants[i])
            return lambda: torch.autograd.grad(y, self.leaves[i], self.grads[i])

        def both(i: int) -> Call:
            return lambda: torch.autograd.grad(
                function(self.leaves[i], *self.constants[i]), self.leaves[i], self.grads[i]
            )

        one = dict(zip(DIRECTIONS, (forward, backward, both), strict=True))[direction]
        return lambda n: [one(i % len(self.inputs)) for i in range(n)]


def candidates(case: Case, compile: bool, peers: bool = False) -> dict[str, Function]:
    """Everything that is timed but the copy: ``"eager: way"``, ``"compile: way"``."""
    found = {"mnist_ops": case.ours} | {f"eager: {k}": f for k, f in case.eager.items()}
    if peers:
        found |= {k: f for k, f in op_cases.peers(case).items() if not isinstance(f, str)}
    if compile:
        torch.compiler.reset()
        for name, function in case.compiled.items():
            compiled = torch.compile(function, fullgraph=True, dynamic=False)
            found[f"compile: {name}"] = compiled
    return found


def deviation(setting: Setting, arguments: Arguments, function: Function) -> float:
    """The larger relative error of result and gradient against float64, at the batch's two ends."""
    case, leaf, constants = setting.case, arguments.leaves[0], arguments.constants[0]
    y = function(leaf, *constants)
    (grad,) = torch.autograd.grad(y, leaf, arguments.grads[0])
    reference = case.reference or next(iter(case.eager.values()))
    rows = setting.shape[0]
    few = min(rows, max(1, rows * 2**20 // setting.elements))
    errors = []
    for part in [slice(0, few), slice(rows - few, rows)] if few < rows else [slice(0, rows)]:
        x = leaf.detach()[part].double().requires_grad_()
        if y.dim():
            expected = reference(x, *case.constants(x))
            (expected_grad,) = torch.autograd.grad(expected, x, arguments.grads[0][part].double())
            errors.append(_relative(y.detach()[part], expected.detach()))
        else:  # the mean of a loss: here of some rows, and each row's gradient is a share of it
            loss = reference(x, constants[0][part])
            share = arguments.grads[0].double() * (len(x) / rows)
            (expected_grad,) = torch.autograd.grad(loss, x, share)
        errors.append(_relative(grad[part], expected_grad))
    if not y.dim():
        total = torch.zeros((), dtype=torch.float64, device=y.device)
        for x, target in zip(leaf.detach().split(few), constants[0].split(few), strict=True):
            total += reference(x.double(), target) * (len(x) / rows)
        errors.append(_relative(y.detach(), total))
    return max(errors, key=lambda error: float("inf") if error != error else error)


def _relative(found: Tensor, expected: Tensor) -> float:
    distance = (found.double() - expected).norm() / expected.norm().clamp_min(1e-300)
    return float(distance)


# ------------------------------------------------------------------------------------ one setting


@dataclass
class Options:
    """How to measure."""

    device: str = "cpu"
    rounds: int = 15
    row_s: float = 2.0
    compile: int | None = None  # for so many settings, None for all
    quick: bool = False
    launches: bool = False  # count them: it needs the profiler, and a device
    peers: bool = False  # time other libraries, too
    clock: Clock = field(init=False)
    before: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.clock = op_timing.clock_for(self.device)
        self.before = self.ceilings()

    @property
    def bandwidth(self) -> float:
        """Bytes a second of a large copy, before anything was measured."""
        return self.before["copy_gb_per_s"] * 1e9

    def ceilings(self) -> dict[str, float]:
        """What bounds large calls and small ones, measured now."""
        size = 2**24 if self.quick else {"cuda": 2**31, "cpu": 2**27}[self.device]
        bandwidth = op_timing.copy_bandwidth(self.clock, size)
        return {"copy_gb_per_s": bandwidth / 1e9, "launch_us": launch_us(self.clock)}


def sets_of(setting: Setting, clock: Clock) -> int:
    """How many sets of arguments a setting rotates."""
    return clock.sets(setting.case.bytes_moved(setting.shape, setting.dtype, "forward"))


def measure(setting: Setting, options: Options, compile: bool = True) -> Iterator[dict[str, Any]]:
    """The rows of one setting, a direction each; a row is what goes into the JSON."""
    case, clock = setting.case, options.clock
    torch.manual_seed(0)
    sets = sets_of(setting, clock)
    arguments = Arguments.of(setting, sets, options.device)
    functions = candidates(case, compile, options.peers)
    errors: dict[str, float | None] = {}
    broken: dict[str, str] = {}
    for name, function in functions.items():
        try:
            errors[name] = deviation(setting, arguments, function)
        except Exception as error:
            broken[name] = op_timing.reason(error)
            clock.synchronize()
    for direction in setting.directions:
        moved = case.bytes_moved(setting.shape, setting.dtype, direction)
        contenders = {
            name: arguments.calls(function, direction)
            for name, function in functions.items()
            if name not in broken
        }
        contenders["copy"] = op_timing.copies(sets, moved // 2, options.device)
        times, failures = op_timing.interleave(
            clock, contenders, sets=sets, rounds=options.rounds, most_s=options.row_s
        )
        found = row(setting, direction, moved, times, errors, broken | failures, options)
        if options.launches:
            count(contenders, found)
        yield found


def row(
    setting: Setting,
    direction: str,
    moved: int,
    times: dict[str, list[float]],
    errors: dict[str, float | None],
    failures: dict[str, str],
    options: Options,
) -> dict[str, Any]:
    """One line of the table: medians, the fastest of several ways, ratios, bytes."""
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    chosen: dict[str, str] = {}
    for contender in CONTENDERS:
        ways = [n for n in medians if n == contender or n.startswith(f"{contender}: ")]
        if ways:
            chosen[contender] = min(ways, key=medians.__getitem__)
    ours = medians.get("mnist_ops")
    tolerance = TOLERANCE[setting.dtype]
    result: dict[str, Any] = {
        "setting": str(setting),
        "family": setting.case.family,
        "case": setting.case.name,
        "shape": list(setting.shape),
        "elements": setting.elements,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "channels_last": setting.channels_last,
        "direction": direction,
        "sweep": setting.sweep,
        "device": options.device,
        "bytes": moved,
        "floor_us": moved / options.bandwidth * 1e6,
        "us": {name: medians[way] * 1e6 for name, way in chosen.items()},
        "chosen": chosen,
        "gb_per_s": moved / ours / 1e9 if ours else None,
        "percent_of_copy": moved / ours / options.bandwidth * 100 if ours else None,
        "over_ours": {
            name: op_timing.ratio(times, way, "mnist_ops")
            for name, way in chosen.items()
            if ours and name != "mnist_ops"
        },
        "all_us": {name: [s * 1e6 for s in seconds] for name, seconds in times.items()},
        # JSON has no NaN; what it belongs to counts as wrong.
        "errors": {n: e if e is not None and math.isfinite(e) else None for n, e in errors.items()},
        "wrong": [n for n, error in errors.items() if error is None or not error <= tolerance],
        "failures": failures,
    }
    return result


def count(contenders: dict[str, Prepare], found: dict[str, Any]) -> None:
    """Add to a row the kernels that each contender launches, and their time."""
    found["launches"], found["kernel_us"] = {}, {}
    for contender, way in found["chosen"].items():
        try:
            launches, microseconds = op_timing.count_kernels(contenders[way](3))
        except Exception as error:
            found["launches_failed"] = op_timing.reason(error)
            return
        found["launches"][contender] = launches
        found["kernel_us"][contender] = microseconds


def launch_us(clock: Clock) -> float:
    """Microseconds of a call so small that nothing but its launch takes time."""
    x = torch.ones(1, device=clock.device)
    return statistics.median(clock.seconds([x.sigmoid] * 200) for _ in range(15)) * 1e6


# --------------------------------------------------------------------------------------- the run


def header(options: Options) -> dict[str, Any]:
    """What the numbers depend on."""
    found: dict[str, Any] = {
        "device": options.device,
        "name": torch.cuda.get_device_name() if options.device == "cuda" else processor(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        **options.before,
        "cpu_capability": mnist_ops.build_info()["cpu_capability"],
    }
    if isinstance(options.clock, op_timing.CUDAClock):
        found["l2_bytes"] = options.clock.cache
    return found


def write(path: Path | None, record: dict[str, Any]) -> None:
    """Write the JSON, whole or not at all."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def run(
    wanted: Sequence[Setting],
    options: Options,
    *,
    budget_s: float | None = None,
    path: Path | None = None,
    done: dict[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure settings in order, until the budget is spent.

    Args:
        wanted: the settings.
        options: how.
        budget_s: seconds after which no further setting is begun; the last one may overrun it.
        path: where the record is written after each setting.
        done: an earlier record, whose rows are kept and whose settings are not measured again.
        say: takes the lines of progress.

    Returns:
        The record: ``"machine"``, ``"rows"``, ``"left_out"`` (settings), ``"failed"`` (settings of
        which there are no rows, with the reason), ``"seconds"``.
    """
    start = time.perf_counter()
    limit = float("inf") if budget_s is None else budget_s
    rows = list(done["rows"]) if done else []
    known = {found["setting"] for found in rows}
    left = [str(s) for s in wanted if str(s) not in known]
    record: dict[str, Any] = {"machine": header(options), "rows": rows, "left_out": left}
    record["failed"] = {}
    for i, setting in enumerate(wanted):
        if str(setting) in known:
            continue
        if time.perf_counter() - start >= limit:
            break
        began = time.perf_counter()
        compile = options.compile is None or i < options.compile
        left.remove(str(setting))
        try:
            measured = list(measure(setting, options, compile))
        except Exception as error:  # no memory for the arguments, say
            record["failed"][str(setting)] = op_timing.reason(error)
            say(f"{setting}: FAILED {op_timing.reason(error)}")
            write(path, record)
            if options.clock.lost():
                say("the device answers no more")
                return record
            continue
        rows += measured
        write(path, record)
        seconds = time.perf_counter() - began
        say(f"{setting}: {'; '.join(map(brief, measured))} ({seconds:.1f} s)")
    record["machine"] |= {f"{k}_at_the_end": v for k, v in options.ceilings().items()}
    record["seconds"] = time.perf_counter() - start
    write(path, record)
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default_device())
    parser.add_argument("--json-out", type=Path, metavar="FILE")
    parser.add_argument("--budget-s", type=float, metavar="N", help="begin nothing after N seconds")
    parser.add_argument("--match", default="", metavar="TEXT", help="settings whose name holds it")
    count = command_line.whole_number(1, 10**6)
    parser.add_argument("--limit", type=count, metavar="N", help="the first N settings only")
    parser.add_argument("--rounds", type=count, default=15)
    parser.add_argument("--row-s", type=float, default=2.0, help="fewer rounds beyond that")
    parser.add_argument("--threads", type=count, help="of torch on the CPU")
    parser.add_argument("--no-launches", action="store_true", help="count no kernels on CUDA")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--compile-first",
        type=command_line.whole_number(0, 10**6),
        metavar="N",
        help="torch.compile for the first N settings only",
    )
    parser.add_argument(
        "--peers", action="store_true", help="QuACK and Liger, and the settings they are known for"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything work?")
    parser.add_argument("--resume", action="store_true", help="keep the rows of --json-out")
    parser.add_argument("--list", action="store_true", help="print the settings in order and stop")
    args = parser.parse_args(arguments)
    set_threads()
    if args.threads:
        torch.set_num_threads(args.threads)
    listed = op_cases.peer_settings if args.peers else op_cases.settings
    wanted = [s for s in listed(args.device, args.quick) if args.match in str(s)][: args.limit]
    if not wanted:
        parser.error(f"--match {args.match}: --list shows the settings, none is like that")
    if args.list:
        print("\n".join(map(str, wanted)))
        return 0
    if args.device == "cuda" and default_device() != "cuda":
        parser.error(f"--device cuda: {mnist_ops.build_info()['cuda']}")
    missing = {
        f"{name}: {found}"
        for setting in wanted
        for name, found in (op_cases.peers(setting.case) if args.peers else {}).items()
        if isinstance(found, str)
    }
    if args.peers and args.device != "cuda":
        missing = {"QuACK and Liger: they run on CUDA only"}
    for reason in sorted(missing):
        print(f"left out, {reason}")
    done = None
    if args.resume and args.json_out and args.json_out.exists():
        done = records.read_json(args.json_out, RECORD)
    launches = args.device == "cuda" and not args.no_launches
    compiled = 0 if args.no_compile else args.compile_first
    peers = args.peers and args.device == "cuda"
    options = Options(args.device, args.rounds, args.row_s, compiled, args.quick, launches, peers)
    record = run(wanted, options, budget_s=args.budget_s, path=args.json_out, done=done)
    print(f"\n{table(record)}\n{verdict(record)}")
    return int(ours_failed(record))


# ------------------------------------------------------------------------------ pytest-benchmark


class RecordedClock:
    """A timer for pytest-benchmark that stands still but for the seconds it is told."""

    now = 0.0

    def __call__(self) -> float:
        """Return the seconds told so far."""
        return self.now

    def replay(self, seconds: Sequence[float]) -> Callable[[], None]:
        """Make a function of which each call takes the next of the seconds."""
        rest = iter(seconds)

        def call() -> None:
            self.now += next(rest)

        return call


CLOCK = RecordedClock()
QUICK = os.environ.get("MNIST_OPS_BENCH_QUICK") == "1"
COMPILE = os.environ.get("MNIST_OPS_BENCH_COMPILE") != "0"
CONTESTING = [c for c in CONTENDERS if c not in op_cases.PEERS and (COMPILE or c != "compile")]
GROUPS = [
    (device, setting, direction)
    for device in dict.fromkeys(["cpu", default_device()])
    for setting in op_cases.settings(device, QUICK)
    for direction in setting.directions
]
MEASURED: dict[str, Any] = {}


def measured(device: str, setting: Setting, direction: str) -> dict[str, Any]:
    """The row of a group, measured when the first of its contenders asks."""
    if "options" not in MEASURED or MEASURED["options"].device != device:
        set_threads()
        MEASURED["options"] = Options(device, quick=QUICK, launches=device == "cuda")
    key = f"{device} {setting} {direction}"
    if MEASURED.get("key") != key:
        one = replace(setting, directions=(direction,))
        MEASURED["row"], MEASURED["key"] = next(measure(one, MEASURED["options"], COMPILE)), key
    return MEASURED["row"]


# The first of these varies fastest: the contenders of a group follow each other.
@pytest.mark.parametrize("contender", CONTESTING)
@pytest.mark.parametrize(
    ("device", "setting", "direction"), GROUPS, ids=[f"{s} {d} {v}" for v, s, d in GROUPS]
)
@pytest.mark.benchmark(timer=CLOCK)
def test_operator(benchmark, contender, device, setting, direction):
    found = measured(device, setting, direction)
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    benchmark.group = f"{setting} {direction} on {device}{threads}"
    way = found["chosen"].get(contender)
    if way is None:
        reasons = [f"{n}: {r}" for n, r in found["failures"].items() if n.startswith(contender)]
        pytest.fail("; ".join(reasons))
    benchmark.extra_info.update({k: v for k, v in found.items() if k != "all_us"})
    seconds = [us / 1e6 for us in found["all_us"][way]]
    benchmark.pedantic(CLOCK.replay(seconds), rounds=len(seconds), iterations=1)


if __name__ == "__main__":
    sys.exit(command_line.run(main, [records.RunError]))
