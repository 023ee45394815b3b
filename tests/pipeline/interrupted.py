"""Runs that are interrupted, and what is compared of them."""

import json
from pathlib import Path
from typing import Any

from tests.pipeline.small_data import small_config

from shardrec.modules.catalog_config import CatalogConfig
from shardrec.modules.encoder import EncoderConfig
from shardrec.pipeline.checkpoint.store import Checkpoints, load_checkpoint
from shardrec.pipeline.prepared.loader import BatchConfig
from shardrec.pipeline.run.callbacks import Callback, StepReport, ValidationReport
from shardrec.pipeline.run.config import (
    CheckpointConfig,
    LimitConfig,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)
from shardrec.pipeline.run.resume import Resume
from shardrec.pipeline.train import train

STEPS = 6
# The gradient of a key's bias is rounding and nothing else: without this Adam would blow it up.
EPS = 1e-4
OFF = ValidationConfig(every_epochs=None)


class InterruptionError(Exception):
    """Ends a run from outside."""


class Recorder(Callback):
    """Keeps what was reported, and interrupts the run after a step."""

    def __init__(self, last_step: int | None = None) -> None:
        self.last_step = last_step
        self.losses: dict[int, float] = {}
        self.metrics: dict[int, dict[str, float]] = {}

    def on_step(self, report: StepReport) -> None:
        assert report.step not in self.losses
        self.losses[report.step] = report.loss
        if report.step == self.last_step:
            raise InterruptionError

    def on_validation(self, report: ValidationReport) -> None:
        self.metrics[report.step] = dict(report.metrics)


def config_of(data: str, output: Path, loss: Any, table: str, **options: Any) -> TrainConfig:
    """Dropout, warm-up, decay, clipping, accumulation that does not divide the epoch: all on."""
    settings: dict[str, Any] = {
        "loss": loss,
        "catalog": CatalogConfig(optimizer=table, learning_rate=0.05),
        "encoder": EncoderConfig(width=16, max_length=8, dropout=0.3),
        "batches": BatchConfig(batch_size=20),
        "optimizer": OptimizerConfig(
            warmup_steps=2, decay="cosine", clip_norm=0.5, accumulate=2, learning_rate=3e-3, eps=EPS
        ),
        "limits": LimitConfig(max_steps=STEPS),
        "validation": ValidationConfig(every_epochs=None, every_steps=4),
        "checkpoints": CheckpointConfig(every_steps=1, keep=STEPS),
        "log_every": 1,
    }
    return small_config(data, output, **(settings | options))


def train_and_read(config: TrainConfig, resume: Resume, stop: int | None = None) -> dict[str, Any]:
    """Losses and metrics by step, and all that the last checkpoint holds."""
    recorder = Recorder(stop)
    try:
        train(config, callbacks=[recorder], resume=resume)
    except InterruptionError:
        assert stop is not None
    folder = Checkpoints(Path(config.output) / "checkpoints", None).find("last")
    state = load_checkpoint(folder)
    progress = {name: one for name, one in state.progress.items() if name != "seconds"}
    progress["best"] = {k: v for k, v in (progress["best"] or {}).items() if k != "seconds"}
    whole, rows = state.tensors()
    return {
        "losses": recorder.losses,
        "metrics": recorder.metrics,
        "progress": json.dumps(progress),  # NaN equals NaN in text
        "numbers": {name: one.item() for name, one in state.table.items() if not one.ndim},
        "tensors": {name: one.clone() for name, one in (whole | rows).items()},
    }


def assert_recorded_once(output: Path, step: int) -> None:
    """Each step and each validation is in the metrics once, and in order."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    recorded = {
        kind: [line["step"] for line in lines if line["event"] == kind]
        for kind in ("step", "validation", "resume", "end")
    }
    assert recorded == {
        "step": list(range(1, STEPS + 1)),
        "validation": [4, 6],
        "resume": [step],
        "end": [STEPS],
    }
