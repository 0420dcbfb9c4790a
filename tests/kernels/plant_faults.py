"""Plant one fault at a time in csrc/ and see whether the tests notice it. Not part of the suite.

    python tests/kernels/plant_faults.py --count 80 --seed 1 --out faults.jsonl  # plant and test
    python tests/kernels/plant_faults.py --again faults.jsonl --out again.jsonl  # the survivors

A fault is one of: a comparison that takes or leaves the equal case, a loop's bound moved by one, a
sign, a constant, a branch that is never taken. They are drawn from all of csrc/*.h, cpu/, online/
and cuda/, as many from each file as its share of the places where one can stand. For each, the
sources are copied, the units that include the file are rebuilt (without optimisation beyond -O1),
and the tests of their family run until the first failure: the CPU library for csrc/*.h, cpu/ and
online/, the emulated CUDA library for cuda/. A fault that does not compile is replaced by another.

Every outcome is a line of ``--out`` as soon as it is known; a run that is killed goes on where it
was. It takes about a minute a fault. Survivors are to be looked at: either a
test is missing, or the fault changes no result.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from run_sanitized import ISA
from torch.utils import cpp_extension

import mnist_ops

ROOT = Path(__file__).parents[2]
OPERATORS = ("lp_pool", "local_mean", "local_norm", "stage", "softmax")
SECONDS = 900  # for the tests of one fault; what hangs is noticed, too


@dataclass(frozen=True)
class Fault:
    """A piece of a line replaced by another.

    Attributes:
        file: relative to csrc.
        line: its text, which together with ``column`` finds it again after other lines moved.
        number: of the line, counted from 1, when it was drawn.
        column: where in the line ``old`` begins.
        kind: comparison, bound, sign, constant or branch.
        old, new: what stands there and what is put there.
    """

    file: str
    line: str
    number: int
    column: int
    kind: str
    old: str
    new: str

    def __str__(self) -> str:
        changed = self.line[: self.column] + self.new + self.line[self.column + len(self.old) :]
        return f"{self.file}:{self.number} {self.kind}: {self.line.strip()}  ->  {changed.strip()}"


# What is looked for, and what is put in the place of group 1.
_BOUND = re.compile(r"for \([^;]*;[^;]*?\s<\s(\w+(?:\.\w+)*);")
_PATTERNS: list[tuple[str, re.Pattern[str], dict[str, str] | None]] = [
    ("comparison", re.compile(r"(?<=[\w)\]] )(<=|>=|==|!=|<|>)(?= [\w(\-])"), None),
    ("sign", re.compile(r"(?<=[\w)\]] )([+-])(?= [\w(])"), {"+": "-", "-": "+"}),
    ("sign", re.compile(r"(?:[=,?:] |[(]|return )(-)(?=[a-zA-Z(])"), {"-": "+"}),
    ("constant", re.compile(r"(?<![\w.])(\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?=f?[\s;,)\]])"), None),
]
_COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
_LEFT_ALONE = re.compile(
    r"^\s*(#|//|static_assert|template|using|namespace|case |struct|class|m\.(def|impl))"
)


def _without_comments_and_strings(text: str) -> str:
    """The text with blanks in the place of comments and strings: offsets stay."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match.group())

    return re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', blank, text, flags=re.DOTALL)


def faults_in(file: str) -> Iterator[Fault]:
    """Every fault that can be planted in a file."""
    text = (ROOT / "csrc" / file).read_text()
    lines, masked = text.split("\n"), _without_comments_and_strings(text).split("\n")
    for i, code in enumerate(masked):
        if _LEFT_ALONE.match(code):
            continue

        def fault(kind: str, column: int, old: str, new: str, i: int = i) -> Fault:
            return Fault(file, lines[i], i + 1, column, kind, old, new)

        for kind, pattern, replacement in _PATTERNS:
            for match in pattern.finditer(code):
                old = match[1]
                if kind == "comparison":
                    new = _COMPARISONS[old]
                elif kind == "constant":
                    new = str(int(old) + 1) if old.isdigit() else repr(float(old) * 1.5)
                else:
                    assert replacement is not None
                    new = replacement[old]
                yield fault(kind, match.start(1), old, new)
        for match in _BOUND.finditer(code):
            yield fault("bound", match.start(1), match[1], f"{match[1]} - 1")
        for match in re.finditer(r"\bif \(", code):
            yield fault("branch", match.start(), "if (", "if (false && ")
        for match in re.finditer(r"\bif constexpr \(", code):
            yield fault("branch", match.start(), "if constexpr (", "if constexpr (false && ")


