"""Torch7's optimizers where PyTorch's differ.

:class:`SGD` and :class:`ASGD` step from the parameters' ``.grad``. :class:`CG` and
:class:`LBFGS` evaluate the loss several times a step and need a closure, which their
``needs_closure`` says::

    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = loss_function(model(images), labels)
    ...     loss.backward()
    ...     return loss
    >>> optimizer.step(closure)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .._torch_private import foreach
from ._optim_base import GradientStep
from ._optim_closure import CG, LBFGS

__all__ = ["ASGD", "CG", "LBFGS", "SGD"]


class SGD(GradientStep):
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

        >>> optimizer = SGD(model.parameters(), lr=1e-3, lr_decay=1e-7)
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
        numbers = {
            "lr": lr,
            "lr_decay": lr_decay,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
        }
        super().__init__(params, numbers | {"nesterov": nesterov, "steps": 0})

    def _check(self, group: dict[str, Any]) -> None:
        numbers = ("lr", "lr_decay", "momentum", "dampening", "weight_decay")
        self._check_finite(group, numbers)
        momentum, dampening = group["momentum"], group["dampening"]
        if group["nesterov"] and (momentum == 0.0 or dampening != 0.0):
            raise ValueError(
                "SGD: nesterov needs momentum > 0 and dampening 0, "
                f"got momentum {momentum} and dampening {dampening}"
            )

    def rate(self, group: dict[str, Any]) -> float:
        """The learning rate of the group's next step."""
        return group["lr"] / (1.0 + group["steps"] * group["lr_decay"])

    def _update(
        self, group: dict[str, Any], params: list[Tensor], gradients: Any, rate: float
    ) -> None:
        if group["momentum"]:
            gradients = self._momentum(group, params, gradients)
        foreach("add_")(params, gradients, alpha=-rate)

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
            foreach("mul_")(old_velocities, group["momentum"])
            foreach("add_")(old_velocities, old_gradients, alpha=1.0 - group["dampening"])
        if group["nesterov"]:
            return list(foreach("add")(gradients, velocities, alpha=group["momentum"]))
        return velocities


class ASGD(GradientStep):
    r"""Averaged stochastic gradient descent as in Torch7's ``optim.asgd``.

    With t counting steps from 0, :math:`\eta_t = lr / (1 + \lambda\, lr\, t)^\alpha` and
    :math:`\mu_t = 1 / \max(1, t - t_0)`:

    .. math::
        w &\leftarrow (1 - \lambda \eta_t)\, w - \eta_t (\nabla f(w) + wd\, w) \\
        a &\leftarrow a + \mu_t (w - a) \quad (a = w \text{ while } \mu_t = 1)

    The average a is what is meant to be tested: see :meth:`averaged`.

    The steps are those of :class:`torch.optim.ASGD`, which keeps :math:`\eta` and :math:`\mu` in
    float32 and is 1e-9 to 1e-8 away after ten steps in float64; here they are Python's floats. The
    default lr is Torch7's, too.

    Args:
        params: tensors or parameter groups.
        lr: :math:`\eta_0`.
        lambd: :math:`\lambda`, decay of the weights and of the rate.
        alpha: power of the rate's decay.
        t0: the step from which on the average is one. The reports' scripts use 60000.
        weight_decay: wd, on top of :math:`\lambda`; 0 switches it off.

    Raises:
        ValueError: for a negative or impossible value.
        RuntimeError: by ``step`` within :meth:`averaged`.

    Source: Torch7's ``optim.asgd``; Bottou's averaged SGD.

    Example::

        >>> optimizer = ASGD(model.parameters(), lr=1e-3, t0=60000)
        >>> with optimizer.averaged():
        ...     confusion, loss = training.evaluate(model, images, labels)
    """

    _averaging = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0.0,
    ) -> None:
        numbers = {"lr": lr, "lambd": lambd, "alpha": alpha, "t0": t0, "weight_decay": weight_decay}
        super().__init__(params, numbers | {"steps": 0})

    def _check(self, group: dict[str, Any]) -> None:
        self._check_finite(group, ("lr", "lambd", "alpha", "t0", "weight_decay"))

    def rate(self, group: dict[str, Any]) -> float:
        """The learning rate of the group's next step."""
        return group["lr"] / (1.0 + group["lambd"] * group["lr"] * group["steps"]) ** group["alpha"]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step from the parameters' ``.grad``."""
        if self._averaging:
            raise RuntimeError("ASGD: no step within averaged(), which would forget it")
        return super().step(closure)

    def _update(
        self, group: dict[str, Any], params: list[Tensor], gradients: Any, rate: float
    ) -> None:
        foreach("mul_")(params, 1.0 - group["lambd"] * rate)
        foreach("add_")(params, gradients, alpha=-rate)
        for param in params:
            if "average" not in self.state[param]:
                self.state[param]["average"] = param.clone()
        averages = [self.state[param]["average"] for param in params]
        share = 1.0 / max(1.0, group["steps"] - group["t0"])
        if share == 1.0:
            foreach("copy_")(averages, params)
        else:
            foreach("add_")(averages, foreach("sub")(params, averages), alpha=share)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the parameters hold their averages; afterwards, in any case, what they held.

        Parameters that have not moved are their own average.
        """
        if self._averaging:
            raise RuntimeError("ASGD: averaged() within averaged()")
        held = [(p, p.detach().clone()) for p, state in self.state.items() if "average" in state]
        self._averaging = True
        try:
            with torch.no_grad():
                for param, _ in held:
                    param.copy_(self.state[param]["average"])
            yield
        finally:
            with torch.no_grad():
                for param, value in held:
                    param.copy_(value)
            self._averaging = False
