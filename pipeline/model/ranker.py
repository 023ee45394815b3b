"""Rankers make the lists of users; this one scores sharded rows. See also ``baseline_ranker``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from shardrec.kernels.shard import RowShard
from shardrec.modules.memory import Memory, recent_items
from shardrec.modules.ranking import Blocks, Ragged, top_items
from shardrec.pipeline.model.model import Model

__all__ = ["Ranker", "Scorer", "StateRanker"]


Scorer = Callable[[Tensor, Tensor], Tensor]
"""From items (B, L) int64 and lengths (B,) int64 to states (B, D); collectives allowed."""


class Ranker(Protocol):
    """The interface of what makes the lists that ``evaluate`` measures and ``recommend`` writes."""

    @property
    def max_length(self) -> int:
        """Number of a user's most recent items that it reads."""

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that must call ``top`` together; None for one process."""

    @property
    def device(self) -> torch.device:
        """The device of the tensors that it takes and returns."""

    def top(
        self, items: Tensor, lengths: Tensor, k: int, seen: Ragged | None, allowed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(B, k) float32 scores and (B, k) int64 items, best first; -inf and -1 end a short list.

        Args:
            items: (B, L) int64 last items of each history, padded on the right.
            lengths: (B,) int64 in [1, L].
            k: length of the lists.
            seen: (S,) items that must not be returned, concatenated, and (B,) their number for each
                user; None excludes none.
            allowed: (V,) bool, the items that may be returned; None allows all.

        Collectives: on ``group``; every rank must call it, with B = 0 where it has no users.
        """


@dataclass(frozen=True, slots=True)
class StateRanker:
    """Ranks the rows of a sharded table by their inner products with the users' states.

    Attributes:
        scorer: makes the states.
        shard: this rank's rows.
        max_length: number of a user's most recent items that the scorer reads.
        blocks: block sizes of the ranking.
        memory: adds scores to successors of recent items; None adds nothing.
        skipped: (V,) bool, items of a history that the memory passes over; None: none of them.
        all_ranks: those of all replicas of the table; None: those that share it.
    """

    scorer: Scorer
    shard: RowShard
    max_length: int
    blocks: Blocks
    memory: Memory | None = None
    skipped: Tensor | None = None
    all_ranks: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, model: Model, max_length: int, blocks: Blocks) -> "StateRanker":
        """The ranker of a model that reads ``max_length`` items."""
        return cls(
            model.last_states,
            model.scored_shard(),
            max_length,
            blocks,
            model.memory,
            all_ranks=model.group,
        )

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that share the users."""
        return self.shard.group if self.all_ranks is None else self.all_ranks

    @property
    def device(self) -> torch.device:
        """The device of the table."""
        return self.shard.rows.device

    def top(
        self, items: Tensor, lengths: Tensor, k: int, seen: Ragged | None, allowed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(B, k) scores and items; see ``Ranker.top``.

        Scores are inner products of state and row, plus what the memory adds.

        Collectives: those of the scorer and of ``top_items``.
        """
        states, recent = self.scorer(items, lengths), None
        if self.memory is not None:
            is_history = torch.arange(items.shape[1], device=self.device) < lengths[:, None]
            if self.skipped is not None:
                is_history &= ~self.skipped[items]
            recent = recent_items(items, is_history, self.memory.ages)
        return top_items(
            states,
            self.shard,
            k,
            seen=seen,
            allowed=allowed,
            memory=self.memory,
            recent=recent,
            blocks=self.blocks,
        )
