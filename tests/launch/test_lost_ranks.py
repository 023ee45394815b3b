"""A rank that is stopped, asleep or gone is named by those that wait for it, in bounded time."""

import contextlib
import importlib
import io
import json
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.ranks import Ranks

from shardrec.launch import cli, heartbeat
from shardrec.launch.heartbeat import LostRankError, Peers
from shardrec.launch.workers import workers

# Runs of several processes: seconds each.
pytestmark = pytest.mark.slow

TIMEOUT_S = 2.0


@pytest.fixture(autouse=True)
def no_default_group() -> None:
    """Ends the group that a catalog of another test may have made: forked workers inherit it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def misbehave(how: str) -> None:
    if how == "stopped":
        time.sleep(TIMEOUT_S / 4)  # a few heartbeats
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "asleep":
        time.sleep(3 * TIMEOUT_S)
    else:
        raise KeyError("a bug of one rank")


@contextlib.contextmanager
def as_worker(port: int) -> Iterator[int]:
    """Be one of torchrun's workers, of this rank, for the length of a ``with``."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    processes = [0] * world_size
    dist.all_gather_object(processes, os.getpid())
    dist.destroy_process_group()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "localhost"}
    try:
        yield rank
    finally:
        for name in (*place, "MASTER_ADDR"):
            del os.environ[name]
        if rank == 0:
            os.kill(processes[1], signal.SIGCONT)
        store = dist.HashStore()  # type: ignore[attr-defined]
        # The pool takes down the group it made.
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)


def wait_for_rank_1(how: str, port: int) -> tuple[str, float, list[str]]:
    """What this rank raised, after how many seconds, and its warnings, when rank 1 is absent."""
    said = list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    with as_worker(port) as rank:
        logging.getLogger("shardrec").addHandler(handler)
        started = time.monotonic()
        try:
            with workers(TIMEOUT_S):
                dist.barrier()
                if rank == 1:
                    misbehave(how)
                dist.all_reduce(torch.ones(1))
            return "nothing", 0.0, said
        except Exception as error:
            return f"{type(error).__name__}: {error}", time.monotonic() - started, said
        finally:
            logging.getLogger("shardrec").removeHandler(handler)


