"""Torch7's numbers, checked against vectors that Torch7 itself printed."""

import copy
import io
import math
import time

import numpy as np
import pytest
import torch
from conftest import REFERENCE, torch7_cases, torch7_tensor
from torch import nn

from mnist_ops import nn as ops_nn
from mnist_ops import torch7
from mnist_ops.mnist import models

TOLERANCE = {"rtol": 0.0, "atol": 1e-12}


def by_name(name):
    return {entry["name"]: entry for entry in torch7_cases(name)}


RNG, LOSSES, MODULES = torch7_cases("rng"), by_name("losses"), by_name("modules")


@pytest.fixture(scope="module")
def original():
    with np.load(REFERENCE / "online_original.npz") as file:
        return {name: file[name] for name in file.files}


class TestGenerator:
    def test_words(self):
        assert torch7.Generator(1).random32(10).tolist() == RNG["random_u32"]

    def test_uniform(self):
        expected = torch7_tensor(RNG["rand_double"])
        torch.testing.assert_close(torch7.Generator(1).uniform(size=10), expected, **TOLERANCE)
        expected = torch7_tensor(RNG["uniform_m3_5"])
        torch.testing.assert_close(torch7.Generator(1).uniform(-3, 5, 10), expected, **TOLERANCE)

    def test_normal(self):
        expected = torch7_tensor(RNG["randn_double"])
        torch.testing.assert_close(torch7.Generator(1).normal(size=9), expected, **TOLERANCE)
        expected = torch.tensor(RNG["normal_0_02"], dtype=torch.float64)
        torch.testing.assert_close(torch7.Generator(1).normal(0, 0.2, 9), expected, **TOLERANCE)

    @pytest.mark.parametrize("sizes", [[1] * 9, [2, 3, 4], [5, 4], [3, 0, 6]])
    def test_normal_in_pieces(self, sizes):
        generator = torch7.Generator(1)
        pieces = torch.cat([generator.normal(size=size) for size in sizes])
        torch.testing.assert_close(pieces, torch7_tensor(RNG["randn_double"]), **TOLERANCE)

    def test_second_normal_draws_nothing(self):
        generator = torch7.Generator(1)
        generator.uniform(size=7)
        generator.normal()
        mixed = RNG["mixed_after_7rand_1normal"]
        torch.testing.assert_close(
            generator.uniform(size=3), torch7_tensor(mixed["rand3"]), **TOLERANCE
        )
        assert generator.normal().item() == pytest.approx(mixed["normal"], abs=1e-12)

    def test_bernoulli(self):
        expected = torch7_tensor(RNG["bernoulli_05"])
        assert torch.equal(torch7.Generator(1).bernoulli(0.5, 20), expected)

    def test_randperm(self):
        assert (torch7.Generator(1).randperm(10) + 1).tolist() == RNG["randperm_10"]["data"]
        head = RNG["randperm_60000_head"]["data"]
        start = time.perf_counter()
        order = torch7.Generator(1).randperm(60000)
        # A guard against a loop over NumPy scalars, some hundred times slower than this.
        assert time.perf_counter() - start < 2.0
        assert (order[: len(head)] + 1).tolist() == head
        assert torch.equal(order.sort().values, torch.arange(60000))

    @pytest.mark.parametrize("n", [0, 1])
    def test_randperm_of_nothing_draws_nothing(self, n):
        generator = torch7.Generator(1)
        assert generator.randperm(n).tolist() == list(range(n))
        assert generator.random32(1).tolist() == RNG["random_u32"][:1]

    def test_consume(self):
        generator = torch7.Generator(1)
        generator.consume(3)
        assert generator.random32(7).tolist() == RNG["random_u32"][3:]

    def test_state_survives_a_safe_file(self):
        generator = torch7.Generator(5)
        generator.normal(size=3)  # leaves a second half behind
        file = io.BytesIO()
        torch.save(generator.get_state(), file)
        expected = [generator.normal(size=4), generator.uniform(size=700), generator.randperm(50)]
        file.seek(0)
        other = torch7.Generator(1)
        other.set_state(torch.load(file, weights_only=True))
        actual = [other.normal(size=4), other.uniform(size=700), other.randperm(50)]
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        assert other.seed == 5

    def test_copy_is_independent(self):
        generator = torch7.Generator(1)
        other = copy.deepcopy(generator)
        generator.consume(5)
        assert other.random32(10).tolist() == RNG["random_u32"]

    @pytest.mark.parametrize("seed", [-1, 2**32])
    def test_seed_out_of_range(self, seed):
        with pytest.raises(ValueError, match="seed must be in"):
            torch7.Generator(seed)

    @pytest.mark.parametrize("seed", [1.0, "1", None, True])
    def test_seed_of_wrong_type(self, seed):
        with pytest.raises(TypeError, match="seed must be an int"):
            torch7.Generator(seed)


