"""Check the column types of an event log in the file footers, and its values as they are read."""

import dataclasses
from collections.abc import Callable, Mapping

import pyarrow as pa
import pyarrow.compute as pc

from shardrec.pipeline.near_names import unknown_name
from shardrec.pipeline.prepared.ids import id_kind, plain_ids, plain_text, value_type

LARGEST_WEIGHT = 1e30  # sums of a batch must fit float32


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EventColumns:
    """Names of the columns of the log to read.

    Attributes:
        user: user ids.
        item: item ids.
        time: event times; None if only the order in the lists is known.
        event: event types; None reads every row.
        event_types: values of ``event`` to keep.
        type_weights: weight of each of ``event_types``; empty if they have none.
        weight: weights of the targets, or None.
        is_lists: whether a row is a user, with lists in all columns but ``user``.
    """

    user: str
    item: str
    time: str | None
    event: str | None = None
    event_types: tuple[str, ...] = ()
    type_weights: tuple[float, ...] = ()
    weight: str | None = None
    is_lists: bool = False

    @property
    def has_weights(self) -> bool:
        """Whether events have weights."""
        return self.weight is not None or bool(self.type_weights)

    def options(self) -> dict[str, str]:
        """The column names by the option that sets each, in a fixed order."""
        asked = {"user": self.user, "item": self.item, "time": self.time}
        asked |= {"event": self.event, "weight": self.weight}
        return {f"--{role}-column": name for role, name in asked.items() if name is not None}

    def names(self) -> list[str]:
        """The column names without repetition, in a fixed order."""
        return list(dict.fromkeys(self.options().values()))


def check_columns(path: str, schema: pa.Schema, columns: EventColumns) -> pa.Schema:
    """The schema of the events in a file, after checking that it has every column once.

    Raises:
        ValueError: a column is missing, occurs twice, has a nested type where none is allowed, or
            is no list where it must be.
    """
    for option, name in columns.options().items():
        count = schema.names.count(name)
        if not count:
            raise ValueError(f"{path!r}: " + unknown_name(option, name, schema.names))
        if count > 1:
            raise ValueError(
                f"{path!r} must have one column {name!r}, got {count}; rename all but one"
            )
    fields = [schema.field(name) for name in columns.names()]
    if columns.is_lists:
        fields = [one if one.name == columns.user else _element(one, path) for one in fields]
    elif is_list(schema.field(columns.item).type):
        raise ValueError(
            f"column {columns.item!r} of {path!r} must hold one id, got "
            f"{schema.field(columns.item).type}; for one row a user add --layout sequences"
        )
    events = pa.schema(fields)
    if columns.event is not None:
        _check_event_type(events.field(columns.event).type, columns.event, path)
    return events


def is_list(dtype: pa.DataType) -> bool:
    """Whether the type is one of Arrow's list types."""
    kinds = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
    checks = (getattr(pa.types, f"is_{kind}", None) for kind in kinds)
    return any(check(dtype) for check in checks if check is not None)


def _element(field: pa.Field, path: str) -> pa.Field:
    if not is_list(field.type):
        raise ValueError(
            f"column {field.name!r} of {path!r} must be a list for --layout sequences, got "
            f"{field.type}; write one list a user, or prepare with --layout events"
        )
    return pa.field(field.name, field.type.value_type)


def same_kind(
    schemas: Mapping[str, pa.Schema], name: str, kind: Callable[[pa.DataType, str, str], str]
) -> str:
    """The kind of a column, after checking that it is the same in all files.

    A column that holds only nulls has the kind of the others.

    Raises:
        ValueError: two files differ, or ``kind`` refuses the type in one of them.
    """
    types = {path: schema.field(name).type for path, schema in schemas.items()}
    kinds = {path: kind(dtype, name, path) for path, dtype in types.items() if dtype != pa.null()}
    first = next(iter(kinds), None)
    if first is None:
        return "int64"
    for path, found in kinds.items():
        if found != kinds[first]:
            raise ValueError(
                f"column {name!r} must have one type in all files, got {kinds[first]} in {first!r} "
                f"and {found} in {path!r}; convert one of them"
            )
    return kinds[first]


def weight_kind(dtype: pa.DataType, name: str, path: str) -> str:
    """The kind of weights: "float" for every numeric type."""
    value = value_type(dtype)
    if pa.types.is_integer(value) or pa.types.is_floating(value) or pa.types.is_decimal(value):
        return "float"
    raise ValueError(
        f"column {name!r} of {path!r} must be numeric, got {dtype}; convert the weights"
    )


def _check_event_type(dtype: pa.DataType, name: str, path: str) -> None:
    try:
        pc.cast(pa.array([], value_type(dtype)), pa.string())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise ValueError(
            f"column {name!r} of {path!r} must hold single values such as text or integers, got "
            f"{dtype}; convert the event types"
        ) from error


def read_ids(column: pa.ChunkedArray, place: str) -> pa.ChunkedArray:
    """The ids as non-negative int64 or as large_string, by their kind.

    Raises:
        ValueError: an id is null, negative, a fraction, beyond int64, or not UTF-8; the message
            starts with ``place``.
    """
    require_no_nulls(column, place)
    ids = plain_ids(column, place)
    low = pc.min(ids).as_py() if pa.types.is_integer(ids.type) else None
    if low is not None and low < 0:
        raise ValueError(
            f"{place} must hold ids of 0 or more, got {low}; "
            "drop rows with placeholder ids, or store the ids as strings"
        )
    return ids


def read_event_types(column: pa.ChunkedArray, place: str) -> pa.ChunkedArray:
    """The event types as text; nulls stay nulls.

    Raises:
        ValueError: a value is not UTF-8.
    """
    if id_kind(column.type) == "string":
        return plain_ids(column, place)
    return plain_text(column, place)


def read_weights(column: pa.ChunkedArray, place: str) -> pa.ChunkedArray:
    """The weights as float32.

    Raises:
        ValueError: a weight is null, negative, not finite, or so large that sums would not be.
    """
    require_no_nulls(column, place)
    weights = pc.cast(column, value_type(column.type))
    weights = pc.cast(pc.cast(weights, pa.float64(), safe=False), pa.float32(), safe=False)
    small = pc.and_(pc.is_finite(weights), pc.less_equal(weights, LARGEST_WEIGHT))
    wrong = pc.invert(pc.and_(small, pc.greater_equal(weights, 0.0)))
    if pc.any(wrong).as_py():
        value = weights.filter(wrong)[0].as_py()
        raise ValueError(
            f"{place} must hold finite weights of 0 or more, and at most {LARGEST_WEIGHT:g}, got "
            f"{value}; fix or drop those rows"
        )
    return weights


def require_no_nulls(column: pa.ChunkedArray, place: str) -> None:
    """Raise ValueError, which starts with ``place``, if a value is null."""
    if column.null_count:
        raise ValueError(
            f"{place} must have no nulls, got {column.null_count}; drop those rows or fill them"
        )
