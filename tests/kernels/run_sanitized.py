"""Run the operators' tests on the CPU under the address and undefined-behaviour sanitizers.

    python tests/kernels/run_sanitized.py              # build, then the tests below and the fuzzer
    python tests/kernels/run_sanitized.py -- -k lp_pool   # build, then pytest with these arguments
    python tests/kernels/run_sanitized.py --isa baseline  # the kernels without AVX2

It needs g++ with libasan and libubsan, and the compiled libraries in ``mnist_ops/`` (``python
setup.py build_ext --inplace``). ``csrc/cpu`` and ``csrc/online`` are compiled once more, with
``-fsanitize=address,undefined``, into ``build/sanitized/mnist_ops``, beside links to everything
else of the package; the tests run in that folder, in a process with libasan loaded before Python.
The first build takes some minutes, later ones compile what changed. The first finding ends the
process and is printed with its stack; leaks are not looked for, as Python never frees everything.

What it shows: reads and writes outside of a tensor's storage or of a vector, use after free,
overflow of signed integers, shifts, misaligned access, bad enums and bools, numbers that do not fit
the integer they are cast to. A read beyond a view that is still within its storage is not seen.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "sanitized"
TARGET_TORCH = "2.10"
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mtune=haswell"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512"]
ISA = {"baseline": [], "avx2": AVX2, "avx512": AVX512}

SANITIZE = [
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
]
#: What the tests are told to run where nothing else is named.
TESTS = [
    "tests/ops/test_lp_pool.py",
    "tests/ops/test_local_mean.py",
    "tests/ops/test_local_norm.py",
    "tests/ops/test_stage.py",
    "tests/ops/test_softmax.py",
    "tests/training/test_online.py",
    "tests/ops/test_operators.py",
]
# torch.compile, torch.export and opcheck are Python that calls the same kernels, very slowly here;
# child processes are not what is looked at; training on 60,000 images takes hours.
LEFT_OUT = "not compile and not export and not opcheck and not other_kernels"
LEFT_OUT += " and not original and not mnist and not subprocess"


def build(isa: str, jobs: int) -> None:
    """Compile the CPU kernels with the sanitizers, and link the rest of the package to them."""
    package = FOLDER / "mnist_ops"
    package.mkdir(parents=True, exist_ok=True)
    name = f"_cpu_{isa}.so"
    wanted = {path.name: path for path in (ROOT / "mnist_ops").iterdir()}
    for path in wanted.values():
        if path.name.startswith("_cpu_") or path.name in ("_cuda.so", "__pycache__"):
            continue
        link = package / path.name
        if not link.is_symlink():
            link.symlink_to(path)
    for path in package.iterdir():
        gone = path.is_symlink() and not path.exists()
        if gone or (path.name.startswith("_cpu_") and path.name != name):
            path.unlink()

    major, minor = map(int, TARGET_TORCH.split("."))
    options = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
    options += ["-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", *SANITIZE, *ISA[isa]]
    options += ["-DTORCH_STABLE_ONLY", f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}{0:012x}"]
    options += [f"-I{ROOT / 'csrc'}"]
    options += [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    compiler = os.environ.get("CXX", "g++")
    headers = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*.h"))
    objects = FOLDER / isa
    objects.mkdir(exist_ok=True)

    def compile_one(source: Path) -> Path:
        target = objects / f"{source.stem}.o"
        newest = max(headers, source.stat().st_mtime, Path(__file__).stat().st_mtime)
        if not target.exists() or target.stat().st_mtime < newest:
            print(f"compiling {source.relative_to(ROOT)}", flush=True)
            command = [compiler, *options, "-c", str(source), "-o", str(target)]
            subprocess.run(command, check=True)
        return target

    sources = [*(ROOT / "csrc" / "cpu").glob("*.cpp"), *(ROOT / "csrc" / "online").glob("*.cpp")]
    sources.sort(key=lambda source: -source.stat().st_size)  # what takes longest goes first
    with ThreadPoolExecutor(jobs) as pool:
        compiled = list(map(str, pool.map(compile_one, sources)))
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries += ["-ltorch_cpu", "-ltorch", "-lc10"]
    target = str(package / name)
    subprocess.run(
        [compiler, "-shared", *SANITIZE, *compiled, *libraries, "-o", target], check=True
    )


def environment(isa: str) -> dict[str, str]:
    """Variables for a Python that loads the sanitized kernels."""

    def runtime(name: str) -> str:
        compiler = os.environ.get("CXX", "g++")
        asked = [compiler, f"-print-file-name={name}"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()

    return {
        **os.environ,
        # Python itself has no sanitizer in it; libstdc++ must be there before C++ throws.
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so.6')}",
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:allocator_may_return_null=1:"
        "max_allocation_size_mb=4096:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "MNIST_OPS_CPU_CAPABILITY": isa,
        "PYTHONPATH": str(FOLDER),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }


def main() -> int:
    x86 = platform.machine() in ("x86_64", "AMD64")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", choices=tuple(ISA), default="avx2" if x86 else "baseline")
    parser.add_argument("--jobs", type=int, default=2, help="compilers that run at once")
    parser.add_argument("--calls", type=int, default=3000, help="of the fuzzer; 0: leave it out")
    parser.add_argument("--seed", type=int, default=0, help="of the fuzzer")
    parser.add_argument("pytest", nargs="*", help="after --: arguments for pytest alone")
    arguments = parser.parse_args()

    build(arguments.isa, arguments.jobs)
    variables = environment(arguments.isa)
    # In this folder mnist_ops is the sanitized one, for "python -m" as well.
    python = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    python += [f"--rootdir={ROOT}", f"--config-file={ROOT / 'pyproject.toml'}"]
    chosen = arguments.pytest or ["-k", LEFT_OUT, *(str(ROOT / test) for test in TESTS)]
    outcome = subprocess.run([*python, *chosen], cwd=FOLDER, env=variables).returncode
    if outcome == 0 and arguments.calls and not arguments.pytest:
        fuzzer = [
            str(ROOT / "tests" / "fuzz" / "fuzz_operators.py"),
            "--calls",
            str(arguments.calls),
        ]
        fuzzer += ["--seed", str(arguments.seed), "--memory", "0"]
        outcome = subprocess.run([sys.executable, *fuzzer], cwd=FOLDER, env=variables).returncode
    return outcome


if __name__ == "__main__":
    raise SystemExit(main())
