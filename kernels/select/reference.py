"""The definition of the selections, with all scores in memory."""

import torch
from torch import Tensor

from shardrec.kernels.select.coarse import coarse

__all__ = ["best_direction_reference", "topk_rows_reference"]


def topk_rows_reference(queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(Q, k) coarse scores and rows of the largest inner products; ties: the lower row."""
    scores = coarse(_products(queries, rows))
    best = torch.argsort(scores, dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, best), best


def best_direction_reference(directions: Tensor, rows: Tensor) -> Tensor:
    """(R,) int64 direction of largest inner product with each row; ties: the lower direction."""
    return _products(rows, directions).argmax(1)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """(n, m) float32 products, computed in float64 and rounded once."""
    return (left.double() @ right.double().T).float()
