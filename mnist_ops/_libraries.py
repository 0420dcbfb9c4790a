"""Loads the compiled libraries that this machine can run, and remembers why not the others."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

from ._version import __version__


def _import_compiled() -> Any:
    """Import _C, which registers the schemas.

    In the root of a checkout ``import mnist_ops`` finds the folder of sources, which holds no
    compiled libraries: there, those of the installed package are used.
    """
    here = Path(__file__).parent
    folders = (here, *(Path(entry or ".", here.name).resolve() for entry in sys.path))
    for folder in folders:
        if any((folder / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
            break
    else:
        cure = (
            "Run 'pip install .' in the folder above it, or 'python setup.py build_ext --inplace' "
            "to compile it in place."
        )
        for foreign in (path for folder in folders for path in folder.glob("_C.*.so")):
            raise ImportError(
                f"mnist_ops: {foreign} was compiled for another Python than this "
                f"{platform.python_version()}, which loads _C{EXTENSION_SUFFIXES[0]}. {cure}"
            )
        raise ImportError(f"mnist_ops: {here} holds sources that are not compiled. {cure}")
    if folder != here:
        sys.modules[__package__].__path__.append(str(folder))
    compiled = importlib.import_module("._C", __package__)
    version = compiled.build_info()["version"]
    if version != __version__:
        raise ImportError(
            f"mnist_ops: the sources are {__version__}, but the compiled libraries in {folder} are "
            f"{version}. Run 'pip install .' again."
        )
    return compiled


_C = _import_compiled()
_HERE = Path(_C.__file__).parent
_CPU_VARIABLE = "MNIST_OPS_CPU_CAPABILITY"


def _cpu_capabilities() -> list[str]:
    """The instruction sets whose kernels are installed and run here, the fastest first."""
    return [name for name in _C.cpu_capabilities() if (_HERE / f"_cpu_{name}.so").exists()]


def _load_cpu() -> str:
    """Load the CPU kernels compiled for the best instruction set here; its name."""
    runs = _cpu_capabilities()
    if not runs:
        raise ImportError(f"mnist_ops: no CPU kernels in {_HERE}; the installation is incomplete")
    chosen = os.environ.get(_CPU_VARIABLE) or runs[0]
    if chosen == "none":  # the operators are then composed of PyTorch's, see ops/definitions.py
        return chosen
    if chosen not in runs:
        known = ", ".join([*runs, "none"])
        raise ImportError(f"mnist_ops: {_CPU_VARIABLE} must be one of {known}, got {chosen!r}")
    torch.ops.load_library(str(_HERE / f"_cpu_{chosen}.so"))
    return chosen


def _load_cuda() -> str:
    """Load the CUDA kernels; why they are not there, or an empty string.

    A torch without CUDA has none of the symbols they link to, so they are not even tried there.
    """
    path = _HERE / "_cuda.so"
    if not path.exists():
        return "not built: " + (_C.build_info()["cuda_reason"] or f"{path.name} is missing")
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return ""


CPU_CAPABILITY = _load_cpu()
CUDA_MISSING = _load_cuda()


def build_info() -> dict[str, object]:
    """How the extension was compiled and which of its libraries are in use.

    Returns:
        A dict with

        - ``version``: of mnist_ops;
        - ``compiler``, ``built_with_torch``, ``target_torch``: the C++ compiler, the torch whose
          headers were used, and the oldest torch the libraries load into;
        - ``torch``: the torch that is running;
        - ``cpu_capability``: the instruction set of the CPU kernels in use, ``"avx512"``,
          ``"avx2"``, ``"baseline"`` or ``"none"`` (the environment variable
          ``MNIST_OPS_CPU_CAPABILITY`` chooses);
        - ``cuda_archs``: the CUDA architectures compiled for, as ``["8.0", "9.0+PTX"]``, empty
          where the CUDA library is not in use;
        - ``cuda``: ``"available"``, or the reason why there are no kernels for them.

    Example:
        >>> import mnist_ops
        >>> mnist_ops.build_info()["target_torch"]
        '2.10'
    """
    built = _C.build_info()
    archs = [] if CUDA_MISSING else built["cuda_archs"].replace(" ", ";").split(";")
    cuda = CUDA_MISSING
    if not cuda:
        cuda = "available" if torch.cuda.is_available() else "built and loaded; no GPU is visible"
    return {
        "version": built["version"],
        "compiler": built["compiler"],
        "built_with_torch": built["built_with_torch"],
        "target_torch": built["target_torch"],
        "torch": str(torch.__version__),
        "cpu_capability": CPU_CAPABILITY,
        "cuda_archs": archs,
        "cuda": cuda,
    }
