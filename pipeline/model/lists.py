"""Recommended lists of items, and their Parquet form."""

import math
from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor

from shardrec.pipeline.prepared.ids import stored, stored_type
from shardrec.pipeline.prepared.item_ids import ItemIds

__all__ = ["Lists", "list_schema"]


@dataclass(frozen=True, slots=True)
class Lists:
    """(n, k) scores and (n, k) items of n lists; item -1 after the end of a list.

    A list that was never ``put`` has NaN scores, which are written as null, as are (n, D) vectors.
    D is 0 for lists without vectors.
    """

    scores: Tensor
    items: Tensor
    vectors: Tensor

    @classmethod
    def of_everybody(cls, items: Tensor, num_rows: int, width: int = 0) -> "Lists":
        """Lists that all hold the same (k,) items, without scores."""
        items = items.repeat(num_rows, 1)
        return cls(torch.full(items.shape, math.nan), items, torch.zeros(num_rows, width))

    def put(
        self, rows: Tensor, scores: Tensor, items: Tensor, vectors: Tensor | None = None
    ) -> None:
        """Set the lists in the given rows."""
        self.scores[rows], self.items[rows] = scores, items
        if vectors is not None:
            self.vectors[rows] = vectors

    def table(self, keys: pa.Array, catalog: ItemIds, schema: pa.Schema) -> pa.Table:
        """A table of the lists with the log's item ids, one row for each key."""
        there = self.items >= 0
        offsets = torch.zeros(len(there) + 1, dtype=torch.int32)
        torch.cumsum(there.sum(1), 0, out=offsets[1:])
        ids, scores = catalog.of(self.items[there].numpy()), pa.array(self.scores[there].numpy())
        unscored = pa.array(self.scores[:, 0].isnan().numpy())
        columns = [
            pa.ListArray.from_arrays(offsets.numpy(), ids),
            pa.ListArray.from_arrays(offsets.numpy(), scores, mask=unscored),
        ]
        if width := self.vectors.shape[1]:
            values = pa.array(self.vectors.view(-1).numpy())
            columns += [pa.FixedSizeListArray.from_arrays(values, width, mask=unscored)]
        return stored(pa.table([keys, *columns], names=schema.names), schema)


def list_schema(name: str, key: pa.DataType, ids: pa.DataType, width: int = 0) -> pa.Schema:
    """The schema of a file of lists: a key column of that name, item_ids and scores.

    With a width there is a column vector of so many numbers.
    """
    columns = {name: stored_type(key), "item_ids": pa.list_(stored_type(ids))}
    columns["scores"] = pa.list_(pa.float32())
    if width:
        columns["vector"] = pa.list_(pa.float32(), width)
    return pa.schema(columns)
