"""Our trainer in peers.py, run in a process of its own."""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from record import peak_rss_bytes, rss_bytes

from shardrec.modules.catalog_config import CatalogConfig
from shardrec.modules.encoder import EncoderConfig
from shardrec.modules.losses import CCE, CCEMinus
from shardrec.pipeline.prepared.loader import BatchConfig
from shardrec.pipeline.run.callbacks import StepReport
from shardrec.pipeline.run.config import LimitConfig, OptimizerConfig, TrainConfig, ValidationConfig
from shardrec.pipeline.train import train


class Clock:
    """Records the end time, loss and number of targets of each step."""

    def __init__(self) -> None:
        """Starts empty."""
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.positions: list[int] = []

    def on_step(self, report: StepReport) -> None:
        """Notes a step."""
        self.ends.append(time.perf_counter())
        self.losses.append(report.loss)
        self.positions.append(report.positions)

    def on_validation(self, report: Any) -> None:
        """Nothing to note."""

    def on_checkpoint(self, report: Any) -> None:
        """Nothing to note."""

    def on_end(self, report: Any) -> None:
        """Nothing to note."""


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train for warm-up and steps; returns step times, peak memory and losses."""
    imports = rss_bytes()
    torch.set_num_threads(job["threads"])
    sampled = CCEMinus(num_negatives=job["negatives"], share=job.get("share", 128))
    folder = tempfile.mkdtemp()
    config = TrainConfig(
        data=job["data"],
        output=folder,
        loss=CCE() if job["full"] else sampled,
        catalog=CatalogConfig(optimizer="adam", learning_rate=1e-3, betas=(0.9, 0.98)),
        encoder=EncoderConfig(width=job["width"], max_length=job["length"], num_heads=2),
        batches=BatchConfig(batch_size=job["batch"]),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        limits=LimitConfig(max_epochs=None, max_steps=job["warmup"] + job["steps"]),
        validation=ValidationConfig(every_epochs=None),
        show_progress=False,
    )
    clock = Clock()
    train(config, callbacks=[clock])
    shutil.rmtree(folder)
    times = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
    return {
        "times_s": times[job["warmup"] - 1 :],
        "peak_bytes": peak_rss_bytes(),
        "import_bytes": imports,
        "targets_per_step": sum(clock.positions) / len(clock.positions),
        "num_items": job["num_items"],
        "loss_first": clock.losses[0],
        "loss_last": clock.losses[-1],
        "trainer_version": "this commit",
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", type=json.loads, required=True)
    print(json.dumps(run(parser.parse_args().job)))
