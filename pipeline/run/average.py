"""An exponential moving average of the trained weights, taken every few steps.

Averaged weights as in Izmailov et al., "Averaging Weights Leads to Wider Optima and Better
Generalization", arXiv 1803.05407, with exponential weights instead of equal ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from shardrec.modules.catalog import Catalog

__all__ = ["UNAVERAGED", "AveragedWeights", "newest_share"]

UNAVERAGED = "unaveraged"  # name of the weights that training goes on with, in a checkpoint
BLOCK_ROWS = 8_192  # that change places at a time


class AveragedWeights:
    """Averages of the encoder's and the attributes' parameters and of this rank's rows.

    Outside of ``in_place`` the model holds the weights that are trained; inside of it the averages,
    and this object the others. The average belongs to single elements, so it does not depend on the
    number of ranks, and equal replicas have equal averages.
    """

    def __init__(
        self, parameters: list[Tensor], catalog: Catalog, *, decay: float, every: int
    ) -> None:
        """Copies the weights; the copies of the rows are stored with the rows of the catalog.

        Args:
            parameters: of encoder and attributes, which change in place.
            catalog: the item table.
            decay: share of the average that is left after a step.
            every: steps between two updates of the average.
        """
        rows = catalog.state_dict()["rows"]
        self.decay, self.every, self.catalog = decay, every, catalog
        self._live = [*(one.detach() for one in parameters), rows]
        self._held = [one.clone() for one in self._live]
        catalog.beside_rows[UNAVERAGED] = self._held[-1]

    def update(self, step: int) -> None:
        """Take the weights after ``step``, from 1 on, into the average, if it is their turn."""
        if (step - 1) % self.every == 0:
            share = newest_share((step - 1) // self.every, self.decay**self.every)
            torch._foreach_lerp_(self._held, self._live, share)

    def state_dict(self) -> dict[str, Tensor]:
        """What is held for the parameters: inside of ``in_place``, their unaveraged values."""
        return {str(index): one for index, one in enumerate(self._held[:-1])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy what ``state_dict`` returned.

        Raises:
            KeyError: a parameter is missing.
        """
        for name, held in self.state_dict().items():
            held.copy_(state[name])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Context manager: the model holds the averages, and its own weights again afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for live, held in zip(self._live, self._held, strict=True):
            for one, other in zip(_blocks(live), _blocks(held), strict=True):
                kept = one.clone()
                one.copy_(other)
                other.copy_(kept)
        self.catalog.zero_grad()  # rows composed of attributes are out of date


def newest_share(number: int, decay: float) -> float:
    """The weight of the newest weights in the average, after ``number`` earlier ones.

    It falls from 1, so that the average of a short run is over its last tenth or so and not over
    its random start.

    >>> [round(newest_share(number, 0.99), 3) for number in (0, 1, 81, 10_000)]
    [1.0, 0.9, 0.1, 0.01]
    """
    return max(1 - decay, 9 / (9 + number))


def _blocks(weights: Tensor) -> tuple[Tensor, ...]:
    return weights.split(BLOCK_ROWS) if weights.ndim else (weights,)
