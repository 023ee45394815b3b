"""What others would write: each loss with everything in memory, and in the shortest exact loop.

Random choices are arguments, so that a baseline can be held against our loss with the same ones.
All take states (N, D), table (V, D), targets (N,) int64 and give the mean loss.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = [
    "chunked_cce",
    "chunked_cce_minus",
    "chunked_rece",
    "chunked_sce",
    "chunks_of",
    "eager_cce",
    "eager_cce_minus",
    "eager_rece",
    "eager_sce",
    "fair_cce_minus",
]


def eager_cce(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """The line everybody writes; stores (N, V)."""
    return F.cross_entropy(states @ table.T, targets)


def chunked_cce(states: Tensor, table: Tensor, targets: Tensor, block: int) -> None:
    """The same, ``block`` positions at a time, with backward inside the loop."""
    for part, wanted in zip(states.split(block), targets.split(block), strict=True):
        loss = F.cross_entropy(part @ table.T, wanted, reduction="sum") / len(states)
        loss.backward()


def eager_cce_minus(states: Tensor, table: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    """As published, negatives (N, K) of each position; stores (N, K, D)."""
    correction = math.log(negatives.shape[1] / len(table))
    positive = (states * F.embedding(targets, table)).sum(1, keepdim=True)
    negative = (states[:, None] * F.embedding(negatives, table)).sum(2) - correction
    negative = negative.masked_fill(negatives == targets[:, None], -torch.inf)
    return (torch.logsumexp(torch.cat([positive, negative], 1), 1) - positive[:, 0]).mean()


def chunked_cce_minus(
    states: Tensor, table: Tensor, targets: Tensor, negatives: Tensor, block: int
) -> None:
    """The same, ``block`` positions at a time, with backward inside the loop."""
    parts = zip(states.split(block), targets.split(block), negatives.split(block), strict=True)
    for part, wanted, drawn in parts:
        loss = eager_cce_minus(part, table, wanted, drawn) * (len(part) / len(states))
        loss.backward()


def fair_cce_minus(states: Tensor, table: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    """One matrix product over negatives (K,) that the whole batch shares; stores (N, K)."""
    correction = math.log(len(negatives) / len(table))
    positive = (states * F.embedding(targets, table)).sum(1, keepdim=True)
    negative = states @ F.embedding(negatives, table).T - correction
    negative = negative.masked_fill(negatives == targets[:, None], -torch.inf)
    return (torch.logsumexp(torch.cat([positive, negative], 1), 1) - positive[:, 0]).mean()


def eager_sce(
    states: Tensor, table: Tensor, targets: Tensor, centres: Tensor, b_x: int, b_y: int
) -> Tensor:
    """As published; stores (n_b, N), (n_b, V) and (n_b, b_x, b_y)."""
    with torch.no_grad():
        positions = (centres @ states.T).topk(b_x, 1).indices
        items = (centres @ table.T).topk(b_y, 1).indices
    return _hardest(_bucket_loss(states, table, targets, positions, items), positions, len(states))


def chunked_sce(
    states: Tensor, table: Tensor, targets: Tensor, centres: Tensor, b_x: int, b_y: int, block: int
) -> Tensor:
    """The same, ``block`` buckets at a time, computed again in backward."""
    losses, chosen = [], []
    for part in centres.split(block):
        with torch.no_grad():
            positions = (part @ states.T).topk(b_x, 1).indices
            items = (part @ table.T).topk(b_y, 1).indices
        arguments = (states, table, targets, positions, items)
        losses.append(checkpoint(_bucket_loss, *arguments, use_reentrant=False))
        chosen.append(positions)
    return _hardest(torch.cat(losses), torch.cat(chosen), len(states))


def _bucket_loss(
    states: Tensor, table: Tensor, targets: Tensor, positions: Tensor, items: Tensor
) -> Tensor:
    """(n_b, b_x) loss of each position in each bucket."""
    x, wanted = states[positions], targets[positions]
    positive = (x * F.embedding(wanted, table)).sum(2, keepdim=True)
    negative = x @ F.embedding(items, table).transpose(1, 2)
    negative = negative.masked_fill(items[:, None] == wanted[:, :, None], -torch.inf)
    return torch.logsumexp(torch.cat([positive, negative], 2), 2) - positive[..., 0]


def _hardest(losses: Tensor, positions: Tensor, num_positions: int) -> Tensor:
    """Mean over the covered positions of their largest loss."""
    largest = losses.new_full((num_positions,), -torch.inf)
    largest = largest.scatter_reduce(0, positions.flatten(), losses.flatten(), "amax")
    return largest[largest > -torch.inf].mean()


def eager_rece(
    states: Tensor, table: Tensor, targets: Tensor, directions: Tensor, num_chunks: int, reach: int
) -> Tensor:
    """As published, directions (r, n_b, D); stores ids and logits of all meetings.

    Repeats are counted by sorting the candidates of each position.
    """
    logits, ids = [], []
    for hashes in directions:
        own, near, back, _ = chunks_of(states, table, hashes, num_chunks, reach)
        logits.append(
            (states[own] @ F.embedding(near.clamp(min=0), table).transpose(1, 2)).flatten(0, 1)[
                back
            ]
        )
        ids.append(near[:, None].expand(-1, own.shape[1], -1).flatten(0, 1)[back])
    all_logits, all_ids = torch.cat(logits, 1), torch.cat(ids, 1)
    ordered = all_ids.sort(1).values
    count = torch.searchsorted(ordered, all_ids, right=True) - torch.searchsorted(ordered, all_ids)
    none = (all_ids < 0) | (all_ids == targets[:, None])
    lowered = (all_logits - count.log()).masked_fill(none, -torch.inf)
    positive = (states * F.embedding(targets, table)).sum(1, keepdim=True)
    return (torch.logsumexp(torch.cat([positive, lowered], 1), 1) - positive[:, 0]).mean()


def chunked_rece(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    directions: Tensor,
    num_chunks: int,
    reach: int,
    block: int,
) -> Tensor:
    """The same, ``block`` chunks at a time, computed again in backward; repeats from chunk ids."""
    plan = [chunks_of(states, table, hashes, num_chunks, reach) for hashes in directions]
    own_chunks = torch.stack([back // own.shape[1] for own, _, back, _ in plan], 1)
    item_chunks = torch.stack([of_item for *_, of_item in plan], 1)
    rounds = [(states * F.embedding(targets, table)).sum(1)]
    for own, near, back, _ in plan:
        tiles = [
            checkpoint(
                _tile,
                *(states, table, targets, *pair, own_chunks, item_chunks, reach),
                use_reentrant=False,
            )
            for pair in zip(own.split(block), near.split(block), strict=True)
        ]
        rounds.append(torch.cat(tiles).flatten()[back])
    return (torch.logsumexp(torch.stack(rounds), 0) - rounds[0]).mean()


def _tile(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    own: Tensor,
    near: Tensor,
    own_chunks: Tensor,
    item_chunks: Tensor,
    reach: int,
) -> Tensor:
    """Log-sum-exp of each position of these chunks over the items it meets there."""
    count = sum(
        (of_position[own][:, :, None] - of_item[near][:, None]).abs() <= reach
        for of_position, of_item in zip(own_chunks.T, item_chunks.T, strict=True)
    )
    none = (near[:, None] < 0) | (near[:, None] == targets[own][:, :, None])
    logits = states[own] @ F.embedding(near.clamp(min=0), table).transpose(1, 2)
    return torch.logsumexp((logits - count.log()).masked_fill(none, -torch.inf), 2)


def chunks_of(
    states: Tensor, table: Tensor, hashes: Tensor, num_chunks: int, reach: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(n_c, n) positions and (n_c, (1 + 2e) v) items of each chunk, -1 where there is none.

    Also where each position stands in the first, and (V,) the chunk of each item.
    """
    with torch.no_grad():
        own = (states @ hashes.T).argmax(1).argsort(stable=True)
        items = (table @ hashes.T).argmax(1).argsort(stable=True)
    back, place = own.argsort(), items.argsort()
    own = F.pad(own, (0, -len(own) % num_chunks)).view(num_chunks, -1)
    items = F.pad(items, (0, -len(items) % num_chunks), value=-1).view(num_chunks, -1)
    near = F.pad(items, (0, 0, reach, reach), value=-1).unfold(0, 1 + 2 * reach, 1)
    return own, near.transpose(1, 2).flatten(1), back, place // items.shape[1]
