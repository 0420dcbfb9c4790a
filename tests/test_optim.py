"""SGD step by step against Torch7's own traces."""

import pytest
import torch
from conftest import torch7_cases, torch7_tensor

from mnist_ops.optim import Torch7SGD

REFERENCE = torch7_cases("optim")
RUNS = {run["name"]: run for run in REFERENCE["runs"] if run["name"].startswith("sgd")}
OPTIONS = {
    "learningRate": "lr",
    "learningRateDecay": "lr_decay",
    "momentum": "momentum",
    "dampening": "dampening",
    "weightDecay": "weight_decay",
    "nesterov": "nesterov",
}


def quadratic(x):
    """0.5 x.A.x - b.x, the traces' function."""
    return 0.5 * x @ torch7_tensor(REFERENCE["A"]) @ x - torch7_tensor(REFERENCE["b"]) @ x


def options_of(run):
    return {OPTIONS[name]: value for name, value in run["config"].items() if name != "dummy"}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("pieces", [1, 2])
def test_trace(name, pieces):
    run = RUNS[name]
    start = torch7_tensor(run["x_start"])
    # In one tensor, or split over two parameters: the steps are the same.
    params = [p.clone().requires_grad_() for p in start.split(-(-len(start) // pieces))]
    assert len(params) == pieces
    optimizer = Torch7SGD(params, **options_of(run))
    for entry in run["trace"]:
        optimizer.zero_grad()
        value = quadratic(torch.cat(params))
        value.backward()
        optimizer.step()
        assert value.item() == pytest.approx(entry["fx"][0], abs=1e-12)
        x = torch.cat([p.detach() for p in params])
        torch.testing.assert_close(x, torch7_tensor(entry["x"]), rtol=0, atol=1e-12)


def test_traces_cover_every_option():
    used = {name for run in RUNS.values() for name in options_of(run)}
    assert used == set(OPTIONS.values())


def test_state_continues():
    options = {"lr": 0.05, "lr_decay": 0.1, "momentum": 0.9}

    def run(steps, x, optimizer):
        for _ in range(steps):
            optimizer.zero_grad()
            quadratic(x).backward()
            optimizer.step()

    straight = torch7_tensor(REFERENCE["x0"]).requires_grad_()
    run(7, straight, Torch7SGD([straight], **options))
    first = torch7_tensor(REFERENCE["x0"]).requires_grad_()
    optimizer = Torch7SGD([first], **options)
    run(3, first, optimizer)
    second = first.detach().clone().requires_grad_()
    other = Torch7SGD([second], lr=1.0)
    other.load_state_dict(optimizer.state_dict())
    run(4, second, other)
    assert torch.equal(second, straight)


def test_parameters_without_gradient_stay():
    used, unused = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = Torch7SGD([used, unused], lr=0.5)
    used.sum().backward()
    optimizer.step()
    assert used.tolist() == [0.5, 0.5] and unused.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["lr", "lr_decay", "momentum", "dampening", "weight_decay"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_bad_values(name, value):
    with pytest.raises(ValueError, match=f"{name} must be >= 0"):
        Torch7SGD([torch.ones(1, requires_grad=True)], **{name: value})


@pytest.mark.parametrize(
    "options", [{"momentum": 0.9}, {"dampening": 0.0}, {"momentum": 0.9, "dampening": 0.1}]
)
def test_nesterov_needs_momentum_without_dampening(options):
    with pytest.raises(ValueError, match="nesterov needs momentum > 0 and dampening 0"):
        Torch7SGD([torch.ones(1, requires_grad=True)], nesterov=True, **options)
