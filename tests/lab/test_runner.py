"""Many runs: folders, resuming, several at once, failures."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import joblib
import pytest
import torch
from filelock import FileLock
from test_figures import write_digits

from mnist_ops import training
from mnist_ops.lab import experiments, records, runner, storage
from mnist_ops.lab.experiments import EXPERIMENTS
from mnist_ops.mnist import data
from mnist_ops.training import loop

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
        patch.setattr(joblib, "cpu_count", lambda: 1)
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
    assert runner.tasks(QUICK, dtype="float64")[0].digits == 47 * 60_000
    assert runner.tasks(QUICK, dtype="float64")[0].experiment.dtype == "float64"


def test_results(straight):
    results = json.loads(content(straight))
    # Whoever collects the runs is none of their circumstances: each has its own.
    assert set(results) == {"format", "runs"}
    assert all(run["machine"].endswith(f"{os.cpu_count()} cores") for run in results["runs"])
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


@pytest.mark.parametrize(("together", "jobs"), [(3, 1), (2, 2)])
def test_runs_that_make_their_steps_together_give_the_same(straight, tmp_path, together, jobs):
    assert runner.run_all(some_tasks(), tmp_path, jobs, quiet=True, together=together) == []
    assert content(tmp_path) == content(straight)


def test_what_makes_its_steps_together():
    chosen = [EXPERIMENTS[name] for name in ("plain", "mse", "momentum-0.9", "batch-64")]
    jobs = [(task, records.MNIST) for task in runner.tasks(chosen, seeds=3, dtype="float32")]
    groups = runner._groups(jobs, 4)
    names = [[(task.experiment.name, task.seed) for task, _ in group] for group in groups]
    assert [("plain", 1), ("plain", 2), ("plain", 3), ("momentum-0.9", 1)] in names
    assert [("mse", 1), ("mse", 2), ("mse", 3)] in names
    assert [("batch-64", 2)] in names  # not the compiled engine's
    assert sum(map(len, names)) == 12


def test_an_interrupted_group(straight, tmp_path, monkeypatch):
    real, seen = experiments.training_loop, []

    def train(experiment, seed, *args, on_epoch, **options):
        def note(result):
            on_epoch(result)
            seen.append((experiment.name, seed, result.epoch))
            if len(seen) == 2:
                raise KeyboardInterrupt

        return real(experiment, seed, *args, on_epoch=note, **options)

    monkeypatch.setattr(experiments, "training_loop", train)
    with pytest.raises(KeyboardInterrupt):
        runner.run_all(some_tasks(), tmp_path, quiet=True, progress=False, together=2)
    monkeypatch.undo()
    assert runner.run_all(some_tasks(), tmp_path, resume=True, quiet=True, together=2) == []
    assert content(tmp_path) == content(straight)


def test_one_failure_leaves_those_that_are_trained_with_it(straight, tmp_path, monkeypatch):
    real = experiments.training_loop

    def train(experiment, seed, *args, **options):
        if seed == 2:
            raise OSError("no space")
        return real(experiment, seed, *args, **options)

    monkeypatch.setattr(experiments, "training_loop", train)
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
    monkeypatch.setattr(experiments, "training_loop", lambda *_, **__: pytest.fail("run again"))
    assert runner.run_all(some_tasks(), straight, resume=True) == []
    # Fewer epochs than are there: nothing to do, nothing lost.
    assert runner.run_all(some_tasks(epochs=1), straight, resume=True) == []
    assert content(straight) == before


def test_interrupted_and_resumed(straight, tmp_path, monkeypatch):
    real = experiments.training_loop
    calls = []

    def interrupted(experiment, seed, *args, on_epoch, **options):
        def stop(result):
            on_epoch(result)
            calls.append((experiment.name, seed, result.epoch))
            if len(calls) == 3:
                raise KeyboardInterrupt

        return real(experiment, seed, *args, on_epoch=stop, **options)

    monkeypatch.setattr(experiments, "training_loop", interrupted)
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
    done = {run["seed"]: len(run["epochs"]) for run in storage.collect(tmp_path / "out")["runs"]}
    assert done == {1: 1}


def tree(folder):
    """Every file with its content, but for locks."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    write_digits(root)
    return str(root)


def edited(task, **changes):
    return replace(task, experiment=replace(task.experiment, **changes))


