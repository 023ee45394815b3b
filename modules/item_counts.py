"""Training events of each item, and the proposal distributions built from them."""

from torch import Tensor

from shardrec.kernels.negatives import InBatch, Popularity

__all__ = ["ItemCounts"]


class ItemCounts:
    """Number of training events of each item, with a cache of the proposals built from it.

    Attributes:
        counts: (V,) int64 training events of each item.
    """

    def __init__(self, counts: Tensor) -> None:
        """Stores the counts, which must not change afterwards."""
        self.counts = counts
        self._total: Tensor | None = None
        self._popularity: dict[float, Popularity] = {}

    @classmethod
    def of(cls, counts: "Tensor | ItemCounts") -> "ItemCounts":
        """``counts`` as ItemCounts; a tensor is wrapped, with an empty cache."""
        return counts if isinstance(counts, ItemCounts) else cls(counts)

    def popularity(self, exponent: float) -> Popularity:
        """The proposal proportional to ``max(count, 1) ** exponent``, with a cached table."""
        if exponent not in self._popularity:
            self._popularity[exponent] = Popularity(self.counts, exponent)
        return self._popularity[exponent]

    def in_batch(self, targets: Tensor) -> InBatch:
        """The in-batch proposal over the (N,) int64 ``targets`` of all ranks."""
        if self._total is None:
            self._total = self.counts.sum()
        return InBatch(targets, self.counts, self._total)
