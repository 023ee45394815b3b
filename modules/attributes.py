"""Item vectors from attributes: one table of vectors for all their values, and one projection.

    c_i = k_i * id_i + sum over columns (mean of the column's vectors for item i) + W^T d_i

``id_i`` is the item's row of the table, ``d_i`` are its numbers of all columns of vectors, and
``k_i`` is 0 or 1: 0 for an item without training events, whose row has learned nothing, and, in
training, for a random share of the items, so that attributes learn to stand alone. With attributes
alone (M2TRec, RecSys 2022) there is no ``id_i``.

The vectors of values and ``W`` are small and the same on every rank; the codes are of one shard.
Composing is shard-local: losses, look-up and ranking see composed rows. ``pull_back`` takes the
gradient of composed rows, once a step, to the values, to ``W`` and to the ids.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardrec.kernels.negatives.draws import STREAM_ID_DROPOUT, draw_below
from shardrec.modules.row_updates import chunks

__all__ = ["AttributeRows", "AttributeSizes", "AttributeVectors", "ComposedRows"]

BLOCK_ROWS = 65_536  # rows composed at a time
_DRAWS = 1 << 30  # resolution of the share of dropped ids


@dataclass(frozen=True, slots=True)
class AttributeSizes:
    """What the vectors of attributes need to know of a catalog.

    Attributes:
        num_values: codes of all columns together, those of missing values included.
        missing: the codes of missing values, one a column.
        width: numbers of all columns of vectors together.
    """

    num_values: int
    missing: tuple[int, ...] = ()
    width: int = 0


@dataclass(frozen=True, slots=True)
class AttributeRows:
    """The attributes of some items, as they lie in memory.

    Attributes:
        codes: (C,) int32 or int64 codes of all columns, item by item.
        shares: (C,) float32 factor of each code's vector: one over the codes of its column.
        offsets: (R + 1,) int64 place of each item's first code; the last is C.
        vectors: (R, width) float32.
    """

    codes: Tensor
    shares: Tensor
    offsets: Tensor
    vectors: Tensor

    def __len__(self) -> int:
        """R, the number of items."""
        return self.vectors.shape[0]

    def take(self, rows: Tensor) -> AttributeRows:
        """The attributes of the (M,) int64 rows."""
        starts, counts = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        offsets = F.pad(counts.cumsum(0), (1, 0))
        places = torch.arange(int(offsets[-1]), device=rows.device)
        places += (starts - offsets[:-1]).repeat_interleave(counts)
        vectors = self.vectors[rows]
        return AttributeRows(self.codes[places], self.shares[places], offsets, vectors)

    def slice(self, start: int, stop: int) -> AttributeRows:
        """The attributes of rows [start, stop), not copied."""
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        offsets = self.offsets[start : stop + 1] - first
        vectors = self.vectors[start:stop]
        return AttributeRows(self.codes[first:last], self.shares[first:last], offsets, vectors)

    def to(self, device: torch.device) -> AttributeRows:
        """The same on a device."""
        parts = (self.codes, self.shares, self.offsets, self.vectors)
        return AttributeRows(*(part.to(device) for part in parts))


class ItemAttributes(Protocol):
    """Where a catalog gets the attributes of its items from."""

    @property
    def sizes(self) -> AttributeSizes:
        """Numbers of values and widths, the same on every rank."""

    def rows(self, items: range) -> AttributeRows:
        """The attributes of some items, on the CPU."""

    def trained(self, items: range) -> Tensor:
        """(len(items),) bool: whether an item has a training event."""


class AttributeVectors(nn.Module):
    """Maps attributes to item vectors; the same parameters on every rank."""

    def __init__(self, sizes: AttributeSizes, width: int, *, std: float, seed: int) -> None:
        """Draws the parameters from N(0, std^2), except zeros for missing values.

        Args:
            sizes: numbers of values and of numbers in vectors.
            width: D.
            std: standard deviation.
            seed: of the draws.
        """
        super().__init__()
        digest = hashlib.blake2b(f"attributes {seed}".encode(), digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        values = torch.empty(sizes.num_values, width).normal_(0, std, generator=generator)
        values[torch.tensor(sizes.missing, dtype=torch.int64)] = 0
        projection = torch.empty(sizes.width, width).normal_(0, std, generator=generator)
        self.values = nn.Parameter(values)
        self.projection = nn.Parameter(projection)

    def forward(self, rows: AttributeRows) -> Tensor:
        """(R, D) sums of the vectors of the items' attributes; differentiable."""
        composed = rows.vectors @ self.projection
        if not self.values.shape[0]:
            return composed
        offsets = rows.offsets.to(rows.codes.dtype)
        return composed + F.embedding_bag(
            rows.codes,
            self.values,
            offsets,
            mode="sum",
            per_sample_weights=rows.shares,
            include_last_offset=True,
        )


class ComposedRows:
    """The composed rows of one shard, and the way of their gradient back.

    Attributes:
        rows: (R, D) float32, composed when ``compose`` was last called.
        vectors: the parameters; their ``grad`` is this rank's part, to be summed over the ranks.
    """

    def __init__(
        self,
        rows: Tensor,
        ids: Tensor | None,
        source: ItemAttributes,
        vectors: AttributeVectors,
        first_row: int,
    ) -> None:
        """Stores the parts, and loads the attributes of this shard.

        Args:
            rows: (R, D) memory of the composed rows.
            ids: (R, D) the table's rows; None for attributes alone.
            source: attributes of the catalog.
            vectors: on the device of the rows.
            first_row: item of ``rows[0]``.
        """
        items = range(first_row, first_row + rows.shape[0])
        self.rows, self.vectors = rows, vectors
        self._ids = ids
        self._attributes = source.rows(items).to(rows.device)
        self._trained = source.trained(items).to(rows.device)
        self._items = torch.arange(items.start, items.stop, device=rows.device)
        self._kept = self._trained.to(rows.dtype)

    @torch.no_grad()
    def compose(self, dropout: float = 0.0, *, seed: int = 0, step: int = 0) -> None:
        """Composes all rows from the present parameters.

        Args:
            dropout: share of the ids that are left out.
            seed: with ``step`` and the item decides which; not with the rank.
            step: training step.
        """
        kept = self._trained
        if dropout:
            draws = draw_below(
                _DRAWS, self._items, 1, seed=seed, step=step, stream=STREAM_ID_DROPOUT
            )
            kept = kept & (draws[:, 0] >= round(dropout * _DRAWS))
        self._kept = kept.to(self.rows.dtype)
        for start in range(0, len(self.rows), BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, len(self.rows))
            block = self.vectors(self._attributes.slice(start, stop))
            if self._ids is not None:
                block.addcmul_(self._ids[start:stop], self._kept[start:stop, None])
            self.rows[start:stop] = block

    def pull_back(self, gradient: Tensor | None) -> Tensor | None:
        """Adds to the parameters' ``grad``; returns the gradient of the ids, in the same memory.

        Args:
            gradient: of the composed rows, dense (R, D) or coalesced COO; None for none.

        Returns:
            The gradient of the ids, of the same layout; None for attributes alone.
        """
        if gradient is None:
            return None
        for rows, values in chunks(gradient, BLOCK_ROWS):
            if not rows.numel():
                continue
            with torch.enable_grad():
                self.vectors(self._attributes.take(rows)).backward(values)
        if self._ids is None:
            return None
        if gradient.is_sparse:
            gradient.values().mul_(self._kept[gradient.indices()[0], None])
            return gradient
        return gradient.mul_(self._kept[:, None])
