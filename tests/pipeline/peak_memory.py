"""Peak memory of two training steps in processes of their own: what ``plan`` is held to.

Run with JSON of num_items, overrides of ``tiny_cpu``, the shape of the batch of all ranks, rank,
num_ranks and an empty folder for rendezvous and checkpoints, such as ``'{"num_items": 50000,
"overrides": ["loss=cce"], "batch": [64, 20], "rank": 0, "num_ranks": 1, "folder": "peak"}'``;
prints the bytes that model and steps added to what the process held before. With
``checkpoints.background`` a checkpoint is written during the second step.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardrec.kernels.ranks.communicator import Communicator
from shardrec.modules.attributes import AttributeRows, AttributeSizes
from shardrec.pipeline.checkpoint.store import Checkpoints, CheckpointState
from shardrec.pipeline.checkpoint.writer import CheckpointWriter, writing_group
from shardrec.pipeline.config import override, to_json
from shardrec.pipeline.prepared.loader import Batch
from shardrec.pipeline.ranks import default_group
from shardrec.pipeline.recipes import tiny_cpu
from shardrec.pipeline.run.build import build_model
from shardrec.pipeline.run.config import TrainConfig
from shardrec.pipeline.run.step import Stepper


@dataclass(frozen=True)
class Ranks:
    """The ranks, and those of the background write."""

    group: dist.ProcessGroup | None
    writing: dist.ProcessGroup | None
    folder: Path


@dataclass(frozen=True)
class Generated:
    """Six values of a thousand and 32 numbers for each item."""

    @property
    def sizes(self) -> AttributeSizes:
        return AttributeSizes(1000, (0,), 32)

    def rows(self, items: range) -> AttributeRows:
        count = len(items)
        codes = torch.arange(6 * count, dtype=torch.int32) % 1000
        offsets = torch.arange(0, 6 * count + 1, 6)
        return AttributeRows(codes, torch.ones(6 * count), offsets, torch.ones(count, 32))

    def trained(self, items: range) -> Tensor:
        return torch.ones(len(items), dtype=torch.bool)


def status_bytes(name: str) -> int:
    """A line of the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def batch_of(num_items: int, shape: Sequence[int], group: dist.ProcessGroup | None) -> Batch:
    """This rank's part of full sequences of uniform items."""
    generator = torch.Generator().manual_seed(1)
    items, targets = (
        torch.randint(num_items, tuple(shape), generator=generator)[
            Communicator(group).rank :: Communicator(group).size
        ]
        for _ in "ab"
    )
    return Batch(items, torch.full((len(items),), shape[1]), targets)


def train_two_steps(config: TrainConfig, num_items: int, shape: Sequence[int], at: Ranks) -> None:
    attributes = None if config.catalog.attributes == "none" else Generated()
    model = build_model(config, num_items, None, at.group, attributes)
    counts = torch.ones(num_items, dtype=torch.int64)
    stepper = Stepper(
        model, config.loss, config.optimizer, seed=1, total_steps=None, item_counts=counts
    )
    batch = batch_of(num_items, shape, at.group)
    writer = CheckpointWriter(Checkpoints(at.folder, at.writing), background=True)
    stepper.take([batch], 1)
    if config.checkpoints.background:
        writer.save(1, state_of(stepper, config), best=False)
    stepper.take([batch], 2)
    writer.collect()
    assert writer.failure is None


def state_of(stepper: Stepper, config: TrainConfig) -> CheckpointState:
    """What the trainer saves."""
    return CheckpointState(
        encoder=stepper.model.encoder.state_dict(),
        optimizer=stepper.optimizer.state_dict(),
        table=stepper.model.catalog.state_dict(),
        progress={},
        config=to_json(config),
        attributes=stepper.model.catalog.attributes.state_dict(),
    )


def main(case: dict[str, Any]) -> None:
    config = override(tiny_cpu("none", "none"), case["overrides"])
    folder = Path(case["folder"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=case["rank"],
        world_size=case["num_ranks"],
    )
    group = default_group()
    with writing_group(group) as writing:
        # Loads the libraries.
        train_two_steps(config, 500, (8, 4), Ranks(group, writing, folder / "small"))
        Path("/proc/self/clear_refs").write_text("5")
        before = status_bytes("VmRSS")
        at = Ranks(group, writing, folder / "large")
        train_two_steps(config, case["num_items"], case["batch"], at)
        print(json.dumps({"before": before, "peak": status_bytes("VmHWM") - before}))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]))
