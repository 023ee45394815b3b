"""Loss and gradients in one walk, where a position meets all its candidates in one block.

No other rank has candidates then, so a log-sum-exp is final as soon as its block's logits are
there: they become a softmax where they lie, and both gradients follow at once. Three products do
the work of four, and every block is drawn, copied and exponentiated once. Rows are copied from the
table a block at a time. The gradient of the loss with respect to each position's loss must be known
beforehand: it is, for a mean or a sum.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from shardrec.kernels.block_logsumexp import Blocks, NearbyChunks, RowIds
from shardrec.kernels.block_logsumexp.cpu import add_tile_gradient, softmax_tiles
from shardrec.kernels.block_logsumexp.cpu_tiles import cpu_tiles
from shardrec.kernels.loss.candidates import Candidates
from shardrec.kernels.loss.inputs import Problem
from shardrec.kernels.loss.passes import candidate_loss, touched_rows

__all__ = ["fake_gradients", "fused_comparison"]


def fused_comparison(
    problem: Problem,
    candidates: Candidates,
    tables: Sequence[Tensor],
    coefficients: Tensor,
    is_sparse: bool = False,
) -> tuple[Tensor, ...]:
    """Sum over the positions of coefficient times loss, and its gradients.

    The workspace is one tile of logits with its rows and their gradient, and one chunk of states.

    Args:
        problem: The batch and the table, of one process, whose rows no scaling changes.
        candidates: Of which a position meets all in one block, of at most ``CpuTiles.items`` rows.
        tables: Tensors that they need.
        coefficients: (N,) float32.
        is_sparse: Give the gradient of the rows alone that are candidates or targets.

    Returns:
        () float32, (N, D) float32 gradient of ``problem.states`` and (R, D) of the rows; or (M, D)
        of M rows, and (M,) int64 which ones, ascending.

    Collectives: none.
    """
    exchange, whole = problem.exchange, problem.row_ids
    every_row = RowIds(0, whole.count)
    used = [touched_rows(problem, candidates, tables)] if is_sparse else []
    walk = _Walk(problem.rows, RowIds.of(used[0], every_row) if used else every_row)
    plan = candidates.plan(problem, problem, tuple(tables))
    correction = plan.correction()
    if correction is None:
        correction = torch.zeros_like(coefficients)
    grad_states = torch.empty_like(problem.states)
    total = torch.zeros((), device=problem.states.device)
    of_positions = problem.states, problem.targets, coefficients, correction
    for chunk in exchange.chunks(plan.chunk_of()):
        states, targets, *columns = (exchange.gather(one, chunk) for one in of_positions)
        blocks = plan.blocks(chunk, targets, whole, ())
        losses, grad_states[chunk.own] = walk.take(states, blocks, *columns)
        total += losses.sum()
    return total, grad_states, walk.grad_rows, *used


def fake_gradients(states: Tensor, rows: Tensor, is_sparse: bool) -> list[Tensor]:
    """What a compiler knows of the gradients; those of some rows are followed by which ones."""
    if not is_sparse:
        return [states.new_empty(states.shape), rows.new_empty(rows.shape)]
    num_used = torch.library.get_ctx().new_dynamic_size()
    used = rows.new_empty((num_used,), dtype=torch.int64)
    return [states.new_empty(states.shape), rows.new_empty((num_used, rows.shape[1])), used]


class _Walk:
    """The rows, and their gradient as it grows.

    Attributes:
        grad_rows: (M, D) float32.
    """

    def __init__(self, rows: Tensor, lines: RowIds) -> None:
        """Stores the (R, D) rows, and in which line of the gradient each has its own."""
        self.grad_rows = rows.new_zeros((lines.count, rows.shape[1]))
        self._rows, self._lines = rows, lines

    def take(
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
        # One entry more takes what padded pairs would add.
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
        return candidate_loss(margin[:-1]) * coefficients, grad_states
