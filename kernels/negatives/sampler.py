"""Negatives shared by blocks of positions, regenerated whenever they are needed."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from shardrec.kernels.block_logsumexp import RowIds
from shardrec.kernels.negatives.draws import STREAM_NEGATIVES
from shardrec.kernels.negatives.proposals import Proposal, Uniform

__all__ = ["Sampler", "draws_at_once"]

# Draws in memory at a time: 2**20 int64 are 8 MiB. With few of them a GPU would wait for launches.
_DRAWS_AT_ONCE, _GPU_DRAWS_AT_ONCE = 1 << 20, 1 << 24


def draws_at_once(*, on_cpu: bool) -> int:
    """Draws in memory at a time."""
    return _DRAWS_AT_ONCE if on_cpu else _GPU_DRAWS_AT_ONCE


@cache
def log_of(number: float, dtype: torch.dtype) -> float:
    """The logarithm as ``torch.log`` computes it for this dtype, rounded to float32."""
    return float(torch.tensor(number, dtype=dtype).log().float())


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """Negatives of each position, determined by (seed, step, global position), not by the rank.

    Attributes:
        proposal: Distribution of the draws.
        num_negatives: K, draws per block.
        num_positions: N over all ranks.
        share: Positions that share one set of draws, None for all; global position i is in block
            ``i mod ceil(num_positions / share)``.
        seed: Key of the generator.
        step: Training step.
        parity: Correct as in the paper, with the number of draws other than the target and
            ``Q(j) / (1 - Q(y))``, instead of K and Q as drawn.
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
        """Number of blocks, each with its own set of draws."""
        return 1 if self.share is None else max(1, -(-self.num_positions // self.share))

    def blocks_at_once(self, device: torch.device) -> int:
        """Number of blocks with draws in memory at a time."""
        return max(1, draws_at_once(on_cpu=device.type == "cpu") // self.num_negatives)

    def draw(self, blocks: Tensor) -> Tensor:
        """(len(blocks), K) int64 items drawn for the given blocks."""
        return self.proposal.draw(
            blocks, self.num_negatives, seed=self.seed, step=self.step, stream=STREAM_NEGATIVES
        )

    def distinct_items(self, device: torch.device) -> Tensor:
        """(M,) int64 ascending distinct items of all blocks, with all draws in memory at once."""
        return torch.unique(self.draw(torch.arange(self.num_blocks, device=device)))

    def log_probability(self, items: Tensor) -> Tensor:
        """Float32 ``log Q(item)``, of the shape of ``items``."""
        if isinstance(self.proposal, Uniform):
            log_q = log_of(1 / self.proposal.size, torch.float64)
            return torch.full(items.shape, log_q, dtype=torch.float32, device=items.device)
        return self.proposal.probability(items).log().float()

    def drawn_rows(self, row_ids: RowIds, targets: Tensor) -> Tensor:
        """(n,) int64 ascending items of this shard that are drawn or among ``targets``."""
        drawn = torch.zeros(row_ids.count + 1, dtype=torch.bool, device=targets.device)
        # Items of other shards, -1, mark the extra last entry.
        drawn.index_fill_(0, row_ids.find(targets), True)
        all_blocks = torch.arange(self.num_blocks, device=targets.device)
        for blocks in all_blocks.split(self.blocks_at_once(targets.device)):
            drawn.index_fill_(0, row_ids.find(self.draw(blocks).flatten()), True)
        return drawn[:-1].nonzero()[:, 0] + row_ids.first

    def correction(self, first: int, targets: Tensor) -> Tensor | float:
        """(n,) float32 or a number to subtract from the log-sum-exps of ``s_ij - log Q(j)``.

        By default it is log K.

        Args:
            first: Global index of the first position.
            targets: (n,) int64 targets of the positions from there on.
        """
        if not self.parity:
            return log_of(float(self.num_negatives), torch.float32)
        positions = torch.arange(first, first + targets.numel(), device=targets.device)
        kept = torch.empty_like(targets)
        at_once = self.blocks_at_once(targets.device)
        for part in torch.arange(targets.numel(), device=targets.device).split(at_once):
            items = self.draw(positions[part] % self.num_blocks)
            kept[part] = (items != targets[part, None]).sum(1)
        rest = 1 - self.proposal.probability(targets)
        return (kept.clamp(min=1) / rest).log().float()
