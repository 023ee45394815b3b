"""Peak memory of two training steps, measured by a process that does nothing else.

What ``plan`` is held to. With ``checkpoints.background`` a checkpoint is written during the second
step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
    assert len(model.catalog.shard.rows)  # composed as for a validation: all pages are in use
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


def peak_bytes(overrides: Sequence[str], num_items: int, shape: Sequence[int], folder: str) -> int:
    """Bytes that model and steps add to what this rank's process held before.

    Args:
        overrides: of ``tiny_cpu``.
        num_items: of the catalog.
        shape: of the batch of all ranks: sequences, and their length.
        folder: an empty one, for checkpoints.
    """
    config = override(tiny_cpu("none", "none"), overrides)
    group = default_group()
    with writing_group(group) as writing:
        # Loads the libraries.
        train_two_steps(config, 500, (8, 4), Ranks(group, writing, Path(folder, "small")))
        Path("/proc/self/clear_refs").write_text("5")
        before = status_bytes("VmRSS")
        train_two_steps(config, num_items, shape, Ranks(group, writing, Path(folder, "large")))
        return status_bytes("VmHWM") - before
