"""Builds the extension libraries of mnist_ops; everything else is in pyproject.toml.

Five libraries come out, so that each machine loads only what it can run:

``_C``            pybind11 module: the operators' schemas and build_info()
``_cpu_baseline`` CPU kernels for any processor of the architecture
``_cpu_avx2``     the same sources compiled for AVX2 + FMA + F16C (x86-64 only)
``_cpu_avx512``   the same for AVX-512, in vectors of 512 bits (x86-64 only)
``_cuda``         CUDA kernels, where nvcc and a CUDA build of torch are found

Environment variables: ``FORCE_CUDA=1`` (build the CUDA kernels or fail), ``FORCE_CUDA=0`` (do
not), ``TORCH_CUDA_ARCH_LIST``, ``CUDA_HOME`` or ``CUDA_PATH``, ``MAX_JOBS``, ``DEBUG=1`` (-O0 -g),
``WERROR=1`` (warnings are errors). What is set and wrong is an error.
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent
VERSION = runpy.run_path(str(ROOT / "mnist_ops" / "_version.py"))["__version__"]
TARGET_TORCH = "2.10"  # the oldest torch the libraries load into

# Architectures compiled when none is asked for and no GPU is there to ask. Machine code of X.0 runs
# on X.y of the same generation; the driver compiles the PTX of the newest, once, for what comes
# later. Each takes minutes to compile: where a GPU is there, none but its own is.
DEFAULT_CUDA_ARCHS = ("8.0", "9.0")


@dataclass
class CudaPlan:
    """Whether the CUDA library is built, for what, and why not."""

    build: bool
    reason: str = ""
    archs: str = ""
    home: str = ""


def flag(name: str) -> bool | None:
    """The environment variable ``name`` as a switch; None where it is unset or empty."""
    value = os.environ.get(name, "")
    if value == "":
        return None
    if value not in ("0", "1"):
        raise SystemExit(f"setup.py: {name} must be 0 or 1, got {value!r}")
    return value == "1"


def max_jobs() -> None:
    """Refuse a MAX_JOBS that torch would end on with a traceback."""
    value = os.environ.get("MAX_JOBS", "")
    if value and not (value.isascii() and value.isdigit() and int(value) > 0):
        raise SystemExit(f"setup.py: MAX_JOBS must be a positive integer, got {value!r}")


def holds_toolkit(home: str) -> bool:
    """Whether a folder has nvcc and CUDA's headers."""
    headers = ("include/cuda_runtime.h", "targets/*/include/cuda_runtime.h")
    return Path(home, "bin", "nvcc").exists() and any(
        any(Path(home).glob(pattern)) for pattern in headers
    )


