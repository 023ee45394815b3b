"""Training events of each item, and what losses make of them once for all steps."""

from torch import Tensor

from shardrec.kernels.negatives import InBatch, Popularity

__all__ = ["ItemCounts"]


class ItemCounts:
    """The counts of a run with the proposals made of them; a table is built once and kept.

    Attributes:
        counts: (V,) int64 training events of each item.
    """

    def __init__(self, counts: Tensor) -> None:
        """Keeps the counts, which must not change."""
        self.counts = counts
        self._total: Tensor | None = None
        self._popularity: dict[float, Popularity] = {}

    @classmethod
    def of(cls, counts: "Tensor | ItemCounts") -> "ItemCounts":
        """The same object, or one for a step alone that builds its tables again."""
        return counts if isinstance(counts, ItemCounts) else cls(counts)

    def popularity(self, exponent: float) -> Popularity:
        """Items in proportion to ``max(count, 1) ** exponent``: a table of 8 V bytes."""
        if exponent not in self._popularity:
            self._popularity[exponent] = Popularity(self.counts, exponent)
        return self._popularity[exponent]

    def in_batch(self, targets: Tensor) -> InBatch:
        """The targets of a global batch, with their share of the events.

        Args:
            targets: (N,) int64 targets of all ranks.
        """
        if self._total is None:
            self._total = self.counts.sum()
        return InBatch(targets, self.counts, self._total)
