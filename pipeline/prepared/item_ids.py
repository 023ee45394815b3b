"""Conversion between the log's item ids and dense item indices."""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from shardrec.pipeline.prepared.ids import id_kind, plain_ids, wide

__all__ = ["ItemIds"]

_CHUNK_IDS = 1 << 20


@dataclass(frozen=True, slots=True)
class ItemIds:
    """The item ids of a catalog by dense index: ``ids[item]`` is the id of ``item``.

    Attributes:
        ids: (V,) int64 or text, all distinct.
    """

    ids: pa.Array

    def __len__(self) -> int:
        """V, the number of items."""
        return len(self.ids)

    @property
    def kind(self) -> str:
        """The kind of the ids: "int64" or "string"."""
        return id_kind(self.ids.type)

    def items(self, ids: pa.Array | pa.ChunkedArray) -> Tensor:
        """(n,) int64 dense indices of ``ids``; -1 for nulls and for ids not in the catalog.

        Each call reads all ids of the catalog, whatever n is: pass many ids at a time.

        Raises:
            ValueError: the ids are not of the catalog's kind, or one is not a whole number or not
                UTF-8.
        """
        if id_kind(ids.type) not in (self.kind, "null"):
            raise ValueError(
                f"item ids must be {self.kind} as in the catalog, got {id_kind(ids.type)}; "
                "convert them"
            )
        ids = ids if isinstance(ids, pa.ChunkedArray) else pa.chunked_array([ids])
        plain = plain_ids(ids, "item ids").combine_chunks()
        plain = plain.cast(wide(self.ids.slice(0, 0)).type)
        asked = plain.dictionary_encode()
        found = np.full(len(asked.dictionary) + 1, -1, dtype=np.int64)  # the last one is for nulls
        for start in range(0, len(self), _CHUNK_IDS):
            part = self.ids.slice(start, _CHUNK_IDS)
            places = pc.index_in(wide(part).cast(plain.type), value_set=asked.dictionary)
            there = pc.is_valid(places).to_numpy(zero_copy_only=False).nonzero()[0]
            found[places.drop_null().to_numpy()] = there + start
        return torch.from_numpy(found[pc.fill_null(asked.indices, -1).to_numpy()])

    def of(self, items: npt.NDArray[np.int64]) -> pa.Array:
        """(n,) ids of the given dense indices."""
        return self.ids.take(pa.array(items))

    @property
    def version(self) -> str:
        """Short hash of the ids in order; equal if every index stands for the same item."""
        digest = hashlib.sha256(self.kind.encode())
        for start in range(0, len(self), _CHUNK_IDS):
            part = self.ids.slice(start, _CHUNK_IDS)
            if self.kind == "string":
                part = part.cast(pa.large_binary())
                lengths = pc.binary_length(part).to_numpy(zero_copy_only=False)
                digest.update(lengths.astype("<i8").tobytes())
                digest.update(b"".join(part.to_pylist()))
            else:
                digest.update(part.to_numpy().astype("<i8").tobytes())
        return digest.hexdigest()[:16]
