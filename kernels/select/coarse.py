"""Scores at coarse precision: what a choice compares, so that rounding does not choose.

The last bits of a product depend on its shape, and so on the number of ranks and on the processor.
A coarse score does not: where rounding leaves it open, the product of that pair is taken in
float64. Equal vectors then have equal coarse scores, and the lower index decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DROPPED", "Pairs", "above", "coarse", "lengths", "rounding"]

# Bits of the 23 of a float32 that are dropped; ten are left, a relative step of 2**-10. That is far
# above the rounding of a product, and no coarser than the inputs of one in bfloat16.
DROPPED = 13
_STEP = 1 << DROPPED
# What products of up to 2**12 tiny numbers lose; less than a coarse zero is wide.
_UNDERFLOW = 2.0**-137
# Numbers of a float64 product of pairs in memory at a time; 2**17 are 1 MiB.
_NUMBERS_AT_ONCE = 1 << 17


def coarse(scores: Tensor) -> Tensor:
    """float32 scores cut towards zero to ten bits behind the leading one.

    >>> coarse(torch.tensor([1.0, 1.0009, 1.001, -1.0009, -torch.inf]))
    tensor([ 1.0000,  1.0000,  1.0010, -1.0000,    -inf])
    """
    return (scores.view(torch.int32) & -_STEP).view(torch.float32)


def above(floor: Tensor) -> Tensor:
    """The scores from which on ``coarse(score) > floor``; where that is negative, excluded.

    >>> above(torch.tensor([1.0, 1.0009, -1.0]))
    tensor([ 1.0010,  1.0010, -1.0000])
    """
    return coarse((floor.view(torch.int32) + (_STEP - 1) + (floor >= 0)).view(torch.float32))


def rounding(width: int) -> float:
    """How far a float32 product of two vectors of unit length can be from the exact one.

    With ``u = 2**-24``, ``D u`` is never exceeded, and ``8 sqrt(D) u`` with probability
    ``2 D exp(-32)`` where roundings are independent (Higham and Mary, "A new approach to
    probabilistic rounding error analysis", 2019). Norms and comparisons take 4 u.
    """
    return (min(width, 8 * math.sqrt(width)) + 4) * 2.0**-24


def lengths(vectors: Tensor) -> Tensor:
    """(n,) float32 lengths of (n, D) float32 vectors."""
    # Without a copy in float64, so vectors shorter than 2**-63 count as zero: their scores are
    # taken as they are.
    return torch.linalg.vector_norm(vectors, dim=1)


@dataclass(frozen=True, slots=True)
class Pairs:
    """The queries and rows behind a tile of scores.

    Attributes:
        queries: (M, D) float32.
        query_slack: (M,) their lengths times ``rounding(D)``.
        rows: (n, D) float32.
        row_lengths: (n,) their lengths.
    """

    queries: Tensor
    query_slack: Tensor
    rows: Tensor
    row_lengths: Tensor

    @property
    def slack(self) -> Tensor:
        """(M, 1) how far a score of each query can be from the exact one."""
        return (self.query_slack * self.row_lengths.amax() + _UNDERFLOW)[:, None]

    def decide(self, scores: Tensor, queries: Tensor, rows: Tensor) -> Tensor:
        """(P,) coarse scores, a function of the two vectors of each pair alone.

        Args:
            scores: (P,) float32, as a product of any shape gave them.
            queries: (P,) int64.
            rows: (P,) int64 in this tile.
        """
        slack = self.query_slack[queries] * self.row_lengths[rows] + _UNDERFLOW
        least, most = coarse(scores - slack), coarse(scores + slack)
        undecided = (least != most).nonzero()[:, 0]
        exact = self._products(queries[undecided], rows[undecided])
        return least.index_copy_(0, undecided, coarse(exact))

    def _products(self, queries: Tensor, rows: Tensor) -> Tensor:
        """(P,) products of pairs, taken in float64 and rounded to float32."""
        result = self.rows.new_empty(len(rows))
        at_once = max(1, _NUMBERS_AT_ONCE // max(1, self.rows.shape[1]))
        for first in range(0, len(rows), at_once):
            part = slice(first, first + at_once)
            result[part] = (self.queries[queries[part]].double() * self.rows[rows[part]]).sum(1)
        return result
