"""What a folder of runs holds: their logs and records, all of them in one file, merged with others.

Every run has a folder of its own under ``OUT/runs``; :func:`collect` puts their records together,
as ``OUT/results.json`` has them. A folder that kept only ``results.json`` (one under version
control, say) is as good as one with all its runs, but for their checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import training
from . import experiments, records
from .records import RunError

if TYPE_CHECKING:
    import os

__all__ = ["collect", "epochs_done", "log", "merge", "seconds_per_epoch"]

# A file that nobody has gone on with for so many seconds is one that a killed process left.
_LEFT = 3600


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, the whole file or nothing."""
    training.write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_results(
    path: Path, runs: Sequence[Mapping[str, Any]], others: Mapping[str, Any] | None = None
) -> None:
    """Write a ``results.json``: the runs, and what else it holds."""
    write_json(path, {"format": 1, **(others or {}), "runs": runs})


# --- One run -----------------------------------------------------------------------------------


def log(folder: Path) -> list[training.EpochResult | None]:
    """The complete epochs in the log of the training loop; None for a damaged line."""
    try:
        rows = (folder / training.LOG).read_text(errors="replace").split("\n")[1:-1]
    except OSError:
        return []
    return [_result(row) for row in rows]


def _result(row: str) -> training.EpochResult | None:
    try:
        epoch, *accuracies_and_losses, _, seconds = row.split(",")
        train, test, train_loss, test_loss = map(float, accuracies_and_losses)
        return training.EpochResult(
            int(epoch), train, test, train_loss, test_loss, None, float(seconds), [], []
        )
    except ValueError:
        return None


def epochs_done(folder: Path) -> int:
    """Complete epochs, from the run's log."""
    return len(log(folder))


def seconds_per_epoch(folder: Path) -> float | None:
    """What the last epoch of a run took, from its log."""
    last = (log(folder) or [None])[-1]
    return None if last is None else last.seconds


def epoch_records(history: Sequence[Mapping[str, Any]], details: bool) -> list[dict[str, Any]]:
    """The epochs of a record; with details the training's confusion matrices, too."""
    made = []
    for result in history:
        epoch = {name: result[name] for name in ("epoch", "train_accuracy", "test_accuracy")}
        for name in ("train_loss", "test_loss", "learning_rate"):
            # JSON has neither NaN nor infinity: the loss of a run that diverged becomes null.
            value = result[name]
            epoch[name] = value if value is not None and math.isfinite(value) else None
        epoch["curve"] = [round(value, 4) for value in result["curve"]]
        epoch["confusion"] = result["confusion"]
        if details and result.get("train_confusion"):
            epoch["train_confusion"] = result["train_confusion"]
        made.append(epoch)
    return made


def difference_of_settings(saved: Mapping[str, Any], definition: Mapping[str, Any]) -> str | None:
    """The same for a checkpoint, which knows no device and of the data no more than their mean."""
    keys = ("seed", "limit", "perturbed_weight")
    rest = {name: saved.get(name) for name in definition["settings"]}
    then = {**definition, **{key: saved.get(key) for key in keys}, "settings": rest}
    return records.difference(then, definition)


# --- All of them ---------------------------------------------------------------------------------


def known(out: Path) -> dict[Path, dict[str, Any]]:
    """The record of every run in a folder: its ``run.json``, or else what ``results.json`` says.

    Raises:
        RunError: if one is damaged, or leads out of the folder.
    """
    known = {}
    if (out / "results.json").exists():
        for run in records.read_results(out / "results.json")["runs"]:
            known[records.folder(out, run)] = run
    for path in sorted(out.glob("runs/*/*/run.json")):
        known[path.parent] = records.read_run(path)
    for folder in known:
        check_inside(folder, out)
    return known


def check_inside(folder: Path, out: Path) -> None:
    """Refuse a folder that a link leads out of ``out``."""
    if not folder.resolve().is_relative_to(out):
        raise RunError(f"{folder} is a link that leads out of {out}, to {folder.resolve()}")