OTHERS = {
    "limit = 20, this run has None": lambda task, root: replace(task, limit=None),
    "limit = 20, this run has 30": lambda task, root: replace(task, limit=30),
    "batch_size = 1, this run has 2": lambda task, root: edited(task, batch_size=2),
    "noise = 0.0, this run has 0.1": lambda task, root: edited(task, noise=0.1),
    "stream_kernel = data, this run has 9": lambda task, root: edited(task, stream_kernel=9),
    "data = MNIST, this run has md5:": lambda task, root: replace(task, root=root),
    "device = cpu, this run has cuda": lambda task, root: replace(task, device="cuda:1"),
}


@pytest.mark.parametrize("epochs", [1, 2, 3])
@pytest.mark.parametrize("left", ["all", "run.json", "results.json", "checkpoint.pt"])
@pytest.mark.parametrize("difference", OTHERS)
def test_what_was_made_otherwise_is_no_answer(straight, tmp_path, digits, difference, left, epochs):
    """Whatever of the run is there, and however far it has come: refused, and nothing written."""
    task = OTHERS[difference](some_tasks(epochs=epochs)[0], digits)
    out = tmp_path / "out"
    shutil.copytree(straight, out)
    for path in list(out.rglob("*")):
        if left != "all" and path.is_file() and path.name != left:
            path.unlink()
    if left == "checkpoint.pt" and difference.startswith(("data", "device")):
        return  # a checkpoint alone does not say where it was made: the training loop compares it
    before = tree(out)
    with pytest.raises(runner.RunError, match=f"original, float32, seed 1: .*{difference}"):
        runner.run_all([task], out, resume=True, quiet=True)
    assert tree(out) == before
    # The same again goes on, or is there already.
    same = some_tasks(epochs=epochs, seeds=1)[:1]
    assert runner.run_all(same, out, resume=True, quiet=True) == []
    assert len(json.loads(content(out))["runs"][0]["epochs"]) == max(epochs, 2)


def test_a_checkpoint_of_other_data_is_not_taken_for_the_run(straight, tmp_path, digits):
    """Nor are its epochs put under the name of what was asked for."""
    task = replace(some_tasks(epochs=3)[0], root=digits)
    folder = task.folder(tmp_path)
    folder.mkdir(parents=True)
    for name in ("checkpoint.pt", "log.csv"):
        shutil.copy(task.folder(straight) / name, folder)
    before = tree(tmp_path)
    failures = runner.run_all([task], tmp_path, resume=True, quiet=True)
    assert len(failures) == 1 and "was made with" in failures[0]
    after = tree(tmp_path)
    del after[Path("results.json")]
    assert after == before
    assert json.loads(content(tmp_path))["runs"] == []


def test_epochs_of_another_run_are_not_collected(straight, tmp_path):
    """A record of all digits beside a checkpoint of 20."""
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    path = some_tasks()[0].folder(tmp_path) / "run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"limit": None, "epochs": []}))
    with pytest.warns(UserWarning, match="limit = 20, this run has None: its last epochs"):
        runs = storage.collect(tmp_path)["runs"]
    assert [len(run["epochs"]) for run in runs] == [0, 2, 2, 2]


def test_data_that_cannot_be_read_are_no_answer(straight, tmp_path):
    tasks = [replace(task, root=str(tmp_path / "nowhere")) for task in some_tasks()]
    before = content(straight)
    failures = runner.run_all(tasks, straight, resume=True, quiet=True)
    assert len(failures) == 4 and "nowhere is not a folder" in failures[0]
    assert content(straight) == before


def test_data_are_known_by_their_content(tmp_path, digits):
    identity = records.data_identity(digits)
    assert identity.startswith("md5:")
    shutil.copytree(digits, tmp_path / "elsewhere")
    assert records.data_identity(str(tmp_path / "elsewhere")) == identity
    assert records.data_identity(str(data._shipped())) == records.MNIST
    path = next((tmp_path / "elsewhere").rglob("*labels*"))
    content = bytearray(path.read_bytes())
    content[-1] = (content[-1] + 1) % 10
    path.write_bytes(content)
    assert records.data_identity(str(tmp_path / "elsewhere")) != identity


UNSAFE = ["../../../x", "/tmp/x", "a/b", "a\\b", "", ".", "..", ".x", "-x", "x" * 300, "x\0", "é"]