def find_cuda_home() -> str | None:
    """The toolkit that CUDA_HOME or CUDA_PATH names, else one that is found.

    torch takes the folder above ``which nvcc``, which is wrong where nvcc is a wrapper script or a
    link; nvcc itself knows where it lives and says so in a dry run.
    """
    for name in ("CUDA_HOME", "CUDA_PATH"):
        named = os.environ.get(name)
        if named and not holds_toolkit(named):
            raise SystemExit(
                f"setup.py: {name}={named} holds no CUDA toolkit (bin/nvcc and cuda_runtime.h); "
                "correct it, unset it, or leave the CUDA kernels out with FORCE_CUDA=0"
            )
        if named:
            return named
    candidates = []
    nvcc = shutil.which("nvcc")
    if nvcc:
        dry = subprocess.run(
            [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True
        )
        top = re.search(r"^#\$ TOP=(.*)$", dry.stdout + dry.stderr, re.MULTILINE)
        if top:
            candidates.append(os.path.realpath(top.group(1)))
        candidates.append(str(Path(os.path.realpath(nvcc)).parent.parent))
    candidates += [cpp_extension.CUDA_HOME, "/usr/local/cuda"]
    return next((home for home in candidates if home and holds_toolkit(home)), None)


def nvcc_release(home: str) -> tuple[int, int]:
    """(major, minor) of the toolkit's nvcc."""
    out = subprocess.run(
        [str(Path(home, "bin", "nvcc")), "--version"], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"release (\d+)\.(\d+)", out)
    if not found:
        raise SystemExit(f"setup.py: cannot read the release of {home}/bin/nvcc from:\n{out}")
    return int(found.group(1)), int(found.group(2))


def default_archs(home: str) -> str:
    """What TORCH_CUDA_ARCH_LIST means when it is unset."""
    if torch.cuda.is_available():
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        archs = [f"{major}.{minor}" for major, minor in sorted(found)]
    else:
        listed = subprocess.run(
            [str(Path(home, "bin", "nvcc")), "--list-gpu-arch"], capture_output=True, text=True
        ).stdout
        archs = [a for a in DEFAULT_CUDA_ARCHS if f"compute_{a.replace('.', '')}\n" in listed]
    return ";".join(archs) + "+PTX"


def check_archs(archs: str, home: str) -> None:
    """Refuse architectures that this nvcc does not compile for, before it runs for minutes."""
    listed = subprocess.run(
        [str(Path(home, "bin", "nvcc")), "--list-gpu-arch"], capture_output=True, text=True
    ).stdout.split()
    for arch in re.split(r"[; ]+", archs.strip("; ")):
        number = re.fullmatch(r"(\d+)\.(\d+)[af]?(\+PTX)?", arch)
        if number and listed and f"compute_{number[1]}{number[2]}" not in listed:
            raise SystemExit(
                f"setup.py: TORCH_CUDA_ARCH_LIST={archs}: {home}/bin/nvcc does not compile for "
                f"{arch}, only for {', '.join(listed)}"
            )
        if not number and not re.fullmatch(r"[A-Z][A-Za-z+]*", arch):  # torch knows Hopper, ...
            raise SystemExit(
                f"setup.py: TORCH_CUDA_ARCH_LIST must be like '8.0;9.0+PTX', got {archs!r}"
            )


def plan_cuda() -> CudaPlan:
    """Decide on the CUDA library, and say why not."""
    forced = flag("FORCE_CUDA")
    if forced is False:
        return CudaPlan(False, "FORCE_CUDA=0")
    reason = ""
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is a build without CUDA"
    elif (home := find_cuda_home()) is None:
        reason = "no CUDA toolkit found (nvcc and cuda_runtime.h); set CUDA_HOME"
    else:
        toolkit, built = nvcc_release(home), torch.version.cuda
        if toolkit[0] != int(built.split(".")[0]):
            reason = f"nvcc is CUDA {toolkit[0]}.{toolkit[1]}, torch was built with CUDA {built}"
    if reason:
        if forced:
            raise SystemExit(f"setup.py: FORCE_CUDA=1, but {reason}")
        return CudaPlan(False, reason)
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or default_archs(home)
    check_archs(archs, home)
    return CudaPlan(True, archs=archs, home=home)


class BuildLibraries(BuildExtension):
    """BuildExtension that names the plain libraries _cpu_avx2.so, ...: no Python modules."""

    def build_extension(self, ext) -> None:
        """Compile one library, in a folder of its own: two of them share their sources."""
        shared = self.build_temp
        self.build_temp = str(Path(shared, ext.name.split(".")[-1]))
        super().build_extension(ext)
        self.build_temp = shared

    def get_ext_filename(self, ext_name: str) -> str:
        """File name of one library."""
        name = ext_name.split(".")[-1]
        if name != "_C":
            return str(Path(*ext_name.split(".")[:-1], f"{name}.so"))
        return super().get_ext_filename(ext_name)


def main() -> None:
    """Print the configuration, then build."""
    debug, werror = bool(flag("DEBUG")), bool(flag("WERROR"))
    max_jobs()
    cuda = plan_cuda()
    if cuda.build:
        # Both are read by torch.utils.cpp_extension: one at import, one when it compiles.
        os.environ["CUDA_HOME"] = cpp_extension.CUDA_HOME = cuda.home
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda.archs
    try:
        import pybind11
    except ImportError:
        raise SystemExit("setup.py: pybind11 is missing: pip install pybind11") from None

    major, minor = TARGET_TORCH.split(".")
    define = [
        f"-DTORCH_TARGET_VERSION=0x{int(major):02x}{int(minor):02x}000000000000",
        "-DTORCH_STABLE_ONLY",
    ]
    # Warnings are about our sources. A folder named by -isystem is one of the system's even where
    # -I names it, too, as torch does; some releases' headers do not compile without warnings.
    torch_headers = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    warn = ["-Wall", "-Wextra", *(["-Werror"] if werror else []), *torch_headers]
    # Python's own flags ask for debug information: it costs a fifth of the time
    optimise = ["-O0", "-g"] if debug else ["-O3", "-DNDEBUG", "-g0"]
    link = [] if debug else ["-Wl,-s"]
    # No contraction: where a fused multiply-add is wanted the source says so, and float32 results
    # do not depend on what the compiler happened to fuse.
    cxx = [
        "-std=c++20",
        *optimise,
        *define,
        *warn,
        "-fvisibility=hidden",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fopenmp-simd",
    ]
    host_warn = (
        [] if not werror else ["-Xcompiler", "-Wall,-Wextra,-Werror", "-Werror", "all-warnings"]
    )
    device = ["-O0", "-G"] if debug else ["-O3"]
    nvcc = ["-std=c++20", *device, *define, "-DUSE_CUDA", *host_warn, *torch_headers]
    nvcc += ["-Xcompiler", "-fvisibility=hidden", "--expt-relaxed-constexpr", "--threads", "2"]
    if cuda.build and nvcc_release(cuda.home)[0] >= 13:
        # A quarter of the bytes. Drivers before CUDA 12.4 would not read them.
        nvcc.append("--compress-mode=size")

    include = [str(ROOT / "csrc")]

    def sources(*patterns: str) -> list[str]:
        # The largest first: what is begun last should not keep one core busy and the others idle.
        found = [path for pattern in patterns for path in (ROOT / "csrc").glob(pattern)]
        found.sort(key=lambda path: (-path.stat().st_size, path.name))
        return [str(path.relative_to(ROOT)) for path in found]

    variants = {"_cpu_baseline": []}
    if platform.machine() in ("x86_64", "AMD64"):
        # The baseline is for processors without AVX2 alone: half the time to compile counts more.
        variants["_cpu_baseline"] = [] if debug else ["-O2"]
        avx2 = ["-mavx2", "-mfma", "-mf16c", "-mtune=haswell"]
        avx512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]
        variants["_cpu_avx2"] = avx2
        variants["_cpu_avx512"] = [*avx2, *avx512, "-mprefer-vector-width=512"]

    info = {
        "MNIST_OPS_VERSION": VERSION,
        "MNIST_OPS_TARGET_TORCH": TARGET_TORCH,
        "MNIST_OPS_BUILT_WITH_TORCH": torch.__version__,
        "MNIST_OPS_CUDA_ARCHS": cuda.archs,
        "MNIST_OPS_CUDA_REASON": cuda.reason,
    }
    extensions = [
        CppExtension(
            "mnist_ops._C",
            ["csrc/bindings.cpp", "csrc/library.cpp"],
            include_dirs=[*include, pybind11.get_include()],
            define_macros=[(name, f'"{value}"') for name, value in info.items()],
            extra_compile_args={"cxx": cxx},
            extra_link_args=link,
        )
    ]
    for name, isa in variants.items():
        extensions.append(
            CppExtension(
                f"mnist_ops.{name}",
                sources("cpu/*.cpp", "online/*.cpp"),
                include_dirs=include,
                extra_compile_args={"cxx": [*cxx, *isa]},
                extra_link_args=link,
                py_limited_api=True,  # links no torch_python: these libraries know no Python
            )
        )
    if cuda.build:
        extensions.append(
            CUDAExtension(
                "mnist_ops._cuda",
                sources("cuda/*.cu"),
                include_dirs=include,
                extra_compile_args={"cxx": cxx, "nvcc": nvcc},
                extra_link_args=link,
                py_limited_api=True,
            )
        )

    cuda_line = f"{cuda.archs} with {cuda.home}" if cuda.build else f"not built: {cuda.reason}"
    print(
        f"mnist_ops {VERSION}: torch {torch.__version__}, stable ABI of torch {TARGET_TORCH}, "
        f"{'debug' if debug else 'release'} build\n"
        f"  CPU:  {', '.join(name.removeprefix('_cpu_') for name in variants)}\n"
        f"  CUDA: {cuda_line}",
        flush=True,
    )
    setup(ext_modules=extensions, cmdclass={"build_ext": BuildLibraries})


main()
