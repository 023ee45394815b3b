"""Scalable cross-entropy (SCE): buckets of the positions and rows nearest to random centres.

Source: Mezentsev et al., "Scalable Cross-Entropy Loss for Sequential Recommendations with Large
Item Catalogs", arXiv 2409.18721.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from shardrec.kernels.block_logsumexp import Blocks, RowIds
from shardrec.kernels.call import Call
from shardrec.kernels.loss.candidates import Candidates, Shape
from shardrec.kernels.loss.inputs import Problem
from shardrec.kernels.loss.operator import Operator
from shardrec.kernels.negatives import STREAM_MIX, mixed_signs, random_signs
from shardrec.kernels.ranks.chunks import Chunk, Exchange
from shardrec.kernels.sce_cost import default_num_buckets, scalable_cross_entropy_cost
from shardrec.kernels.select import merge_topk, topk_rows
from shardrec.kernels.shard import RowShard
from shardrec.kernels.streaming import Plan

__all__ = [
    "Buckets",
    "default_num_buckets",
    "fill_buckets",
    "mixed_centres",
    "scalable_cross_entropy",
    "scalable_cross_entropy_cost",
]


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

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Global position and bucket of every pair, both (n_b * b_x,) int64, in pair order."""
        buckets = torch.arange(self.positions.shape[0], device=self.positions.device)
        buckets = buckets[:, None].expand_as(self.positions).flatten()
        positions, order = self.positions.flatten().sort(stable=True)
        return positions, buckets[order]


def mixed_centres(
    states: Tensor,
    first_position: int,
    num_buckets: int,
    *,
    seed: int,
    step: int,
    backend: str = "auto",
) -> Tensor:
    """(n_b, D) float32 random combinations of the states, the share of these positions.

    Line b is ``sum_i omega_ib x_i`` with omega random signs of (global position i, b); the shares
    of several ranks add up. The signs are never stored beyond a tile of positions.

    Args:
        states: (N, D); no gradient is taken.
        first_position: Global index of ``states[0]``.
        num_buckets: n_b.
        seed: Key of the generator.
        step: Training step.
        backend: "auto", "torch" or "triton".
    """
    return mixed_signs(
        states,
        first_position,
        num_buckets,
        seed=seed,
        step=step,
        stream=STREAM_MIX,
        backend=backend,
    )


def fill_buckets(
    problem: Problem, centres: Tensor, positions_per_bucket: int, items_per_bucket: int
) -> Buckets:
    """The positions and items with the largest inner product with each centre, over all ranks.

    Chosen in float32, ties by lower index.

    Args:
        problem: The batch and the table.
        centres: (n_b, D) float32, the same on every rank.
        positions_per_bucket: b_x.
        items_per_bucket: b_y.

    Collectives: two gathers of (n_b, b_x) and two of (n_b, b_y) scores and indices.
    """
    exchange = problem.exchange
    positions = _best_of_all_ranks(
        topk_rows(centres, problem.states, positions_per_bucket, problem.backend),
        exchange.first_position,
        min(positions_per_bucket, exchange.num_positions),
        exchange,
    )
    items = _best_of_all_ranks(
        topk_rows(centres, problem.scaled_rows(), items_per_bucket, problem.backend),
        problem.row_ids.first,
        min(items_per_bucket, problem.num_items),
        exchange,
    )
    return Buckets(positions, items)


def _best_of_all_ranks(
    found: tuple[Tensor, Tensor], first: int, k: int, exchange: Exchange
) -> Tensor:
    """(n_b, k) int64 global indices of the best of all ranks' lists."""
    scores, indices = found
    missing = k - scores.shape[1]
    scores = F.pad(scores, (0, missing), value=-torch.inf)
    # Behind every index; F.pad takes it as a double, which holds 2**62 exactly and 2**63 - 1 not.
    indices = F.pad(indices + first, (0, missing), value=2**62)
    of_ranks = exchange.stack(scores)
    if len(of_ranks) == 1:
        return indices
    stacked_indices = exchange.stack(indices).transpose(0, 1).flatten(1)
    return merge_topk(of_ranks.transpose(0, 1).flatten(1), stacked_indices, k)[1]


