"""Where this process stands among the workers; only this file reads the launcher's variables."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, slots=True)
class Place:
    """This process among its fellows, as ``torchrun`` says.

    Attributes:
        rank: in [0, world_size).
        local_rank: its number on this node; chooses the GPU.
        world_size: workers of all nodes.
    """

    rank: int
    local_rank: int
    world_size: int

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "Place | None":
        """The place that ``environment`` names; None without a launcher.

        Raises:
            ValueError: some of the variables are there and others are not.
        """
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if name not in environment]
        if "RANK" in missing and "WORLD_SIZE" in missing:
            return None
        if missing:
            raise ValueError(
                f"the launcher must set {', '.join(names)}, got none for {', '.join(missing)}; "
                "start workers with `shardrec launch` or torchrun"
            )
        rank, local_rank, world_size = (int(environment[name]) for name in names[:3])
        return cls(rank, local_rank, world_size)


@contextmanager
def process_group() -> Iterator[tuple[dist.ProcessGroup | None, torch.device]]:
    """The group of all workers and this worker's device, for the length of a ``with``.

    Without a launcher the group is None: a single process, no collectives.

    Collectives: the rendezvous on entry; none on exit, so that one failed worker ends alone.
    """
    place = Place.read(os.environ)
    device = choose_device(place)
    if place is None:
        yield None, device
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield dist.group.WORLD, device
    finally:
        dist.destroy_process_group()


def choose_device(place: Place | None) -> torch.device:
    """The worker's own GPU when there are any, else the CPU.

    Raises:
        ValueError: the node has fewer GPUs than workers.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = 0 if place is None else place.local_rank
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"workers on a node must be at most its {count} GPU(s), got worker {local_rank}; lower "
            "the second number of -j, or hide the GPUs with CUDA_VISIBLE_DEVICES="
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
