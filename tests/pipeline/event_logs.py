"""Small event logs, and what prepare makes of them with dense indices turned back into ids."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shardrec.pipeline.prepare import PrepareConfig, prepare
from shardrec.pipeline.prepared.manifest import Manifest

Event = tuple[int, int, int]


def write_random_log(path: Path, num_events: int, *, time_bits: int = 40) -> str:
    """Uniform events, 20 a user, over 5,000 items; more bits of time compress less."""
    draw = np.random.default_rng(0)
    columns = {
        "user_id": draw.integers(0, num_events // 20 + 2, num_events),
        "item_id": draw.integers(0, 5000, num_events),
        "timestamp": draw.integers(0, 1 << time_bits, num_events),
    }
    pq.write_table(pa.table(columns), path)
    return str(path)


def make_events(num: int = 3000, seed: int = 0) -> list[Event]:
    """Events with ties in time, repeats, exact duplicates, skewed users and items."""
    draw = random.Random(seed)
    events = [
        (int(80 * draw.random() ** 2), int(50 * draw.random() ** 3), draw.randrange(400))
        for _ in range(num)
    ]
    return events + draw.sample(events, num // 20)


def write_log(path: Path, events: list[Event], **extra: Any) -> str:
    user, item, time = zip(*events, strict=True)
    columns = {"user_id": user, "item_id": item, "timestamp": time} | extra
    pq.write_table(pa.table(columns), path, row_group_size=700)
    return str(path)


def prepare_events(folder: Path, events: list[Event], **options: Any) -> tuple[Manifest, Path]:
    folder.mkdir(exist_ok=True)
    log = write_log(folder / "log.parquet", events)
    output = folder / "out"
    return prepare(PrepareConfig(events=log, output=str(output), **options)), output


def read_rows(output: Path, name: str, column: str = "items") -> dict[Any, list[Any]]:
    """user id -> the column, with dense indices turned back into item ids."""
    item_ids = pq.read_table(output / "items.parquet")["item_id"].to_pylist()
    files = sorted(output.glob(name))
    tables = [pq.read_table(path) for path in files]
    rows = [(r["user_id"], r[column]) for table in tables for r in table.to_pylist()]
    assert len({user for user, _ in rows}) == len(rows)
    return {user: [item_ids[item] for item in items] for user, items in rows}


def cut_time(events: list[Event], share: float) -> int:
    times = sorted(time for _, _, time in dict.fromkeys(events))
    return times[int(share * len(times))]
