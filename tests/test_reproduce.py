"""examples/reproduce.py as a user runs it: in processes of its own, killed and resumed."""

import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "reproduce.py"
QUICK = ["--table", "3.4", "--epochs", "2", "--limit", "60", "--dtype", "float32"]


def start(*arguments, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes, **options)


def reproduce(*arguments):
    process = start(*arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("straight")
    result = reproduce(*QUICK, "--experiment", "derivations", "gallery", "--out", out)
    assert result[0] == 0, result[2]
    return out, result


def test_what_it_leaves(straight):
    out, (_, text, errors) = straight
    assert errors == ""  # no bars in a pipe, no warnings
    names = {path.name for path in out.iterdir()}
    wanted = {"results.json", "summary.md", "report.html", "table_3.4.png", "normalization.png"}
    assert wanted <= names
    lines = text.splitlines()
    assert sum(line.startswith("mse, float32, seed 1: epoch   2: training") for line in lines) == 1
    assert sum("wrong sign" in line for line in lines) == 2
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert [run["experiment"] for run in runs] == ["original", "multi-margin", "mse"]
    assert "original" in (out / "report.html").read_text()


@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_and_resumed(straight, tmp_path, jobs):
    process = start(*QUICK, "--jobs", jobs, "--out", tmp_path, start_new_session=True)
    # Without any mercy, workers included, once there is something to lose.
    logs = "runs/*/*/log.csv"
    deadline = time.monotonic() + 240
    while sum(path.read_text().count("\n") for path in tmp_path.glob(logs)) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    code, _, errors = reproduce(*QUICK, "--jobs", jobs, "--out", tmp_path, "--resume")
    assert code == 0, errors
    results = (tmp_path / "results.json").read_text()
    assert results == (straight[0] / "results.json").read_text()
    for path in tmp_path.glob(logs):
        with open(path, newline="") as file:
            assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]


def test_workers_end_with_the_process_that_hands_out_the_work(tmp_path):
    process = start(*QUICK, "--jobs", "2", "--out", tmp_path, "--epochs", "5000")
    deadline = time.monotonic() + 240
    while len(list(tmp_path.glob("runs/*/*/progress.json"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()  # alone: its workers are not told
    process.wait()
    for lock in tmp_path.glob("runs/*/*/.lock"):
        with open(lock, "w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    assert time.monotonic() < deadline, "a worker still runs"
                    time.sleep(0.1)


def test_ctrl_c(tmp_path):
    process = start(*QUICK, "--out", tmp_path, "--epochs", "500")
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("runs/*/*/run.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == f"interrupted; --resume continues what is in {tmp_path}\n"
    assert json.loads((tmp_path / "results.json").read_text())["runs"]


def test_list_and_dry_run(tmp_path):
    code, text, _ = reproduce("--list")
    assert code == 0
    for name in ("original", "lbfgs-after-30", "derivations", "relu--conv1-local", "predict"):
        assert name in text
    code, text, _ = reproduce("--table", "3.2", "3.5", "--dry-run", "--out", tmp_path / "none")
    # The original column is in both tables and runs once, as far as the longer one goes.
    assert code == 0 and "original, float64, seed 1: 30 epochs of 60000 digits" in text
    assert text.splitlines()[-1] == "4 runs, 3,960,000 digits"
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "nothing to run"),
        (["--experiment", "realu"], "no experiment 'realu'; did you mean relu"),
        (["--table", "9.9"], "invalid choice: '9.9'"),
        (["--experiment", "relu", "--jobs", "0"], "--jobs must be 1 or more, got 0"),
        (["--experiment", "relu", "--device", "tpu"], "--device tpu cannot be used"),
        (["--experiment", "relu", "--data", "nowhere", "--limit", "9"], "nowhere is not a folder"),
    ],
)
def test_errors(tmp_path, arguments, error):
    code, _, errors = reproduce(*arguments, "--out", tmp_path)
    assert code in (1, 2) and error in errors
    assert "Traceback" not in errors


def test_tables_and_report_of_what_is_there(straight):
    out, _ = straight
    before = (out / "results.json").read_bytes()
    (out / "report.html").unlink()
    code, text, errors = reproduce("--table", "3.4", "--perturb", "3", "--no-run", "--out", out)
    assert code == 0 and errors == "" and "epoch   1" not in text
    assert (out / "report.html").exists()
    assert (out / "results.json").read_bytes() == before


def test_a_run_that_is_there_is_not_overwritten(straight):
    out, _ = straight
    before = (out / "results.json").read_bytes()
    code, _, errors = reproduce(*QUICK, "--out", out)
    assert code == 2 and "holds 3 of these 3 runs already" in errors
    assert (out / "results.json").read_bytes() == before
