"""Loss and gradients in one pass on a CPU, where all logits of a position are in memory together.

This takes three matrix products instead of four, and computes every logit and its exponential once.
The coefficient of each position's loss must be known before the pass, as it is for a mean or a sum.
There are two cases:

- ``fused_cross_entropy``: the full softmax over a shard that fits in a cache. For each group of
  positions: (1) logits and their local softmax, (2) an all-gather of the log-sum-exps of all
  shards, in flight during a product, (3) both gradients from the local softmax, scaled. 6 N R D
  FLOP.
- ``fused_blocks``: listed blocks in one process, where a position has all its candidates in one
  block. For each tile: (1) copy its rows, (2) logits and softmax, (3) both gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shardrec.kernels.block_logsumexp import Blocks, EveryPair, NearbyChunks, RowIds
from shardrec.kernels.block_logsumexp.cpu import add_tile_gradient, softmax_, softmax_tiles
from shardrec.kernels.block_logsumexp.cpu_tiles import LEAST_FUSED, cpu_tiles, fused_positions
from shardrec.kernels.device.matmul import STEP, times_transposed
from shardrec.kernels.loss.candidates import Candidates
from shardrec.kernels.loss.inputs import Inputs
from shardrec.kernels.loss.passes import loss_of_margin, used_rows
from shardrec.kernels.ranks.chunks import Chunk, Gradients, prefetched
from shardrec.kernels.ranks.communicator import Communicator, Pending

__all__ = ["fake_gradients", "fits_cache", "fused_blocks", "fused_cross_entropy"]


def fits_cache(states: Tensor, rows: Tensor, num_rows: int, num_ranks: int) -> bool:
    """Whether ``fused_cross_entropy`` applies: float32 on a CPU, at most 32,768 rows per rank.

    The answer must be the same on every rank, so it depends on the average shard size.

    Args:
        states: (N, D).
        rows: (R, D) of this rank.
        num_rows: V.
        num_ranks: W.
    """
    on_cpu = states.device.type == "cpu" and states.dtype == rows.dtype == torch.float32
    return on_cpu and fused_positions(-(-num_rows // num_ranks)) >= LEAST_FUSED


def fused_cross_entropy(
    inputs: Inputs, coefficients: Tensor, positions_at_once: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Full softmax: sum over this rank's positions of coefficient times loss, and its gradients.

    The workspace is two copies of one group of logits, at most 16 MiB each, and two chunks of
    states: the states of one chunk are in flight while the chunk before is processed.

    Args:
        inputs: The batch and the table.
        coefficients: (N,) float32 factor of each position's loss.
        positions_at_once: Positions per group; None: ``fused_positions`` of the largest shard.

    Returns:
        () float32, and (N, D) and (R, D) float32 gradients of ``inputs.states`` and
        ``inputs.scaled_rows()``.

    Collectives: per chunk of positions an all-gather each of states, targets and coefficients, and
    a reduce-scatter of state gradients; per group an all-gather of two float32 numbers per
    position, in flight during a product.
    """
    states, rows, layout = inputs.states, inputs.scaled_rows(), inputs.layout
    grad_states = Gradients(inputs.ranks, states)
    grad_rows = rows.new_zeros(rows.shape)
    total = torch.zeros((), device=states.device)
    group = positions_at_once or max(1, fused_positions(layout.largest_shard))

    def start(chunk: Chunk) -> list[Pending]:
        local = states, inputs.targets, coefficients
        return [layout.start_gather(one, chunk) for one in local]

    chunks = list(layout.chunks(layout.even_chunks(layout.num_chunks(listed=False))))
    for chunk, (chunk_states, targets, weights) in prefetched(chunks, start):
        targets = inputs.row_ids.find(targets)
        losses, part = torch.empty_like(weights), chunk_states.new_empty(chunk_states.shape)
        for first in range(0, targets.numel(), group):
            lines = slice(first, first + group)
            losses[lines] = _add_group(
                _Group(chunk_states[lines], targets[lines], weights[lines]),
                rows,
                inputs.ranks,
                part[lines],
                grad_rows,
            )
        total += (losses * weights)[chunk.own_slice].sum()
        grad_states.send(part, chunk)
    return total, grad_states.finish(), grad_rows


