"""Negatives shared by blocks of positions, drawn again whenever they are needed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shardrec.kernels.block_logsumexp import RowIds
from shardrec.kernels.negatives.draws import STREAM_NEGATIVES
from shardrec.kernels.negatives.proposals import Proposal

__all__ = ["DRAWS_AT_ONCE", "Sampler"]

# Draws in memory at a time: 2**20 int64 are 8 MiB.
DRAWS_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """The negatives of each position, a function of (seed, step, global position) and of no rank.

    Attributes:
        proposal: Distribution of the draws.
        num_negatives: K, draws per block.
        num_positions: N over all ranks.
        share: Positions that share one set of draws, None for all; global position i is in block
            ``i mod ceil(num_positions / share)``.
        seed: Key of the generator.
        step: Training step.
        parity: Correct with the number of kept draws and ``Q(j) / (1 - Q(y))`` as in the paper,
            instead of K and Q as drawn.
    """

    proposal: Proposal
    num_negatives: int
    num_positions: int
    share: int | None
    seed: int
    step: int
    parity: bool = False

    @property
    def num_blocks(self) -> int:
        """Number of sets of draws."""
        return 1 if self.share is None else max(1, -(-self.num_positions // self.share))

    @property
    def blocks_at_once(self) -> int:
        """Number of sets of draws that are in memory together."""
        return max(1, DRAWS_AT_ONCE // self.num_negatives)

    def draw(self, blocks: Tensor) -> Tensor:
        """(len(blocks), K) int64 items."""
        return self.proposal.draw(
            blocks, self.num_negatives, seed=self.seed, step=self.step, stream=STREAM_NEGATIVES
        )

    def distinct_items(self, device: torch.device) -> Tensor:
        """Ascending items that any block draws; all draws are in memory for it."""
        return torch.unique(self.draw(torch.arange(self.num_blocks, device=device)))

    def log_probability(self, items: Tensor) -> Tensor:
        """Float32 ``log Q`` of each item."""
        return self.proposal.probability(items).log().float()

    def drawn_rows(self, row_ids: RowIds, targets: Tensor) -> Tensor:
        """(n,) int64 ascending items of the shard that are drawn or among ``targets``."""
        drawn = torch.zeros(row_ids.count + 1, dtype=torch.bool, device=targets.device)
        drawn[row_ids.find(targets)] = True  # -1, another shard's item, marks the extra entry
        all_blocks = torch.arange(self.num_blocks, device=targets.device)
        for blocks in all_blocks.split(self.blocks_at_once):
            drawn[row_ids.find(self.draw(blocks).flatten())] = True
        return drawn[:-1].nonzero()[:, 0] + row_ids.first

    def correction(self, positions: Tensor, targets: Tensor) -> Tensor:
        """(n,) float32 to subtract from the log-sum-exp of logits lowered by ``log Q``.

        Args:
            positions: (n,) int64 global positions.
            targets: (n,) int64 their targets.
        """
        if not self.parity:
            constant = torch.tensor(float(self.num_negatives), device=targets.device)
            return constant.log().expand(targets.shape)
        kept = torch.empty_like(targets)
        for part in torch.arange(targets.numel(), device=targets.device).split(self.blocks_at_once):
            items = self.draw(positions[part] % self.num_blocks)
            kept[part] = (items != targets[part, None]).sum(1)
        rest = 1 - self.proposal.probability(targets)
        return (kept.clamp(min=1) / rest).log().float()
