"""Read files of item attributes, and choose how each column becomes codes or vectors.

``AttributeFile.open`` checks the footers, ``item_ids`` reads the ids and ``raw`` one column;
``fit_column`` chooses the values, borders or scale of a column.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as fs
import pyarrow.parquet as pq

from shardrec.pipeline.log.columns import read_ids, same_kind
from shardrec.pipeline.near_names import unknown_name
from shardrec.pipeline.outputs.files import digest
from shardrec.pipeline.prepared.attributes import AttributeColumn, Kind, RawValues
from shardrec.pipeline.prepared.data_files import find_files
from shardrec.pipeline.prepared.ids import (
    is_text,
    plain_text,
    require_ids,
    short_message,
    value_type,
)

__all__ = ["MOST_VALUES", "AttributeChoice", "AttributeFile", "fit_column"]

MOST_VALUES = 1 << 20  # of one column: every rank holds a vector for each

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttributeChoice:
    """Which columns of a file are attributes, and how.

    Attributes:
        item: column of the item ids.
        columns: the attributes; empty takes every other column.
        numbers: integer columns that are numbers and not categories.
        buckets: largest number of buckets that a number is cut into.
    """

    item: str
    columns: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    buckets: int = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class AttributeFile:
    """Parquet files with one row per item, opened and checked.

    Attributes:
        filesystem: holds the files.
        paths: the files, in path order.
        choice: which columns are attributes.
        item_type: kind of the item ids, "int64" or "string".
        kinds: kind of each attribute by name, in the column order of the first file.
    """

    filesystem: fs.FileSystem
    paths: tuple[str, ...]
    choice: AttributeChoice
    item_type: str
    kinds: Mapping[str, Kind]

    @classmethod
    def open(cls, source: str, choice: AttributeChoice, item_type: str) -> "AttributeFile":
        """Find the files of ``source`` and check their footers and column types.

        Args:
            source: a file, folder, glob or URI.
            choice: which columns are attributes.
            item_type: kind of the log's item ids.

        Raises:
            FileNotFoundError: there is no Parquet file.
            ValueError: a footer cannot be read, or a column is missing or of an unsuitable type.
        """
        found_files = find_files(source, "item_attributes")
        filesystem = found_files.filesystem
        paths = found_files.parquet_paths("item_attributes")
        schemas = {path: _schema(filesystem, path) for path in paths}
        first = next(iter(schemas.values()))
        names = choice.columns or tuple(name for name in first.names if name != choice.item)
        for path, schema in schemas.items():
            _check_names(path, schema, choice.item, names)
        found = same_kind(schemas, choice.item, require_ids)
        if found != item_type:
            raise ValueError(
                f"item_attributes must have ids of the log's type, {item_type}, got {found} in "
                f"column {choice.item!r} of {source!r}; convert them"
            )
        unknown = [name for name in choice.numbers if name not in names]
        if unknown:
            raise ValueError(unknown_name("attribute_numbers", unknown[0], names))

        def kind_of(dtype: pa.DataType, name: str, path: str) -> str:
            return attribute_kind(dtype, name, path, as_number=name in choice.numbers)

        kinds: Any = {name: same_kind(schemas, name, kind_of) for name in names}
        return cls(
            filesystem=filesystem,
            paths=tuple(paths),
            choice=choice,
            item_type=item_type,
            kinds=kinds,
        )

    def describe(self) -> list[dict[str, Any]]:
        """JSON for the manifest: path, size in bytes and checksum of each file."""
        return [self._describe(path) for path in self.paths]

    def item_ids(self) -> pa.Array:
        """(n,) item ids of all files.

        Raises:
            ValueError: an id is null, invalid, or occurs twice.
        """
        parts = [
            read_ids(self._read(path, self.choice.item), self._place(path)) for path in self.paths
        ]
        chunks = [chunk for part in parts for chunk in part.chunks]
        ids = pa.chunked_array(chunks, parts[0].type).combine_chunks()
        counts = pc.value_counts(ids)
        twice = counts.filter(pc.greater(counts.field("counts"), 1))
        if len(twice):
            raise ValueError(
                f"item_attributes must have one row an item, got {twice[0]['counts'].as_py()} for "
                f"{twice[0]['values'].as_py()!r}; join the rows into one"
            )
        return ids

    def raw(self, name: str, rows: Array) -> tuple[RawValues, str]:
        """The values of an attribute in some rows of the files, and the Arrow type of a value.

        Args:
            name: name of the column.
            rows: (n,) int64 row of each item in the files, -1 for an item that has none.

        Raises:
            ValueError: a value is invalid; the message names file and column.
        """
        kind, asked = self.kinds[name], pa.array(rows, mask=rows < 0)
        parts = [
            _plain(self._read(path, name).combine_chunks(), kind, self._place(path, name))
            for path in self.paths
        ]
        types = list(dict.fromkeys(part.type for part in parts))
        if len(types) > 1:
            raise ValueError(
                f"column {name!r} of item_attributes must have one type in all files, got "
                f"{types[0]} and {types[1]}; convert one of them"
            )
        values = pa.concat_arrays(parts)
        values = _fixed_size(values, name) if kind == "vector" else values
        taken = values.take(asked)
        if kind == "number":
            return pc.fill_null(taken, np.nan).to_numpy(), "double"
        return taken, str(taken.type if kind == "category" else taken.type.value_type)

    def _read(self, path: str, name: str) -> pa.ChunkedArray:
        try:
            with self.filesystem.open_input_file(path) as stream:
                return pq.ParquetFile(stream).read([name]).column(name)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{self._place(path, name)} must be valid Parquet data, got "
                f"{short_message(error)}; the file is corrupt or truncated: copy it again"
            ) from error

    def _place(self, path: str, name: str | None = None) -> str:
        return f"{path!r}, column {name or self.choice.item!r}"

    def _describe(self, path: str) -> dict[str, Any]:
        with self.filesystem.open_input_file(path) as stream:
            return {"path": path, "bytes": stream.size(), "sha256": digest(stream)}


def attribute_kind(dtype: pa.DataType, name: str, path: str, *, as_number: bool = False) -> Kind:
    """The kind of attribute that a column of this Arrow type becomes.

    Text, integers and booleans are categories; floats, decimals and times are numbers, as are
    integers with ``as_number``; lists of text, integers or booleans are lists; lists of floats are
    vectors.

    Raises:
        ValueError: the type is none of these, or ``as_number`` is set and the type is no integer.
    """
    value = value_type(dtype)
    if as_number and not pa.types.is_integer(value):
        raise ValueError(
            f"attribute_numbers must name integer columns, got {name!r} of type {dtype} in "
            f"{path!r}; floats are numbers anyway, remove others"
        )
    if _is_number(value) or as_number:
        return "number"
    if _is_category(value):
        return "category"
    if _is_list(value):
        element = value_type(value.value_type)
        if _is_category(element):
            return "list"
        if pa.types.is_floating(element):
            return "vector"
    raise ValueError(
        f"column {name!r} of {path!r} must hold text, integers, booleans, numbers, times, or lists "
        f"of text, integers, booleans or floats, got {dtype}; convert it, or name the columns to "
        "take in attributes"
    )


def fit_column(
    name: str,
    kind: Kind,
    raw: RawValues,
    dtype: str,
    *,
    buckets: int,
    former: AttributeColumn | None,
) -> AttributeColumn:
    """The column that encodes these raw values.

    What ``former`` has is kept, so that codes keep their meaning: its values come before new
    ones, and its borders and scale do not change.

    Raises:
        ValueError: there are more than ``MOST_VALUES`` distinct values.
    """
    if former is not None and not _continues(former, kind, raw, dtype):
        former = None
    if kind == "vector":
        width = raw.type.list_size
        scale = _vector_scale(raw) if former is None else former.scale
        return AttributeColumn(name=name, kind=kind, type=dtype, width=width, scale=scale)
    if kind == "number":
        borders = _borders(raw, buckets) if former is None else former.borders
        return AttributeColumn(name=name, kind=kind, type=dtype, borders=borders)
    known = () if former is None else former.values
    found = (raw.flatten() if kind == "list" else raw).unique().drop_null()
    new = found.filter(pc.invert(pc.is_in(found, value_set=pa.array(known, found.type))))
    values = (*known, *sorted(new.to_pylist()))
    if len(values) > MOST_VALUES:
        raise ValueError(
            f"attribute {name!r} must have at most {MOST_VALUES:,} different values, got "
            f"{len(values):,}; name the columns to take in attributes without it"
        )
    return AttributeColumn(name=name, kind=kind, type=dtype, values=values)


def _continues(former: AttributeColumn, kind: Kind, raw: RawValues, dtype: str) -> bool:
    width = raw.type.list_size if kind == "vector" else 0
    return (former.kind, former.type, former.width) == (kind, dtype, width)


def _borders(values: Array, buckets: int) -> tuple[float, ...]:
    """Quantiles that cut the values into at most ``buckets`` buckets of about equal size.

    Example:
        >>> _borders(np.array([1.0, 2.0, 3.0, 4.0, np.nan]), 2)
        (3.0,)
    """
    values = values[~np.isnan(values)]
    if not len(values):
        return ()
    places = len(values) * np.arange(1, buckets) // buckets
    borders = np.unique(np.sort(values)[places])
    return tuple(borders[borders > values.min()].tolist())


def _vector_scale(raw: pa.Array) -> float:
    """One over the root of the mean square norm of the vectors; 1 where all are zero."""
    present = raw.drop_null()
    total = float(np.square(present.flatten().to_numpy(), dtype=np.float64).sum())
    return float(np.sqrt(len(present) / total)) if total > 0 else 1.0


def _plain(column: pa.Array, kind: Kind, place: str) -> pa.Array:
    """The values of a column in the one type of their kind; nulls stay."""
    plain = {"category": _plain_values, "number": _plain_numbers}.get(kind, _plain_lists)
    try:
        return plain(pc.cast(column, value_type(column.type)), place)
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{place} must fit into 64 bits, got {short_message(error)}; store it as text"
        ) from error


def _plain_values(values: pa.Array, place: str) -> pa.Array:
    if is_text(values.type):
        return plain_text(values, place).cast(pa.string())
    return pc.cast(values, pa.int64() if pa.types.is_integer(values.type) else pa.bool_())


def _plain_numbers(values: pa.Array, place: str) -> pa.Array:
    if pa.types.is_temporal(values.type):
        values = pc.cast(pc.cast(values, pa.timestamp("us"), safe=False), pa.int64())
    numbers = pc.cast(values, pa.float64(), safe=False)
    if pc.any(pc.is_inf(numbers)).as_py():
        raise ValueError(f"{place} must hold finite numbers, got an infinite one; store it as null")
    return numbers


def _plain_lists(lists: pa.Array, place: str) -> pa.Array:
    values = lists.flatten()
    values = pc.cast(values, value_type(values.type))
    if pa.types.is_floating(values.type):
        if values.null_count or not pc.all(pc.is_finite(values), min_count=0).as_py():
            raise ValueError(
                f"{place} must hold vectors of finite numbers, got null, NaN or infinity in one; "
                "make the whole vector null where it is unknown"
            )
        values = pc.cast(values, pa.float32(), safe=False)
    else:
        values = _plain_values(values, place)
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    offsets = pa.array(np.append(0, np.cumsum(lengths)), pa.int64())
    return pa.LargeListArray.from_arrays(offsets, values, mask=lists.is_null())


def _fixed_size(vectors: pa.Array, name: str) -> pa.Array:
    """The vectors as fixed-size lists; nulls stay."""
    lengths = pc.list_value_length(vectors).unique().drop_null().to_pylist()
    if len(lengths) != 1 or not lengths[0]:
        found = " and ".join(map(str, sorted(lengths)[:2])) or "none"
        raise ValueError(
            f"column {name!r} of item_attributes must hold vectors of one length, got {found}; pad "
            "them, or leave the column out of attributes"
        )
    return vectors.cast(pa.list_(pa.float32(), lengths[0]))


def _is_number(dtype: pa.DataType) -> bool:
    is_time = pa.types.is_date(dtype) or pa.types.is_timestamp(dtype)
    return bool(pa.types.is_floating(dtype) or pa.types.is_decimal(dtype) or is_time)


def _is_category(dtype: pa.DataType) -> bool:
    return bool(is_text(dtype) or pa.types.is_integer(dtype) or pa.types.is_boolean(dtype))


def _is_list(dtype: pa.DataType) -> bool:
    is_variable = pa.types.is_list(dtype) or pa.types.is_large_list(dtype)
    return bool(is_variable or pa.types.is_fixed_size_list(dtype))


def _schema(filesystem: fs.FileSystem, path: str) -> pa.Schema:
    try:
        with filesystem.open_input_file(path) as stream:
            return pq.ParquetFile(stream).schema_arrow
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path!r} must be a complete Parquet file, got an unreadable footer "
            f"({short_message(error)}); it may be truncated: copy it again"
        ) from error


def _check_names(path: str, schema: pa.Schema, item: str, names: Sequence[str]) -> None:
    if item not in schema.names:
        raise ValueError(f"{path!r}: " + unknown_name("attribute_item_column", item, schema.names))
    if not names:
        raise ValueError(f"{path!r} must have a column besides {item!r}, got none; add attributes")
    for name in names:
        count = schema.names.count(name)
        if not count:
            raise ValueError(f"{path!r}: " + unknown_name("attributes", name, schema.names))
        if count > 1:
            raise ValueError(
                f"{path!r} must have one column {name!r}, got {count}; rename all but one"
            )
