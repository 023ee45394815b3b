"""Block log-sum-exp in plain PyTorch, one tile of logits in memory at a time.

The full softmax is cut into contiguous tiles, a list of blocks into batches (``cpu_batches.py``).
Factors of a whole line of logits are applied to the (N, D) states and gradients, which is cheaper.
With N positions, R rows and width D a full forward takes 2 N R D FLOP and N R exponentials, a
backward 6 N R D FLOP and as many exponentials; with tiles of P positions each reads the rows
ceil(N / P) times.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shardrec.kernels.block_logsumexp.blocks import Blocks, EveryPair, Rounds
from shardrec.kernels.block_logsumexp.cpu_batches import Batch, batches, take
from shardrec.kernels.block_logsumexp.cpu_tiles import CpuTiles, cpu_tiles
from shardrec.kernels.block_logsumexp.nearby import NearbyChunks
from shardrec.kernels.block_logsumexp.schedule import without_idle_pairs
from shardrec.kernels.device.matmul import times_transposed

__all__ = ["SoftmaxTile", "add_tile_gradient", "backward", "forward", "softmax_", "softmax_tiles"]

# Logits per call of softmax.
LINE_LOGITS = 1 << 20


def forward(
    states: Tensor,
    rows: Tensor,
    blocks: Blocks | EveryPair | NearbyChunks,
    tiles: CpuTiles | None = None,
) -> tuple[Tensor, Tensor]:
    """(num_slots,) log-sum-exps and (N,) target logits, float32; see ``dispatch.forward``."""
    tiles = tiles or cpu_tiles()
    # Padded pairs add to one extra slot, which is dropped.
    logsumexp = states.new_full((blocks.num_slots + 1,), -torch.inf, dtype=torch.float32)
    if isinstance(blocks, EveryPair):
        for positions, _, logits in _contiguous_tiles(states, rows, blocks.targets, tiles):
            logsumexp[positions] = torch.logaddexp(logsumexp[positions], softmax_(logits))
            del logits  # as below: frees the memory for the next tile
    else:
        for tile in softmax_tiles(states, rows, blocks, tiles):
            _add_logsumexp(logsumexp, tile)
            del tile
    return logsumexp[:-1], _target_logits(states, rows, blocks.targets)


def backward(
    states: Tensor,
    rows: Tensor,
    blocks: Blocks | EveryPair | NearbyChunks,
    logsumexp: Tensor,
    grad_logsumexp: Tensor,
    grad_target_logits: Tensor,
    grad_rows: Tensor,
    tiles: CpuTiles | None = None,
) -> Tensor:
    """(N, D) float32 gradient of ``states``; adds that of ``rows`` to (R, D) float32 ``grad_rows``.

    Every tile of probabilities is recomputed.
    """
    tiles = tiles or cpu_tiles()
    grad_states = torch.zeros(states.shape, dtype=torch.float32, device=states.device)
    if isinstance(blocks, EveryPair):
        whole = logsumexp.masked_fill(logsumexp == -torch.inf, 0.0)
        for positions, items, shares in _contiguous_tiles(states, rows, blocks.targets, tiles):
            # torch.softmax is faster than torch.exp; each line is scaled to its share afterwards.
            part_of_line = (softmax_(shares) - whole[positions]).exp_()
            factors = (grad_logsumexp[positions] * part_of_line)[:, None]
            grad_states[positions] += times_transposed(shares, rows[items].float().T).mul_(factors)
            weighted = (states[positions].float() * factors).T.contiguous()
            grad_rows[items] += times_transposed(weighted, shares.T).T
            del shares
    else:
        if isinstance(blocks, Blocks):
            blocks = without_idle_pairs(blocks, grad_logsumexp)
        made = softmax_tiles(states, rows, blocks, tiles)
        _add_tile_gradients(made, logsumexp, grad_logsumexp, grad_states, grad_rows)
    _add_target_gradient(states, rows, blocks.targets, grad_target_logits, grad_states, grad_rows)
    return grad_states


@dataclass(frozen=True, slots=True)
class SoftmaxTile:
    """A batch of listed blocks with the softmax of its logits.

    Attributes:
        batch: The pairs and items.
        shares: (G, p, q) float32 softmax over the q items of the batch.
        states: (G, p, D) float32, a copy.
        rows: (G, q, D) float32, a copy.
        logsumexp: (G, p) float32 log-sum-exp over the same items.
    """

    batch: Batch
    shares: Tensor
    states: Tensor
    rows: Tensor
    logsumexp: Tensor


def softmax_tiles(
    states: Tensor, rows: Tensor, blocks: Blocks | NearbyChunks, tiles: CpuTiles
) -> Iterator[SoftmaxTile]:
    """The listed blocks in batches; blocks of up to ``tiles.items`` rows are not split by rows."""
    for part in [blocks] if isinstance(blocks, Blocks) else blocks.parts():
        for batch in batches(part, states.shape[1], tiles):
            yield _softmax_tile(states, rows, part, batch)


def _softmax_tile(states: Tensor, rows: Tensor, blocks: Blocks, batch: Batch) -> SoftmaxTile:
    logits, batch_states, batch_rows = _batch_logits(states, rows, blocks, batch)
    logsumexp = softmax_(logits.flatten(0, 1)).view(logits.shape[:2])
    return SoftmaxTile(batch, logits, batch_states, batch_rows, logsumexp)


def _add_tile_gradients(
    tiles: Iterable[SoftmaxTile],
    logsumexp: Tensor,
    weight: Tensor,
    grad_states: Tensor,
    grad_rows: Tensor,
) -> None:
    """Adds the gradients of ``sum of weight * logsumexp`` to ``grad_states`` and ``grad_rows``.

    Args:
        tiles: The tiles of all blocks; their states are overwritten.
        logsumexp: (num_slots,) float32.
        weight: (num_slots,) float32.
        grad_states: (N, D) float32.
        grad_rows: (R, D) float32.
    """
    # A log-sum-exp of +inf gives padded pairs the share 0.
    whole = F.pad(logsumexp.masked_fill(logsumexp == -torch.inf, 0.0), (0, 1), value=torch.inf)
    weight = F.pad(weight, (0, 1))
    for tile in tiles:
        slots = tile.batch.slots
        part_of_slot = (tile.logsumexp - whole[slots]).exp_()
        add_tile_gradient(
            tile, weight[slots] * part_of_slot, grad_states, grad_rows, tile.batch.items
        )
        del tile


def softmax_(logits: Tensor) -> Tensor:
    """(n,) log-sum-exp of (n, R) logits, overwritten by their softmax; 0 in lines of only -inf."""
    if not logits.shape[1]:
        return logits.new_full((logits.shape[0],), -torch.inf)
    # A few lines at a time stay in the caches of the cores between max, softmax and log.
    lines = max(torch.get_num_threads(), LINE_LOGITS // logits.shape[1])
    return torch.cat([_softmax_lines_(part) for part in logits.split(lines)])


def _softmax_lines_(logits: Tensor) -> Tensor:
    largest = logits.amax(1)
    torch.softmax(logits, 1, out=logits)
    empty = largest == -torch.inf
    if bool(empty.any()):
        logits[empty] = 0.0
    # The largest probability is at least 1 / R, so its logarithm is precise.
    return (largest - logits.amax(1).log_()).masked_fill_(empty, -torch.inf)


def _target_logits(states: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """(N,) float32 logit of each target, 0 if it is not among the rows."""
    result = torch.zeros(states.shape[0], dtype=torch.float32, device=states.device)
    here = (targets >= 0).nonzero()[:, 0]
    result[here] = torch.linalg.vecdot(take(states, here), take(rows, targets[here]))
    return result


def _add_target_gradient(
    states: Tensor,
    rows: Tensor,
    targets: Tensor,
    grad_target_logits: Tensor,
    grad_states: Tensor,
    grad_rows: Tensor,
) -> None:
    """Adds the gradients of the target logits to ``grad_states`` and ``grad_rows``."""
    here = (targets >= 0).nonzero()[:, 0]
    weight = grad_target_logits[here][:, None]
    grad_states.index_add_(0, here, take(rows, targets[here]).mul_(weight))
    grad_rows.index_add_(0, targets[here], take(states, here).mul_(weight))


def _contiguous_tiles(
    states: Tensor, rows: Tensor, targets: Tensor, tiles: CpuTiles
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Positions, items and logits of the tiles of all positions times all rows."""
    num_positions, num_rows = states.shape[0], rows.shape[0]
    height = max(1, min(tiles.positions, num_positions))
    width = max(1, tiles.logits // height)
    for first_item in range(0, num_rows, width):
        items = slice(first_item, min(first_item + width, num_rows))
        tile_rows = rows[items].float()
        for first in range(0, num_positions, height):
            positions = slice(first, min(first + height, num_positions))
            inside = targets[positions] - first_item
            yield positions, items, _tile_logits(states[positions].float(), tile_rows, inside)


def _tile_logits(states: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """(n, m) logits, -inf at the targets that are among the m rows."""
    logits = times_transposed(states, rows)
    lines = ((targets >= 0) & (targets < rows.shape[0])).nonzero()[:, 0]
    logits[lines, targets[lines]] = -torch.inf
    return logits


def _batch_logits(
    states: Tensor, rows: Tensor, blocks: Blocks, batch: Batch
) -> tuple[Tensor, Tensor, Tensor]:
    """(G, p, q) logits, -inf for non-candidates, and the (G, p, D) states and (G, q, D) rows."""
    batch_states, batch_rows = take(states, batch.positions), take(rows, batch.items)
    logits = torch.bmm(batch_states, batch_rows.transpose(1, 2))
    if batch.offsets is not None:
        logits.sub_(batch.offsets[:, None])
    # Columns beyond the narrowest block are padding in some blocks.
    logits[:, :, batch.narrowest :].sub_(batch.padding[:, None, batch.narrowest :])
    _hide_targets(logits, take(blocks.targets, batch.positions), batch.items)
    if blocks.rounds is not None:
        _mask_met_before(logits, blocks.rounds, batch)
    return logits, batch_states, batch_rows


def _hide_targets(logits: Tensor, targets: Tensor, items: Tensor) -> None:
    """Sets the (G, p, q) logits of (G, p) targets among the (G, q) items to -inf."""
    if not bool((items[:, 1:] >= items[:, :-1]).all()):
        # Comparing 32-bit integers takes half the time of 64-bit ones.
        logits.masked_fill_(targets.int()[:, :, None] == items.int()[:, None], -torch.inf)
        return
    # Items are ascending: a binary search per target is faster than a comparison of all pairs.
    first = torch.searchsorted(items, targets)
    counts = (torch.searchsorted(items, targets, right=True) - first).flatten()
    lines = torch.repeat_interleave(counts)
    within = torch.arange(lines.numel(), device=lines.device) - (counts.cumsum(0) - counts)[lines]
    logits.flatten(0, 1)[lines, first.flatten()[lines] + within] = -torch.inf


def _mask_met_before(logits: Tensor, rounds: Rounds, batch: Batch) -> None:
    for earlier in range(batch.round):
        position_chunks = take(rounds.position_chunks[:, earlier], batch.positions)
        item_chunks = take(rounds.item_chunks[:, earlier], batch.items)
        if max(int(position_chunks.max()), int(item_chunks.max())) < 1 << 15:
            position_chunks, item_chunks = position_chunks.short(), item_chunks.short()
        distance = position_chunks[:, :, None] - item_chunks[:, None]
        logits.masked_fill_(distance.abs_() <= rounds.reach, -torch.inf)


def _add_logsumexp(logsumexp: Tensor, tile: SoftmaxTile) -> None:
    slots = tile.batch.slots
    # Within a round no slot occurs twice, so reading and writing by index is safe.
    logsumexp[slots] = torch.logaddexp(logsumexp[slots], tile.logsumexp)


def add_tile_gradient(
    tile: SoftmaxTile, weight: Tensor, grad_states: Tensor, grad_rows: Tensor, lines: Tensor
) -> None:
    """Adds the gradients of a tile to ``grad_states`` and ``grad_rows``; changes ``tile.states``.

    Args:
        tile: The tile.
        weight: (G, p) float32 derivatives of the loss with respect to ``tile.logsumexp``.
        grad_states: (N, D) float32.
        grad_rows: (n, D) float32.
        lines: (G, q) int64 line of ``grad_rows`` of each item.
    """
    weight, batch = weight[..., None], tile.batch
    for_states = torch.bmm(tile.shares, tile.rows).mul_(weight)
    grad_states.index_add_(0, batch.positions.flatten(), for_states.flatten(0, 1))
    for_rows = torch.bmm(tile.shares.transpose(1, 2), tile.states.mul_(weight))
    grad_rows.index_add_(0, lines.flatten(), for_rows.flatten(0, 1))
