"""The plan of runs, and what works through it: time, merging, continued runs."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mnist_ops import training
from mnist_ops.lab import experiments, plan, records, runner, storage
from mnist_ops.lab.experiments import EVERY
from mnist_ops.mnist import data
from mnist_ops.training import loop

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = plan.read("full")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "reproduction" / "results.json"


def test_each_run_is_there_once():
    tasks = plan.tasks(STEPS)
    folders = [task.folder(Path()) for task in tasks]
    assert len(set(folders)) == len(folders)
    assert all(task.seconds > 0 and task.epochs >= 1 for task in tasks)
    first = tasks[0]
    assert first.epochs == 1 and first.experiment.dtype == "float32" and "--" in first.name


def test_all_that_the_reports_need_is_there():
    wanted = {(task.experiment.name, task.seed): task.epochs for task in plan.tasks(STEPS)}
    for e in EVERY.values():
        if e.name not in ("three-layer-3x3", "asgd", "cg"):
            assert (e.name, 1) in wanted, e.name
    for name, seeds, epochs in (
        ("original", 5, 31), ("three-layer", 5, 31), ("relu", 5, 3), ("normalization-21", 5, 3),
        ("plain", 3, 44), ("rotation-0.2", 3, 44), ("rotation-0.3", 3, 20), ("dropout", 3, 20),
        ("lbfgs-after-30", 3, 33), ("modern", 5, 30),
        ("rotation-noise-dropout-convolution", 1, 108),
    ):  # fmt: skip
        assert all(wanted[name, seed] >= epochs for seed in range(1, seeds + 1)), name
    double = {
        (task.experiment.name, task.perturbed_weight): task.epochs
        for task in plan.tasks(STEPS)
        if task.experiment.dtype == "float64"
    }
    assert double["original", None] == 47 and double["three-layer", None] == 43
    assert sum(name == "three-layer" and w is not None for name, w in double) >= 3


def test_what_a_step_may_not_say():
    again = replace(STEPS[0], epochs=2)
    with pytest.raises(ValueError, match="has 1 epoch in an earlier step, 2 here"):
        plan.tasks([STEPS[0], again])
    assert plan.tasks([again, STEPS[0]]) == plan.tasks([again])
    with pytest.raises(ValueError, match="no experiment is called 'originall'"):
        plan._names(["originall"])


def short(names, epochs=2, seeds=1, dtype="float32"):
    chosen = [replace(EVERY[name], dtype=dtype) for name in names]
    return runner.tasks(chosen, seeds=seeds, epochs=epochs, limit=20)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Two runs of two epochs, and the file that they were merged into."""
    folder = tmp_path_factory.mktemp("straight")
    assert runner.run_all(short(["original", "mse"]), folder / "out", quiet=True) == []
    assert storage.merge(folder / "out", folder / "results.json") == 2
    return folder


def runs_of(path):
    return json.loads(path.read_text())["runs"]


def test_no_epoch_starts_that_would_end_too_late(straight, tmp_path, monkeypatch):
    todo = [replace(task, seconds=5.0) for task in short(["original", "mse"])]
    assert runner.run_all(todo, tmp_path, deadline=time.time() + 4, quiet=True) == []
    assert runs_of(tmp_path / "results.json") == []
    # The first epoch of each is expected to fit, and seen to take longer.
    real = experiments.training_loop

    def slow(*arguments, on_epoch, **options):
        return real(
            *arguments,
            on_epoch=lambda result: on_epoch(replace(result, seconds=1e6)),
            **options,
        )

    monkeypatch.setattr(experiments, "training_loop", slow)
    soon = time.time() + 1000
    assert runner.run_all(todo, tmp_path, resume=True, deadline=soon, quiet=True) == []
    assert [len(run["epochs"]) for run in runs_of(tmp_path / "results.json")] == [1, 1]
    monkeypatch.undo()
    # The log says how long an epoch takes here, and with time enough the rest follows.
    assert plan.pace(todo, tmp_path) == pytest.approx(
        sum(storage.seconds_per_epoch(task.folder(tmp_path)) / 5.0 for task in todo) / 2
    )
    assert runner.run_all(todo, tmp_path, resume=True, deadline=soon, quiet=True) == []
    expected = runs_of(straight / "results.json")
    assert [run["epochs"] for run in runs_of(tmp_path / "results.json")] == [
        run["epochs"] for run in expected
    ]


