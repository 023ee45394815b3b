"""Definition of the selections: every score in memory, ties by lower index."""

import torch
from torch import Tensor

__all__ = ["best_direction_reference", "topk_rows_reference"]


def topk_rows_reference(queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(Q, k) scores and rows of the largest inner products, sorted by (score, lower row)."""
    scores = queries @ rows.T
    best = torch.argsort(scores, dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, best), best


def best_direction_reference(directions: Tensor, rows: Tensor) -> Tensor:
    """(R,) int64 direction of the largest inner product with each row, the lower one of equals."""
    return (rows @ directions.T).argmax(1)
