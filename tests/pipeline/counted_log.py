"""Prepared folders with events that count up, and a loader over them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shardrec.pipeline.prepared.loader import BatchConfig, Prepared, TrainingBatches

NUM_ITEMS = 1 << 19


def write_prepared(
    folder: Path,
    lengths: np.ndarray,
    *,
    row_group_size: int = 8,
    files: int = 2,
    weights: bool = False,
    test_users: int = 23,
) -> Path:
    """A prepared folder with events that count up: event e of the whole log is item e."""
    (folder / "train").mkdir(parents=True)
    rows = np.array_split(np.arange(len(lengths)), files)
    first = np.cumsum(lengths) - lengths
    for part, members in enumerate(rows):
        sequences = [np.arange(first[r], first[r] + lengths[r]) for r in members]
        columns = {
            "user_id": pa.array(members),
            "items": pa.array(sequences, pa.list_(pa.int64())),
            "length": pa.array(lengths[members], pa.int32()),
        }
        if weights:
            columns["weights"] = pa.array([s / 2 for s in sequences], pa.list_(pa.float32()))
        write(folder / f"train/part-{part:05d}.parquet", columns, row_group_size)
    for name in ("validation", "test"):
        histories = [np.arange(u, u + 1 + u % 7) for u in range(test_users)]
        targets = [np.arange(100 + u, 101 + u + u % 3) for u in range(test_users)]
        columns = {
            "user_id": pa.array(np.arange(test_users)),
            "items": pa.array(histories, pa.list_(pa.int64())),
            "targets": pa.array(targets, pa.list_(pa.int64())),
        }
        write(folder / f"{name}.parquet", columns, row_group_size)
    items = np.arange(NUM_ITEMS if len(lengths) < 9 else 0)
    columns = {
        "item_id": pa.array(items * 10),
        "item": pa.array(items),
        "count": pa.array(items % 5),
    }
    write(folder / "items.parquet", columns, 1 << 18)
    write_manifest(folder, lengths, weights)
    return folder


def write(path: Path, columns: dict[str, pa.Array], row_group_size: int) -> None:
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size, write_page_checksum=True)


def write_manifest(folder: Path, lengths: np.ndarray, weights: bool) -> None:
    names = ("items.parquet", "validation.parquet", "test.parquet")
    paths = sorted((folder / "train").iterdir()) + [folder / name for name in names]
    files = [
        {
            "path": str(path.relative_to(folder)),
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "rows": pq.read_metadata(path).num_rows,
            "row_groups": pq.read_metadata(path).num_row_groups,
        }
        for path in paths
    ]
    column = {"name": "w", "type": "float"} if weights else None
    manifest = {
        "format": "shardrec.prepared",
        "schema_version": 1,
        "shardrec_version": "0.1.0",
        "config": {},
        "source": {"files": []},
        "columns": {
            "user": {"name": "user_id", "type": "int64"},
            "item": {"name": "item_id", "type": "int64"},
            "time": {"name": "timestamp", "type": "int64"},
            "weight": column,
        },
        "split": {
            "kind": "temporal",
            "targets": "last",
            "validation": "users",
            "test_time": None,
            "validation_time": None,
        },
        "counts": {
            "items": NUM_ITEMS,
            "train_sequences": len(lengths),
            "train_users": len(lengths),
            "validation_users": 0,
        },
        "quantiles": {},
        "load_per_rank": {},
        "files": files,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def lengths_of(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, 30, size=rows)


def loader(folder: Path, rank: int = 0, world_size: int = 1, **options: Any) -> TrainingBatches:
    config: dict[str, Any] = {"batch_size": 10, "shuffle_row_groups": 3} | options
    max_length = config.pop("max_length", 9)
    return TrainingBatches(
        Prepared.open(folder),
        BatchConfig(**config),
        max_length=max_length,
        rank=rank,
        world_size=world_size,
        seed=3,
    )
