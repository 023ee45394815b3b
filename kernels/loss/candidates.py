"""The interface of a loss: which items a position is compared with."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from shardrec.kernels.block_logsumexp import Blocks, EveryPair, NearbyChunks, RowIds
from shardrec.kernels.loss.inputs import Inputs
from shardrec.kernels.loss.row_fetch import RowFetch
from shardrec.kernels.ranks.chunks import Chunk

__all__ = ["Candidates", "Plan", "Shape"]

Shape = tuple[int | torch.SymInt, ...]


class Plan(ABC):
    """The blocks of logits that a loss sums for every position; the same plan on every rank.

    A slot is one log-sum-exp of the output. By default every position has one slot; slots are
    numbered over all ranks in the order of their positions.

    Attributes:
        layout: The ranges of positions and rows of each rank.
        num_slots: Number of slots of this rank.
        slot_positions: (num_slots,) int64 local position of each slot; None: slot s is position s.
        per_position: (N, ...) tensors of this rank's positions that ``blocks`` needs; it receives
            their entries at the positions of a chunk.
    """

    def __init__(self, inputs: Inputs) -> None:
        """Sets one slot for each position of the inputs."""
        self.layout = inputs.layout
        self.num_slots = inputs.states.shape[0]
        self.slot_positions: Tensor | None = None
        self.per_position: Sequence[Tensor] = ()

    def chunk_of(self) -> Tensor | None:
        """(num_positions,) int64 index of the chunk in which each global position is processed.

        None if one chunk has all positions.
        """
        return self.layout.even_chunks(self.layout.num_chunks(listed=True))

    def slots(self, chunk: Chunk) -> Chunk:
        """The slots of the chunk's positions, as a ``Chunk`` of slot numbers."""
        return chunk

    @abstractmethod
    def blocks(
        self, chunk: Chunk, targets: Tensor, row_ids: RowIds, per_position: Sequence[Tensor]
    ) -> Blocks | EveryPair | NearbyChunks:
        """The blocks of logits of one chunk: its positions times rows of this shard.

        Positions of the result are indices into the chunk, slots are indices into ``slots(chunk)``.
        """

    def correction(self) -> Tensor | float | None:
        """(num_slots,) float32 or a number to subtract from the log-sum-exps; None for zero."""
        return None


class Candidates(ABC):
    """How a loss chooses candidates: a frozen dataclass of numbers and strings.

    Its fields become arguments of an operator; ``options.SCHEMA_TYPES`` lists their types. A loss
    implements ``plan``. The other methods are for losses whose choice depends on the values of
    states and rows (``choose`` and ``choice_shapes``), losses that use few rows (``used_items``),
    and losses that take the largest of several log-sum-exps of a position (``num_slots``). The
    argument ``tensors`` holds the tables passed with the call, then the results of ``choose``.
    """

    __slots__ = ()

    @abstractmethod
    def plan(self, inputs: Inputs, local: Inputs, tensors: tuple[Tensor, ...]) -> Plan:
        """The blocks of logits that the loss sums.

        Args:
            inputs: The batch and the table.
            local: The inputs restricted to the rows in use, after any were fetched.
            tensors: The tables passed with the call, then the results of ``choose``.
        """

    def choose(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Data-dependent choices: computed once in forward and saved for backward."""
        return ()

    def choice_shapes(
        self, num_positions: int, num_rows: int
    ) -> tuple[tuple[Shape, torch.dtype], ...]:
        """Shape and dtype of each result of ``choose`` in one process; sizes may be symbolic."""
        return ()

    def used_items(self, inputs: Inputs, tensors: tuple[Tensor, ...]) -> Tensor | RowFetch | None:
        """(n,) int64 items that are candidates or targets of any position; None for all items.

        Items may repeat. If fetching their rows sends fewer bytes than sending the states, the
        result is the plan to fetch them.
        """
        return None

    def num_slots(self, num_positions: int, num_rows: int) -> int:
        """Number of slots in one process; sizes may be symbolic."""
        return num_positions

    @property
    def uses_few_rows(self) -> bool:
        """Whether the loss names the rows in use, by ``used_items``, instead of using all rows."""
        return type(self).used_items is not Candidates.used_items

    @property
    def has_several_slots(self) -> bool:
        """Whether a position may have several slots, or none."""
        return type(self).num_slots is not Candidates.num_slots