def scalable_cross_entropy(
    states: Tensor,
    table: Tensor | RowShard,
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
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of every target among the rows of its hardest bucket.

    For each of n_b random centres the b_x positions and the b_y rows of largest inner product form
    a bucket (ties by lower index); a position's loss is the largest over its buckets, and
    positions in no bucket give none. Mean over the covered positions.

    Args:
        states: (N, D) float32, bfloat16 or float16.
        table: (V, D), same dtype except under autocast, or this rank's shard of it.
        targets: (N,) int64 or int32 in [0, V).
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
        backend: "auto" goes by the device; "torch" or "triton" forces one.

    Returns:
        () float32; with "none" (N,) float32 and the (N,) bool mask of covered positions. Gradients
        flow to ``states`` and, through the buckets' logits, to the rows. With a shard, mean and sum
        are over all ranks, and backward on all ranks gives each the gradient of that number with
        respect to its own states and rows.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape disagrees, or a target or option is out of range, on this rank or
            another.

    Collectives: none for a tensor; for a shard those of ``fill_buckets`` and
    ``streamed_logsumexp``, a sum of the centres and a gather of the targets.
    """
    numbers = (num_buckets, positions_per_bucket, items_per_bucket)
    if any(number is not None and number < 1 for number in numbers):
        raise ValueError(
            "num_buckets, positions_per_bucket and items_per_bucket must be positive, got "
            f"{num_buckets}, {positions_per_bucket} and {items_per_bucket}; None takes the default"
        )
    call = Call(
        weights=weights,
        reduction=reduction,
        normalize=normalize,
        temperature=temperature,
        backend=backend,
        sparse_grad=sparse_grad,
    )
    candidates = HardBuckets(
        num_buckets=num_buckets,
        positions_per_bucket=positions_per_bucket,
        items_per_bucket=items_per_bucket,
        mix=mix,
        seed=seed,
        step=step,
    )
    loss, covered = _scalable_cross_entropy(states, table, targets, call, candidates)
    return (loss, covered) if reduction == "none" else loss


@dataclass(frozen=True, slots=True, kw_only=True)
class HardBuckets(Candidates):
    """The items of the position's buckets; a slot is a (position, bucket) pair.

    Attributes are those of ``scalable_cross_entropy``.
    """

    slots: ClassVar[str] = "S"
    rows: ClassVar[str] = "M"

    num_buckets: int | None
    positions_per_bucket: int | None
    items_per_bucket: int
    mix: bool
    seed: int
    step: int

    @property
    def choice(self) -> tuple[tuple[Shape, torch.dtype], ...]:
        """Position and bucket of every pair, and the items of every bucket."""
        return (("P",), torch.int64), (("P",), torch.int64), (("B", "Y"), torch.int64)

    def sizes(self, num_positions: int, num_rows: int) -> dict[str, int]:
        """P pairs, as many slots, B buckets of Y items."""
        num_buckets, per_bucket = self._numbers(num_positions)
        num_pairs = num_buckets * torch.sym_min(per_bucket, num_positions)
        per_bucket = torch.sym_min(self.items_per_bucket, num_rows)
        return {"P": num_pairs, "S": num_pairs, "B": num_buckets, "Y": per_bucket}

    def _numbers(self, num_positions: int) -> tuple[int, int]:
        default = default_num_buckets(num_positions)
        numbers = (self.num_buckets, self.positions_per_bucket)
        first, second = (default if number is None else number for number in numbers)
        return first, second

    def choose(self, problem: Problem) -> tuple[Tensor, ...]:
        """Fills the buckets; a sum of the centres and the gathers of ``fill_buckets``."""
        num_buckets, per_bucket = self._numbers(problem.exchange.num_positions)
        centres = _centres(problem, num_buckets, self.mix, self.seed, self.step)
        buckets = fill_buckets(problem, centres, per_bucket, self.items_per_bucket)
        return *buckets.pairs(), buckets.items

    def touched(self, problem: Problem, tensors: tuple[Tensor, ...]) -> Tensor:
        """Items of the buckets and targets; one gather of the targets."""
        return torch.cat([tensors[2].flatten(), problem.exchange.gather_all(problem.targets)])

    def plan(
        self, problem: Problem, meeting: Problem, tensors: tuple[Tensor, ...]
    ) -> "_BucketItems":
        """A block for each bucket."""
        return _BucketItems(meeting, *tensors)


def _centres(problem: Problem, num_buckets: int, mix: bool, seed: int, step: int) -> Tensor:
    """(n_b, D) float32 centres, the same on every rank; plain ones do not look at the states."""
    if not mix:
        return random_signs(
            0,
            num_buckets,
            problem.states.shape[1],
            seed=seed,
            step=step,
            stream=STREAM_MIX,
            device=problem.states.device,
            backend=problem.backend,
        )
    exchange = problem.exchange
    own = mixed_centres(
        problem.states,
        exchange.first_position,
        num_buckets,
        seed=seed,
        step=step,
        backend=problem.backend,
    )
    return exchange.sum(own)


class _BucketItems(Plan):
    """The plan in which a pair's candidates are the items of its bucket; a slot is a pair.

    Args:
        problem: The batch and the touched rows.
        positions: (P,) int64 global position of each pair of all ranks, ascending.
        buckets: (P,) int64 its bucket.
        items: (n_b, b_y) int64 global items.
    """

    def __init__(self, problem: Problem, positions: Tensor, buckets: Tensor, items: Tensor) -> None:
        super().__init__(problem)
        # Ascending items let a CPU find targets among them by bisection.
        self._positions, self._buckets, self._items = positions, buckets, items.sort(1).values
        exchange = problem.exchange
        borders = torch.tensor(exchange.borders, device=positions.device)
        self._slot_borders = torch.searchsorted(positions, borders).tolist()
        start, end = self._slot_borders[exchange.rank : exchange.rank + 2]
        self.num_slots = end - start
        self.slot_positions = positions[start:end] - exchange.first_position

    def slots(self, chunk: Chunk) -> Chunk:
        slots = (self._places(chunk) >= 0).nonzero()[:, 0]
        return Chunk.of(slots, self._slot_borders, self.exchange.rank)

    def _places(self, chunk: Chunk) -> Tensor:
        """(P,) int64 where the position of each pair stands in the chunk, -1 for nowhere."""
        return RowIds(0, chunk.positions.numel(), chunk.positions).find(self._positions)

    def blocks(
        self, chunk: Chunk, targets: Tensor, row_ids: RowIds, per_position: Sequence[Tensor]
    ) -> Blocks:
        place = self._places(chunk)
        slots = (place >= 0).nonzero()[:, 0]
        order = torch.argsort(self._buckets[slots], stable=True)
        sizes = torch.bincount(self._buckets[slots], minlength=self._items.shape[0])
        rows = row_ids.find(self._items)
        here = rows >= 0
        item_ends = here.sum(1).cumsum(0)
        return Blocks(
            pair_positions=place[slots][order],
            pair_starts=F.pad(sizes.cumsum(0), (1, 0)),
            items=rows[here],
            item_starts=F.pad(item_ends[:-1], (1, 0)),
            item_ends=item_ends,
            targets=row_ids.find(targets),
            num_slots=slots.numel(),
            pair_slots=order,
        )


_scalable_cross_entropy = Operator("scalable_cross_entropy", HardBuckets)