def test_what_is_left(straight):
    steps = [
        plan.Step("two", "", ("original", "mse"), (1, 2), 3, "float32", 10.0),
        plan.Step("continued", "", ("lbfgs-after-5",), (1,), None, "float32", 10.0),
    ]
    (first, epochs, seconds), (_, continued, _) = plan.left(steps, straight / "out", limit=20)
    assert first is steps[0] and epochs == 1 + 1 + 3 + 3
    assert seconds == pytest.approx(8 * 10.0 * 20 / 60_000)
    assert continued == 3  # the five before are the baseline's
    assert plan.left(steps[:1], straight / "out", limit=20, pace=2.0)[0][2] == 2 * seconds


def test_merging_loses_nothing_and_doubles_nothing(straight, tmp_path):
    out, results = tmp_path / "out", tmp_path / "committed" / "results.json"
    results.parent.mkdir()
    longer = runs_of(straight / "results.json")
    # The file has one run farther, one not so far, and one that the folder lacks.
    shorter = json.loads(json.dumps(longer))
    del shorter[1]["epochs"][1:]
    other = longer[0] | {"seed": 7}
    rest = {"format": 1, "options": {"epochs": 2}, "notes": ["from two machines"]}
    results.write_text(json.dumps(rest | {"environment": {}, "runs": [*shorter, other]}))
    shutil.copytree(straight / "out", out)
    path = out / "runs/original/float32-seed1/run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"epochs": record["epochs"][:1]}))
    (path.parent / training.LOG).unlink()  # as in a folder from which the run is gone
    for changed in (1, 0):
        assert storage.merge(out, results) == changed
        assert json.loads(results.read_text()) == rest | {"runs": [longer[0], other, longer[1]]}
        # And the folder knows all of them: nothing is made twice.
        assert storage.collect(out)["runs"] == [longer[0], other, longer[1]]


def test_merging_what_was_made_otherwise_is_refused(straight, tmp_path):
    results = tmp_path / "results.json"
    [original, mse] = runs_of(straight / "results.json")
    other = mse | {"settings": mse["settings"] | {"noise": 0.5}}
    results.write_text(json.dumps({"format": 1, "runs": [original, other]}))
    before = results.read_bytes()
    with pytest.raises(runner.RunError, match=r"mse: .* has it with noise = 0.5, this run has 0.0"):
        storage.merge(straight / "out", results)
    assert results.read_bytes() == before


def test_an_empty_run_is_not_merged(tmp_path):
    [task] = short(["original"])
    late = replace(task, seconds=1.0)
    assert runner.run_all([late], tmp_path, deadline=time.time(), quiet=True) == []
    assert storage.merge(tmp_path, tmp_path / "other.json") == 0
    assert not (tmp_path / "other.json").exists()


def test_runs_of_another_device(straight, tmp_path):
    """Complete they will do, begun they are made anew here."""
    [original, mse] = runs_of(straight / "results.json")
    there = [original | {"device": "cuda"}, mse | {"device": "cuda", "epochs": mse["epochs"][:1]}]
    (tmp_path / "results.json").write_text(json.dumps({"format": 1, "runs": there}))
    todo = short(["original", "mse"])
    with pytest.raises(runner.RunError, match="device = cuda, this run has cpu"):
        runner.run_all(todo, tmp_path, resume=True, quiet=True)
    assert runner.run_all(todo, tmp_path, resume=True, quiet=True, any_device=True) == []
    assert runs_of(tmp_path / "results.json") == [there[0], mse]


def test_a_run_that_continues_another(tmp_path, monkeypatch):
    """It begins with the other's checkpoint and ends with the same digits as one from the start."""
    base = replace(EVERY["plain"], name="base")
    options = list(EVERY["lbfgs-after-5"].optimizers.values())
    late = replace(
        EVERY["lbfgs-after-5"], name="late", continues="base",
        optimizers={1: options[0], 3: options[1], 4: options[2]},
    )  # fmt: skip
    monkeypatch.setattr(experiments, "EVERY", {"base": base, "late": late})
    first, second = (runner.Task(replace(e, dtype="float32"), 1, 4, 20) for e in (base, late))
    assert runner.run_all([second], tmp_path / "alone", quiet=True) == []
    assert runner.run_all([first], tmp_path / "both", quiet=True) == []
    trained = []
    real = loop._one_epoch
    monkeypatch.setattr(
        loop, "_one_epoch", lambda epoch, *rest: trained.append(epoch) or real(epoch, *rest)
    )
    assert runner.run_all([second], tmp_path / "both", resume=True, quiet=True) == []
    assert trained == [3, 4]
    [_, continued] = runs_of(tmp_path / "both" / "results.json")
    [alone] = runs_of(tmp_path / "alone" / "results.json")
    assert continued == alone
    assert continued["settings"]["experiment"] == "late"
    # Another run's checkpoint is none to continue.
    other = replace(second, seed=2)
    shutil.copytree(first.folder(tmp_path / "both"), first.folder(tmp_path / "bad"))
    shutil.move(first.folder(tmp_path / "bad"), replace(first, seed=2).folder(tmp_path / "bad"))
    (replace(first, seed=2).folder(tmp_path / "bad") / "run.json").unlink()
    [failure] = runner.run_all([other], tmp_path / "bad", quiet=True)
    assert "was made with seed = 1, this run begins with 2" in failure


