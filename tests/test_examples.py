"""The examples print what their docstrings expect."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str) -> str:
    result = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def expected(name: str) -> list[str]:
    """The lines that a docstring expects."""
    text = (EXAMPLES / f"{name}.py").read_text().split('"""')[1].split("Expected")[1]
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


def shape(line: str) -> str:
    """Without its numbers."""
    return re.sub(r"\d+\.\d+(e[-+]\d+)?", "#", line)


def test_retrieval_head():
    lines = run("retrieval_head").splitlines()
    assert list(map(shape, lines)) == list(map(shape, expected("retrieval_head")))
    mean, gem = (float(line.split()[-1]) for line in lines)
    assert gem > mean + 0.2 and gem > 0.8
    assert float(re.search(r"p = ([\d.]+)", lines[1])[1]) > 3.0


def test_reports_table():
    assert run("reports_table").splitlines() == expected("reports_table")


def test_local_contrast():
    lines = run("local_contrast").splitlines()
    assert list(map(shape, lines)) == list(map(shape, expected("local_contrast")))


@pytest.mark.slow
def test_export_a_network():
    if shutil.which("g++") is None:
        pytest.skip("there is no g++, which torch.compile compiles with")
    lines = run("export_a_network").splitlines()
    wanted = list(map(shape, expected("export_a_network")))
    if any(importlib.util.find_spec(name) is None for name in ("onnxscript", "onnxruntime")):
        assert "onnxruntime:    not run, there is no" in lines.pop()
        wanted.pop()
    assert [shape(line) for line in lines if "difference" in line] == wanted
    assert all(float(line.split()[-1]) < 1e-5 for line in lines if "difference" in line)
