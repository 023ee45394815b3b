"""Select the top-k rows of each query, and the best direction of each row, in tiles of scores."""

import torch
from torch import Tensor

from shardrec.kernels.device.backend import choose_backend
from shardrec.kernels.negatives import random_signs
from shardrec.kernels.select import cpu
from shardrec.kernels.select.cpu import best_direction
from shardrec.kernels.select.search import GROUP, TopSearch, top_lowest

__all__ = [
    "GROUP",
    "TopSearch",
    "best_direction",
    "best_sign_direction",
    "merge_topk",
    "top_lowest",
    "topk_rows",
]


def topk_rows(
    queries: Tensor, rows: Tensor, k: int, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(Q, k) scores and (Q, k) rows of largest inner product, best first; ties: the lower row.

    Scores are compared and returned at coarse precision (a mantissa of ten bits, a relative step of
    2**-10), which makes them a function of the two vectors alone: the choice does not depend on
    how the rows are sharded. The workspace is a tile of scores and the lists, independent of R.

    Args:
        queries: (Q, D) float; rounded to the dtype of the rows.
        rows: (R, D) float.
        k: Rows per query; above R the lists have R entries.
        backend: "auto", "torch" or "triton"; see ``choose_backend``.

    Returns:
        float32 coarse scores and int64 rows. No gradient.
    """
    queries = queries.to(rows.dtype)
    if choose_backend(rows, backend) == "triton":
        from shardrec.kernels.select import gpu

        return gpu.topk_rows(queries, rows, k)
    return cpu.topk_rows(queries, rows, k)


def best_sign_direction(
    vectors: Tensor,
    num_directions: int,
    *,
    seed: int,
    step: int,
    stream: int,
    backend: str = "auto",
) -> Tensor:
    """(n,) int64 index of the random sign vector of largest inner product; ties: the lower index.

    The result for a vector does not depend on the other vectors of the call. Direction i is line i
    of ``random_signs`` with the same seed, step and stream.

    Args:
        vectors: (n, D) float; no gradient is taken.
        num_directions: n_b.
        seed: Key of the generator.
        step: Training step.
        stream: Purpose of the draws.
        backend: "auto", "torch" or "triton".
    """
    if choose_backend(vectors, backend) == "triton":
        from shardrec.kernels.select import gpu

        best = torch.empty((1, len(vectors)), dtype=torch.int64, device=vectors.device)
        gpu.best_sign_direction(vectors, best, num_directions, seed=seed, step=step, stream=stream)
        return best[0]
    width = vectors.shape[1]
    directions = random_signs(
        0, num_directions, width, seed=seed, step=step, stream=stream, device=vectors.device
    )
    return best_direction(directions, vectors)


def merge_topk(scores: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(Q, k) best scores and indices of several concatenated lists; ties: the lower index.

    Args:
        scores: (Q, M) float32 coarse scores, the lists of all shards concatenated.
        indices: (Q, M) int64; those with a score above -inf are distinct within a line.
        k: Length of the result, at most M.
    """
    order = torch.argsort(indices, dim=1)
    scores, indices = scores.gather(1, order), indices.gather(1, order)
    best = torch.argsort(scores, dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, best), indices.gather(1, best)
