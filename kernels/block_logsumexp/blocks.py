"""The list of tiles of the logit matrix that a loss looks at."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Blocks", "Rounds", "compact_rows", "every_pair", "local_rows"]


@dataclass(frozen=True, slots=True)
class Rounds:
    """Rule that counts a candidate once although several rounds of blocks contain it.

    Position i meets item j in round q when ``|position_chunks[i, q] - item_chunks[j, q]| <= reach``.
    A block of round q keeps the pairs that no earlier round met, so a pair enters the sum once. That is
    the union of the rounds, the same value as lowering a logit by the log of its number of meetings.

    Attributes:
        position_chunks: (N, r) int32, chunk of each position in each round.
        item_chunks: (R, r) int32, chunk of each row in each round.
        reach: Number of neighbouring chunks on each side.
        block_rounds: (T,) int64, round of each block.
    """

    position_chunks: Tensor
    item_chunks: Tensor
    reach: int
    block_rounds: Tensor


@dataclass(frozen=True, slots=True)
class Blocks:
    """T blocks, each a set of positions times a set of rows; never their logits.

    Block t holds the pairs ``pair_positions[pair_starts[t]:pair_starts[t + 1]]`` and the rows
    ``items[item_starts[t]:item_ends[t]]``. Pair p adds its log-sum-exp to slot ``pair_slots[p]``.

    Attributes:
        pair_positions: (P,) int64 row of ``states`` of each pair; None: pair p is position p.
        pair_starts: (T + 1,) int64.
        items: (Q,) int64 rows, in any order, repeats allowed; None: entry q is row q.
        item_starts: (T,) int64 into ``items``; ranges of different blocks may overlap.
        item_ends: (T,) int64 into ``items``.
        targets: (N,) int64 row of each position's target, which is never its candidate; -1 where the
            target is not among the rows.
        num_slots: Length of the output.
        pair_slots: (P,) int64; None: the slot of a pair is its position.
        offsets: (Q,) float32 subtracted from the logits of an entry of ``items``; None: zero.
        rounds: Rule against counting a candidate twice; None: blocks count as they are listed.
    """

    pair_positions: Tensor | None
    pair_starts: Tensor
    items: Tensor | None
    item_starts: Tensor
    item_ends: Tensor
    targets: Tensor
    num_slots: int
    pair_slots: Tensor | None = None
    offsets: Tensor | None = None
    rounds: Rounds | None = None

    @property
    def num_blocks(self) -> int:
        """Number of blocks T."""
        return self.item_starts.numel()


def every_pair(num_rows: int, targets: Tensor) -> Blocks:
    """One block of all N positions times all R rows: the full softmax."""
    device = targets.device
    return Blocks(
        pair_positions=None,
        pair_starts=torch.tensor([0, targets.numel()], device=device),
        items=None,
        item_starts=torch.zeros(1, dtype=torch.int64, device=device),
        item_ends=torch.full((1,), num_rows, dtype=torch.int64, device=device),
        targets=targets,
        num_slots=targets.numel(),
    )


def local_rows(items: Tensor, first_row: int, num_rows: int) -> Tensor:
    """Row of each global item in the shard [first_row, first_row + num_rows), -1 where outside.

    >>> local_rows(torch.tensor([4, 5, 9]), first_row=5, num_rows=3)
    tensor([-1,  0, -1])
    """
    inside = (items >= first_row) & (items < first_row + num_rows)
    return torch.where(inside, items - first_row, -1)


def compact_rows(table: Tensor, blocks: Blocks, sparse: bool) -> tuple[Tensor, Blocks]:
    """The rows that ``blocks`` touches, and the blocks in terms of them.

    Args:
        table: (R, D).
        blocks: Blocks with an explicit list of items.
        sparse: Whether the gradient of ``table`` is sparse.

    Returns:
        (U, D) rows in ascending order, differentiable with respect to ``table``, and the blocks.
    """
    assert blocks.items is not None and blocks.rounds is None
    here = blocks.targets >= 0
    used, index = torch.unique(torch.cat([blocks.items, blocks.targets[here]]), return_inverse=True)
    num_entries = blocks.items.numel()
    targets = blocks.targets.clone()
    targets[here] = index[num_entries:]
    compact = Blocks(
        pair_positions=blocks.pair_positions,
        pair_starts=blocks.pair_starts,
        items=index[:num_entries],
        item_starts=blocks.item_starts,
        item_ends=blocks.item_ends,
        targets=targets,
        num_slots=blocks.num_slots,
        pair_slots=blocks.pair_slots,
        offsets=blocks.offsets,
    )
    return F.embedding(used, table, sparse=sparse), compact