@pytest.mark.parametrize("name", UNSAFE)
def test_names_that_lead_elsewhere_are_refused(straight, tmp_path, name):
    results = json.loads(content(straight))
    results["runs"][0]["experiment"] = name
    out = tmp_path / "a" / "b" / "out"
    out.mkdir(parents=True)
    (out / "results.json").write_text(json.dumps(results))
    for todo in ([], some_tasks()):
        with pytest.raises(runner.RunError, match="expected a plain name, got"):
            runner.run_all(todo, out, resume=True, quiet=True)
    assert set(tree(tmp_path)) == {Path("a/b/out/results.json")}
    with pytest.raises(runner.RunError, match="the name of an experiment: expected a plain name"):
        runner.run_all([edited(some_tasks()[0], name=name)], tmp_path / "new", quiet=True)
    assert not (tmp_path / "new").exists()


def test_every_experiment_has_a_plain_name():
    every = [
        *EXPERIMENTS.values(),
        *(e for group in experiments.CANDIDATES.values() for e in group),
    ]
    assert len({task.folder(Path("out")) for task in runner.tasks(every)}) == len(every)


@pytest.mark.parametrize("link", ["runs", "runs/original", "runs/original/float32-seed1"])
def test_links_out_of_the_folder_are_refused(straight, tmp_path, link):
    out, outside = tmp_path / "out", tmp_path / "outside"
    (out / link).parent.mkdir(parents=True)
    outside.mkdir()
    (out / link).symlink_to(outside)
    (out / "results.json").write_text(content(straight))
    for todo in ([], some_tasks()):
        with pytest.raises(runner.RunError, match="is a link that leads out of"):
            runner.run_all(todo, out, resume=True, quiet=True)
    assert list(outside.iterdir()) == []


