"""Scores at coarse precision, so that rounding errors do not change which rows are selected.

The last bits of a matrix product depend on its shape, and so on the number of ranks and on the
processor. A coarse score does not: if rounding could change it, the inner product of that pair is
recomputed in float64. Equal vectors then have equal coarse scores, and the lower index is selected.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DROPPED", "Pairs", "above", "coarse", "lengths", "rounding"]

# Dropped bits, of the 23 of a float32 mantissa; ten are left, a relative step of 2**-10. That is
# far above the rounding error of a product, and no coarser than bfloat16 inputs.
DROPPED = 13
_STEP = 1 << DROPPED
# Upper bound on the underflow of an inner product of up to 2**12 numbers; below the coarse step
# at zero.
_UNDERFLOW = 2.0**-137
# Float64 numbers in memory at a time when pairs are recomputed; 2**17 are 1 MiB.
_NUMBERS_AT_ONCE = 1 << 17


def coarse(scores: Tensor) -> Tensor:
    """float32 scores rounded towards zero to a mantissa of ten bits, of the same shape.

    >>> coarse(torch.tensor([1.0, 1.0009, 1.001, -1.0009, -torch.inf]))
    tensor([ 1.0000,  1.0000,  1.0010, -1.0000,    -inf])
    """
    return (scores.view(torch.int32) & -_STEP).view(torch.float32)


def above(floor: Tensor) -> Tensor:
    """Smallest scores with ``coarse(score) > floor``; if negative, that bound itself is excluded.

    >>> above(torch.tensor([1.0, 1.0009, -1.0]))
    tensor([ 1.0010,  1.0010, -1.0000])
    """
    return coarse((floor.view(torch.int32) + (_STEP - 1) + (floor >= 0)).view(torch.float32))


def rounding(width: int) -> float:
    """Error bound of a float32 inner product of two unit vectors of width D.

    With ``u = 2**-24``, the error never exceeds ``D u``, and exceeds ``8 sqrt(D) u`` with
    probability at most ``2 D exp(-32)`` if rounding errors are independent (Higham and Mary, "A new
    approach to probabilistic rounding error analysis", 2019). 4 u are added for norms and
    comparisons.
    """
    return (min(width, 8 * math.sqrt(width)) + 4) * 2.0**-24


def lengths(vectors: Tensor) -> Tensor:
    """(n,) float32 L2 norms of (n, D) float32 vectors."""
    # In float32, as a float64 copy would be large. Norms below 2**-63 underflow to 0: scores of
    # such vectors are not recomputed.
    return torch.linalg.vector_norm(vectors, dim=1)


@dataclass(frozen=True, slots=True)
class Pairs:
    """The queries and rows of a tile of scores, to recompute scores that rounding could change.

    Attributes:
        queries: (M, D) float32.
        query_slack: (M,) float32 norms of the queries times ``rounding(D)``.
        rows: (n, D) float32.
        row_lengths: (n,) float32 norms of the rows.
    """

    queries: Tensor
    query_slack: Tensor
    rows: Tensor
    row_lengths: Tensor

    @property
    def slack(self) -> Tensor:
        """(M, 1) float32 error bound of the scores of each query in this tile."""
        return (self.query_slack * self.row_lengths.amax() + _UNDERFLOW)[:, None]

    def decide(self, scores: Tensor, queries: Tensor, rows: Tensor) -> Tensor:
        """(P,) float32 coarse scores of pairs that depend on their two vectors alone.

        Args:
            scores: (P,) float32 scores from a matrix product of any shape.
            queries: (P,) int64 index of each query.
            rows: (P,) int64 index of each row in this tile.
        """
        slack = self.query_slack[queries] * self.row_lengths[rows] + _UNDERFLOW
        least, most = coarse(scores - slack), coarse(scores + slack)
        undecided = (least != most).nonzero()[:, 0]
        exact = self._products(queries[undecided], rows[undecided])
        return least.index_copy_(0, undecided, coarse(exact))

    def _products(self, queries: Tensor, rows: Tensor) -> Tensor:
        """(P,) float32 inner products of pairs, computed in float64 and rounded once."""
        result = self.rows.new_empty(len(rows))
        at_once = max(1, _NUMBERS_AT_ONCE // max(1, self.rows.shape[1]))
        for first in range(0, len(rows), at_once):
            part = slice(first, first + at_once)
            result[part] = (self.queries[queries[part]].double() * self.rows[rows[part]]).sum(1)
        return result
