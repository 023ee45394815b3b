"""Selections in plain PyTorch, one tile of scores at a time."""

import math

import torch
from torch import Tensor

from shardrec.kernels.device.matmul import times_transposed
from shardrec.kernels.select.search import TopSearch

__all__ = ["best_direction", "topk_rows"]

# A tile of 2**20 scores is 4 MiB.
TILE_SCORES = 1 << 20


def topk_rows(queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(Q, k) scores and (Q, k) rows with the largest inner product, sorted, ties by lower row.

    The workspace is a tile of scores and the lists themselves, independent of R.

    Args:
        queries: (Q, D) float.
        rows: (R, D) float.
        k: Number per query; where it is above R the lists have R entries.

    Returns:
        float32 scores and int64 rows; where a score is not a number, the first rows with NaN. No
        gradient.
    """
    num_queries, num_rows = queries.shape[0], rows.shape[0]
    k = min(k, num_rows)
    queries = queries.float()
    if 0 in (num_queries, k):
        scores = queries.new_empty((num_queries, k))
        return scores, scores.long()
    tile = max(1, min(num_rows, TILE_SCORES // max(num_queries, 1)))
    search = TopSearch(num_queries, k, tile, like=queries)
    for start in range(0, num_rows, tile):
        search.add(times_transposed(rows[start : start + tile].float(), queries), start)
    best, best_rows, not_numbers = search.result()
    best[not_numbers] = math.nan
    best_rows[not_numbers] = torch.arange(k, device=rows.device)
    return best, best_rows


def best_direction(directions: Tensor, rows: Tensor) -> Tensor:
    """(R,) int64 index of the direction with the largest inner product, the lower one of equals.

    Args:
        directions: (n_b, D) float.
        rows: (R, D) float.
    """
    result = torch.empty(rows.shape[0], dtype=torch.int64, device=rows.device)
    tile = max(1, TILE_SCORES // max(directions.shape[0], 1))
    directions = directions.float()
    for start in range(0, rows.shape[0], tile):
        part = slice(start, start + tile)
        torch.argmax(times_transposed(rows[part].float(), directions), dim=1, out=result[part])
    return result
