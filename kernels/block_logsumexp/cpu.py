"""Block log-sum-exp in plain PyTorch: one tile of logits at a time, reused for all of them.

The full softmax walks over contiguous tiles. Lists of blocks are cut into pieces that fit a tile,
and pieces of similar size are worked on in batches, since a product of 20 x 1000 takes less time
than the calls around it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from shardrec.kernels.block_logsumexp.blocks import Blocks, Rounds

__all__ = ["backward", "forward"]

# A tile of 2**20 logits is 4 MiB: it stays in the shared cache while many passes go over it.
TILE_LOGITS = 1 << 20
TILE_POSITIONS = 1024
PIECE_ITEMS = 1 << 14
# The rows that a batch copies together: 2**21 floats are 8 MiB.
BATCH_FLOATS = 1 << 21
# What a batch of listed blocks holds at its peak: rows and their gradients, logits, probabilities.
BATCH_BYTES = 4 * (2 * BATCH_FLOATS + 2 * TILE_LOGITS)
# A batch of blocks is padded to its largest; blocks smaller than this share of it open a new batch.
LEAST_FILL = 0.5


@dataclass(frozen=True, slots=True)
class _Batch:
    """G blocks padded to p pairs and q items.

    Attributes:
        positions: (G, p) int64 rows of states; any row where there is no pair.
        slots: (G, p) int64; ``num_slots`` where there is no pair.
        items: (G, q) int64 rows; any row where there is no item.
        offsets: (G, q) float32 subtracted from the logits of an item; None: zero.
        padding: (G, q) float32; 0, infinite where there is no item.
        narrowest: Items of the block with the fewest.
        round: Round of the blocks.
    """

    positions: Tensor
    slots: Tensor
    items: Tensor
    offsets: Tensor | None
    padding: Tensor
    narrowest: int
    round: int


def forward(states: Tensor, rows: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """(num_slots,) log-sum-exps and (N,) target logits, float32; see the package's function."""
    # One entry more than there are slots takes what padded pairs would add.
    logsumexp = states.new_full((blocks.num_slots + 1,), -torch.inf, dtype=torch.float32)
    if blocks.items is None:
        for positions, _, logits in _contiguous_tiles(states, rows, blocks.targets):
            logsumexp[positions] = torch.logaddexp(logsumexp[positions], _logsumexp(logits))
    else:
        for batch in _batches(blocks, states.shape[1]):
            logits, _, _ = _batch_logits(states, rows, blocks, batch)
            part = _logsumexp(logits)
            # Blocks of one round have no slot twice, so reading and writing by index is safe.
            logsumexp[batch.slots] = torch.logaddexp(logsumexp[batch.slots], part)
    return logsumexp[:-1], _target_logits(states, rows, blocks.targets)


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
    # Lines without candidates, padded pairs among them, have gradient 0.
    shift = F.pad(logsumexp.masked_fill(logsumexp == -torch.inf, 0.0), (0, 1))
    weight = F.pad(grad_logsumexp, (0, 1))
    if blocks.items is None:
        for positions, items, logits in _contiguous_tiles(states, rows, blocks.targets):
            _to_gradient(logits, shift[positions], weight[positions])
            grad_states[positions].addmm_(logits, rows[items].float())
            grad_rows[items].addmm_(logits.T, states[positions].float())
    else:
        for batch in _batches(_without_idle_pairs(blocks, grad_logsumexp), states.shape[1]):
            logits, batch_states, batch_rows = _batch_logits(states, rows, blocks, batch)
            _to_gradient(logits, shift[batch.slots], weight[batch.slots])
            parts = torch.bmm(logits, batch_rows), torch.bmm(logits.transpose(1, 2), batch_states)
            grad_states.index_add_(0, batch.positions.flatten(), parts[0].flatten(0, 1))
            grad_rows.index_add_(0, batch.items.flatten(), parts[1].flatten(0, 1))
    _add_target_gradient(states, rows, blocks.targets, grad_target_logits, grad_states, grad_rows)
    return grad_states


