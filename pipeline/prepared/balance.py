"""Assign item indices so that popular items are spread evenly over the ranks, for any W."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
TOO_UNEVEN = 1.5
NUMBERS_OF_RANKS = (2, 3, 4, 8)


def spread_by_popularity(counts: Array) -> Array:
    """The items sorted by their dense index: a permutation of the popularity ranking.

    Popularity ranks (0 the most popular, ties by position) are sorted by the reversed bits of their
    Gray code. This distributes any range of popularity ranks evenly over contiguous blocks of
    indices, in alternating direction, so that no block always gets the more popular item.

    Args:
        counts: (V,) int64 training events of each item.

    Returns:
        (V,) int64: element k is the item that gets index k.

    Example:
        >>> spread_by_popularity(np.array([80, 40, 20, 10])).tolist()  # halves: 80 + 10, 40 + 20
        [0, 3, 1, 2]
    """
    ranking = np.argsort(-counts, kind="stable")
    keys = spread_keys(np.arange(len(counts)), len(counts))
    order: Array = ranking[np.argsort(keys, kind="stable")]
    return order


def spread_keys(ranks: Array, num_items: int) -> Array:
    """For popularity ranks of ``num_items`` items, int64 keys in whose order they are spread.

    Example:
        >>> spread_keys(np.arange(4), 4).tolist()
        [0, 2, 3, 1]
    """
    codes = ranks.astype(np.uint64)
    num_bits = max(num_items - 1, 1).bit_length()
    return _reversed_bits(codes ^ (codes >> np.uint64(1)), num_bits).astype(np.int64)


def load_per_rank(counts: Array, num_ranks: int) -> list[float]:
    """Each rank's share of ``counts`` for contiguous blocks of ceil(V / W) rows.

    Example:
        >>> load_per_rank(np.array([3, 1, 2, 2]), 2)
        [0.5, 0.5]
    """
    rows = -(-len(counts) // num_ranks)
    blocks = [counts[rank * rows : (rank + 1) * rows] for rank in range(num_ranks)]
    return load_shares([int(block.sum()) for block in blocks])


def load_shares(events: Sequence[int]) -> list[float]:
    """The share of each rank, for the training events of the items on it."""
    return [round(count / max(sum(events), 1), 6) for count in events]


def loads(counts: Array) -> dict[str, list[float]]:
    """``load_per_rank`` for W = 2, 3, 4 and 8; the key is W as text."""
    return {str(ranks): load_per_rank(counts, ranks) for ranks in NUMBERS_OF_RANKS}


def largest_load(shares_by_ranks: Mapping[str, Sequence[float]]) -> tuple[float, int]:
    """The largest load of any rank as a multiple of the mean, and the W at which it occurs.

    Args:
        shares_by_ranks: each rank's share of the load, by the number of ranks W; sums to 1 for
            each.

    Example:
        >>> largest_load({"2": [0.5, 0.5], "4": [0.5, 0.25, 0.125, 0.125]})
        (2.0, 4)
    """
    return max((max(shares) * len(shares), len(shares)) for shares in shares_by_ranks.values())


def describe_loads(shares_by_ranks: Mapping[str, Sequence[float]]) -> list[str]:
    """A line with the largest load of a rank as a multiple of the mean, by the number of ranks.

    Args:
        shares_by_ranks: each rank's share of the load, by the number of ranks W; sums to 1 for
            each.

    Example:
        >>> describe_loads({"2": [0.55, 0.45], "3": [0.5, 0.25, 0.25]})
        ['load of the fullest of 2, 3 ranks: 1.10 1.50']
    """
    largest = [f"{max(shares) * len(shares):.2f}" for shares in shares_by_ranks.values()]
    return [f"load of the fullest of {', '.join(shares_by_ranks)} ranks: {' '.join(largest)}"]


def describe_uneven_load(counts: Array) -> str | None:
    """A warning if a rank has more than 1.5 times the mean load; None otherwise.

    Args:
        counts: (V,) int64 training events of each item, by dense index.
    """
    return describe_uneven_loads(loads(counts), lambda: loads(counts[spread_by_popularity(counts)]))


def describe_uneven_loads(
    shares_by_ranks: Mapping[str, Sequence[float]],
    spread: Callable[[], Mapping[str, Sequence[float]]],
) -> str | None:
    """The same for the loads themselves; ``spread`` says what they would be after a rebalance."""
    load, ranks = largest_load(shares_by_ranks)
    if load <= TOO_UNEVEN:
        return None
    best, _ = largest_load(spread())
    remedy = (
        f"prepare with rebalance would make it {best:.2f} times, and train with init_from follows "
        "the items to their new indices"
        if best < 0.99 * load
        else "prepare has spread the items already, but a few items have very many events"
    )
    return (
        f"the busiest of {ranks} ranks gets {load:.2f} times the mean of the training events, more "
        f"than {TOO_UNEVEN} times; {remedy}"
    )


def _reversed_bits(values: Array, num_bits: int) -> Array:
    result = np.zeros_like(values)
    one = np.uint64(1)
    for bit in range(num_bits):
        moved = ((values >> np.uint64(bit)) & one) << np.uint64(num_bits - 1 - bit)
        result |= moved
    return result
