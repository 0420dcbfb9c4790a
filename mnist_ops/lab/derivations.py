r"""The reports' derivatives of sigmoid and softmax, line by line, against autograd and our kernels.

Both reports begin by deriving the backward passes of the sigmoid :math:`y = 1 / (1 + e^{-x})` and
of the Gibbs softmax :math:`y_i = e^{-\beta x_i} / \sum_k e^{-\beta x_k}`. Some printed lines are
wrong. :func:`check` evaluates every one as it is printed::

    >>> [row.line.source for row in check() if row.outcome == "wrong sign"]
    ['report 2, 1.2, i = j, result', 'report 2, 1.2, i != j, first']
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, exp
from torch.autograd.functional import jacobian

from ..ops import sigmoid, softmax

__all__ = ["LINES", "Line", "Result", "check"]


class Line(NamedTuple):
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


class Result(NamedTuple):
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


def _logistic(x: Tensor) -> Tensor:
    return 1 / (1 + exp(-x))


def _gibbs(x: Tensor, b: float) -> Tensor:
    weights = exp(-b * x)
    return weights / weights.sum()


def _outer(y: Tensor) -> Tensor:
    return torch.outer(y, y)


def _quotient(x: Tensor, b: float) -> Tensor:
    weights = exp(-b * x)
    total = weights.sum()
    return (-b * weights * total - weights * (-b * weights)) / total


#: Every line of the derivations that can be evaluated, in the reports' order.
LINES: tuple[Line, ...] = (
    Line(
        "report 1, (1.1), middle", "e^x / (1 + e^x)^2", "dy/dx",
        lambda x, b: exp(x) / (1 + exp(x)) ** 2,
    ),
    Line(
        "report 1, (1.1), result", "y (1 - y)", "dy/dx",
        lambda x, b: _logistic(x) * (1 - _logistic(x)),
    ),
    Line(
        "report 1, (2.1)", "e^(x_i) / sum_k e^(x_k)", "y_i", lambda x, b: exp(x) / exp(x).sum(),
        "-beta is missing in every exponent; (2.2) and (2.3) are derived for e^(-beta x)",
    ),
    Line(
        "report 1, (2.2), middle",
        "-b e^(-b x_i) / (C + e^(x_i)) + b e^(-2b x_i) / (C + e^(x_i))^2", "dy_i/dx_i",
        # C is the sum of all but the own weight.
        lambda x, b: -b * exp(-b * x) / exp(x).sum() + b * exp(-2 * b * x) / exp(x).sum() ** 2,
        "-b is missing below the fraction lines",
    ),
    Line(
        "report 1, (2.2), result", "b y_i (-1 + y_i)", "dy_i/dx_i",
        lambda x, b: b * _gibbs(x, b) * (_gibbs(x, b) - 1),
    ),
    Line(
        "report 1, (2.3), middle", "b e^(-b x_i) e^(-b x_j) / (K + e^(x_j))^2", "dy_i/dx_j",
        lambda x, b: b * _outer(exp(-b * x)) / exp(x).sum() ** 2,
        "-b is missing below the fraction line",
    ),
    Line(
        "report 1, (2.3), result", "b y_i y_j", "dy_i/dx_j", lambda x, b: b * _outer(_gibbs(x, b))
    ),
    Line(
        "report 2, 1.1, first", "e^-x / (1 + e^-x)^2", "dy/dx",
        lambda x, b: exp(-x) / (1 + exp(-x)) ** 2,
    ),
    Line(
        "report 2, 1.1, middle", "1/(1 - e^-x) (1 - 1/(1 - e^-x))", "dy/dx",
        lambda x, b: 1 / (1 - exp(-x)) * (1 - 1 / (1 - exp(-x))), "1 - e^-x should be 1 + e^-x",
    ),
    Line(
        "report 2, 1.1, result", "y (1 - y)", "dy/dx",
        lambda x, b: _logistic(x) * (1 - _logistic(x)),
    ),
    Line(
        "report 2, 1.2, i = j, first",
        "(-b e^(-b x_i) S - e^(-b x_i) (-b e^(-b x_i))) / S, S = sum_k e^(-b x_k)", "dy_i/dx_i",
        _quotient, "the denominator lacks its square: S should be S^2",
    ),
    Line(
        "report 2, 1.2, i = j, middle", "-b y_i (1 - b y_i)", "dy_i/dx_i",
        lambda x, b: -b * _gibbs(x, b) * (1 - b * _gibbs(x, b)), "the second b is one too many",
    ),
    Line(
        "report 2, 1.2, i = j, result", "b y_i (1 - y_i)", "dy_i/dx_i",
        lambda x, b: b * _gibbs(x, b) * (1 - _gibbs(x, b)), "should be -b y_i (1 - y_i)",
    ),
    Line(
        "report 2, 1.2, i != j, first", "-b e^(-b x_j) (sum_k e^(-b x_k))^-2 e^(-b x_i)",
        "dy_i/dx_j", lambda x, b: -b * _outer(_gibbs(x, b)),
        "the minus sign should not be there; the next line drops it",
    ),
    Line(
        "report 2, 1.2, i != j, result", "b y_j y_i", "dy_i/dx_j",
        lambda x, b: b * _outer(_gibbs(x, b)),
    ),
)  # fmt: skip


def _part(derivative: str, values: Tensor) -> Tensor:
    """The entries of a Jacobian that a line speaks of; for pairs the diagonal is left out."""
    if derivative == "dy_i/dx_j":
        return values[~torch.eye(len(values), dtype=torch.bool)]
    return values.diagonal()


def check(beta: float = 0.7, seed: int = 0) -> list[Result]:
    """Evaluate every line at random inputs, beta not being 1, so that a missing one shows."""
    x = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    results = []
    for line in LINES:
        truth: Callable[[Tensor], Tensor] = _logistic
        ours: Callable[[Tensor], Tensor] = sigmoid
        if line.derivative != "dy/dx":
            truth, ours = (lambda x: _gibbs(x, beta)), (lambda x: softmax(x, beta=-beta))
        value = line.value(x, beta)
        if line.derivative == "y_i":
            expected, kernel = truth(x), ours(x)
        else:
            expected, kernel = (_part(line.derivative, jacobian(f, x)) for f in (truth, ours))
        if line.derivative == "dy_i/dx_j":
            value = _part(line.derivative, value)
        error = float((value - expected).abs().max())
        outcome = "right" if error < 1e-12 else "wrong"
        if error >= 1e-12 and float((value + expected).abs().max()) < 1e-12:
            outcome = "wrong sign"
        results.append(Result(line, error, float((kernel - expected).abs().max()), outcome))
    return results
