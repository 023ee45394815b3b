"""The definition of the block log-sum-exp: dense, in any float dtype, with autograd."""

import torch
from torch import Tensor

from shardrec.kernels.block_logsumexp.blocks import Blocks, EveryPair

__all__ = ["block_logsumexp_reference"]


def block_logsumexp_reference(
    states: Tensor, rows: Tensor, blocks: Blocks | EveryPair
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of every slot and logit of every target, with all (N, R) logits in memory.

    Args:
        states: (N, D) float.
        rows: (R, D) float, same dtype.
        blocks: The blocks to sum.

    Returns:
        (num_slots,) log-sum-exp, -inf for a slot without candidates, and (N,) target logits, 0
        if the target is not among the rows.
    """
    logits = states @ rows.T
    if isinstance(blocks, EveryPair):
        blocks = _as_one_block(blocks)
    pieces: list[list[Tensor]] = [[] for _ in range(blocks.num_slots)]
    for block in range(blocks.num_blocks):
        _append_block(pieces, logits, blocks, block)
    empty = torch.full((1,), -torch.inf, dtype=logits.dtype)
    sums = [torch.logsumexp(torch.cat(piece), 0) if piece else empty[0] for piece in pieces]
    here = blocks.targets >= 0
    target_logits = logits.new_zeros(states.shape[0])
    target_logits = target_logits.index_put(
        (here.nonzero()[:, 0],), logits[here, blocks.targets[here]]
    )
    return torch.stack(sums) if sums else logits.new_zeros(0), target_logits


def _as_one_block(blocks: EveryPair) -> Blocks:
    return Blocks(
        pair_positions=None,
        pair_starts=torch.tensor([0, blocks.num_slots]),
        items=torch.arange(blocks.num_rows),
        item_starts=torch.tensor([0]),
        item_ends=torch.tensor([blocks.num_rows]),
        targets=blocks.targets,
        num_slots=blocks.num_slots,
    )


def _append_block(pieces: list[list[Tensor]], logits: Tensor, blocks: Blocks, block: int) -> None:
    starts, ends = blocks.item_ranges()
    entries = range(int(starts[block]), int(ends[block]))
    for pair in range(int(blocks.pair_starts[block]), int(blocks.pair_starts[block + 1])):
        position = pair if blocks.pair_positions is None else int(blocks.pair_positions[pair])
        slot = position if blocks.pair_slots is None else int(blocks.pair_slots[pair])
        for entry in entries:
            row = int(blocks.items[entry])
            if row == int(blocks.targets[position]) or _met_before(blocks, block, position, row):
                continue
            offset = 0.0 if blocks.offsets is None else blocks.offsets[entry].to(logits.dtype)
            pieces[slot].append((logits[position, row] - offset).reshape(1))


def _met_before(blocks: Blocks, block: int, position: int, row: int) -> bool:
    if blocks.rounds is None:
        return False
    rounds = blocks.rounds
    of_blocks = rounds.block_rounds
    earlier = of_blocks if isinstance(of_blocks, int) else int(of_blocks[block])
    distance = rounds.position_chunks[position, :earlier] - rounds.item_chunks[row, :earlier]
    return bool((distance.abs() <= rounds.reach).any())
