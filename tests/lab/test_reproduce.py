"""examples/reproduce.py as a user runs it: in processes of its own, killed and resumed."""

import csv
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from filelock import FileLock

from mnist_ops.lab import experiments, reports, reproduce_command, runner

SCRIPT = Path(__file__).parents[2] / "examples" / "reproduce.py"
PAGES = ["report-1.md", "report-2.md", "report.html"]
QUICK = ["--table", "3.4", "--epochs", "2", "--limit", "60", "--dtype", "float32"]


@pytest.fixture
def script(monkeypatch):
    """The script within this process, which has imported what takes seconds."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    yield reproduce_command
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def here(script, monkeypatch, capsys):
    """As reproduce(), within this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *map(str, arguments)])
        try:
            code = script.main()
        except SystemExit as stop:  # argparse's
            code = stop.code
        return code, *capsys.readouterr()

    return run


def start(*arguments, environment=None, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes, **options)


def reproduce(*arguments, **options):
    process = start(*arguments, **options)
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
    assert names == {"results.json", "runs", "figures", *PAGES}
    assert (out / "figures" / "normalization.png").exists()
    lines = text.splitlines()
    assert sum(line.startswith("mse, float32, seed 1: epoch   2: training") for line in lines) == 1
    assert sum("wrong sign" in line for line in lines) == 2
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert [run["experiment"] for run in runs] == ["original", "multi-margin", "mse"]
    assert "original" in (out / "report.html").read_text()


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
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


@pytest.mark.slow
def test_a_plan_killed_and_merged(tmp_path):
    """Whatever is killed whenever: the file has each run once, with all its complete epochs."""
    out, results = tmp_path / "out", tmp_path / "merged" / "results.json"
    options = ["--plan", "full", "--limit", "20", "--out", out, "--results", results]
    process = start(*options, "--minutes", "10", "--jobs", "2", start_new_session=True)
    deadline = time.monotonic() + 240
    while sum(path.read_text().count("\n") > 1 for path in out.glob("runs/*/*/log.csv")) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not results.exists()
    for _ in range(2):  # a second time changes nothing
        code, text, errors = reproduce(*options, "--no-run")
        assert code == 0, errors
        runs = json.loads(results.read_text())["runs"]
        names = [run["experiment"] for run in runs]
        assert len(names) == len(set(names)) >= 3
        assert all(len(run["epochs"]) == 1 and run["limit"] == 20 for run in runs)
    assert "0 runs new or longer" in text
    assert f"  {reports.counted(19 - len(names), 'epoch')}, " in text.splitlines()[0]
    assert (results.parent / "report-1.md").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", "full", "--experiment", "mse"], "--plan has runs of its own"),
        (["--experiment", "mse", "--minutes", "3"], "--minutes needs --plan"),
        (["--plan", "half"], "invalid choice: 'half'"),
    ],
)
def test_what_a_plan_does_not_go_with(script, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
    with pytest.raises(SystemExit):
        script.parse_arguments()
    assert message in capsys.readouterr().err


def processes_of(group):
    """Those of a process group that live, as their command lines."""
    listed = subprocess.run(
        ["ps", "-e", "-o", "pgid=,stat=,args="], capture_output=True, text=True, check=True
    )
    rows = [line.split(maxsplit=2) for line in listed.stdout.splitlines()]
    return [args for pgid, stat, args in rows if int(pgid) == group and not stat.startswith("Z")]


# Ctrl-C in a terminal reaches all of the group, kill one process.
@pytest.mark.parametrize(
    ("number", "everybody"),
    [
        (signal.SIGINT, True),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, False, marks=pytest.mark.slow),
    ],
)
def test_no_process_stays_behind(tmp_path, number, everybody):
    options = ["--experiment", "original", "mse", "--limit", "60", "--dtype", "float32"]
    process = start(
        *options, "--epochs", "5000", "--jobs", "2", "--out", tmp_path, start_new_session=True
    )
    deadline = time.monotonic() + 240
    logs = "runs/*/*/log.csv"
    while sum(path.read_text().count("\n") > 1 for path in tmp_path.glob(logs)) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    assert len(processes_of(process.pid)) >= 3
    (os.killpg if everybody else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=30)
    ended = time.monotonic()
    while processes_of(process.pid):
        assert time.monotonic() < ended + 5, processes_of(process.pid)
        time.sleep(0.1)
    for lock in tmp_path.glob("runs/*/*/.lock"):
        with FileLock(lock, timeout=0):
            pass
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert errors == f"interrupted; --resume continues what is in {tmp_path}\n"
        runs = json.loads((tmp_path / "results.json").read_text())["runs"]
        assert [len(run["epochs"]) > 0 for run in runs] == [True, True]
    # The next run takes it from there, and sweeps.
    chosen = experiments.select(["original", "mse"])
    todo = runner.tasks(chosen, epochs=1, limit=60, dtype="float32")
    assert runner.run_all(todo, tmp_path, resume=True, quiet=True) == []
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [len(run["epochs"]) > 0 for run in runs] == [True, True]
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert not [name for name in left if name.endswith(".part")]


