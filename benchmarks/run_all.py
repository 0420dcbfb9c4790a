"""Everything one wants to know of a machine, above all one with a GPU, in one command.

    python benchmarks/run_all.py --out DIR [--steps tests,ops] [--budget-s 560] [--side-by-side]
        [--quick] [--dry-run]

Steps, each a process of its own with a time limit of its own
    environment   environment.json: device, driver, versions, compiler, commit
    tests         tests.txt, junit.xml: the whole test suite
    ops           ops.json, ops.md, ops-<operator>.png: benchmarks/bench_ops.py
    peers         peers.json, peers.txt: softmax and its loss beside QuACK and Liger
    agreement     agreement.txt: every operator's results against the CPU's, float64 to 1e-12
    graphs        graphs.txt: capture in CUDA graphs, replay, compare bit for bit
    determinism   determinism.txt: 20 runs, bit for bit the same
    streams       streams.txt: other streams, other devices
    large         large.txt: more than 2^31 elements
    sanitizer     sanitizer-<tool>.txt: every operator once under each tool of compute-sanitizer,
                  sanitizer-memcheck-tests.txt: some of their tests
    online        online_sgd.json: benchmarks/bench_online_sgd.py, and online_sgd_cuda.json where
                  there is a GPU
    reproduce     reproduce/: a short run of the reports' experiments on the device

The order is that in which results are worth having where time on a GPU is short; every step writes
what it has as it goes. What cannot run here is skipped, and says why; what fails or takes too long
stops no other step.
summary.md has a line for each step with its outcome and seconds, rewritten after every step;
summary.json is the same for programs. A second call with other --steps adds to both.

--budget-s shares that many seconds among the steps in proportion to their usual limits; what one
does not use goes to the later ones. --side-by-side runs what does not measure time at once, on a
machine with many cores and a large GPU, and what does afterwards, one after the other; pytest takes
-n with --pytest-args where pytest-xdist is installed. --archive FILE.tar.gz packs DIR after every
step, so that a machine that is taken away has left something. --quick is a try of everything, in
minutes on a CPU. --dry-run prints the steps with their seconds and commands and runs nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mnist_ops.lab import command_line, records

ROOT = Path(__file__).resolve().parents[1]
#: The exit status of a process that finds that it has nothing to do here.
SKIPPED = 77
#: The exit status by which compute-sanitizer says that it found something.
FOUND = 86
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
#: Tests of many shapes and options, few enough for a sanitizer, which is slow.
SANITIZED = [
    "tests/ops/test_lp_pool.py",
    "tests/ops/test_local_norm.py",
    "tests/ops/test_softmax.py",
    "tests/training/test_online.py",
    "-k",
    "cuda and (equals_torch7 or sizes_of_the_dimension or nll_of_images or large_windows "
    "or shares_the_gradient or (equals_the_loops and bfloat16) "
    "or (layer_on_cuda and (norm or padded or dropout)))",
]


@dataclass(frozen=True)
class Command:
    """One process: what it runs, the file that gets its output, what is in its environment."""

    arguments: list[str]
    output: str
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """Processes that run one after the other within a limit of seconds.

    ``commands`` is called with the folder and what the machine is; a string is the reason why the
    step is skipped.
    """

    name: str
    limit_s: float
    commands: Callable[[Path, dict[str, Any], float], list[Command] | str]
    measures: bool = False  # time: nothing else may run meanwhile
    outputs: tuple[str, ...] = ()  # where it is skipped they say so


@dataclass
class Outcome:
    """What became of a step."""

    step: str
    status: str  # passed, failed, timed out, skipped
    seconds: float
    note: str = ""


# ---------------------------------------------------------------------------------- environment


def _line(*command: str) -> str | None:
    """The line that matters of what a program prints; None where it is not there or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = result.stdout.strip().splitlines()
    return (
        lines[-1 if command[0].endswith("nvcc") else 0] if lines and not result.returncode else None
    )


