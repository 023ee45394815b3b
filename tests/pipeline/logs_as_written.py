"""A log of thirty users, written in the ways that warehouses write logs, and what prepare reads."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shardrec.pipeline.prepare import PrepareConfig, prepare
from shardrec.pipeline.prepared.manifest import Manifest

USERS, EVENTS_A_USER = 30, 6


def columns() -> dict[str, Any]:
    """User 3 meets the items 21, 24, 27, 30, 33 and 36, in this order; no two events tie."""
    user = np.repeat(np.arange(USERS), EVENTS_A_USER)
    step = np.tile(np.arange(EVENTS_A_USER), USERS)
    return {"user_id": user, "item_id": (user * 7 + step * 3) % 40, "timestamp": step * 1000 + user}


def write(path: Path, rows: Any = slice(None), drop: tuple[str, ...] = (), **changed: Any) -> str:
    """Write rows of the log to Parquet, with other columns where given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({k: v for k, v in (columns() | changed).items() if k not in drop})
    pq.write_table(table.take(np.arange(table.num_rows)[rows]), path)
    return str(path)


def prepared(events: Path | str, folder: Path, **options: Any) -> Manifest:
    """The manifest of the log, by default split so that every user's last event is the target."""
    settings: dict[str, Any] = {"split": "leave_one_out", "validation": "none", "threads": 1}
    config = PrepareConfig(events=str(events), output=str(folder), **(settings | options))
    return prepare(config)


def sequences(folder: Path) -> dict[Any, list[Any]]:
    """user id -> all its item ids in order, from the test part of a prepared folder."""
    ids = pq.read_table(folder / "items.parquet")["item_id"].to_pylist()
    rows = pq.read_table(folder / "test.parquet").to_pylist()
    return {row["user_id"]: [ids[item] for item in row["items"] + row["targets"]] for row in rows}


def read(events: Path | str, folder: Path, **options: Any) -> dict[Any, list[Any]]:
    """The sequences that prepare makes of a log."""
    prepared(events, folder, **options)
    return sequences(folder)


def expected() -> dict[int, list[int]]:
    """The sequences of the log as it is."""
    items = columns()["item_id"].reshape(USERS, EVENTS_A_USER).tolist()
    return dict(enumerate(items))
