"""Block log-sum-exp, forward and backward: plain PyTorch or one of three Triton implementations.

In Triton one block of all positions and rows goes to ``gpu.full``, blocks of one pair to
``gpu.gathered``, and all other lists to ``gpu.listed``. These are imported on first use.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from shardrec.kernels.block_logsumexp import cpu, nearby
from shardrec.kernels.block_logsumexp.blocks import Blocks
from shardrec.kernels.block_logsumexp.nearby import NearbyChunks
from shardrec.kernels.block_logsumexp.schedule import (
    is_full,
    is_gathered,
    layers,
    without_idle_pairs,
)
from shardrec.kernels.device.backend import choose_backend

__all__ = ["backward", "forward"]


def forward(
    states: Tensor, rows: Tensor, blocks: Blocks | NearbyChunks, backend: str = "auto"
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
    from shardrec.kernels.block_logsumexp.gpu import full, gathered, listed
    from shardrec.kernels.block_logsumexp.gpu.launch import LaunchProblem

    target_logits = _target_logits(states, rows, blocks.targets)
    logsumexp = states.new_full((blocks.num_slots,), -torch.inf, dtype=torch.float32)
    if not (rows.numel() and states.numel()):
        return logsumexp, target_logits
    for part in _parts(blocks):
        problem = LaunchProblem.of(states, rows, part)
        if problem.is_empty:
            continue
        if is_full(part):
            logsumexp = full.forward(problem)
        elif is_gathered(part):
            gathered.forward(states, rows, part, logsumexp)
        else:
            slots = part.pair_positions if part.pair_slots is None else part.pair_slots
            for layer in _layers(blocks, part, slots):
                listed.forward(replace(problem, blocks=layer), logsumexp)
    return logsumexp, target_logits


def backward(
    states: Tensor,
    rows: Tensor,
    blocks: Blocks | NearbyChunks,
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
    from shardrec.kernels.block_logsumexp.gpu import full, gathered, listed
    from shardrec.kernels.block_logsumexp.gpu.launch import LaunchProblem, Upstream

    grad_states = torch.zeros(states.shape, dtype=torch.float32, device=states.device)
    if states.numel() and rows.numel():
        upstream = Upstream.of(logsumexp, grad_logsumexp, states.dtype)
        for part in _parts(blocks):
            problem = LaunchProblem.of(states, rows, without_idle_pairs(part, grad_logsumexp))
            if problem.is_empty:
                continue
            if is_full(part):
                full.states_backward(problem, upstream, grad_states)
                full.rows_backward(problem, upstream, grad_rows)
            elif is_gathered(part):
                gathered.backward(
                    problem.states,
                    problem.rows,
                    part,
                    upstream.shift,
                    grad_logsumexp,
                    grad_states,
                    grad_rows,
                )
            else:
                for layer in _layers(blocks, problem.blocks, problem.blocks.pair_positions):
                    listed.states_backward(replace(problem, blocks=layer), upstream, grad_states)
                listed.rows_backward(problem, upstream, grad_rows)
    if rows.shape[0]:
        found = rows[blocks.targets.clamp(min=0)].float().mul_(grad_target_logits[:, None])
        grad_states += found.masked_fill_((blocks.targets < 0)[:, None], 0.0)
        listed.add_rows(states.contiguous(), grad_target_logits, blocks.targets, grad_rows)
    return grad_states


def _parts(blocks: Blocks | NearbyChunks) -> Iterator[Blocks]:
    """The blocks as one part; nearby chunks as several parts in which no position occurs twice."""
    if isinstance(blocks, Blocks):
        return iter((blocks,))
    return blocks.parts(nearby.GPU_ROWS_AT_ONCE)


def _layers(blocks: Blocks | NearbyChunks, part: Blocks, keys: Tensor | None) -> Iterator[Blocks]:
    """Layers of a part in which no key occurs twice; a part of nearby chunks is one layer."""
    return layers(part, keys) if isinstance(blocks, Blocks) else iter((part,))


def _target_logits(states: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    if not rows.shape[0]:
        return states.new_zeros(states.shape[0], dtype=torch.float32)
    found = rows[targets.clamp(min=0)].float()
    return torch.where(targets >= 0, torch.linalg.vecdot(states.float(), found), 0.0)
