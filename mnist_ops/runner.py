"""Run many experiments: side by side, safe to kill, every result in plain files.

Each run (:class:`Task`) has a folder of its own under ``OUT/runs`` with a checkpoint, a log and
``run.json``; :func:`collect` puts all of them together in ``OUT/results.json``. Whatever is killed
whenever: :func:`run_all` with ``resume=True`` continues every run after its last complete epoch and
ends with the same ``results.json``.

A folder that kept only ``results.json`` (one under version control, say) is as good as one
with all its runs, but for their checkpoints: :func:`run_all` writes their ``run.json`` again.

Runs are spread with joblib. On this machine each worker takes its share of the cores; with a
cluster's backend (``joblib.parallel_config(backend="dask")``, say) around :func:`run_all` the same
runs go there, as long as the folder is on a file system that all machines see.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import __version__, experiments, online, training
from .experiments import Experiment

__all__ = ["RunError", "Task", "collect", "environment", "processor", "run_all", "tasks"]

_TRAINING_DIGITS = 60_000
_WORST_MISTAKES = 24
# How often a worker says how far it is and the bars are drawn.
_SECONDS = 0.5


class RunError(RuntimeError):
    """A folder of results cannot be used as asked; the message says why and what to do."""


def _folder(
    out: Path, experiment: str, dtype: str, seed: int, perturbed_weight: int | None
) -> Path:
    """Where under ``out`` a run lives."""
    perturbed = "" if perturbed_weight is None else f"-weight{perturbed_weight}"
    return out / "runs" / experiment / f"{dtype}-seed{seed}{perturbed}"


@dataclass(frozen=True)
class Task:
    """One run: an experiment with everything that may differ from run to run.

    Attributes:
        experiment: what is trained.
        seed: of its random numbers.
        epochs: how far.
        limit: digits used of each split, ``None``: all.
        device: cpu, cuda or cuda:N.
        perturbed_weight: see :func:`mnist_ops.experiments.build`.
        root: a folder with other data.
    """

    experiment: Experiment
    seed: int = 1
    epochs: int = 1
    limit: int | None = None
    device: str = "cpu"
    perturbed_weight: int | None = None
    root: str | None = None

    @property
    def name(self) -> str:
        """For people: experiment, seed and what else is out of the ordinary."""
        weight = self.perturbed_weight
        perturbed = "" if weight is None else f", weight {weight} perturbed"
        return f"{self.experiment.name}, {self.experiment.dtype}, seed {self.seed}{perturbed}"

    def folder(self, out: Path) -> Path:
        """Where under ``out`` the run lives."""
        experiment = self.experiment
        return _folder(out, experiment.name, experiment.dtype, self.seed, self.perturbed_weight)

    @property
    def digits_per_epoch(self) -> int:
        """Training digits in one epoch."""
        return self.limit or _TRAINING_DIGITS

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
    """Every run of these experiments.

    Args:
        chosen: the experiments.
        seeds: each runs with seeds 1 to ``seeds``.
        epochs: instead of each experiment's own number.
        limit: digits used of each split.
        device: cpu, cuda or cuda:N.
        dtype: instead of the experiments' own.
        perturbations: so many runs more of each seed, each with another weight perturbed.
        root: a folder with other data.
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


def environment(repository: Path | None = None) -> dict[str, Any]:
    """What a result depends on: versions, the processor and, in a git checkout, the commit."""
    commit = None
    if repository is not None:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            git = ["git", "-C", str(repository)]
            options: dict[str, Any] = {"capture_output": True, "text": True, "check": True}
            commit = subprocess.run([*git, "rev-parse", "HEAD"], **options).stdout.strip()
            changed = subprocess.run(
                [*git, "status", "--porcelain", "--untracked-files=no"], **options
            )
            if changed.stdout.strip():
                commit += " with changes"
    return {
        "commit": commit,
        "mnist_ops": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{processor()}, {os.cpu_count()} cores",
    }


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _write_json(path: Path, value: Any) -> None:
    training.write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def _number(value: float | None) -> float | None:
    """JSON has neither NaN nor infinity: the loss of a run that diverged becomes null."""
    return value if value is not None and math.isfinite(value) else None


def _machine(device: str, where: dict[str, Any]) -> str:
    """The processor, and the GPU if that does the work."""
    machine = str(where["machine"])
    if torch.device(device).type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}; {machine}"
    return machine


