"""Which items a position is compared with: the part in which the losses differ."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from shardrec.kernels.block_logsumexp import Blocks, NearbyChunks, RowIds
from shardrec.kernels.loss.inputs import Inputs
from shardrec.kernels.loss.row_fetch import RowFetch
from shardrec.kernels.ranks.chunks import Chunk

__all__ = ["Candidates", "Plan", "Shape"]

Shape = tuple[int | torch.SymInt, ...]


class Plan(ABC):
    """The candidates of every position as blocks of logits; the same on every rank.

    A slot is one log-sum-exp. Slots have global numbers in the order of positions. By default a
    slot is a position.

    Attributes:
        layout: Which positions each rank holds.
        num_slots: Slots of this rank.
        slot_positions: (num_slots,) int64 local position of each slot; None where they are one.
        per_position: (N, ...) tensors of this rank's positions; ``blocks`` gets those of a chunk.
    """

    def __init__(self, inputs: Inputs) -> None:
        """Gives every position of the inputs a slot."""
        self.layout = inputs.layout
        self.num_slots = inputs.states.shape[0]
        self.slot_positions: Tensor | None = None
        self.per_position: Sequence[Tensor] = ()

    def chunk_of(self) -> Tensor:
        """(num_positions,) int64 chunk of each global position."""
        return self.layout.even_chunks(self.layout.num_chunks(listed=True))

    def slots(self, chunk: Chunk) -> Chunk:
        """The slots of the chunk's positions, as a chunk of slots."""
        return chunk

    @abstractmethod
    def blocks(
        self, chunk: Chunk, targets: Tensor, row_ids: RowIds, per_position: Sequence[Tensor]
    ) -> Blocks | NearbyChunks:
        """Blocks whose positions are indices into the chunk; slot s is the s-th of ``slots``."""

    def correction(self) -> Tensor | None:
        """(num_slots,) float32 to subtract from the log-sum-exps; None: nothing."""
        return None


class Candidates(ABC):
    """The candidates of a loss: a frozen dataclass of numbers and strings.

    Its fields become arguments of an operator; ``operator.SCHEMA_TYPES`` lists their types. A loss
    implements ``plan``. The other methods are for losses that choose by looking at states and rows
    (``choose`` and ``choice_shapes``), that use few rows (``used_items``), or where a position has
    several log-sum-exps of which the largest counts (``num_slots``). ``tensors`` are those that
    came with the call, then those that were chosen.
    """

    __slots__ = ()

    @abstractmethod
    def plan(self, inputs: Inputs, local: Inputs, tensors: tuple[Tensor, ...]) -> Plan:
        """The blocks of positions and rows.

        Args:
            inputs: The batch and the table.
            local: The inputs over the rows that are used alone, after they were fetched.
            tensors: Those of the call and those chosen.
        """

    def choose(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Choices that depend on states and rows: made in forward and saved for backward."""
        return ()

    def choice_shapes(
        self, num_positions: int, num_rows: int
    ) -> tuple[tuple[Shape, torch.dtype], ...]:
        """Shape and dtype of each tensor of ``choose`` in one process; numbers may be symbolic."""
        return ()

    def used_items(self, inputs: Inputs, tensors: tuple[Tensor, ...]) -> Tensor | RowFetch | None:
        """(n,) items that are candidates or targets of any position, with repeats; None: all.

        Or the plan by which each rank fetches these rows, where that sends fewer bytes.
        """
        return None

    def num_slots(self, num_positions: int, num_rows: int) -> int:
        """Number of slots in one process; numbers may be symbolic."""
        return num_positions

    @property
    def uses_few_rows(self) -> bool:
        """Whether ``used_items`` says which rows are used."""
        return type(self).used_items is not Candidates.used_items

    @property
    def has_several_slots(self) -> bool:
        """Whether a position may have several slots, or none."""
        return type(self).num_slots is not Candidates.num_slots