def _contiguous_tiles(
    states: Tensor, rows: Tensor, targets: Tensor
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Positions, items and logits of the tiles of all positions times all rows; one buffer."""
    num_positions, num_rows = states.shape[0], rows.shape[0]
    height = min(TILE_POSITIONS, num_positions)
    width = TILE_LOGITS // max(height, 1)
    buffer = torch.empty(height * min(width, num_rows), device=states.device)
    for first_item in range(0, num_rows, width):
        items = slice(first_item, min(first_item + width, num_rows))
        transposed = rows[items].float().T
        for first in range(0, num_positions, height):
            positions = slice(first, min(first + height, num_positions))
            shape = (positions.stop - first, items.stop - first_item)
            logits = buffer[: shape[0] * shape[1]].view(shape)
            torch.mm(states[positions].float(), transposed, out=logits)
            inside = targets[positions] - first_item
            lines = ((inside >= 0) & (inside < shape[1])).nonzero()[:, 0]
            logits[lines, inside[lines]] = -torch.inf
            yield positions, items, logits


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Pieces of blocks, each small enough for a tile; all (T,) int64."""

    first_pair: Tensor
    end_pair: Tensor
    first_item: Tensor
    end_item: Tensor
    round: Tensor
    item_part: Tensor

    def pick(self, index: Tensor) -> "_Pieces":
        return _Pieces(*(getattr(self, name)[index] for name in self.__slots__))


def _cut(blocks: Blocks) -> _Pieces:
    """The pieces of all blocks that hold any pair and item."""
    heights = blocks.pair_starts.diff()
    widths = blocks.item_ends - blocks.item_starts
    rounds = torch.zeros_like(widths) if blocks.rounds is None else blocks.rounds.block_rounds
    most_pairs = (TILE_LOGITS // widths.clamp(1, PIECE_ITEMS)).clamp(max=TILE_POSITIONS)
    pair_parts = -(-heights // most_pairs)
    item_parts = -(-widths // PIECE_ITEMS)
    of_block = torch.repeat_interleave(pair_parts * item_parts)
    first_piece = (pair_parts * item_parts).cumsum(0) - pair_parts * item_parts
    number = torch.arange(of_block.numel(), device=of_block.device) - first_piece[of_block]
    pair_part, item_part = number // item_parts[of_block], number % item_parts[of_block]
    first_pair = blocks.pair_starts[:-1][of_block] + pair_part * most_pairs[of_block]
    first_item = blocks.item_starts[of_block] + item_part * PIECE_ITEMS
    return _Pieces(
        first_pair=first_pair,
        end_pair=torch.minimum(first_pair + most_pairs[of_block], blocks.pair_starts[1:][of_block]),
        first_item=first_item,
        end_item=torch.minimum(first_item + PIECE_ITEMS, blocks.item_ends[of_block]),
        round=rounds[of_block],
        item_part=item_part,
    )


def _batches(blocks: Blocks, width: int) -> Iterator[_Batch]:
    """The pieces in batches of one round, one part of their block's items, and similar size."""
    pieces = _cut(blocks)
    # Stable sorts, the least significant key first.
    pieces = pieces.pick(torch.argsort(pieces.first_pair - pieces.end_pair, stable=True))
    pieces = pieces.pick(torch.argsort(pieces.item_part, stable=True))
    pieces = pieces.pick(torch.argsort(pieces.round, stable=True))
    shapes = zip(
        pieces.round.tolist(),
        pieces.item_part.tolist(),
        (pieces.end_pair - pieces.first_pair).tolist(),
        (pieces.end_item - pieces.first_item).tolist(),
        strict=True,
    )
    for start, end in _runs(list(shapes), max(1, BATCH_FLOATS // width)):
        members = torch.arange(start, end, device=pieces.round.device)
        yield _padded(blocks, pieces.pick(members))


def _runs(shapes: list[tuple[int, int, int, int]], most_items: int) -> Iterator[tuple[int, int]]:
    """Runs of (round, item part, height, width) that fit one tile when padded to their largest.

    Heights descend within a round and part; a run has at most ``most_items`` items in all.

    >>> list(_runs([(0, 0, 8, 4), (0, 0, 7, 4), (0, 0, 2, 4), (1, 0, 2, 4)], most_items=99))
    [(0, 2), (2, 3), (3, 4)]
    """
    start = width = 0
    for index, (round_, part, height, piece_width) in enumerate(shapes):
        first_round, first_part, first_height, _ = shapes[start]
        wider = max(width, piece_width)
        num_items = (index - start + 1) * wider
        fits = num_items * first_height <= TILE_LOGITS and num_items <= most_items
        alike = (round_, part) == (first_round, first_part) and height >= LEAST_FILL * first_height
        if index > start and not (fits and alike):
            yield start, index
            start, wider = index, piece_width
        width = wider
    if shapes:
        yield start, len(shapes)


def _padded(blocks: Blocks, pieces: _Pieces) -> _Batch:
    assert blocks.items is not None
    pairs, is_pair = _ranges(pieces.first_pair, pieces.end_pair)
    entries, is_item = _ranges(pieces.first_item, pieces.end_item)
    positions = pairs if blocks.pair_positions is None else blocks.pair_positions[pairs]
    slots = positions if blocks.pair_slots is None else blocks.pair_slots[pairs]
    padding = torch.zeros(entries.shape, device=entries.device)
    return _Batch(
        positions=positions,
        slots=slots.masked_fill(~is_pair, blocks.num_slots),
        items=_take(blocks.items, entries),
        offsets=None if blocks.offsets is None else _take(blocks.offsets, entries),
        padding=padding.masked_fill_(~is_item, torch.inf),
        narrowest=int((pieces.end_item - pieces.first_item).min()),
        round=int(pieces.round[0]),
    )


def _ranges(starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """(G, longest) members of ranges, the first one repeated as padding, and which are real.

    >>> _ranges(torch.tensor([3, 7]), torch.tensor([5, 8]))[0].tolist()
    [[3, 4], [7, 7]]
    """
    steps = torch.arange(int((ends - starts).max()), device=starts.device)
    members = starts[:, None] + steps
    real = members < ends[:, None]
    return torch.where(real, members, starts[:, None]), real


def _batch_logits(
    states: Tensor, rows: Tensor, blocks: Blocks, batch: _Batch
) -> tuple[Tensor, Tensor, Tensor]:
    """(G, p, q) logits, -inf where a pair does not count, and the (G, ., D) states and rows."""
    batch_states, batch_rows = _take(states, batch.positions), _take(rows, batch.items)
    logits = torch.bmm(batch_states, batch_rows.transpose(1, 2))
    if batch.offsets is not None:
        logits.sub_(batch.offsets[:, None])
    # Columns beyond the narrowest block are padding in some blocks.
    logits[:, :, batch.narrowest :].sub_(batch.padding[:, None, batch.narrowest :])
    # Comparing 32-bit integers takes half the time of 64-bit ones.
    targets = _take(blocks.targets, batch.positions).int()
    logits.masked_fill_(targets[:, :, None] == batch.items.int()[:, None], -torch.inf)
    if blocks.rounds is not None:
        _mask_met_before(logits, blocks.rounds, batch)
    return logits, batch_states, batch_rows


def _take(source: Tensor, index: Tensor) -> Tensor:
    """``source[index]``, which on a CPU takes three times as long; floats as float32."""
    taken = source.index_select(0, index.flatten()).view(*index.shape, *source.shape[1:])
    return taken.float() if taken.is_floating_point() else taken


def _mask_met_before(logits: Tensor, rounds: Rounds, batch: _Batch) -> None:
    for earlier in range(batch.round):
        position_chunks = _take(rounds.position_chunks[:, earlier], batch.positions)
        item_chunks = _take(rounds.item_chunks[:, earlier], batch.items)
        if max(int(position_chunks.max()), int(item_chunks.max())) < 1 << 15:
            position_chunks, item_chunks = position_chunks.short(), item_chunks.short()
        distance = position_chunks[:, :, None] - item_chunks[:, None]
        logits.masked_fill_(distance.abs_() <= rounds.reach, -torch.inf)


def _logsumexp(logits: Tensor) -> Tensor:
    """Log-sum-exp over the last dimension; overwrites its input."""
    largest = logits.amax(-1)
    largest.masked_fill_(largest == -torch.inf, 0.0)
    return logits.sub_(largest[..., None]).exp_().sum(-1).log_().add_(largest)


def _to_gradient(logits: Tensor, shift: Tensor, weight: Tensor) -> None:
    """Overwrites logits with ``weight * exp(logit - shift)``."""
    logits.sub_(shift[..., None]).exp_().mul_(weight[..., None])


def _without_idle_pairs(blocks: Blocks, grad_logsumexp: Tensor) -> Blocks:
    """The blocks less the pairs whose slot gets no gradient, such as all but one bucket of sce."""
    if blocks.pair_slots is None or blocks.pair_positions is None:
        return blocks
    busy = grad_logsumexp[blocks.pair_slots] != 0
    kept_before = F.pad(busy.cumsum(0), (1, 0))
    return replace(
        blocks,
        pair_positions=blocks.pair_positions[busy],
        pair_slots=blocks.pair_slots[busy],
        pair_starts=kept_before[blocks.pair_starts],
    )


def _target_logits(states: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    result = torch.zeros(states.shape[0], dtype=torch.float32, device=states.device)
    here = (targets >= 0).nonzero()[:, 0]
    result[here] = torch.linalg.vecdot(states[here].float(), rows[targets[here]].float())
    return result


def _add_target_gradient(
    states: Tensor,
    rows: Tensor,
    targets: Tensor,
    grad_target_logits: Tensor,
    grad_states: Tensor,
    grad_rows: Tensor,
) -> None:
    here = (targets >= 0).nonzero()[:, 0]
    weight = grad_target_logits[here][:, None]
    grad_states.index_add_(0, here, rows[targets[here]].float() * weight)
    grad_rows.index_add_(0, targets[here], states[here].float() * weight)
