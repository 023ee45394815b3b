"""Definitions of four losses, as in their papers: dense, in any float dtype, with autograd.

Candidates are arguments, which keeps each definition short; the public functions choose them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "cross_entropy_reference",
    "reduced_cross_entropy_reference",
    "sampled_cross_entropy_reference",
    "scalable_cross_entropy_reference",
]


def cross_entropy_reference(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """(N,) full softmax cross-entropy, ``log sum_j exp(s_ij) - s_iy``."""
    return F.cross_entropy(states @ table.T, targets, reduction="none")


def sampled_cross_entropy_reference(
    states: Tensor, table: Tensor, targets: Tensor, negatives: Tensor, corrections: Tensor
) -> Tensor:
    """(N,) sampled softmax cross-entropy with corrected logits of the negatives.

    ``loss_i = log(exp(s_iy) + sum_k exp(s_in_k - c_ik)) - s_iy`` over k with ``n_k != y``.

    Args:
        states: (N, D).
        table: (V, D).
        targets: (N,) int64.
        negatives: (N, K) int64 items n_k.
        corrections: (N, K) c_ik, such as the log of the expected number of draws of the item.
    """
    logits = states @ table.T
    positive = logits.gather(1, targets[:, None])
    negative = logits.gather(1, negatives) - corrections
    negative = negative.masked_fill(negatives == targets[:, None], -torch.inf)
    return torch.logsumexp(torch.cat([positive, negative], dim=1), 1) - positive[:, 0]


def scalable_cross_entropy_reference(
    states: Tensor, table: Tensor, targets: Tensor, positions: Tensor, items: Tensor
) -> Tensor:
    """(N,) largest cross-entropy of each position over its buckets; 0 for a position in no bucket.

    Args:
        states: (N, D).
        table: (V, D).
        targets: (N,) int64.
        positions: (n_b, b_x) int64 positions of each bucket.
        items: (n_b, b_y) int64 items of each bucket.
    """
    logits = states @ table.T
    losses: list[list[Tensor]] = [[] for _ in range(states.shape[0])]
    for members, candidates in zip(positions.tolist(), items.tolist(), strict=True):
        for position in members:
            target = int(targets[position])
            others = [item for item in candidates if item != target]
            scores = logits[position, [target, *others]]
            losses[position].append(torch.logsumexp(scores, 0) - scores[0])
    nothing = logits.sum() * 0
    return torch.stack([max(loss) if loss else nothing for loss in losses])


def reduced_cross_entropy_reference(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    position_chunks: Tensor,
    item_chunks: Tensor,
    reach: int,
) -> Tensor:
    """(N,) cross-entropy over the rows in nearby chunks; a row near in several rounds counts once.

    A row that is near in c rounds is summed c times, with its logit lowered by log(c).

    Args:
        states: (N, D).
        table: (V, D).
        targets: (N,) int64.
        position_chunks: (N, r) int chunk of each position in each round.
        item_chunks: (V, r) int chunk of each item in each round.
        reach: e, chunks on either side that count as near.
    """
    logits = states @ table.T
    positive = logits.gather(1, targets[:, None])
    near = (position_chunks[:, None] - item_chunks[None]).abs() <= reach
    near &= (torch.arange(table.shape[0]) != targets[:, None])[:, :, None]
    count = near.sum(2, keepdim=True)
    lowered = (logits[:, :, None] - count.to(logits.dtype).log()).masked_fill(~near, -torch.inf)
    return torch.logsumexp(torch.cat([positive, lowered.flatten(1)], dim=1), 1) - positive[:, 0]