def plant(fault: Fault, csrc: Path) -> bool:
    """Change the copy of a source; False where the line is no longer there."""
    path = csrc / fault.file
    lines = path.read_text().split("\n")
    places = [i for i, line in enumerate(lines) if line == fault.line]
    if not places:
        return False
    i = min(places, key=lambda place: abs(place + 1 - fault.number))
    end = fault.column + len(fault.old)
    lines[i] = lines[i][: fault.column] + fault.new + lines[i][end:]
    path.write_text("\n".join(lines))
    return True


class CpuLibrary:
    """The CPU kernels of a copy of the sources, built with the objects of what did not change."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.compiler = os.environ.get("CXX", "g++")
        major, minor = map(int, str(mnist_ops.build_info()["target_torch"]).split("."))
        self.options = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
        self.options += ["-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-DNDEBUG"]
        self.options += ISA[str(mnist_ops.build_info()["cpu_capability"])]
        target = f"0x{major:02x}{minor:02x}{0:012x}"
        self.options += ["-DTORCH_STABLE_ONLY", f"-DTORCH_TARGET_VERSION={target}"]
        self.options += [f"-isystem{path}" for path in cpp_extension.include_paths()]
        csrc = ROOT / "csrc"
        self.units = sorted(path for d in ("cpu", "online") for path in (csrc / d).glob("*.cpp"))
        self.includes = {unit: self._includes(unit) for unit in self.units}
        (work / "objects").mkdir()
        for unit in self.units:
            self._compile(unit, work / "objects" / f"{unit.stem}.o")

    def _run(self, *command: str | Path) -> str | None:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        return done.stdout if done.returncode == 0 else None

    def _includes(self, unit: Path) -> set[str]:
        listed = self._run(self.compiler, *self.options, "-MM", unit)
        assert listed is not None, f"{unit} does not compile"
        inside = str(ROOT / "csrc") + os.sep
        paths = (os.path.normpath(word) for word in listed.replace("\\\n", " ").split()[1:])
        return {path.removeprefix(inside) for path in paths if path.startswith(inside)}

    def _compile(self, unit: Path, target: Path) -> bool:
        return self._run(self.compiler, *self.options, "-c", unit, "-o", target) is not None

    def build(self, file: str | None, csrc: Path, package: Path) -> bool:
        """Build the library of the copy ``csrc``, in which ``file`` was changed, into a package."""
        objects = []
        for unit in self.units:
            kept = self.work / "objects" / f"{unit.stem}.o"
            if file in self.includes[unit]:
                kept = csrc / f"{unit.stem}.o"
                if not self._compile(csrc / unit.relative_to(ROOT / "csrc"), kept):
                    return False
            objects.append(kept)
        name = f"_cpu_{mnist_ops.build_info()['cpu_capability']}.so"
        (package / name).unlink(missing_ok=True)
        folders = [f"-L{path}" for path in cpp_extension.library_paths()]
        libraries = ["-ltorch_cpu", "-ltorch", "-lc10"]
        command = [self.compiler, "-shared", "-o", package / name, *objects, *folders, *libraries]
        return self._run(*command) is not None


def tests_of(file: str, includes: dict[Path, set[str]]) -> list[str]:
    """Arguments for pytest: the tests that a fault in this file should break, quick ones first."""
    if file.startswith("cuda/"):
        if "online" in file:
            return ["tests/kernels/test_online_cuda_emulated.py"]
        families = [name for name in (*OPERATORS, "sigmoid") if name in file]
        names = {"lp_pool": "pool", "local_norm": "norm", "stage": "stage"}
        if not families:
            return ["tests/kernels/test_cuda_emulator.py"]
        chosen = " or ".join(names.get(family, family) for family in families)
        return ["tests/kernels/test_cuda_emulator.py", "-k", chosen]
    units = {unit.stem for unit, included in includes.items() if file in included}
    files = [f"tests/ops/test_{name}.py" for name in OPERATORS if name in units]
    if "sigmoid" in units and "softmax" not in units:
        files.append("tests/ops/test_softmax.py")
    online = ["tests/training/test_online.py"] if "online_sgd" in units else []
    return [*files, *(["tests/ops/test_operators.py"] if files else []), *online]


def copy_checkout(to: Path) -> None:
    """The sources, the tests, and the package with links to its compiled libraries and its data."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.gz")
    for folder in ("csrc", "tests", "mnist_ops", "examples"):
        shutil.copytree(ROOT / folder, to / folder, ignore=ignore)
    for archive in (ROOT / "mnist_ops" / "mnist").glob("*.gz"):
        (to / "mnist_ops" / "mnist" / archive.name).symlink_to(archive)
    for library in mnist_ops._libraries._HERE.glob("*.so"):
        (to / "mnist_ops" / library.name).symlink_to(library)
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, to)


