"""Wrote the folders next to this file, and the numbers they must give, with commit c53ea15.

Run in an empty folder with that commit's ``src`` as PYTHONPATH; ``test_written_before.py`` reads
the result. The lock and the TensorBoard files of the run were removed, the rest is as written.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from shardrec.modules.catalog import CatalogConfig  # type: ignore[attr-defined]
from shardrec.modules.encoder import EncoderConfig
from shardrec.modules.losses import CCEMinus
from shardrec.pipeline.evaluate import evaluate
from shardrec.pipeline.export import ExportConfig, export
from shardrec.pipeline.prepare import PrepareConfig, prepare
from shardrec.pipeline.recipes import tiny_cpu
from shardrec.pipeline.serve import Recommender
from shardrec.pipeline.train import LimitConfig, train

HISTORIES = [[3], [5, 1, 4], [2, 2, 7, 30, 11]]


def write_log() -> None:
    """60 users with 3 to 12 events each on 40 items."""
    draw = np.random.default_rng(0)
    sizes = draw.integers(3, 13, 60)
    users = np.repeat(np.arange(60), sizes)
    columns = {
        "user_id": users,
        "item_id": draw.integers(0, 40, len(users)),
        "timestamp": np.arange(len(users)),
    }
    pq.write_table(pa.table(columns), "log.parquet")


def train_to(last_step: int, output: str) -> list[float]:
    """Starts the run or goes on with it; the losses."""
    config = dataclasses.replace(
        tiny_cpu("prepared", output),
        loss=CCEMinus(num_negatives=16, share=8),
        catalog=CatalogConfig(optimizer="adam", learning_rate=0.01),
        encoder=EncoderConfig(width=8, max_length=8, num_blocks=1, dropout=0.0),
        limits=LimitConfig(max_epochs=None, max_steps=last_step),
        show_progress=False,
    )
    config = dataclasses.replace(
        config,
        validation=dataclasses.replace(config.validation, every_steps=3),
    )
    losses: list[float] = []
    idle = dict.fromkeys(("on_validation", "on_checkpoint", "on_end"), lambda report: None)
    recorder: Any = SimpleNamespace(on_step=lambda report: losses.append(report.loss), **idle)
    train(config, callbacks=[recorder], resume="auto")
    return losses


def on_two_ranks(rank: int, last_step: int, output: str) -> None:
    """As ``train_to``; rank 0 leaves the losses in a file."""
    rendezvous = Path(f"{output}.rendezvous").absolute()
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=2)
    losses = train_to(last_step, output)
    if rank == 0:
        with open("losses.json", "w") as file:
            json.dump(losses, file)


def main() -> None:
    """The folders, and expected.json."""
    write_log()
    prepare(
        PrepareConfig(events="log.parquet", output="prepared", split="leave_one_out", threads=1)
    )
    spawn(on_two_ranks, (5, "run"), nprocs=2)
    export(ExportConfig(run="run", prepared="prepared", output="export"))
    report = evaluate("run", "prepared", output="metrics.json")
    expected: dict[str, Any] = {"metrics": report["metrics"]}
    expected["served"] = Recommender.open("export").recommend(HISTORIES, k=4)
    shutil.copytree("run", "alone")
    expected["losses_alone"] = train_to(9, "alone")
    shutil.copytree("run", "together")
    spawn(on_two_ranks, (9, "together"), nprocs=2)
    with open("losses.json") as file:
        expected["losses_of_two"] = json.load(file)
    with open("expected.json", "w") as file:
        json.dump(expected, file, indent=1)


if __name__ == "__main__":
    main()
