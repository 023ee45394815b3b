"""A small log that a model can learn: most items are followed by one and the same item."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from shardrec.modules.encoder import EncoderConfig
from shardrec.pipeline.prepare import PrepareConfig, prepare
from shardrec.pipeline.prepared.loader import BatchConfig
from shardrec.pipeline.run.config import LimitConfig, TrainConfig

NUM_ITEMS = 53
NUM_USERS = 97


def write_log(path: Path, *, seed: int = 0, num_users: int = NUM_USERS) -> Path:
    """Events of users whose next item is a fixed successor four times in five.

    Users act in turn. The tenth event of each is one of three late items that come nowhere else.
    """
    generator = np.random.default_rng(seed)
    successor = generator.permutation(NUM_ITEMS)
    users, items, times = [], [], []
    for user in range(num_users):
        item = int(generator.integers(NUM_ITEMS))
        for turn in range(int(generator.integers(3, 14))):
            users.append(user)
            items.append(NUM_ITEMS + user % 3 if turn == 9 else item)
            times.append(turn * num_users + user)
            follows = generator.random() < 0.8
            item = int(successor[item]) if follows else int(generator.integers(NUM_ITEMS))
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


class Running(nn.Module):
    """Not ours: the running mean of the vectors, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, vectors: Tensor) -> Tensor:
        count = torch.arange(1, vectors.shape[1] + 1, device=vectors.device)[:, None]
        states: Tensor = vectors + self.linear(vectors.cumsum(1) / count)
        return states