def outcome_of(fault: Fault | None, cpu: CpuLibrary, arguments: list[str]) -> str:
    """``noticed``, ``survived``, ``not built`` or ``gone``, and by what it was noticed."""
    with tempfile.TemporaryDirectory(prefix="planted-") as name:
        copy = Path(name)
        copy_checkout(copy)
        if fault is not None and not plant(fault, copy / "csrc"):
            return "gone"
        on_cuda = fault is not None and fault.file.startswith("cuda/")
        file = None if fault is None else fault.file
        if not on_cuda and not cpu.build(file, copy / "csrc", copy / "mnist_ops"):
            return "not built"
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "", "-p", "no:cacheprovider"]
        environment = {
            **os.environ,
            "PYTHONPATH": str(copy),
            "MNIST_OPS_CPU_CAPABILITY": str(mnist_ops.build_info()["cpu_capability"]),
        }
        try:
            done = subprocess.run(
                [*command, *arguments],
                cwd=copy,
                env=environment,
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return f"noticed: it takes more than {SECONDS} s"
        if done.returncode == 0:
            return "survived"
        if on_cuda and ".cu" in done.stdout and "error: " in done.stdout:
            return "not built"
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        return f"noticed: {failed[1] if failed else f'exit status {done.returncode}'}"


def draw(count: int, seed: int, only: str) -> Iterator[Fault]:
    """Faults from all files; a file's chance grows with the square root of its size."""
    files = [
        str(path.relative_to(ROOT / "csrc"))
        for pattern in ("*.h", "cpu/*", "online/*", "cuda/*")
        for path in sorted((ROOT / "csrc").glob(pattern))
    ]
    chosen = random.Random(seed)
    places = {file: list(faults_in(file)) for file in files if only in file}
    pool = [(file, fault) for file, found in places.items() for fault in found]
    while pool:
        weights = [len(places[file]) ** -0.5 for file, _ in pool]
        (i,) = chosen.choices(range(len(pool)), weights)
        yield pool.pop(i)[1]


def main() -> None:
    """Parse the arguments and go through the faults."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--count", type=int, default=80, help="faults that compile")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="part of the names of the files in csrc")
    parser.add_argument("--again", type=Path, help="try the survivors of this file once more")
    parser.add_argument("--out", type=Path, default=Path("faults.jsonl"))
    options = parser.parse_args()

    known: dict[Fault, str] = {}
    if options.out.exists():
        for line in options.out.read_text().splitlines():
            entry = json.loads(line)
            known[Fault(**entry["fault"])] = entry["outcome"]
    if options.again:
        entries = map(json.loads, options.again.read_text().splitlines())
        faults: Iterator[Fault] = iter(
            [Fault(**entry["fault"]) for entry in entries if entry["outcome"] == "survived"]
        )
    else:
        faults = draw(options.count, options.seed, options.only)

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="planted-objects-") as work:
        cpu = CpuLibrary(Path(work))
        counted = noticed = 0
        for fault in faults:
            if counted == options.count:
                break
            outcome = known.get(fault)
            if outcome is None:
                outcome = outcome_of(fault, cpu, tests_of(fault.file, cpu.includes))
                with options.out.open("a") as file:
                    file.write(json.dumps({"fault": asdict(fault), "outcome": outcome}) + "\n")
                print(f"{outcome}\n    {fault}", flush=True)
            counted += outcome not in ("not built", "gone")
            noticed += outcome.startswith("noticed")
        print(f"{counted} faults planted, {noticed} noticed")


if __name__ == "__main__":
    main()
