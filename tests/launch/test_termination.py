"""SIGTERM asks a worker to end between two steps, and ends it when it does not."""

import os
import signal
import subprocess
import sys
import time

import pytest

from shardrec.launch.signals import grace_seconds, sigterm_asks

# The main thread never comes back to Python, as in a collective that hangs.
HANGS = """
import ctypes
import torch.distributed as dist
from shardrec.launch.signals import sigterm_asks
from shardrec.launch.heartbeat import Peers

store = dist.TCPStore("localhost", 0, is_master=True)
peers = Peers(store, rank=0, world_size=2, interval_s=0.1)
mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
with sigterm_asks(GRACE_S, PEERS):
    lock(mutex)
    print("ready", flush=True)
    lock(mutex)
"""
UNDER_TORCHRUN = {"TORCHELASTIC_RUN_ID": "1"}


def test_sigterm_is_a_question_for_the_next_step() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with sigterm_asks(60.0, None) as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 5
        while not asked() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert asked()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("grace", "peers", "code", "words"),
    [
        ("1.0", "None", 75, "no checkpoint within 1 s after SIGTERM"),
        ("60.0", "peers", 1, "no checkpoint can be written: rank 1 has not started"),
    ],
    ids=["alone", "without-rank-1"],
)
def test_a_worker_that_hangs_ends_when_there_is_nothing_to_wait_for(
    grace: str, peers: str, code: int, words: str
) -> None:
    source = HANGS.replace("GRACE_S", grace).replace("PEERS", peers)
    command, pipe = [sys.executable, "-P", "-c", source], subprocess.PIPE
    worker = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
    assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
    worker.terminate()
    _, said = worker.communicate(timeout=30)
    assert worker.returncode == code
    assert words in said


def test_the_grace_fits_into_what_torchrun_leaves() -> None:
    assert grace_seconds(None, UNDER_TORCHRUN) == 25
    longer = UNDER_TORCHRUN | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "125"}
    assert grace_seconds(None, longer) == 120 and grace_seconds(100, longer) == 100
    assert grace_seconds(100, {}) == 100
    with pytest.raises(ValueError, match="--grace must be at most the 30 s"):
        grace_seconds(100, UNDER_TORCHRUN)
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="--grace must be a number above 0"):
            grace_seconds(wrong, {})
