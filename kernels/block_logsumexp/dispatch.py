"""Block log-sum-exp, forward and backward: plain PyTorch or one of three Triton implementations.

In Triton one block of all positions and rows goes to ``gpu.full``, blocks of one pair to
``gpu.gathered``, and all other lists to ``gpu.listed``. These are imported on first use.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from shardrec.kernels.block_logsumexp import cpu, nearby
from shardrec.kernels.block_logsumexp.blocks import Blocks, EveryPair
from shardrec.kernels.block_logsumexp.nearby import NearbyChunks
from shardrec.kernels.block_logsumexp.schedule import is_gathered, layers, without_idle_pairs
from shardrec.kernels.device.backend import choose_backend

__all__ = ["backward", "forward"]


def forward(
    states: Tensor,
    rows: Tensor,
    blocks: Blocks | EveryPair | NearbyChunks,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the candidates of every slot, and the logit of every target.

    The workspace is one tile of logits in plain PyTorch; in Triton it is the table of tiles, and N
    float32 for each part into which a long loop is split.

    Args:
        states: (N, D) float32, bfloat16 or float16.
        rows: (R, D) of the same dtype.
        blocks: The (positions x rows) blocks to sum.
        backend: "auto", "torch" or "triton"; see ``choose_backend``.

    Returns:
        (num_slots,) float32, -inf for a slot without candidates, and (N,) float32 target logits, 0
        if the target is not among the rows.

    Collectives: none.
    """
    if choose_backend(states, backend) == "torch":
        return cpu.forward(states, rows, blocks)
    from shardrec.kernels.block_logsumexp.gpu import full, gathered, listed, targets
    from shardrec.kernels.block_logsumexp.gpu.launch import LaunchProblem

    if not (rows.numel() and states.numel()):
        empty = states.new_full((blocks.num_slots,), -torch.inf, dtype=torch.float32)
        return empty, states.new_zeros(states.shape[0], dtype=torch.float32)
    problem = LaunchProblem.of(states, rows, blocks.targets)
    target_logits = targets.forward(problem)
    if isinstance(blocks, EveryPair):
        return full.forward(problem), target_logits
    logsumexp = states.new_full((blocks.num_slots,), -torch.inf, dtype=torch.float32)
    for part in _parts(blocks):
        if is_gathered(part):
            gathered.forward(problem, part, logsumexp)
            continue
        slots = part.pair_positions if part.pair_slots is None else part.pair_slots
        for layer in layers(part, slots):
            listed.forward(problem, layer, logsumexp)
    return logsumexp, target_logits


def backward(
    states: Tensor,
    rows: Tensor,
    blocks: Blocks | EveryPair | NearbyChunks,
    logsumexp: Tensor,
    grad_logsumexp: Tensor,
    grad_target_logits: Tensor,
    grad_rows: Tensor,
    backend: str = "auto",
) -> Tensor:
    """(N, D) float32 gradient of ``states``; adds that of ``rows`` to (R, D) float32 ``grad_rows``.

    ``logsumexp`` may be over several shards, of which ``rows`` is one; the gradients are then the
    contribution of this shard. Logits are recomputed tile by tile. In Triton there are two passes,
    over tiles of positions and over tiles of rows: no atomics, one writer per element.

    Args:
        states: (N, D) float.
        rows: (R, D) float.
        blocks: The blocks of the forward pass.
        logsumexp: (num_slots,) float32 over all candidates of each slot.
        grad_logsumexp: (num_slots,) float32 gradient of the loss.
        grad_target_logits: (N,) float32 gradient of the loss.
        grad_rows: (R, D) float32 accumulator, contiguous.
        backend: "auto", "torch" or "triton"; see ``choose_backend``.

    Collectives: none.
    """
    if choose_backend(states, backend) == "torch":
        return cpu.backward(
            states, rows, blocks, logsumexp, grad_logsumexp, grad_target_logits, grad_rows
        )
    from shardrec.kernels.block_logsumexp.gpu import full, gathered, listed, targets
    from shardrec.kernels.block_logsumexp.gpu.launch import LaunchProblem, Upstream

    grad_states = torch.zeros(states.shape, dtype=torch.float32, device=states.device)
    if not (states.numel() and rows.numel()):
        return grad_states
    problem = LaunchProblem.of(states, rows, blocks.targets)
    upstream = Upstream.of(logsumexp, grad_logsumexp, states.dtype)
    if isinstance(blocks, EveryPair):
        full.states_backward(problem, upstream, grad_states)
        full.rows_backward(problem, upstream, grad_rows)
    else:
        for part in _parts(blocks):
            kept = without_idle_pairs(part, grad_logsumexp)
            if is_gathered(part):
                gathered.backward(
                    problem, part, upstream.shift, grad_logsumexp, grad_states, grad_rows
                )
                continue
            for layer in layers(kept, kept.pair_positions):
                listed.states_backward(problem, layer, upstream, grad_states)
            listed.rows_backward(problem, kept, upstream, grad_rows)
    targets.backward(problem, grad_target_logits, grad_states, grad_rows)
    return grad_states


def _parts(blocks: Blocks | NearbyChunks) -> Iterator[Blocks]:
    """The blocks as one part; nearby chunks as several parts in which no position occurs twice."""
    parts = [blocks] if isinstance(blocks, Blocks) else blocks.parts(nearby.GPU_ROWS_AT_ONCE)
    return (part for part in parts if part.num_blocks)
