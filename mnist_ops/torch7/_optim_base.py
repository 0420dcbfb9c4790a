"""What Torch7's optimizers share: checked options, and steps from the parameters' gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .._torch_private import foreach
from ..ops._common import check_finite


class Torch7Optimizer(torch.optim.Optimizer):
    """Parameter groups whose options are checked, those that a group brings itself as well."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as :meth:`torch.optim.Optimizer.add_param_group` does."""
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except Exception:
            del self.param_groups[-1]
            raise

    def _check(self, group: dict[str, Any]) -> None:
        """Refuse impossible options."""
        raise NotImplementedError

    def _check_finite(self, group: dict[str, Any], keys: Iterable[str]) -> None:
        for key in keys:
            value = check_finite(type(self).__name__, key, group[key], 0.0)
            if type(group[key]) is not int:
                group[key] = value  # not NumPy's scalar, which checkpoints do not take


class GradientStep(Torch7Optimizer):
    """A step from the parameters' ``.grad``, counted in each group's ``steps``."""

    def rate(self, group: dict[str, Any]) -> float:
        """The learning rate of the group's next step."""
        raise NotImplementedError

    def _update(
        self, group: dict[str, Any], params: list[Tensor], gradients: Any, rate: float
    ) -> None:
        """Move parameters that have gradients, which weight decay is a part of."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step from the parameters' ``.grad``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                gradients: Any = [p.grad for p in params]
                if group["weight_decay"]:
                    gradients = foreach("add")(gradients, params, alpha=group["weight_decay"])
                self._update(group, params, gradients, self.rate(group))
            group["steps"] += 1
        return loss