def environment() -> dict[str, Any]:
    """What results depend on, but the date."""
    import torch

    import mnist_ops

    info = mnist_ops.build_info()
    found: dict[str, Any] = {
        "mnist_ops": info,
        "commit": _line("git", "rev-parse", "HEAD"),
        "uncommitted changes": bool(_line("git", "status", "--porcelain")),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": str(torch.__version__),
        "torch threads": torch.get_num_threads(),
        "torch CUDA": torch.version.cuda,
        "nvcc": _line("nvcc", "--version"),
        "cxx": _line("c++", "--version"),
        "driver": _line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": info["cuda"],
        "devices": [],
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if torch.cuda.is_available():
        found["cuDNN"] = torch.backends.cudnn.version()
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            found["devices"].append(
                {
                    "name": device.name,
                    "capability": f"{device.major}.{device.minor}",
                    "memory_bytes": device.total_memory,
                    "multiprocessors": device.multi_processor_count,
                    "l2_bytes": device.L2_cache_size,
                }
            )
    return found


# ---------------------------------------------------------------------------------------- steps


def python(script: str, *arguments: str | Path) -> list[str]:
    """A command that runs a script of this repository."""
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def pytest(*arguments: str | Path) -> list[str]:
    """A command that runs tests."""
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, arguments)]


def why_no_cuda(machine: dict[str, Any]) -> str | None:
    """The reason why nothing runs on a GPU; None where it does."""
    cuda = machine.get("cuda")
    return None if cuda == "available" else f"no CUDA: {cuda}"


