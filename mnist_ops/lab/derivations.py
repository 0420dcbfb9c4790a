r"""The reports' derivatives of sigmoid and softmax, line by line, against autograd and our kernels.

Both reports begin by deriving the backward passes of the sigmoid :math:`y = 1 / (1 + e^{-x})` and
of the Gibbs softmax :math:`y_i = e^{-\beta x_i} / \sum_k e^{-\beta x_k}`. Some printed lines are
wrong. :func:`check` evaluates every one as it is printed::

    >>> [row.line.source for row in check() if row.outcome == "wrong sign"]
    ['report 2, 1.2, i = j, result', 'report 2, 1.2, i != j, first']
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import sigmoid, softmax

__all__ = ["LINES", "Line", "Result", "check"]


@dataclass(frozen=True)
class Line:
    """A printed expression.

    Attributes:
        source: report and equation.
        printed: the expression as printed.
        derivative: what it should be: ``"dy/dx"``, ``"dy_i/dx_i"``, ``"dy_i/dx_j"`` or, for a
            definition, ``"y_i"``.
        value: its value for inputs ``(N,)`` and a beta: a scalar for each x (``dy/dx``), i
            (``dy_i/dx_i``, ``y_i``) or pair i, j (``dy_i/dx_j``).
        remark: what is wrong with it, in words, if something is.
    """

    source: str
    printed: str
    derivative: str
    value: Callable[[Tensor, float], Tensor]
    remark: str = ""


@dataclass(frozen=True)
class Result:
    """What :func:`check` found about a line.

    Attributes:
        line: which one.
        error: largest absolute difference from autograd's derivative.
        kernel_error: the same of this library's backward kernel.
        outcome: ``"right"``, ``"wrong sign"`` (its negative is right) or ``"wrong"``.
    """

    line: Line
    error: float
    kernel_error: float
    outcome: str

    def __str__(self) -> str:
        text = (
            f"{self.line.source:30s} {self.line.derivative:10s} {self.outcome:10s} "
            f"off by {self.error:.1e} (our kernel: {self.kernel_error:.0e})  {self.line.printed}"
        )
        return text + (f"\n{'':30s} {self.line.remark}" if self.line.remark else "")


def _gibbs(x: Tensor, beta: float) -> Tensor:
    weights = torch.exp(-beta * x)
    return weights / weights.sum()


def _outer(y: Tensor) -> Tensor:
    return y.unsqueeze(1) * y.unsqueeze(0)


def _rest(weights: Tensor) -> Tensor:
    """The sum of all but the own weight: C in report 1's (2.1) to (2.2)."""
    return weights.sum() - weights


def _report_1_diagonal(x: Tensor, beta: float) -> Tensor:
    bottom = _rest(torch.exp(x)) + torch.exp(x)
    return -beta * torch.exp(-beta * x) / bottom + beta * torch.exp(-2 * beta * x) / bottom**2


def _report_1_pairs(x: Tensor, beta: float) -> Tensor:
    bottom = torch.exp(x).sum()
    return beta * _outer(torch.exp(-beta * x)) / bottom**2


def _report_2_sigmoid(x: Tensor, beta: float) -> Tensor:
    y = 1 / (1 - torch.exp(-x))
    return y * (1 - y)


def _report_2_quotient(x: Tensor, beta: float) -> Tensor:
    weights = torch.exp(-beta * x)
    total = weights.sum()
    return (-beta * weights * total - weights * (-beta * weights)) / total


def _report_2_diagonal(x: Tensor, beta: float) -> Tensor:
    y = beta * _gibbs(x, beta)
    return -y * (1 - y)


def _true_sigmoid(x: Tensor, beta: float) -> Tensor:
    y = 1 / (1 + torch.exp(-x))
    return y * (1 - y)


def _times(
    factor: float, function: Callable[[Tensor], Tensor]
) -> Callable[[Tensor, float], Tensor]:
    return lambda x, beta: factor * beta * function(_gibbs(x, beta))


