"""Rows above element 2**31 of a table: every kernel that reads or writes rows, interpreted.

Kernels that would go over the whole table are launched for its end alone.
"""

import pytest
import torch
from tests.kernels.huge_table import (
    FIRST,
    NUM_ITEMS,
    NUM_LAST,
    NUM_POSITIONS,
    WIDTH,
    check_blocks,
    check_sampled,
    last_rows,
    lazy_table,
)
from torch import Tensor

from shardrec.kernels.block_logsumexp import EveryPair
from shardrec.kernels.block_logsumexp.gpu import full as gpu_full
from shardrec.kernels.block_logsumexp.reference import block_logsumexp_reference
from shardrec.kernels.select import gpu as select_gpu
from shardrec.kernels.select.coarse import coarse
from shardrec.kernels.select.reference import topk_rows_reference

TILE = {"POSITIONS": 16, "ITEMS": 16, "WIDTH": 16, "ALIGN": 8, "PRECISION": "ieee", "HOLD": True}


@pytest.mark.parametrize("kind", ["listed", "offsets", "gathered"])
def test_lists_of_the_last_rows_of_a_huge_table(kind: str) -> None:
    check_blocks(kind, "triton")


@pytest.mark.parametrize("share", [1, 4])
def test_targets_at_the_end_of_a_huge_table(share: int) -> None:
    check_sampled(share, "triton")


def filled_table() -> tuple[Tensor, Tensor, Tensor]:
    """States, the last rows, and the huge table that ends with them."""
    states, last = last_rows()
    table = lazy_table()
    table[FIRST:] = last
    return states, last, table


def test_the_full_softmax_over_the_end_of_a_huge_table() -> None:
    states, last, table = filled_table()
    targets = torch.arange(NUM_POSITIONS) + NUM_LAST - NUM_POSITIONS
    leaf, rows = (part.double().requires_grad_() for part in (states, last))
    true_logsumexp, _ = block_logsumexp_reference(leaf, rows, EveryPair(NUM_LAST, targets))
    true_states, true_rows = torch.autograd.grad(true_logsumexp.sum(), (leaf, rows))
    inputs = (states, table, targets + FIRST)
    sizes = (NUM_POSITIONS, FIRST, NUM_ITEMS, WIDTH)
    logsumexp = torch.full((1, NUM_POSITIONS), torch.nan)
    gpu_full.full_forward_kernel[(1, 1)](*inputs, logsumexp, *sizes, **TILE)
    upstream = (logsumexp[0], torch.ones(NUM_POSITIONS), torch.ones(1))
    grad_states, grad_rows = torch.zeros(1, NUM_POSITIONS, WIDTH), lazy_table()
    gpu_full.full_states_backward_kernel[(1, 1, 1)](
        *inputs, *upstream, grad_states, *sizes, OUT=16, **TILE
    )
    gpu_full.full_rows_backward_kernel[(3, 1, 1)](
        *inputs, *upstream, grad_rows, *sizes, OUT=16, **TILE
    )
    for mine, right in (
        (logsumexp[0], true_logsumexp.detach()),
        (grad_states[0], true_states),
        (grad_rows[FIRST:], true_rows),
    ):
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-6)
    assert not grad_rows[: NUM_LAST + 1].any(), "no offset wrapped round"


def test_the_best_rows_at_the_end_of_a_huge_table() -> None:
    queries, last, table = filled_table()
    first_group = FIRST // 16
    shift = FIRST - first_group * 16  # the first of these groups begins with rows of zeros
    keys = select_gpu._group_keys(queries, table, first_group, 3)
    padded = torch.cat([torch.zeros(shift, WIDTH), last])
    lines = (queries @ padded.T).split(16, dim=1)
    expected = torch.stack([line.amax(1) for line in lines], dim=1)
    torch.testing.assert_close(select_gpu._scores_of(keys), coarse(expected))
    groups = first_group + torch.arange(3).expand(NUM_POSITIONS, -1)
    assert torch.equal(select_gpu._index_of(keys), groups)
    best = select_gpu._row_keys(queries, table, groups).topk(5).values
    scores, found = select_gpu._scores_of(best), select_gpu._index_of(best)
    true_scores, true_rows = topk_rows_reference(queries, padded, 5)
    torch.testing.assert_close(scores, true_scores)
    assert torch.equal(found, true_rows + first_group * 16)
