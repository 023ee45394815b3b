"""Peak memory of two training steps in a process of their own: what ``plan`` is held to.

Run with JSON of num_items, overrides of ``tiny_cpu`` and the shape of a batch, such as
``'{"num_items": 50000, "overrides": ["loss=cce"], "batch": [64, 20]}'``; prints the bytes that
model and steps added to what the process held before.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from shardrec.pipeline.config import override
from shardrec.pipeline.data import Batch
from shardrec.pipeline.recipes import tiny_cpu
from shardrec.pipeline.run import TrainConfig, build_model
from shardrec.pipeline.step import Stepper


def status_bytes(name: str) -> int:
    """A line of the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def batch_of(num_items: int, shape: Sequence[int]) -> Batch:
    """Full sequences of uniform items."""
    generator = torch.Generator().manual_seed(1)
    items, targets = (torch.randint(num_items, tuple(shape), generator=generator) for _ in "ab")
    return Batch(items, torch.full((shape[0],), shape[1]), targets)


def train_two_steps(config: TrainConfig, num_items: int, batch: Batch) -> None:
    model = build_model(config, num_items, None, None)
    counts = torch.ones(num_items, dtype=torch.int64)
    stepper = Stepper(
        model, config.loss, config.optimizer, seed=1, total_steps=None, item_counts=counts
    )
    stepper.take([batch], 1)
    stepper.take([batch], 2)


def main(case: dict[str, Any]) -> None:
    config = override(tiny_cpu("none", "none"), case["overrides"])
    train_two_steps(config, 500, batch_of(500, (8, 4)))  # loads the libraries
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    train_two_steps(config, case["num_items"], batch_of(case["num_items"], case["batch"]))
    print(json.dumps({"before": before, "peak": status_bytes("VmHWM") - before}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]))
