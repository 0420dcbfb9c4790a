"""Torch7's optimizers that evaluate the loss several times a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..ops._common import check_integer, check_number
from ._optim_base import Torch7Optimizer

__all__ = ["CG", "LBFGS"]


def _divide(a: float, b: float) -> float:
    """As IEEE 754 and Lua divide: infinity or NaN where Python has an exception."""
    if b != 0.0:
        return a / b
    return a * math.copysign(math.inf, b)


def _sqrt(value: float) -> float:
    return math.sqrt(value) if value >= 0.0 else math.nan


class _OneVector(Torch7Optimizer):
    """What CG and L-BFGS share: the parameters as one vector, evaluated by a closure."""

    #: ``step`` evaluates its closure, possibly several times.
    needs_closure = True

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        if defaults["max_eval"] is None:
            name = type(self).__name__
            defaults["max_eval"] = 1.25 * check_number(name, "max_iter", defaults["max_iter"])
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the only group, of parameters with one dtype on one device."""
        name = type(self).__name__
        if self.param_groups:
            raise ValueError(f"{name}: params must be one group, got more")
        super().add_param_group(param_group)

    def _check(self, group: dict[str, Any]) -> None:
        name, params = type(self).__name__, group["params"]
        kinds = sorted({f"{p.dtype} on {p.device}" for p in params})
        if len(kinds) > 1:
            raise ValueError(
                f"{name}: params must have one dtype and one device, got {', '.join(kinds)}"
            )

    def _gradient(self) -> Tensor:
        """All gradients in one new vector, zeros where a parameter has none."""
        params = self.param_groups[0]["params"]
        return torch.cat(
            [torch.zeros_like(p).view(-1) if p.grad is None else p.grad.reshape(-1) for p in params]
        )

    def _move(self, distance: float, direction: Tensor) -> None:
        params = self.param_groups[0]["params"]
        pieces = direction.split([p.numel() for p in params])
        for param, piece in zip(params, pieces, strict=True):
            _add(param, piece.view(param.shape), distance)


def _add(target: Tensor, vector: Tensor, factor: float) -> None:
    """``target += factor * vector``; PyTorch refuses finite factors beyond the dtype's range."""
    if abs(factor) > torch.finfo(target.dtype).max:
        factor = math.copysign(math.inf, factor)
    target.add_(vector, alpha=factor)


def _value(loss: Any) -> float:
    return float(loss.detach() if isinstance(loss, Tensor) else loss)


def _wide(vector: Tensor) -> Tensor:
    """Sums over all weights of a network overflow in float16 and say little in bfloat16."""
    return vector.float() if vector.dtype in (torch.float16, torch.bfloat16) else vector


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(_wide(a), _wide(b)))


def _norm1(vector: Tensor) -> float:
    return float(_wide(vector).abs().sum())