def steps(quick: bool, pytest_arguments: Sequence[str] = ()) -> list[Step]:
    """The steps, in their order."""
    small = ["--quick"] if quick else []

    def environment_step(out: Path, machine: dict[str, Any], limit: float) -> list[Command]:
        write = python("benchmarks/run_all.py", "--out", out, "--write-environment")
        return [Command(write, "environment.txt")]

    def tests(out: Path, machine: dict[str, Any], limit: float) -> list[Command]:
        chosen = ["tests/ops/test_softmax.py", "tests/ops/test_lp_pool.py"] if quick else []
        if quick:
            chosen += ["-k", "torch7 or extreme or zero"]
        # Every test by name: what is cut off has told which ones failed.
        command = pytest("-v", f"--junit-xml={out / 'junit.xml'}", *chosen, *pytest_arguments)
        return [Command(command, "tests.txt")]

    def sanitizer(out: Path, machine: dict[str, Any], limit: float) -> list[Command] | str:
        toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
        places = os.pathsep.join([os.environ.get("PATH", ""), str(toolkit)])
        tool = shutil.which("compute-sanitizer", path=places)
        missing = why_no_cuda(machine) or (None if tool else "no compute-sanitizer here")
        if missing or not tool:
            return str(missing)
        # Without torch's cache every tensor is an allocation of its own, whose end is guarded.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        everything = python("benchmarks/op_checks.py", "once")
        watched = [(name, f"sanitizer-{name}.txt", everything) for name in SANITIZERS]
        watched.append(("memcheck", "sanitizer-memcheck-tests.txt", pytest("-q", *SANITIZED)))
        options = ["--error-exitcode", str(FOUND), "--print-limit", "20"]
        return [
            Command([tool, "--tool", name, *options, *command], output, alone)
            for name, output, command in watched
        ]

    def check(name: str) -> Callable[[Path, dict[str, Any], float], list[Command]]:
        return lambda out, machine, limit: [
            Command(python("benchmarks/op_checks.py", name, *small), f"{name}.txt")
        ]

    def large(out: Path, machine: dict[str, Any], limit: float) -> list[Command] | str:
        missing = why_no_cuda(machine)
        if missing:
            return missing
        command = pytest("-q", "tests/ops/test_operators.py", "-k", "two_to_the_31 and cuda")
        return [Command(command, "large.txt", {"MNIST_OPS_TEST_LARGE": "1"})]

    def ops(out: Path, machine: dict[str, Any], limit: float) -> list[Command]:
        budget = max(0.85 * limit - 15, 1)  # the last setting may overrun it; then the figures
        how: list[str | Path] = ["--json-out", out / "ops.json"]
        how += ["--resume", f"--budget-s={budget:.0f}"]
        if quick:
            how += ["--quick", "--rounds=3", "--row-s=0.1", "--compile-first=1", "--limit=16"]
        return [
            Command(python("benchmarks/bench_ops.py", *how), "ops.txt"),
            Command(python("benchmarks/op_plots.py", out / "ops.json", out), "ops-plots.txt"),
        ]

    def peers(out: Path, machine: dict[str, Any], limit: float) -> list[Command] | str:
        missing = why_no_cuda(machine)
        if missing:
            return missing
        how = ["--peers", "--json-out", out / "peers.json", "--resume", *small]
        budget = max(0.85 * limit - 15, 1)
        return [
            Command(
                python("benchmarks/bench_ops.py", *how, f"--budget-s={budget:.0f}"), "peers.txt"
            )
        ]

    def online(out: Path, machine: dict[str, Any], limit: float) -> list[Command]:
        small = ["--rounds=1", "--samples=10", "--no-compile"] if quick else []
        script = "benchmarks/bench_online_sgd.py"
        how: list[str | Path] = ["--json", out / "online_sgd.json", *small]
        if why_no_cuda(machine):
            return [Command(python(script, *how), "online_sgd.txt")]
        how = ["--device=cuda", "--json", out / "online_sgd_cuda.json", *small]
        few = ["--rounds=5", "--json", out / "online_sgd.json", *small]
        return [
            Command(python(script, *how), "online_sgd_cuda.txt"),
            Command(python(script, *few), "online_sgd.txt"),
        ]

    def reproduce(out: Path, machine: dict[str, Any], limit: float) -> list[Command]:
        device = "cpu" if why_no_cuda(machine) else "cuda"
        digits, epochs = (60, 1) if quick else (2000, 2)
        how = ["--experiment", "original", "--dtype=float32", f"--device={device}"]
        how += [f"--limit={digits}", f"--epochs={epochs}", "--no-progress"]
        command = python("examples/reproduce.py", *how, "--out", out / "reproduce", "--resume")
        return [Command(command, "reproduce.txt")]

    found = [
        Step("environment", 60, environment_step),
        Step("tests", 420, tests),
        Step("ops", 540, ops, measures=True),
        Step("peers", 120, peers, measures=True, outputs=("peers.txt",)),
        Step("determinism", 60, check("determinism")),
        Step("graphs", 60, check("graphs")),
        Step("agreement", 60, check("agreement")),
        Step("streams", 60, check("streams")),
        Step(
            "sanitizer",
            480,
            sanitizer,
            outputs=tuple(f"sanitizer-{name}.txt" for name in SANITIZERS),
        ),
        Step("large", 90, large, outputs=("large.txt",)),
        Step("online", 120, online, measures=True),
        Step("reproduce", 120, reproduce, measures=True),
    ]
    return [replace(s, limit_s=min(s.limit_s, 150)) for s in found] if quick else found


# ---------------------------------------------------------------------------------- the machinery


#: The processes that are under way, several of them side by side.
RUNNING: set[subprocess.Popen[bytes]] = set()


