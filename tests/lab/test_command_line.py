"""How scripts end: pipes that close, terminals without letters, signals, errors of one line."""

import io
import os
import runpy
import signal
import sys
import warnings
from pathlib import Path

import pytest

from mnist_ops.lab import __main__, command_line


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(sys, "argv", ["/a/script.py"])
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def end_with(error):
    def script():
        raise error

    return script


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("two\n  lines"), 2, "script.py: error: two lines\n"),
        (KeyError("k"), 2, "script.py: error: 'k'\n"),
        (OSError(28, "No space left on device"), 2, "script.py: error: No space left on device\n"),
        (FileNotFoundError(2, "no such file", "x"), 2, "script.py: error: x: no such file\n"),
        (OSError("odd"), 2, "script.py: error: odd\n"),
        (OSError(), 2, "script.py: error: OSError\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (KeyboardInterrupt("interrupted; go on"), 130, "interrupted; go on\n"),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
    ],
)
def test_errors(capsys, error, code, line):
    assert command_line.run(end_with(error), [KeyError]) == code
    assert capsys.readouterr().err == line


def test_what_is_not_expected_is_a_defect(capsys):
    with pytest.raises(KeyError):
        command_line.run(end_with(KeyError("k")))
    with pytest.raises(SystemExit):
        command_line.run(end_with(SystemExit(2)))


def test_exit_codes():
    assert [command_line.run(lambda code=code: code) for code in (None, 0, 1)] == [0, 0, 1]


@pytest.mark.parametrize("text", ["short", "long " * 10_000])
def test_a_pipe_that_nobody_reads(monkeypatch, capfd, text):
    """Found out when it is written or, where it fits into the buffer, at the end."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert command_line.run(lambda: print(text)) == 141
        monkeypatch.undo()
    assert capfd.readouterr().err == ""


def test_an_output_that_is_full(monkeypatch, capfd):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert command_line.run(lambda: print("x")) == 2
        monkeypatch.undo()
    assert capfd.readouterr().err == "script.py: error: No space left on device\n"


def test_no_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert command_line.run(lambda: print("x")) == 0


def test_a_terminal_without_letters(monkeypatch):
    bytes_of_it = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_of_it, encoding="ascii"))
    assert command_line.run(lambda: print("1 µs ± \udcff")) == 0
    assert bytes_of_it.getvalue() == b"1 \\xb5s \\xb1 \\udcff\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_kill_ends_it_as_ctrl_c_does(capsys, number):
    signal.signal(number, signal.SIG_DFL)
    assert command_line.run(lambda: os.kill(os.getpid(), number)) == 128 + number
    assert capsys.readouterr().err == "interrupted\n"


def test_what_is_ignored_stays_ignored():
    """As under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert command_line.run(lambda: os.kill(os.getpid(), signal.SIGHUP)) == 0


def test_warnings_are_lines(capfd):
    def script():
        warnings.warn_explicit("a\nb", UserWarning, "file.py", 1)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *args, **_: sys.stderr.write(warnings.formatwarning(*args))
        assert command_line.run(script) == 0
    assert capfd.readouterr().err == "warning: a b\n"


def test_whole_numbers():
    convert = command_line.whole_number(1, 5)
    assert convert("5") == 5
    for text, words in (
        ("0", "1 or more, got 0"),
        ("6", "5 or less"),
        ("x", "invalid integer: 'x'"),
    ):
        with pytest.raises(Exception, match=words):
            convert(text)


def test_the_examples_as_commands(tmp_path, monkeypatch, capsys):
    """``python -m mnist_ops.lab``: one name for the scripts, wherever the package is."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lab", *arguments])
        try:
            code = __main__.main()
        except SystemExit as stop:  # argparse's way out
            code = stop.code
        return code, *capsys.readouterr()

    code, out, _ = run("--help")
    assert code == 0 and all(f"  {name}" in out for name in ("train", "reproduce", "predict"))
    code, out, errors = run("guess")
    assert code == 2 and out == "" and errors.startswith("usage: python -m mnist_ops.lab")
    code, out, errors = run("reproduce", "--experiment", "mse", "--limit", "10", "--dry-run")
    assert (code, errors) == (0, "") and "1 run, 30 digits" in out
    code, out, errors = run("predict", "--model", "none", "--images", "none")
    assert code == 2 and errors.startswith("mnist_ops.lab predict: error: none cannot be read")
    code, out, errors = run("train", "--epochs", "0")
    assert code == 2 and errors.startswith("usage: mnist_ops.lab train [-h]")
    assert errors.splitlines()[-1].endswith("argument --epochs: must be 1 or more, got 0")


@pytest.mark.parametrize("name", ["train_mnist", "reproduce", "predict"])
def test_the_examples_say_how_they_are_used(name, monkeypatch, capsys):
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    assert stop.value.code == 0 and f"usage: {name}.py [-h]" in capsys.readouterr().out


def test_checkout(monkeypatch, tmp_path):
    """A package that was installed finds the checkout by the script that uses it."""
    root = Path(__file__).parents[2]
    for place, found in ((root, root), (tmp_path / "a", None)):
        here = place / "mnist_ops" / "lab" / "command_line.py"
        monkeypatch.setattr(command_line, "__file__", str(here))
        assert command_line.repository() == found
    monkeypatch.setattr(sys, "argv", [str(root / "examples" / "reproduce.py")])
    assert command_line.repository() == root
