"""Definition of the selections: every score in memory, ties by lower index."""

import torch
from torch import Tensor

from shardrec.kernels.select.coarse import coarse

__all__ = ["best_direction_reference", "topk_rows_reference"]


def topk_rows_reference(queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(Q, k) coarse scores and rows of the largest inner products, ties by lower row."""
    scores = coarse(_products(queries, rows))
    best = torch.argsort(scores, dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, best), best


def best_direction_reference(directions: Tensor, rows: Tensor) -> Tensor:
    """(R,) int64 direction of the largest inner product with each row, the lower one of equals."""
    return _products(rows, directions).argmax(1)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """(n, m) float32 products without rounding on the way."""
    return (left.double() @ right.double().T).float()
