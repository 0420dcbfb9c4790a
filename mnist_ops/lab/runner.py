"""Run many experiments: side by side, safe to kill, every result in plain files.

Each run (:class:`Task`) has a folder of its own under ``OUT/runs`` with a checkpoint, a log and
``run.json``; :mod:`mnist_ops.lab.storage` puts all of them together in ``OUT/results.json``.
Whatever is killed whenever: :func:`run_all` with ``resume=True`` continues every run after its last
complete epoch and ends with the same ``results.json``.

What is there is taken for what is asked for only where all that defines a run is the same: the
experiment with its settings, seed, dtype, limit, perturbed weight, kind of device, and the data,
by their content. Epochs do not define it: a run that has fewer than are asked for goes on, one that
has more stays as it is, as its first epochs are those of a shorter one.

Runs are spread with joblib. On this machine each worker takes its share of the cores; with a
cluster's backend around :func:`run_all` the same runs go there, as long as the folder is on a file
system that all machines see; each record names the machine that made it::

    with dask.distributed.Client("scheduler:8786"), joblib.parallel_config(backend="dask"):
        runner.run_all(plan.tasks(plan.read("full")), "/data/runs", jobs=64, resume=True)

Workers on this machine end with the process that hands out the work, however that one ends.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import training
from ..mnist.data import DataError
from ..training.loop import progress_bar
from . import command_line, experiments, records, storage
from .experiments import Experiment
from .records import RunError

__all__ = ["RunError", "Task", "commit_of", "processor", "run_all", "tasks"]

_WORST_MISTAKES = 24
# How often the bars are drawn, and a worker looks whether it is still wanted.
_SECONDS = 0.5


@dataclass(frozen=True)
class Task:
    """One run: an experiment with everything that may differ from run to run.

    Attributes:
        experiment: what is trained.
        seed: of its random numbers.
        epochs: how far.
        limit: digits used of each split, ``None``: all.
        device: cpu, cuda or cuda:N.
        perturbed_weight: see :func:`mnist_ops.lab.experiments.build`.
        root: a folder with other data.
        seconds: how long an epoch takes, as far as known before the first; of use with a deadline.
    """

    experiment: Experiment
    seed: int = 1
    epochs: int = 1
    limit: int | None = None
    device: str = "cpu"
    perturbed_weight: int | None = None
    root: str | None = None
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """For people: experiment, seed and what else is out of the ordinary."""
        weight = self.perturbed_weight
        perturbed = "" if weight is None else f", weight {weight} perturbed"
        return f"{self.experiment.name}, {self.experiment.dtype}, seed {self.seed}{perturbed}"

    def folder(self, out: Path) -> Path:
        """Where under ``out`` the run lives."""
        name, dtype = self.experiment.name, self.experiment.dtype
        keys = {"experiment": name, "dtype": dtype, "seed": self.seed}
        return records.folder(out, keys | {"perturbed_weight": self.perturbed_weight})

    @property
    def digits_per_epoch(self) -> int:
        """Training digits in one epoch."""
        most = self.experiment.training_digits
        return most if self.limit is None else min(self.limit, most)

    @property
    def digits(self) -> int:
        """Training digits in all epochs."""
        return self.epochs * self.digits_per_epoch


def tasks(
    chosen: Sequence[Experiment],
    seeds: int = 1,
    epochs: int | None = None,
    limit: int | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    perturbations: int = 0,
    root: str | None = None,
) -> list[Task]:
    """Every run of these experiments with seeds 1 to ``seeds``; ``perturbations`` more of each.

    ``epochs`` and ``dtype`` replace the experiments' own; the others are those of :class:`Task`.
    """
    made = []
    for experiment in chosen:
        if dtype is not None:
            experiment = replace(experiment, dtype=dtype)
        far = experiment.epochs if epochs is None else epochs
        for seed in range(1, seeds + 1):
            for weight in [None, *range(perturbations)]:
                made.append(Task(experiment, seed, far, limit, device, weight, root))
    return made


def commit_of(repository: Path | None) -> str | None:
    """The commit of a git checkout, and whether it has been changed; None where there is none."""
    if repository is None:
        return None
    git = ["git", "-C", str(repository)]
    options: dict[str, Any] = {"capture_output": True, "encoding": "utf-8", "check": True}
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], **options).stdout.strip()
        # What runs leave is no part of what they were made with.
        others = ["status", "--porcelain", "-uno", "--", ":!benchmarks/results"]
        changed = subprocess.run([*git, *others], **options).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit} with changes" if changed else commit


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _machine(device: str) -> str:
    """The processor of this machine, and the GPU if that does the work."""
    machine = f"{processor()}, {os.cpu_count()} cores"
    if torch.device(device).type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}; {machine}"
    return machine


def _definition(task: Task, identity: str) -> dict[str, Any]:
    """What a run is; the data by their :func:`mnist_ops.lab.records.data_identity`."""
    return {
        "experiment": task.experiment.name,
        "seed": task.seed,
        "dtype": task.experiment.dtype,
        "device": task.device,
        "limit": task.limit,
        "perturbed_weight": task.perturbed_weight,
        "data": identity,
        "settings": task.experiment.settings(),
    }


def _describe(task: Task, identity: str, commit: str | None) -> dict[str, Any]:
    """What is known of a run before it starts, on the machine that makes it."""
    return _definition(task, identity) | {
        "engine": experiments.describe_engine(task.experiment, task.device),
        "epochs_wanted": task.epochs,
        "commit": commit,
        "machine": _machine(task.device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _details(task: Task, model: nn.Sequential) -> dict[str, Any]:
    """The first layer's filters and the test digits that were most confidently wrong."""
    e = task.experiment
    digits = experiments.digits(e.data_kernel, task.root, task.limit, e.small, e.validation)
    parameter = next(model.parameters())
    outputs: list[Tensor] = []
    model.eval()
    with torch.no_grad():
        for batch in digits.test_images.split(100):
            outputs.append(model(batch.to(parameter.device, parameter.dtype)).double().cpu())
    # Log-probabilities are their own log-softmax; scores become probabilities.
    confidence, predicted = torch.cat(outputs).softmax(-1).max(-1)
    wrong = (predicted != digits.test_labels).nonzero().squeeze(1)
    order = wrong[confidence[wrong].argsort(descending=True, stable=True)][:_WORST_MISTAKES]
    mistakes = [
        {
            "index": i,
            "true": int(digits.test_labels[i]),
            "predicted": int(predicted[i]),
            "confidence": round(float(confidence[i]), 6),
        }
        for i in order.tolist()
    ]
    weights = parameter.detach().double().cpu()
    rounded = [float(f"{weight:.4g}") for weight in weights.flatten().tolist()]
    return {"filters": np.reshape(rounded, weights.shape).tolist(), "mistakes": mistakes}


