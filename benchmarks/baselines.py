"""Baselines: each loss in eager PyTorch with everything in memory, and as a chunked exact loop.

Random choices are arguments, so that a baseline and our loss can be compared on the same ones. All
take states (N, D), table (V, D), targets (N,) int64 and return the mean loss. The loops that call
backward themselves take the function of one chunk as ``body``, which may be a compiled one.
"""

import math
from collections.abc import Callable

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
    "torch_cce",
]

Body = Callable[..., Tensor]


def eager_cce(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """Full softmax by ``cross_entropy``; stores the (N, V) logits."""
    return F.cross_entropy(states @ table.T, targets)


def chunked_cce(
    states: Tensor, table: Tensor, targets: Tensor, block: int, body: Body = eager_cce
) -> None:
    """The same, ``block`` positions at a time, with backward inside the loop."""
    for part, wanted in zip(states.split(block), targets.split(block), strict=True):
        loss = body(part, table, wanted) * (len(part) / len(states))
        loss.backward()


def torch_cce(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """The same by PyTorch's ``linear_cross_entropy``, from 2.13 on, which chooses the chunks."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(states, table, targets, options=options)


def eager_cce_minus(states: Tensor, table: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    """Sampled softmax as published, with (N, K) negatives; stores (N, K, D)."""
    logits = (states[:, None] * F.embedding(negatives, table)).sum(2)
    logits = logits - math.log(negatives.shape[1] / len(table))
    return _among(logits, states, table, targets, negatives == targets[:, None])


def chunked_cce_minus(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    negatives: Tensor,
    block: int,
    body: Body = eager_cce_minus,
) -> None:
    """The same, ``block`` positions at a time, with backward inside the loop."""
    parts = zip(states.split(block), targets.split(block), negatives.split(block), strict=True)
    for part, wanted, drawn in parts:
        loss = body(part, table, wanted, drawn) * (len(part) / len(states))
        loss.backward()


def fair_cce_minus(states: Tensor, table: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    """One matrix product over negatives (K,) that the whole batch shares; stores (N, K)."""
    logits = states @ F.embedding(negatives, table).T - math.log(len(negatives) / len(table))
    return _among(logits, states, table, targets, negatives == targets[:, None])


def _among(
    logits: Tensor, states: Tensor, table: Tensor, targets: Tensor, excluded: Tensor
) -> Tensor:
    """Mean loss of the targets among the (N, K) logits of other items, but for those excluded."""
    positive = (states * F.embedding(targets, table)).sum(1, keepdim=True)
    logits = torch.cat([positive, logits.masked_fill(excluded, -torch.inf)], 1)
    return (torch.logsumexp(logits, 1) - positive[:, 0]).mean()


def eager_sce(
    states: Tensor, table: Tensor, targets: Tensor, centres: Tensor, b_x: int, b_y: int
) -> Tensor:
    """SCE as published; stores (n_b, N), (n_b, V) and (n_b, b_x, b_y)."""
    with torch.no_grad():
        positions = (centres @ states.T).topk(b_x, 1).indices
        items = (centres @ table.T).topk(b_y, 1).indices
    return _hardest(_bucket_loss(states, table, targets, positions, items), positions, len(states))


def chunked_sce(
    states: Tensor, table: Tensor, targets: Tensor, centres: Tensor, b_x: int, b_y: int, block: int
) -> Tensor:
    """SCE, ``block`` buckets at a time, recomputed in backward."""
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
    states: Tensor, table: Tensor, targets: Tensor, directions: Tensor, reach: int
) -> Tensor:
    """RECE as published, directions (r, n_b, D); stores ids and logits of all pairs.

    Repeats are counted by sorting the candidates of each position.
    """
    all_logits, all_ids = [], []
    for hashes in directions:
        own, near, back, *_ = chunks_of(states, table, hashes, reach)
        logits = states[own] @ F.embedding(near.clamp(min=0), table).transpose(1, 2)
        all_logits.append(logits.flatten(0, 1)[back])
        all_ids.append(near[:, None].expand_as(logits).flatten(0, 1)[back])
    logits, ids = torch.cat(all_logits, 1), torch.cat(all_ids, 1)
    ordered = ids.sort(1).values
    count = torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
    excluded = (ids < 0) | (ids == targets[:, None])
    return _among(logits - count.log(), states, table, targets, excluded)


def chunked_rece(
    states: Tensor, table: Tensor, targets: Tensor, directions: Tensor, reach: int, block: int
) -> Tensor:
    """RECE, ``block`` chunks at a time, recomputed in backward; repeats from chunk ids."""
    plan = [chunks_of(states, table, hashes, reach) for hashes in directions]

    def tile(own: Tensor, near: Tensor) -> Tensor:
        met = [(at[own][:, :, None] - of[near][:, None]).abs() <= reach for *_, at, of in plan]
        logits = states[own] @ F.embedding(near.clamp(min=0), table).transpose(1, 2)
        excluded = (near[:, None] < 0) | (near[:, None] == targets[own][:, :, None])
        return torch.logsumexp((logits - _total(met).log()).masked_fill(excluded, -torch.inf), 2)

    rounds = [(states * F.embedding(targets, table)).sum(1)]
    for own, near, back, *_ in plan:
        parts = zip(own.split(block), near.split(block), strict=True)
        tiles = [checkpoint(tile, *part, use_reentrant=False) for part in parts]
        rounds.append(torch.cat(tiles).flatten()[back])
    return (torch.logsumexp(torch.stack(rounds), 0) - rounds[0]).mean()


def _total(masks: list[Tensor]) -> Tensor:
    """How many of the masks are set; there is at least one of them."""
    count = sum(masks)
    assert isinstance(count, Tensor)
    return count


def chunks_of(
    states: Tensor, table: Tensor, hashes: Tensor, reach: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(n_b, n) positions and (n_b, (1 + 2e) v) items of each chunk, -1 where there is none.

    Chunks are as many as hashes. Also where each position stands in the first, and the chunks of
    (N,) positions and (V,) items.
    """
    with torch.no_grad():
        own, items = ((of @ hashes.T).argmax(1).argsort(stable=True) for of in (states, table))
    back, place = own.argsort(), items.argsort()
    own = F.pad(own, (0, -len(own) % len(hashes))).view(len(hashes), -1)
    items = F.pad(items, (0, -len(items) % len(hashes)), value=-1).view(len(hashes), -1)
    near = F.pad(items, (0, 0, reach, reach), value=-1).unfold(0, 1 + 2 * reach, 1)
    near = near.transpose(1, 2).flatten(1)
    return own, near, back, back // own.shape[1], place // items.shape[1]
