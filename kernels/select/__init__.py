"""The best rows of a projection, streamed over the rows: top-k per query and argmax per row."""

import torch
from torch import Tensor

from shardrec.kernels.select.cpu import best_direction, stable_topk, topk_rows

__all__ = ["best_direction", "merge_topk", "stable_topk", "topk_rows"]


def merge_topk(scores: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(Q, k) scores and indices of the best of several lists, ties by lower index.

    Args:
        scores: (Q, M) float32, the lists of all shards side by side.
        indices: (Q, M) int64, distinct within a line where the score is above -inf.
        k: Number kept, at most M.
    """
    order = torch.argsort(indices, dim=1)
    scores, indices = scores.gather(1, order), indices.gather(1, order)
    best = torch.argsort(scores, dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, best), indices.gather(1, best)
