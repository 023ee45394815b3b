"""Chooses the Triton kernels for a list of blocks: full, gathered (one pair a block) or listed."""

from dataclasses import replace

import torch
from torch import Tensor

from shardrec.kernels.block_logsumexp import nearby
from shardrec.kernels.block_logsumexp.blocks import Blocks
from shardrec.kernels.block_logsumexp.gpu import full, gathered, listed
from shardrec.kernels.block_logsumexp.gpu.launch import LaunchProblem, Upstream
from shardrec.kernels.block_logsumexp.nearby import NearbyChunks
from shardrec.kernels.block_logsumexp.schedule import (
    is_full,
    is_gathered,
    layers,
    without_idle_pairs,
)

__all__ = ["backward", "forward"]


def forward(states: Tensor, rows: Tensor, blocks: Blocks | NearbyChunks) -> tuple[Tensor, Tensor]:
    """(num_slots,) log-sum-exps and (N,) target logits, float32; see the package's function.

    The workspace is N floats for each part that a long loop is cut into, and the table of tiles;
    of nearby chunks a part of the list too.
    """
    target_logits = _target_logits(states, rows, blocks.targets)
    logsumexp = states.new_full((blocks.num_slots,), -torch.inf, dtype=torch.float32)
    if isinstance(blocks, NearbyChunks):
        if rows.numel() and states.numel():
            for part in blocks.parts(nearby.GPU_ROWS_AT_ONCE):
                listed.forward(LaunchProblem.of(states, rows, part), logsumexp)
        return logsumexp, target_logits
    problem = LaunchProblem.of(states, rows, blocks)
    if problem.is_empty:
        return logsumexp, target_logits
    if is_full(blocks):
        return full.forward(problem), target_logits
    if is_gathered(blocks):
        gathered.forward(states, rows, blocks, logsumexp)
        return logsumexp, target_logits
    slots = blocks.pair_positions if blocks.pair_slots is None else blocks.pair_slots
    for layer in layers(blocks, slots):
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
) -> Tensor:
    """(N, D) float32 gradient of ``states``; adds that of ``rows`` to (R, D) float32 ``grad_rows``.

    Two passes, one that owns states and one that owns rows; no atomics, one writer per element.
    """
    grad_states = torch.zeros(states.shape, dtype=torch.float32, device=states.device)
    if states.numel() and rows.numel():
        upstream = Upstream.of(logsumexp, grad_logsumexp, states.dtype)
        if isinstance(blocks, NearbyChunks):
            for part in blocks.parts(nearby.GPU_ROWS_AT_ONCE):
                problem = LaunchProblem.of(states, rows, part)
                listed.states_backward(problem, upstream, grad_states)
                listed.rows_backward(problem, upstream, grad_rows)
        else:
            problem = LaunchProblem.of(states, rows, without_idle_pairs(blocks, grad_logsumexp))
            _blocks_backward(problem, upstream, grad_logsumexp, grad_states, grad_rows)
    if rows.shape[0]:
        found = rows[blocks.targets.clamp(min=0)].float().mul_(grad_target_logits[:, None])
        grad_states += found.masked_fill_((blocks.targets < 0)[:, None], 0.0)
        listed.add_rows(states.contiguous(), grad_target_logits, blocks.targets, grad_rows)
    return grad_states


def _blocks_backward(
    problem: LaunchProblem,
    upstream: Upstream,
    grad_logsumexp: Tensor,
    grad_states: Tensor,
    grad_rows: Tensor,
) -> None:
    blocks = problem.blocks
    if problem.is_empty:
        return
    if is_full(blocks):
        full.states_backward(problem, upstream, grad_states)
        full.rows_backward(problem, upstream, grad_rows)
    elif is_gathered(blocks):
        gathered.backward(
            problem.states,
            problem.rows,
            blocks,
            upstream.shift,
            grad_logsumexp,
            grad_states,
            grad_rows,
        )
    else:
        for layer in layers(blocks, blocks.pair_positions):
            listed.states_backward(replace(problem, blocks=layer), upstream, grad_states)
        listed.rows_backward(problem, upstream, grad_rows)


def _target_logits(states: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    if not rows.shape[0]:
        return states.new_zeros(states.shape[0], dtype=torch.float32)
    found = rows[targets.clamp(min=0)].float()
    return torch.where(targets >= 0, torch.linalg.vecdot(states.float(), found), 0.0)
