"""Many runs: folders, resuming, several at once, failures."""

import fcntl
import json
import os
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mnist_ops import experiments, runner
from mnist_ops.experiments import EXPERIMENTS

QUICK = [replace(EXPERIMENTS[name], dtype="float32") for name in ("original", "mse")]

pytestmark = pytest.mark.usefixtures("one_thread")


def some_tasks(**options):
    return runner.tasks(QUICK, **{"epochs": 2, "limit": 20, "seeds": 2} | options)


def content(out):
    """results.json, which must not depend on how the runs were made."""
    return (Path(out) / "results.json").read_text()


@pytest.fixture(scope="module", autouse=True)
def _one_core():
    """Results may depend, in their last digit, on how many threads a run has for its tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: {0})
        yield


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("straight")
    assert runner.run_all(some_tasks(), out, quiet=True) == []
    return out


def test_tasks():
    tasks = some_tasks(perturbations=1)
    assert [task.name for task in tasks[:4]] == [
        "original, float32, seed 1",
        "original, float32, seed 1, weight 0 perturbed",
        "original, float32, seed 2",
        "original, float32, seed 2, weight 0 perturbed",
    ]
    folders = [task.folder(Path("out")) for task in tasks]
    assert len(set(folders)) == 8
    assert folders[1] == Path("out/runs/original/float32-seed1-weight0")
    assert tasks[0].digits == 40
    assert runner.tasks(QUICK, dtype="float64")[0].digits == 31 * 60_000
    assert runner.tasks(QUICK, dtype="float64")[0].experiment.dtype == "float64"


def test_results(straight):
    results = json.loads(content(straight))
    assert results["environment"]["machine"].endswith(f"{os.cpu_count()} cores")
    names = [(run["experiment"], run["seed"]) for run in results["runs"]]
    assert names == [("original", 1), ("original", 2), ("mse", 1), ("mse", 2)]
    for run in results["runs"]:
        assert [epoch["epoch"] for epoch in run["epochs"]] == [1, 2]
        assert run["engine"].startswith("compiled online SGD, float32")
        assert run["limit"] == 20 and run["epochs_wanted"] == 2
        last = run["epochs"][-1]
        assert sum(map(sum, last["confusion"])) == 20
        right = sum(row[i] for i, row in enumerate(last["confusion"]))
        assert last["test_accuracy"] == pytest.approx(100 * right / 20)
    original, _, mse, _ = results["runs"]
    assert "filters" not in mse
    assert len(original["filters"]) == 64 and len(original["filters"][0][0]) == 5
    right = sum(row[i] for i, row in enumerate(original["epochs"][-1]["confusion"]))
    assert len(original["mistakes"]) == 20 - right
    confidences = [mistake["confidence"] for mistake in original["mistakes"]]
    assert confidences == sorted(confidences, reverse=True)
    assert all(mistake["true"] != mistake["predicted"] for mistake in original["mistakes"])


def test_the_same_by_one_run_alone(straight):
    history, _ = experiments.train(QUICK[1], 2, 2, 20, verbose=False)
    run = json.loads(content(straight))["runs"][3]
    assert [e["train_loss"] for e in run["epochs"]] == [h.train_loss for h in history]


def test_two_at_once_give_the_same(straight, tmp_path, capsys):
    assert runner.run_all(some_tasks(), tmp_path, jobs=2) == []
    assert content(tmp_path) == content(straight)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert sum(line.startswith("mse, float32, seed 2: epoch   2: training") for line in lines) == 1
    assert not list(tmp_path.glob("runs/*/*/progress.json"))


@pytest.mark.parametrize(("together", "jobs"), [(3, 1), (2, 2)])
def test_runs_that_share_their_launches_give_the_same(straight, tmp_path, together, jobs):
    assert runner.run_all(some_tasks(), tmp_path, jobs, quiet=True, together=together) == []
    assert content(tmp_path) == content(straight)


def test_what_shares_its_launches():
    chosen = [EXPERIMENTS[name] for name in ("plain", "mse", "momentum-0.9", "batch-64")]
    groups = runner._groups(runner.tasks(chosen, seeds=3, dtype="float32"), 4)
    names = [[(task.experiment.name, task.seed) for task in group] for group in groups]
    assert [("plain", 1), ("plain", 2), ("plain", 3), ("momentum-0.9", 1)] in names
    assert [("mse", 1), ("mse", 2), ("mse", 3)] in names
    assert [("batch-64", 2)] in names  # not the compiled engine's
    assert sum(map(len, names)) == 12


def test_an_interrupted_group(straight, tmp_path, monkeypatch):
    real, seen = experiments.train, []

    def train(experiment, seed, *args, on_epoch, **options):
        def note(result):
            on_epoch(result)
            seen.append((experiment.name, seed, result.epoch))

        return real(experiment, seed, *args, on_epoch=note, **options)

    class Interrupted(threading.Thread):
        def join(self, timeout=None):
            while len(seen) < 2 and self.is_alive():
                time.sleep(0.01)
            if len(seen) < 8 and not interrupted:
                interrupted.append(True)
                raise KeyboardInterrupt
            super().join(timeout)

    interrupted = []
    monkeypatch.setattr(experiments, "train", train)
    monkeypatch.setattr(runner.threading, "Thread", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.run_all(some_tasks(), tmp_path, quiet=True, progress=False, together=2)
    monkeypatch.undo()
    assert runner.run_all(some_tasks(), tmp_path, resume=True, quiet=True, together=2) == []
    assert content(tmp_path) == content(straight)


def test_one_failure_leaves_those_that_share_its_launches(straight, tmp_path, monkeypatch):
    real = experiments.train

    def train(experiment, seed, *args, **options):
        if seed == 2:
            raise OSError("no space")
        return real(experiment, seed, *args, **options)

    monkeypatch.setattr(experiments, "train", train)
    failures = runner.run_all(some_tasks(), tmp_path, quiet=True, together=2)
    assert sorted(failures) == [
        f"{e}, float32, seed 2: OSError: no space" for e in ("mse", "original")
    ]
    runs = json.loads(content(tmp_path))["runs"]
    expected = json.loads(content(straight))["runs"]
    assert [run for run in runs if run["seed"] == 1] == [r for r in expected if r["seed"] == 1]


def test_a_run_that_is_there_is_refused(straight):
    before = content(straight)
    with pytest.raises(runner.RunError, match=r"holds 4 of these 4 runs already \(original"):
        runner.run_all(some_tasks(), straight)
    assert content(straight) == before


def test_nothing_is_run_twice(straight, monkeypatch):
    before = content(straight)
    monkeypatch.setattr(experiments, "train", lambda *_, **__: pytest.fail("run again"))
    assert runner.run_all(some_tasks(), straight, resume=True) == []
    # Fewer epochs than are there: nothing to do, nothing lost.
    assert runner.run_all(some_tasks(epochs=1), straight, resume=True) == []
    assert content(straight) == before


def test_interrupted_and_resumed(straight, tmp_path, monkeypatch):
    real = experiments.train
    calls = []

    def interrupted(experiment, seed, *args, on_epoch, **options):
        def stop(result):
            on_epoch(result)
            calls.append((experiment.name, seed, result.epoch))
            if len(calls) == 3:
                raise KeyboardInterrupt

        return real(experiment, seed, *args, on_epoch=stop, **options)

    monkeypatch.setattr(experiments, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.run_all(some_tasks(), tmp_path, quiet=True)
    # What was complete is there, the epoch of the run under way included.
    partly = json.loads(content(tmp_path))
    assert [len(run["epochs"]) for run in partly["runs"]] == [2, 1]
    assert runner.run_all(some_tasks(), tmp_path, resume=True, quiet=True) == []
    assert content(tmp_path) == content(straight)
    assert len(calls) == len(set(calls)) == 8


def test_further_epochs(straight, tmp_path):
    assert runner.run_all(some_tasks(epochs=1), tmp_path, quiet=True) == []
    assert len(json.loads(content(tmp_path))["runs"][0]["epochs"]) == 1
    assert runner.run_all(some_tasks(), tmp_path, resume=True, quiet=True) == []
    assert content(tmp_path) == content(straight)


def test_one_failure_leaves_the_others(tmp_path):
    good, bad = runner.tasks(QUICK[:1], epochs=1, limit=10, seeds=2)
    bad = replace(bad, root=str(tmp_path / "nowhere"))
    failures = runner.run_all([bad, good], tmp_path / "out", quiet=True)
    assert len(failures) == 1
    assert failures[0].startswith("original, float32, seed 2: DataError: ")
    done = {run["seed"]: len(run["epochs"]) for run in runner.collect(tmp_path / "out")["runs"]}
    assert done == {1: 1, 2: 0}


def test_other_settings_are_refused(straight):
    failures = runner.run_all(some_tasks(epochs=3, limit=30), straight, resume=True, quiet=True)
    assert len(failures) == 4
    assert "was made with limit = 20, this run has 30" in failures[0]
    assert runner.run_all(some_tasks(), straight, resume=True, quiet=True) == []


def test_a_damaged_checkpoint_costs_no_results(tmp_path):
    tasks = some_tasks(epochs=1, seeds=1)
    assert runner.run_all(tasks, tmp_path, quiet=True) == []
    before = json.loads(content(tmp_path))["runs"]
    for name in ("checkpoint.pt", "checkpoint.backup.pt"):
        (tasks[0].folder(tmp_path) / name).write_bytes(b"not a checkpoint")
    failures = runner.run_all(some_tasks(epochs=2, seeds=1), tmp_path, resume=True, quiet=True)
    assert len(failures) == 1 and "checkpoint.pt is damaged" in failures[0]
    original, mse = json.loads(content(tmp_path))["runs"]
    assert original["epochs"] == before[0]["epochs"]
    assert mse["epochs"][:1] == before[1]["epochs"] and len(mse["epochs"]) == 2
    # Killed between the checkpoint and the record, and damaged on top: the rest is still collected.
    (tasks[1].folder(tmp_path) / "checkpoint.pt").write_bytes(b"")
    log = tasks[1].folder(tmp_path) / "log.csv"
    log.write_text(log.read_text() + log.read_text().splitlines()[-1] + "\n")
    with pytest.warns(UserWarning, match="its last epochs are missing"):
        assert len(runner.collect(tmp_path)["runs"]) == 2


def test_a_second_process_keeps_out(tmp_path):
    task = runner.tasks(QUICK[:1], epochs=1, limit=10)[0]
    folder = task.folder(tmp_path)
    folder.mkdir(parents=True)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        failures = runner.run_all([task], tmp_path, quiet=True)
    assert len(failures) == 1 and "another process is at work in" in failures[0]
    assert runner.run_all([task], tmp_path, quiet=True) == []


def test_jobs_are_checked(tmp_path):
    with pytest.raises(ValueError, match="jobs must be >= 1, got 0"):
        runner.run_all([], tmp_path, jobs=0)


def test_the_commit(tmp_path):
    assert runner.environment(tmp_path / "nowhere")["commit"] is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    commit = runner.environment(tmp_path)["commit"]
    assert len(commit) == 40
    (tmp_path / "file").write_text("2")
    assert runner.environment(tmp_path)["commit"] == f"{commit} with changes"


def test_a_folder_with_nothing_but_results(straight, tmp_path):
    (tmp_path / "results.json").write_text(content(straight))
    with pytest.raises(runner.RunError, match="holds 4 of these 4 runs already"):
        runner.run_all(some_tasks(), tmp_path, quiet=True)
    assert runner.run_all(some_tasks(seeds=3), tmp_path, resume=True, quiet=True) == []
    runs = json.loads(content(tmp_path))["runs"]
    assert [run["seed"] for run in runs] == [1, 2, 3, 1, 2, 3]
    assert [run for run in runs if run["seed"] < 3] == json.loads(content(straight))["runs"]


def test_a_run_that_begins_anew_and_fails_loses_nothing(straight, tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text(content(straight))

    def fail(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(experiments, "train", fail)
    failures = runner.run_all(some_tasks(epochs=3), tmp_path, resume=True, quiet=True)
    assert len(failures) == 4 and "no space left" in failures[0]
    assert content(tmp_path) == content(straight)


def test_a_run_that_begins_anew_replaces_what_is_known(straight, tmp_path):
    (tmp_path / "results.json").write_text(content(straight))
    [task] = some_tasks(epochs=3, seeds=1)[:1]
    assert runner.run_all([task], tmp_path, resume=True, quiet=True) == []
    [run, *others] = json.loads(content(tmp_path))["runs"]
    assert len(run["epochs"]) == run["epochs_wanted"] == 3
    before = json.loads(content(straight))["runs"]
    assert run["epochs"][:2] == before[0]["epochs"]
    assert others == before[1:]