def _describe(task: Task, where: dict[str, Any]) -> dict[str, Any]:
    """What is known of a run before it starts. Nothing that differs when it is made again."""
    return {
        "experiment": task.experiment.name,
        "seed": task.seed,
        "dtype": task.experiment.dtype,
        "device": task.device,
        "limit": task.limit,
        "perturbed_weight": task.perturbed_weight,
        "engine": experiments.describe_engine(task.experiment, task.device),
        "epochs_wanted": task.epochs,
        "settings": task.experiment.settings(),
        "commit": where["commit"],
        "machine": _machine(task.device, where),
        "torch": where["torch"],
    }


def _epochs(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "epoch": result["epoch"],
            "train_accuracy": result["train_accuracy"],
            "test_accuracy": result["test_accuracy"],
            "train_loss": _number(result["train_loss"]),
            "test_loss": _number(result["test_loss"]),
            "learning_rate": _number(result["learning_rate"]),
            "curve": [round(value, 4) for value in result["curve"]],
            "confusion": result["confusion"],
        }
        for result in history
    ]


def _details(task: Task, model: nn.Sequential) -> dict[str, Any]:
    """The first layer's filters and the test digits that were most confidently wrong."""
    digits = experiments.digits(task.experiment.data_kernel, task.root, task.limit)
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
    return {
        "filters": torch.tensor(rounded, dtype=torch.float64).view(weights.shape).tolist(),
        "mistakes": mistakes,
    }


class _Progress:
    """Says in a small file how far a run is, for the process that draws the bars.

    In a worker, which nobody stops when that process is killed, it ends the run as well: the
    checkpoint of the last epoch is there, and another process may want to go on from it.
    """

    def __init__(self, path: Path, task: Task, epochs_done: int, in_worker: bool) -> None:
        self.parent = os.getppid() if in_worker else None
        self.path = path
        self.name = task.name
        self.per_epoch = task.digits_per_epoch
        self.digits = epochs_done * self.per_epoch
        self.lines: list[str] = []
        self.write()

    def write(self) -> None:
        state = {"digits": self.digits, "lines": self.lines}
        part = self.path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(state))
        os.replace(part, self.path)
        self.written = time.monotonic()

    def on_progress(self, digits: int) -> None:
        self.digits += digits
        if time.monotonic() - self.written > _SECONDS:
            if self.parent not in (None, os.getppid()):
                os._exit(1)
            self.write()

    def on_epoch(self, result: training.EpochResult) -> None:
        self.digits = result.epoch * self.per_epoch
        self.lines.append(f"{self.name}: {result}")
        self.write()


def _progress_path(task: Task, out: Path) -> Path:
    return task.folder(out) / "progress.json"


def _read_json(path: Path) -> dict[str, Any]:
    """The file's content; empty where there is none, or half of one from a foreign hand."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _epochs_done(folder: Path) -> int:
    """Complete epochs, from the log that the training loop keeps."""
    try:
        return max(0, len((folder / training.LOG).read_text().splitlines()) - 1)
    except OSError:
        return 0


def _is_complete(task: Task, out: Path) -> bool:
    return len(_read_json(task.folder(out) / "run.json").get("epochs", ())) >= task.epochs


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep others out of a run's folder, as the training loop does."""
    try:
        with training.locked(folder):
            yield
    except training.FolderInUseError as error:
        raise RunError(str(error)) from None


def _run_group(
    group: Sequence[Task], out: Path, resume: bool, threads: int, where: dict[str, Any], parent: int
) -> list[str]:
    """Runs that belong together, in whatever process joblib chose; what went wrong, as text."""
    if os.getpid() != parent:
        # Ctrl-C is for the process that hands out the work; it stops the others.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    failures: list[str] = []
    if len(group) == 1:
        _run(group[0], out, resume, where, parent, None, failures)
        return failures
    with contextlib.suppress(Exception):  # where there are no digits each run says so
        task = group[0]
        experiments.digits(task.experiment.data_kernel, task.root, task.limit)  # kept for all
    shared = online.SharedLaunches(len(group))
    workers = [
        threading.Thread(
            target=_run, args=(task, out, resume, where, parent, shared, failures), daemon=True
        )
        for task in group
    ]
    # Each run sets these flags and puts back what it found: let it be the same for all.
    with training.repeatable():
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        except BaseException:
            shared.stop()
            for worker in workers:
                if worker.ident is not None:
                    worker.join()
            raise
    return failures