def damage(path):
    """A file's content, damaged in many ways, each with words of the message."""
    good = json.loads(path.read_text())
    record = good["runs"][0] if "runs" in good else good

    def changed(**changes):
        new = json.loads(json.dumps(good))
        (new["runs"][0] if "runs" in good else new).update(changes)
        return json.dumps(new).encode()

    def epoch(**changes):
        return changed(epochs=[record["epochs"][0] | changes])

    without = {key: value for key, value in record.items() if key != "settings"}
    text = path.read_bytes()
    yield b"", "damaged or not JSON"
    yield text[: len(text) // 2], "damaged or not JSON"
    yield b"\xff" + text, "damaged or not JSON: 'utf-8' codec can't decode"
    yield b"[" * 100_000, "damaged or not JSON: too deep"
    yield b"9" * 10_000, "damaged or not JSON"
    yield b"null", "expected an object, got null"
    yield b"[]", "expected an object, got "
    yield (
        (json.dumps({"format": 1, "runs": [without]} if "runs" in good else without).encode()),
        ("settings is missing"),
    )
    yield changed(seed="1"), 'seed: expected an integer from 0 on, got "1"'
    yield changed(seed=True), "seed: expected an integer from 0 on, got true"
    yield changed(seed=10**400), "seed: expected an integer from 0 on, got 1000"
    yield changed(limit=0), "limit: expected an integer from 1 on or null, got 0"
    yield changed(dtype="../x"), "dtype: expected float64 or float32"
    yield changed(epochs=None), "epochs: expected a list, got null"
    yield changed(epochs={}), "epochs: expected a list"
    yield changed(epochs=[[]]), "epochs[0]: expected an object, got []"
    yield epoch(epoch=2), "epochs: expected epoch 1, got 2"
    yield epoch(test_accuracy="99"), 'test_accuracy: expected an accuracy in %, got "99"'
    yield epoch(test_accuracy=1e999), "damaged or not JSON: Infinity is not JSON"
    yield epoch(train_loss=float("nan")), "damaged or not JSON: NaN is not JSON"
    yield epoch(train_loss=10**400), "train_loss: expected a finite number or null"
    yield epoch(train_loss=0).replace(b'"train_loss": 0', b'"train_loss": 1e999'), "finite number"
    yield epoch(confusion=[[1, 2]]), "confusion: expected a square of counts"
    yield changed(mistakes=[{"index": -1}]), "mistakes[0], index: expected an integer"
    yield changed(filters="x"), "filters: expected nested lists of numbers"


def test_damaged_records_are_named_in_one_line(straight, tmp_path):
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    paths = [tmp_path / "results.json", some_tasks()[0].folder(tmp_path) / "run.json"]
    tried = 0
    for path in paths:
        good = path.read_bytes()
        for bad, words in damage(path):
            path.write_bytes(bad)
            before = tree(tmp_path)
            for todo in ([], some_tasks()):
                with pytest.raises(runner.RunError) as caught:
                    runner.run_all(todo, tmp_path, resume=True, quiet=True)
                message = str(caught.value)
                assert words in message and str(path) in message and "\n" not in message
                assert len(message) < 400
            assert tree(tmp_path) == before
            tried += 1
        path.write_bytes(good)
    assert tried == 50
    results = json.loads(good := paths[0].read_bytes())
    for runs, words in ((results["runs"][:1] * 2, "is there twice"), (None, "expected a list")):
        paths[0].write_text(json.dumps(results | {"runs": runs}))
        with pytest.raises(runner.RunError, match=words):
            runner.run_all([], tmp_path)
    paths[0].write_text(json.dumps(results | {"format": 2}))
    with pytest.raises(runner.RunError, match="has format 2, this version reads format 1"):
        runner.run_all([], tmp_path)
    paths[0].write_bytes(good)
    shutil.copytree(paths[1].parent, paths[1].parent.with_name("float32-seed7"))
    with pytest.raises(runner.RunError, match=r"is the record of another run: runs.original"):
        runner.run_all([], tmp_path)


def test_a_log_of_any_bytes(straight, tmp_path):
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    (some_tasks()[0].folder(tmp_path) / "log.csv").write_bytes(b"\xff\n" * 10)
    assert len(storage.collect(tmp_path)["runs"][0]["epochs"]) == 2
    assert runner.run_all(some_tasks(epochs=3, seeds=1), tmp_path, resume=True, quiet=True) == []


def test_one_bar_over_runs_and_one_over_epochs(tmp_path, monkeypatch, capsys):
    bars = []

    def progress_bar(*arguments):
        bars.append(loop.progress_bar(*arguments))
        return bars[-1]

    monkeypatch.setattr(runner, "progress_bar", progress_bar)
    assert runner.run_all(some_tasks(seeds=1), tmp_path, progress=True) == []
    assert [(bar.desc, bar.n, bar.total) for bar in bars] == [("runs", 2, 2), ("epochs", 4, 4)]
    out, err = capsys.readouterr()
    assert len(re.findall("epoch   [12]: training", out)) == 4
    assert "runs: " in err and "epochs: " in err


def test_the_display_reads_logs_of_any_bytes(straight, tmp_path, capsys):
    """It is for people: what it cannot read it does not show."""
    task = some_tasks()[0]
    folder = task.folder(tmp_path)
    folder.mkdir(parents=True)
    good = (task.folder(straight) / "log.csv").read_bytes()
    with runner._Display([task], tmp_path, False, False) as display:
        for text in (b"", b"\xff\n", good[:-2], good, good + b"1,2,3\n"):
            (folder / "log.csv").write_bytes(text)
            display._look()
    assert re.fullmatch(f"{task.name}: epoch   1: [^\n]*\n{task.name}: epoch   2: [^\n]* s\n",
                        capsys.readouterr().out)  # fmt: skip


def test_bars_in_a_notebook(monkeypatch):
    """Standard error is no terminal there."""
    from tqdm import auto, notebook

    assert loop.progress_bar("a", 1, "", None).disable
    monkeypatch.setattr(auto, "tqdm", type("Bar", (notebook.tqdm_notebook,), {
        "__init__": lambda self, **options: vars(self).update(options),
        "__del__": lambda self: None}))  # fmt: skip
    assert not loop.progress_bar("a", 1, "", None).disable
    assert loop.progress_bar("a", 1, "", False).disable


def test_a_reader_that_stops_reading_stops_no_run(tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert runner.run_all(some_tasks(epochs=1), tmp_path, progress=False) == []
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), pipe.fileno())
    assert all(len(run["epochs"]) == 1 for run in json.loads(content(tmp_path))["runs"])


def test_what_killed_runs_leave_is_swept(straight, tmp_path):
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    (tmp_path / "figures").mkdir()
    folder = some_tasks()[0].folder(tmp_path)
    left = [tmp_path / ".results.json.7-7.part", tmp_path / "figures" / ".filters.png.7-17.part"]
    fresh = [tmp_path / ".results.json.8-17.part", tmp_path / "my.part"]
    of_a_run = folder / ".checkpoint.pt.7-17.part"
    for path in (*left, *fresh, of_a_run):
        path.touch()
    for path in left:
        os.utime(path, (0, time.time() - 4000))
    assert runner.run_all(some_tasks(epochs=3, seeds=1), tmp_path, resume=True, quiet=True) == []
    assert [path for path in (*left, of_a_run) if path.exists()] == []
    assert all(path.exists() for path in fresh)


