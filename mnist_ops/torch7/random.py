"""Torch7's random numbers: the same words, and what it makes of them."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from .._extra import need
from ..ops._common import check_integer

need("mnist_ops.torch7", "numpy")

import numpy as np  # noqa: E402

__all__ = ["Generator"]


class Generator:
    """Torch7's random number generator (``torch.Generator``, ``lib/TH/THRandom.c``).

    A Mersenne Twister (MT19937) with the classic seeding, so its words are those of
    :class:`numpy.random.RandomState` of the same seed; the distributions on top are Torch7's own.

    Args:
        seed: an integer in ``[0, 2**32)``. ``generator.seed`` keeps it.

    Raises:
        TypeError, ValueError: if ``seed`` is not such an integer.

    Example::

        >>> Generator(1).random32(2)
        array([1791095845, 4282876139], dtype=uint64)
    """

    def __init__(self, seed: int = 1) -> None:
        self.manual_seed(seed)

    def manual_seed(self, seed: int) -> Generator:
        """Start again from ``seed`` and forget the second half of a pair of normals."""
        if isinstance(seed, bool) or not isinstance(seed, SupportsIndex):
            raise TypeError(f"Generator: seed must be an int, got {seed!r}")
        seed = operator.index(seed)
        if not 0 <= seed < 2**32:
            raise ValueError(f"Generator: seed must be in [0, 2**32), got {hex(seed)}")
        self.seed = seed
        self._words: Any = np.random.MT19937()
        # MT19937(seed) would hash the seed first; RandomState seeds as Torch7 does.
        state: Any = np.random.RandomState(seed).get_state(legacy=False)
        self._words.state = state
        self._second_normal: float | None = None
        return self

    def random32(self, size: int) -> np.ndarray:
        """The next ``size`` raw 32-bit words, as uint64."""
        return self._words.random_raw(size)

    def consume(self, count: int) -> None:
        """Skip ``count`` words."""
        count = check_integer("Generator.consume", "count", count, 0)
        self._words.random_raw(count, output=False)

    def _unit(self, size: int) -> np.ndarray:
        return self.random32(size) * 2.0**-32

    def uniform(self, low: float = 0.0, high: float = 1.0, size: int | Sequence[int] = 1) -> Tensor:
        """``word * 2**-32 * (high - low) + low``, float64, row-major in shape ``size``."""
        shape = _shape("Generator.uniform", size)
        values = self._unit(math.prod(shape)) * (high - low) + low
        return torch.from_numpy(values.reshape(shape))

    def normal(self, mean: float = 0.0, std: float = 1.0, size: int | Sequence[int] = 1) -> Tensor:
        """Normal numbers, float64, by Box and Muller's method.

        With two uniforms x, y and rho = sqrt(-2 log(1 - y)) the first is rho cos(2 pi x), the
        second rho sin(2 pi x). A second half that is left over serves the next call.
        """
        shape = _shape("Generator.normal", size)
        count = math.prod(shape)
        values = np.empty(count)
        start = 0
        if count and self._second_normal is not None:
            values[0], start, self._second_normal = self._second_normal, 1, None
        pairs = (count - start + 1) // 2
        if pairs:
            unit = self._unit(2 * pairs).reshape(pairs, 2)
            angle = 2.0 * math.pi * unit[:, 0]
            radius = np.sqrt(-2.0 * np.log(1.0 - unit[:, 1]))
            halves = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)
            values[start:] = halves[: count - start]
            if (count - start) % 2:
                self._second_normal = float(halves[-1])
        return torch.from_numpy((values * std + mean).reshape(shape))

    def bernoulli(self, p: float = 0.5, size: int | Sequence[int] = 1) -> Tensor:
        """1 where a uniform number is ``<= p``, else 0, float64."""
        return (self.uniform(0.0, 1.0, size) <= p).to(torch.float64)

    def randperm(self, n: int) -> Tensor:
        """A permutation of ``0 .. n-1``, int64: for i in 0 .. n-2, swap i and i + word mod (n-i).

        Consumes ``n - 1`` words.
        """
        n = check_integer("Generator.randperm", "n", n, 0)
        order = list(range(n))
        if n > 1:
            offsets = self.random32(n - 1) % np.arange(n, 1, -1, dtype=np.uint64)
            # Each swap depends on those before it, so this loop cannot become array code.
            for i, j in enumerate((offsets.astype(np.int64) + np.arange(n - 1)).tolist()):
                order[i], order[j] = order[j], order[i]
        return torch.tensor(order, dtype=torch.int64, device="cpu")

    def get_state(self) -> dict[str, Any]:
        """The state as ints and tensors, fit for ``torch.load(weights_only=True)``."""
        state = self._words.state["state"]
        second = [] if self._second_normal is None else [self._second_normal]
        return {
            "seed": self.seed,
            "key": torch.from_numpy(state["key"].astype(np.int64)),
            "position": int(state["pos"]),
            "second_normal": torch.tensor(second, dtype=torch.float64, device="cpu"),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a state that :meth:`get_state` returned.

        Raises:
            ValueError: if it is not one; nothing has changed then.
        """
        try:
            key = state["key"].numpy().astype(np.uint32)
            position, seed = int(state["position"]), int(state["seed"])
            second = state["second_normal"].tolist()
            whole = key.shape == (624,) and 0 <= position <= 624 and len(second) <= 1
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            whole = False
        if not whole:
            raise ValueError("Generator.set_state: state must be one that get_state returned")
        self._words.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": position}}
        self.seed = seed
        self._second_normal = second[0] if second else None


def _shape(name: str, size: int | Sequence[int]) -> tuple[int, ...]:
    sizes = size if isinstance(size, Sequence) else [size]
    shape = tuple(check_integer(name, "size", n, 0) for n in sizes)
    check_integer(name, "size", math.prod(shape), 0)
    return shape
