"""SIGTERM ends stages of one process cleanly, and workers between two steps or soon after."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from tests.launch.killing import last_step, last_whole
from tests.pipeline.event_logs import write_random_log
from tests.pipeline.small_data import prepare_small

from shardrec.launch.heartbeat import Peers
from shardrec.launch.signals import exit_on_sigterm, grace_seconds, stop_on_signals
from shardrec.pipeline.run.interruption import Interrupted, Preempted

# Runs of several processes: seconds each.
pytestmark = pytest.mark.slow

UNDER_TORCHRUN = {"TORCHELASTIC_RUN_ID": "1"}


@pytest.fixture
def hangups() -> Iterator[None]:
    """Takes hangups, which are ignored where ``nohup`` has started the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangups")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_is_a_question_for_the_next_step(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    by_hand = number == signal.SIGINT
    with pytest.raises(Preempted) as stopped, stop_on_signals(60.0, None) as asked:
        assert not asked()
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 5
        while not asked() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert asked()
        time.sleep(0.1)  # what follows is said by another thread
        raise Preempted("the checkpoint is complete")
    assert type(stopped.value) is (Interrupted if by_hand else Preempted)
    assert ("Ctrl-C again ends at once" in capfd.readouterr().err) == by_hand
    assert signal.getsignal(number) is before


def test_a_signal_that_a_shell_has_set_to_be_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals(60.0, None) as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
            assert not asked()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def hang(grace_s: float, peers: bool, ready: Connection) -> None:
    """Be a worker with a main thread that never comes back to Python, as in a hung collective."""
    store: Any = dist.TCPStore("localhost", 0, is_master=True)  # type: ignore[attr-defined]
    others = Peers(store, rank=0, world_size=2, interval_s=0.1) if peers else None
    mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
    with stop_on_signals(grace_s, others):
        lock(mutex)
        ready.send("ready")
        lock(mutex)


@pytest.mark.parametrize(
    ("grace_s", "peers", "signals", "code", "words"),
    [
        (1.0, False, "TERM", 75, "no checkpoint within 1 s after SIGTERM"),
        (60.0, True, "TERM", 1, "no checkpoint can be written: rank 1 has not started"),
        (60.0, False, "INT INT", 130, "ended at once; --resume=auto continues from the last"),
        (60.0, False, "INT TERM", 130, "ended at once"),  # as torchrun passes them on
        (60.0, False, "TERM INT", 130, "ended at once"),
    ],
    ids=["alone", "without-rank-1", "Ctrl-C-twice", "Ctrl-C-by-torchrun", "SIGTERM-and-Ctrl-C"],
)
def test_a_worker_that_hangs_ends_when_there_is_nothing_to_wait_for(
    grace_s: float,
    peers: bool,
    signals: str,
    code: int,
    words: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    context = multiprocessing.get_context("fork")  # torch is imported already
    ours, theirs = context.Pipe(duplex=False)
    worker = context.Process(target=hang, args=(grace_s, peers, theirs))
    worker.start()
    try:
        assert ours.poll(30) and ours.recv() == "ready"
        for name in signals.split():
            os.kill(worker.pid or 0, getattr(signal, f"SIG{name}"))
            time.sleep(0.2)
        worker.join(30)
    finally:
        worker.kill()
    assert worker.exitcode == code
    assert words in capfd.readouterr().err


def test_the_grace_fits_into_what_torchrun_leaves() -> None:
    assert grace_seconds(None, UNDER_TORCHRUN) == 25
    longer = UNDER_TORCHRUN | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "125"}
    assert grace_seconds(None, longer) == 120 and grace_seconds(100, longer) == 100
    assert grace_seconds(100, {}) == 100
    with pytest.raises(ValueError, match="--grace must be at most the 30 s"):
        grace_seconds(100, UNDER_TORCHRUN)
    with pytest.raises(ValueError, match="SHUTDOWN_TIMEOUT must be a number of seconds, got 'abc'"):
        grace_seconds(None, UNDER_TORCHRUN | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "abc"})
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="--grace must be a number above 0"):
            grace_seconds(wrong, {})


CLI = [sys.executable, "-P", "-m", "shardrec.launch.cli"]
SYNTH = ["synth", "--events", "50_000_000", "--users", "2_000_000", "--output"]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A log that takes seconds to prepare."""
    return write_random_log(tmp_path_factory.mktemp("log") / "log.parquet", 4_000_000)


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("stage", "started"),
    [("prepare", Path(".out.partial", "work", "events.duckdb")), ("synth", Path(".out.partial"))],
)
def test_a_signal_ends_a_stage_without_a_trace(
    number: signal.Signals, stage: str, started: Path, log: str, tmp_path: Path
) -> None:
    output = str(tmp_path / "out")
    prepare = ["prepare", "--events", log, "--threads", "1", "--output", output]
    words = prepare if stage == "prepare" else [*SYNTH, output]
    process = subprocess.Popen([*CLI, *words], stderr=subprocess.PIPE, text=True)
    try:
        wait_for(tmp_path / started, process)
        time.sleep(0.2)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, said) == (CODES[number], "")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_the_step_and_keeps_it(tmp_path: Path) -> None:
    data, run = prepare_small(tmp_path), tmp_path / "run"
    words = ["train", "--prepared", data, "--run", str(run), "--recipe", "tiny_cpu"]
    endless = ["limits.max_steps=1_000_000", "validation.every_steps=none", "log_every=1"]
    process = subprocess.Popen([*CLI, *words, *endless], stderr=subprocess.PIPE, text=True)
    try:
        wait_for(run / "metrics.jsonl", process)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, said
    assert "Ctrl-C: a checkpoint is written after this step" in said
    *_, last = said.splitlines()
    assert last.startswith("shardrec train: the run stopped after step")
    assert "start it again with --resume=auto" in last
    assert last_whole(run) == last_step(run) > 0


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.005)


def test_a_second_sigterm_does_not_disturb_the_clean_up() -> None:
    before = signal.getsignal(signal.SIGTERM)
    cleaned = []
    with pytest.raises(SystemExit) as stopped, exit_on_sigterm():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            cleaned.append(True)
    assert stopped.value.code == 143 and cleaned
    assert signal.getsignal(signal.SIGTERM) is before
