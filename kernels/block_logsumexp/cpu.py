"""Block log-sum-exp in plain PyTorch, one tile of logits at a time."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardrec.kernels.block_logsumexp.blocks import Blocks, Rounds

__all__ = ["TILE_ITEMS", "TILE_POSITIONS", "backward", "forward"]

# Tile of logits: 256 x 4096 floats are 4 MiB, which the shared cache holds while six passes go
# over it.
TILE_POSITIONS = 256
TILE_ITEMS = 4096


@dataclass(frozen=True, slots=True)
class _Tile:
    positions: slice | Tensor  # into states
    slots: slice | Tensor  # into the output
    items: slice | Tensor  # into rows
    entries: slice  # into blocks.items and blocks.offsets
    round: int


def forward(states: Tensor, rows: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """(num_slots,) log-sum-exps and (N,) target logits, float32; see the package's function."""
    logsumexp = states.new_full((blocks.num_slots,), -torch.inf, dtype=torch.float32)
    for tile in _tiles(blocks):
        logits, _, _ = _tile_logits(states, rows, blocks, tile)
        logsumexp[tile.slots] = torch.logaddexp(logsumexp[tile.slots], logits.logsumexp(1))
    return logsumexp, _target_logits(states, rows, blocks.targets)


def backward(
    states: Tensor,
    rows: Tensor,
    blocks: Blocks,
    logsumexp: Tensor,
    grad_logsumexp: Tensor,
    grad_target_logits: Tensor,
    grad_rows: Tensor,
) -> Tensor:
    """(N, D) float32 gradient of ``states``; adds that of ``rows`` to (R, D) float32 ``grad_rows``.

    Every tile of probabilities is computed again.
    """
    grad_states = torch.zeros(states.shape, dtype=torch.float32, device=states.device)
    shift = logsumexp.masked_fill(logsumexp == -torch.inf, 0.0)
    for tile in _tiles(_without_idle_pairs(blocks, grad_logsumexp)):
        logits, block_states, block_rows = _tile_logits(states, rows, blocks, tile)
        logits.sub_(shift[tile.slots][:, None]).exp_().mul_(grad_logsumexp[tile.slots][:, None])
        _add_product(grad_states, tile.positions, logits, block_rows)
        _add_product(grad_rows, tile.items, logits.T, block_states)
    here = (blocks.targets >= 0).nonzero()[:, 0]
    target_rows = blocks.targets[here]
    weight = grad_target_logits[here][:, None]
    grad_states.index_add_(0, here, rows[target_rows].float() * weight)
    grad_rows.index_add_(0, target_rows, states[here].float() * weight)
    return grad_states


def _without_idle_pairs(blocks: Blocks, grad_logsumexp: Tensor) -> Blocks:
    """The blocks less the pairs whose slot gets no gradient, such as all but one bucket of sce."""
    if blocks.pair_slots is None or blocks.pair_positions is None:
        return blocks
    busy = grad_logsumexp[blocks.pair_slots] != 0
    kept_before = torch.nn.functional.pad(busy.cumsum(0), (1, 0))
    return replace(
        blocks,
        pair_positions=blocks.pair_positions[busy],
        pair_slots=blocks.pair_slots[busy],
        pair_starts=kept_before[blocks.pair_starts],
    )


def _tiles(blocks: Blocks) -> Iterator[_Tile]:
    pair_starts = blocks.pair_starts.tolist()
    item_starts, item_ends = blocks.item_starts.tolist(), blocks.item_ends.tolist()
    block_rounds = blocks.rounds.block_rounds.tolist() if blocks.rounds else [0] * len(item_ends)
    for block, (first_item, end_item) in enumerate(zip(item_starts, item_ends, strict=True)):
        first_pair, end_pair = pair_starts[block], pair_starts[block + 1]
        for pair in range(first_pair, end_pair, TILE_POSITIONS):
            pairs = slice(pair, min(pair + TILE_POSITIONS, end_pair))
            positions = pairs if blocks.pair_positions is None else blocks.pair_positions[pairs]
            slots = positions if blocks.pair_slots is None else blocks.pair_slots[pairs]
            for item in range(first_item, end_item, TILE_ITEMS):
                entries = slice(item, min(item + TILE_ITEMS, end_item))
                items = entries if blocks.items is None else blocks.items[entries]
                yield _Tile(positions, slots, items, entries, block_rounds[block])


def _tile_logits(
    states: Tensor, rows: Tensor, blocks: Blocks, tile: _Tile
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of one tile, -inf where a pair does not count, with its states and rows in float32."""
    block_states, block_rows = states[tile.positions].float(), rows[tile.items].float()
    logits = block_states @ block_rows.T
    if blocks.offsets is not None:
        logits.sub_(blocks.offsets[tile.entries])
    _mask_targets(logits, blocks.targets[tile.positions], tile.items)
    if blocks.rounds is not None:
        _mask_met_before(logits, blocks.rounds, tile)
    return logits, block_states, block_rows


def _mask_targets(logits: Tensor, targets: Tensor, items: slice | Tensor) -> None:
    if isinstance(items, Tensor):
        logits.masked_fill_(targets[:, None] == items, -torch.inf)
        return
    inside = ((targets >= items.start) & (targets < items.stop)).nonzero()[:, 0]
    logits[inside, targets[inside] - items.start] = -torch.inf


def _mask_met_before(logits: Tensor, rounds: Rounds, tile: _Tile) -> None:
    position_chunks = rounds.position_chunks[tile.positions]
    item_chunks = rounds.item_chunks[tile.items]
    for earlier in range(tile.round):
        distance = position_chunks[:, earlier, None] - item_chunks[:, earlier]
        logits.masked_fill_(distance.abs_() <= rounds.reach, -torch.inf)


def _add_product(total: Tensor, index: slice | Tensor, left: Tensor, right: Tensor) -> None:
    if isinstance(index, Tensor):
        total.index_add_(0, index, left @ right)
    else:
        total[index].addmm_(left, right)


def _target_logits(states: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    result = torch.zeros(states.shape[0], dtype=torch.float32, device=states.device)
    here = (targets >= 0).nonzero()[:, 0]
    result[here] = torch.linalg.vecdot(states[here].float(), rows[targets[here]].float())
    return result
