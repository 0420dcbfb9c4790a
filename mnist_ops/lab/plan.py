"""Which runs the reports need, in the order of what they decide; and how long what is left takes.

A plan is data, in ``plan.json``: steps of experiments, seeds and epochs. ``examples/reproduce.py
--plan full --minutes 150 --jobs 2`` works through it as far as there is time.

Each run is in one step only. How far all of them are, on this machine, is in the folder of their
results and in the committed ones, see :func:`mnist_ops.lab.storage.merge`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from . import experiments, records, runner, storage
from .reports import counted
from .reports import read as read_json

__all__ = ["NAMES", "Step", "left", "pace", "read", "tasks"]


@dataclass(frozen=True)
class Step:
    """Runs that decide one question.

    Attributes:
        title: what they are.
        decides: the question.
        experiments: their names.
        seeds: of each experiment.
        epochs: of each run; ``None``: the experiment's own number.
        dtype: ``"float32"`` or ``"float64"``.
        weights: so many runs more of each seed, each with another weight changed by 1e-15.
        seconds: an epoch on one core of the machine that the plan was made on.
    """

    title: str
    decides: str
    experiments: tuple[str, ...]
    seeds: tuple[int, ...]
    epochs: int | None
    dtype: str
    seconds: float
    weights: int = 0


_CONTENT: dict[str, Any] = read_json("plan.json")
#: The plans there are.
NAMES: tuple[str, ...] = tuple(_CONTENT["plans"])


def _names(patterns: Sequence[str]) -> tuple[str, ...]:
    """All experiments that a pattern fits: the patterns' order, then that of the experiments."""
    found: dict[str, None] = {}
    for pattern in patterns:
        fitting = [name for name in experiments.EVERY if fnmatchcase(name, pattern)]
        if not fitting:
            raise ValueError(f"plan.json: no experiment is called {pattern!r}")
        found |= dict.fromkeys(fitting)
    return tuple(found)


def read(name: str) -> list[Step]:
    """The steps of a plan, in their order.

    Raises:
        KeyError: if there is no plan of this name.
    """
    steps = []
    for entry in _CONTENT["plans"][name]:
        rest = dict(entry)
        seeds = rest.pop("seeds")
        names = _names(rest.pop("experiments"))
        first = tuple(range(1, seeds + 1)) if isinstance(seeds, int) else tuple(seeds)
        steps.append(Step(experiments=names, seeds=first, **rest))
    return steps


def tasks(steps: Sequence[Step], **options: Any) -> list[runner.Task]:
    """The runs of these steps, in their order, each once.

    ``options``: ``device``, ``limit`` and ``root`` as for :class:`mnist_ops.lab.runner.Task`;
    ``pace``: how much longer than in the plan an epoch takes here.

    Raises:
        ValueError: if a step wants more epochs of a run than an earlier one.
    """
    return [task for _, task in _by_step(steps, **options)]


def _by_step(
    steps: Sequence[Step],
    device: str = "cpu",
    limit: int | None = None,
    root: str | None = None,
    pace: float = 1.0,
) -> list[tuple[Step, runner.Task]]:
    made: dict[Path, tuple[Step, runner.Task]] = {}
    for step in steps:
        for seed in step.seeds:
            for name in step.experiments:
                e = replace(experiments.EVERY[name], dtype=step.dtype)
                for weight in [None, *range(step.weights)]:
                    task = runner.Task(e, seed, step.epochs or e.epochs, limit, device, weight)
                    share = task.digits_per_epoch / e.training_digits
                    task = replace(task, root=root, seconds=step.seconds * pace * share)
                    _, first = made.setdefault(task.folder(Path()), (step, task))
                    if first.epochs < task.epochs:
                        before = counted(first.epochs, "epoch")
                        raise ValueError(
                            f"plan.json, {step.title}: {task.name} has {before} in an earlier "
                            f"step, {task.epochs} here"
                        )
    return list(made.values())


def pace(todo: Sequence[runner.Task], out: str | Path) -> float:
    """How much longer than ``Task.seconds`` epochs take here: the median of the runs in a folder.

    1 where there is none.
    """
    ratios = []
    for task in todo:
        measured = storage.seconds_per_epoch(task.folder(Path(out)))
        if measured is not None and task.seconds:
            ratios.append(measured / task.seconds)
    return statistics.median(ratios) if ratios else 1.0


def left(steps: Sequence[Step], out: str | Path, **options: Any) -> list[tuple[Step, int, float]]:
    """Each step with the epochs that it still needs and the seconds that these take in turn."""
    runs = storage.collect(out)["runs"]
    known = {records.folder(Path(), run): len(run["epochs"]) for run in runs}
    epochs, seconds = dict.fromkeys(steps, 0), dict.fromkeys(steps, 0.0)
    for step, task in _by_step(steps, **options):
        if known.get(task.folder(Path()), 0) >= task.epochs:
            continue
        # A record without a checkpoint is nothing to go on from.
        e, done = task.experiment, storage.epochs_done(task.folder(Path(out)))
        if e.continues and e.switch is not None:
            done = max(done, e.switch - 1)
        missing = max(0, task.epochs - done)
        epochs[step] += missing
        seconds[step] += missing * task.seconds
    return [(step, epochs[step], seconds[step]) for step in steps]
