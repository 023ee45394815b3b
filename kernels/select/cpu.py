"""The selections in plain PyTorch, with one tile of scores in memory at a time."""

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
    """(Q, k) coarse scores and (Q, k) rows of largest inner product, best first; ties: lower row.

    The workspace is a tile of scores and the lists, independent of R.

    Args:
        queries: (Q, D) float.
        rows: (R, D) float.
        k: Rows per query; above R the lists have R entries.

    Returns:
        float32 scores and int64 rows; a query with any NaN score gets rows 0 to k - 1 with score
        NaN. No gradient.
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
    """(R,) int64 direction of largest inner product with each row; ties: the lower direction.

    If rounding could change the result, inner products are recomputed in float64, so that equal
    rows get the same direction and equal directions tie.

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
    """(R, 1) int64 best direction of each row by inner products computed in float64."""
    return (rows.double() @ directions.double().T).float().argmax(1, keepdim=True)
