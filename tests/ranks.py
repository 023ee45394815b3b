"""Runs functions on W long-lived processes that talk over gloo.

The session fixture ``ranks`` (tests/conftest.py) is used like this::

    def total(number: int) -> int:  # at the top level of a test file
        value = torch.tensor(number + dist.get_rank())
        dist.all_reduce(value)
        return int(value)


    def test_ranks_add_up(ranks: Ranks) -> None:
        assert ranks(3).run(total, 10) == [33, 33, 33]

The processes are started once and shared by all W. Each run gets a process group of its own over
a new rendezvous file, so that nothing leaks from one run to the next. Functions are found again in
the workers by file and name; arguments and results are pickled. A function that raises on one rank
would leave the others waiting in a collective: they get a few seconds, then all are replaced.

Loading PyTorch and TorchRec takes a process six seconds. One process, the template, does it and
forks the workers, so that a fresh one costs nothing.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import cached_property
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from socket import socketpair
from typing import Any

import torch
import torch.distributed as dist

TESTS = Path(__file__).resolve().parent
GRACE_SECONDS = 5.0


class RankError(AssertionError):
    """Some ranks raised, died or ran out of time; the message holds their tracebacks."""


class Template:
    """A process that forks others: what they all import is loaded once."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        ours, theirs = socketpair()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **variables}
        command = [sys.executable, "-P", str(TESTS / "ranks.py"), str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        theirs.close()
        self.connection = Connection(ours.detach())

    def fork(self, handle: int, stacks: str) -> int:
        """Id of a new process that answers on a socket and writes its stacks into a file."""
        self.connection.send(stacks)
        send_handle(self.connection, handle, self.process.pid)
        return int(self.connection.recv())

    def end(self, pid: int) -> int:
        """Exit code of a process that has ended, or is killed now."""
        self.connection.send(pid)
        return int(self.connection.recv())

    def stop(self) -> None:
        self.connection.close()
        self.process.wait()


class Worker:
    """One process that runs functions on request."""

    def __init__(self, template: Template) -> None:
        ours, theirs = socketpair()
        self.template = template
        self.stacks = tempfile.NamedTemporaryFile("r")
        self.pid = template.fork(theirs.fileno(), self.stacks.name)
        theirs.close()
        self.connection = Connection(ours.detach())

    def where(self) -> str:
        """The Python stacks of a process that does not answer."""
        os.kill(self.pid, signal.SIGUSR1)
        time.sleep(0.2)
        return self.stacks.read()

    @cached_property
    def exit_code(self) -> int:
        """Of the process, which is killed if it has not ended."""
        return self.template.end(self.pid)

    def stop(self) -> int:
        """Ends it; its exit code."""
        self.connection.close()
        self.stacks.close()
        return self.exit_code


class Ranks:
    """``ranks(W)`` gives W of the processes, starting those that are missing.

    ``variables`` are those of the environment that differ in the processes.
    """

    def __init__(self, variables: Mapping[str, str] | None = None) -> None:
        self.variables = variables or {}
        self.workers: list[Worker] = []

    @cached_property
    def template(self) -> Template:
        return Template(self.variables)

    def __call__(self, num_ranks: int) -> Pool:
        while len(self.workers) < num_ranks:
            self.workers.append(Worker(self.template))
        return Pool(self, num_ranks)

    def stop(self) -> None:
        """Ends the processes; the next ones are fresh."""
        while self.workers:
            self.workers.pop().stop()

    def close(self) -> None:
        """Ends everything that was started."""
        self.stop()
        if "template" in vars(self):
            self.template.stop()


class Pool:
    """The first W processes, for as many runs as wanted."""

    def __init__(self, ranks: Ranks, num_ranks: int) -> None:
        self.ranks = ranks
        self.num_ranks = num_ranks

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """What ``function(*args)`` returned on each rank, in rank order.

        The function runs inside a gloo process group of W ranks (``torch.distributed``).

        Raises:
            RankError: a rank raised, died, or none answered within ``timeout`` seconds.
        """
        self.ranks(self.num_ranks)
        workers = self.ranks.workers[: self.num_ranks]
        with tempfile.TemporaryDirectory() as folder:
            init_method = f"file://{folder}/rendezvous"
            for rank, worker in enumerate(workers):
                request = (_address(function), args, init_method, rank, self.num_ranks, timeout)
                worker.connection.send_bytes(pickle.dumps(request))
            answers = _collect(workers, time.monotonic() + timeout)
        failures = {rank: text for rank, (ok, text) in answers.items() if not ok}
        for rank in set(range(self.num_ranks)) - answers.keys():
            failures[rank] = f"no answer in {timeout} s, it was here:\n{workers[rank].where()}"
        # A connection that has more to read after the answer is closed on the other side.
        if len(answers) < self.num_ranks or any(worker.connection.poll() for worker in workers):
            self.ranks.stop()
        if failures:
            raise RankError(_report(failures, self.num_ranks))
        return [answers[rank][1] for rank in range(self.num_ranks)]


def _address(function: Callable[..., Any]) -> tuple[str, str]:
    """Module name and name in it; the worker imports it from the tests folder."""
    module, name = function.__module__, function.__qualname__
    assert "." not in name, f"{name} must stand at the top level of its file"
    return module, name


def _collect(workers: list[Worker], deadline: float) -> dict[int, tuple[bool, Any]]:
    """Answers by rank, until all are there, one died, or time is up."""
    pending = {worker.connection: rank for rank, worker in enumerate(workers)}
    answers: dict[int, tuple[bool, Any]] = {}
    while pending and (left := deadline - time.monotonic()) > 0:
        for connection in wait(list(pending), timeout=left):
            assert isinstance(connection, Connection)
            rank = pending.pop(connection)
            try:
                answers[rank] = pickle.loads(connection.recv_bytes())
            except EOFError:
                answers[rank] = False, f"the process ended with code {workers[rank].exit_code}"
            if not answers[rank][0]:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    return answers


def _report(failures: dict[int, str], num_ranks: int) -> str:
    lines = [f"rank {rank} of {num_ranks}:\n{text}" for rank, text in sorted(failures.items())]
    return "\n".join(["", *lines])


def make_tests_importable() -> None:
    """Lets ``tests.<folder>.<file>`` be imported without the repository root on the path.

    With the root on ``sys.path`` the folder ``kernels`` would answer to ``import kernels``.
    """
    package = types.ModuleType("tests")
    package.__path__ = [str(TESTS)]
    sys.modules.setdefault("tests", package)


def _answer(request: bytes) -> tuple[bool, Any]:
    """Runs one request inside a process group of its own."""
    try:
        address, args, init_method, rank, num_ranks, timeout = pickle.loads(request)
        module, name = address
        __import__(module)
        dist.init_process_group(
            "gloo",
            init_method=init_method,
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=timeout),
        )
        # A rank that ends before the others are connected to it would fail them.
        dist.barrier()
        try:
            return True, getattr(sys.modules[module], name)(*args)
        finally:
            if dist.is_initialized():  # unless the function has ended it
                dist.destroy_process_group()
    except BaseException:
        return False, traceback.format_exc()


def serve(connection: Connection) -> None:
    """Answers requests until the other side closes the connection."""
    make_tests_importable()
    torch.set_num_threads(1)
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        ok, value = _answer(request)
        try:
            reply = pickle.dumps((ok, value))
        except Exception:
            reply = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(reply)


def fork_on_request(connection: Connection) -> None:
    """Forks a worker for the name of a file, ends one for its id."""
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        if isinstance(request, int):
            os.kill(request, signal.SIGKILL)  # does nothing to one that has ended
            connection.send(os.waitstatus_to_exitcode(os.waitpid(request, 0)[1]))
            continue
        handle = recv_handle(connection)
        pid = os.fork()
        if not pid:
            connection.close()
            faulthandler.register(signal.SIGUSR1, file=open(request, "w"))
            serve(Connection(handle))
            os._exit(0)
        os.close(handle)
        connection.send(pid)


if __name__ == "__main__":
    for name in ("shardrec.pipeline.train", "torch.utils.tensorboard"):
        importlib.import_module(name)
    gc.freeze()  # what was imported stays, in every process that is forked
    fork_on_request(Connection(int(sys.argv[1])))
