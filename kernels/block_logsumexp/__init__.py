"""Log-sum-exp over a list of blocks of the logit matrix, without its logits in memory."""

from typing import Any

import torch
from torch import Tensor

from shardrec.kernels.block_logsumexp import cpu
from shardrec.kernels.block_logsumexp.blocks import (
    Blocks,
    Rounds,
    compact_rows,
    every_pair,
    local_rows,
)

__all__ = [
    "Blocks",
    "Rounds",
    "backward",
    "block_logsumexp",
    "compact_rows",
    "every_pair",
    "forward",
    "local_rows",
]


def block_logsumexp(states: Tensor, rows: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the candidates of every slot, and the logit of every target.

    The workspace is one tile of logits; backward computes the tiles again.

    Args:
        states: (N, D) float32, bfloat16 or float16.
        rows: (R, D) of the same dtype.
        blocks: The (positions x rows) blocks that count.

    Returns:
        (num_slots,) float32, -inf for a slot without candidates, and (N,) float32 target logits, 0
        where the target is not among the rows. Gradients flow to ``states`` and ``rows`` in their
        dtype; they are accumulated in float32.

    Collectives: none.
    """
    return _BlockLogsumexp.apply(states, rows, blocks)  # type: ignore[no-any-return]


def forward(states: Tensor, rows: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """The two results of :func:`block_logsumexp`, outside of autograd."""
    return cpu.forward(states, rows, blocks)


def backward(
    states: Tensor,
    rows: Tensor,
    blocks: Blocks,
    logsumexp: Tensor,
    grad_logsumexp: Tensor,
    grad_target_logits: Tensor,
) -> tuple[Tensor, Tensor]:
    """(N, D) and (R, D) float32 gradients of ``states`` and ``rows``.

    ``logsumexp`` may be a total over several shards, of which ``rows`` is one; the result is then the
    share of this shard.
    """
    return cpu.backward(states, rows, blocks, logsumexp, grad_logsumexp, grad_target_logits)


class _BlockLogsumexp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, rows: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
        logsumexp, target_logits = forward(states, rows, blocks)
        ctx.save_for_backward(states, rows, logsumexp)
        ctx.blocks = blocks
        return logsumexp, target_logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_logsumexp: Tensor, grad_target_logits: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        states, rows, logsumexp = ctx.saved_tensors
        grad_states, grad_rows = backward(
            states, rows, ctx.blocks, logsumexp, grad_logsumexp, grad_target_logits
        )
        return grad_states.to(states.dtype), grad_rows.to(rows.dtype), None
