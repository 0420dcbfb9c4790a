"""What the scripts have in common: how they end, whatever ends them.

A user sees one line and an exit code: 2 for an error, 130 after Ctrl-C, 143 after ``kill``, 1 where
something was done and failed. A reader that stops reading, as ``head`` does, is no error.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

__all__ = ["COUNT", "add", "device", "parser", "repository", "run", "whole_number"]


def parser(description: str, **options: Any) -> argparse.ArgumentParser:
    """A parser that calls the program as errors do, whichever way it was started."""
    return argparse.ArgumentParser(_program(), description=description, **options)


def _program() -> str:
    return Path(sys.argv[0]).name


def repository() -> Path | None:
    """The checkout that this package, or the script that runs, is in; None where neither is."""
    places = [Path(__file__).resolve().parents[2]]
    script = Path(sys.argv[0]).resolve()
    if script.parent.name == "examples":
        places.append(script.parents[1])
    return next((place for place in places if (place / "csrc").is_dir()), None)


def device(text: str) -> str:
    """A ``type`` for :mod:`argparse`: a CPU or GPU that can be used."""
    import torch

    try:
        if torch.empty(0, device=text).device.type not in ("cpu", "cuda"):
            raise RuntimeError("it is neither a CPU nor a GPU with CUDA")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text} cannot be used: {reason}") from None
    return text


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """A ``type`` for :mod:`argparse`: an integer in this range."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"invalid integer: {text!r}") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"must be {low} or more, got {value}")
        if value > high:
            raise argparse.ArgumentTypeError(f"must be {high} or less, got {value}")
        return value

    return convert


#: Any count of images, epochs or threads.
COUNT = whole_number(1, 10**9)
_OPTIONS: dict[str, dict[str, Any]] = {
    "--device": {"type": device, "default": "cpu", "help": "cpu, cuda or cuda:N"},
    "--threads": {"type": COUNT, "help": "CPU threads; PyTorch's choice unless given"},
    "--data": {"type": Path, "help": "a folder with MNIST's four files"},
    "--limit": {"type": COUNT, "help": "use the first LIMIT digits of each split"},
    "--no-progress": {"action": "store_true", "help": "no progress bars"},
}


def add(group: Any, *names: str) -> None:
    """Add options that several scripts have."""
    for name in names:
        group.add_argument(name, **_OPTIONS[name])


def _end_of_output(stream: TextIO | None) -> None:
    """Write what is left; what nobody reads any more goes nowhere, at the interpreter's end too."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        raise


def run(script: Callable[[], int | None], expected: Sequence[type[Exception]] = ()) -> int:
    """Run a script's main function, and turn what can go wrong into one line and an exit code.

    ``kill`` ends it as Ctrl-C does, so that it leaves neither workers nor half a file.

    Args:
        script: returns the exit code, None for 0.
        expected: errors, beside OSError and ValueError, that speak for themselves.
    """
    for stream in (sys.stdout, sys.stderr):
        # An ASCII terminal shows \xb5 for a letter that it does not have.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = one_line
    stopped: list[int] = []

    def stop(number: int, frame: object) -> None:
        stopped.append(number)
        raise KeyboardInterrupt

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, stop)
    program = _program()
    errors: tuple[type[Exception], ...] = (OSError, ValueError, *expected)
    try:
        try:
            return script() or 0
        finally:
            _end_of_output(sys.stdout)
    except BrokenPipeError:
        return 128 + 13  # as if the signal SIGPIPE had ended it
    except errors as error:
        print(f"{program}: error: {_message(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted", file=sys.stderr)
        return 128 + (stopped[0] if stopped else signal.SIGINT)


def _message(error: BaseException) -> str:
    """One line, without Python's error numbers."""
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}{error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def one_line(message: Warning | str, *_: object, **__: object) -> str:
    """A warning as a user reads it, for :data:`warnings.formatwarning`."""
    return f"warning: {' '.join(str(message).split())}\n"
