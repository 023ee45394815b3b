"""The Triton kernels of draws and selections against their definitions."""

from typing import Any

import pytest
import torch
from torch import Tensor

from shardrec.kernels import negatives, select
from shardrec.kernels.select import search
from shardrec.kernels.select.reference import best_direction_reference, topk_rows_reference

SEEDS = (0, 1, 12345678901234567890, (1 << 64) - 1, 1 << 31)


def normal(lines: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(lines, width, generator=torch.Generator().manual_seed(seed))


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def exact(lines: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Multiples of 1/8: sums of their products have no rounding in float32, in any order."""
    return (normal(lines, width, seed) * 8).round().div(8).to(dtype)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bound", [1, 1000, 2**31 - 1])
def test_draws_are_bit_equal(seed: int, bound: int) -> None:
    blocks = torch.tensor([0, 1, 77, 2**31 + 5, 2**32 - 1])
    where: dict[str, Any] = {"seed": seed, "step": 2**31 + 7, "stream": 3}
    drawn = [
        negatives.draw_below(bound, blocks, 523, **where, backend=backend)
        for backend in ("torch", "triton")
    ]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("num_draws", [0, 1, 2, 513])
def test_any_number_of_draws(num_draws: int) -> None:
    where: dict[str, Any] = {"seed": 5, "step": 1, "stream": negatives.STREAM_NEGATIVES}
    drawn = [
        negatives.draw_below(97, torch.arange(3), num_draws, **where, backend=backend)
        for backend in ("torch", "triton")
    ]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("width", [1, 8, 127, 129, 300])
def test_signs_are_bit_equal(width: int) -> None:
    where: dict[str, Any] = {"seed": 1 << 40, "step": 9, "stream": negatives.STREAM_MIX}
    expected = negatives.random_signs(1 << 30, 19, width, **where)
    found = negatives.random_signs(1 << 30, 19, width, **where, backend="triton")
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n,columns,width", [(0, 5, 8), (1, 1, 8), (70, 130, 20), (129, 33, 68)])
def test_mixed_states_equal_the_stored_signs(
    n: int, columns: int, width: int, dtype: torch.dtype
) -> None:
    states = normal(n, width).to(dtype)
    where: dict[str, Any] = {"seed": 3, "step": 4, "stream": negatives.STREAM_MIX}
    found = negatives.mixed_signs(states, 1000, columns, **where, backend="triton")
    signs = negatives.random_signs(1000, n, columns, **where)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, signs.T @ states.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [4, 260])
def test_mixed_states_of_any_width(width: int, dtype: torch.dtype) -> None:
    states = exact(40, width, dtype)
    where: dict[str, Any] = {"seed": 3, "step": 4, "stream": negatives.STREAM_MIX}
    found = negatives.mixed_signs(states, 7, 9, **where, backend="triton")
    assert torch.equal(found, negatives.random_signs(7, 40, 9, **where).T @ states.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [4, 20, 64, 260])
def test_the_best_sign_direction_equals_the_stored_one(width: int, dtype: torch.dtype) -> None:
    vectors = exact(75, width, dtype)
    where: dict[str, Any] = {"seed": 3, "step": 4, "stream": negatives.STREAM_HASH}
    found = select.best_sign_direction(vectors, 77, **where, backend="triton")
    signs = negatives.random_signs(0, 77, width, **where)
    assert torch.equal(found, best_direction_reference(signs, vectors.float()))
    assert torch.equal(found, select.best_sign_direction(vectors, 77, **where, backend="torch"))


def test_of_equal_directions_the_lower_one_is_best() -> None:
    vectors = torch.zeros(5, 8)
    vectors[1, 0] = 1.0
    where: dict[str, Any] = {"seed": 3, "step": 4, "stream": 0}
    found = select.best_sign_direction(vectors, 70, **where, backend="triton")
    first_plus = int((negatives.random_signs(0, 70, 8, **where)[:, 0] > 0).nonzero()[0])
    assert found.tolist() == [0, first_plus, 0, 0, 0]


@pytest.mark.parametrize("r,k", [(1, 1), (5, 9), (40, 1), (333, 7), (333, 40), (400, 24)])
def test_topk_equals_the_definition(r: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "KEYS_AT_ONCE", 256)
    queries, rows = normal(9, 20), normal(r, 20, seed=1)
    scores, found = select.topk_rows(queries, rows, k, backend="triton")
    true_scores, true_rows = topk_rows_reference(queries, rows, k)
    assert torch.equal(found, true_rows)
    torch.testing.assert_close(scores, true_scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 68, 260])
def test_topk_of_any_width_and_dtype(
    width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact scores, many of them equal at the smallest width."""
    monkeypatch.setattr(search, "KEYS_AT_ONCE", 256)
    queries, rows = exact(5, width, dtype), exact(400, width, dtype, seed=1)
    scores, found = select.topk_rows(queries, rows, 7, backend="triton")
    true_scores, true_rows = topk_rows_reference(queries, rows, 7)
    assert scores.dtype is torch.float32 and torch.equal(found, true_rows)
    assert torch.equal(scores, true_scores)


def test_topk_of_equal_rows_takes_the_lower_ones() -> None:
    """Rows repeated in and across groups, so that the border of k runs through equals."""
    queries = normal(4, 12)
    rows = normal(10, 12, seed=1)[torch.arange(300) * 7 % 10]
    _, found = select.topk_rows(queries, rows, 35, backend="triton")
    assert torch.equal(found, select.topk_rows(queries, rows, 35, backend="torch")[1])


def test_what_no_kernel_wrote_would_show() -> None:
    for result in (torch.empty(2), torch.empty_like(torch.ones(2)), torch.ones(1).new_empty(2)):
        assert result.isnan().all()
    assert torch.ones(1).new_empty(2, dtype=torch.int64).tolist() == [-(1 << 62)] * 2


@pytest.mark.parametrize("q,r,k", [(0, 5, 2), (3, 0, 2), (3, 5, 0)])
def test_topk_of_nothing(q: int, r: int, k: int) -> None:
    scores, found = select.topk_rows(normal(q, 8), normal(r, 8), k, backend="triton")
    assert scores.shape == found.shape == (q, min(k, r))