def take_part(rank: int, victim: int, port: int, told: Connection) -> None:
    """Be a worker, one of three, in a process of its own; tells what it raised, and when."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 3, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "localhost"}
    try:
        with workers(TIMEOUT_S):
            dist.barrier()
            told.send("ready")
            if rank == victim:
                time.sleep(60)
            dist.all_reduce(torch.ones(1))
        told.send(("nothing", time.monotonic()))
    except Exception as error:
        told.send((f"{type(error).__name__}: {error}", time.monotonic()))


@contextlib.contextmanager
def three_workers(victim: int) -> Iterator[tuple[list[int], list[Connection]]]:
    """Processes that may be killed, and what they tell; they are in a collective soon."""
    context, port = multiprocessing.get_context("fork"), free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(3)]
    processes = [
        context.Process(target=take_part, args=(rank, victim, port, pipes[rank][1]))
        for rank in range(3)
    ]
    for process in processes:
        process.start()
    try:
        yield [process.pid or 0 for process in processes], [ours for ours, _ in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def hear(one: Connection, seconds: float) -> Any:
    assert one.poll(seconds), f"silent for {seconds} s"
    return one.recv()


@pytest.mark.parametrize("victim", [0, 1], ids=["rank-0", "rank-1"])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_process_that_is_killed_or_stopped_is_named_by_the_others_in_bounded_time(
    victim: int, end: signal.Signals
) -> None:
    """Also rank 0, with which the store of the heartbeats is lost."""
    with three_workers(victim) as (processes, told):
        assert [hear(one, 30) for one in told] == ["ready"] * 3
        time.sleep(TIMEOUT_S / 4)  # a few heartbeats
        os.kill(processes[victim], end)
        ended_at = time.monotonic()
        for rank in {0, 1, 2} - {victim}:
            said, at = hear(told[rank], 4 * TIMEOUT_S)
            assert said.startswith(LostRankError.__name__)
            assert f"got rank {victim} (process {processes[victim]} on " in said, said
            assert "sends no heartbeat" in said and "it was last at " in said
            assert not any(f"rank {other}" in said for other in {0, 1, 2} - {victim}), said
            assert at - ended_at < 4 * TIMEOUT_S


def run_without_rank_1(words: list[str], port: int) -> tuple[int, str, float]:
    """Exit code, errors and seconds of a command whose second worker never begins to work."""
    importlib.import_module(f"shardrec.pipeline.{words[0]}")  # takes longer than the others wait
    with as_worker(port) as rank, contextlib.redirect_stderr(io.StringIO()) as errors:
        started = time.monotonic()
        if rank == 0:
            return cli.main(words), errors.getvalue(), time.monotonic() - started
        with workers(TIMEOUT_S):
            time.sleep(2.5 * TIMEOUT_S)
        return 0, "", 0.0


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("stopped", "sends no heartbeat, it was last at launch/test_lost_ranks.py:"),
        ("asleep", "is alive but has not joined, it is at launch/test_lost_ranks.py:"),
        ("raising", "has left: KeyError: 'a bug of one rank'"),
    ],
)
def test_a_rank_that_does_not_come_is_named(ranks: Ranks, how: str, words: str) -> None:
    answers = ranks(3).run(wait_for_rank_1, how, free_port(), timeout=240)
    for said, seconds, _ in (answers[0], answers[2]):
        assert said.startswith(LostRankError.__name__)
        assert "got rank 1" in said and words in said, said
        assert "rank 0" not in said and "rank 2" not in said
        assert seconds < 4 * TIMEOUT_S
    if how != "raising":
        (warning,) = answers[0][2]
        assert warning.startswith("no progress for 1 s, of at most 2: rank 1"), warning


def leave_heartbeat(store: Any, left: str | None) -> None:
    """The last heartbeat of rank 1."""
    beat = {"number": 3, "process": "process 7 on node", "collectives": 5}
    text = json.dumps(beat | {"where": "pipeline/run/step.py:1 (take)", "left": left})
    store.set("heartbeat/1", text)


@pytest.mark.parametrize(
    ("left", "words"),
    [
        (None, "rank 1 (process 7 on node) sends no heartbeat, it was last at pipeline/run/step"),
        ("KeyError: 1", "rank 1 has left: KeyError: 1"),
        ("it has finished", ""),
        ("not started", ""),
    ],
)
def test_where_a_wait_never_returns_a_thread_ends_the_process_with_the_name(
    left: str | None, words: str
) -> None:
    """As on NCCL, whose collectives wait for a dead rank until the process is aborted."""
    store: Any = dist.HashStore()  # type: ignore[attr-defined]
    said, ended = list[str](), threading.Event()

    def end(lost: str) -> None:
        said.append(lost)
        ended.set()

    if left != "not started":
        leave_heartbeat(store, left)
    peers = Peers(
        store,
        *(0, 2),
        timeout_s=0.4,
        interval_s=0.05,
        end=end,
    )
    peers.start()
    try:
        assert ended.wait(30 if words else 3.0) is bool(words)
    finally:
        peers.leave("")
    assert all(words in one for one in said) and bool(said) is bool(words)


def test_collectives_of_every_backend_are_counted() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("cpu:gloo", store=store, rank=0, world_size=1)
    try:
        before = heartbeat._collectives()
        dist.all_gather_object([None], 1)  # which travels over gloo beside NCCL
        assert heartbeat._collectives() > before
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("stage", ["evaluate", "recommend", "export"])
def test_every_stage_of_several_workers_ends_in_bounded_time(
    ranks: Ranks, tmp_path: Path, stage: str
) -> None:
    output = [] if stage == "evaluate" else ["--output", str(tmp_path / "output")]
    words = [stage, "--prepared", str(tmp_path), "--run", str(tmp_path / "run"), *output]
    words += ["--timeout", str(TIMEOUT_S)]
    (code, said, seconds), _ = ranks(2).run(run_without_rank_1, words, free_port(), timeout=240)
    assert code == 1
    assert f"shardrec {stage}: every rank must take part to the end, got rank 1" in said
    assert "is alive but has not joined" in said and seconds < 4 * TIMEOUT_S
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("stage", ["train", "evaluate"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon"])
def test_a_timeout_is_a_number_above_0(
    value: str, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [stage, "--prepared", "p", "--run", "r", "--timeout", value]
    assert cli.main(words) == 2
    assert capsys.readouterr().err == (
        f"shardrec {stage}: --timeout must be a number above 0, got '{value}'; give seconds\n"
    )