def _run(
    task: Task,
    out: Path,
    resume: bool,
    where: dict[str, Any],
    parent: int,
    shared: online.SharedLaunches | None,
    failures: list[str],
) -> None:
    """One run. What went wrong is added to the failures, as text."""
    folder = task.folder(out)
    in_worker = os.getpid() != parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if resume and _is_complete(task, out):
                return
            resume = resume and (folder / training.CHECKPOINT).exists()
            done = _epochs_done(folder) if resume else 0
            progress = _Progress(_progress_path(task, out), task, done, in_worker)
            record = _describe(task, where)
            known = _read_json(folder / "run.json").get("epochs", [])
            # What is known of a run that begins anew stays until its first epoch is complete.
            stays = bool(known) and not (resume and _epochs_done(folder))

            def on_epoch(result: training.EpochResult) -> None:
                progress.on_epoch(result)
                if stays and result.epoch == 1:
                    _write_json(folder / "run.json", record | {"epochs": []})

            if not stays:
                _write_json(folder / "run.json", record | {"epochs": known})
            history, model = experiments.train(
                task.experiment,
                task.seed,
                task.epochs,
                task.limit,
                task.device,
                folder,
                resume,
                task.perturbed_weight,
                task.root,
                verbose=False,
                progress=False,
                shared=shared,
                on_progress=progress.on_progress,
                on_epoch=on_epoch,
            )
            record["epochs"] = _epochs([asdict(result) for result in history])
            if task.experiment.details:
                record |= _details(task, model)
            training.save_checkpoint(folder / "model.pt", model.state_dict())
            _write_json(folder / "run.json", record)
    except Exception as error:  # one run that fails must not take the others with it
        failures.append(f"{task.name}: {type(error).__name__}: {error}")
    finally:
        if shared is not None:
            shared.leave()


def _groups(left: Sequence[Task], together: int) -> list[list[Task]]:
    """The runs that share their launches: up to ``together`` of one network, loss and digits."""
    groups: dict[Any, list[list[Task]]] = {}
    for i, task in enumerate(left):
        e = task.experiment
        key: Any = i
        if together > 1 and "online" in experiments.describe_engine(e, task.device):
            key = (repr(e.network), e.loss, e.dtype, e.data_kernel, task.limit, task.root)
            key += (task.device,)
        found = groups.setdefault(key, [[]])
        if len(found[-1]) == together:
            found.append([])
        found[-1].append(task)
    return [group for found in groups.values() for group in found]


@dataclass
class _Row:
    """What the display knows of one run."""

    task: Task
    path: Path
    digits: int
    lines: int = 0
    bar: Any = None
    place: int = 0


class _Display:
    """A bar for all runs, one for each that is running, and a line for each epoch."""

    def __init__(self, todo: Sequence[Task], out: Path, show: bool, quiet: bool) -> None:
        from tqdm import tqdm

        self.tqdm, self.quiet = tqdm, quiet
        self.options: dict[str, Any] = {
            "unit": " digits",
            "unit_scale": True,
            "dynamic_ncols": True,
            "leave": False,
            "disable": not show,
            "file": sys.stderr,
        }
        self.rows = []
        for task in todo:
            done = min(task.epochs, _epochs_done(task.folder(out))) * task.digits_per_epoch
            self.rows.append(_Row(task, _progress_path(task, out), done))
        self.total = tqdm(
            total=sum(task.digits for task in todo),
            initial=sum(row.digits for row in self.rows),
            desc=f"{len(todo)} runs",
            position=0,
            **self.options,
        )
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Display:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopping.set()
        self.thread.join()
        self._look()
        for row in self.rows:
            if row.bar is not None:
                row.bar.close()
        self.total.close()

    def _watch(self) -> None:
        while not self.stopping.wait(_SECONDS):
            self._look()

    def _look(self) -> None:
        for row in self.rows:
            state = _read_json(row.path)
            if state:
                self._draw(row, state)

    def _draw(self, row: _Row, state: dict[str, Any]) -> None:
        finished = state["digits"] >= row.task.digits
        if row.bar is None and not finished:
            taken = {other.place for other in self.rows if other.bar is not None}
            row.place = next(i for i in range(1, len(self.rows) + 2) if i not in taken)
            row.bar = self.tqdm(
                total=row.task.digits,
                initial=row.digits,
                desc=row.task.name,
                position=row.place,
                **self.options,
            )
        if row.bar is not None:
            row.bar.update(state["digits"] - row.digits)
        self.total.update(state["digits"] - row.digits)
        row.digits = state["digits"]
        for line in state["lines"][row.lines :]:
            if not self.quiet:
                self.tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()
        row.lines = len(state["lines"])
        if finished and row.bar is not None:
            row.bar.close()
            row.bar = None


