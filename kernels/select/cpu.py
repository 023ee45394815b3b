"""Selections in plain PyTorch, one tile of scores at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from shardrec.kernels.select.search import top_lowest

__all__ = ["best_direction", "topk_rows"]

TILE_SCORES = 1 << 21
# Columns whose best score decides whether they are looked at.
GROUP = 8


def topk_rows(queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(Q, k) scores and (Q, k) rows with the largest inner product, sorted, ties by lower row.

    The workspace is a tile of 2**21 scores and the lists themselves, independent of R.

    Args:
        queries: (Q, D) float.
        rows: (R, D) float.
        k: Number per query; where it is above R the lists have R entries.

    Returns:
        float32 scores and int64 rows. No gradient.
    """
    num_queries = queries.shape[0]
    scores = torch.empty((num_queries, 0), device=rows.device)
    indices = torch.empty((num_queries, 0), dtype=torch.int64, device=rows.device)
    tile = max(GROUP, TILE_SCORES // max(num_queries, 1) // GROUP * GROUP)
    queries = queries.float()
    for start in range(0, rows.shape[0], tile):
        part = queries @ rows[start : start + tile].float().T
        found, places = _from_best_groups(part, k)
        # Earlier rows stand first, so a stable choice keeps the lower row of equals.
        scores, kept = top_lowest(torch.cat([scores, found], dim=1), k)
        indices = torch.cat([indices, places + start], dim=1).gather(1, kept)
    return scores, indices


def _from_best_groups(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and columns, ascending, of the k groups of columns with the largest maxima.

    They hold the k best columns: each group that comes before a column's own holds a better one.
    """
    num_queries, num_columns = scores.shape
    if num_columns <= GROUP * k:
        columns = torch.arange(num_columns, device=scores.device)
        return scores, columns.expand_as(scores)
    scores = F.pad(scores, (0, -num_columns % GROUP), value=-torch.inf)
    groups = scores.view(num_queries, -1, GROUP)
    best = top_lowest(groups.amax(2), k)[1].sort(1).values
    columns = best[:, :, None] * GROUP + torch.arange(GROUP, device=scores.device)
    found = groups.gather(1, best[:, :, None].expand(-1, -1, GROUP))
    return found.flatten(1), columns.flatten(1)


def best_direction(directions: Tensor, rows: Tensor) -> Tensor:
    """(R,) int64 index of the direction with the largest inner product, the lower one of equals.

    Args:
        directions: (n_b, D) float.
        rows: (R, D) float.
    """
    result = torch.empty(rows.shape[0], dtype=torch.int64, device=rows.device)
    tile = max(1, TILE_SCORES // max(directions.shape[0], 1))
    transposed = directions.float().T
    for start in range(0, rows.shape[0], tile):
        part = rows[start : start + tile].float() @ transposed
        torch.argmax(part, dim=1, out=result[start : start + tile])
    return result
