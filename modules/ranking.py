"""Exact ranking of the whole catalog over a row-sharded table.

States are all-gathered in chunks, each rank scores its own rows in tiles, and the candidates return
to the rank that owns the state: no (B, V) scores are stored. Scores are float32, and equal scores
rank by a hash of the item (``tie_keys``), the same on any number of ranks and any device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shardrec.kernels.select import top_lowest
from shardrec.kernels.shard import RowShard
from shardrec.modules.memory import Memory
from shardrec.modules.ranking_shard import (
    Blocks,
    LocalRows,
    Ragged,
    Ranks,
    real_rows,
    rounds,
    shard_top,
    tie_keys,
)

__all__ = ["Blocks", "Ragged", "by_popularity", "ranks_in_lists", "tie_keys", "top_items"]


@torch.no_grad()
def top_items(
    states: Tensor,
    shard: RowShard,
    k: int,
    *,
    seen: Ragged | None = None,
    allowed: Tensor | None = None,
    memory: Memory | None = None,
    recent: Tensor | None = None,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor]:
    """(B, k) scores and (B, k) items with the largest scores for each state, best first.

    Args:
        states: (B, D) float; B differs by rank and may be 0.
        shard: the table; rows beyond ``shard.num_rows`` are padding and never returned.
        k: length of the lists, the same on every rank.
        seen: (S,) items that must not be returned, concatenated, and (B,) their number for each
            state; None excludes none.
        allowed: (V,) bool, the same on every rank; False excludes an item from every list.
        memory: adds scores to successors of recent items; holds those among this rank's rows.
        recent: (B, ``memory.ages``) int64 last items of each history, the most recent first, -1
            for none; required with a memory.
        blocks: block sizes, the same on every rank.

    Returns:
        Scores (B, k) float32 and items (B, k) int64. Where fewer than ``k`` items are left,
        the list ends with score -inf and item -1.

    Raises:
        FloatingPointError: a score is NaN on any rank; raised on every rank.
        ValueError: an argument is invalid on any rank; raised on every rank.

    Collectives: on ``shard.group`` one all-gather of sizes; per chunk of states all-gathers of
    states, of seen items and of recent items, and two all-to-alls of (states, k) candidates; at
    the end one all-reduce. Ranks without states must call it too.
    """
    ranks = Ranks(shard.group)
    blocks = blocks or Blocks()
    refusal = _refusal(states, shard, k, seen, allowed) or _recent_refusal(memory, recent, states)
    form = (k, seen is None, recent is None, blocks.states)
    counts = ranks.agree(states, shard, refusal, form)
    local = LocalRows.of(real_rows(shard), shard.first_row, allowed)
    scores, items = [], []
    for start, sizes in rounds(counts, blocks.states):
        chunk = ranks.gather(states, sizes, start).float()
        hidden = None if seen is None else ranks.gather_ragged(seen, sizes, start)
        added = None
        if memory is not None and recent is not None:
            added = memory.scores(ranks.gather(recent, sizes, start))
        found_scores, found_items = shard_top(local, chunk, hidden, k, blocks, added)
        back = ranks.send_back(found_scores, sizes), ranks.send_back(found_items, sizes)
        best, best_items = _merge(*back, k)
        scores.append(best)
        items.append(best_items)
    joined = torch.cat([states.new_empty(0, k, dtype=torch.float32), *scores])
    joined_items = torch.cat([states.new_empty(0, k, dtype=torch.int64), *items])
    ranks.require_numbers(joined)
    return joined, joined_items.masked_fill_(joined == -math.inf, -1)


def ranks_in_lists(items: Tensor, targets: Ragged, missing: int) -> Tensor:
    """(T,) int64 rank of each target in its list, 0 the best; ``missing`` if it is not there.

    Lists of k items are enough for all metrics at k or less.

    Args:
        items: (B, k) int64 from `top_items`.
        targets: (T,) items of all lists, concatenated, and (B,) their number for each list.
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


def by_popularity(counts: Tensor) -> Tensor:
    """(V,) int64 items, sorted by falling (V,) counts; equal counts by ``tie_keys``."""
    order = tie_keys(torch.arange(len(counts), device=counts.device)).argsort()
    return order[counts[order].argsort(descending=True, stable=True)]


def _merge(scores: Tensor, items: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(B, k) best scores and items of the lists of all shards, joined: (B, W * k)."""
    by_key = tie_keys(items).argsort(1)
    best, order = top_lowest(scores.gather(1, by_key), k)
    return best, items.gather(1, by_key.gather(1, order))


def _refusal(
    states: Tensor,
    shard: RowShard,
    k: int,
    seen: Ragged | None,
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
    return None if seen is None else _seen_refusal(seen, states, shard)


def _recent_refusal(memory: Memory | None, recent: Tensor | None, states: Tensor) -> str | None:
    if memory is None and recent is None:
        return None
    if memory is None or recent is None:
        return "memory and recent items must come together, got one of them; pass both"
    num_items, shape = len(memory.offsets) - 1, (len(states), memory.ages)
    if recent.dtype != torch.int64 or recent.shape != shape:
        return (
            f"recent must be int64 of shape {shape}, got {recent.dtype} of shape "
            f"{tuple(recent.shape)}; pass the last items of each state"
        )
    if recent.numel() and not (-1 <= int(recent.min()) and int(recent.max()) < num_items):
        return (
            f"recent must be items in [0, {num_items}), or -1, got {int(recent.min())} to "
            f"{int(recent.max())}; pass dense indices, not item ids"
        )
    return None


def _seen_refusal(seen: Ragged, states: Tensor, shard: RowShard) -> str | None:
    values, lengths = seen
    if values.dtype != torch.int64 or lengths.dtype != torch.int64:
        return f"seen must be int64, got {values.dtype} and {lengths.dtype}; convert them"
    if len(lengths) != len(states) or int(lengths.sum()) != len(values):
        return (
            f"seen must have one length for each of {len(states)} states, adding up to its "
            f"{len(values)} values, got {len(lengths)} lengths that add up to {int(lengths.sum())}"
            "; pass (values, lengths)"
        )
    if len(values) and not (0 <= int(values.min()) and int(values.max()) < shard.num_rows):
        return (
            f"seen must be items in [0, {shard.num_rows}), got {int(values.min())} to "
            f"{int(values.max())}; pass dense indices, not item ids"
        )
    return None
