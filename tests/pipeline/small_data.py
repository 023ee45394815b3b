"""A small log that a model can learn: most items are followed by one and the same item."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shardrec.modules.encoder import EncoderConfig
from shardrec.pipeline.data import BatchConfig
from shardrec.pipeline.prepare import PrepareConfig, prepare
from shardrec.pipeline.run import LimitConfig, TrainConfig

NUM_ITEMS = 53
NUM_USERS = 97


def write_log(path: Path, *, seed: int = 0, num_users: int = NUM_USERS) -> Path:
    """Events of users whose next item is a fixed successor four times in five."""
    generator = np.random.default_rng(seed)
    successor = generator.permutation(NUM_ITEMS)
    users, items = [], []
    for user in range(num_users):
        item = int(generator.integers(NUM_ITEMS))
        for _ in range(int(generator.integers(3, 14))):
            users.append(user)
            items.append(item)
            follows = generator.random() < 0.8
            item = int(successor[item]) if follows else int(generator.integers(NUM_ITEMS))
    times = np.arange(len(users))
    weights = generator.random(len(users)).astype(np.float32) + 0.5
    columns = {"user_id": users, "item_id": items, "timestamp": times, "weight": weights}
    pq.write_table(pa.table(columns), path)
    return path


def prepare_small(folder: Path, **options: object) -> str:
    """A prepared folder of that log, in several row groups; options are those of prepare."""
    folder.mkdir(parents=True, exist_ok=True)
    log = write_log(folder / "log.parquet")
    settings: dict[str, object] = {
        "events": str(log),
        "output": str(folder / "prepared"),
        "split": "leave_one_out",
        "sequences_per_row_group": 16,
        "threads": 1,
    }
    prepare(PrepareConfig(**(settings | options)))  # type: ignore[arg-type]
    return str(settings["output"])


def small_config(data: str, output: Path | str, **options: object) -> TrainConfig:
    """A run of a few steps; options replace those of the config."""
    settings: dict[str, object] = {
        "data": data,
        "output": str(output),
        "encoder": EncoderConfig(width=16, max_length=8, dropout=0.0),
        "batches": BatchConfig(batch_size=20),
        "limits": LimitConfig(max_epochs=2),
        "show_progress": False,
        "device": "cpu",
    }
    return TrainConfig(**(settings | options))  # type: ignore[arg-type]
