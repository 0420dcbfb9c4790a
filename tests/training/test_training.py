"""The training loop: the original's first 2,000 steps, confusion matrix, checkpoints, resuming."""

import copy
import csv
import inspect
import itertools
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import typing

import numpy as np
import pytest
import torch
from conftest import REFERENCE, torch7_cases, torch7_tensor
from torch import nn

from mnist_ops import torch7, training
from mnist_ops.lab import experiments
from mnist_ops.mnist import data, models
from mnist_ops.torch7.optim import ASGD, CG, LBFGS, SGD

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def original():
    with np.load(REFERENCE / "online_original.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def confusion():
    return torch7_cases("confusion")


def digits(count, seed):
    """Noisy images of ten patterns of 4x4 blocks, and their classes."""
    blocks = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    patterns = blocks.repeat_interleave(4, 2).repeat_interleave(4, 3)
    noise = torch.randn(count, 1, 32, 32, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(count) % 10
    return patterns[labels] + 0.5 * noise, labels


TRAIN, TEST = digits(60, 1), digits(30, 2)


class Setup:
    """A small network with all that is needed to train it."""

    def __init__(self, seed=1, momentum=0.5, dropout=0.25, dtype=torch.float64, **options):
        self.generator = torch7.start(seed)
        self.model = models.convnet(
            (3, 4, 8), dropout=dropout, generator=self.generator, dtype=dtype, **options
        )
        self.optimizer = SGD(self.model.parameters(), lr=0.02, lr_decay=1e-3, momentum=momentum)

    def fit(self, epochs, run=training.fit, **options):
        options = {"verbose": False, "progress": False} | options
        return run(
            self.model,
            options.pop("train", TRAIN),
            options.pop("test", TEST),
            epochs=epochs,
            optimizer=options.pop("optimizer", self.optimizer),
            generator=self.generator,
            **options,
        )

    def values(self):
        return nn.utils.parameters_to_vector(self.model.parameters()).detach().cpu()


def comparable(history):
    """Everything but the time it took."""
    return [{**vars(result), "seconds": None} for result in history]


def straight_bytes(path, name):
    """The bytes of one of a checkpoint's parameters."""
    return bytes(training.load_checkpoint(path)["model"][name].contiguous().view(-1).numpy().data)


def log_rows(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_first_2000_steps_of_the_original(original):
    splits = data.prepare()
    generator = torch7.start(seed=1)
    model = models.convnet(dtype=torch.float64, generator=generator)
    sgd = SGD(model.parameters(), lr=1e-3, lr_decay=1e-7)
    engine = training.AutogradEngine(model, sgd)

    first = splits.train_images[generator.randperm(60_000)[:1]].double()
    assert torch.equal(first[0], torch.from_numpy(original["s1_input"]))
    output = model(first)[0].detach()
    torch.testing.assert_close(output, torch.from_numpy(original["s1_output"]), rtol=0, atol=1e-12)

    order = torch.from_numpy(original["shuffle_epoch1"][:2000]).long() - 1
    pieces = [
        engine.run(splits.train_images, splits.train_labels, piece) for piece in order.split(500)
    ]
    losses, predictions = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    assert losses[0].item() == pytest.approx(original["s1_loss"].item(), abs=1e-12)
    expected = torch.from_numpy(original["losses_first2000"])
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-9)
    assert torch.equal(predictions + 1, torch.from_numpy(original["preds_first2000"]).long())
    correct = int((predictions == splits.train_labels[order]).sum())
    assert correct == original["online_correct_first2000"].item()
    values = nn.utils.parameters_to_vector(model.parameters()).detach()
    expected = torch.from_numpy(original["params_after_2000"])
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-9)


class TestConfusionMatrix:
    def test_vectors(self, confusion):
        output = torch7_tensor(confusion["pred"])
        target = torch7_tensor(confusion["target"]).long() - 1
        matrix = training.ConfusionMatrix(10)
        for piece in torch.arange(200).split(70):
            matrix.add(training.predicted_classes(output[piece]), target[piece])
        expected = torch7_tensor(confusion["mat"]).long()
        assert torch.equal(matrix.counts, expected)
        assert matrix.total == pytest.approx(confusion["totalValid"], abs=1e-12)
        # Torch7 keeps these per class in float32.
        valids = torch7_tensor(confusion["valids"]).double()
        torch.testing.assert_close(matrix.per_class, valids, rtol=0, atol=1e-7)
        assert matrix.average_row == pytest.approx(confusion["averageValid"], abs=1e-7)
        assert matrix.average_union == pytest.approx(confusion["averageUnionValid"], abs=1e-7)

    def test_class_without_samples(self):
        matrix = training.ConfusionMatrix(3)
        matrix.add(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]))
        assert matrix.total == 2 / 3
        assert matrix.per_class[2].isnan()
        assert matrix.average_row == pytest.approx((0.5 + 1.0) / 2)
        assert matrix.average_union == pytest.approx((1 / 2 + 1 / 2) / 2)

    def test_shown_and_saved(self, tmp_path):
        matrix = training.ConfusionMatrix.from_counts([[12345, 2], [0, 7]])
        lines = str(matrix).splitlines()
        assert lines[1].split() == ["0", "12345", "2", "99.98", "%"]
        assert lines[-1] == "right: 99.98 %, 99.99 % over classes"
        matrix.save(tmp_path / "confusion.csv")
        assert (tmp_path / "confusion.csv").read_text() == "12345,2\n0,7\n"

    @pytest.mark.parametrize(
        ("predictions", "targets", "error", "message"),
        [
            ([5], [1], ValueError, r"predictions must be in \[0, 3\), got 5"),
            ([1], [3], ValueError, r"targets must be in \[0, 3\), got 3"),
            ([-1], [1], ValueError, r"predictions must be in \[0, 3\), got -1"),
            ([0, 1], [0, -2], ValueError, r"targets must be in \[0, 3\), got -2"),
            ([0, 1], [0], ValueError, r"must be \(N,\), got \(2,\) and \(1,\)"),
            ([[0, 1]], [[0, 1]], ValueError, r"must be \(N,\), got \(1, 2\)"),
            ([0.9], [0], TypeError, "predictions must be a Tensor of integers, got torch.float32"),
            ([0], [True], TypeError, "targets must be a Tensor of integers, got torch.bool"),
        ],
    )
    def test_what_has_no_cell(self, predictions, targets, error, message):
        matrix = training.ConfusionMatrix(3)
        with pytest.raises(error, match=message):
            matrix.add(torch.tensor(predictions), torch.tensor(targets))
        assert int(matrix.counts.sum()) == 0

    def test_lists_are_refused(self):
        with pytest.raises(TypeError, match="predictions must be a Tensor of integers, got list"):
            training.ConfusionMatrix(3).add([5], [1])

    @pytest.mark.parametrize("size", [0, -1, 10**30])
    def test_size(self, size):
        with pytest.raises(ValueError, match="ConfusionMatrix: num_classes must "):
            training.ConfusionMatrix(size)

    @pytest.mark.parametrize("counts", [[[1, 2]], [[1], [2, 3]], [[0.5]], [[-1]], [3], [["1"]]])
    def test_counts_that_are_none(self, counts):
        with pytest.raises(ValueError, match="counts must be a square of integers >= 0"):
            training.ConfusionMatrix.from_counts(counts)

    def test_nothing_counted(self):
        assert math.isnan(training.ConfusionMatrix(3).total)

    def test_largest_is_found_in_float32(self):
        # Torch7 compares in float32, where these two are equal: the first one wins.
        output = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
        assert training.predicted_classes(output).tolist() == [0]


