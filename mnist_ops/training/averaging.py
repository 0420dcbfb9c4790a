"""Averages of a network's weights over the ends of epochs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..torch7.optim import SGD

__all__ = ["AveragedSGD"]


class AveragedSGD(SGD):
    """:class:`mnist_ops.torch7.optim.SGD` whose network is tested with the mean of its weights.

    With w_e the weights at the end of epoch e of this optimizer, the test after epoch n is that of
    ``(w_1 + ... + w_n) / n``; the steps are those of SGD and know nothing of it, so that the
    compiled engine makes them. Meant for the last epochs of a run, at a constant learning rate::

        >>> parameters = list(model.parameters())
        >>> late = training.AveragedSGD(parameters, lr=5e-4)
        >>> training.fit(..., optimizer={1: SGD(parameters, lr=1e-3), 13: late}, epochs=20)

    Arguments and errors: those of SGD. The means are in the optimizer's state as ``average``; a
    run's ``model.pt`` and the model in its ``checkpoint.pt`` are the last weights, not the mean. To
    save or use the mean::

        >>> with late.averaged():
        ...     torch.save(model.state_dict(), "mean.pt")

    Source: stochastic weight averaging, Izmailov et al., "Averaging Weights Leads to Wider Optima
    and Better Generalization", 2018.
    """

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the parameters hold their means; afterwards, in any case, what they held.

        Where steps were made since the last time, an epoch has ended here and counts.
        """
        held = []
        with torch.no_grad():
            for group, param in ((g, p) for g in self.param_groups for p in g["params"]):
                state = self.state[param]
                average = state.setdefault("average", torch.zeros_like(param))
                if state.get("averaged_at") != group["steps"]:
                    state["averaged_at"] = group["steps"]
                    state["epochs"] = state.get("epochs", 0) + 1
                    average += (param - average) / state["epochs"]
                held.append((param, param.clone(), average))
        try:
            with torch.no_grad():
                for param, _, average in held:
                    param.copy_(average)
            yield
        finally:
            with torch.no_grad():
                for param, value, _ in held:
                    param.copy_(value)
