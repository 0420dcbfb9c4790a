"""Weights that are averaged over the ends of epochs, as one of the choices for ``modern``."""

from dataclasses import replace

import pytest
import torch

from mnist_ops import training
from mnist_ops.lab import experiments, plan
from mnist_ops.torch7.optim import SGD

CHOICE = experiments.EVERY["modern--averaged"]
LATE = CHOICE.optimizers[6]
#: Two epochs of SGD, three that are averaged.
QUICK = replace(CHOICE, optimizers={1: {"name": "sgd", "lr": 5e-3}, 3: {**LATE, "lr": 5e-3}})

pytestmark = pytest.mark.usefixtures("one_thread")


def run(epochs, optimizers=QUICK.optimizers, **options):
    quick = replace(QUICK, optimizers=optimizers)
    return experiments.train(quick, 1, epochs, 40, verbose=False, progress=False, **options)


def vector(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def test_it_is_one_of_the_choices_of_the_plan():
    assert CHOICE in experiments.CHOICES["modern"] and CHOICE.validation == 5000
    assert "modern--averaged" in {task.experiment.name for task in plan.tasks(plan.read("full"))}
    rates = [CHOICE.optimizers[e]["lr"] for e in range(1, 7)]
    assert list(CHOICE.optimizers) == list(range(1, 7)) and CHOICE.epochs == 8
    assert rates == sorted(rates, reverse=True)


def test_the_mean_of_the_weights_is_tested():
    """The steps are those of SGD, by the compiled engine; the test is that of the mean."""
    plain = {epoch: {**options, "name": "sgd"} for epoch, options in QUICK.optimizers.items()}
    runs = [run(epochs, plain) for epochs in (3, 4, 5)]
    ends = [vector(model) for _, model in runs]
    history, model = run(5)
    assert torch.equal(vector(model), ends[-1])
    assert [r.train_loss for r in history] == [r.train_loss for r in runs[-1][0]]
    digits = experiments.digits(7, None, 40, validation=5000)
    for epoch in (3, 5):
        mean = torch.stack(ends[: epoch - 2]).mean(0)
        torch.nn.utils.vector_to_parameters(mean, model.parameters())
        _, loss = training.evaluate(model, digits.test_images, digits.test_labels)
        assert history[epoch - 1].test_loss == pytest.approx(loss, rel=1e-12)
    assert history[4].test_loss != runs[-1][0][4].test_loss


def test_resumed(tmp_path):
    """The means are in the checkpoint."""
    straight, _ = run(5)
    run(4, folder=tmp_path)
    resumed, _ = run(5, folder=tmp_path, resume=True)
    keys = ("epoch", "train_loss", "test_loss", "test_accuracy")
    assert [[vars(r)[k] for k in keys] for r in resumed] == [
        [vars(r)[k] for k in keys] for r in straight
    ]


def test_the_engine_of_steps_of_its_own():
    parts = experiments.build(QUICK)
    choose = training.choose_engine
    assert choose(parts.model, parts.optimizers[3]).description.startswith("compiled")

    class Other(SGD):
        def step(self, closure=None):
            return super().step(closure)

    engine = choose(parts.model, Other(parts.model.parameters()))
    assert "not compiled: the optimizer is Other, not SGD" in engine.description


def test_the_weights_come_back():
    """After an error in the test, too."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = training.AveragedSGD([parameter], lr=1.0)
    for value, mean in ((1.0, 1.0), (4.0, 2.5), (1.0, 2.0)):
        with torch.no_grad():
            parameter.fill_(value)
        optimizer.step()  # which counts, and without a gradient changes nothing
        with pytest.raises(KeyError), optimizer.averaged():
            assert torch.equal(parameter, torch.tensor([mean, mean]))
            raise KeyError
        assert torch.equal(parameter, torch.tensor([value, value]))


def test_a_look_at_the_means_counts_no_epoch(tmp_path):
    """Neither after a run nor after one was resumed."""
    parts = [experiments.build(QUICK) for _ in range(2)]
    digits = experiments.digits(7, None, 40, validation=5000)
    train, test = (
        (digits.train_images, digits.train_labels),
        (digits.test_images, digits.test_labels),
    )
    history: list[training.EpochResult] = []
    for epochs, part in zip((4, 5), parts, strict=True):
        history = training.fit(
            part.model, train, test, epochs=epochs, optimizer=part.optimizers,
            generator=part.generator, folder=tmp_path, resume=epochs > 4, verbose=False,
        )  # fmt: skip
        last, late = vector(part.model), part.optimizers[3]
        for _ in range(2):
            with late.averaged():
                _, loss = training.evaluate(part.model, *test)
                assert not torch.equal(vector(part.model), last)
            assert loss == history[-1].test_loss
