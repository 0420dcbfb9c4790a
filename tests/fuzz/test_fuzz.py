"""The fuzzer's calls, and that it notices what it is there for."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import fuzz_arguments
import fuzz_operators
import pytest

import mnist_ops
from mnist_ops import _torch_private

FUZZER = Path(__file__).parent / "fuzz_operators.py"


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FUZZER), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


MESSAGES = {
    "crash": r"CRASH: exit code -11",
    "hang": r"CRASH: no answer for 5.0 s",
    "memory": r"RuntimeError for valid arguments: .*can't allocate memory",
    "wrong": r"result 0: element 0 of 12 is .*, must be",
    "input": r"an input was modified",
}


@pytest.mark.parametrize(
    "planted", ["crash,memory,wrong,input", pytest.param("hang", marks=pytest.mark.slow)]
)
def test_faults_are_found(planted):
    """The fourth call and those behind do what must be noticed; the others are made as well."""
    outcome = fuzz("--calls", "8", "--plant", planted, "--timeout", "5")
    assert outcome.returncode == 1, outcome.stdout + outcome.stderr
    for number, kind in enumerate(planted.split(","), 3):
        found = MESSAGES[kind] + rf"((?!--call)[\s\S])*--seed 0 --call {number}\n"
        assert re.search(found, outcome.stdout), outcome.stdout
    assert "8 calls of seed 0" in outcome.stdout


@pytest.mark.slow
def test_twenty_thousand_calls():
    outcome = fuzz("--calls", "20000", "--seed", "1")
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "20000 calls of seed 1" in outcome.stdout


def test_a_call_is_made_again_by_its_number():
    again = fuzz("--call", "7")
    first = fuzz_operators.make_case(0, 7, fuzz_operators.load_library("cpu"), "").text()
    assert again.stdout.splitlines()[0] == first
    assert "mnist_ops" in first and again.returncode == 0


def test_every_operator_is_called():
    schemas = _torch_private.operators("mnist_ops")
    # The last is a part of the double backward; the public function's tangents call it.
    others = {"online_sgd", "online_sgd_models", "lp_pool2d_jvp"}
    # Raw, the mean of planes is not: the public function calls it.
    others |= {"local_mean2d", "local_mean2d_backward"}
    # The first step of stage2d, which calls it.
    others |= {"activate", "activate_backward"}
    assert schemas == {*fuzz_arguments.RAW, *others}
    public = {name for name in mnist_ops.__all__ if callable(getattr(mnist_ops, name))}
    # Those of other dimensions are made of lp_pool2d.
    made = {"lp_pool1d", "lp_pool3d"}
    assert public == {*fuzz_arguments.PUBLIC, *made, "gaussian1d", "gaussian2d", "build_info"}