@dataclass(frozen=True, slots=True)
class _Group:
    """Positions with logits in the cache at the same time.

    (n, D) states, (n,) int64 rows of the targets, -1 for those of other shards, and (n,)
    coefficients.
    """

    states: Tensor
    targets: Tensor
    weights: Tensor


def _add_group(
    group: _Group,
    rows: Tensor,
    ranks: Communicator,
    grad_states: Tensor,
    grad_rows: Tensor,
) -> Tensor:
    """(n,) losses; writes (n, D) ``grad_states`` and adds to (R, D) ``grad_rows``."""
    # R is the same in every step, so the shapes of the products recur.
    recurring = group.states.shape[0] % STEP == 0
    logits = times_transposed(group.states, rows, recurring=recurring)
    own = _softmax_(logits, group.targets)
    of_ranks = ranks.start_all_gather(own)
    # The other shards only scale each line of the local softmax, so a product can run while their
    # log-sum-exps are in flight. The (n, D) operands are scaled, which is cheaper than the logits.
    part = times_transposed(logits, rows.T, recurring=recurring)
    losses, factors, slopes = _losses(own[0], of_ranks(), group.weights)
    torch.mul(part, factors[:, None], out=grad_states)
    weighted = (group.states * factors[:, None]).T.contiguous()
    grad_rows += times_transposed(weighted, logits.T, recurring=recurring).T
    here = (group.targets >= 0).nonzero()[:, 0]
    targets, slope = group.targets[here], slopes[here][:, None]
    grad_states[here] -= slope * rows[targets]
    grad_rows.index_add_(0, targets, slope * group.states[here], alpha=-1)
    return losses


def _softmax_(logits: Tensor, targets: Tensor) -> Tensor:
    """(2, n) log-sum-exps over the shard's candidates, and target logits (0 for other shards).

    The (n, R) logits are overwritten by the softmax over the candidates.
    """
    here = (targets >= 0).nonzero()[:, 0]
    target_logits = logits.new_zeros(logits.shape[0])
    target_logits[here] = logits[here, targets[here]]
    logits[here, targets[here]] = -torch.inf
    return torch.stack([softmax_(logits), target_logits])