def sweep(out: Path) -> None:
    """Remove what killed processes left; a run's half-written files are its training loop's."""
    for path in (*out.glob(".*.part"), *out.glob("figures/.*.part")):
        with contextlib.suppress(OSError):  # another process may finish it just now
            if path.stat().st_mtime < time.time() - _LEFT:
                path.unlink()


def restore(known: Mapping[Path, dict[str, Any]]) -> None:
    """Give each run that only ``results.json`` knows a ``run.json`` again, lest it be forgotten."""
    for folder, record in known.items():
        if not (folder / "run.json").exists():
            # Whoever is at work there writes it.
            with contextlib.suppress(training.FolderInUseError), training.locked(folder):
                write_json(folder / "run.json", record)


def collect(out: str | os.PathLike[str]) -> dict[str, Any]:
    """All runs in a folder, in a fixed order, those under way up to their last complete epoch."""
    runs = []
    for path in sorted(Path(out).glob("runs/*/*/run.json")):
        record = records.read_run(path)
        if epochs_done(path.parent) > len(record["epochs"]):
            _add_epochs(record, path.parent)
        runs.append(record)
    return {"format": 1, "runs": _in_order(runs)}


def _in_order(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    order = {name: i for i, name in enumerate(experiments.EXPERIMENTS)}
    return sorted(
        runs,
        key=lambda run: (
            order.get(run["experiment"], len(order)),
            run["experiment"],
            run["dtype"],
            run["seed"],
            -1 if run["perturbed_weight"] is None else run["perturbed_weight"],
        ),
    )


def merge(out: str | os.PathLike[str], results: str | os.PathLike[str]) -> int:
    """Put the runs of a folder into a file of results, and give the folder what only the file has.

    Of a run that both have the one with more epochs stays, whole: epochs are never mixed. No run is
    lost or there twice, however often, and by however many processes, this is done.

    Returns:
        How many runs in the file are new or have more epochs than before.

    Raises:
        RunError: if a record is damaged, or a run is defined differently there and here. Nothing
            has been written then.
    """
    from filelock import FileLock

    out, path = Path(out).resolve(), Path(results).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        there = records.read_results(path) if path.exists() else {"runs": []}
        runs = {records.folder(out, run): run for run in there["runs"]}
        # Of whoever merged last, as earlier versions wrote it; anything else stays.
        others = {name: there[name] for name in there if name not in ("environment", "runs")}
        ours = {records.folder(out, run): run for run in collect(out)["runs"]}
        for folder, run in known(out).items():
            if not (folder / "run.json").exists():
                ours[folder] = run
        changed = 0
        for folder, run in ours.items():
            if not run["epochs"]:
                continue
            before = runs.get(folder)
            if before and (found := records.difference(before, run, True)):
                raise RunError(f"{folder.name} of {run['experiment']}: {path} has it with {found}")
            if before is None or len(run["epochs"]) > len(before["epochs"]):
                runs[folder] = run
                changed += 1
        missing = {
            folder: run
            for folder, run in runs.items()
            if folder not in ours or len(ours[folder]["epochs"]) < len(run["epochs"])
        }
        if changed:
            write_results(path, _in_order(list(runs.values())), others)
    for folder, run in missing.items():
        check_inside(folder, out)
        with contextlib.suppress(training.FolderInUseError), training.locked(folder):
            write_json(folder / "run.json", run)
    return changed


def _add_epochs(record: dict[str, Any], folder: Path) -> None:
    """The epochs of a run under way, from its checkpoint; a warning where it cannot be used."""
    lost = "its last epochs are missing in the results"
    try:
        path, state = training.load_latest(folder)
        if found := difference_of_settings(state["settings"], record):
            raise RunError(f"{path} was made with {found}")
        experiment = experiments.EVERY.get(record["experiment"])
        epochs = epoch_records(state["history"], experiment is not None and experiment.details)
        records.check({**record, "epochs": epochs}, records.RUN, str(folder))
    except (training.CheckpointError, RunError) as error:
        warnings.warn(f"{error}: {lost}", stacklevel=3)
    except (KeyError, TypeError, ValueError) as error:
        warnings.warn(f"{path} is not a checkpoint ({error!r}): {lost}", stacklevel=3)
    else:
        if len(epochs) > len(record["epochs"]):
            record["epochs"] = epochs