class TestInitialization:
    def test_original_network(self, original):
        generator = torch7.start(seed=1)
        model = models.convnet(dtype=torch.float64, generator=generator)
        values = nn.utils.parameters_to_vector(model.parameters()).detach()
        assert torch.equal(values[:100], torch.from_numpy(original["params_init_first100"]))
        assert values.sum().item() == pytest.approx(original["params_init_sum"], abs=1e-11)
        assert values.abs().sum().item() == pytest.approx(original["params_init_abs_sum"], abs=1e-9)
        # The stream stands where it must: the first shuffle is the original's.
        shuffle = torch.from_numpy(original["shuffle_epoch1"]).long() - 1
        assert torch.equal(generator.randperm(60000), shuffle)

    @pytest.mark.parametrize(("data_kernel_size", "words"), [(7, 312_320), (None, 312_272)])
    def test_words_before_the_first_shuffle(self, data_kernel_size, words):
        generator = torch7.start(1, data_kernel_size)
        models.convnet(generator=generator)
        expected = torch7.Generator(1)
        expected.consume(words)
        assert torch.equal(generator.randperm(100), expected.randperm(100))

    def test_float32_rounds_the_same_numbers(self):
        wide = models.convnet(dtype=torch.float64, generator=torch7.start(1))
        narrow = models.convnet(dtype=torch.float32, generator=torch7.start(1))
        for a, b in zip(wide.parameters(), narrow.parameters(), strict=True):
            assert torch.equal(a.float(), b)

    @pytest.mark.parametrize(
        ("layer", "estimators"),
        [("SubtractiveNorm2d", 1), ("DivisiveNorm2d", 2), ("ContrastiveNorm2d", 3)],
    )
    @pytest.mark.parametrize(
        ("shape", "words"),
        # C = 3: a row filter 3n weights and 3 biases, a column filter 3n and 1; 2-D: 3 kh kw + 1.
        [((5,), 3 * 5 + 3 + 3 * 5 + 1), ((5, 3), 3 * 15 + 1)],
    )
    def test_normalization_layers_consume_words(self, layer, estimators, shape, words):
        model = nn.Sequential(
            nn.Conv2d(1, 3, 1), getattr(ops_nn, layer)(torch.ones(shape)), nn.Linear(4, 2)
        )
        torch7.initialize(model, torch7.Generator(3))
        expected = torch7.Generator(3)
        expected.consume(3 + 3 + estimators * words)
        weight = expected.uniform(-0.5, 0.5, (2, 4)).float()
        assert torch.equal(model[2].weight, weight)

    def test_unknown_layer(self):
        with pytest.raises(TypeError, match="'1' is a BatchNorm2d"):
            torch7.initialize(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), torch7.start())