def _losses(own: Tensor, of_ranks: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n,) losses, factors and slopes of the positions.

    ``factors[i]`` times line i of the local softmax is dL/dlogits; ``slopes[i]`` is minus the
    derivative of L with respect to the target's logit.

    Args:
        own: (n,) log-sum-exps of this shard.
        of_ranks: (W, 2, n) log-sum-exps and target logits of all shards.
        weights: (n,) float32 coefficients of the losses.
    """
    logsumexp, target_logits = of_ranks[:, 0].logsumexp(0), of_ranks[:, 1].sum(0)
    margin = logsumexp - target_logits
    slopes = weights * margin.sigmoid()
    # A line without candidates has logsumexp -inf, slope 0 and zeros for its softmax.
    share = (own - logsumexp.masked_fill(logsumexp == -torch.inf, 0.0)).exp_()
    return loss_of_margin(margin), slopes * share, slopes


def fused_blocks(
    inputs: Inputs,
    candidates: Candidates,
    tables: Sequence[Tensor],
    coefficients: Tensor,
    is_sparse: bool = False,
) -> tuple[Tensor, ...]:
    """Listed blocks: sum over the positions of coefficient times loss, and its gradients.

    The workspace is one tile of logits with its rows and their gradient, and one chunk of states.

    Args:
        inputs: The batch and the table of a single process; ``scaling`` must not change the rows.
        candidates: A loss that has all candidates of a position in one block, of at most
            ``CpuTiles.items`` rows.
        tables: Tensors that ``candidates`` needs.
        coefficients: (N,) float32 factor of each position's loss.
        is_sparse: Return the gradient only of rows that are candidates or targets.

    Returns:
        () float32, (N, D) float32 gradient of ``inputs.states`` and (R, D) of the rows. If
        ``is_sparse``, the last is (M, D), followed by the (M,) int64 ascending rows.

    Collectives: none.
    """
    layout, whole = inputs.layout, inputs.row_ids
    every_row = RowIds(0, whole.count)
    used = [used_rows(inputs, candidates, tables)] if is_sparse else []
    fused = _RowGradient(inputs.rows, RowIds.of(used[0], every_row) if used else every_row)
    plan = candidates.plan(inputs, inputs, tuple(tables))
    correction = plan.correction()
    if not isinstance(correction, Tensor):
        correction = torch.full_like(coefficients, correction or 0.0)
    grad_states = torch.empty_like(inputs.states)
    total = torch.zeros((), device=inputs.states.device)
    of_positions = inputs.states, inputs.targets, coefficients, correction
    for chunk in layout.chunks(plan.chunk_of()):
        states, targets, *columns = (layout.start_gather(one, chunk)() for one in of_positions)
        blocks = plan.blocks(chunk, targets, whole, ())
        assert not isinstance(blocks, EveryPair)
        losses, grad_states[chunk.own] = fused.add(states, blocks, *columns)
        total += losses.sum()
    return total, grad_states, fused.grad_rows, *used


def fake_gradients(states: Tensor, rows: Tensor, is_sparse: bool) -> list[Tensor]:
    """Fake results for tracing: gradients of states and rows, if sparse followed by row indices."""
    if not is_sparse:
        return [states.new_empty(states.shape), rows.new_empty(rows.shape)]
    num_used = torch.library.get_ctx().new_dynamic_size()
    used = rows.new_empty((num_used,), dtype=torch.int64)
    return [states.new_empty(states.shape), rows.new_empty((num_used, rows.shape[1])), used]


class _RowGradient:
    """The rows, and the gradient that is accumulated for them.

    Attributes:
        grad_rows: (M, D) float32.
    """

    def __init__(self, rows: Tensor, lines: RowIds) -> None:
        """Stores the (R, D) rows, and which line of the gradient belongs to each row."""
        self.grad_rows = rows.new_zeros((lines.count, rows.shape[1]))
        self._rows, self._lines = rows, lines

    def add(
        self,
        states: Tensor,
        blocks: Blocks | NearbyChunks,
        coefficients: Tensor,
        correction: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(n,) losses times coefficients and the (n, D) gradient of the states of some blocks."""
        here = (blocks.targets >= 0).nonzero()[:, 0]
        targets = blocks.targets[here]
        target_logits = torch.zeros_like(correction)
        target_logits[here] = torch.linalg.vecdot(states[here], self._rows[targets])
        grad_states = torch.zeros_like(states)
        # Padded pairs add to one extra entry, which is dropped.
        level, weights = (F.pad(one, (0, 1)) for one in (correction + target_logits, coefficients))
        margin = torch.full_like(level, -torch.inf)
        for tile in softmax_tiles(states, self._rows, blocks, cpu_tiles()):
            slots, items = tile.batch.slots, tile.batch.items
            margin[slots] = tile.logsumexp - level[slots]
            slopes = margin[slots].sigmoid() * weights[slots]
            add_tile_gradient(tile, slopes, grad_states, self.grad_rows, self._lines.find(items))
            del tile
        slopes = (margin.sigmoid() * weights)[here, None]
        grad_states.index_add_(0, here, self._rows[targets].mul_(slopes), alpha=-1)
        lines = self._lines.find(targets)
        self.grad_rows.index_add_(0, lines, states[here].mul_(slopes), alpha=-1)
        return loss_of_margin(margin[:-1]) * coefficients, grad_states
