"""Any shapes and any lists of blocks: the operations on a CPU equal their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.block_lists import by_autograd
from torch import Tensor

from shardrec.kernels.block_logsumexp import Blocks, cpu
from shardrec.kernels.block_logsumexp.cpu_tiles import CpuTiles
from shardrec.kernels.select import best_direction, merge_topk, topk_rows
from shardrec.kernels.select import cpu as select_cpu
from shardrec.kernels.select.reference import best_direction_reference, topk_rows_reference

# The same examples each time, so that a failure is there again.
quick = settings(derandomize=True, max_examples=60, deadline=None, database=None)


def numbers(draw: st.DrawFn, low: int, high: int, size: int) -> Tensor:
    values = draw(st.lists(st.integers(low, high), min_size=size, max_size=size))
    return torch.tensor(values, dtype=torch.int64)


@st.composite
def block_lists(draw: st.DrawFn) -> tuple[Tensor, Tensor, Blocks]:
    """States, rows, and blocks that are empty, overlap, repeat rows or leave positions out."""
    num_positions, num_rows = draw(st.integers(1, 12)), draw(st.integers(1, 20))
    width, num_blocks = draw(st.integers(1, 9)), draw(st.integers(0, 5))
    num_entries = draw(st.integers(0, 30))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    scale = draw(st.sampled_from([0.1, 1.0, 30.0]))
    states = torch.randn(num_positions, width, generator=generator) * scale
    rows = torch.randn(num_rows, width, generator=generator)
    num_pairs = draw(st.integers(0, num_positions))
    cuts = numbers(draw, 0, num_pairs, max(num_blocks - 1, 0)).sort().values
    ends = torch.tensor([num_pairs] if num_blocks else [], dtype=torch.int64)
    bounds = numbers(draw, 0, num_entries, 2 * num_blocks).view(2, num_blocks).sort(0).values
    has_slots = draw(st.booleans())
    blocks = Blocks(
        pair_positions=torch.randperm(num_positions, generator=generator)[:num_pairs],
        pair_starts=torch.cat([torch.zeros(1, dtype=torch.int64), cuts, ends]),
        items=numbers(draw, 0, num_rows - 1, num_entries),
        item_starts=bounds[0],
        item_ends=bounds[1],
        targets=numbers(draw, -1, num_rows - 1, num_positions),
        num_slots=num_pairs + 2 if has_slots else num_positions,
        pair_slots=torch.randperm(num_pairs, generator=generator) + 1 if has_slots else None,
        offsets=torch.randn(num_entries, generator=generator) if draw(st.booleans()) else None,
    )
    return states, rows, blocks


@quick
@given(problem=block_lists(), tile=st.sampled_from([4, 64, 1 << 20]), piece=st.integers(1, 9))
def test_any_list_of_blocks_gives_its_log_sum_exps_and_gradients(
    problem: tuple[Tensor, Tensor, Blocks], tile: int, piece: int
) -> None:
    states, rows, blocks = problem
    generator = torch.Generator().manual_seed(0)
    grads = (
        torch.rand(blocks.num_slots, generator=generator),
        torch.rand(len(states), generator=generator),
    )
    truth = by_autograd(states, rows, blocks, torch.float64, grads)
    tiles = CpuTiles(logits=tile, positions=1024, items=min(piece, tile), floats=tile, wide_rows=1)
    logsumexp, target_logits = cpu.forward(states, rows, blocks, tiles)
    grad_rows = torch.zeros_like(rows)
    grad_states = cpu.backward(
        states, rows, blocks, logsumexp, grads[0], grads[1], grad_rows, tiles
    )
    assert torch.equal(logsumexp.isfinite(), truth[0].isfinite())
    # A log-sum-exp is stored as one float, so a share is as exact as that float's last bit.
    slack = 4e-6 * max(1.0, float((states @ rows.T).abs().max()))
    for found, right in zip((logsumexp, target_logits, grad_states, grad_rows), truth, strict=True):
        largest = (
            max(1.0, float(right.nan_to_num(neginf=0.0).abs().amax())) if right.numel() else 1.0
        )
        torch.testing.assert_close(found.double(), right, rtol=0, atol=slack * largest)


@st.composite
def lattices(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Vectors of few whole numbers, so that many products are equal and all are exact."""
    width = draw(st.integers(1, 5))
    sizes = draw(st.integers(1, 6)), draw(st.integers(0, 90))
    seed = draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    first, second = (
        torch.randint(-2, 3, (size, width), generator=generator).float() for size in sizes
    )
    return first, second


@quick
@given(vectors=lattices(), k=st.integers(1, 40), tile=st.sampled_from([16, 100, 1 << 21]))
def test_any_top_k_is_sorted_and_of_equals_takes_the_lower_rows(
    vectors: tuple[Tensor, Tensor], k: int, tile: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select_cpu, "TILE_SCORES", tile)
        found: Any = topk_rows(*vectors, k)
    for ours, expected in zip(found, topk_rows_reference(*vectors, k), strict=True):
        assert torch.equal(ours, expected)


@quick
@given(vectors=lattices(), k=st.integers(1, 20), cuts=st.lists(st.integers(0, 90), max_size=3))
def test_lists_of_any_shards_merge_into_the_list_of_the_whole(
    vectors: tuple[Tensor, Tensor], k: int, cuts: list[int]
) -> None:
    queries, rows = vectors
    borders = sorted({0, len(rows), *(min(cut, len(rows)) for cut in cuts)})
    lists = [(torch.empty(len(queries), 0), torch.empty((len(queries), 0), dtype=torch.int64))]
    for start, end in zip(borders, borders[1:], strict=False):
        scores, places = topk_rows(queries, rows[start:end], k)
        lists.insert(0, (scores, places + start))
    scores, places = (torch.cat(parts, dim=1) for parts in zip(*lists, strict=True))
    found = merge_topk(scores, places, k)
    for ours, expected in zip(found, topk_rows_reference(queries, rows, k), strict=True):
        assert torch.equal(ours, expected)


@quick
@given(vectors=lattices(), tile=st.sampled_from([16, 100, 1 << 21]))
def test_the_best_of_any_directions_is_the_lower_of_equals(
    vectors: tuple[Tensor, Tensor], tile: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select_cpu, "TILE_SCORES", tile)
        found = best_direction(*vectors)
    assert torch.equal(found, best_direction_reference(*vectors))