def run_all(
    todo: Sequence[Task],
    out: str | os.PathLike[str],
    jobs: int = 1,
    resume: bool = False,
    progress: bool | None = None,
    quiet: bool = False,
    repository: Path | None = None,
    together: int = 1,
) -> list[str]:
    """Make all runs and write ``out/results.json``.

    Args:
        todo: the runs.
        out: the folder of all results; other runs in it stay.
        jobs: how many at once, each with its share of the cores.
        resume: continue what is there; without it, a run that is there already is refused.
        progress: bars on standard error; ``None``: on a terminal only.
        quiet: no line per epoch on standard output.
        repository: the git checkout whose commit is recorded.
        together: so many runs of one network (seeds, say, or learning rates) at most are one of the
            ``jobs`` and share their launches on a GPU, which one network cannot fill, see
            :class:`mnist_ops.online.SharedLaunches`. On the CPU it gains nothing.

    Returns:
        A line for each run that failed; the others are complete.

    Raises:
        RunError: if a run is there and ``resume`` is not asked for.
        KeyboardInterrupt: on Ctrl-C; what was complete is in ``results.json``.
    """
    from joblib import Parallel, delayed

    for name, value in (("jobs", jobs), ("together", together)):
        if value < 1:
            raise ValueError(f"run_all: {name} must be >= 1, got {value}")
    out = Path(out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    _restore(out)
    there = [task.name for task in todo if (task.folder(out) / "run.json").exists()]
    if there and not resume:
        raise RunError(
            f"{out} holds {len(there)} of these {len(todo)} runs already ({there[0]}): "
            "continue them with resume, or choose another folder"
        )
    left = [task for task in todo if not _is_complete(task, out)]
    for task in left:
        _progress_path(task, out).unlink(missing_ok=True)
    where = environment(repository)
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    before = torch.get_num_threads()
    show = sys.stderr.isatty() if progress is None else progress
    failures: list[str] = []
    try:
        if left:
            with _Display(left, out, show, quiet):
                calls = (
                    delayed(_run_group)(group, out, resume, threads, where, os.getpid())
                    for group in _groups(left, together)
                )
                for failed in Parallel(n_jobs=jobs, return_as="generator_unordered")(calls):
                    failures += failed
    finally:
        torch.set_num_threads(before)
        for task in left:
            _progress_path(task, out).unlink(missing_ok=True)
        _write_json(out / "results.json", collect(out, where))
    return failures


def _restore(out: Path) -> None:
    """Give each run that only ``results.json`` knows a ``run.json`` again, lest it be forgotten."""
    for record in _read_json(out / "results.json").get("runs", []):
        keys = ("experiment", "dtype", "seed", "perturbed_weight")
        folder = _folder(out, *(record[key] for key in keys))
        if not (folder / "run.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            _write_json(folder / "run.json", record)


def collect(out: str | os.PathLike[str], where: dict[str, Any] | None = None) -> dict[str, Any]:
    """All runs in a folder, in a fixed order, those under way up to their last complete epoch.

    Args:
        out: a folder that :func:`run_all` wrote.
        where: the environment to record, :func:`environment` unless given.
    """
    runs = []
    for path in sorted(Path(out).glob("runs/*/*/run.json")):
        record = _read_json(path)
        if not record:
            continue
        if _epochs_done(path.parent) > len(record["epochs"]):
            try:
                state = training.load_checkpoint(path.parent / training.CHECKPOINT)
                record["epochs"] = _epochs(state["history"])
            except training.CheckpointError as error:
                warnings.warn(f"{error}: its last epochs are missing in the results", stacklevel=2)
        runs.append(record)
    order = {name: i for i, name in enumerate(experiments.EXPERIMENTS)}
    runs.sort(
        key=lambda run: (
            order.get(run["experiment"], len(order)),
            run["experiment"],
            run["dtype"],
            run["seed"],
            -1 if run["perturbed_weight"] is None else run["perturbed_weight"],
        )
    )
    return {"format": 1, "environment": where or environment(), "runs": runs}
