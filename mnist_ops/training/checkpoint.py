"""Checkpoints: what is saved of a run, and what must agree where it goes on."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import torch7
from ._files import DamagedFileError, read_torch, write_text, write_torch
from .engine import Criterion
from .metrics import EpochResult

CHECKPOINT = "checkpoint.pt"
# The one before, an epoch older: to go on from where a disk has damaged the newest. It costs as
# much space again and no time, as it is the old file under another name.
BACKUP_CHECKPOINT = "checkpoint.backup.pt"
# Of an earlier run in the same folder.
PREVIOUS_CHECKPOINT = "checkpoint.previous.pt"
LOG = "log.csv"
_CHECKPOINT_FORMAT = 1


#: What every checkpoint holds, beside its optimizers.
_PARTS = {
    "epoch": int,
    "settings": dict,
    "model": dict,
    "generator": dict,
    "torch_rng": Tensor,
    "cuda_rng": list,
    "history": list,
}


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged or belongs to another run; the message says which."""


def read_checked(path: str | os.PathLike[str]) -> Any:
    """What :func:`read_torch` reads.

    Raises:
        CheckpointError: if the file is missing or damaged.
    """
    try:
        return read_torch(path)
    except DamagedFileError:
        raise CheckpointError(f"{path} is damaged or not a checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load what :func:`fit` saved, onto the CPU. Nothing but data is ever unpickled.

    Every byte is compared with the checksums in the file first, which ``torch.load`` does not.

    Raises:
        CheckpointError: if the file is missing, damaged or something else.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"there is no checkpoint at {path}")
    state: dict[str, Any] = read_checked(path)
    if not isinstance(state, dict) or state.get("format") != _CHECKPOINT_FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this version of mnist_ops")
    for name, kind in _PARTS.items():
        if not isinstance(state.get(name), kind):
            raise CheckpointError(f"{path} is not a checkpoint: it holds no {name}")
    return state


