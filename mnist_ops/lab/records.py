"""Runs as plain files: ``run.json`` in a run's folder, ``results.json`` of all of them.

Such a file may come from anybody, a disk may have damaged it, and names in it become paths: whoever
reads one gets all of it checked, or a :class:`RunError` of one line that says what is wrong where.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..mnist import data

__all__ = [
    "MNIST",
    "RunError",
    "check",
    "data_identity",
    "difference",
    "folder",
    "kind_of_device",
    "of_mnist",
    "read_json",
    "read_results",
    "read_run",
]

#: What :func:`data_identity` says of the official digits.
MNIST = "MNIST"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")


class RunError(RuntimeError):
    """A folder of results cannot be used as asked; the message says why and what to do."""


# --- The structure of files --------------------------------------------------------------------


class Kind(NamedTuple):
    """A kind of value: what it is called, and whether a value is one."""

    words: str
    accepts: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # False for NaN


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_nested(value: Any, depth: int = 6) -> bool:
    if isinstance(value, list):
        return depth > 0 and all(_is_nested(one, depth - 1) for one in value)
    return _is_number(value)


def _is_square(value: Any) -> bool:
    rows = isinstance(value, list) and all(isinstance(row, list) for row in value)
    return rows and all(len(row) == len(value) and all(map(_is_count, row)) for row in value)


def optional(kind: Kind) -> Kind:
    """The same, or null."""
    return Kind(f"{kind.words} or null", lambda value: value is None or kind.accepts(value))


TEXT = Kind("a text", lambda value: isinstance(value, str))
NUMBER = Kind("a finite number", _is_number)
NUMBERS = Kind("a list of finite numbers", lambda v: type(v) is list and all(map(_is_number, v)))
COUNT = Kind("an integer from 0 on", _is_count)
TABLE = Kind("an object", lambda value: isinstance(value, Mapping))
ANY = Kind("anything", lambda value: True)
_ACCURACY = Kind("an accuracy in %", lambda value: _is_number(value) and 0 <= value <= 100)
_SAFE = Kind("a plain name", lambda v: isinstance(v, str) and _NAME.fullmatch(v) is not None)
_DTYPE = Kind("float64 or float32", lambda value: value in ("float64", "float32"))
_LIMIT = Kind("an integer from 1 on", lambda value: _is_count(value) and value >= 1)
_CONFUSION = Kind("a square of counts", _is_square)

#: One run: what identifies it, what defines it, and its epochs.
RUN: dict[str, Any] = {
    "experiment": _SAFE,
    "seed": COUNT,
    "dtype": _DTYPE,
    "device": TEXT,
    "limit": optional(_LIMIT),
    "perturbed_weight": optional(COUNT),
    "?data": TEXT,
    "engine": TEXT,
    "epochs_wanted": COUNT,
    "settings": TABLE,
    "epochs": [
        {
            "epoch": COUNT,
            "train_accuracy": _ACCURACY,
            "test_accuracy": _ACCURACY,
            "train_loss": optional(NUMBER),
            "test_loss": optional(NUMBER),
            "learning_rate": optional(NUMBER),
            "curve": NUMBERS,
            "confusion": _CONFUSION,
            "?train_confusion": _CONFUSION,
        }
    ],
    "?filters": Kind("nested lists of numbers", _is_nested),
    "?mistakes": [{"index": COUNT, "true": COUNT, "predicted": COUNT, "?confidence": NUMBER}],
}
_RESULTS = {"format": COUNT, "?environment": TABLE, "?options": TABLE, "runs": [RUN]}


def _wrong(value: Any, shape: Any) -> str | None:
    """Where and how a value differs from a shape; None where it does not."""
    if isinstance(shape, dict):
        if not isinstance(value, Mapping):
            return f": expected an object, got {_show(value)}"
        for key, inner in shape.items():
            name = key.lstrip("?")
            if name not in value:
                if key == name:
                    return f": {name} is missing"
            elif wrong := _wrong(value[name], inner):
                return f", {name}{wrong}"
        return None
    if isinstance(shape, list):
        if not isinstance(value, (list, tuple)):
            return f": expected a list, got {_show(value)}"
        for i, one in enumerate(value):
            if wrong := _wrong(one, shape[0]):
                return f"[{i}]{wrong}"
        return None
    return None if shape.accepts(value) else f": expected {shape.words}, got {_show(value)}"


def _show(value: Any) -> str:
    """A value in a few characters."""
    text = json.dumps(value, default=lambda other: f"a {type(other).__name__}")
    return text if len(text) <= 60 else f"{text[:57]}..."


def check(value: Any, shape: Any, where: str) -> Any:
    """The value that JSON gave, if it has this shape.

    A shape is a :class:`Kind`; a list of one shape, that of all items; or a dict of shapes, of
    which those whose key begins with ``?`` may be missing.

    Raises:
        RunError: if it has not; the message begins with ``where`` and says in which place.
    """
    if wrong := _wrong(value, shape):
        raise RunError(f"{where}{wrong}")
    return value


# --- Reading -----------------------------------------------------------------------------------


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def read_json(path: Path, shape: Any = ANY) -> Any:
    """The content of a JSON file of UTF-8, checked with :func:`check`.

    Raises:
        RunError: for anything else, or if the file cannot be read.
    """
    try:
        value = json.loads(path.read_bytes().decode("utf-8"), parse_constant=_constant)
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        reason = str(error).splitlines()[0] if isinstance(error, ValueError) else "too deep"
        raise RunError(f"{path} is damaged or not JSON: {reason}") from None
    return check(value, shape, str(path))


def _check_epochs(run: Mapping[str, Any], where: str) -> None:
    for i, epoch in enumerate(run["epochs"], 1):
        if epoch["epoch"] != i:
            raise RunError(f"{where}, epochs: expected epoch {i}, got {epoch['epoch']}")


def read_run(path: Path) -> dict[str, Any]:
    """A ``run.json``, checked.

    Raises:
        RunError: if it is damaged, or the record of a run that belongs elsewhere.
    """
    run: dict[str, Any] = read_json(path, RUN)
    _check_epochs(run, str(path))
    if folder(Path(), run).parts[1:] != path.parent.parts[-2:]:
        raise RunError(f"{path} is the record of another run: {folder(Path(), run)}")
    return run


def read_results(path: Path) -> dict[str, Any]:
    """A ``results.json``, checked.

    Raises:
        RunError: if it is missing, damaged, of another format, or names one run twice.
    """
    results: dict[str, Any] = read_json(path, _RESULTS)
    if results["format"] != 1:
        raise RunError(f"{path} has format {results['format']}, this version reads format 1")
    seen = set()
    for i, run in enumerate(results["runs"]):
        _check_epochs(run, f"{path}, runs[{i}]")
        if folder(Path(), run) in seen:
            raise RunError(f"{path}, runs[{i}]: {folder(Path(), run)} is there twice")
        seen.add(folder(Path(), run))
    return results


# --- What a run is -----------------------------------------------------------------------------


def folder(out: Path, run: Mapping[str, Any]) -> Path:
    """Where under ``out`` a run lives, of which its record, or what identifies it, is given.

    Raises:
        RunError: if the experiment's name, which is a folder's, would lead elsewhere.
    """
    check(run["experiment"], _SAFE, "the name of an experiment")
    weight = run["perturbed_weight"]
    perturbed = "" if weight is None else f"-weight{weight}"
    return out / "runs" / run["experiment"] / f"{run['dtype']}-seed{run['seed']}{perturbed}"


def data_identity(root: str | None) -> str:
    """What tells the data in a folder from any other: :data:`MNIST`, else a checksum.

    Raises:
        DataError: as for :func:`mnist_ops.mnist.data.load`.
    """
    if data.is_mnist(root):
        return MNIST
    sums = "".join(data.checksums(str(root))).encode()
    return f"md5:{hashlib.md5(sums, usedforsecurity=False).hexdigest()}"


def of_mnist(run: Mapping[str, Any]) -> bool:
    """Whether a run used all official digits, so that its accuracies are those of the reports."""
    return run.get("limit") is None and run.get("data", MNIST) == MNIST


def plain(value: Any) -> Any:
    """As JSON keeps it: tuples are lists and all keys texts."""
    return json.loads(json.dumps(value))


def kind_of_device(run: Mapping[str, Any]) -> str:
    """``"cpu"`` or ``"cuda"``: runs on devices of different kinds round differently."""
    return str(run["device"]).partition(":")[0]


def _defining(run: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "seed": run["seed"],
        "limit": run["limit"],
        "perturbed weight": run["perturbed_weight"],
        "device": kind_of_device(run),
        "data": run.get("data", MNIST),
        **plain(run["settings"]),
    }


def difference(
    then: Mapping[str, Any], now: Mapping[str, Any], any_device: bool = False
) -> str | None:
    """The first of a run's defining values that differs: ``limit = 200, this run has None``.

    With ``any_device`` the kind of device may differ.
    """
    old, new = _defining(then), _defining(now)
    for name in {**old, **new}:
        if old.get(name) != new.get(name) and not (any_device and name == "device"):
            return f"{name} = {old.get(name)}, this run has {new.get(name)}"
    return None
