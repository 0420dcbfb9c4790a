"""The package as it is installed: import, build_info, what it says when something is missing."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import mnist_ops

SETUP = Path(__file__).parents[1] / "setup.py"


def run(
    code: str, folder: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_import_is_silent():
    result = run("import warnings; warnings.simplefilter('error')\nimport mnist_ops\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "" and result.stderr == ""


def test_submodules_load_when_they_are_used():
    for name in mnist_ops._LAZY:
        assert getattr(mnist_ops, name).__name__ == f"mnist_ops.{name}"
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        mnist_ops.nonsense  # noqa: B018
    assert set(mnist_ops.__all__) <= set(dir(mnist_ops))


def test_build_info():
    info = mnist_ops.build_info()
    assert info["version"] == mnist_ops.__version__
    assert re.fullmatch(r"\d+\.\d+", info["target_torch"])
    assert info["torch"] == torch.__version__
    assert info["cpu_capability"] in ("avx512", "avx2", "baseline")
    assert info["compiler"].split()[0] in ("gcc", "clang")
    if info["cuda"] == "available" or info["cuda"].startswith("built and loaded"):
        assert info["cuda_archs"] and all(re.match(r"\d+\.\d", a) for a in info["cuda_archs"])
    else:
        assert info["cuda_archs"] == [] and len(info["cuda"]) > 5


def test_a_cpu_capability_that_does_not_exist(monkeypatch):
    """The others are chosen in tests/ops."""
    monkeypatch.setenv("MNIST_OPS_CPU_CAPABILITY", "avx9000")
    message = "MNIST_OPS_CPU_CAPABILITY must be one of .* got 'avx9000'"
    with pytest.raises(ImportError, match=message):
        mnist_ops._libraries._load_cpu()


def test_from_the_root_of_a_checkout(tmp_path):
    """Sources without libraries: those of the installed package serve, or a clear error."""
    sources, libraries = Path(mnist_ops.__file__).parent, mnist_ops._libraries._HERE
    for name in ("installed", "checkout"):
        shutil.copytree(
            sources, tmp_path / name / "mnist_ops", ignore=shutil.ignore_patterns("*.gz", "*.so")
        )
    code = "import mnist_ops, torch; print(mnist_ops.sigmoid(torch.zeros(1)).item())"
    alone = run(code, tmp_path / "checkout", PYTHONPATH="", PYTHONNOUSERSITE="1")
    if "site-packages" not in str(libraries):  # else the installed package serves here, too
        assert alone.returncode != 0
        assert "holds sources that are not compiled. Run 'pip install .'" in alone.stderr
    for library in libraries.glob("*.so"):
        shutil.copy(library, tmp_path / "installed" / "mnist_ops")
    path = str(tmp_path / "installed")
    assert run(code, tmp_path / "checkout", PYTHONPATH=path).stdout.strip() == "0.5"
    version = tmp_path / "checkout" / "mnist_ops" / "_version.py"
    version.write_text('__version__ = "99.0"\n')
    mixed = run(code, tmp_path / "checkout", PYTHONPATH=path)
    assert mixed.returncode != 0 and "the sources are 99.0" in mixed.stderr


def test_libraries_left_over_from_another_python(tmp_path):
    package = tmp_path / "mnist_ops"
    shutil.copytree(
        Path(mnist_ops.__file__).parent, package, ignore=shutil.ignore_patterns("*.gz", "*.so")
    )
    (package / "_C.cpython-33m-x86_64-linux-gnu.so").write_bytes(b"")
    # Without the folders that hold an installed package, which would serve instead.
    code = (
        "import pathlib, sys, torch\n"
        "own = sys.argv[1]\n"
        "holds = lambda path: pathlib.Path(path or '.', 'mnist_ops').is_dir()\n"
        "sys.path = [own, *(path for path in sys.path if not holds(path))]\n"
        "import mnist_ops\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "_C.cpython-33m-x86_64-linux-gnu.so was compiled for another Python" in result.stderr


@pytest.mark.skipif(not SETUP.exists(), reason="no setup.py beside the tests")
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MAX_JOBS", "two", "MAX_JOBS must be a positive integer, got 'two'"),
        ("FORCE_CUDA", "yes", "FORCE_CUDA must be 0 or 1, got 'yes'"),
        ("CUDA_HOME", "/nonexistent", "CUDA_HOME=/nonexistent holds no CUDA toolkit"),
        ("TORCH_CUDA_ARCH_LIST", "1.0", "does not compile for 1.0"),
        ("TORCH_CUDA_ARCH_LIST", "nine", "must be like '8.0;9.0+PTX', got 'nine'"),
    ],
)
def test_wrong_settings_of_a_build_are_errors(name, value, message, monkeypatch):
    if "CUDA_" in name and name != "FORCE_CUDA":
        if torch.version.cuda is None:
            pytest.skip(f"torch {torch.__version__} is a build without CUDA: nothing is looked for")
        if "ARCH" in name and shutil.which("nvcc") is None:
            pytest.skip("there is no nvcc to ask what it compiles for")
    for other in ("FORCE_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.setenv(other, "")
    monkeypatch.setenv(name, value)
    monkeypatch.chdir(SETUP.parent)
    monkeypatch.setattr(sys, "argv", [SETUP.name, "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(SETUP.name, run_name="__main__")
    assert message in str(stop.value.code)


@pytest.mark.parametrize(
    "module",
    [
        *("ops.lp_pool", "ops.local_norm", "ops.softmax", "ops.sigmoid", "ops.kernels"),
        *("_libraries", "lab.derivations", "lab.reports", "lab.statistics", "lab.tables"),
    ],
)
def test_examples_of_the_docstrings(module):
    results = doctest.testmod(importlib.import_module(f"mnist_ops.{module}"))
    assert results.attempted > 0 and results.failed == 0


def test_every_public_function_documents_itself():
    for name in mnist_ops.__all__:
        thing = getattr(mnist_ops, name)
        if callable(thing):
            for section in ("Returns:", "Example:"):
                assert section in thing.__doc__, (name, section)


def test_the_operators_need_torch_alone():
    """Without what the extra brings: the operators work, the rest says in one line what to do."""
    code = """
        import importlib.util, sys
        find_spec = importlib.util.find_spec
        extra = "filelock jinja2 joblib matplotlib numpy scipy torchvision tqdm".split()
        class Missing:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in extra:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Missing())
        importlib.util.find_spec = lambda name: None if name in extra else find_spec(name)
        import torch, mnist_ops
        layer = mnist_ops.nn.LPPool2d(2, 2)
        print(float(layer(torch.ones(1, 2, 2))))
        for room in ("torch7", "mnist", "training", "lab"):
            try:
                importlib.import_module(f"mnist_ops.{room}")
            except ImportError as error:
                print(error)
    """
    result = run(textwrap.dedent(code))
    lines = result.stdout.splitlines()
    assert lines[0] == "2.0", result.stderr
    assert len(lines) == 5, result.stdout
    assert all(line.endswith(": pip install 'mnist_ops[lab]'") for line in lines[1:])
    assert lines[1].startswith("mnist_ops.torch7 needs numpy: ")