def load_latest(folder: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint in a folder that is whole, and where it is.

    That is ``checkpoint.pt`` or, where that is damaged or missing, ``checkpoint.backup.pt``, which
    is an epoch older; a warning says so then.

    Raises:
        CheckpointError: if neither can be used.
    """
    path, backup = Path(folder, CHECKPOINT), Path(folder, BACKUP_CHECKPOINT)
    try:
        return path, load_checkpoint(path)
    except CheckpointError as error:
        try:
            state = load_checkpoint(backup)
        except CheckpointError:
            raise error from None
        warnings.warn(
            f"{error}; going on from {backup}, the state after epoch {state['epoch']}", stacklevel=2
        )
        return backup, state


def _write_log(path: Path, history: Sequence[EpochResult]) -> None:
    """The whole history as CSV: always in step with the checkpoint, whatever was interrupted."""
    columns = [
        column.name
        for column in fields(EpochResult)
        if column.name not in ("curve", "confusion", "train_confusion")
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([getattr(result, name) for name in columns] for result in history)
    write_text(path, text.getvalue())


@dataclass
class TrainingState:
    """Everything that changes while training, in one piece to save and restore."""

    model: nn.Module
    optimizers: dict[int, torch.optim.Optimizer]
    generator: torch7.Generator
    settings: dict[str, Any]
    definition: dict[str, Any]
    history: list[EpochResult]

    def save(self, folder: Path, keep: str = BACKUP_CHECKPOINT) -> None:
        """Write the checkpoint and the log; the checkpoint before stays under the name ``keep``."""
        states = {first: one.state_dict() for first, one in self.optimizers.items()}
        state = {
            "format": _CHECKPOINT_FORMAT,
            "epoch": len(self.history),
            "settings": self.settings,
            "definition": self.definition,
            "model": self.model.state_dict(),
            **({"optimizer": states[1]} if len(states) == 1 else {"optimizers": states}),
            "generator": self.generator.get_state(),
            # PyTorch's own generators serve torch.nn.Dropout and users' transforms.
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            "history": [asdict(result) for result in self.history],
        }
        write_torch(folder / CHECKPOINT, state, folder / keep)
        _write_log(folder / LOG, self.history)

    def restore(self, folder: Path) -> None:
        """Go on from the folder's latest checkpoint, if it is of the same run."""
        path, state = load_latest(folder)
        saved = state["settings"]
        for name in sorted(saved.keys() | self.settings.keys()):
            _compare(path, name, saved.get(name), self.settings.get(name))
        try:
            states = state["optimizers"] if "optimizers" in state else {1: state["optimizer"]}
            # What has not been in charge yet may still change: one run can go on in many ways.
            used, known = (
                sorted(first for first in each if first <= max(1, state["epoch"]))
                for each in (states, self.optimizers)
            )
            if used != known:
                raise CheckpointError(
                    f"{path} was made with optimizers from epochs {listed(used)}, "
                    f"this run has them from {listed(known)}"
                )
            then = state.get("definition", {})  # missing where an earlier version saved
            options, before = (each.get("optimizers", {}) for each in (self.definition, then))
            pairs = [(options[first], before.get(first, {})) for first in used]
            for ours, theirs in [(self.definition, then), *pairs]:
                for name, now in ours.items():
                    if name != "optimizers":
                        _compare(path, name, theirs.get(name, now), now)
            history = [EpochResult(**result) for result in state["history"]]
            self.model.load_state_dict(state["model"])
            for first in used:
                self.optimizers[first].load_state_dict(states[first])
            self.generator.set_state(state["generator"])
            torch.set_rng_state(state["torch_rng"])
            if state["cuda_rng"] and torch.cuda.is_available():
                torch.cuda.set_rng_state_all(state["cuda_rng"])
        except CheckpointError:
            raise
        except Exception as error:  # a state of another network, or one that nobody saved like this
            plain = isinstance(error, (RuntimeError, ValueError)) and str(error)
            reason = str(error).splitlines()[0] if plain else repr(error)
            raise CheckpointError(f"{path} does not fit this network: {reason}") from None
        if len(history) != state["epoch"]:
            raise CheckpointError(
                f"{path} is not a checkpoint: its history has {len(history)} epochs, "
                f"not {state['epoch']}"
            )
        self.history[:] = history
        if path.name != CHECKPOINT:  # the damaged one must not become the backup
            os.replace(path, folder / CHECKPOINT)
        _write_log(folder / LOG, self.history)


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def _compare(path: Path, name: str, then: Any, now: Any) -> None:
    """Refuse to go on with something else than what ``path`` was made with."""
    if then == now:
        return
    if name in ("network", "training data", "test data"):
        raise CheckpointError(f"{path} was made with another {name}: train in another folder")
    raise CheckpointError(
        f"{path} was made with {name} = {then}, this run has {now}: "
        "resume with the same settings or train in another folder"
    )


def _hash(*tensors: Tensor) -> str:
    """Of the tensors' values: a quarter of a second for the reports' training set."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(values.numpy().data)
    return digest.hexdigest()


def _name(thing: Any) -> str:
    """What a criterion or a transform is, as far as it tells the same in every process."""
    if isinstance(thing, nn.Module):
        return _ADDRESS.sub("", str(thing))
    name = getattr(thing, "__qualname__", type(thing).__name__)
    return "a function" if "<" in name else name


def describe_run(
    model: nn.Module,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    optimizers: Mapping[int, torch.optim.Optimizer],
    criterion: Criterion,
    batch_size: int,
    transform: Callable[[Tensor], Tensor] | None,
) -> dict[str, Any]:
    """What defines a run's results beside its state, as numbers and strings."""
    changing = ("params", "param_names", "steps")
    named = {}
    for first, one in optimizers.items():
        options: dict[str, Any] = {"optimizer": type(one).__name__}
        for i, group in enumerate(one.param_groups):
            for key, value in group.items():
                plain = value is None or type(value) in (bool, int, float, str)
                if key not in changing:
                    label = key if len(one.param_groups) == 1 else f"{key} of group {i}"
                    options[label] = value if plain else _ADDRESS.sub("", repr(value))
        named[first] = options
    return {
        "network": _ADDRESS.sub("", str(model)),
        "dtype": str(next(model.parameters()).dtype),
        "training data": _hash(*train),
        "test data": _hash(*test),
        "criterion": _name(criterion),
        "batch size": batch_size,
        "transform": _name(transform) if isinstance(transform, nn.Module) else None,
        "optimizers": named,
    }


def listed(numbers: Sequence[int]) -> str:
    """Numbers with commas between them."""
    return ", ".join(map(str, numbers))