def run_command(command: Command, out: Path, limit_s: float) -> int | None:
    """Run a process, with its children, for no longer than the limit; its exit status or None."""
    with open(out / command.output, "wb") as file:
        process = subprocess.Popen(
            command.arguments,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | command.environment,
            start_new_session=True,
        )
        RUNNING.add(process)
        try:
            return process.wait(timeout=max(limit_s, 0.1))
        except subprocess.TimeoutExpired:
            return None
        finally:  # a child that outlives it too, and on Ctrl-C
            stop(process)
            RUNNING.discard(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and all of its children."""
    for number, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            continue
        if number == signal.SIGTERM:
            time.sleep(0.2)  # children, before they are killed
    process.poll()


def run_step(step: Step, out: Path, machine: dict[str, Any], limit_s: float) -> Outcome:
    """Run the processes of a step; all of them, though one fails."""
    start = time.monotonic()

    def outcome(status: str, note: str) -> Outcome:
        return Outcome(step.name, status, time.monotonic() - start, note)

    commands = step.commands(out, machine, limit_s)
    if isinstance(commands, str):
        for name in step.outputs:
            (out / name).write_text(f"skipped: {commands}\n")
        return outcome("skipped", commands)
    notes, statuses = [], set()
    for i, command in enumerate(commands):
        # What is left is shared evenly, so that each of several processes has its turn; the last
        # of a step may draw from what others have written in time.
        left = limit_s - (time.monotonic() - start)
        share = left / (len(commands) - i) if step.name == "sanitizer" else left
        try:
            code = run_command(command, out, max(share, 15.0 if i else 0.1))
        except OSError as error:
            statuses.add("failed")
            notes.append(f"{command.arguments[0]}: {error}")
            continue
        status = {None: "timed out", 0: "passed", SKIPPED: "skipped"}.get(code, "failed")
        statuses.add(status)
        last = last_line(out / command.output)
        what = "" if len(commands) == 1 else f"{command.output}: "
        how = {"failed": f"exit status {code}: ", "timed out": f"after {share:.0f} s: "}
        notes.append(what + how.get(status, "") + last)
    for status in ("failed", "timed out", "passed", "skipped"):
        if status in statuses:
            return outcome(status, "; ".join(notes))
    return outcome("skipped", "nothing to do")


def last_line(path: Path) -> str:
    """The end of what a process printed."""
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip()[:200] if lines else "no output"


def read_outcomes(out: Path) -> list[Outcome]:
    """The outcomes of earlier calls."""
    path = out / "summary.json"
    if not path.exists():
        return []
    entry = {**dict.fromkeys(["step", "status", "note"], records.TEXT), "seconds": records.NUMBER}
    found = records.read_json(path, [entry])
    return [Outcome(**{name: one[name] for name in entry}) for one in found]


def write_summary(out: Path, outcomes: list[Outcome]) -> None:
    """Both summaries, in the order of the steps."""
    entries = [vars(outcome) for outcome in outcomes]
    (out / "summary.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    lines = ["| step | outcome | seconds | note |", "|---|---|--:|---|"]
    for o in outcomes:
        note = o.note.replace("|", "\\|")
        lines.append(f"| {o.step} | {o.status} | {o.seconds:.0f} | {note} |")
    (out / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def pack(out: Path, archive: Path) -> None:
    """Everything in the folder, in one file that is always whole."""
    part = archive.with_name(archive.name + ".part")
    with tarfile.open(part, "w:gz") as tar:
        tar.add(out, arcname=out.name)
    part.replace(archive)


def run_steps(
    chosen: Sequence[Step],
    out: Path,
    budget_s: float | None = None,
    archive: Path | None = None,
    side_by_side: bool = False,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Run steps in order; the outcomes, those of earlier calls in the same folder with them.

    Side by side: those after the first that measure no time run at once.
    """
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    order = {step.name: i for i, step in enumerate(chosen)}
    outcomes = {o.step: o for o in read_outcomes(out)}
    lock = threading.Lock()
    turns: list[list[Step]] = [[step] for step in chosen]
    if side_by_side:
        at_once = [step for step in chosen[1:] if not step.measures]
        turns = [[*chosen[:1]], at_once, *([step] for step in chosen[1:] if step.measures)]
        turns = [turn for turn in turns if turn]

    def limit_of(turn: Sequence[Step]) -> float:
        return max(step.limit_s for step in turn)

    def one(step: Step, limit: float) -> None:
        if limit < 1:
            outcome = Outcome(step.name, "skipped", 0.0, "the budget is spent")
        else:
            say(f"{step.name} (at most {limit:.0f} s)")
            began = time.monotonic()
            try:
                outcome = run_step(step, out, read_machine(out), limit)
            except Exception as error:  # a defect of the step's own; the others go on
                note = f"{type(error).__name__}: {error}"
                outcome = Outcome(step.name, "failed", time.monotonic() - began, note)
        with lock:
            outcomes[step.name] = outcome
            what = f"{step.name}: " if side_by_side else ""
            say(f"  {what}{outcome.status} in {outcome.seconds:.0f} s: {outcome.note}")
            write_summary(out, list(outcomes.values()))
            if archive:
                pack(out, archive)

    for i, turn in enumerate(turns):
        limits = [step.limit_s for step in turn]
        if budget_s is not None:
            left = budget_s - (time.monotonic() - start)
            share = left * limit_of(turn) / sum(map(limit_of, turns[i:]))
            limits = [share] * len(turn)
        if len(turn) == 1:
            one(turn[0], limits[0])
            continue
        with ThreadPoolExecutor(len(turn)) as pool:
            try:
                for _ in pool.map(one, turn, limits):
                    pass
            except BaseException:  # Ctrl-C reaches this thread alone
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(RUNNING):
                    stop(process)
                raise
    return sorted(outcomes.values(), key=lambda o: order.get(o.step, -1))


def plan(chosen: Sequence[Step], out: Path, budget_s: float | None) -> str:
    """What run_steps would do one step after the other, on a machine with a GPU, as text."""
    every = sum(step.limit_s for step in chosen)
    lines = []
    for step in chosen:
        limit = step.limit_s if budget_s is None else budget_s * step.limit_s / every
        commands = step.commands(out, {"cuda": "available"}, limit)
        lines.append(f"{step.name} (at most {limit:.0f} s)")
        if isinstance(commands, str):
            lines.append(f"  skipped: {commands}")
            continue
        lines += [f"  {shlex.join(command.arguments)} > {command.output}" for command in commands]
    return "\n".join(lines)


def read_machine(out: Path) -> dict[str, Any]:
    """What the environment step found; nothing is known before."""
    try:
        found: dict[str, Any] = records.read_json(out / "environment.json", {"cuda": records.TEXT})
    except records.RunError:
        found = {"cuda": "not known: the environment step has not run"}
    return found


def main() -> int:
    """Run the steps; 1 where one failed or timed out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", metavar="A,B", help="these only, in the usual order")
    parser.add_argument("--budget-s", type=float, metavar="N", help="seconds for all of it")
    parser.add_argument("--archive", type=Path, metavar="FILE", help="a .tar.gz of DIR")
    parser.add_argument("--pytest-args", default="", help="more arguments for the step tests")
    parser.add_argument(
        "--side-by-side", action="store_true", help="what measures no time runs at once"
    )
    parser.add_argument("--quick", action="store_true", help="try everything, in minutes")
    parser.add_argument("--dry-run", action="store_true", help="print the steps, run nothing")
    parser.add_argument("--write-environment", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    every = steps(args.quick, args.pytest_args.split())
    names = [step.name for step in every]
    wanted = args.steps.split(",") if args.steps else names
    for name in wanted:
        if name not in names:
            parser.error(f"--steps must be among {','.join(names)}, got {name}")
    out = args.out.resolve()
    if out.exists() and not out.is_dir():
        parser.error(f"--out {args.out} is a file, not a folder")
    # The others ask the environment whether there is a GPU; it takes seconds.
    chosen = [step for step in every if step.name in {*wanted, "environment"}]
    if args.dry_run:
        print(plan(chosen, out, args.budget_s))
        return 0
    out.mkdir(parents=True, exist_ok=True)
    if args.write_environment:
        found = environment()
        text = json.dumps(found, indent=1) + "\n"
        (out / "environment.json").write_text(text, encoding="utf-8")
        devices = ", ".join(device["name"] for device in found["devices"])
        print(devices or f"no GPU ({found['cuda']})")
        return 0
    outcomes = run_steps(chosen, out, args.budget_s, args.archive, args.side_by_side)
    print(f"\n{(out / 'summary.md').read_text(encoding='utf-8')}", end="")
    bad = [o.step for o in outcomes if o.step in wanted and o.status in ("failed", "timed out")]
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(command_line.run(main, [records.RunError]))
