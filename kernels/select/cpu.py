"""Selections in plain PyTorch, one tile of scores at a time."""

import math

import torch
from torch import Tensor

from shardrec.kernels.device.matmul import times_transposed
from shardrec.kernels.select.coarse import Pairs, lengths, rounding
from shardrec.kernels.select.search import TopSearch

__all__ = ["best_direction", "topk_rows"]

# A tile of 2**20 scores is 4 MiB.
TILE_SCORES = 1 << 20


def topk_rows(queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(Q, k) coarse scores and (Q, k) rows of the largest, sorted, ties by lower row.

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
    slack = lengths(queries) * rounding(queries.shape[1])
    for start in range(0, num_rows, tile):
        part = rows[start : start + tile].float()
        pairs = Pairs(queries, slack, part, lengths(part))
        search.add(times_transposed(part, queries), start, pairs)
    best, best_rows, not_numbers = search.result()
    best[not_numbers] = math.nan
    best_rows[not_numbers] = torch.arange(k, device=rows.device)
    return best, best_rows


def best_direction(directions: Tensor, rows: Tensor) -> Tensor:
    """(R,) int64 index of the direction with the largest inner product, the lower one of equals.

    Where rounding could decide, products are taken in float64, so that equal rows have the same
    direction and equal directions are equally good.

    Args:
        directions: (n_b, D) float.
        rows: (R, D) float.
    """
    result = torch.empty(rows.shape[0], dtype=torch.int64, device=rows.device)
    tile = max(1, TILE_SCORES // max(directions.shape[0], 1))
    directions = directions.float()
    slack = 2 * rounding(rows.shape[1]) * lengths(directions).amax()
    for start in range(0, rows.shape[0], tile):
        part = rows[start : start + tile].float()
        scores = times_transposed(part, directions)
        best = scores.argmax(1, keepdim=True)
        ahead = scores.gather(1, best) - scores.scatter_(1, best, -math.inf).amax(1, keepdim=True)
        close = (ahead[:, 0] < slack * lengths(part)).nonzero()[:, 0]
        best[close] = _best_in_float64(directions, part[close])
        result[start : start + tile] = best[:, 0]
    return result


def _best_in_float64(directions: Tensor, rows: Tensor) -> Tensor:
    """(R, 1) the best directions by products that equal vectors have in common."""
    return (rows.double() @ directions.double().T).float().argmax(1, keepdim=True)
