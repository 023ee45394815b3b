"""What makes lists: a model over its sharded rows. Baselines are in ``baseline_ranker``."""

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
    """Makes the lists that ``evaluate`` measures and ``recommend`` writes."""

    @property
    def max_length(self) -> int:
        """How many of a user's last items it reads."""

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that call it together."""

    @property
    def device(self) -> torch.device:
        """Where the tensors that it takes and returns are."""

    def top(
        self, items: Tensor, lengths: Tensor, k: int, seen: Ragged | None, allowed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Scores and items (B, k), best first; -inf and -1 at the end of a short list.

        Args:
            items: (B, L) int64, the last items of each history, padded on the right.
            lengths: (B,) int64 in [1, L].
            k: length of the lists.
            seen: items of each user that must not be returned.
            allowed: (V,) bool, the items that may be returned; None allows all.

        Collectives: on ``group``; every rank must call it, with B = 0 where it has no users.
        """


@dataclass(frozen=True, slots=True)
class StateRanker:
    """Ranks the rows of a sharded table by their inner products with the users' states.

    Attributes:
        scorer: makes the states.
        shard: this rank's rows.
        max_length: how many of a user's last items the scorer reads.
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
        """Where the table is."""
        return self.shard.rows.device

    def top(
        self, items: Tensor, lengths: Tensor, k: int, seen: Ragged | None, allowed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As ``Ranker.top``; scores are inner products, and what a memory adds to them.

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
