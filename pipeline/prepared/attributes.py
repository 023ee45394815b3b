"""The attributes of items in a prepared folder: their columns, and the rows of one shard.

::

    item_attributes.parquet   row k: the codes and vectors of item k, a column for each attribute
    item_attributes.json      their meaning: values, borders of buckets, scales of vectors

Codes count from 1; code 0 stands for a missing value, a value that the folder does not know, or an
item without a row. A list has one or more codes; a missing vector is zero.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shardrec.pipeline.outputs.json_files import (
    read_object,
    require_inside,
    require_shape,
    write_atomically,
)

__all__ = [
    "ATTRIBUTES_NAME",
    "COLUMNS_NAME",
    "AttributeColumn",
    "Kind",
    "RawValues",
    "read_columns",
    "write_columns",
]

ATTRIBUTES_NAME = "item_attributes.parquet"
COLUMNS_NAME = "item_attributes.json"
_VERSION = 1
_REMEDY = "prepare the data again"

Array = npt.NDArray[Any]
Kind = Literal["category", "list", "number", "vector"]
Value = str | int | bool
RawValues: TypeAlias = Any
"""Values of one column: of a category (n,) string, int64 or bool, of a list lists of them, of a
number (n,) float64 with NaN where it is missing, of a vector fixed-size lists of float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttributeColumn:
    """One attribute: how its values become codes or vectors.

    Attributes:
        name: name of the column.
        kind: "category" (one value), "list" (several values), "number" (cut into buckets) or
            "vector".
        type: Arrow type of the values of a category or list: string, int64 or bool.
        values: the values of a category or list; code k + 1 stands for ``values[k]``.
        borders: ascending borders of a number's buckets; a border belongs to the bucket above it.
        width: length of a vector.
        scale: factor of all vectors, chosen so that the mean of their squared norms is 1.
    """

    name: str
    kind: Kind
    type: str = "string"
    values: tuple[Value, ...] = ()
    borders: tuple[float, ...] = ()
    width: int = 0
    scale: float = 1.0

    @property
    def num_codes(self) -> int:
        """Number of codes, including the one for a missing value; 0 for a vector."""
        if self.kind == "vector":
            return 0
        return 1 + (len(self.borders) + 1 if self.kind == "number" else len(self.values))

    @property
    def labels(self) -> list[str]:
        """The meaning of each code (of each index of a vector), as text; equal text, equal meaning.

        Example:
            >>> AttributeColumn(name="price", kind="number", borders=(2.5,)).labels
            ['price: missing', 'price: -inf to 2.5', 'price: 2.5 to inf']
        """
        if self.kind == "vector":
            return [f"{self.name}: {place} of {self.width}" for place in range(self.width)]
        if self.kind == "number":
            ends = [-np.inf, *self.borders, np.inf]
            values = [f"{low} to {high}" for low, high in zip(ends, ends[1:], strict=False)]
        else:
            values = [json.dumps(value) for value in self.values]
        return [f"{self.name}: {value}" for value in ["missing", *values]]

    @property
    def arrow_type(self) -> pa.DataType:
        """Arrow type of the column in ``item_attributes.parquet``."""
        if self.kind == "vector":
            return pa.list_(pa.float32(), self.width)
        return pa.list_(pa.int32()) if self.kind == "list" else pa.int32()

    def encode(self, raw: RawValues) -> pa.Array:
        """(n,) codes or vectors of raw values; an unknown value is encoded as missing."""
        if self.kind == "vector":
            return _scaled(raw, self.width, self.scale)
        if self.kind == "number":
            buckets = 1 + np.searchsorted(np.array(self.borders), raw, side="right")
            return pa.array(np.where(np.isnan(raw), 0, buckets), pa.int32())
        if self.kind == "list":
            return _list_codes(raw, self._codes(raw.flatten()))
        return pa.array(self._codes(raw), pa.int32())

    def _codes(self, values: pa.Array) -> Array:
        places = pc.index_in(values, value_set=pa.array(self.values, values.type))
        codes: Array = 1 + pc.fill_null(places, -1).to_numpy()
        return codes


def write_columns(folder: Path, columns: Sequence[AttributeColumn]) -> None:
    """Write ``item_attributes.json`` into a folder."""
    stored = [dataclasses.asdict(column) for column in columns]
    text = json.dumps({"version": _VERSION, "columns": stored}, indent=1, ensure_ascii=False)
    write_atomically(folder / COLUMNS_NAME, text)


def read_columns(folder: Path) -> list[AttributeColumn]:
    """The columns that ``write_columns`` wrote, in order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or of another version.
    """
    path = folder / COLUMNS_NAME
    stored = read_object(require_inside(path, _REMEDY), {"version": int, "columns": list}, _REMEDY)
    if stored["version"] != _VERSION:
        raise ValueError(
            f"{path} must be of version {_VERSION}, got {stored['version']}; {_REMEDY}"
        )
    shape: Any = {"name": str, "kind": str, "type": str, "values": list, "borders": list}
    columns = [
        require_shape(one, shape, f"a column in {path}", _REMEDY) for one in stored["columns"]
    ]
    try:
        return [_column(one) for one in columns]
    except TypeError as error:
        raise ValueError(
            f"{path} must hold columns of attributes, got {error}; {_REMEDY}"
        ) from None


def _column(stored: dict[str, Any]) -> AttributeColumn:
    lists = {name: tuple(stored[name]) for name in ("values", "borders")}
    return AttributeColumn(**stored | lists)


def _scaled(raw: pa.Array, width: int, scale: float) -> pa.Array:
    values = np.zeros((len(raw), width), np.float32)
    present = raw.flatten().to_numpy().reshape(-1, width)  # without those of nulls
    values[raw.is_valid().to_numpy(zero_copy_only=False)] = present * np.float32(scale)
    return pa.FixedSizeListArray.from_arrays(values.reshape(-1), width)


def _list_codes(raw: pa.Array, codes: Array) -> pa.Array:
    """Lists of the codes above 0; [0] where there are none."""
    lengths = pc.fill_null(pc.list_value_length(raw), 0).to_numpy()
    rows = np.repeat(np.arange(len(raw)), lengths)
    known = codes > 0
    counts = np.bincount(rows[known], minlength=len(raw))
    offsets = np.append(0, np.cumsum(np.maximum(counts, 1)))
    flat = np.zeros(offsets[-1], np.int32)
    place = np.arange(known.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    flat[np.repeat(offsets[:-1], counts) + place] = codes[known]
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(flat))
