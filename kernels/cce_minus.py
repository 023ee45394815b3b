"""Sampled cross-entropy (CCE-): negatives from counters, shared by blocks of positions.

Source: arXiv 2509.09682; the correction with K and Q as drawn follows from unbiasedness for
``sum over j != y of exp(s_ij)``.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shardrec.kernels.block_logsumexp import (
    Blocks,
    block_logsumexp,
    compact_rows,
    local_rows,
)
from shardrec.kernels.negatives import STREAM_NEGATIVES, Proposal, Uniform
from shardrec.kernels.reduction import (
    candidate_loss,
    check_inputs,
    reduce_loss,
    scale_rows,
    scale_states,
)

__all__ = ["Sampler", "sampled_cross_entropy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """Which negatives a position meets: a function of (seed, step, global position), of no rank.

    Attributes:
        proposal: Distribution of the draws.
        num_negatives: K, draws per block.
        num_positions: N over all ranks.
        share: Positions that share one set of draws; global position i is in block
            ``i mod ceil(num_positions / share)``.
        seed: Key of the generator.
        step: Training step.
        parity: Correct with the number of kept draws and ``Q(j) / (1 - Q(y))`` as in the paper, instead
            of K and Q as drawn.
    """

    proposal: Proposal
    num_negatives: int
    num_positions: int
    share: int
    seed: int
    step: int
    parity: bool = False

    @property
    def num_blocks(self) -> int:
        """Number of sets of draws."""
        return max(1, -(-self.num_positions // self.share))

    def blocks(self, positions: Tensor, targets: Tensor, first_row: int, num_rows: int) -> Blocks:
        """Blocks of ``positions`` times the draws that lie in [first_row, first_row + num_rows).

        Args:
            positions: (n,) int64 global positions.
            targets: (n,) int64 global items.
            first_row: Global index of the shard's first row.
            num_rows: R, rows of the shard.
        """
        block_of = positions % self.num_blocks
        order = torch.argsort(block_of, stable=True)
        present, sizes = torch.unique_consecutive(block_of[order], return_counts=True)
        items, offsets = self._draw(present)
        inside = (items >= first_row) & (items < first_row + num_rows)
        item_ends = inside.sum(1).cumsum(0)
        return Blocks(
            pair_positions=order,
            pair_starts=F.pad(sizes.cumsum(0), (1, 0)),
            items=items[inside] - first_row,
            item_starts=F.pad(item_ends[:-1], (1, 0)),
            item_ends=item_ends,
            targets=local_rows(targets, first_row, num_rows),
            num_slots=positions.numel(),
            offsets=offsets[inside],
        )

    def correction(self, positions: Tensor, targets: Tensor) -> Tensor:
        """(n,) float32 to subtract from the log-sum-exp of logits lowered by ``log Q``."""
        if not self.parity:
            constant = torch.tensor(float(self.num_negatives)).log()
            return constant.to(targets.device).expand(targets.shape)
        block_of, line_of = torch.unique(positions % self.num_blocks, return_inverse=True)
        items, _ = self._draw(block_of)
        kept = torch.zeros_like(targets)
        for column in items.unbind(1):
            kept += column[line_of] != targets
        rest = 1 - self.proposal.probability(targets)
        return (kept.clamp(min=1) / rest).log().float()

    def _draw(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        items = self.proposal.draw(
            blocks, self.num_negatives, seed=self.seed, step=self.step, stream=STREAM_NEGATIVES
        )
        return items, self.proposal.probability(items).log().float()


def sampled_cross_entropy(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    *,
    num_negatives: int,
    share: int | None = 128,
    seed: int,
    step: int = 0,
    proposal: Proposal | None = None,
    parity: bool = False,
    sparse_grad: bool = False,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    temperature: float = 1.0,
) -> Tensor:
    """Cross-entropy of every target among K sampled rows, with the sampling bias removed.

    ``loss_i = log(exp(s_iy) + sum_k exp(s_in_k - log(K Q(n_k)))) - s_iy``; a draw equal to the target
    is left out. The draws are never stored beyond one chunk and come again in backward.

    Args:
        states: (N, D) float32, bfloat16 or float16.
        table: (V, D), same dtype.
        targets: (N,) int64 in [0, V).
        num_negatives: K draws per block of positions.
        share: Positions that share their draws; 1 is the published form, None the whole batch.
        seed: Key of the generator.
        step: Training step; another step draws other negatives.
        proposal: Distribution of the draws; uniform when None.
        parity: Use the paper's correction (kept draws, ``Q(j) / (1 - Q(y))``).
        sparse_grad: Give ``table`` a sparse gradient of the rows touched, as ``F.embedding`` does.
        weights: (N,) float factors of the positions' losses; the mean divides by their sum.
        reduction: "mean", "sum" or "none".
        normalize: Take states and rows at unit length.
        temperature: Divides the logits.

    Returns:
        () float32, or (N,) with "none". Gradients flow to ``states`` and ``table``.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape disagrees, or a target or option is out of range.

    Collectives: none.
    """
    check_inputs(states, table, targets, weights, reduction, temperature)
    num_positions = states.shape[0]
    share = max(num_positions, 1) if share is None else share
    if num_negatives < 1 or share < 1:
        raise ValueError(
            f"num_negatives and share must be positive, got {num_negatives} and {share}; "
            "share=1 draws for each position"
        )
    sampler = Sampler(
        proposal=proposal or Uniform(table.shape[0]),
        num_negatives=num_negatives,
        num_positions=num_positions,
        share=share,
        seed=seed,
        step=step,
        parity=parity,
    )
    positions = torch.arange(num_positions, device=states.device)
    blocks = sampler.blocks(positions, targets.long(), 0, table.shape[0])
    rows, blocks = compact_rows(table, blocks, sparse_grad)
    logsumexp, target_logits = block_logsumexp(
        scale_states(states, normalize, temperature), scale_rows(rows, normalize), blocks
    )
    logsumexp = logsumexp - sampler.correction(positions, targets)
    return reduce_loss(candidate_loss(logsumexp, target_logits), weights, reduction)