def test_a_reader_that_stops_reading():
    """And an error where the output cannot be written."""
    command = f"{sys.executable} {SCRIPT} --list | true; echo ${{PIPESTATUS[0]}}"
    command += f"; {sys.executable} {SCRIPT} --list > /dev/full; echo $?"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.stdout.split() == ["141", "2"]
    assert result.stderr == "reproduce.py: error: No space left on device\n"


def test_list_and_dry_run(tmp_path, here):
    code, text, _ = here("--list")
    assert code == 0
    for name in ("original", "lbfgs-after-30", "derivations", "relu--conv1-local", "predict"):
        assert name in text
    code, text, _ = here("--table", "3.2", "3.5", "--dry-run", "--out", tmp_path / "none")
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
        (["--experiment", "relu", "--jobs", "0"], "argument --jobs: must be 1 or more, got 0"),
        (["--experiment", "relu", "--jobs", "-1"], "argument --jobs: must be 1 or more, got -1"),
        (["--experiment", "relu", "--seeds", "0"], "argument --seeds: must be 1 or more, got 0"),
        (["--experiment", "relu", "--seeds", "9" * 30], "argument --seeds: must be 10000 or less"),
        (["--experiment", "relu", "--epochs", "0"], "argument --epochs: must be 1 or more, got 0"),
        (["--experiment", "relu", "--limit", "0"], "argument --limit: must be 1 or more, got 0"),
        (["--experiment", "relu", "--limit", "1.5"], "argument --limit: invalid integer: '1.5'"),
        (["--experiment", "relu", "--perturb", "-1"], "argument --perturb: must be 0 or more"),
        (["--experiment", "relu", "--device", "tpu"], "--device: tpu cannot be used"),
        (
            ["--experiment", "relu", "--device", "meta"],
            "--device: meta cannot be used: it is neither",
        ),
        (["--experiment", "relu", "--device", "cuda:99"], "--device: cuda:99 cannot be used"),
        (["--experiment", "relu", "--data", "nowhere", "--limit", "9"], "nowhere is not a folder"),
        (["--experiment", "relu", "--out", "/dev/null"], "/dev/null is a file, not a folder"),
        (["--experiment", "relu", "--out", "/proc/x"], "/proc/x: No such file or directory"),
    ],
)
def test_errors(tmp_path, arguments, error, here):
    out = [] if "--out" in arguments else ["--out", tmp_path / "out"]
    code, _, errors = here(*arguments, *out)
    assert code == (1 if "--data" in arguments else 2)
    # argparse shows the usage before its line.
    *usage, line = errors.splitlines()
    assert error in line and (not usage or usage[0].startswith("usage: "))
    assert not (tmp_path / "out" / "runs").exists()


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, here):
    """Root may write everywhere: the error itself stands for such a folder."""

    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    code, _, errors = here("--experiment", "relu", "--out", tmp_path / "out")
    assert (code, errors) == (2, f"reproduce.py: error: {tmp_path}/out: Permission denied\n")


def test_results_are_not_lost_to_an_ascii_terminal(straight, tmp_path, monkeypatch, script):
    shutil.copytree(straight[0], tmp_path / "out", dirs_exist_ok=True)
    (tmp_path / "out" / PAGES[0]).unlink()
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="ascii"))
    monkeypatch.setattr(script.pages.Report, "printed_table", lambda *_: "5 µs")
    arguments = ["--table", "3.4", "--no-run", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
    assert script.main() == 0
    assert b"5 \\xb5s" in terminal.getvalue()
    assert (tmp_path / "out" / PAGES[0]).exists()


@pytest.mark.slow
def test_an_ascii_locale(tmp_path):
    """Files are UTF-8 everywhere, and results get there."""
    environment = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    options = ["--experiment", "relu", "derivations", "--epochs", "1", "--limit", "20"]
    code, _, errors = reproduce(*options, "--out", tmp_path / "é", environment=environment)
    assert (code, errors) == (0, "")
    assert "±" in (tmp_path / "é" / "report.html").read_text("utf-8")


def test_tables_and_report_of_what_is_there(straight, here):
    out, _ = straight
    before = (out / "results.json").read_bytes()
    (out / "report.html").unlink()
    code, text, errors = here("--table", "3.4", "--perturb", "3", "--no-run", "--out", out)
    assert code == 0 and errors == "" and "epoch   1" not in text
    assert (out / "report.html").exists()
    # Byte for byte, whoever reports on the runs, and wherever.
    assert (out / "results.json").read_bytes() == before


def test_a_run_that_is_there_is_not_overwritten(straight, here):
    out, _ = straight
    before = (out / "results.json").read_bytes()
    code, _, errors = here(*QUICK, "--out", out)
    assert code == 2 and "holds 3 of these 3 runs already" in errors
    assert (out / "results.json").read_bytes() == before
