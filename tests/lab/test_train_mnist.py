"""The example as users run it: in a pipe, on a terminal, interrupted, resumed, with bad flags."""

import csv
import fcntl
import gzip
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REFERENCE

from mnist_ops import training
from mnist_ops.lab import reports, train_command

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "train_mnist.py"
KEPT = [".lock", "checkpoint.backup.pt", "checkpoint.pt", "log.csv"]
RESULTS = sorted([*KEPT, "accuracy.png", "confusion.csv", "model.pt"])


@pytest.fixture(autouse=True)
def threads():
    """Runs in this process set the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """A tiny data set in MNIST's format: each class has a bright bar of its own."""
    folder = tmp_path_factory.mktemp("mnist")
    random = np.random.default_rng(0)
    for prefix, count in (("train", 40), ("t10k", 20)):
        labels = np.arange(count, dtype=np.uint8) % 10
        pixels = random.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            image[2 * label + 4 : 2 * label + 6] = 255
        images = struct.pack(">4I", 2051, count, 28, 28) + pixels.tobytes()
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        content = struct.pack(">2I", 2049, count) + labels.tobytes()
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(content)
    return folder


def command(out, *flags):
    return [sys.executable, str(SCRIPT), "--out", str(out), "--threads", "1", *map(str, flags)]


def run(out, *flags):
    return subprocess.run(command(out, *flags), capture_output=True, text=True, timeout=120)


def run_here(monkeypatch, out, *flags):
    """The script's exit code, without a process of its own."""
    monkeypatch.setattr(sys, "argv", command(out, *flags)[1:])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # restored afterwards
    try:
        return train_command.main()
    except SystemExit as stop:  # argparse's way out
        return stop.code


def epochs_of(text):
    return re.findall(r"^epoch +(\d+): training [\d.]+ %, test [\d.]+ %", text, re.MULTILINE)