def test_a_full_disk(straight, tmp_path):
    """A limit on the size of files, as a disk that takes no more: the old file stays."""
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    before = tree(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            runner.run_all([], tmp_path)
        failures = []
        job = some_tasks(epochs=3)[0], records.MNIST
        work = runner._Work(tmp_path, True, None, float("inf"))
        training.side_by_side([runner._run(job, work, failures)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(tmp_path / "results.json")
    assert len(failures) == 1 and "File too large" in failures[0] and "\n" not in failures[0]
    assert tree(tmp_path) == before


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(runner.RunError, match="out is a file, not a folder"):
        runner.run_all(some_tasks(), tmp_path / "out")


def test_a_worker_that_is_killed(tmp_path, monkeypatch):
    def kill(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(runner, "_run_group", kill)
    with pytest.raises(runner.RunError, match="a worker was killed, perhaps for want of memory"):
        runner.run_all(some_tasks(), tmp_path, jobs=2, quiet=True)


def test_not_in_the_main_thread(straight, tmp_path):
    """Where a cluster's workers have their tasks; joblib's threads, too."""
    results = []

    def work():
        runner._start_worker(os.getppid())
        with joblib.parallel_config(backend="threading"):
            results.append(runner.run_all(some_tasks(), tmp_path, jobs=2, quiet=True))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [[]]
    assert content(tmp_path) == content(straight)


@pytest.mark.slow
def test_a_cluster_of_dask(straight, tmp_path):
    distributed = pytest.importorskip("distributed", reason="there is no dask.distributed here")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as two,
        distributed.Client(two),
        joblib.parallel_config(backend="dask"),
    ):
        assert runner.run_all(some_tasks(), tmp_path, jobs=2, quiet=True) == []
        assert len(two.scheduler.workers) == 2
    assert content(tmp_path) == content(straight)
    for run in json.loads(content(tmp_path))["runs"]:
        assert run["machine"] == f"{runner.processor()}, {os.cpu_count()} cores"
        assert run["torch"] == torch.__version__


def test_details_do_not_depend_on_the_default_device(straight):
    task = some_tasks()[0]
    _, model = experiments.train(task.experiment, 1, 2, 20, verbose=False)
    with torch.device("meta"):
        found = runner._details(task, model)
    run = json.loads(content(straight))["runs"][0]
    assert found == {"filters": run["filters"], "mistakes": run["mistakes"]}


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
    for name in ("checkpoint.pt", "checkpoint.backup.pt"):
        (tasks[1].folder(tmp_path) / name).write_bytes(b"")
    log = tasks[1].folder(tmp_path) / "log.csv"
    log.write_text(log.read_text() + log.read_text().splitlines()[-1] + "\n")
    with pytest.warns(UserWarning, match="its last epochs are missing"):
        assert len(storage.collect(tmp_path)["runs"]) == 2


def test_a_flipped_bit_costs_an_epoch_and_no_digit(straight, tmp_path):
    assert runner.run_all(some_tasks(epochs=1), tmp_path, quiet=True) == []
    path = some_tasks()[0].folder(tmp_path) / "checkpoint.pt"
    content_of_it = bytearray(path.read_bytes())
    content_of_it[len(content_of_it) // 2] ^= 1
    path.write_bytes(content_of_it)
    with pytest.warns(UserWarning, match=r"checkpoint.pt is damaged .* going on from"):
        assert runner.run_all(some_tasks(), tmp_path, resume=True, quiet=True) == []
    assert content(tmp_path) == content(straight)


def test_a_second_process_keeps_out(tmp_path):
    task = runner.tasks(QUICK[:1], epochs=1, limit=10)[0]
    folder = task.folder(tmp_path)
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        failures = runner.run_all([task], tmp_path, quiet=True)
    assert len(failures) == 1 and "another process is at work in" in failures[0]
    assert runner.run_all([task], tmp_path, quiet=True) == []


def test_jobs_are_checked(tmp_path):
    with pytest.raises(ValueError, match="jobs must be >= 1, got 0"):
        runner.run_all([], tmp_path, jobs=0)


def test_the_commit(tmp_path):
    assert runner.commit_of(None) is runner.commit_of(tmp_path / "nowhere") is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    commit = runner.commit_of(tmp_path)
    assert len(commit) == 40
    (tmp_path / "file").write_text("2")
    assert runner.commit_of(tmp_path) == f"{commit} with changes"


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

    monkeypatch.setattr(experiments, "training_loop", fail)
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
