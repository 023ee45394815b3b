"""Item vectors from attributes: one table of vectors for all their values, and one projection.

    c_i = k_i * id_i + sum over columns (mean of the column's vectors for item i) + W^T d_i

``id_i`` is the item's row of the table, ``d_i`` the concatenation of its vector attributes, and
``k_i`` is 0 or 1: 0 for an item without training events, whose row is untrained, and, in training,
for a random share of the items, so that the attributes learn to work alone. With attributes alone
(M2TRec, RecSys 2022) there is no ``id_i``.

The vectors of the values and ``W`` are small and replicated on every rank; a rank holds only the
codes of its shard. Composing is shard-local: losses, look-up and ranking see composed rows.
``pull_back`` propagates the gradient of composed rows, once per step, to values, ``W`` and ids.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardrec.kernels.negatives.draws import STREAM_ID_DROPOUT, draw_below
from shardrec.modules.catalog_config import CatalogConfig
from shardrec.modules.row_updates import chunks
from shardrec.modules.torchrec_adapter import ShardedTable

__all__ = [
    "AttributeRows",
    "AttributeSizes",
    "AttributeVectors",
    "ComposedRows",
    "ItemAttributes",
    "check_attributes",
]

BLOCK_ROWS = 8_192  # rows composed at a time, which fit in a cache; `plan` counts them
_DRAWS = 1 << 30  # resolution of the share of dropped ids


@dataclass(frozen=True, slots=True)
class AttributeSizes:
    """The sizes of a catalog's attributes, which determine the shapes of ``AttributeVectors``.

    Attributes:
        num_values: number of codes over all columns, including those of missing values.
        missing: code of a missing value in each column.
        width: length of all vector attributes together.
    """

    num_values: int
    missing: tuple[int, ...] = ()
    width: int = 0


@dataclass(frozen=True, slots=True)
class AttributeRows:
    """The attributes of R items, as flat tensors.

    Attributes:
        codes: (C,) int32 or int64 codes of all columns, item by item.
        shares: (C,) float32 weight of each code's vector: one over the item's number of codes in
            that column.
        offsets: (R + 1,) int64 index of each item's first code in ``codes``; the last is C.
        vectors: (R, width) float32 vector attributes of each item, concatenated.
    """

    codes: Tensor
    shares: Tensor
    offsets: Tensor
    vectors: Tensor

    def __len__(self) -> int:
        """R, the number of items."""
        return self.vectors.shape[0]

    def take(self, rows: Tensor) -> AttributeRows:
        """The attributes of M items, given their (M,) int64 rows."""
        starts, counts = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        offsets = F.pad(counts.cumsum(0), (1, 0))
        places = torch.arange(int(offsets[-1]), device=rows.device)
        places += (starts - offsets[:-1]).repeat_interleave(counts)
        vectors = self.vectors[rows]
        return AttributeRows(self.codes[places], self.shares[places], offsets, vectors)

    def slice(self, start: int, stop: int) -> AttributeRows:
        """The attributes of rows [start, stop), as views."""
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        offsets = self.offsets[start : stop + 1] - first
        vectors = self.vectors[start:stop]
        return AttributeRows(self.codes[first:last], self.shares[first:last], offsets, vectors)

    def to(self, device: torch.device) -> AttributeRows:
        """The attributes on another device."""
        parts = (self.codes, self.shares, self.offsets, self.vectors)
        return AttributeRows(*(part.to(device) for part in parts))


class ItemAttributes(Protocol):
    """The interface from which a catalog reads the attributes of its items."""

    @property
    def sizes(self) -> AttributeSizes:
        """The sizes of the attributes, the same on every rank."""

    def rows(self, items: range) -> AttributeRows:
        """The attributes of a range of items, on the CPU."""

    def trained(self, items: range) -> Tensor:
        """(len(items),) bool: whether each item has a training event."""


def check_attributes(config: CatalogConfig, source: ItemAttributes | None) -> None:
    """Raise ValueError if the config uses attributes and ``source`` is None."""
    if config.attributes != "none" and source is None:
        raise ValueError(
            f"catalog.attributes must be none for items without attributes, got "
            f"{config.attributes}; prepare the data with --item-attributes"
        )


class AttributeVectors(nn.Module):
    """Module from attributes to item vectors, replicated on every rank."""

    def __init__(self, sizes: AttributeSizes, width: int, *, std: float, seed: int) -> None:
        """Draws the parameters from N(0, std^2), except zeros for missing values.

        Args:
            sizes: sizes of the attributes.
            width: D.
            std: standard deviation of the initial values.
            seed: seed of the draws.
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
        """(R, D) float32 sum of the vectors of each item's attributes; differentiable."""
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
    """The composed rows of one shard, with their backward pass.

    Attributes:
        rows: (R, D) float32 composed rows, each as of the last ``compose`` that included it.
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
            rows: (R, D) buffer for the composed rows.
            ids: (R, D) rows of the table; None for attributes alone.
            source: attributes of the catalog.
            vectors: the parameters, on the device of the rows.
            first_row: global item of ``rows[0]``.
        """
        items = range(first_row, first_row + rows.shape[0])
        self.rows, self.vectors = rows, vectors
        self._ids, self._first_row = ids, first_row
        self._attributes = source.rows(items).to(rows.device)
        self._trained = source.trained(items).to(rows.device)
        self._draw: tuple[float, int, int] | None = None

    @classmethod
    def of(
        cls, config: CatalogConfig, table: ShardedTable, source: ItemAttributes | None, seed: int
    ) -> ComposedRows | None:
        """The composed rows of a table, which its look-up reads from now on; None if not used.

        Args:
            config: config of the catalog.
            table: its rows are the ids or, with attributes alone, the buffer for composed rows.
            source: attributes of the catalog.
            seed: seed of the initial parameters.
        """
        if config.attributes == "none" or source is None:
            return None
        ids = None if config.attributes == "only" else table.rows
        rows = table.rows if ids is None else torch.empty_like(ids)
        vectors = AttributeVectors(source.sizes, table.width, std=config.init_std, seed=seed)
        composed = cls(rows, ids, source, vectors.to(table.device), table.first_row)
        table.read = composed.read
        return composed

    def drop_ids(self, share: float, *, seed: int, step: int) -> None:
        """Leaves out the ids of a random share of items, chosen by hashes of (seed, step, item)."""
        self._draw = (share, seed, step) if share else None

    def keep_ids(self) -> None:
        """Uses the ids of all items again, after ``drop_ids``."""
        self._draw = None

    @torch.no_grad()
    def compose(self, rows: Tensor | None = None) -> None:
        """Recomputes the given (n,) int64 rows, or all rows, from the current parameters."""
        if rows is None:
            for start in range(0, len(self.rows), BLOCK_ROWS):
                part = slice(start, start + BLOCK_ROWS)
                every = torch.arange(*part.indices(len(self.rows)), device=self.rows.device)
                attributes = self._attributes.slice(start, start + len(every))
                self.rows[part] = self._composed(attributes, every)
            return
        for part in rows.split(BLOCK_ROWS):
            self.rows[part] = self._composed(self._attributes.take(part), part)

    @torch.no_grad()
    def read(self, rows: Tensor) -> Tensor:
        """(n, D) float32 vectors of the (n,) int64 rows, composed from the current parameters."""
        different, places = rows.unique(return_inverse=True)
        found = self.rows.new_empty(len(different), self.rows.shape[1], requires_grad=False)
        for part, out in zip(different.split(BLOCK_ROWS), found.split(BLOCK_ROWS), strict=True):
            out.copy_(self._composed(self._attributes.take(part), part))
        return found[places]

    def pull_back(self, gradient: Tensor | None) -> Tensor | None:
        """Backward pass of ``compose``: adds to the parameters' ``grad``, returns that of the ids.

        Args:
            gradient: gradient of the composed rows, dense (R, D) or coalesced COO, which is
                overwritten; None if there is none.

        Returns:
            The gradient of the ids, in the layout and memory of ``gradient``; None for attributes
            alone.
        """
        if gradient is None:
            return None
        for rows, values in chunks(gradient, BLOCK_ROWS):
            if not rows.numel():
                continue
            with torch.enable_grad():
                self.vectors(self._attributes.take(rows)).backward(values)
            if self._ids is not None:
                values.mul_(self._kept(rows))  # a view of the gradient
        return None if self._ids is None else gradient

    def _composed(self, attributes: AttributeRows, rows: Tensor) -> Tensor:
        composed: Tensor = self.vectors(attributes)
        if self._ids is not None:
            composed.addcmul_(self._ids[rows], self._kept(rows))
        return composed

    def _kept(self, rows: Tensor) -> Tensor:
        """(n, 1) float32, 1 where a row has its id."""
        kept = self._trained[rows]
        if self._draw is not None:
            share, seed, step = self._draw
            items = rows + self._first_row
            draws = draw_below(_DRAWS, items, 1, seed=seed, step=step, stream=STREAM_ID_DROPOUT)
            kept = kept & (draws[:, 0] >= round(share * _DRAWS))
        return kept.to(self.rows.dtype)[:, None]
