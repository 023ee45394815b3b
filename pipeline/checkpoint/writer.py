"""Write checkpoints in the background while training continues.

The phases: (1) ``save`` copies the state into host memory, which is all that training waits for;
(2) a thread writes the copy, over a process group of its own so that its collectives cannot
interleave with those of a step; (3) once all ranks have finished writing, ``collect`` joins the
thread and returns the report. Copies reuse their buffers, so one write is in flight at a time.
"""

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from shardrec.kernels.ranks.communicator import Communicator
from shardrec.pipeline.checkpoint.pinned import PinnedBuffers
from shardrec.pipeline.checkpoint.store import Checkpoints, CheckpointState
from shardrec.pipeline.outputs.addresses import without_keys

__all__ = ["CheckpointReport", "CheckpointWriter", "writing_group"]

# Seconds that a write in flight may still take after an error.
LAST_SECONDS = 60.0


@contextlib.contextmanager
def writing_group(group: dist.ProcessGroup | None) -> Iterator[dist.ProcessGroup | None]:
    """Context manager: a gloo group of the same ranks for background writes; None for one process.

    Args:
        group: the ranks; None for one process, which needs no group.

    Collectives: ``new_group`` on the default group, and a barrier.
    """
    if group is None:
        yield None
        return
    ranks = dist.get_process_group_ranks(group)
    timeout = group._get_backend(torch.device("cpu")).options._timeout
    made = dist.new_group(ranks, backend="gloo", timeout=timeout)
    assert isinstance(made, dist.ProcessGroup)
    # A rank that exits before the others have connected would close their connections.
    dist.barrier(group=made)
    try:
        yield made
    finally:
        if dist.is_initialized():
            dist.destroy_process_group(made)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointReport:
    """The result of writing one checkpoint: complete in ``folder``, or failed.

    It is reported after the first step at whose end every rank has finished writing.

    Attributes:
        step: the step that the checkpoint was taken after; training may have gone on meanwhile.
        folder: path or address of the checkpoint.
        best: whether the validation of that step was the best so far.
        seconds: time from the step until the checkpoint was complete.
        stall_seconds: the part of it in which training waited.
        num_bytes: bytes of the tensors, over all ranks.
        error: why writing failed; None if the checkpoint is complete.
    """

    step: int
    folder: str
    best: bool
    seconds: float
    stall_seconds: float = 0.0
    num_bytes: int = 0
    error: str | None = None


class CheckpointWriter:
    """Saves checkpoints one after another, in the background or not.

    Every rank must call ``save`` and ``collect`` at the same steps.
    """

    def __init__(self, checkpoints: Checkpoints, *, background: bool) -> None:
        """Store where to write.

        Args:
            checkpoints: of the run, on the group for writing.
            background: whether ``save`` returns as soon as the state is copied.
        """
        self.checkpoints = checkpoints
        self.background = background
        self.failure: Exception | None = None
        self._buffers: dict[str, Tensor] = {}
        self._pinned: PinnedBuffers | None = None
        self._thread: threading.Thread | None = None
        self._report: CheckpointReport | None = None

    @property
    def is_over(self) -> bool:
        """Whether this rank has finished a write whose report ``collect`` has not returned yet."""
        return self._thread is not None and not self._thread.is_alive()

    def save(self, step: int, state: CheckpointState, *, best: bool) -> list[CheckpointReport]:
        """Wait for the write in flight, copy the state, and start writing the copy.

        Args:
            step: optimizer steps so far; names the checkpoint.
            state: state of this rank; its tensors may change as soon as this returns.
            best: whether it is the best checkpoint so far.

        Returns:
            Reports of the writes that have finished: the previous one, if not yet collected, and
            this one if it is not written in the background.

        Collectives: those of ``Checkpoints.save``, on the group for writing.
        """
        started = time.monotonic()
        ended = self.collect()
        if self.background:
            state = state.copied(self._copy)
        stall = time.monotonic() - started
        report = CheckpointReport(
            step=step,
            folder=str(self.checkpoints.folder / f"step-{step:08d}"),
            best=best,
            seconds=stall,
            stall_seconds=stall,
            num_bytes=state.num_bytes,
        )
        self._thread = threading.Thread(
            target=self._write, args=(report, state, started), name="checkpoint", daemon=True
        )
        self._thread.start()
        return ended if self.background else [*ended, *self.collect()]

    def collect(self) -> list[CheckpointReport]:
        """The report of the write in flight, after waiting for it; the same on every rank.

        The list is empty if no write is in flight. If the write failed, the report has an
        ``error``, and ``failure`` holds the exception until another write succeeds.
        """
        if self._thread is None:
            return []
        self._thread.join()
        self._thread = None
        assert self._report is not None
        if self.failure is not None and Communicator(self.checkpoints.group).rank == 0:
            message = "checkpoint of step %d was not written, those before are kept: %s"
            logging.getLogger(__name__).warning(message, self._report.step, self._report.error)
        return [self._report]

    def abandon(self) -> None:
        """After an error elsewhere, wait up to 60 s for the write in flight."""
        if self._thread is not None:
            self._thread.join(LAST_SECONDS)

    def _write(self, report: CheckpointReport, state: CheckpointState, started: float) -> None:
        self.failure, words = None, None
        try:
            self.checkpoints.save(report.step, state, best=report.best)
        except Exception as error:
            self.failure, words = error, without_keys(str(error)) or type(error).__name__
        seconds = time.monotonic() - started
        stall = report.stall_seconds if self.background else seconds
        self._report = dataclasses.replace(
            report, seconds=seconds, stall_seconds=stall, error=words
        )

    def _copy(self, name: str, value: Tensor) -> Tensor:
        """A copy in host memory, in the buffer of the last copy of the same name if that fits."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = torch.empty(value.shape, dtype=value.dtype)
            self._buffers[name] = buffer
        if not value.is_cuda:
            return buffer.copy_(value.detach())
        if self._pinned is None:
            self._pinned = PinnedBuffers()
        self._pinned.copy(value, buffer)
        return buffer
