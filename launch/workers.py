"""Set up rank, device and process group of this worker from torchrun's variables."""

import os
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from shardrec.launch.heartbeat import FINISHED, LostRankError, Peers
from shardrec.launch.rendezvous import Place, connect
from shardrec.pipeline.run.agreement import code_facts, require_same
from shardrec.pipeline.run.interruption import Preempted

__all__ = [
    "TIMEOUT_S",
    "Workers",
    "check_restarts",
    "choose_device",
    "joined",
    "process_group",
    "workers",
]

TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Workers:
    """The process group of a job and this worker's part in it.

    Attributes:
        group: of all workers; None in a single process without a launcher.
        device: of this worker.
        peers: heartbeats of the other workers; None where there are none.
        node_size: workers of this node; None where unknown.
    """

    group: dist.ProcessGroup | None
    device: torch.device
    peers: Peers | None
    node_size: int | None = None


@contextmanager
def process_group(
    timeout_s: float = TIMEOUT_S,
) -> Iterator[tuple[dist.ProcessGroup | None, torch.device]]:
    """Context manager: the group of all workers and this worker's device; see ``workers``."""
    with workers(timeout_s) as found:
        yield found.group, found.device


@contextmanager
def joined(stage: str, options: Namespace) -> Iterator[dist.ProcessGroup | None]:
    """Context manager: the group of all workers, started with the same command and code.

    Raises:
        ValueError: a rank has another command, other options or other code than rank 0.
    """
    with workers(options.timeout) as found:
        facts = {"stage": stage, **vars(options)} | code_facts()
        require_same(facts, found.group)
        yield found.group


@contextmanager
def workers(timeout_s: float = TIMEOUT_S) -> Iterator[Workers]:
    """Context manager: the process group of this job, with heartbeats.

    Without a launcher the group is None: a single process, no collectives.

    Args:
        timeout_s: seconds that a worker waits for the other workers in a collective.

    Raises:
        LostRankError: a collective failed or took too long, and the message names the rank that
            died, left or did not join.
        TimeoutError, ValueError: the rendezvous failed; see ``connect``.

    Collectives: the rendezvous on entry; none on exit, so that one failed worker ends alone.
    """
    place = Place.read(os.environ)
    device = choose_device(place)
    if place is None:
        yield Workers(None, device, None)
        return
    timeout, rank, world_size = timedelta(seconds=timeout_s), place.rank, place.world_size
    keeper = None if _launcher_keeps_store(os.environ) else 0
    store = connect(place, timeout_s, is_host=rank == keeper)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    interval_s = min(1.0, timeout_s / 10)
    peers = Peers(
        store,
        rank,
        world_size,
        keeper=keeper,
        timeout_s=timeout_s,
        interval_s=interval_s,
        end=_end_process if device.type == "cuda" else None,
    )
    with _heartbeats(peers):
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout
        )
        known = None if world_size == 1 else peers
        yield Workers(dist.group.WORLD, device, known, place.node_size)


@contextmanager
def _heartbeats(peers: Peers) -> Iterator[None]:
    """Send heartbeats, and name the missing rank when torch reports a broken or slow collective.

    The process group is destroyed at the end, after its counts of collectives were read.
    """
    reason, absent = FINISHED, ""
    peers.start()
    try:
        yield
    except BaseException as error:
        absent = str(peers.absent()) if _may_be_of_another_rank(error) else ""
        blameless = absent or isinstance(error, Preempted)
        reason = "" if blameless else f"{type(error).__name__}: {error}"
        if not absent:
            raise
        raise LostRankError(_complaint(absent)) from error
    finally:
        peers.leave(reason)
        if peers.rank == 0 and absent:  # it may host the store that the others still read
            time.sleep(2 * peers.patience_s)
        if dist.is_initialized():
            dist.destroy_process_group()


def _complaint(absent: str) -> str:
    return (
        f"every rank must take part to the end, got {absent}; look for its last lines and "
        "start the job again: training with --resume=auto continues from its last checkpoint"
    )


def _end_process(lost: str) -> None:
    """Ends this process from a thread, as the main one waits on a GPU for a rank that is lost."""
    print(f"{LostRankError.__name__}: {_complaint(lost)}", file=sys.stderr, flush=True)
    os._exit(1)


def _may_be_of_another_rank(error: BaseException) -> bool:
    """Whether torch raised it, without naming a rank; our own messages name the cause."""
    if not isinstance(error, RuntimeError):
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return not frames or not frames[-1].f_globals.get("__name__", "").startswith("shardrec.")


def check_restarts(resume: str, environment: Mapping[str, str]) -> None:
    """Refuse workers that torchrun may restart but that could not resume.

    Raises:
        ValueError: ``resume`` is "no", or torchrun uses one store for all starts, in which
            restarted workers would find the addresses of dead workers.
    """
    restarts = environment.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts == "0":
        return
    if resume == "no":
        raise ValueError(
            f"--resume must be auto where workers are restarted, got none with {restarts} "
            "restarts; without it restarted workers refuse the existing run"
        )
    if _launcher_keeps_store(environment):
        raise ValueError(
            f"torchrun must make a new store for each start of the workers, got {restarts} "
            "restarts with one store; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, as "
            "`shardrec launch` does"
        )


def _launcher_keeps_store(environment: Mapping[str, str]) -> bool:
    """Whether torchrun hosts it, and not the worker of rank 0."""
    return environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def choose_device(place: Place | None) -> torch.device:
    """This worker's GPU if the machine has GPUs, else the CPU.

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
