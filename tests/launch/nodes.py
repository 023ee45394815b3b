"""Nodes on one machine: torchelastic agents with forked workers, each killed as a whole.

The agent is torchrun's, called as a function: forked workers have everything imported. The store
of the rendezvous is in the process that starts the nodes, as on a machine that stays.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tests.launch.killing import last_step, lines
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from typing_extensions import override

from shardrec.launch import cli
from shardrec.pipeline.run.callbacks import Callback, StepReport

FORK = multiprocessing.get_context("fork")
HOLD = "hold"  # a file beside the run, while which steps take longer


class Slow(Callback):
    """Makes steps last, so that a run is not over before a node has come back."""

    @override
    def on_step(self, report: StepReport) -> None:
        if Path(os.environ["TEST_HOLD"]).exists():
            time.sleep(0.5)


@dataclass(frozen=True, slots=True)
class Nodes:
    """A job of one node to ``most``, each with ``workers`` workers."""

    run: Path
    words: list[str]
    most: int
    workers: int
    max_restarts: int
    store: Any
    of: dict[int, Any] = field(default_factory=dict)

    def start(self, index: int) -> None:
        """Starts a node, or starts it again."""
        node = FORK.Process(target=_be_node, args=(self, index))
        node.start()
        self.of[index] = node

    def kill(self, index: int) -> None:
        """SIGKILL to the agent and its workers at once."""
        os.killpg(self.of[index].pid, signal.SIGKILL)
        self.of[index].join()

    def end(self, seconds: float) -> list[int | None]:
        """The exit codes."""
        deadline = time.monotonic() + seconds
        for node in self.of.values():
            node.join(max(0.0, deadline - time.monotonic()))
        return [node.exitcode for node in self.of.values()]

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.run.parent.glob("node-*.log")))

    def until(self, what: str, seconds: float = 90.0) -> Iterator[None]:
        """Goes round until somebody leaves the loop."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            yield
            time.sleep(0.02)
        raise AssertionError(f"no {what} in {seconds:g} s:\n{self.log()[-6000:]}")

    def wait_for_ranks(self, number: int, starts: int) -> int:
        """Waits until the run goes on with so many ranks; the number of its starts so far."""
        for _ in self.until(f"step on {number} ranks"):
            resumed = lines(self.run, "resume")
            if len(resumed) > starts and resumed[-1]["ranks"] == number:
                if last_step(self.run) > resumed[-1]["step"]:
                    break
        return len(resumed)


@contextmanager
def nodes(
    run: Path, words: list[str], *, most: int, workers: int, max_restarts: int
) -> Iterator[Nodes]:
    """A job whose nodes are still to be started; call it where no process group is."""
    if dist.is_initialized():
        dist.destroy_process_group()
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "localhost", 0, is_master=True, wait_for_workers=False
    )
    (run.parent / HOLD).touch()
    job = Nodes(run, words, most, workers, max_restarts, store)
    try:
        yield job
    finally:
        for index, node in job.of.items():
            if node.is_alive():
                job.kill(index)


def _be_node(job: Nodes, index: int) -> None:
    os.setpgid(0, 0)
    log = os.open(job.run.parent / f"node-{index}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ |= {
        "TEST_HOLD": str(job.run.parent / HOLD),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=job.most,
        nproc_per_node=job.workers,
        run_id="job",
        rdzv_backend="c10d",
        rdzv_endpoint=f"localhost:{job.store.port}",
        # A node counts as lost after four seconds, and for one others may still join.
        rdzv_configs={
            "is_host": "0",
            "last_call_timeout": 1,
            "keep_alive_interval": 1,
            "keep_alive_max_attempt": 4,
        },
        max_restarts=job.max_restarts,
        start_method="fork",
        local_addr="localhost",
    )
    elastic_launch(config, _work)(job.words)


def _work(words: list[str]) -> None:
    code = cli.main(["train", *words])
    sys.stderr.flush()
    if code:
        os._exit(code)