#: Every line of the derivations that can be evaluated, in the reports' order.
LINES: tuple[Line, ...] = (
    Line(
        "report 1, (1.1), middle", "e^x / (1 + e^x)^2", "dy/dx",
        lambda x, beta: torch.exp(x) / (1 + torch.exp(x)) ** 2,
    ),
    Line("report 1, (1.1), result", "y (1 - y)", "dy/dx", _true_sigmoid),
    Line(
        "report 1, (2.1)", "e^(x_i) / sum_k e^(x_k)", "y_i",
        lambda x, beta: torch.exp(x) / torch.exp(x).sum(),
        "-beta is missing in every exponent; (2.2) and (2.3) are derived for e^(-beta x)",
    ),
    Line(
        "report 1, (2.2), middle",
        "-b e^(-b x_i) / (C + e^(x_i)) + b e^(-2b x_i) / (C + e^(x_i))^2", "dy_i/dx_i",
        _report_1_diagonal, "-b is missing below the fraction lines",
    ),
    Line(
        "report 1, (2.2), result", "b y_i (-1 + y_i)", "dy_i/dx_i",
        _times(1, lambda y: y * (y - 1)),
    ),
    Line(
        "report 1, (2.3), middle", "b e^(-b x_i) e^(-b x_j) / (K + e^(x_j))^2", "dy_i/dx_j",
        _report_1_pairs, "-b is missing below the fraction line",
    ),
    Line("report 1, (2.3), result", "b y_i y_j", "dy_i/dx_j", _times(1, _outer)),
    Line(
        "report 2, 1.1, first", "e^-x / (1 + e^-x)^2", "dy/dx",
        lambda x, beta: torch.exp(-x) / (1 + torch.exp(-x)) ** 2,
    ),
    Line(
        "report 2, 1.1, middle", "1/(1 - e^-x) (1 - 1/(1 - e^-x))", "dy/dx", _report_2_sigmoid,
        "1 - e^-x should be 1 + e^-x",
    ),
    Line("report 2, 1.1, result", "y (1 - y)", "dy/dx", _true_sigmoid),
    Line(
        "report 2, 1.2, i = j, first",
        "(-b e^(-b x_i) S - e^(-b x_i) (-b e^(-b x_i))) / S, S = sum_k e^(-b x_k)", "dy_i/dx_i",
        _report_2_quotient, "the denominator lacks its square: S should be S^2",
    ),
    Line(
        "report 2, 1.2, i = j, middle", "-b y_i (1 - b y_i)", "dy_i/dx_i", _report_2_diagonal,
        "the second b is one too many",
    ),
    Line(
        "report 2, 1.2, i = j, result", "b y_i (1 - y_i)", "dy_i/dx_i",
        _times(1, lambda y: y * (1 - y)), "should be -b y_i (1 - y_i)",
    ),
    Line(
        "report 2, 1.2, i != j, first", "-b e^(-b x_j) (sum_k e^(-b x_k))^-2 e^(-b x_i)",
        "dy_i/dx_j", _times(-1, _outer),
        "the minus sign should not be there; the next line drops it",
    ),
    Line("report 2, 1.2, i != j, result", "b y_j y_i", "dy_i/dx_j", _times(1, _outer)),
)  # fmt: skip


def _jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Row i: the gradient of output i, one backward pass each."""
    x = x.clone().requires_grad_()
    y = function(x)
    rows = [torch.autograd.grad(y[i], x, retain_graph=True)[0] for i in range(len(y))]
    return torch.stack(rows)


def _part(derivative: str, jacobian: Tensor) -> Tensor:
    """The entries that a line speaks of; for pairs the diagonal is left out."""
    if derivative == "dy_i/dx_j":
        return jacobian[~torch.eye(len(jacobian), dtype=torch.bool)]
    return jacobian.diagonal()


def check(beta: float = 0.7, size: int = 6, seed: int = 0) -> list[Result]:
    """Evaluate every line at random inputs.

    Args:
        beta: of the softmax; not 1, so that a missing beta shows.
        size: number of inputs, 3 at least.
        seed: of the inputs.

    Returns:
        One :class:`Result` for each of :data:`LINES`.
    """
    if size < 3:
        raise ValueError(f"check: size must be >= 3, got {size}")
    x = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    truth = {
        "sigmoid": _jacobian(lambda x: 1 / (1 + torch.exp(-x)), x),
        "softmax": _jacobian(lambda x: _gibbs(x, beta), x),
    }
    ours = {
        "sigmoid": _jacobian(sigmoid, x),
        "softmax": _jacobian(lambda x: softmax(x, beta=-beta), x),
    }
    results = []
    for line in LINES:
        value = line.value(x, beta)
        if line.derivative == "y_i":
            expected, kernel = _gibbs(x, beta), softmax(x, beta=-beta)
        else:
            family = "sigmoid" if line.derivative == "dy/dx" else "softmax"
            expected = _part(line.derivative, truth[family])
            kernel = _part(line.derivative, ours[family])
            if line.derivative == "dy_i/dx_j":
                value = _part(line.derivative, value)
        error = float((value - expected).abs().max())
        if error < 1e-12:
            outcome = "right"
        elif float((value + expected).abs().max()) < 1e-12:
            outcome = "wrong sign"
        else:
            outcome = "wrong"
        results.append(Result(line, error, float((kernel - expected).abs().max()), outcome))
    return results
