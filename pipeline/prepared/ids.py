"""Ids as logs and warehouses store them: their kind, and conversion to int64 or text.

Text is held as Arrow's ``large_string``, because a ``string`` array cannot exceed 2 GiB; ``stored``
converts it to ``string``, chunk by chunk, before a Parquet file is written.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

__all__ = [
    "id_kind",
    "is_text",
    "plain_ids",
    "plain_text",
    "require_ids",
    "short_message",
    "stored",
    "stored_type",
    "value_type",
    "whole_numbers",
    "wide",
]

# A table of at most so many bytes has no text column beyond the 2 GiB of 32-bit offsets.
_MOST_BYTES = 1 << 30
_UUID_BYTES = 16
_DASHES = (8, 13, 18, 23)
_WHOLE_BITS = {"halffloat": 11, "float": 24, "double": 53}


def id_kind(dtype: pa.DataType) -> str:
    """The kind of an id column: "int64", "string", or the name of any other type.

    Floats and decimals are "int64": their values must be whole. UUIDs and bytes are "string".
    """
    value = value_type(dtype)
    if pa.types.is_integer(value) or pa.types.is_floating(value) or pa.types.is_decimal(value):
        return "int64"
    return "string" if is_text(value) or _is_bytes(value) or _is_uuid(value) else str(dtype)


def require_ids(dtype: pa.DataType, name: str, path: str) -> str:
    """The kind of an id column, "int64" or "string".

    Raises:
        ValueError: the type is another one.
    """
    kind = id_kind(dtype)
    if kind not in ("int64", "string"):
        raise ValueError(
            f"column {name!r} of {path!r} must be integer or string, got {dtype}; convert the ids"
        )
    return kind


def plain_ids(column: pa.ChunkedArray, place: str) -> pa.ChunkedArray:
    """(n,) ids as int64 or large_string, by their kind; nulls stay nulls.

    Raises:
        ValueError: an id is not a whole number, beyond int64, or not UTF-8; the message starts with
            ``place``.
    """
    dtype = value_type(column.type)
    if _is_uuid(dtype):
        return _uuid_text(column)
    if id_kind(dtype) == "string":
        return plain_text(column, place)
    return whole_numbers(column, place)


def plain_text(column: pa.ChunkedArray, place: str) -> pa.ChunkedArray:
    """(n,) values as large_string; nulls stay nulls.

    Raises:
        ValueError: a value is not UTF-8, which Parquet does not guarantee.
    """
    unchecked = pc.CastOptions(target_type=pa.large_string(), allow_invalid_utf8=True)
    text = pc.cast(column, options=unchecked)
    try:
        text.validate(full=True)
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{place} must hold text in UTF-8, got {_first_invalid(text)!r}; decode such "
            "values in their own encoding, or drop the rows"
        ) from error
    return text


def whole_numbers(column: pa.ChunkedArray, place: str) -> pa.ChunkedArray:
    """(n,) integers, or floats and decimals that are whole, as int64; nulls stay nulls.

    Raises:
        ValueError: a value has a fraction, is beyond int64, or is a float so large that its
            neighbours are more than 1 apart.
    """
    plain = pc.cast(column, value_type(column.type))
    bits = _WHOLE_BITS.get(str(plain.type))
    if bits is not None:
        exact = pc.less(pc.abs(pc.cast(plain, pa.float64())), 2.0**bits)
        if pc.any(pc.invert(exact)).as_py():
            value = plain.filter(pc.invert(exact))[0].as_py()
            raise ValueError(
                f"{place} must hold whole numbers below 2**{bits} where their type is {plain.type},"
                f" got {value}; store them as integers or text before they become floats"
            )
    if pa.types.is_decimal(plain.type) and plain.type.bit_width < 128:
        plain = pc.cast(plain, pa.decimal128(38, plain.type.scale))
    try:
        return pc.cast(plain, pa.int64())
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{place} must fit into int64 as whole numbers, got {short_message(error)}; "
            "store other ids as text, other times as timestamps"
        ) from error


def wide(ids: pa.Array) -> pa.Array:
    """Text as large_string, which may exceed 2 GiB when concatenated; other ids unchanged."""
    return ids.cast(pa.large_string()) if is_text(ids.type) else ids


def stored_type(dtype: pa.DataType) -> pa.DataType:
    """The type in which the stages write ids to Parquet: ``string`` for text, else unchanged."""
    return pa.string() if is_text(dtype) else dtype


def stored(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table cast to ``schema``, where text is ``string``, in chunks below 2 GiB."""
    if table.nbytes <= _MOST_BYTES or table.num_rows < 2:
        try:
            return table.cast(schema)
        except pa.ArrowInvalid:  # of a slice, Arrow counts the bytes before it as well
            return table.take(np.arange(table.num_rows)).cast(schema)
    half = table.num_rows // 2
    return pa.concat_tables(
        [stored(table.slice(0, half), schema), stored(table.slice(half), schema)]
    )


def value_type(dtype: pa.DataType) -> pa.DataType:
    """The value type of a dictionary type; any other type unchanged."""
    return dtype.value_type if pa.types.is_dictionary(dtype) else dtype


def is_text(dtype: pa.DataType) -> bool:
    """Whether the type is one of Arrow's three string types."""
    return bool(
        pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or dtype == pa.string_view()
    )


def short_message(error: Exception) -> str:
    """The first line of the error's message."""
    return str(error).split("\n", 1)[0]


def _is_bytes(dtype: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(dtype) or pa.types.is_large_binary(dtype) or dtype == pa.binary_view()
    )


def _is_uuid(dtype: pa.DataType) -> bool:
    return getattr(dtype, "extension_name", None) == "arrow.uuid"


def _uuid_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    chunks = [_uuid_array(chunk.storage) for chunk in column.chunks]
    return pa.chunked_array(chunks, pa.large_string())


def _uuid_array(storage: pa.Array) -> pa.Array:
    """UUIDs of (n,) 16 bytes as text such as 550e8400-e29b-41d4-a716-446655440000."""
    filled = pc.fill_null(storage, bytes(_UUID_BYTES))
    start = filled.offset * _UUID_BYTES
    raw = np.frombuffer(filled.buffers()[1], np.uint8)[start : start + len(filled) * _UUID_BYTES]
    digits = np.frombuffer(raw.tobytes().hex().encode(), np.uint8).reshape(-1, 2 * _UUID_BYTES)
    text = np.full((len(filled), 2 * _UUID_BYTES + len(_DASHES)), ord("-"), np.uint8)
    text[:, [place for place in range(text.shape[1]) if place not in _DASHES]] = digits
    offsets = np.arange(len(filled) + 1, dtype=np.int64) * text.shape[1]
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(text)]
    values = pa.Array.from_buffers(pa.large_string(), len(filled), buffers)
    return pc.if_else(storage.is_valid(), values, pa.scalar(None, pa.large_string()))


def _first_invalid(text: pa.ChunkedArray) -> bytes | None:
    for value in pc.cast(text, pa.large_binary()).to_pylist():
        try:
            (value or b"").decode()
        except UnicodeDecodeError:
            return bytes(value)
    return None
