"""A table with more than 2**31 elements, of which only the pages that are touched take memory."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from tests.kernels.block_lists import by_autograd
from tests.tolerance import assert_as_close_as_eager
from torch import Tensor

from shardrec.kernels import block_logsumexp, sampled_cross_entropy
from shardrec.kernels.block_logsumexp import Blocks
from shardrec.kernels.negatives import STREAM_NEGATIVES, Uniform
from shardrec.kernels.reference import sampled_cross_entropy_reference

__all__ = [
    "FIRST",
    "NUM_ITEMS",
    "NUM_LAST",
    "NUM_POSITIONS",
    "WIDTH",
    "check_blocks",
    "check_sampled",
    "last_rows",
    "lazy_table",
]

NUM_ITEMS, WIDTH = (1 << 28) + 24, 8
NUM_LAST, NUM_POSITIONS = 40, 11
FIRST = NUM_ITEMS - NUM_LAST
# A flag of Linux that the module names from Python 3.13 on.
_NO_RESERVE = 0x4000
_MOST_TOUCHED = 256 << 20


def lazy_table() -> Tensor:
    """(2**28 + 24, 8) float32 of zeros."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    memory = mmap.mmap(-1, NUM_ITEMS * WIDTH * 4, flags=flags)
    return torch.frombuffer(memory, dtype=torch.float32).view(NUM_ITEMS, WIDTH)


def last_rows() -> tuple[Tensor, Tensor]:
    """(N, D) states and the (40, D) last rows of a table; 24 of them are above element 2**31."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(NUM_POSITIONS, WIDTH, generator=generator)
    return states, torch.randn(NUM_LAST, WIDTH, generator=generator)


def check_blocks(kind: str, backend: str) -> None:
    """Value and all gradients of lists of the last rows equal those of a table of them alone."""
    before = _resident_bytes()
    states, last = last_rows()
    table, grad_rows = lazy_table(), lazy_table()
    table[FIRST:] = last
    near, grads = _blocks(kind, 0), torch.rand(2, NUM_POSITIONS)
    truth = by_autograd(states, last, near, torch.float64, (grads[0], grads[1]))
    eager = by_autograd(states, last, near, torch.float32, (grads[0], grads[1]))
    blocks = _blocks(kind, FIRST)
    logsumexp, target_logits = block_logsumexp.forward(states, table, blocks, backend)
    grad_logsumexp, grad_target_logits = grads
    grad_states = block_logsumexp.backward(
        states, table, blocks, logsumexp, grad_logsumexp, grad_target_logits, grad_rows, backend
    )
    ours = [logsumexp, target_logits, grad_states, grad_rows[FIRST:]]
    for mine, theirs, right in zip(ours, eager, truth, strict=True):
        assert_as_close_as_eager(mine, theirs, right)
    assert truth[3][-1].any(), "the very last row has a gradient"
    assert not grad_rows[: NUM_LAST + 1].any(), "no offset wrapped round"
    assert _resident_bytes() - before < _MOST_TOUCHED


def check_sampled(share: int, backend: str) -> None:
    """The public loss with its sparse gradient: negatives are zeros, targets the last rows."""
    before = _resident_bytes()
    states, last = last_rows()
    table = lazy_table()
    table[FIRST:] = last
    targets = torch.arange(NUM_LAST - NUM_POSITIONS, NUM_LAST)
    leaf, whole = states.clone().requires_grad_(), table.requires_grad_()
    loss = sampled_cross_entropy(
        leaf,
        whole,
        FIRST + targets,
        num_negatives=7,
        share=share,
        seed=1,
        sparse_grad=True,
        backend=backend,
    )
    loss.backward()
    exact, rows = (part.double().requires_grad_() for part in (states, last))
    drawn = Uniform(NUM_ITEMS).draw(torch.arange(9), 9, seed=1, step=0, stream=STREAM_NEGATIVES)
    assert drawn.max() < FIRST, "all negatives are rows of zeros"
    zeros = torch.full((NUM_POSITIONS, 7), NUM_LAST)
    corrections = torch.full(zeros.shape, 7 / NUM_ITEMS, dtype=torch.float64).log()
    padded = torch.cat([rows, rows.new_zeros(1, WIDTH)])
    truth = sampled_cross_entropy_reference(exact, padded, targets, zeros, corrections).mean()
    truth.backward()
    assert whole.grad is not None and leaf.grad is not None and whole.grad.is_sparse
    sparse = whole.grad.coalesce()
    is_last = sparse.indices()[0] >= FIRST
    found = torch.zeros(NUM_LAST, WIDTH)
    found[sparse.indices()[0][is_last] - FIRST] = sparse.values()[is_last]
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0.0)
    for mine, right in ((found, rows.grad), (leaf.grad, exact.grad)):
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-8)
    assert _resident_bytes() - before < _MOST_TOUCHED


def _blocks(kind: str, first: int) -> Blocks:
    """Two lists of rows from ``first`` on, or one for each position; the last row is in one."""
    generator = torch.Generator().manual_seed(1)
    num_blocks = NUM_POSITIONS if kind == "gathered" else 2
    items = torch.randint(0, NUM_LAST, (num_blocks, 21), generator=generator)
    items[-1, -1] = NUM_LAST - 1
    starts = torch.arange(num_blocks) * 21
    pair_starts = torch.arange(num_blocks + 1) if kind == "gathered" else torch.tensor([0, 4, 11])
    return Blocks(
        pair_positions=torch.randperm(NUM_POSITIONS, generator=generator),
        pair_starts=pair_starts,
        items=items.flatten() + first,
        item_starts=starts,
        item_ends=starts + 21,
        targets=torch.arange(NUM_LAST - NUM_POSITIONS - 1, NUM_LAST - 1) + first,
        num_slots=NUM_POSITIONS,
        offsets=torch.rand(21 * num_blocks, generator=generator) if kind == "offsets" else None,
    )


def _resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))