def rows(out):
    with open(out / "log.csv", newline="") as file:
        return [{**row, "seconds": None} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def finished(mnist, tmp_path_factory):
    """A run of three epochs in a pipe."""
    out = tmp_path_factory.mktemp("run") / "made" / "by the script"
    return out, run(out, "--data", mnist, "--epochs", 3, "--lr", 0.005)


def test_in_a_pipe(finished, mnist):
    out, result = finished
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # no bar
    assert epochs_of(result.stdout) == ["1", "2", "3"]
    assert "\r" not in result.stdout
    assert f"trained on files that are not MNIST's, in {mnist}\n" in result.stdout
    assert "compiled online SGD, float64, cpu, 1 thread, batch size 1" in result.stdout
    assert sorted(os.listdir(out)) == RESULTS


def test_table(finished):
    out, result = finished
    table = [line.split() for line in result.stdout.splitlines()]
    log = rows(out)
    for epoch in (1, 2, 3):
        ours = [
            f"{float(log[epoch - 1][name]):.2f}" for name in ("train_accuracy", "test_accuracy")
        ]
        assert [str(epoch), *ours] in table
    assert "Table 3.1" not in result.stdout  # that is of MNIST


def test_table_of_mnist(tmp_path, monkeypatch, capfd):
    assert run_here(monkeypatch, tmp_path, "--limit", 20) == 0
    table = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert ["this", "run", "Table", "3.1"] in table
    assert any(row[:1] == ["1"] and row[3:] == ["96.71", "99.04"] for row in table)


def test_results(finished):
    out, _ = finished
    assert (out / "accuracy.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    counts = np.loadtxt(out / "confusion.csv", delimiter=",", dtype=int)
    assert counts.shape == (10, 10) and counts.sum(1).tolist() == [2] * 10
    assert 100 * counts.trace() / 20 == float(rows(out)[-1]["test_accuracy"])
    values = torch.load(out / "model.pt", weights_only=True)
    parameters = [value for name, value in values.items() if not name.endswith(".kernel")]
    assert sum(value.numel() for value in parameters) == 310_346
    saved = training.load_checkpoint(out / "checkpoint.pt")
    assert saved["epoch"] == 3 and saved["settings"]["lr"] == 0.005
    assert all(torch.equal(saved["model"][name], values[name]) for name in values)


def test_resume(finished, mnist, tmp_path, monkeypatch, capfd):
    out, _ = finished
    flags = ("--data", mnist, "--lr", 0.005)
    assert run_here(monkeypatch, tmp_path, *flags, "--epochs", 1) == 0
    capfd.readouterr()
    assert run_here(monkeypatch, tmp_path, *flags, "--epochs", 3, "--resume") == 0
    assert epochs_of(capfd.readouterr().out) == ["2", "3"]
    assert rows(tmp_path) == rows(out)
    straight, twice = (torch.load(path / "model.pt", weights_only=True) for path in (out, tmp_path))
    assert all(torch.equal(straight[name], twice[name]) for name in straight)


def interrupt(process):
    """Press Ctrl-C once the second epoch has begun, return what was printed."""
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith("epoch"):
            time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            break
    rest, errors = process.communicate(timeout=60)
    return output + rest, errors


def test_interrupt(mnist, tmp_path, monkeypatch):
    flags = ("--data", mnist, "--lr", 0.005, "--epochs", 500)
    process = subprocess.Popen(
        command(tmp_path, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    output, errors = interrupt(process)
    assert process.returncode == 130, errors
    done = len(epochs_of(output))
    path = tmp_path / "checkpoint.pt"
    assert training.load_checkpoint(path)["epoch"] in (done, done + 1)
    saved = training.load_checkpoint(path)["epoch"]
    assert errors == f"interrupted; {path} holds the state after epoch {saved}: resume from it\n"
    assert sorted(os.listdir(tmp_path)) == (KEPT if saved else [KEPT[0], *KEPT[2:]])
    assert run_here(monkeypatch, tmp_path, *flags[:-1], saved + 1, "--resume") == 0
    assert [row["epoch"] for row in rows(tmp_path)] == [str(i + 1) for i in range(saved + 1)]


def on_a_terminal(arguments):
    """Run with a pseudo-terminal as all three standard streams."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    process = subprocess.Popen(arguments, stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    output = b""
    while True:
        ready, _, _ = select.select([leader], [], [], 120)
        try:
            piece = os.read(leader, 65536) if ready else b""
        except OSError:  # the other side was closed
            piece = b""
        if not piece:
            break
        output += piece
    os.close(leader)
    return process.wait(timeout=60), output.decode()


def test_on_a_terminal(mnist, tmp_path):
    code, output = on_a_terminal(command(tmp_path, "--data", mnist, "--epochs", 1))
    assert code == 0, output
    assert "digits/s" in output and "epoch 1/1" in output
    assert len(re.findall(r"epoch   1: training", output)) == 1


@pytest.mark.parametrize("flags", [[], ["--no-progress"]])
def test_no_progress(mnist, tmp_path, monkeypatch, capfd, flags):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run_here(monkeypatch, tmp_path, "--data", mnist, *flags) == 0
    assert ("digits/s" in capfd.readouterr().err) == (not flags)


def test_other_settings(mnist, tmp_path, monkeypatch, capfd):
    flags = "--dtype float32 --batch-size 8 --momentum 0.9 --dampening 0 --nesterov --seed 3"
    more = ("--weight-decay", 1e-4, "--normalization", "global", "--limit", 16, "--data", mnist)
    assert run_here(monkeypatch, tmp_path, *flags.split(), *more) == 0
    output = capfd.readouterr().out
    assert "PyTorch autograd, float32, cpu, 1 threads, batch size 8" in output
    assert "training on 16 digits" in output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "0"], "--epochs: must be 1 or more, got 0"),
        (["--epochs", "many"], "invalid integer: 'many'"),
        (["--batch-size", "-1"], "--batch-size: must be 1 or more"),
        (["--limit", "0"], "--limit: must be 1 or more"),
        (["--threads", "0"], "--threads: must be 1 or more"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
        (["--device", "quantum"], "--device: quantum cannot be used"),
        (["--lr", "-1"], "lr must be >= 0 and finite, got -1.0"),
        (["--lr", "nan"], "lr must be >= 0 and finite, got nan"),
        (["--seed", "-5"], "seed must be in"),
        (["--nesterov"], "nesterov needs momentum > 0 and dampening 0"),
        (["--data", "/no/such/folder"], "/no/such/folder is not a folder"),
        (["--resume"], "there is no checkpoint at"),
        (["--speed", "9"], "unrecognized arguments: --speed 9"),
    ],
)
def test_bad_flags(mnist, tmp_path, flags, message, monkeypatch, capfd):
    data = [] if "--data" in flags else ["--data", mnist]
    assert run_here(monkeypatch, tmp_path / "out", *data, *flags) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("train_mnist.py: error: ") and message in last
    assert not (tmp_path / "out").exists()


def test_resuming_another_run(finished, mnist, monkeypatch, capfd):
    out, _ = finished
    before = (out / "checkpoint.pt").read_bytes()
    flags = ("--data", mnist, "--epochs", 4, "--lr", 0.1, "--resume")
    assert run_here(monkeypatch, out, *flags) == 2
    assert "made with lr = 0.005, this run has 0.1" in capfd.readouterr().err
    assert (out / "checkpoint.pt").read_bytes() == before


def test_two_at_once(mnist, tmp_path, monkeypatch, capfd):
    """The second one is refused; the first goes on as if nothing had been."""
    flags = ("--data", mnist, "--lr", 0.005)
    first = subprocess.Popen(
        command(tmp_path, *flags, "--epochs", 500), stdout=subprocess.PIPE, text=True
    )
    while not first.stdout.readline().startswith("epoch"):
        pass
    assert run_here(monkeypatch, tmp_path, *flags) == 2
    errors = capfd.readouterr().err
    assert errors == f"train_mnist.py: error: another process is at work in {tmp_path}\n"
    first.kill()
    first.communicate()
    (tmp_path / ".checkpoint.pt.1-1.part").touch()  # as a kill in the middle of writing leaves it
    assert run_here(monkeypatch, tmp_path, *flags) == 0
    assert not list(tmp_path.glob(".*.part"))


def test_resuming_a_damaged_checkpoint(finished, mnist, tmp_path, monkeypatch, capfd):
    out, _ = finished
    flags = ("--data", mnist, "--lr", 0.005)
    assert run_here(monkeypatch, tmp_path, *flags, "--epochs", 2) == 0
    capfd.readouterr()
    path = tmp_path / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="going on from"):
        assert run_here(monkeypatch, tmp_path, *flags, "--epochs", 3, "--resume") == 0
    assert epochs_of(capfd.readouterr().out) == ["2", "3"]
    assert rows(tmp_path) == rows(out)


def test_full_disk(mnist, tmp_path, monkeypatch):
    """A limit on the size of files stands for it: one line, and the old checkpoint goes on."""
    flags = ("--data", mnist, "--lr", 0.005)
    assert run_here(monkeypatch, tmp_path, *flags) == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    code = """
        import resource, runpy, sys
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        sys.argv = sys.argv[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")
    """
    limited = [sys.executable, "-c", textwrap.dedent(code)]
    arguments = command(tmp_path, *flags, "--epochs", 2, "--resume")[1:]
    result = subprocess.run([*limited, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1, result.stderr
    assert "checkpoint.pt" in result.stderr and "File too large" in result.stderr
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.slow
def test_ascii_locale(mnist, tmp_path):
    environment = os.environ | {
        "LC_ALL": "C",
        "PYTHONIOENCODING": "ascii",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    out = tmp_path / "\xfcbung"
    result = subprocess.run(
        command(out, "--data", mnist), capture_output=True, timeout=120, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert sorted(os.listdir(out)) == RESULTS


def test_a_run_that_diverges_says_so(mnist, tmp_path):
    result = run(tmp_path, "--data", mnist, "--lr", 1e308)
    assert result.returncode == 1
    assert result.stderr.startswith("warning: the run has diverged in epoch 1: training loss")
    assert sorted(os.listdir(tmp_path)) == RESULTS


def test_damaged_data(mnist, tmp_path, monkeypatch, capfd):
    for path in mnist.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:-20])
    assert run_here(monkeypatch, tmp_path / "out", "--data", tmp_path) == 2
    errors = capfd.readouterr().err
    assert "is truncated" in errors and errors.count("\n") == 1


def test_out_that_cannot_be_written(mnist, tmp_path, monkeypatch, capfd):
    (tmp_path / "file").touch()
    assert run_here(monkeypatch, tmp_path / "file" / "out", "--data", mnist) == 2
    errors = capfd.readouterr().err
    assert errors.count("\n") == 1 and "file/out" in errors


def test_cuda_or_a_clear_error(mnist, tmp_path, monkeypatch, capfd):
    code = run_here(monkeypatch, tmp_path, "--data", mnist, "--device", "cuda", "--batch-size", 4)
    output = capfd.readouterr()
    if torch.cuda.is_available():
        assert code == 0, output.err
        assert "float64, cuda" in output.out
    else:
        assert code == 2
        assert "--device: cuda cannot be used" in output.err.splitlines()[-1]


def test_printed_numbers():
    path = REFERENCE / "reports" / "report1_tables.json"
    table = json.loads(path.read_text())["3.1"]["original"]
    rows = zip(table["epochs"], table["training"], table["test"], strict=True)
    assert {epoch: (a, b) for epoch, a, b in rows} == reports.TABLES["3.1"]["original"]
