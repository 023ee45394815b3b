"""Which items a position is compared with: the part in which the losses differ."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from shardrec.kernels.loss.inputs import Problem
from shardrec.kernels.loss.row_fetch import RowTrip
from shardrec.kernels.streaming import Plan

__all__ = ["Candidates", "Shape"]

Shape = tuple[str | int, ...]
"""Sizes of a tensor; a letter stands for N positions and R rows of this rank, D, or is one of
``Candidates.sizes``."""


class Candidates(ABC):
    """Candidates of every position: a frozen dataclass of numbers and words.

    Its fields become arguments of an operator; ``call.SCHEMA_TYPES`` lists their types.
    Here all items are candidates and nothing is chosen. ``tensors`` are those that came with the
    call, then those that were chosen.

    Attributes:
        slots: "N" where a slot is a position, else the letter of their number.
        rows: "R" where every row is a candidate, else "M".
        travels: Whether ``touched`` may give a trip.
    """

    __slots__ = ()
    slots: ClassVar[str] = "N"
    rows: ClassVar[str] = "R"
    travels: ClassVar[bool] = False

    @property
    def choice(self) -> tuple[tuple[Shape, torch.dtype], ...]:
        """Shape and dtype of each tensor of ``choose``."""
        return ()

    def sizes(self, num_positions: int, num_rows: int) -> dict[str, int]:
        """What one process can tell of the letters before it chooses; numbers may be symbolic."""
        return {}

    def choose(self, problem: Problem) -> tuple[Tensor, ...]:
        """What is found by looking at states and rows, and must not be looked for again."""
        return ()

    def touched(self, problem: Problem, tensors: tuple[Tensor, ...]) -> Tensor | RowTrip | None:
        """Items that are candidates or targets of any position, repeats allowed; None: all.

        Or the trip of these rows to the states.
        """
        return None

    @abstractmethod
    def plan(self, problem: Problem, meeting: Problem, tensors: tuple[Tensor, ...]) -> Plan:
        """The blocks of positions and rows.

        Args:
            problem: The batch and the table.
            meeting: Where states meet rows: over the touched rows alone, and after their trip.
            tensors: Those of the call and those chosen.
        """