class CG(_OneVector):
    r"""Nonlinear conjugate gradients as in Torch7's ``optim.cg``: Rasmussen's ``minimize``.

    A step evaluates the loss f and its gradient g, then makes line searches along

    .. math::
        s \leftarrow \frac{g_+ \cdot g_+ - g_+ \cdot g}{g \cdot g}\, s - g_+
        \qquad \text{(Polack-Ribière; the first time and where it would climb: } -g_+ \text{)}

    until a search fails or ``max_eval`` evaluations are spent. With :math:`\varphi(z) = f(w + zs)`
    a search ends at a z that fulfils Wolfe's and Powell's conditions

    .. math:: \varphi(z) \le \varphi(0) + \rho z \varphi'(0), \qquad
              |\varphi'(z)| \le -\sigma \varphi'(0),

    found by quadratic and cubic interpolation and cubic extrapolation from
    :math:`z = 1 / (1 + g \cdot g)` in the first search, later from the last z times the slopes'
    ratio. A failed search leaves the weights where it began. The next step starts anew with
    :math:`-g`: nothing is kept.

    Where the loss is exactly quadratic the cubic interpolation divides 0 by 0, here as in Torch7,
    and rounding decides between the points that ``interpolation`` leaves.

    PyTorch has no conjugate gradients. SciPy's (``minimize(method="CG")``) has another line search
    and takes other steps.

    Args:
        params: tensors of one dtype on one device, all in one group.
        max_iter: interpolations and extrapolations of one line search, and by ``max_eval`` about
            the evaluations in a step. Torch7's own default is 20, the reports' scripts use 2.
        max_eval: no line search begins after so many evaluations; ``1.25 * max_iter`` unless given.
            The last one may exceed it: a fraction left over, as of 2.5, counts as a whole
            interpolation and as no bound for extrapolations. (So it is in Torch7, which would go
            on for ever where the loss falls for ever; here infinity and NaN end the search.)
        rho: of Wolfe's condition.
        sigma: of Powell's.
        interpolation: new points keep this fraction of the interval away from its ends.
        extrapolation: at most so many times as far as before.
        ratio: largest factor from one search's first z to the next one's.

    Raises:
        ValueError: for an impossible value, several groups, several dtypes or devices.

    Source: Torch7's ``optim.cg``, after C. E. Rasmussen's ``minimize.m`` (2006).

    Example::

        >>> optimizer = CG(model.parameters(), max_iter=2)
        >>> loss = optimizer.step(closure)  # the closure's first result
    """

    def __init__(
        self,
        params: Iterable[Any],
        max_iter: int = 2,
        max_eval: float | None = None,
        rho: float = 0.01,
        sigma: float = 0.5,
        interpolation: float = 0.1,
        extrapolation: float = 3.0,
        ratio: float = 100.0,
    ) -> None:
        defaults = {
            "max_iter": max_iter,
            "max_eval": max_eval,
            "rho": rho,
            "sigma": sigma,
            "interpolation": interpolation,
            "extrapolation": extrapolation,
            "ratio": ratio,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        sigma = check_number("CG", "sigma", group["sigma"])
        for name, low, low_is_in, high, high_is_in, expected in [
            ("max_iter", 1, True, math.inf, False, ">= 1"),
            ("max_eval", 1, True, math.inf, False, ">= 1"),
            ("sigma", 0, False, 1, False, "in (0, 1)"),
            ("rho", 0, False, sigma, False, f"in (0, sigma = {sigma})"),
            ("interpolation", 0, False, 0.5, True, "in (0, 0.5]"),
            ("extrapolation", 1, False, math.inf, False, "> 1"),
            ("ratio", 0, False, math.inf, False, "> 0"),
        ]:
            value = check_number("CG", name, group[name])
            above = value >= low if low_is_in else value > low
            below = value <= high if high_is_in else value < high
            if not (above and below):
                raise ValueError(f"CG: {name} must be {expected}, got {group[name]}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """Minimise the closure's loss for a few line searches; its first result is returned."""
        group = self.param_groups[0]
        evaluations = 0
        results: list[Any] = []

        def evaluate() -> tuple[float, Tensor]:
            nonlocal evaluations
            evaluations += 1
            with torch.enable_grad():
                loss = closure()
            if not results:
                results.append(loss)
            return _value(loss), self._gradient()

        value, gradient = evaluate()
        direction = gradient.neg()
        slope = -_dot(direction, direction)
        distance = _divide(1.0, 1.0 - slope)
        while evaluations < group["max_eval"]:
            held = [param.clone() for param in group["params"]]
            budget = min(group["max_iter"], group["max_eval"] - (evaluations + 1))
            found = self._search(evaluate, direction, value, slope, distance, budget)
            if found is None:
                for param, before in zip(group["params"], held, strict=True):
                    param.copy_(before)
                break
            distance, value, new = found
            share = _divide(_dot(new, new) - _dot(new, gradient), _dot(gradient, gradient))
            direction = direction.mul(share).sub_(new)
            gradient = new
            new_slope = _dot(gradient, direction)
            if new_slope > 0.0:
                direction = gradient.neg()
                new_slope = -_dot(direction, direction)
            # The smallest number: against division by zero, as in the original.
            distance *= min(group["ratio"], _divide(slope, new_slope - 1e-320))
            slope = new_slope
        return results[0]

    def _search(
        self,
        evaluate: Callable[[], tuple[float, Tensor]],
        direction: Tensor,
        value1: float,
        slope1: float,
        distance: float,
        budget: float,
    ) -> tuple[float, float, Tensor] | None:
        """One line search from point 1: distance, value and gradient where it ended, or None.

        Point 2 is the current one; point 3, at ``gap`` from it, the other end of the interval.
        """
        group = self.param_groups[0]
        rho, sigma, extrapolation = group["rho"], group["sigma"], group["extrapolation"]
        inner, outer = group["interpolation"], 1.0 - group["interpolation"]

        def move(by: float) -> tuple[float, float, Tensor]:
            self._move(by, direction)
            value, gradient = evaluate()
            return value, _dot(gradient, direction), gradient

        def too_far() -> bool:
            return value2 > value1 + distance * rho * slope1 or slope2 > -sigma * slope1

        value2, slope2, gradient2 = move(distance)
        value3, slope3, gap = value1, slope1, -distance
        limit: float | None = None  # the nearest point known to be too far
        while True:
            while too_far() and budget > 0:
                limit = distance
                if value2 > value1:
                    by = gap - _divide(0.5 * slope3 * gap * gap, slope3 * gap + value2 - value3)
                else:
                    a, b = _cubic(value2, slope2, value3, slope3, gap)
                    by = _divide(_sqrt(b * b - a * slope2 * gap * gap) - b, a)
                if not math.isfinite(by):
                    by = gap / 2.0
                by = max(min(by, inner * gap), outer * gap)  # gap < 0
                distance += by
                value2, slope2, gradient2 = move(by)
                budget -= 1
                gap -= by
            if too_far():
                return None
            if slope2 > sigma * slope1:
                return distance, value2, gradient2
            # Compared with 0 and not with <= 0, as in the original: see max_eval.
            if budget == 0 or not all(map(math.isfinite, (value2, slope2, distance))):
                return None
            a, b = _cubic(value2, slope2, value3, slope3, gap)
            by = _divide(-slope2 * gap * gap, b + _sqrt(b * b - a * slope2 * gap * gap))
            if not 0.0 <= by < math.inf:
                by = distance * (extrapolation - 1.0) if limit is None else (limit - distance) / 2.0
            elif limit is not None and distance + by > limit:
                by = (limit - distance) / 2.0
            elif limit is None and distance + by > distance * extrapolation:
                by = distance * (extrapolation - 1.0)
            elif by < -gap * inner:
                by = -gap * inner
            elif limit is not None and by < (limit - distance) * outer:
                by = (limit - distance) * outer
            value3, slope3, gap = value2, slope2, -by
            distance += by
            value2, slope2, gradient2 = move(by)
            budget -= 1


def _cubic(
    value2: float, slope2: float, value3: float, slope3: float, gap: float
) -> tuple[float, float]:
    """Coefficients of the cubic through points 2 and 3, ``gap`` apart, with their slopes."""
    a = 6.0 * _divide(value2 - value3, gap) + 3.0 * (slope2 + slope3)
    return a, 3.0 * (value3 - value2) - gap * (slope3 + 2.0 * slope2)


class LBFGS(_OneVector):
    r"""L-BFGS without a line search as in Torch7's ``optim.lbfgs``.

    A step makes up to ``max_iter`` moves :math:`w \leftarrow w - lr\, H g` with the inverse Hessian
    H that the last ``history_size`` pairs (y, s) of changes of gradient and weights with
    :math:`y \cdot s > 10^{-10}` give, from the diagonal :math:`y \cdot s / y \cdot y` of the last
    pair. The first move ever is :math:`-\min(1, 1/\|g\|_1)\, lr\, g`. After each one but the last
    the loss is evaluated again. The pairs are kept from step to step, also where the batch changes,
    and a step begins by pairing its first gradient with the last one of the step before.

    It differs from :class:`torch.optim.LBFGS` where a step stops: this compares the 1-norms of
    gradient and move with the tolerances, PyTorch's the largest elements; ``max_eval`` may be a
    fraction (2.5 allows both moves of ``max_iter=2``; PyTorch's default, 2, only one); other
    ``tolerance_grad``. The moves are the same.

    Args:
        params: tensors of one dtype on one device, all in one group.
        lr: learning rate. The reports' scripts use 1e-3.
        max_iter: moves per step; they use 2.
        max_eval: no move follows after so many evaluations; ``1.25 * max_iter`` unless given.
        tolerance_grad: stop where :math:`\|g\|_1` is not above it.
        tolerance_change: stop where the 1-norm of a move is not above it, the loss changed by less,
            or :math:`g \cdot H g` is less.
        history_size: pairs kept; they use 10.

    Raises:
        ValueError: for an impossible value, several groups, several dtypes or devices.

    Source: Torch7's ``optim.lbfgs``, after M. Schmidt's ``minFunc``.

    Example::

        >>> optimizer = LBFGS(model.parameters(), lr=1e-3, max_iter=2, history_size=10)
        >>> loss = optimizer.step(closure)  # the closure's first result
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        max_iter: int = 20,
        max_eval: float | None = None,
        tolerance_grad: float = 1e-5,
        tolerance_change: float = 1e-9,
        history_size: int = 100,
    ) -> None:
        numbers = {"lr": lr, "tolerance_grad": tolerance_grad, "tolerance_change": tolerance_change}
        counts = {"max_iter": max_iter, "max_eval": max_eval, "history_size": history_size}
        super().__init__(params, numbers | counts)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        self._check_finite(group, ("lr", "tolerance_grad", "tolerance_change"))
        check_integer("LBFGS", "max_iter", group["max_iter"], 1)
        check_integer("LBFGS", "history_size", group["history_size"], 1)
        if not 1 <= check_number("LBFGS", "max_eval", group["max_eval"]) < math.inf:
            raise ValueError(f"LBFGS: max_eval must be >= 1, got {group['max_eval']}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """Move up to ``max_iter`` times; the closure's first result is returned."""
        group = self.param_groups[0]
        # One state for all, with the first parameter: load_state_dict brings it to its device.
        state = self.state[group["params"][0]]
        with torch.enable_grad():
            first = loss = closure()
        value, gradient, evaluations = _value(loss), self._gradient(), 1
        if _norm1(gradient) <= group["tolerance_grad"]:
            return first
        for iteration in range(1, group["max_iter"] + 1):
            direction = self._direction(state, gradient)
            state["gradient"] = gradient
            state["direction"] = direction
            if "distance" in state:
                state["distance"] = group["lr"]
            else:
                state["distance"] = min(1.0, _divide(1.0, _norm1(gradient))) * group["lr"]
            if _dot(gradient, direction) > -group["tolerance_change"]:
                break
            self._move(state["distance"], direction)
            # Where another batch follows, an evaluation after the last move would be wasted.
            if iteration == group["max_iter"]:
                break
            before = value
            with torch.enable_grad():
                value = _value(closure())
            gradient, evaluations = self._gradient(), evaluations + 1
            if (
                evaluations >= group["max_eval"]
                or _norm1(gradient) <= group["tolerance_grad"]
                or _norm1(direction.mul(state["distance"])) <= group["tolerance_change"]
                or abs(value - before) < group["tolerance_change"]
            ):
                break
        return first

    def _direction(self, state: dict[str, Any], gradient: Tensor) -> Tensor:
        """``-H g``, after the pair that leads here has been taken into the history."""
        direction = gradient.neg()
        if not state:
            # New lists at every change: a state_dict that somebody keeps must not follow.
            state.update(changes=[], moves=[], inverses=[], diagonal=1.0)
            return direction
        change = gradient - state["gradient"]
        move = state["direction"].mul(state["distance"])
        product = _dot(change, move)
        if product > 1e-10:
            kept = self.param_groups[0]["history_size"]
            state["changes"] = [*state["changes"], change][-kept:]
            state["moves"] = [*state["moves"], move][-kept:]
            state["inverses"] = [*state["inverses"], 1.0 / product][-kept:]
            state["diagonal"] = _divide(product, _dot(change, change))
        pairs = list(zip(state["changes"], state["moves"], state["inverses"], strict=True))
        shares = []
        for change, move, inverse in reversed(pairs):
            shares.append(_dot(move, direction) * inverse)
            _add(direction, change, -shares[-1])
        direction.mul_(state["diagonal"])
        for (change, move, inverse), share in zip(pairs, reversed(shares), strict=True):
            _add(direction, move, share - _dot(change, direction) * inverse)
        return direction
