"""Dense item indices that give every rank its share of the popular items, whatever W is."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def spread_by_popularity(counts: Array) -> Array:
    """The items in the order of their dense index: a permutation of the popularity ranking.

    Popularity rank r (0 the most popular, ties by position) goes where the reversed bits of r's
    Gray code stand among all of them. Every run of ranks is thus dealt evenly over every contiguous
    block of indices, to and fro, so that one block does not always get the more popular item.

    Args:
        counts: (V,) int64, training events of each item.

    Returns:
        (V,) int64: element k is the item that gets index k.

    Example:
        >>> spread_by_popularity(np.array([80, 40, 20, 10])).tolist()  # halves: 80 + 10, 40 + 20
        [0, 3, 1, 2]
    """
    ranking = np.argsort(-counts, kind="stable")
    ranks = np.arange(len(counts), dtype=np.uint64)
    keys = _reversed_bits(ranks ^ (ranks >> np.uint64(1)), max(len(counts) - 1, 1).bit_length())
    order: Array = ranking[np.argsort(keys, kind="stable")]
    return order


def load_per_rank(counts: Array, num_ranks: int) -> list[float]:
    """Each rank's share of ``counts`` when rows lie in contiguous blocks of ceil(V / W).

    Example:
        >>> load_per_rank(np.array([3, 1, 2, 2]), 2)
        [0.5, 0.5]
    """
    rows = -(-len(counts) // num_ranks)
    total = max(int(counts.sum()), 1)
    blocks = [counts[rank * rows : (rank + 1) * rows] for rank in range(num_ranks)]
    return [round(int(block.sum()) / total, 6) for block in blocks]


def _reversed_bits(values: Array, num_bits: int) -> Array:
    result = np.zeros_like(values)
    one = np.uint64(1)
    for bit in range(num_bits):
        moved = ((values >> np.uint64(bit)) & one) << np.uint64(num_bits - 1 - bit)
        result |= moved
    return result
