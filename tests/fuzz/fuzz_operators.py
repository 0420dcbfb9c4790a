"""Random calls of every public and raw operator, in child processes, held against float64.

    python tests/fuzz/fuzz_operators.py                         # 20,000 calls of seed 0
    python tests/fuzz/fuzz_operators.py --calls 200000 --seed 7
    python tests/fuzz/fuzz_operators.py --seed 7 --call 1234    # one of them again, and what it was
    python tests/fuzz/fuzz_operators.py --library emulated      # the CUDA kernels, emulated

A call is decided by the seed and its number. Half of them are valid: shapes from 0 to 6
dimensions, sizes of 0 included, every floating dtype, transposed, sliced, expanded, overlapping
and channels_last memory with NaN around it, special values; through the public functions, their
modules, first and second derivatives, forward mode and vmap, and through ``torch.ops.mnist_ops``
with every backward operator. Their results are compared with ``fuzz_references.py``, must be the
same bits when called again, must have the layout that the fake kernel says, and must leave the
inputs as they are. In the other half arguments are absurd: what is outside of the documentation
must raise a TypeError, ValueError, IndexError or RuntimeError, and nothing may crash. The online
engine trains random networks, and is given hostile text.

The calls are made by a child process whose memory is limited. When it dies, or says nothing for a
minute, the call is reported and another child goes on with the next one. The exit code is 1 if
anything was found.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

PLANTS = ("crash", "hang", "memory", "wrong", "input")


# ------------------------------------------------------------------------------------------- child


def make_case(seed: int, number: int, library: Any, only: str) -> Any:
    """The call with this number."""
    import fuzz_arguments
    import fuzz_cases
    import fuzz_online

    draw = fuzz_arguments.Draw(seed, number)
    kind = only or draw.random.choices(("raw", "public", "online"), (50, 42, 8))[0]
    hostile = draw.chance(0.45)
    if kind == "online":
        return fuzz_online.case(draw, library, hostile)
    if kind == "public" and not library.emulated:
        return fuzz_cases.public_case(draw, hostile)
    return fuzz_cases.raw_case(draw, library, hostile)


def planted(kind: str, case: Any) -> Any:
    """A case that does what the fuzzer must notice: its own test."""
    import ctypes

    import fuzz_arguments
    import fuzz_cases
    import torch

    def run() -> tuple[str, str | None]:
        if kind == "crash":
            ctypes.string_at(0)
        if kind == "hang":
            time.sleep(3600)
        draw = fuzz_arguments.Draw(0, 0)
        x = draw.tensor((3, 4), torch.float32)
        want = fuzz_cases.Expected(torch.sigmoid(x.double()), 1.0, torch.float32)

        def call() -> torch.Tensor:
            if kind == "memory":
                return torch.empty(2**50)
            if kind == "input":
                return x.sigmoid_()
            return torch.sigmoid(x) * (1.0001 if kind == "wrong" else 1)

        return fuzz_cases.judged(draw, call, lambda: [want], raw=False)

    return fuzz_cases.Case("planted", lambda: f"a planted {kind}", run)


def load_library(name: str) -> Any:
    """The operators that are called."""
    import fuzz_cases

    if name == "cpu":
        return fuzz_cases.Library()
    import ctypes
    import random

    import torch
    from test_cuda_emulator import MODES

    path = emulated_library()
    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))
    launches, images = library.configure_cuda_emulator, library.configure_emulated_images
    launches.argtypes, launches.restype = (ctypes.c_int64, ctypes.c_int64, ctypes.c_uint32), None
    images.argtypes, images.restype = (ctypes.c_int64,), None
    library.configure_emulated_device(3, 64, ctypes.c_int64(200 << 10))
    # Memory that nobody wrote is NaN.
    torch.use_deterministic_algorithms(True)

    def configure(draw: random.Random) -> None:
        mode = draw.choice(MODES)
        launches(mode.max_blocks, mode.largest_narrow_index, draw.getrandbits(31))
        images(mode.image_bytes)

    return fuzz_cases.Library("mnist_ops_emulated", configure)


def emulated_library() -> Path:
    """The emulated CUDA kernels, compiled anew where a source has changed."""
    root = Path(__file__).parents[2]
    folder = root / "build" / "emulated"
    path = folder / "mnist_ops_emulated.so"
    sources = [
        p for part in ("csrc", "tests/kernels/cuda_emulator") for p in (root / part).rglob("*.*")
    ]
    if not path.exists() or path.stat().st_mtime < max(p.stat().st_mtime for p in sources):
        from test_cuda_emulator import build

        folder.mkdir(parents=True, exist_ok=True)
        build(folder, os.environ.get("CXX", "g++"))
    return path


def say(**message: Any) -> None:
    """One line for the parent, at once: nothing may be lost in a crash."""
    os.write(1, (json.dumps(message) + "\n").encode())


def child(options: argparse.Namespace) -> int:
    """Make the calls [first, first + calls), and tell the parent of each before it is made."""
    tests = Path(__file__).parents[1]  # the cases, loops.py, the emulator's modes
    sys.path[:0] = [str(tests / "fuzz"), str(tests), str(tests / "kernels")]
    import torch

    import mnist_ops  # noqa: F401

    torch.set_num_threads(1)
    library = load_library(options.library)
    if options.memory:
        with open("/proc/self/statm") as statm:
            now = int(statm.read().split()[0]) * resource.getpagesize()
        limit = now + int(options.memory * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    counts: collections.Counter[str] = collections.Counter()
    plants = [kind for kind in options.plant.split(",") if kind]
    say(ready=True)
    for number in range(options.first, options.first + options.calls):
        try:
            case = make_case(options.seed, number, library, options.only)
            if 3 <= number < 3 + len(plants):
                case = planted(plants[number - 3], case)
        except Exception:
            say(
                number=number, wrong="the fuzzer failed to make a call", text=traceback.format_exc()
            )
            continue
        say(number=number)
        if options.call is not None:
            print(case.text(), file=sys.stderr, flush=True)
        if options.describe:
            say(number=number, text=case.text())
            continue
        try:
            outcome, wrong = case.run()
        except Exception:
            outcome, wrong = "failed", f"the fuzzer failed:\n{traceback.format_exc()}"
        counts[f"{case.name} {outcome}"] += 1
        if wrong:
            say(number=number, wrong=wrong, text=case.text())
        if (number - options.first) % 100 == 99:
            say(counts=counts)
            counts = collections.Counter()
    say(counts=counts, done=True)
    return 0


# ------------------------------------------------------------------------------------------ parent


class Children:
    """Runs children until all calls are made."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.counts: collections.Counter[str] = collections.Counter()
        self.findings: list[dict[str, Any]] = []
        self.made = 0

    def command(self, first: int, calls: int, *more: str) -> list[str]:
        o = self.options
        command = [sys.executable, str(Path(__file__).resolve()), "--child", "--first", str(first)]
        command += ["--calls", str(calls), "--seed", str(o.seed), "--library", o.library]
        command += ["--memory", str(o.memory), "--only", o.only, "--plant", o.plant]
        return [*command, *more]

    def describe(self, number: int) -> str:
        """What a call would have been that did not come back."""
        command = self.command(number, 1, "--describe")
        output = subprocess.run(command, capture_output=True, text=True).stdout
        for line in output.splitlines():
            message = json.loads(line)
            if "text" in message:
                return str(message["text"])
        return "?"

    def run(self) -> None:
        """Make all calls."""
        first, end = self.options.first, self.options.first + self.options.calls
        while first < end:
            reached = self.run_child(first, end - first)
            if reached is None:
                return
            first = reached + 1

    def run_child(self, first: int, calls: int) -> int | None:
        """Read one child's messages; None at the end, else the number of the call it died in."""
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                self.command(first, calls), stdout=subprocess.PIPE, stderr=errors
            )
            assert process.stdout is not None
            number, rest, finished, hung, ready = first - 1, b"", False, False, False
            while True:
                # The first message comes after imports and perhaps a compilation.
                patience = self.options.timeout if ready else 1800
                if not select.select([process.stdout], [], [], patience)[0]:
                    process.kill()
                    hung = True
                    break
                data = os.read(process.stdout.fileno(), 1 << 16)
                if not data:
                    break
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    message = json.loads(line)
                    ready = True
                    finished |= message.get("done", False)
                    self.counts.update(message.get("counts", {}))
                    if "number" in message:
                        self.made += message["number"] > number
                        number = message["number"]
                    if "wrong" in message:
                        self.found(message)
            code = process.wait()
            if finished and code == 0:
                return None
            errors.seek(0)
            tail = errors.read().decode(errors="replace")[-self.options.tail :]
        if not ready:
            raise SystemExit(f"the child process did not start (exit code {code}):\n{tail}")
        how = f"no answer for {self.options.timeout} s" if hung else f"exit code {code}"
        self.found(
            {"number": number, "wrong": f"CRASH: {how}\n{tail}", "text": self.describe(number)}
        )
        return number

    def found(self, message: dict[str, Any]) -> None:
        self.findings.append(message)
        if len(self.findings) <= self.options.show:
            again = f"--seed {self.options.seed} --call {message['number']}"
            if self.options.library != "cpu":
                again += f" --library {self.options.library}"
            if self.options.only:
                again += f" --only {self.options.only}"
            print(f"{message['text']}\n  {message['wrong']}\n  {again}\n", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--call", type=int, help="make this call only")
    parser.add_argument("--library", choices=("cpu", "emulated"), default="cpu")
    parser.add_argument("--only", choices=("", "raw", "public", "online"), default="")
    parser.add_argument("--memory", type=float, default=2.0, help="GiB a child may take; 0: any")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds a call may take")
    parser.add_argument("--tail", type=int, default=3000, help="of a crash's output, characters")
    parser.add_argument("--show", type=int, default=40, help="findings that are printed in full")
    parser.add_argument(
        "--plant",
        default="",
        help="test of the fuzzer: from call 3 on, some of " + ",".join(PLANTS),
    )
    for internal in ("--child", "--describe"):
        parser.add_argument(internal, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options)
    if options.call is not None:
        options.first, options.calls = options.call, 1
        print(Children(options).describe(options.call), flush=True)
    start = time.monotonic()
    children = Children(options)
    children.run()
    outcomes: collections.Counter[str] = collections.Counter()
    for name, count in sorted(children.counts.items()):
        outcomes[name.rsplit(" ", 1)[1]] += count
        if options.call is None:
            print(f"{count:7} {name}")
    found = len(children.findings)
    print(
        f"{children.made} calls of seed {options.seed} in {time.monotonic() - start:.0f} s: "
        f"{outcomes['valid']} compared, {outcomes['refused']} to be refused, "
        f"{outcomes['unclear']} of which nothing is promised; {found} findings"
    )
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
