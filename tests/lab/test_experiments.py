"""The registry of experiments: each builds, trains and says what it is."""

import io
import struct
from dataclasses import replace

import pytest
import torch

from mnist_ops import torch7, training
from mnist_ops.lab import experiments, reports
from mnist_ops.lab.experiments import CANDIDATES, EXPERIMENTS, TABLES
from mnist_ops.mnist import data

GUESSES = [guess for guesses in CANDIDATES.values() for guess in guesses]

pytestmark = pytest.mark.usefixtures("one_thread")


def first_of_each_group():
    """Every experiment's name; those that are much like one before are slow."""
    groups = set()
    for name, experiment in EXPERIMENTS.items():
        alike = experiment.group in groups
        yield pytest.param(name, marks=[pytest.mark.slow] if alike else [])
        groups.add(experiment.group)


@pytest.mark.parametrize("name", first_of_each_group())
def test_every_experiment_trains(name):
    experiment = EXPERIMENTS[name]
    # The first epoch of each optimizer: those that switch late switch after the first here.
    options = list(experiment.optimizers.values())
    quick = replace(experiment, optimizers=dict(enumerate(options, 1)))
    size = max(12, experiment.batch_size)
    history, model = experiments.train(quick, epochs=len(options), limit=size, verbose=False)
    assert [result.epoch for result in history] == list(range(1, len(options) + 1))
    assert all(0.0 <= result.test_accuracy <= 100.0 for result in history)
    start = experiments.build(quick).model.state_dict()
    changed = [name for name, value in model.state_dict().items() if (value != start[name]).any()]
    assert [name for name, _ in model.named_parameters()] == changed
    assert all(p.dtype == torch.float64 and p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_engine(name):
    experiment = EXPERIMENTS[name]
    compiled = experiments.describe_engine(experiment).startswith("compiled online SGD")
    plain = experiment.batch_size == 1 and experiment.optimizers[1]["name"] == "sgd"
    assert compiled == plain


def test_reported_numbers_are_those_of_the_reports():
    for table in TABLES.values():
        for heading, name in table.columns.items():
            reported = EXPERIMENTS[name].reported
            for epoch, pair in table.printed[heading].items():
                assert reported[epoch] == pair
            assert set(table.epochs) == set(table.printed[heading])
    original = EXPERIMENTS["original"].reported
    assert list(original) == [*range(1, 11), *range(19, 31)]
    # Printed as epoch 20: the table counts one too many.
    assert original[19] == reports.TABLES["3.5"]["two_layer"][20] == (99.98, 99.53)
    assert EXPERIMENTS["rotation-0.2"].reported[30][1] == 99.573
    assert EXPERIMENTS["normalization-15"].reported == reports.TABLES["3.2"]["gaussian1d_15"]


def test_names_and_settings_are_distinct():
    everything = [*EXPERIMENTS.values(), *GUESSES]
    assert len({e.name for e in everything}) == len(everything)
    for group in CANDIDATES.values():
        settings = [{**e.settings(), "experiment": ""} for e in group]
        assert all(a != b for i, a in enumerate(settings) for b in settings[:i])


@pytest.mark.parametrize("experiment", [*EXPERIMENTS.values(), *GUESSES], ids=lambda e: e.name)
def test_settings_survive_a_checkpoint(experiment):
    file = io.BytesIO()
    torch.save(experiment.settings(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == experiment.settings()


@pytest.mark.parametrize("guess", GUESSES, ids=lambda e: e.name)
def test_every_guess_builds(guess):
    parts = experiments.build(guess)
    engine = training.choose_engine(parts.model, parts.optimizers[1], parts.criterion)
    assert isinstance(engine, training.OptimizerEngine)


def words_before_the_network(experiment):
    """How many random words were drawn before the first weight."""
    first = experiments.build(experiment).model[0].weight.flatten()[0]
    bound = 1 / 5
    words = torch7.Generator(1).random32(400)
    return [i for i, word in enumerate(words) if word * 2.0**-32 * 2 * bound - bound == first]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, 52),
        ({"data_kernel": None}, 4),
        ({"data_kernel": 15}, 100),
        ({"data_kernel": 15, "stream_kernel": 7}, 52),
        ({"stream_kernel": None}, 4),
        ({"extra_words": 10}, 62),
    ],
)
def test_the_stream_of_random_numbers(changes, words):
    assert words_before_the_network(replace(EXPERIMENTS["original"], **changes)) == [words]


def test_pixels_of_another_machine():
    plain = experiments.digits(7, None, 20)
    moved = {
        seed: experiments._with_errors(plain, seed).train_images - plain.train_images
        for seed in (1, 2)
    }
    for errors in moved.values():
        assert errors.double().std().item() == pytest.approx(experiments.PIXEL_ERROR, rel=0.1)
    assert not torch.equal(moved[1], moved[2])
    assert experiments._with_errors(plain, 0) is plain
    for group in experiments.ROUNDINGS.values():
        assert [experiment.pixel_errors for experiment in group] == [1, 2, 3, 4]


def test_a_perturbed_weight():
    straight = experiments.build(EXPERIMENTS["original"]).model
    other = experiments.build(EXPERIMENTS["original"], perturbed_weight=3).model
    difference = [a - b for a, b in zip(other.parameters(), straight.parameters(), strict=True)]
    assert difference[0].flatten()[3].item() == pytest.approx(1e-15, rel=0.05)
    assert sum(int((d != 0).sum()) for d in difference) == 1


def test_seed_and_dtype():
    one, two = (experiments.build(EXPERIMENTS["relu"], seed=s).model[0].weight for s in (1, 2))
    assert not torch.equal(one, two)
    half = experiments.build(replace(EXPERIMENTS["relu"], dtype="float32"))
    assert half.model[0].weight.dtype == torch.float32


def test_select():
    assert [e.name for e in experiments.select(["mse", "relu", "mse"])] == ["mse", "relu"]
    assert experiments.select(["relu--conv1-local"]) == [CANDIDATES["relu"][0]]
    with pytest.raises(ValueError, match="no experiment 'realu'; did you mean relu"):
        experiments.select(["original", "realu"])
    with pytest.raises(ValueError, match=r"no experiment 'zzzzz'$"):
        experiments.select(["zzzzz"])


def write_tiny(folder, seed=0):
    random = torch.Generator().manual_seed(seed)
    for prefix in ("train", "t10k"):
        pixels = torch.randint(0, 256, (12, 784), dtype=torch.uint8, generator=random)
        content = struct.pack(">4I", 2051, 12, 28, 28) + pixels.numpy().tobytes()
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(content)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2I", 2049, 12) + bytes(i % 10 for i in range(12))
        )


def test_digits_are_the_callers_own(tmp_path):
    write_tiny(tmp_path)
    first = experiments.digits(7, str(tmp_path), None)
    expected = first.train_images.clone()
    for tensor in (first.train_images, first.train_labels, first.test_images, first.test_labels):
        tensor.zero_()
    second = experiments.digits(7, str(tmp_path), None)
    assert torch.equal(second.train_images, expected)
    assert second.train_labels.any() and second.test_images.any() and second.test_labels.any()


def test_digits_of_a_folder_that_has_changed(tmp_path):
    write_tiny(tmp_path)
    first = experiments.digits(None, str(tmp_path), None)
    write_tiny(tmp_path, seed=1)
    second = experiments.digits(None, str(tmp_path), None)
    assert not torch.equal(first.train_images, second.train_images)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(data.DataError, match="is missing"):
        experiments.digits(None, str(tmp_path), None)
