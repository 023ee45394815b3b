"""Exact ranking of the whole catalog over a row-sharded table.

States are all-gathered in chunks, each rank scores its own rows in tiles, and the candidates return
to the rank that owns the state: no (B, V) scores are stored. Scores are float32, and equal scores
rank by the lower item index.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shardrec.kernels.select import top_lowest
from shardrec.kernels.shard import RowShard
from shardrec.modules.ranking_shard import (
    Blocks,
    LocalRows,
    Ragged,
    Ranks,
    real_rows,
    rounds,
    shard_top,
)

__all__ = ["Blocks", "Ragged", "ranks_in_lists", "top_items"]


@torch.no_grad()
def top_items(
    states: Tensor,
    shard: RowShard,
    k: int,
    *,
    seen: Ragged | None = None,
    keep: Ragged | None = None,
    allowed: Tensor | None = None,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor]:
    """(B, k) scores and (B, k) items of largest score for each state, best first.

    Args:
        states: (B, D) float; B differs by rank and may be 0.
        shard: the table; rows beyond ``shard.num_rows`` are padding and never returned.
        k: length of the lists, the same on every rank.
        seen: items of each state that must not be returned.
        keep: items of each state that may be returned although ``seen`` lists them (the targets of
            an evaluation).
        allowed: (V,) bool, the same on every rank; False excludes an item from every list.
        blocks: block sizes, the same on every rank.

    Returns:
        Scores (B, k) float32 and items (B, k) int64. Where fewer than ``k`` items are left,
        the list ends with score -inf and item -1.

    Raises:
        ValueError: an argument is invalid, or a score is NaN, on any rank; raised on every rank.

    Collectives: on ``shard.group`` one all-gather of sizes; per chunk of states all-gathers of
    states and of seen items, and two all-to-alls of (states, k) candidates; at the end one
    all-reduce. Ranks without states must call it too.
    """
    ranks = Ranks(shard.group)
    blocks = blocks or Blocks()
    refusal = _refusal(states, shard, k, {"seen": seen, "keep": keep}, allowed)
    counts = ranks.agree(states, shard, refusal, (k, seen is None, blocks.states))
    local = LocalRows.of(real_rows(shard), shard.first_row, allowed)
    pairs = _without(seen, keep, shard.num_rows)
    scores, items = [], []
    for start, sizes in rounds(counts, blocks.states):
        chunk = ranks.gather(states, sizes, start).float()
        seen_pairs = None if pairs is None else ranks.gather_ragged(pairs, sizes, start)
        found_scores, found_items = shard_top(local, chunk, seen_pairs, k, blocks)
        best, order = top_lowest(ranks.send_back(found_scores, sizes), k)
        scores.append(best)
        items.append(ranks.send_back(found_items, sizes).gather(1, order))
    joined = torch.cat([states.new_empty(0, k, dtype=torch.float32), *scores])
    joined_items = torch.cat([states.new_empty(0, k, dtype=torch.int64), *items])
    ranks.require_numbers(joined)
    return joined, joined_items.masked_fill_(joined == -math.inf, -1)


def ranks_in_lists(items: Tensor, targets: Ragged, missing: int) -> Tensor:
    """(T,) int64 ranks of targets in their lists, 0 the best; ``missing`` if not in the list.

    Lists of k items are enough for all metrics at k or less.

    Args:
        items: (B, k) int64 from `top_items` (with ``keep=targets`` where seen items are hidden).
        targets: values (T,) and lengths (B,).
        missing: rank of a target that is not in its list, such as the number of items.

    Returns:
        (T,) int64.

    Collectives: none.

    >>> items = torch.tensor([[4, 2, 9], [1, 3, -1]])
    >>> ranks_in_lists(items, (torch.tensor([9, 5, 1]), torch.tensor([2, 1])), missing=10).tolist()
    [2, 10, 0]
    """
    values, lengths = targets
    hits = items[torch.repeat_interleave(lengths)] == values[:, None]  # (T, k)
    place = (hits * torch.arange(items.shape[1], device=items.device)).sum(1)
    return place.masked_fill_(~hits.any(1), missing)


def _without(seen: Ragged | None, keep: Ragged | None, num_rows: int) -> Ragged | None:
    """``seen`` without the (state, item) pairs that are also in ``keep``.

    >>> seen = torch.tensor([5, 7, 5]), torch.tensor([2, 1])
    >>> _without(seen, (torch.tensor([7, 7]), torch.tensor([1, 1])), num_rows=10)
    (tensor([5, 5]), tensor([1, 1]))
    """
    if seen is None or keep is None:
        return seen
    owners, kept_owners = (torch.repeat_interleave(lengths) for _, lengths in (seen, keep))
    pairs, kept = owners * num_rows + seen[0], kept_owners * num_rows + keep[0]
    left = ~torch.isin(pairs, kept)
    return seen[0][left], torch.bincount(owners[left], minlength=len(seen[1]))


def _refusal(
    states: Tensor,
    shard: RowShard,
    k: int,
    ragged: dict[str, Ragged | None],
    allowed: Tensor | None,
) -> str | None:
    """The error message for the arguments; None if they are valid."""
    if k < 1:
        return f"k must be at least 1, got {k}; ask for at least one item"
    if states.dim() != 2 or states.shape[1] != shard.rows.shape[1]:
        return (
            f"states must be of shape (B, {shard.rows.shape[1]}), got {tuple(states.shape)}; "
            "pass one state for each user, as wide as the table"
        )
    if allowed is not None and (allowed.dtype, len(allowed)) != (torch.bool, shard.num_rows):
        return (
            f"allowed must be bool of length {shard.num_rows}, got {allowed.dtype} of length "
            f"{len(allowed)}; pass one value for each item"
        )
    messages = (_ragged_refusal(name, pair, states, shard) for name, pair in ragged.items())
    return next((message for message in messages if message), None)


def _ragged_refusal(
    name: str, ragged: Ragged | None, states: Tensor, shard: RowShard
) -> str | None:
    if ragged is None:
        return None
    values, lengths = ragged
    if values.dtype != torch.int64 or lengths.dtype != torch.int64:
        return f"{name} must be int64, got {values.dtype} and {lengths.dtype}; convert them"
    if len(lengths) != len(states) or int(lengths.sum()) != len(values):
        return (
            f"{name} must have one length for each of {len(states)} states, adding up to its "
            f"{len(values)} values, got {len(lengths)} lengths that add up to {int(lengths.sum())}"
            "; pass (values, lengths)"
        )
    if len(values) and not (0 <= int(values.min()) and int(values.max()) < shard.num_rows):
        return (
            f"{name} must be items in [0, {shard.num_rows}), got {int(values.min())} to "
            f"{int(values.max())}; pass dense indices, not item ids"
        )
    return None
