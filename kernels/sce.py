"""Scalable cross-entropy (SCE): buckets of the positions and rows nearest to random centres.

Source: Mezentsev et al., "Scalable Cross-Entropy Loss for Sequential Recommendations with Large Item
Catalogs", arXiv 2409.18721.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shardrec.kernels.block_logsumexp import Blocks, block_logsumexp, compact_rows, local_rows
from shardrec.kernels.negatives import STREAM_MIX, random_signs
from shardrec.kernels.reduction import (
    candidate_loss,
    check_inputs,
    reduce_loss,
    scale_rows,
    scale_states,
)
from shardrec.kernels.select import topk_rows

__all__ = [
    "Buckets",
    "default_num_buckets",
    "largest_per_position",
    "mixed_centres",
    "plain_centres",
    "scalable_cross_entropy",
]

_MIX_TILE = 1024


@dataclass(frozen=True, slots=True)
class Buckets:
    """The positions and items of every bucket, the same on every rank.

    A pair is a (position, bucket); pairs are in the order of positions, then buckets.

    Attributes:
        positions: (n_b, b_x) int64 global positions.
        items: (n_b, b_y) int64 global items.
    """

    positions: Tensor
    items: Tensor

    def pairs(self, first_position: int, num_positions: int) -> tuple[Tensor, Tensor]:
        """Global position and bucket of the pairs of a range of positions, both (P,) int64."""
        buckets = torch.arange(self.positions.shape[0], device=self.positions.device)
        buckets = buckets[:, None].expand_as(self.positions)
        inside = self.positions >= first_position
        inside &= self.positions < first_position + num_positions
        positions, buckets = self.positions[inside], buckets[inside]
        order = torch.argsort(positions, stable=True)
        return positions[order], buckets[order]

    def blocks(
        self,
        pair_rows: Tensor,
        pair_buckets: Tensor,
        targets: Tensor,
        first_row: int,
        num_rows: int,
    ) -> Blocks:
        """One block per bucket, of the given pairs times the bucket's items on a shard.

        Args:
            pair_rows: (P,) int64 row of ``states`` of each pair.
            pair_buckets: (P,) int64 bucket of each pair.
            targets: (n,) int64 global items of the states.
            first_row: Global index of the shard's first row.
            num_rows: R, rows of the shard.
        """
        num_buckets = self.items.shape[0]
        order = torch.argsort(pair_buckets, stable=True)
        sizes = torch.bincount(pair_buckets, minlength=num_buckets)
        inside = (self.items >= first_row) & (self.items < first_row + num_rows)
        item_ends = inside.sum(1).cumsum(0)
        return Blocks(
            pair_positions=pair_rows[order],
            pair_starts=F.pad(sizes.cumsum(0), (1, 0)),
            items=self.items[inside] - first_row,
            item_starts=F.pad(item_ends[:-1], (1, 0)),
            item_ends=item_ends,
            targets=local_rows(targets, first_row, num_rows),
            num_slots=pair_rows.numel(),
            pair_slots=order,
        )


def default_num_buckets(num_positions: int) -> int:
    """``2 sqrt(N)``, the paper's recommendation for both n_b and b_x, at least 1.

    >>> default_num_buckets(10000)
    200
    """
    return max(1, round(2 * math.sqrt(num_positions)))


def plain_centres(num_buckets: int, width: int, *, seed: int, step: int) -> Tensor:
    """(n_b, D) float32 random signs: centres that do not look at the states."""
    return random_signs(0, num_buckets, width, seed=seed, step=step, stream=STREAM_MIX)


def mixed_centres(
    states: Tensor, first_position: int, num_buckets: int, *, seed: int, step: int
) -> Tensor:
    """(n_b, D) float32 random combinations of the states, the share of these positions.

    Line b is ``sum_i omega_ib x_i`` with omega random signs of (global position i, b); the shares of
    several ranks add up. The signs are never stored beyond a tile of positions.

    Args:
        states: (N, D); no gradient is taken.
        first_position: Global index of ``states[0]``.
        num_buckets: n_b.
        seed: Key of the generator.
        step: Training step.
    """
    centres = torch.zeros((num_buckets, states.shape[1]), device=states.device)
    for start in range(0, states.shape[0], _MIX_TILE):
        part = states[start : start + _MIX_TILE].float()
        signs = random_signs(
            first_position + start,
            part.shape[0],
            num_buckets,
            seed=seed,
            step=step,
            stream=STREAM_MIX,
        )
        centres.addmm_(signs.to(states.device).T, part)
    return centres


def largest_per_position(
    pair_loss: Tensor, pair_positions: Tensor, num_positions: int
) -> tuple[Tensor, Tensor]:
    """Largest pair loss of every position and whether it has any; gradient goes to that pair only.

    Args:
        pair_loss: (P,) float32.
        pair_positions: (P,) int64 in [0, num_positions).
        num_positions: N.

    Returns:
        (N,) float32, 0 where a position is in no bucket, and (N,) bool.

    >>> largest_per_position(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([0, 0, 2]), 3)
    (tensor([3., 0., 2.]), tensor([ True, False,  True]))
    """
    detached = pair_loss.detach()
    best = detached.new_full((num_positions,), -torch.inf)
    best.scatter_reduce_(0, pair_positions, detached, "amax")
    pairs = torch.arange(pair_loss.numel(), device=pair_loss.device)
    is_best = detached == best[pair_positions]
    winner = torch.full((num_positions,), pair_loss.numel(), device=pair_loss.device)
    winner.scatter_reduce_(0, pair_positions[is_best], pairs[is_best], "amin")
    covered = winner < pair_loss.numel()
    padded = F.pad(pair_loss, (0, 1))
    return padded[winner], covered


def scalable_cross_entropy(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    *,
    num_buckets: int | None = None,
    positions_per_bucket: int | None = None,
    items_per_bucket: int = 256,
    mix: bool = True,
    seed: int,
    step: int = 0,
    sparse_grad: bool = False,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    temperature: float = 1.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of every target among the rows of its hardest bucket.

    For each of n_b random centres the b_x positions and the b_y rows of largest inner product form a
    bucket (ties by lower index); a position's loss is the largest over its buckets, and positions in
    no bucket give none. Mean over the covered positions.

    Args:
        states: (N, D) float32, bfloat16 or float16.
        table: (V, D), same dtype.
        targets: (N,) int64 in [0, V).
        num_buckets: n_b; ``2 sqrt(N)`` when None.
        positions_per_bucket: b_x; ``2 sqrt(N)`` when None.
        items_per_bucket: b_y.
        mix: Centres are random combinations of the states; else random signs.
        seed: Key of the generator.
        step: Training step; another step draws other centres.
        sparse_grad: Give ``table`` a sparse gradient of the rows touched.
        weights: (N,) float factors of the positions' losses; the mean divides by their sum.
        reduction: "mean", "sum" or "none".
        normalize: Take states and rows at unit length.
        temperature: Divides the logits.

    Returns:
        () float32; with "none" (N,) float32 and the (N,) bool mask of covered positions. Gradients
        flow to ``states`` and, through the buckets' logits, to ``table``.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape disagrees, or a target or option is out of range.

    Collectives: none.
    """
    check_inputs(states, table, targets, weights, reduction, temperature)
    num_positions = states.shape[0]
    default = default_num_buckets(num_positions)
    num_buckets = default if num_buckets is None else num_buckets
    per_bucket = default if positions_per_bucket is None else positions_per_bucket
    if min(num_buckets, per_bucket, items_per_bucket) < 1:
        raise ValueError(
            "num_buckets, positions_per_bucket and items_per_bucket must be positive, got "
            f"{num_buckets}, {per_bucket} and {items_per_bucket}; None takes the default"
        )
    scaled = scale_states(states, normalize, temperature)
    with torch.no_grad():
        if mix:
            centres = mixed_centres(scaled, 0, num_buckets, seed=seed, step=step)
        else:
            centres = plain_centres(num_buckets, states.shape[1], seed=seed, step=step)
            centres = centres.to(states.device)
        _, positions = topk_rows(centres, scaled, per_bucket)
        _, items = topk_rows(centres, scale_rows(table, normalize), items_per_bucket)
    buckets = Buckets(positions, items)
    pair_rows, pair_buckets = buckets.pairs(0, num_positions)
    blocks = buckets.blocks(pair_rows, pair_buckets, targets.long(), 0, table.shape[0])
    rows, blocks = compact_rows(table, blocks, sparse_grad)
    logsumexp, target_logits = block_logsumexp(scaled, scale_rows(rows, normalize), blocks)
    pair_loss = candidate_loss(logsumexp, target_logits[pair_rows])
    loss, covered = largest_per_position(pair_loss, pair_rows, num_positions)
    reduced = reduce_loss(loss, weights, reduction, covered)
    return (reduced, covered) if reduction == "none" else reduced
