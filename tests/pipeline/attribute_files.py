"""A file of attributes for the items of ``small_data.write_log``, and what is in it."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

# Items 0 to 55 are in the log, 2 has no row, and from 56 on no event names them.
ITEMS = [*range(2), *range(3, 60)]


def brand(item: int) -> str | None:
    return None if item % 11 == 5 else f"brand {item % 4}"


def tags(item: int) -> list[int] | None:
    return None if item % 13 == 6 else [10 * tag for tag in range(item % 3)]


def price(item: int) -> float | None:
    return None if item % 17 == 9 else (item * 37 % 50) / 4


def text(item: int) -> list[float] | None:
    return None if item % 19 == 3 else [float(item % 5), 1.0, -float(item % 7)]


def attribute_table(items: list[int] = ITEMS) -> pa.Table:
    columns: dict[str, Any] = {
        "item_id": pa.array(items, pa.int64()),
        "brand": pa.array([brand(item) for item in items], pa.string()),
        "on_sale": pa.array([item % 2 == 0 for item in items], pa.bool_()),
        "tags": pa.array([tags(item) for item in items], pa.list_(pa.int32())),
        "price": pa.array([price(item) for item in items], pa.float32()),
        "text": pa.array([text(item) for item in items], pa.list_(pa.float32(), 3)),
    }
    return pa.table(columns)


def write_attributes(path: Path, items: list[int] = ITEMS) -> str:
    pq.write_table(attribute_table(items), path)
    return str(path)