class TestLogSoftmax:
    @pytest.mark.parametrize(
        ("name", "tolerance"),
        [
            ("logsoftmax_vec10", 1e-12),
            ("logsoftmax_vec10_wide_range", 1e-12),
            ("logsoftmax_batch3x10", 1e-12),
            ("logsoftmax_vec10_float", 5e-7),
        ],
    )
    def test_vectors(self, name, tolerance):
        entry = MODULES[name]
        input = torch7_tensor(entry["input"]).requires_grad_()
        output = torch7.LogSoftmax()(input)
        (gradient,) = torch.autograd.grad(output, input, torch7_tensor(entry["gradOutput"]))
        close = {"rtol": 0.0, "atol": tolerance}
        torch.testing.assert_close(output.detach(), torch7_tensor(entry["output"]), **close)
        torch.testing.assert_close(gradient, torch7_tensor(entry["gradInput"]), **close)

    def test_approximate_exponential(self):
        # out[0] of (0, -x) is -log(1 + e), e the approximation of exp(-x).
        entries = torch7_cases("expminusapprox_via_lse")
        x = torch.tensor([entry["x"] for entry in entries], dtype=torch.float64)
        expected = torch.tensor([entry["lse"] for entry in entries], dtype=torch.float64)
        actual = -torch7.log_softmax(torch.stack([torch.zeros_like(x), -x], -1))[:, 0]
        torch.testing.assert_close(actual, expected, **TOLERANCE)
        assert x.max() > 13.0  # where the approximation is cut off
        assert (actual - torch.log1p(torch.exp(-x))).abs().max() > 1e-6  # it is not the exact one

    def test_batch_rows_are_independent(self):
        input = torch.randn(2, 3, 10, dtype=torch.float64)
        expected = torch.stack([torch7.log_softmax(row) for row in input.view(6, 10)])
        assert torch.equal(torch7.log_softmax(input), expected.view(2, 3, 10))

    def test_second_derivative_is_that_of_the_backward(self):
        # Backward is g - exp(y) sum(g): its derivative by g, by finite differences.
        input = torch.randn(10, dtype=torch.float64, requires_grad=True)
        grad_output = torch.randn(10, dtype=torch.float64, requires_grad=True)

        def backward(g):
            (gradient,) = torch.autograd.grad(
                torch7.log_softmax(input), input, g, create_graph=True
            )
            return gradient

        assert torch.autograd.gradcheck(backward, grad_output)


CRITERIA = {
    "nll_vec": torch7.nll_loss,
    "nll_batch3": torch7.nll_loss,
    "margin_vec": torch7.multi_margin_loss,
    "margin_batch3": torch7.multi_margin_loss,
    "mse_sizeAverage_false": torch7.mse_loss,
}


class TestCriteria:
    def test_every_vector_is_used(self):
        assert set(LOSSES) - set(CRITERIA) == {"mse_sizeAverage_true"}  # no report used it

    @pytest.mark.parametrize("name", CRITERIA)
    def test_vectors(self, name):
        criterion = CRITERIA[name]
        entry = LOSSES[name]
        input = torch7_tensor(entry["input"]).requires_grad_()
        if criterion is torch7.mse_loss:
            target = torch7_tensor(entry["target"])
        elif isinstance(entry["target"], dict):
            target = torch7_tensor(entry["target"]).long() - 1
        else:
            target = torch.tensor(entry["target"]) - 1
        loss = criterion(input, target)
        (gradient,) = torch.autograd.grad(loss, input)
        assert loss.item() == pytest.approx(entry["loss"], abs=1e-12)
        torch.testing.assert_close(gradient, torch7_tensor(entry["gradInput"]), **TOLERANCE)

    def test_mse_from_class_indices(self):
        entry = LOSSES["mse_sizeAverage_false"]
        label = torch7_tensor(entry["target"]).argmax()
        loss = torch7.mse_loss(torch7_tensor(entry["input"]), label)
        assert loss.item() == pytest.approx(entry["loss"], abs=1e-12)

    def test_class_targets(self):
        expected = torch.tensor([[-1.0, 1.0, -1.0], [1.0, -1.0, -1.0]])
        assert torch.equal(torch7.class_targets(torch.tensor([1, 0]), 3), expected)

    @pytest.mark.parametrize(
        "criterion", [torch7.nll_loss, torch7.multi_margin_loss, torch7.mse_loss]
    )
    def test_reductions(self, criterion):
        input, target = torch.randn(4, 10, dtype=torch.float64), torch.tensor([3, 1, 4, 1])
        each = torch.stack([criterion(row, t) for row, t in zip(input, target, strict=True)])
        none = criterion(input, target, reduction="none")
        torch.testing.assert_close(none, each, **TOLERANCE)
        assert criterion(input, target, reduction="sum").item() == pytest.approx(each.sum().item())
        assert criterion(input, target, reduction="mean").item() == pytest.approx(
            each.mean().item()
        )
        with pytest.raises(ValueError, match="reduction must be"):
            criterion(input, target, reduction="average")