def test_records_with_details_have_the_confusion_of_the_training(straight):
    original, mse = runs_of(straight / "results.json")
    assert all("train_confusion" not in epoch for epoch in mse["epochs"])
    for epoch in original["epochs"]:
        counts = epoch["train_confusion"]
        assert sum(map(sum, counts)) == 20
        right = sum(row[i] for i, row in enumerate(counts))
        assert epoch["train_accuracy"] == pytest.approx(100 * right / 20)
        rows = [sum(row) for row in counts]
        labels = experiments.digits(7, None, 20).train_labels
        assert rows == labels.bincount(minlength=10).tolist()


def test_the_small_set():
    splits = experiments.digits(None, None, None, small=True)
    assert len(splits.train_images) == 6000 and len(splits.test_images) == 1000
    # Normalised by their own mean and deviation.
    assert abs(float(splits.train_images.double().mean())) < 1e-6
    assert float(splits.train_images.double().std()) == pytest.approx(1.0, abs=1e-6)
    part = experiments.digits(None, None, 20, small=True)
    assert torch.equal(part.train_images, splits.train_images[:20])
    assert torch.equal(part.test_images, splits.test_images[:20])
    e = EVERY["small-batch-32"]
    assert e.training_digits == 6000 and runner.Task(e, 1, 2).digits == 12_000
    assert runner.Task(e, limit=100).digits_per_epoch == 100
    assert records.folder(Path(), {
        "experiment": e.name, "dtype": "float32", "seed": 1, "perturbed_weight": None
    }).name == "float32-seed1"  # fmt: skip
    assert e.settings()["small"] is True and "small" not in EVERY["plain"].settings()


def test_what_is_chosen_is_chosen_without_the_test_set():
    for choice in experiments.CHOICES["modern"]:
        assert choice.validation == 5000 and choice.training_digits == 55_000
    images, labels = data.load("train")
    splits = experiments.digits(None, None, None, validation=5000)
    assert len(splits.train_images) == 55_000 and len(splits.test_images) == 5000
    assert torch.equal(splits.train_labels, labels[:55_000])
    assert torch.equal(splits.test_labels, labels[55_000:])
    part = experiments.digits(7, None, 20, validation=5000)
    kept = data.pad32(torch.cat([images[:20], images[55_000:55_020]]))
    normal = data.local_norm(data.global_norm(kept, *data.global_statistics(images)))
    assert torch.equal(torch.cat([part.train_images, part.test_images]), normal)


def test_modern_is_trained_as_the_best_choice():
    runs = records.read_results(RESULTS)["runs"]
    reached = {run["experiment"]: run["epochs"][-1]["test_accuracy"] for run in runs}
    best = max(experiments.CHOICES["modern"], key=lambda choice: reached[choice.name])
    modern = EVERY["modern"]
    own = ("name", "title", "note", "epochs", "optimizers", "validation")
    assert replace(best, **{field: getattr(modern, field) for field in own}) == modern
    assert modern.optimizers[1] == best.optimizers[1]  # the rate that falls to 0


def test_modern_is_the_original_network_at_falling_rates():
    modern = experiments.build(EVERY["modern"])
    original = experiments.build(EVERY["original"])
    assert str(modern.model) == str(original.model)
    rates = [modern.optimizers[e].param_groups[0]["lr"] for e in range(1, 31)]
    assert rates[0] == 1.5e-3 and rates == sorted(rates, reverse=True)
    assert rates[15] == pytest.approx(0.75e-3) and 0 < rates[-1] < 1e-5
    assert "RandomAffine(rotation=0.15, scale=0.08" in str(modern.transform)
