"""The reports' derivations, evaluated."""

import pytest
import torch

import mnist_ops
from mnist_ops.lab import derivations

WRONG = {
    "report 1, (2.1)": "wrong",
    "report 1, (2.2), middle": "wrong",
    "report 1, (2.3), middle": "wrong",
    "report 2, 1.1, middle": "wrong",
    "report 2, 1.2, i = j, first": "wrong",
    "report 2, 1.2, i = j, middle": "wrong",
    "report 2, 1.2, i = j, result": "wrong sign",
    "report 2, 1.2, i != j, first": "wrong sign",
}


@pytest.mark.parametrize("beta", [0.3, 0.7, 2.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_which_lines_are_wrong(beta, seed):
    results = derivations.check(beta, seed=seed)
    assert {r.line.source: r.outcome for r in results if r.outcome != "right"} == WRONG
    for result in results:
        assert (result.error < 1e-12) == (result.outcome == "right")
        assert result.kernel_error < 1e-14
        assert bool(result.line.remark) == (result.outcome != "right")
        assert result.line.source in str(result) and result.outcome in str(result)


def test_with_beta_one_a_missing_beta_does_not_show():
    # Report 2's middle line has one beta too many; only its value at other betas says so.
    outcomes = {r.line.source: r.outcome for r in derivations.check(beta=1.0)}
    assert outcomes["report 2, 1.2, i = j, middle"] == "right"


def test_the_quotient_rule_with_its_square_is_right():
    """Report 2's first quotient, over the sum squared as it should be: autograd's diagonal."""
    line = next(n for n in derivations.LINES if n.source == "report 2, 1.2, i = j, first")
    x, beta = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64), 0.7
    jacobian = torch.autograd.functional.jacobian(lambda x: torch.softmax(-beta * x, 0), x)
    total = torch.exp(-beta * x).sum()
    assert torch.allclose(line.value(x, beta) / total, jacobian.diagonal(), atol=1e-15)


def test_a_wrong_kernel_shows(monkeypatch):
    monkeypatch.setattr(derivations, "softmax", lambda x, beta: mnist_ops.softmax(x, beta=-beta))
    results = derivations.check()
    assert max(r.kernel_error for r in results if r.line.derivative == "dy_i/dx_i") > 1e-3


def test_lines_take_and_give_the_shapes_they_say():
    x = torch.randn(5, dtype=torch.float64)
    for line in derivations.LINES:
        shape = (5, 5) if line.derivative == "dy_i/dx_j" else (5,)
        assert line.value(x, 0.5).shape == shape, line.source
