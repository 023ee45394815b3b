"""Selections in plain PyTorch, one tile of scores at a time."""

import torch
from torch import Tensor

__all__ = ["best_direction", "stable_topk", "topk_rows"]

TILE_SCORES = 1 << 21


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
    scores = torch.empty((num_queries, 0), dtype=torch.float32, device=rows.device)
    indices = torch.empty((num_queries, 0), dtype=torch.int64, device=rows.device)
    tile = max(2 * k, TILE_SCORES // max(num_queries, 1))
    queries = queries.float()
    for start in range(0, rows.shape[0], tile):
        part = queries @ rows[start : start + tile].float().T
        part_scores, part_indices = stable_topk(part, min(k, part.shape[1]))
        # Earlier rows stand first, so a stable choice keeps the lower row of equals.
        scores = torch.cat([scores, part_scores], dim=1)
        indices = torch.cat([indices, part_indices + start], dim=1)
        scores, kept = stable_topk(scores, min(k, scores.shape[1]))
        indices = indices.gather(1, kept)
    return scores, indices


def stable_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(Q, k) largest scores and their columns, sorted by (score, lower column).

    ``torch.topk`` leaves open which of several equal scores it takes; where the score at the border
    stands on both of its sides the line is sorted instead.
    """
    probe = min(k + 1, scores.shape[1])
    values, columns = torch.topk(scores, probe, dim=1)
    order = torch.argsort(columns[:, :k], dim=1)
    values_by_column = values[:, :k].gather(1, order)
    columns_by_column = columns[:, :k].gather(1, order)
    rank = torch.argsort(values_by_column, dim=1, descending=True, stable=True)
    best, chosen = values_by_column.gather(1, rank), columns_by_column.gather(1, rank)
    if probe > k > 0:
        for line in (values[:, k] == values[:, k - 1]).nonzero()[:, 0].tolist():
            chosen[line] = torch.argsort(scores[line], descending=True, stable=True)[:k]
            best[line] = scores[line, chosen[line]]
    return best, chosen


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
