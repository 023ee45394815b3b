from __future__ import annotations

import pytest
import torch

from shardrec.kernels.select import (
    best_direction,
    cpu,
    merge_topk,
    search,
    top_lowest,
    topk_rows,
)
from shardrec.kernels.select.reference import best_direction_reference, topk_rows_reference


def few_values(rows: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, (rows, width), generator=generator).float()


def one_coarse_step_apart(count: int) -> torch.Tensor:
    """Rising from 1, each with the ten bits after those of the one before."""
    return ((127 << 10) + torch.arange(count, dtype=torch.int32) << 13).view(torch.float32)


@pytest.mark.parametrize("tile", [16, 1 << 22])
@pytest.mark.parametrize("k", [1, 7, 64, 200])
@pytest.mark.parametrize("num_rows", [1, 63, 199])
def test_ties_go_to_the_lower_row(
    monkeypatch: pytest.MonkeyPatch, num_rows: int, k: int, tile: int
) -> None:
    monkeypatch.setattr(cpu, "TILE_SCORES", tile)
    queries, rows = few_values(5, 3, 0), few_values(num_rows, 3, 1)
    scores, chosen = topk_rows(queries, rows, k)
    expected_scores, expected = topk_rows_reference(queries, rows, k)
    assert torch.equal(scores, expected_scores) and torch.equal(chosen, expected)


def test_lists_brought_together_after_every_tile_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "TILE_SCORES", 200)
    monkeypatch.setattr(search, "MOST_PENDING", 1)
    queries, rows = few_values(5, 3, 0), few_values(1000, 3, 1)
    scores, chosen = topk_rows(queries, rows, 7)
    expected_scores, expected = topk_rows_reference(queries, rows, 7)
    assert torch.equal(scores, expected_scores) and torch.equal(chosen, expected)


def test_scores_that_rise_for_one_query_do_not_widen_the_lists_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "TILE_SCORES", 64 * 40)
    widths = []
    first_best = search._first_best

    def spy(scores: torch.Tensor, k: int) -> torch.Tensor:
        widths.append(scores.shape[1])
        return first_best(scores, k)

    monkeypatch.setattr(search, "_first_best", spy)
    num_rows, k = 20_000, 10
    queries, rows = torch.zeros(64, 2), torch.ones(num_rows, 2)
    queries[3, 0] = 1.0
    rows[:, 0] = one_coarse_step_apart(num_rows)
    scores, chosen = topk_rows(queries, rows, k)
    assert chosen[3].tolist() == list(range(num_rows - 1, num_rows - 1 - k, -1))
    assert chosen[0].tolist() == list(range(k)) and not scores[0].any()
    assert len(widths) > num_rows / 40 / 2 and max(widths) <= 2 * k + 40


@pytest.mark.parametrize(("num_queries", "num_rows"), [(5, 0), (0, 9), (0, 0)])
def test_no_rows_or_queries_give_empty_lists(num_queries: int, num_rows: int) -> None:
    scores, chosen = topk_rows(few_values(num_queries, 3, 0), torch.zeros(num_rows, 3), 4)
    assert scores.shape == chosen.shape == (num_queries, min(num_rows, 4))


def test_equal_scores_everywhere_keep_the_first_columns() -> None:
    _, chosen = top_lowest(torch.ones(2, 100), 5)
    assert chosen.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_merged_lists_of_shards_equal_one_list() -> None:
    queries, rows = few_values(5, 3, 0), few_values(90, 3, 1)
    parts = [topk_rows(queries, rows[a:b], 8) for a, b in ((0, 40), (40, 90))]
    scores = torch.cat([parts[1][0], parts[0][0]], dim=1)
    chosen = torch.cat([parts[1][1] + 40, parts[0][1]], dim=1)
    merged = merge_topk(scores, chosen, 8)
    expected = topk_rows_reference(queries, rows, 8)
    assert torch.equal(merged[0], expected[0]) and torch.equal(merged[1], expected[1])


@pytest.mark.parametrize("tile", [16, 1 << 22])
def test_best_direction_is_the_lower_of_equals(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr(cpu, "TILE_SCORES", tile)
    directions, rows = few_values(9, 3, 0), few_values(77, 3, 1)
    expected = best_direction_reference(directions, rows)
    assert torch.equal(best_direction(directions, rows), expected)


def normal(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tile", [16, 500, 1 << 22])
@pytest.mark.parametrize("width", [1, 20, 300])
def test_scores_are_those_of_exact_products_whatever_the_tile(
    monkeypatch: pytest.MonkeyPatch, width: int, tile: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(cpu, "TILE_SCORES", tile)
    queries, rows = normal(7, width, 0).to(dtype), normal(400, width, 1).to(dtype)
    rows[200:] = rows[:200].flip(0)
    for k in (5, 60, 400):
        scores, chosen = topk_rows(queries, rows, k)
        expected_scores, expected = topk_rows_reference(queries, rows, k)
        assert torch.equal(scores, expected_scores) and torch.equal(chosen, expected)


def test_a_score_at_the_border_of_two_coarse_ones_is_taken_exactly() -> None:
    """All rows have the score 2 but for rounding, half of them by sums that lose the last bits."""
    width = 40
    rows = torch.full((64, width), 2 / width)
    rows[1::2] *= 1 - 2**-20
    scores, chosen = topk_rows(torch.ones(1, width), rows, 64)
    expected_scores, expected = topk_rows_reference(torch.ones(1, width), rows, 64)
    assert len(expected_scores.unique()) == 2
    assert torch.equal(scores, expected_scores) and torch.equal(chosen, expected)


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-19, 1e18])
def test_vectors_of_any_length_have_lists(scale: float) -> None:
    queries, rows = few_values(5, 3, 0), few_values(90, 3, 1) * scale
    scores, chosen = topk_rows(queries, rows, 40)
    expected_scores, expected = topk_rows_reference(queries, rows, 40)
    assert torch.equal(scores, expected_scores) and torch.equal(chosen, expected)


def test_a_score_that_is_not_a_number_shows_and_infinite_ones_are_in_order() -> None:
    queries, rows = normal(3, 4, 0), normal(90, 4, 1)
    rows[7], rows[9] = torch.inf * queries[0].sign(), -torch.inf * queries[0].sign()
    queries[1] = torch.nan
    scores, chosen = topk_rows(queries[:2], rows, 5)
    assert scores[1].isnan().all() and chosen[1].tolist() == [0, 1, 2, 3, 4]
    assert scores[0, 0] == torch.inf and chosen[0, 0] == 7
    others = torch.cat([rows[:7], rows[8:9], rows[10:]])
    assert torch.equal(scores[0, 1:], topk_rows_reference(queries[:1], others, 4)[0][0])
    everything = topk_rows(queries[:1], rows, 90)
    assert everything[0][0, -1] == -torch.inf


def test_equal_directions_are_equally_good_for_any_rounding() -> None:
    directions, rows = normal(30, 50, 0), normal(2000, 50, 1)
    directions = directions[torch.arange(90) % 30]
    found = best_direction(directions, rows)
    assert int(found.max()) < 30
    assert torch.equal(found, best_direction_reference(directions, rows))
    parts = [best_direction(directions, part) for part in rows.split([1, 2, 3, 64, 1930])]
    assert torch.equal(torch.cat(parts), found)