def _is_complete(task: Task, record: Mapping[str, Any] | None) -> bool:
    return record is not None and len(record["epochs"]) >= task.epochs


def _check_same(
    task: Task, identity: str, out: Path, record: Mapping[str, Any] | None, any_device: bool = False
) -> None:
    """Refuse what is there of a run, record or checkpoint, if it is that of another one.

    Raises:
        RunError: as said; the message names the first difference.
    """
    folder = task.folder(out)
    definition = _definition(task, identity)
    found = None if record is None else records.difference(record, definition, any_device)
    if found is None and not _is_complete(task, record):
        # One that is damaged is a matter for the training loop, which may know an older one.
        with warnings.catch_warnings(), contextlib.suppress(training.CheckpointError):
            warnings.simplefilter("ignore")
            saved = training.load_latest(folder)[1]["settings"]
            found = storage.difference_of_settings(saved, definition)
    if found is not None:
        raise RunError(
            f"{task.name}: what {folder} holds was made with {found}: "
            "ask for the same again, or choose another folder"
        )


def _start_worker(parent: int) -> None:
    """What a process of joblib's does first.

    Ctrl-C is for the process that hands out the work; it stops the others. However that one ends,
    this one does not stay behind: half a second later it has ended, and its locks with it.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.formatwarning = command_line.one_line

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


#: A run and what its data are.
_Job = tuple[Task, str]


class _OutOfTimeError(Exception):
    """Another epoch would not end before the deadline."""


@dataclass(frozen=True)
class _Work:
    """What all runs of one :func:`run_all` have in common."""

    out: Path
    resume: bool
    commit: str | None
    deadline: float
    any_device: bool = False

    def check_time(self, seconds: float) -> None:
        """Raise unless there is time for so many seconds more."""
        if time.time() + seconds > self.deadline:
            raise _OutOfTimeError


def _run_group(group: Sequence[_Job], work: _Work, threads: int) -> list[str]:
    """Runs that belong together, in whatever process joblib chose; what went wrong, as text."""
    torch.set_num_threads(threads)
    failures: list[str] = []
    training.side_by_side([_run(job, work, failures) for job in group])
    return failures


def _run(job: _Job, work: _Work, failures: list[str]) -> training.Loop[None]:
    """One run. What went wrong is added to the failures, as text."""
    task, identity = job
    out, folder = work.out, task.folder(work.out)
    path = folder / "run.json"
    try:
        with training.locked(folder):
            known = records.read_run(path) if path.exists() else None
            # Another process may have been here since everything was compared.
            _check_same(task, identity, out, known, work.any_device)
            if _is_complete(task, known):
                return
            work.check_time(storage.seconds_per_epoch(folder) or task.seconds)
            resume = work.resume and _has_checkpoint(folder)
            record = _describe(task, identity, work.commit)
            if known and records.kind_of_device(known) != records.kind_of_device(record):
                resume = False
            # What is there stays until there is more: a run that begins anew may fail at once.
            written = known is None and not resume
            if written:
                storage.write_json(path, record | {"epochs": []})

            def on_epoch(result: training.EpochResult) -> None:
                nonlocal written
                if not written:
                    before = known["epochs"] if resume and known is not None else []
                    storage.write_json(path, record | {"epochs": before})
                    written = True
                _keep_checkpoint(task, folder, result.epoch)
                if result.epoch < task.epochs:
                    work.check_time(result.seconds)

            history, model = yield from experiments.training_loop(
                task.experiment,
                task.seed,
                task.epochs,
                task.limit,
                task.device,
                folder,
                resume,
                task.perturbed_weight,
                task.root,
                _checkpoint_to_begin_with(task, out),
                verbose=False,
                progress=False,
                on_epoch=on_epoch,
            )
            epochs = [asdict(result) for result in history]
            record["epochs"] = storage.epoch_records(epochs, task.experiment.details)
            if task.experiment.details:
                record |= _details(task, model)
            training.write_torch(folder / "model.pt", model.state_dict())
            storage.write_json(path, record)
    except _OutOfTimeError:
        pass
    except Exception as error:  # one run that fails must not take the others with it
        failures.append(_failure(task, error))


def _kept(folder: Path, epoch: int) -> Path:
    """Where a run keeps its state after an epoch for experiments that continue it."""
    return folder / f"checkpoint.epoch-{epoch}.pt"


def _keep_checkpoint(task: Task, folder: Path, epoch: int) -> None:
    name = task.experiment.name
    if any(e.continues == name and e.switch == epoch + 1 for e in experiments.EVERY.values()):
        with open(folder / training.CHECKPOINT, "rb") as source:
            copy = partial(shutil.copyfileobj, source)
            training.write_atomically(_kept(folder, epoch), copy)


def _checkpoint_to_begin_with(task: Task, out: Path) -> Path | None:
    """That of the same run of the experiment that this one continues, if it is there."""
    e = task.experiment
    if not e.continues or e.switch is None:
        return None
    base = replace(experiments.EVERY[e.continues], dtype=e.dtype)
    path = _kept(replace(task, experiment=base).folder(out), e.switch - 1)
    return path if path.exists() else None


def _failure(task: Task, error: Exception) -> str:
    return f"{task.name}: {type(error).__name__}: {' '.join(str(error).split())}"


def _has_checkpoint(folder: Path) -> bool:
    names = (training.CHECKPOINT, training.BACKUP_CHECKPOINT)
    return any((folder / name).exists() for name in names)


def _groups(left: Sequence[_Job], together: int) -> list[list[_Job]]:
    """The runs whose steps are one: up to ``together`` of one network, loss and digits."""
    groups: dict[Any, list[list[_Job]]] = {}
    for i, job in enumerate(left):
        task, e = job[0], job[0].experiment
        key: Any = i
        if together > 1 and "online" in experiments.describe_engine(e, task.device):
            key = (repr(e.network), e.loss, e.dtype, e.data_kernel, e.small, e.validation)
            key += (task.limit, task.root, task.device)
        found = groups.setdefault(key, [[]])
        if len(found[-1]) == together:
            found.append([])
        found[-1].append(job)
    return [group for found in groups.values() for group in found]


class _Display:
    """A bar over runs, one over epochs, and a line for each new epoch, all from the runs' logs."""

    def __init__(self, todo: Sequence[Task], out: Path, progress: bool | None, quiet: bool) -> None:
        self.todo = [(task, task.folder(out)) for task in todo]
        self.quiet = quiet
        self.seen = [storage.epochs_done(folder) for _, folder in self.todo]
        self.runs = progress_bar("runs", len(todo), " runs", progress)
        total, done = sum(task.epochs for task in todo), sum(self.seen)
        self.epochs = progress_bar("epochs", total, " epochs", progress, done)
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Display:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopping.set()
        self.thread.join()
        self._look()
        self.epochs.close()
        self.runs.close()

    def _watch(self) -> None:
        while not self.stopping.wait(_SECONDS):
            self._look()

    def _look(self) -> None:
        for i, (task, folder) in enumerate(self.todo):
            results = storage.log(folder)
            for result in results[self.seen[i] :]:
                if result is not None and not self.quiet:
                    self._say(f"{task.name}: {result}")
            self.epochs.update(len(results) - self.seen[i])
            self.runs.update(self.seen[i] < task.epochs <= len(results))
            self.seen[i] = len(results)

    def _say(self, line: str) -> None:
        try:
            self.runs.write(line, file=sys.stdout)
            sys.stdout.flush()
        except (OSError, ValueError):  # nobody reads any more: the results count
            self.quiet = True


