"""Read the items of an export, and check the ids that a service receives."""

import math
import numbers
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from shardrec.pipeline.prepared.ids import require_ids, wide
from shardrec.pipeline.prepared.item_ids import ItemIds

__all__ = ["known_ids", "read_items"]

_BATCH_ROWS = 65_536
_LEAST_ID, _LARGEST_ID = -(1 << 63), (1 << 63) - 1
# Parquet packs equal values: a table of one and the same vector takes about as much.
_MOST_PACKED, _SMALL_BYTES = 64, 64 << 20
_REMEDY = "export the run again"


def read_items(folder: Path, manifest: dict[str, Any]) -> tuple[ItemIds, Tensor, Tensor]:
    """Item ids, (V,) int64 training counts and (V, D) float32 vectors of an export, by item.

    Raises:
        ValueError: a file is not as ``export`` writes it, or its sizes differ from the manifest's.
    """
    num_items, width = manifest["num_items"], manifest["width"]
    entries = [entry for entry in manifest["files"] if entry["path"].startswith("items/")]
    files = [folder / path for path in sorted(entry["path"] for entry in entries)]
    room = _MOST_PACKED * sum(entry["bytes"] for entry in entries) + _SMALL_BYTES
    if num_items < 1 or width < 1 or 4 * num_items * width > room:
        raise ValueError(
            f"the manifest of {folder} must have num_items and width that its files can hold, got "
            f"{num_items} and {width}; {_REMEDY}"
        )
    vectors = torch.empty(num_items, width)
    ids, counts, first = [], [], 0
    for path in files:
        for batch in _batches(path, width):
            last = first + len(batch)
            if last <= num_items:
                values = batch.column("vector").flatten().to_numpy(zero_copy_only=False)
                vectors[first:last].view(-1).numpy()[:] = values
            ids.append(wide(batch.column("item_id")))
            counts.append(batch.column("count").to_numpy(zero_copy_only=False))
            first = last
    if first != num_items or len({one.type for one in ids}) != 1:
        raise ValueError(
            f"items of {folder} must be {num_items} with ids of one type, got {first}; {_REMEDY}"
        )
    if not math.isfinite(torch.linalg.vector_norm(vectors)):
        raise ValueError(f"vectors of {folder} must be finite, got NaN or infinity; {_REMEDY}")
    return ItemIds(pa.concat_arrays(ids)), torch.from_numpy(np.concatenate(counts)), vectors


def _batches(path: Path, width: int) -> Iterator[pa.RecordBatch]:
    """Batches of one file, whose columns are checked.

    Raises:
        ValueError: the file cannot be decoded, or is of other columns.
    """
    wanted = {"count": pa.int64(), "vector": pa.list_(pa.float32(), width)}
    names = ["item_id", *wanted]
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        found = {name: file.schema_arrow.field(name).type for name in names}
        require_ids(found["item_id"], "item_id", str(path))
        if found != wanted | {"item_id": found["item_id"]}:
            raise ValueError(f"columns of other types: {found}")
        for batch in file.iter_batches(_BATCH_ROWS, columns=names):
            if any(batch.column(name).null_count for name in names):
                raise ValueError("nulls")
            yield batch
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} must hold items of an export, got {error}; {_REMEDY}") from error


def known_ids(
    histories: Iterable[Sequence[Any]], kind: pa.DataType, name: str = "history"
) -> Iterator[pa.Array]:
    """For each history (or other list, called ``name``), an array of ids in the catalog's type.

    Whole numbers beyond 64 bits are left out: they are in no catalog.

    Raises:
        TypeError: an id is of another type; the message says which.
    """
    is_number = pa.types.is_integer(kind)
    for index, history in enumerate(histories):
        try:
            ids: list[Any] = [_whole(one) if is_number else _text(one) for one in history]
        except TypeError as error:
            what = "whole numbers" if is_number else "texts"
            raise TypeError(
                f"ids of {name} {index} must be {what} as in the catalog, got {error}; convert "
                "them, or leave the history out"
            ) from None
        near = [one for one in ids if not is_number or _LEAST_ID <= one <= _LARGEST_ID]
        yield pa.array(near, kind)


def _whole(value: Any) -> int:
    """A whole number of any type but bool.

    Example:
        >>> _whole(np.int32(7)), _whole(7.0)
        (7, 7)
    """
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return int(value)
    raise TypeError(repr(value))


def _text(value: Any) -> str:
    if isinstance(value, str):
        return str(value)
    raise TypeError(repr(value))