class TestEngine:
    @pytest.mark.parametrize("batch_size", [1, 4, 7])
    def test_against_a_plain_loop(self, device, batch_size):
        setup = Setup(dropout=0.0, device=device)
        reference = copy.deepcopy(setup.model)
        images, labels = TRAIN
        order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
        engine = training.AutogradEngine(setup.model, setup.optimizer, batch_size=batch_size)
        losses, predictions = engine.run(images, labels, order)
        velocity = None
        for steps, indices in enumerate(order.split(batch_size)):
            x, target = images[indices].double().to(device), labels[indices].to(device)
            output = reference(x)
            each = [-row[t] for row, t in zip(output, target, strict=True)]
            gradients = torch.autograd.grad(sum(each) / len(each), list(reference.parameters()))
            if velocity is None:
                velocity = list(gradients)
            else:
                velocity = [0.5 * v + 0.5 * g for v, g in zip(velocity, gradients, strict=True)]
            with torch.no_grad():
                for p, v in zip(reference.parameters(), velocity, strict=True):
                    p -= 0.02 / (1 + steps * 1e-3) * v
            done = steps * batch_size
            expected = torch.stack(each).detach().cpu()
            actual = losses[done : done + len(indices)]
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
            best = output.argmax(1).cpu()
            assert torch.equal(predictions[done : done + len(indices)], best)
        expected = nn.utils.parameters_to_vector(reference.parameters()).detach().cpu()
        torch.testing.assert_close(setup.values(), expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("chunk", [1, 7, 60, 1000])
    def test_chunks_change_nothing(self, chunk):
        whole, pieces = Setup(), Setup()
        expected = whole.fit(2)
        assert comparable(pieces.fit(2, chunk=chunk)) == comparable(expected)
        assert torch.equal(pieces.values(), whole.values())

    def test_last_batch_is_the_epochs_rest(self):
        class Recorder(training.AutogradEngine):
            sizes = ()

            def run(self, images, labels, order):
                self.sizes += (len(order),)
                return super().run(images, labels, order)

        setup = Setup()
        engine = Recorder(setup.model, setup.optimizer, batch_size=7)
        setup.fit(1, engine=engine, batch_size=7, chunk=20)
        assert engine.sizes == (14, 14, 14, 14, 4)  # whole batches of 7 until the end

    def test_transform_sees_every_batch(self):
        seen = []

        def transform(batch):
            seen.append(batch.clone())
            return batch * 0.0

        setup = Setup()
        setup.fit(1, batch_size=8, transform=transform)
        assert [len(batch) for batch in seen] == [8] * 7 + [4]
        # Of black images the first filters learn nothing.
        assert torch.equal(setup.model.conv1.weight, Setup().model.conv1.weight)

    def test_description(self):
        setup = Setup(dtype=torch.float32)
        text = training.AutogradEngine(setup.model, setup.optimizer, batch_size=3).description
        assert "autograd" in text and "float32, cpu" in text and "batch size 3" in text


class TestFit:
    def test_learns(self):
        history = Setup(dropout=0.0, momentum=0.0).fit(8)
        assert history[-1].test_accuracy > 90.0 > 40.0 > history[0].train_accuracy
        assert [result.epoch for result in history] == list(range(1, 9))

    def test_what_is_counted(self, monkeypatch):
        """The online accuracy and both losses, by hand for one epoch."""
        monkeypatch.setattr(training.loop, "_CURVE_SAMPLES", 7)
        setup = Setup()
        copied = copy.deepcopy((setup.model, setup.optimizer, setup.generator))
        (result,) = setup.fit(1)
        model, _, generator = copied
        model.dropout.generator = generator
        optimizer = SGD(model.parameters(), lr=0.02, lr_decay=1e-3, momentum=0.5)
        order = generator.randperm(60)
        losses, predictions = training.AutogradEngine(model, optimizer).run(*TRAIN, order)
        right = predictions == TRAIN[1][order]
        assert result.train_accuracy == 100.0 * int(right.sum()) / 60
        assert result.train_loss == pytest.approx(losses.mean().item(), rel=1e-12)
        pieces = [right[i : i + 7].tolist() for i in range(0, 60, 7)]
        assert result.curve == pytest.approx([100 * sum(piece) / len(piece) for piece in pieces])
        model.eval()
        with torch.no_grad():
            output = model(TEST[0].double())
        assert result.test_accuracy == 100.0 * int((output.argmax(1) == TEST[1]).sum()) / 30
        expected = -output[torch.arange(30), TEST[1]].mean().item()
        assert result.test_loss == pytest.approx(expected, rel=1e-12)
        assert sum(map(sum, result.confusion)) == 30
        counts = torch.zeros(len(result.train_confusion), len(result.train_confusion))
        for target, prediction in zip(TRAIN[1][order], predictions, strict=True):
            counts[target, prediction] += 1
        assert result.train_confusion == counts.tolist()
        assert result.learning_rate == 0.02

    def test_learning_rate_of_each_epoch(self):
        history = Setup().fit(3, batch_size=2)
        rates = [0.02 / (1 + 30 * epoch * 1e-3) for epoch in range(3)]
        assert [result.learning_rate for result in history] == pytest.approx(rates, rel=1e-15)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("batch_size", [1, 16])
    def test_devices_and_dtypes(self, device, dtype, batch_size):
        setup = Setup(dtype=dtype, device=device)
        history = setup.fit(6, batch_size=batch_size)
        assert setup.values().isfinite().all() and setup.values().dtype == dtype
        assert history[-1].train_loss < history[0].train_loss

    @pytest.mark.parametrize(
        ("criterion", "options"),
        [
            (torch7.multi_margin_loss, {"log_softmax": None}),
            (torch7.mse_loss, {"log_softmax": None, "output_activation": "tanh"}),
        ],
    )
    def test_other_criteria(self, criterion, options):
        history = Setup(dropout=0.0, **options).fit(4, criterion=criterion)
        assert history[-1].train_loss < history[0].train_loss

    def test_one_line_per_epoch(self, capfd):
        Setup().fit(2, verbose=True, progress=None)
        out, err = capfd.readouterr()
        lines = out.splitlines()
        assert lines[0].startswith("training on 60 digits: compiled online SGD, float64, cpu")
        assert [line[:10] for line in lines[1:]] == ["epoch   1:", "epoch   2:"]
        assert err == ""

    def test_progress_bar(self, capfd):
        def slowly(batch):
            time.sleep(0.02)  # the bar is redrawn every 0.1 s at most
            return batch

        Setup().fit(1, progress=True, chunk=10, transform=slowly)
        _, err = capfd.readouterr()
        assert "epoch 1/1" in err and "digits/s" in err and "/60" in err
        assert re.search(r"training [\d.]+ %", err)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"epochs": -1}, "epochs must be >= 0"),
            ({"epochs": 1, "batch_size": 0}, "batch_size must be >= 1"),
            ({"epochs": 10**30}, r"fit: epochs must fit 64 bits"),
            ({"epochs": 1, "batch_size": 10**30}, r"fit: batch_size must fit 64 bits"),
            ({"epochs": 1, "chunk": 0}, "fit: chunk must be >= 1, got 0"),
            ({"epochs": 1, "resume": True}, "resume needs a folder"),
            ({"epochs": 1, "train": (TRAIN[0], TEST[1])}, "train must hold as many images"),
            ({"epochs": 1, "test": (TEST[0][:0], TEST[1][:0])}, "test must hold as many images"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(ValueError, match=message):
            Setup().fit(**options)


class Counted(nn.Module):
    """Passes its input on and counts the training passes."""

    calls = 0

    def forward(self, x):
        self.calls += self.training
        return x


def optimizers(setup):
    """One of each kind for the same network."""
    params = list(setup.model.parameters())
    return {
        "sgd": setup.optimizer,
        "asgd": ASGD(params, lr=0.02, t0=70),
        "cg": CG(params, max_iter=2),
        "lbfgs": LBFGS(params, lr=0.2, max_iter=2, history_size=4),
        "torch": torch.optim.LBFGS(params, lr=0.2, max_iter=2, max_eval=3, history_size=4),
    }


def test_repeatable_in_threads():
    """cuDNN's settings belong to the process: the last one out takes them back, whoever it is."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32
    first, second = training.repeatable(), training.repeatable()
    first.__enter__()
    thread = threading.Thread(target=second.__enter__)
    thread.start()
    thread.join()
    first.__exit__(None, None, None)
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.allow_tf32
    second.__exit__(None, None, None)
    assert before == (torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32)


class TestOtherOptimizers:
    @pytest.mark.parametrize("kind", ["cg", "lbfgs", "torch"])
    def test_every_evaluation_counts(self, device, kind):
        """Against a plain loop whose closure notes what it predicts."""
        setup, other = Setup(dropout=0.0, device=device), Setup(dropout=0.0, device=device)
        (result,) = setup.fit(1, optimizer=optimizers(setup)[kind], batch_size=4, chunk=20)
        model, optimizer = other.model, optimizers(other)[kind]
        model.train()
        losses, right = [], []

        with training.repeatable():  # as fit does
            for batch in other.generator.randperm(60).split(4):
                x, target = TRAIN[0][batch].double().to(device), TRAIN[1][batch].to(device)

                def closure():
                    model.zero_grad()
                    output = model(x)
                    each = -output[torch.arange(4), target]
                    each.mean().backward()
                    losses.extend(each.tolist())
                    right.extend((output.argmax(1) == target).tolist())
                    return each.mean()

                optimizer.step(closure)
        atol = 0.0 if device == "cpu" else 1e-9
        torch.testing.assert_close(setup.values(), other.values(), rtol=0.0, atol=atol)
        assert len(right) > (60 if kind == "cg" else 119)
        assert result.train_accuracy == 100.0 * sum(right) / len(right)
        assert result.train_loss == pytest.approx(math.fsum(losses) / len(losses), rel=1e-12)
        size = max(50, -(-len(right) // 60))
        pieces = [right[i : i + size] for i in range(0, len(right), size)]
        assert result.curve == pytest.approx([100 * sum(piece) / len(piece) for piece in pieces])
        assert result.learning_rate == (None if kind == "cg" else 0.2)

    @pytest.mark.parametrize("kind", ["cg", "lbfgs", "torch"])
    def test_what_the_engine_returns(self, kind):
        setup = Setup()
        counted = Counted()
        setup.model.tanh3 = nn.Sequential(setup.model.tanh3, counted)
        engine = training.AutogradEngine(setup.model, optimizers(setup)[kind], batch_size=3)
        order = torch.tensor([5, 1, 7, 7, 2])
        losses, predictions, samples = engine.run(*TRAIN, order)
        assert losses.shape == predictions.shape == samples.shape
        # Whole batches in turn, each as often as it was evaluated.
        first = samples.tolist().index(2) - 1
        assert samples[:first].view(-1, 3).unique(dim=0).tolist() == [[5, 1, 7]]
        assert samples[first:].view(-1, 2).unique(dim=0).tolist() == [[7, 2]]
        assert counted.calls == first // 3 + (len(samples) - first) // 2 > 2

    def test_one_transform_and_dropout_each_time(self):
        setup = Setup(dropout=0.5)
        transformed, outputs = [], []
        setup.model.dropout.register_forward_hook(lambda *args: outputs.append(args[2].detach()))
        engine = training.AutogradEngine(
            setup.model,
            optimizers(setup)["lbfgs"],
            batch_size=5,
            transform=lambda batch: transformed.append(len(batch)) or batch,
        )
        engine.run(*TRAIN, torch.arange(15))
        assert transformed == [5, 5, 5]
        assert len(outputs) == 6
        zeros = [output == 0 for output in outputs]
        assert all(not torch.equal(a, b) for a, b in itertools.pairwise(zeros))

    # L-BFGS on a few digits at a time may run away, and rounding decides: all of them at once.
    @pytest.mark.parametrize(
        ("kind", "batch_size", "epochs"), [("asgd", 1, 6), ("cg", 5, 6), ("lbfgs", 60, 12)]
    )
    def test_learns(self, kind, batch_size, epochs):
        setup = Setup(dropout=0.0)
        history = setup.fit(epochs, optimizer=optimizers(setup)[kind], batch_size=batch_size)
        assert history[-1].test_accuracy > 60.0 > history[0].train_accuracy

    def test_averages_are_tested(self):
        setup = Setup(dropout=0.0)
        optimizer = optimizers(setup)["asgd"]
        history = setup.fit(2, optimizer=optimizer)
        plain = training.evaluate(setup.model, *TEST)[1]
        vector = nn.utils.parameters_to_vector
        averages = [optimizer.state[p]["average"] for p in setup.model.parameters()]
        nn.utils.vector_to_parameters(vector(averages), setup.model.parameters())
        loss = training.evaluate(setup.model, *TEST)[1]
        assert history[-1].test_loss == loss != plain
        assert history[-1].learning_rate == 0.02 / (1 + 1e-4 * 0.02 * 60) ** 0.75

    def test_engine_with_two_results_is_unchanged(self):
        setup = Setup()
        engine = training.AutogradEngine(setup.model, setup.optimizer)
        assert len(engine.run(*TRAIN, torch.arange(4))) == 2


def schedule(setup):
    kinds = optimizers(setup)
    return {1: kinds["sgd"], 3: kinds["lbfgs"], 4: kinds["asgd"], 5: kinds["cg"]}


@pytest.fixture(scope="module")
def straight():
    setup = Setup()
    history = setup.fit(6, optimizer=schedule(setup), batch_size=6)
    return comparable(history), setup.values(), setup.generator.randperm(99)


class TestSwitch:
    @pytest.mark.parametrize(
        "stops",
        [
            (0, 6),
            (3, 6),
            (1, 2, 3, 4, 5, 6),
            *(pytest.param((i, 6), marks=pytest.mark.slow) for i in (1, 2, 4)),
        ],
    )
    def test_resumed_anywhere(self, tmp_path, straight, stops):
        for i, epochs in enumerate(stops):
            setup = Setup(seed=1 if i == 0 else 9)
            history = setup.fit(
                epochs,
                optimizer=schedule(setup),
                batch_size=6,
                folder=tmp_path,
                resume=i > 0,
            )
        assert comparable(history) == straight[0]
        assert torch.equal(setup.values(), straight[1])
        assert torch.equal(setup.generator.randperm(99), straight[2])
        rates = [row["learning_rate"] for row in log_rows(tmp_path)]
        assert rates[2] == "0.2" and rates[4:] == ["", ""]

    def test_who_is_in_charge(self, straight):
        """Two epochs of SGD are those of SGD alone; every switch changes what follows."""
        alone = Setup()
        first = comparable(alone.fit(3, batch_size=6))
        assert straight[0][:2] == first[:2] and straight[0][2] != first[2]

    def test_told(self, capfd):
        setup = Setup()
        kinds = optimizers(setup)
        setup.fit(3, optimizer={1: kinds["sgd"], 3: kinds["cg"]}, verbose=True)
        lines = capfd.readouterr().out.splitlines()
        assert lines[0].startswith("training on 60 digits: compiled online SGD")
        assert [line[:10] for line in lines[1:]] == [f"epoch   {i}:" for i in (1, 2, 3, 3)]
        assert "autograd" in lines[3] and "the optimizer is CG, not SGD" in lines[3]

    def test_told_on_resuming(self, tmp_path, capfd):
        for epochs, resume in ((2, False), (3, True)):
            setup = Setup()
            kinds = optimizers(setup)
            setup.fit(
                epochs,
                optimizer={1: kinds["sgd"], 3: kinds["cg"]},
                folder=tmp_path,
                resume=resume,
                verbose=resume,
            )
        lines = capfd.readouterr().out.splitlines()
        assert "autograd" in lines[0] and len(lines) == 2

    @pytest.mark.parametrize("epochs", [0, 2])
    def test_continued_in_another_way(self, tmp_path, epochs):
        """A run of SGD alone, with its one-optimizer checkpoint, goes on with L-BFGS."""
        Setup().fit(epochs, folder=tmp_path, batch_size=6)
        state = training.load_checkpoint(tmp_path / "checkpoint.pt")
        assert "param_groups" in state["optimizer"] and "optimizers" not in state
        setup, straight = Setup(seed=9), Setup()
        options = {"batch_size": 6}
        mapping = {1: setup.optimizer, 3: optimizers(setup)["lbfgs"]}
        history = setup.fit(4, optimizer=mapping, folder=tmp_path, resume=True, **options)
        mapping = {1: straight.optimizer, 3: optimizers(straight)["lbfgs"]}
        assert comparable(history) == comparable(straight.fit(4, optimizer=mapping, **options))
        assert torch.equal(setup.values(), straight.values())

    def test_another_past_is_refused(self, tmp_path):
        setup = Setup()
        setup.fit(3, optimizer={1: setup.optimizer, 3: optimizers(setup)["cg"]}, folder=tmp_path)
        other = Setup()
        with pytest.raises(training.CheckpointError, match=r"from epochs 1, 3, .* from 1, 2$"):
            mapping = {1: other.optimizer, 2: optimizers(other)["cg"]}
            other.fit(4, optimizer=mapping, folder=tmp_path, resume=True)
        with pytest.raises(training.CheckpointError, match=r"from epochs 1, 3, .* from 1$"):
            Setup().fit(4, folder=tmp_path, resume=True)

    def test_a_mapping_of_one_is_that_one(self, tmp_path):
        setup, alone = Setup(), Setup()
        history = setup.fit(1, optimizer={1: setup.optimizer}, folder=tmp_path)
        assert comparable(history) == comparable(alone.fit(1))
        assert "optimizer" in training.load_checkpoint(tmp_path / "checkpoint.pt")

    @pytest.mark.parametrize("epochs", [(), (2,), (0, 1), (1, 2.5)])
    def test_bad_epochs(self, epochs):
        setup = Setup()
        with pytest.raises(ValueError, match="fit: optimizer must map 1, and later epochs"):
            setup.fit(1, optimizer=dict.fromkeys(epochs, setup.optimizer))

    def test_no_engine_for_several(self):
        setup = Setup()
        engine = training.AutogradEngine(setup.model, setup.optimizer)
        mapping = {1: setup.optimizer, 2: optimizers(setup)["cg"]}
        with pytest.raises(ValueError, match="engine must not be given with several optimizers"):
            setup.fit(1, optimizer=mapping, engine=engine)


def spoil(setup, value):
    """A callback that makes one weight NaN or infinite."""

    def on_progress(_):
        with torch.no_grad():
            setup.model.linear2.bias[3] = value

    return on_progress


@pytest.mark.parametrize(
    ("function", "loop", "name", "result"),
    [
        (training.fit, training.fitting, "fit", list[training.EpochResult]),
        (
            experiments.train,
            experiments.training_loop,
            "train",
            tuple[list[training.EpochResult], nn.Sequential],
        ),
    ],
)
def test_what_runs_a_loop_is_a_function_of_its_own(function, loop, name, result):
    assert function.__name__ == function.__qualname__ == name
    assert pickle.loads(pickle.dumps(function)) is function
    ours, theirs = map(inspect.signature, (function, loop))
    assert ours.parameters == theirs.parameters and ours.return_annotation == result
    assert typing.get_type_hints(function)["return"] == result
    assert function.__doc__ == loop.__doc__ and f"``{name}`` does so at once" in function.__doc__


class TestDivergence:
    @pytest.mark.parametrize("compiled", [True, False])
    @pytest.mark.parametrize("worst", [math.nan, math.inf])
    def test_goes_on(self, tmp_path, compiled, worst):
        """From the second step on every output is NaN: the first class, as in torch.argmax."""
        setup = Setup(dropout=0.0)
        engine = None if compiled else training.AutogradEngine(setup.model, setup.optimizer)
        with pytest.warns(UserWarning, match="the run has diverged in epoch 1: training") as caught:
            history = setup.fit(
                2, engine=engine, folder=tmp_path, chunk=1, on_progress=spoil(setup, worst)
            )
        assert len(caught) == 1 and caught[0].filename == __file__  # once
        for result in history:
            assert not math.isfinite(result.train_loss) and not math.isfinite(result.test_loss)
            assert 0.0 <= result.train_accuracy < 12.0  # a tenth, and perhaps the first one
            assert result.test_accuracy == 10.0
            assert [row[0] for row in result.confusion] == [3] * 10
            assert "loss nan" in str(result) or "loss inf" in str(result)
            json.dumps([*result.confusion, result.curve], allow_nan=False)
        assert [float(row["test_accuracy"]) for row in log_rows(tmp_path)] == [10.0, 10.0]
        again = Setup(dropout=0.0)
        resumed = again.fit(3, folder=tmp_path, resume=True)
        assert [result.test_accuracy for result in resumed] == [10.0] * 3

    @pytest.mark.parametrize("worst", [math.nan, -math.inf])
    def test_what_is_not_finite_from_the_start(self, tmp_path, worst):
        setup = Setup()
        with torch.no_grad():
            setup.model.linear2.bias[3] = worst
        with pytest.raises(ValueError, match=r"fit: the network's linear2.bias must be finite"):
            setup.fit(1, folder=tmp_path)
        for name, (images, labels) in (("train", TRAIN), ("test", TEST)):
            images = images.clone()
            images[7, 0, 31, 31] = worst
            with pytest.raises(ValueError, match=f"fit: {name} images must be finite"):
                Setup().fit(1, folder=tmp_path, **{name: (images, labels)})
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("compiled", [True, False])
    @pytest.mark.parametrize("worst", [math.nan, math.inf, -1.0])
    def test_a_rate_that_is_none(self, compiled, worst):
        setup = Setup()
        setup.optimizer.param_groups[0]["lr"] = worst
        before = setup.values()
        with pytest.raises(ValueError, match="must be >= 0 and finite, got"):
            engine = None if compiled else training.AutogradEngine(setup.model, setup.optimizer)
            setup.fit(1, engine=engine)
        assert torch.equal(setup.values(), before)

    @pytest.mark.parametrize("compiled", [True, False])
    def test_a_rate_that_is_too_high(self, compiled):
        setup = Setup(dropout=0.0, momentum=0.0)
        setup.optimizer.param_groups[0]["lr"] = 1e308
        engine = None if compiled else training.AutogradEngine(setup.model, setup.optimizer)
        (result,) = setup.fit(1, engine=engine)
        assert not math.isfinite(result.train_loss)
        assert 0.0 <= result.test_accuracy <= 100.0

    @pytest.mark.parametrize("kind", ["asgd", "cg", "lbfgs", "torch"])
    def test_other_optimizers_go_on(self, kind):
        setup = Setup(dropout=0.0)
        options = {"batch_size": 20, "chunk": 20, "on_progress": spoil(setup, math.nan)}
        with pytest.warns(UserWarning, match="the run has diverged in epoch 1"):
            (result,) = setup.fit(1, optimizer=optimizers(setup)[kind], **options)
        assert math.isnan(result.train_loss) and result.test_accuracy == 10.0


class TestHooks:
    def test_progress(self):
        counts = []
        setup = Setup()
        setup.fit(2, on_progress=counts.append, chunk=25)
        assert counts == [25, 25, 10] * 2
        counts.clear()
        setup.fit(1, optimizer=optimizers(setup)["cg"], on_progress=counts.append, chunk=40)
        assert counts == [40, 20]  # samples, however often they were evaluated

    def test_epochs(self, tmp_path):
        seen = []

        def on_epoch(result):
            state = training.load_checkpoint(tmp_path / "checkpoint.pt")
            assert state["epoch"] == result.epoch == len(log_rows(tmp_path))
            seen.append(result)

        Setup().fit(1, folder=tmp_path, on_epoch=on_epoch)
        history = Setup().fit(3, folder=tmp_path, on_epoch=on_epoch, resume=True)
        assert seen == history  # each once, none twice after resuming


class TestEvaluate:
    def test_batches_change_nothing(self):
        model = Setup().model
        whole, loss = training.evaluate(model, *TEST, batch_size=30)
        pieces, same = training.evaluate(model, *TEST, batch_size=7)
        assert torch.equal(whole.counts, pieces.counts)
        assert loss == pytest.approx(same, rel=1e-12)

    def test_nothing_to_test(self):
        with pytest.raises(ValueError, match="one image at least"):
            training.evaluate(Setup().model, TEST[0][:0], TEST[1][:0])
        with pytest.raises(ValueError, match="one for each label, got 30 and 29"):
            training.evaluate(Setup().model, TEST[0], TEST[1][1:])

    @pytest.mark.parametrize("batch_size", [0, -1, 10**30])
    def test_batch_size(self, batch_size):
        with pytest.raises(ValueError, match="evaluate: batch_size must "):
            training.evaluate(Setup().model, *TEST, batch_size=batch_size)

    def test_every_module_keeps_its_mode(self):
        model = Setup(dropout=0.5).model
        model.train()
        model.conv1.eval()
        modes = [module.training for module in model.modules()]
        seen = []
        handle = model.register_forward_hook(lambda module, *_: seen.append(module.training))
        training.evaluate(model, *TEST)
        handle.remove()
        assert seen == [False] and [module.training for module in model.modules()] == modes
        with pytest.raises(RuntimeError):
            training.evaluate(model, TEST[0][:, :, :3], TEST[1])
        assert [module.training for module in model.modules()] == modes


class TestResume:
    @pytest.mark.parametrize("batch_size", [1, 7])
    @pytest.mark.parametrize("stops", [(0, 3), (1, 3), (1, 2, 3), (3, 3)])
    def test_bit_identical(self, tmp_path, device, batch_size, stops):
        straight = Setup(device=device)
        expected = straight.fit(3, batch_size=batch_size)
        for i, epochs in enumerate(stops):
            # A seed of its own: everything must come from the checkpoint.
            setup = Setup(seed=1 if i == 0 else 9, device=device)
            history = setup.fit(epochs, batch_size=batch_size, folder=tmp_path, resume=i > 0)
        assert comparable(history) == comparable(expected)
        assert torch.equal(setup.values(), straight.values())
        assert (
            setup.optimizer.state_dict()["param_groups"]
            == (straight.optimizer.state_dict()["param_groups"])
        )
        assert torch.equal(setup.generator.randperm(99), straight.generator.randperm(99))
        assert [row["epoch"] for row in log_rows(tmp_path)] == ["1", "2", "3"]

    def test_pytorchs_own_dropout_continues(self, tmp_path):
        def build():
            setup = Setup(dropout=0.0)
            setup.model.tanh3 = nn.Sequential(nn.Tanh(), nn.Dropout(0.5))
            return setup

        torch.manual_seed(3)
        straight = build()
        straight.fit(2)
        torch.manual_seed(3)
        build().fit(1, folder=tmp_path)
        torch.manual_seed(4)
        setup = build()
        setup.fit(2, folder=tmp_path, resume=True)
        assert torch.equal(setup.values(), straight.values())

    @pytest.mark.slow
    def test_interrupted_in_the_middle(self, tmp_path):
        """Ctrl-C and a kill, in a process of its own, each in the middle of an epoch."""
        script = textwrap.dedent(
            """
            import os, signal, sys
            sys.path[:0] = sys.argv[1].split(os.pathsep)
            import torch
            torch.set_num_threads(1)
            from test_training import Setup
            folder, action, epochs, steps = sys.argv[2:]
            setup, count = Setup(), 0
            def transform(batch):
                global count
                count += 1
                if count == int(steps):
                    os.kill(os.getpid(), getattr(signal, action))
                return batch
            setup.fit(int(epochs), folder=folder, transform=transform,
                      resume=os.path.exists(os.path.join(folder, "checkpoint.pt")))
            """
        )

        def run(action, steps):
            command = [sys.executable, "-c", script, os.pathsep.join(sys.path), str(tmp_path)]
            return subprocess.run(
                [*command, action, "4", str(steps)], capture_output=True, text=True, timeout=100
            )

        first = run("SIGINT", 30)  # in epoch 1
        assert "state after epoch 0" in first.stderr
        second = run("SIGKILL", 130)  # in epoch 3
        assert second.returncode == -signal.SIGKILL
        assert training.load_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 2
        third = run("SIGINT", 70)  # in epoch 4
        assert "state after epoch 3" in third.stderr
        setup, straight = Setup(), Setup()
        history = setup.fit(4, folder=tmp_path, resume=True, transform=lambda batch: batch)
        # A transform here too: with dropout it decides which engine runs the steps.
        unchanged = straight.fit(4, transform=lambda batch: batch)
        assert comparable(history) == comparable(unchanged)
        assert torch.equal(setup.values(), straight.values())
        assert [row["epoch"] for row in log_rows(tmp_path)] == ["1", "2", "3", "4"]
        files = [".lock", "checkpoint.backup.pt", "checkpoint.pt", "log.csv"]
        assert sorted(os.listdir(tmp_path)) == files

    def test_log(self, tmp_path):
        (result,) = Setup().fit(1, folder=tmp_path)
        (row,) = log_rows(tmp_path)
        assert {name: float(value) for name, value in row.items()} == {
            name: value
            for name, value in vars(result).items()
            if name not in ("curve", "confusion", "train_confusion")
        }

    def test_earlier_checkpoint_is_kept(self, tmp_path):
        Setup().fit(2, folder=tmp_path)
        Setup().fit(1, folder=tmp_path)
        assert training.load_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 1
        assert training.load_checkpoint(tmp_path / "checkpoint.previous.pt")["epoch"] == 2
        assert len(log_rows(tmp_path)) == 1

    def test_other_settings_are_refused(self, tmp_path):
        Setup().fit(1, folder=tmp_path, settings={"lr": 0.02, "limit": 60})
        with pytest.raises(
            training.CheckpointError, match=r"made with lr = 0.02, this run has 0.1"
        ):
            Setup().fit(2, folder=tmp_path, settings={"lr": 0.1, "limit": 60}, resume=True)

    @pytest.mark.parametrize(
        "options",
        [{"kernel_size": 3}, {"activation": "relu"}, {"norm_type": 3}, {"dtype": torch.float32}],
        ids=str,
    )
    def test_other_network_is_refused(self, tmp_path, options):
        """Also where its state has the same shapes."""
        Setup().fit(1, folder=tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(
            training.CheckpointError, match=r"another network|dtype = torch\.float64"
        ):
            Setup(**options).fit(2, folder=tmp_path, resume=True)
        assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def test_other_network_without_its_description(self, tmp_path):
        """As earlier versions saved it."""
        Setup().fit(1, folder=tmp_path)
        state = training.load_checkpoint(tmp_path / "checkpoint.pt")
        del state["definition"]
        torch.save(state, tmp_path / "checkpoint.pt")
        with pytest.raises(training.CheckpointError, match="does not fit this network"):
            Setup(kernel_size=3).fit(2, folder=tmp_path, resume=True)
        Setup().fit(2, folder=tmp_path, resume=True)

    @pytest.mark.parametrize("kind", ["asgd", "cg", "lbfgs", "torch"])
    def test_other_optimizer_is_refused(self, tmp_path, kind):
        Setup().fit(1, folder=tmp_path)
        setup = Setup()
        message = "optimizer = SGD, this run has"
        with pytest.raises(training.CheckpointError, match=message):
            setup.fit(2, folder=tmp_path, resume=True, optimizer=optimizers(setup)[kind])

    def test_other_options_are_refused(self, tmp_path):
        Setup().fit(1, folder=tmp_path, batch_size=2)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

        def resume(message, setup=None, **options):
            options = {"batch_size": 2, "folder": tmp_path, "resume": True} | options
            with pytest.raises(training.CheckpointError, match=message):
                (setup or Setup()).fit(2, **options)

        resume("batch size = 2, this run has 3", batch_size=3)
        resume("momentum = 0.5, this run has 0.4", Setup(momentum=0.4))
        setup = Setup()
        setup.optimizer = SGD(setup.model.parameters(), 0.02, 1e-4, 0.5)
        resume("lr_decay = 0.001, this run has 0.0001", setup)
        resume("criterion = nll_loss, this run has mse_loss", criterion=torch7.mse_loss)
        resume(r"transform = None, this run has Identity\(\)", transform=nn.Identity())
        images, labels = TRAIN[0].clone(), TRAIN[1].roll(1)
        images[3, 0, 5, 5] += 1e-6
        resume("another training data", train=(images, TRAIN[1]))
        resume("another training data", train=(TRAIN[0], labels))
        resume("another training data", train=(TRAIN[0][:50], TRAIN[1][:50]))
        resume("another test data", test=(TEST[0].neg(), TEST[1]))
        assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def test_missing(self, tmp_path):
        with pytest.raises(training.CheckpointError, match="there is no checkpoint at"):
            Setup().fit(1, folder=tmp_path, resume=True)

    @pytest.mark.parametrize("content", [b"", b"hello", None])
    def test_damaged(self, tmp_path, content):
        Setup().fit(0, folder=tmp_path)
        path = tmp_path / "checkpoint.pt"
        path.write_bytes(path.read_bytes()[:-500] if content is None else content)
        with pytest.raises(training.CheckpointError, match="damaged or not a checkpoint"):
            Setup().fit(2, folder=tmp_path, resume=True)

    @pytest.mark.parametrize("damage", ["bit", "truncated", "zeros", "missing", "key"])
    def test_backup_takes_over_where_the_newest_is_damaged(self, tmp_path, damage):
        """An epoch is done again, and what comes out is that of a run without the damage."""
        straight, setup = Setup(), Setup(seed=9)
        expected = straight.fit(3)
        Setup().fit(2, folder=tmp_path)
        path = tmp_path / "checkpoint.pt"
        content = bytearray(path.read_bytes())
        if damage == "bit":
            at = content.index(straight_bytes(path, "conv1.weight"))
            content[at + 6] ^= 1  # a change of 1e-5, which nobody would see
            path.write_bytes(content)
            assert torch.load(path, weights_only=True)["epoch"] == 2  # nor does torch.load
        elif damage == "truncated":
            path.write_bytes(content[: len(content) // 2])
        elif damage == "zeros":
            path.write_bytes(content[:4096] + bytes(4096) + content[8192:])
        elif damage == "missing":  # killed between two renamings
            path.unlink()
        else:
            state = training.load_checkpoint(path)
            del state["history"]
            torch.save(state, path)
        with pytest.warns(UserWarning, match="going on from .*backup.pt, the state after epoch 1"):
            history = setup.fit(3, folder=tmp_path, resume=True)
        assert comparable(history) == comparable(expected)
        assert torch.equal(setup.values(), straight.values())
        assert training.load_checkpoint(path)["epoch"] == 3
        assert training.load_checkpoint(tmp_path / "checkpoint.backup.pt")["epoch"] == 2

    def test_damaged_one_never_becomes_the_backup(self, tmp_path):
        Setup().fit(2, folder=tmp_path)
        (tmp_path / "checkpoint.pt").write_bytes(b"")
        with pytest.warns(UserWarning, match="damaged"):
            Setup().fit(1, folder=tmp_path, resume=True)
        assert training.load_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 1
        assert not (tmp_path / "checkpoint.backup.pt").exists()

    def test_backup_of_another_run_is_not_taken(self, tmp_path):
        Setup().fit(2, folder=tmp_path)
        Setup(seed=2).fit(0, folder=tmp_path)
        (tmp_path / "checkpoint.pt").write_bytes(b"")
        with pytest.raises(training.CheckpointError, match="damaged"):
            Setup(seed=2).fit(1, folder=tmp_path, resume=True)

    @pytest.mark.parametrize(
        "change",
        [
            {"history": [{"epoch": 1}]},
            {"history": []},
            {"history": [3]},
            {"generator": {}},
            {"generator": {"seed": 1, "key": 3, "position": 0, "second_normal": 1}},
            {"torch_rng": torch.zeros(3)},
            {"optimizer": None},
            {"optimizer": {"state": {}}},
            {"optimizer": {"state": 3, "param_groups": [3]}},
            {"model": {3: 4}},
            {"optimizers": 3},
            {"optimizers": {"a": 3}},
            *(
                {name: wrong}
                for name in ("epoch", "settings", "model")
                for wrong in (None, [], 0.5)
            ),
            *({name: None} for name in ("generator", "torch_rng", "cuda_rng", "history")),
        ],
        ids=str,
    )
    def test_whole_but_not_what_fit_saves(self, tmp_path, change):
        Setup().fit(1, folder=tmp_path)
        (tmp_path / "checkpoint.backup.pt").unlink()
        path = tmp_path / "checkpoint.pt"
        torch.save(training.load_checkpoint(path) | change, path)
        with pytest.raises(training.CheckpointError, match=r"checkpoint.pt (is not|does not|was)"):
            Setup().fit(2, folder=tmp_path, resume=True)

    def test_two_at_once(self, tmp_path):
        refused = []

        def on_epoch(result):
            def second():
                with pytest.raises(training.FolderInUseError, match="another process is at work"):
                    Setup().fit(1, folder=tmp_path)
                refused.append(result.epoch)

            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

        Setup().fit(2, folder=tmp_path, on_epoch=on_epoch)
        assert refused == [1, 2]
        assert training.load_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 2

    def test_two_loops_at_once(self, tmp_path):
        """Side by side, or one within the other; whoever began them may hold the lock, too."""

        def loop(folder):
            return Setup().fit(1, training.fitting, folder=folder)

        one, two = tmp_path / "one", tmp_path / "two"
        two.mkdir()
        with pytest.raises(training.FolderInUseError, match="another training loop is at work in"):
            training.side_by_side([loop(one), loop(two / ".." / "one")])
        with pytest.raises(training.FolderInUseError, match="another training loop is at work in"):
            Setup().fit(2, folder=one, on_epoch=lambda _: Setup().fit(1, folder=one))
        with training.locked(one), training.locked(two):
            assert len(training.side_by_side([loop(one), loop(two)])) == 2

    def test_something_else(self, tmp_path):
        torch.save({"weight": torch.zeros(3)}, tmp_path / "checkpoint.pt")
        with pytest.raises(training.CheckpointError, match="not a checkpoint of this version"):
            training.load_checkpoint(tmp_path / "checkpoint.pt")

    def test_code_is_never_run(self, tmp_path):
        class Harmful:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "harm"),)

        torch.save({"format": 1, "model": Harmful()}, tmp_path / "checkpoint.pt")
        with pytest.raises(training.CheckpointError):
            training.load_checkpoint(tmp_path / "checkpoint.pt")
        assert not (tmp_path / "harm").exists()

    @pytest.mark.parametrize("where", ["write", "fsync", "replace"])
    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
    def test_saving_is_atomic(self, tmp_path, monkeypatch, where, error):
        path = tmp_path / "checkpoint.pt"
        training.write_torch(path, torch.ones(100_000))

        def fail(*_):
            raise error("here")

        if where == "write":
            monkeypatch.setattr(torch, "save", fail)
        else:
            monkeypatch.setattr(os, where, fail)
        with pytest.raises(error):
            training.write_torch(path, torch.zeros(100_000))
        assert torch.equal(training.read_torch(path), torch.ones(100_000))
        assert os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.slow
def test_wherever_new_tensors_go(tmp_path):
    """torch.set_default_device("meta"): what the library makes for itself says where it is."""
    code = textwrap.dedent(
        """
        import sys
        import torch
        torch.set_num_threads(1)
        torch.set_default_device(sys.argv[1])
        from mnist_ops.mnist import data, models, transforms
        from mnist_ops.lab import experiments
        from mnist_ops.torch7 import optim
        from mnist_ops import torch7, training
        splits = data.prepare(limit=40)
        for kind in ("sgd", "asgd", "cg", "lbfgs"):
            for transform in (None, "rotation"):
                generator = torch7.start(seed=1)
                with torch.device("cpu"):
                    model = models.convnet((3, 4, 8), dropout=0.0 if transform else 0.25,
                                           dtype=torch.float64, generator=generator)
                parameters = list(model.parameters())
                optimizer = {
                    "sgd": lambda: optim.SGD(parameters, 0.02, momentum=0.5),
                    "asgd": lambda: optim.ASGD(parameters, 0.02, t0=20),
                    "cg": lambda: optim.CG(parameters),
                    "lbfgs": lambda: optim.LBFGS(parameters, 0.1, 2),
                }[kind]()
                augment = transforms.Compose(transforms.RandomRotation(0.2, generator),
                                             transforms.GaussianNoise(0.1, generator))
                for epochs in (1, 2):
                    history = training.fit(
                        model, (splits.train_images, splits.train_labels),
                        (splits.test_images, splits.test_labels), epochs=epochs,
                        optimizer=optimizer, generator=generator,
                        criterion=torch7.mse_loss if kind == "asgd" else torch7.nll_loss,
                        transform=augment if transform else None, progress=False, verbose=False,
                        folder=f"{sys.argv[2]}/{kind}{transform}", resume=epochs == 2,
                    )
                print([(r.train_loss, r.test_loss, r.confusion) for r in history])
        print(experiments.digits(7, None, 20).train_images.device)
        """
    )

    def run(device):
        command = [sys.executable, "-c", code, device, str(tmp_path / device)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    expected, found = run("cpu"), run("meta")
    assert expected.returncode == 0, expected.stderr
    assert found.stdout == expected.stdout, found.stderr


@pytest.mark.parametrize(
    ("layer", "shape", "compiled"),
    [
        (nn.MaxPool2d(3, 2, ceil_mode=True), (1, 2, 2), False),
        (nn.MaxPool2d(2, 2, ceil_mode=True), (1, 1, 1), False),
        (nn.MaxPool2d(3, 1, padding=1, ceil_mode=True), (1, 1, 1), True),
        (nn.AvgPool2d(3, 2, ceil_mode=True), (1, 2, 2), False),
        (nn.AvgPool2d(2, 2, ceil_mode=True), (1, 1, 3), False),
        (nn.Conv2d(1, 2, 3, padding=1), (1, 1, 1), True),
        (nn.Linear(3, 2), (1, 3, 3), False),
        (nn.LogSoftmax(1), (2, 3, 3), False),
    ],
    ids=str,
)
def test_networks_that_only_pytorch_runs(layer, shape, compiled):
    """The engine says so when it is chosen, not in the middle of a run."""
    images = torch.randn(12, *shape, dtype=torch.float64)
    labels = torch.arange(12) % 3

    def build():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            body = nn.Sequential(copy.deepcopy(layer), nn.Flatten())
            features = body.double()(images[:1]).shape[1]
            return nn.Sequential(*body, nn.Linear(features, 3), nn.LogSoftmax(1)).double()

    losses = []
    for engine in (None, "autograd"):
        model = build()
        optimizer = SGD(model.parameters(), lr=0.1)
        chosen = training.choose_engine(model, optimizer, images=images)
        history = training.fit(
            model, (images, labels), (images, labels), epochs=2, optimizer=optimizer,
            generator=torch7.Generator(1), verbose=False,
            engine=engine and training.AutogradEngine(model, optimizer),
        )  # fmt: skip
        losses.append([result.train_loss for result in history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert chosen.description.startswith("compiled") == compiled
    if not compiled:
        assert "not compiled: online_sgd: layer '0' (" in chosen.description


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.int64])
def test_images_that_only_autograd_reads(dtype, capsys):
    images = TRAIN[0].mul(20).clamp(0, 255).to(dtype)
    setup = Setup(dropout=0.0)
    setup.fit(1, train=(images, TRAIN[1]), verbose=True)
    assert "not compiled: online_sgd: images must be float64 or float32" in capsys.readouterr().out


def test_criterion_that_has_no_hash():
    class Loss:
        __hash__ = None

        def __call__(self, output, target, reduction):
            return torch7.nll_loss(output, target, reduction)

    (result,) = Setup().fit(1, criterion=Loss())
    assert math.isfinite(result.train_loss)
