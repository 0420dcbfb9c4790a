"""Torch7's optimizers where PyTorch's differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Torch7SGD"]


class Torch7SGD(torch.optim.Optimizer):
    r"""Stochastic gradient descent as in Torch7's ``optim.sgd``.

    With t counting steps from 0, weight decay :math:`\lambda`, momentum m and dampening d:

    .. math::
        g &\leftarrow \nabla f(w) + \lambda w \\
        v &\leftarrow m v + (1 - d)\, g \quad (v = g \text{ in the first step}) \\
        w &\leftarrow w - \frac{lr}{1 + t \cdot lr\_decay}\, u, \qquad
        u = g + m v \text{ (Nesterov)},\ v \text{ (momentum)},\ g \text{ (neither)}

    Two things differ from :class:`torch.optim.SGD`: the learning rate decays with every step, and
    the dampening is equal to the momentum unless given.

    Args:
        params: tensors or parameter groups.
        lr: learning rate; Torch7's default is 1e-3.
        lr_decay: the reports use 1e-7.
        momentum, weight_decay: 0 switches them off.
        dampening: ``momentum`` unless given.
        nesterov: needs ``momentum > 0`` and ``dampening=0``.

    Raises:
        ValueError: for a negative or impossible value.

    Example::

        >>> optimizer = Torch7SGD(model.parameters(), lr=1e-3, lr_decay=1e-7)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        lr_decay: float = 0.0,
        momentum: float = 0.0,
        dampening: float | None = None,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        dampening = momentum if dampening is None else dampening
        for name, value in [
            ("lr", lr),
            ("lr_decay", lr_decay),
            ("momentum", momentum),
            ("dampening", dampening),
            ("weight_decay", weight_decay),
        ]:
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"Torch7SGD: {name} must be >= 0 and finite, got {value}")
        if nesterov and (momentum == 0.0 or dampening != 0.0):
            raise ValueError(
                "Torch7SGD: nesterov needs momentum > 0 and dampening 0, "
                f"got momentum {momentum} and dampening {dampening}"
            )
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "steps": 0,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step from the parameters' ``.grad``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            rate = group["lr"] / (1.0 + group["steps"] * group["lr_decay"])
            group["steps"] += 1
            if not params:
                continue
            # One call for all parameters: at batch size 1 a Python loop would cost more than
            # the arithmetic.
            update: Any = [p.grad for p in params]
            if group["weight_decay"]:
                update = torch._foreach_add(update, params, alpha=group["weight_decay"])
            if group["momentum"]:
                update = self._momentum(group, params, update)
            torch._foreach_add_(params, update, alpha=-rate)
        return loss

    def _momentum(
        self, group: dict[str, Any], params: list[Tensor], gradients: list[Tensor]
    ) -> list[Tensor]:
        velocities = []
        old_velocities, old_gradients = [], []
        for param, gradient in zip(params, gradients, strict=True):
            state = self.state[param]
            if "velocity" in state:
                old_velocities.append(state["velocity"])
                old_gradients.append(gradient)
            else:
                state["velocity"] = gradient.clone()
            velocities.append(state["velocity"])
        if old_velocities:
            torch._foreach_mul_(old_velocities, group["momentum"])
            torch._foreach_add_(old_velocities, old_gradients, alpha=1.0 - group["dampening"])
        if group["nesterov"]:
            return list(torch._foreach_add(gradients, velocities, alpha=group["momentum"]))
        return velocities