def run_all(
    todo: Sequence[Task],
    out: str | os.PathLike[str],
    jobs: int = 1,
    resume: bool = False,
    progress: bool | None = None,
    quiet: bool = False,
    repository: Path | None = None,
    together: int = 1,
    deadline: float | None = None,
    any_device: bool = False,
) -> list[str]:
    """Make all runs and write ``out/results.json``.

    Args:
        todo: the runs.
        out: the folder of all results; other runs in it stay.
        jobs: how many at once, each with its share of the cores.
        resume: continue what is there; without it, a run that is there already is refused.
        progress: bars on standard error; ``None``: on a terminal or in a notebook.
        quiet: no line per epoch on standard output.
        repository: the git checkout whose commit is recorded.
        together: up to so many runs of one network are one of the ``jobs`` and make their steps
            together on a GPU, see :func:`mnist_ops.training.side_by_side`. On the CPU it gains
            nothing.
        deadline: start no epoch that would end after this time, as :func:`time.time` tells it: a
            run's first is expected to take ``Task.seconds``, every other as long as the one before.
            Runs that do not get so far are no failures.
        any_device: a complete run will do if another kind of device made it; others are made anew.

    Returns:
        A line for each run that failed; the others are complete, as far as there was time.

    Raises:
        RunError: if a run is there and ``resume`` is not asked for, or what is there is that of
            another run, or a record is damaged. Nothing has been written then.
        OSError: if the folder cannot be written.
        KeyboardInterrupt: on Ctrl-C; what was complete is in ``results.json``.
    """
    from joblib import Parallel, cpu_count, delayed

    for name, value in (("jobs", jobs), ("together", together)):
        if value < 1:
            raise ValueError(f"run_all: {name} must be >= 1, got {value}")
    out = Path(out).resolve()
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file, not a folder for results")
    known = storage.known(out)
    there = [t.name for t in todo if t.folder(out) in known or _has_checkpoint(t.folder(out))]
    if there and not resume:
        raise RunError(
            f"{out} holds {len(there)} of these {len(todo)} runs already ({there[0]}): "
            "continue them with resume, or choose another folder"
        )
    identities: dict[str | None, str | DataError] = {}
    for root in dict.fromkeys(task.root for task in todo):
        try:
            identities[root] = records.data_identity(root)
        except DataError as error:
            identities[root] = error
    failures: list[str] = []
    left: list[_Job] = []
    for task in todo:
        identity = identities[task.root]
        if isinstance(identity, DataError):
            failures.append(_failure(task, identity))
            continue
        record = known.get(task.folder(out))
        storage.check_inside(task.folder(out), out)
        _check_same(task, identity, out, record, any_device)
        if not _is_complete(task, record):
            left.append((task, identity))

    out.mkdir(parents=True, exist_ok=True)
    storage.sweep(out)
    storage.restore(known)
    deadline = math.inf if deadline is None else deadline
    work = _Work(out, resume, commit_of(repository), deadline, any_device)
    groups = _groups(left, together)
    threads = max(1, cpu_count() // jobs)
    before = torch.get_num_threads()
    try:
        if left:
            with _Display([task for task, _ in left], out, progress, quiet):
                calls = (delayed(_run_group)(group, work, threads) for group in groups)
                pool = Parallel(
                    n_jobs=min(jobs, len(groups)),
                    return_as="generator_unordered",
                    initializer=_start_worker,
                    initargs=(os.getpid(),),
                )
                for failed in pool(calls):
                    failures += failed
    except BrokenProcessPool:
        raise RunError(
            "a worker was killed, perhaps for want of memory: resume with fewer jobs"
        ) from None
    finally:
        torch.set_num_threads(before)
        storage.write_results(out / "results.json", storage.collect(out)["runs"])
    return failures
