"""Devices the tests run on, and the vectors measured on the original system."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import shutil
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mnist_ops

REFERENCE = Path(__file__).parent / "reference"

torch.manual_seed(0)


def pytest_configure() -> None:
    # A shell's background jobs, and what CI starts as one, ignore Ctrl-C and hand that on to their
    # children; the tests of interrupted runs need it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_auto_num_workers() -> int:
    # Each worker takes half a gigabyte for torch alone.
    return min(os.cpu_count() or 1, 8)


def why_no_cuda() -> str | None:
    """The reason why tests on CUDA are skipped; None where they run."""
    info = mnist_ops.build_info()
    return None if info["cuda"] == "available" else str(info["cuda"])


def other_capabilities() -> list[str]:
    """The instruction sets whose kernels run here and are not in use."""
    names = mnist_ops._libraries._cpu_capabilities()
    return [name for name in names if name != mnist_ops.build_info()["cpu_capability"]]


def pytest_report_header() -> list[str]:
    info = mnist_ops.build_info()
    cuda = why_no_cuda()
    tested = f"tested on {torch.cuda.get_device_name()}" if cuda is None else cuda
    return [
        f"mnist_ops {info['version']}: torch {info['torch']}, "
        f"CPU kernels {info['cpu_capability']}, "
        f"{torch.get_num_threads()} threads",
        f"mnist_ops on CUDA: {tested}",
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        reason = why_no_cuda()
        skip = [pytest.mark.skip(reason=f"CUDA: {reason}")] if reason else []
        metafunc.parametrize("device", ["cpu", pytest.param("cuda", marks=skip)])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "emulated_cuda" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def emulated_cuda(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CUDA kernels as operators of the CPU, torch.ops.mnist_ops_emulated; built once."""
    from test_cuda_emulator import build

    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("there is no g++ to compile the emulated CUDA kernels")
    library = build(tmp_path_factory.mktemp("cuda_emulator"), compiler)
    torch.ops.load_library(str(library))
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Thousands of small steps: threads that wait for a busy core would cost ten times the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def thinned(*axes: Iterable[Any], keep: int = 2) -> list[Any]:
    """Cases for ``parametrize``: the product of the axes, of which one in ``keep`` is not slow.

    The diagonals, so that each value of an axis is there with several values of the others.
    """
    cases = []
    for places in itertools.product(*(list(enumerate(axis)) for axis in axes)):
        values = [value for _, value in places]
        marks = [pytest.mark.slow] if sum(i for i, _ in places) % keep else []
        cases.append(pytest.param(*values, marks=marks, id="-".join(map(str, values))))
    return cases


def first_of_each(cases: Iterable[Any]) -> list[Any]:
    """Cases for ``parametrize``: the first with a name is not slow."""
    known: set[str] = set()
    result = []
    for case in cases:
        marks = [pytest.mark.slow] if case.name in known else []
        result.append(pytest.param(case, marks=marks, id=str(case)))
        known.add(case.name)
    return result


def torch7_tensor(entry: dict) -> torch.Tensor:
    """One tensor of the JSON files: {"dtype", "shape", "data"}, NaN and inf as JSON's NaN."""
    dtype = torch.float32 if entry["dtype"] == "torch.FloatTensor" else torch.float64
    return torch.tensor([float(v) for v in entry["data"]], dtype=dtype).reshape(entry["shape"])


def torch7_cases(name: str) -> list[dict]:
    """The cases of one file of vectors."""
    return json.loads((REFERENCE / "torch7" / f"{name}.json").read_text())