class TestDropout:
    def test_vector(self):
        entry = MODULES["dropout05_seed7_train"]
        layer = torch7.Dropout(0.5, torch7.Generator(7))
        input = torch7_tensor(entry["input"]).requires_grad_()
        output = layer(input)
        (gradient,) = torch.autograd.grad(output, input, torch7_tensor(entry["gradOutput"]))
        assert torch.equal(output, torch7_tensor(entry["output"]))
        assert torch.equal(gradient, torch7_tensor(entry["gradInput"]))

    def test_evaluation(self):
        entry = MODULES["dropout05_eval"]
        layer = torch7.Dropout(0.5, torch7.Generator(7)).eval()
        assert torch.equal(layer(torch7_tensor(entry["input"])), torch7_tensor(entry["output"]))
        assert layer.generator.random32(1) == torch7.Generator(7).random32(1)  # nothing was drawn

    @pytest.mark.parametrize("p", [-0.1, 1.0, math.nan])
    def test_bad_probability(self, p):
        with pytest.raises(ValueError, match="p must be in"):
            torch7.Dropout(p, torch7.Generator(1))


class TestArguments:
    def test_counts(self):
        generator = torch7.Generator(np.int64(3))
        for call in (generator.consume, generator.randperm, lambda n: generator.uniform(size=n)):
            for wrong in (-1, 10**30):
                with pytest.raises(ValueError, match="must "):
                    call(wrong)
            with pytest.raises(TypeError, match="must be an int"):
                call(1.5)
        with pytest.raises(ValueError, match="size must fit"):
            generator.normal(size=(2**40, 2**40))
        assert generator.uniform(size=np.int64(2)).shape == (2,)

    @pytest.mark.parametrize("seed", [10**30, -(10**30), 2**32])
    def test_seeds(self, seed):
        with pytest.raises(ValueError, match="seed must be in"):
            torch7.Generator(seed)

    @pytest.mark.parametrize(
        "change",
        [
            {"key": torch.zeros(3)},
            {"key": None},
            {"position": 625},
            {"position": -1},
            {"position": "x"},
            {"seed": None},
            {"second_normal": torch.zeros(2)},
            {"second_normal": None},
        ],
        ids=str,
    )
    def test_states_that_are_none(self, change):
        generator = torch7.Generator(1)
        generator.normal()
        before = generator.get_state()
        with pytest.raises(ValueError, match="state must be one that get_state returned"):
            generator.set_state(before | change)
        assert str(generator.get_state()) == str(before)
        with pytest.raises(ValueError, match="state must be one"):
            generator.set_state({})

    @pytest.mark.parametrize("p", [1.0, -0.1, math.nan, 10**400, math.inf])
    def test_dropout(self, p):
        with pytest.raises(ValueError, match=r"Dropout: p (must be|is too large)"):
            torch7.Dropout(p, torch7.Generator())

    @pytest.mark.parametrize("loss", [torch7.nll_loss, torch7.multi_margin_loss, torch7.mse_loss])
    def test_targets(self, loss):
        """PyTorch's gather takes fewer targets than samples, and a meta target for a meta loss."""
        x = torch.randn(4, 3)
        for target in (torch.zeros(2), torch.zeros(5), torch.zeros(4, 1), torch.zeros(())):
            with pytest.raises(ValueError, match="target must have one class for each of"):
                loss(x, target.long())
        with pytest.raises(ValueError, match="target must be on cpu, got meta"):
            loss(x, torch.zeros(4, device="meta").long())
        assert loss(x, torch.zeros(4).long(), "none").shape == (4,)
        assert loss(x[0], torch.tensor(1), "none").shape == ()

    def test_targets_of_mse(self):
        x = torch.randn(4, 3)
        assert torch7.mse_loss(x, x) == 0
        for shape in ((3,), (1, 3), (4, 1), (4,)):
            with pytest.raises(ValueError, match="target must have one class for each of"):
                torch7.mse_loss(x, torch.zeros(shape))
