"""SIGTERM asks a worker to end between two steps, and ends it when it does not."""

import os
import signal
import subprocess
import sys
import time

import pytest

from shardrec.launch.termination import grace_seconds, sigterm_asks

# The main thread never comes back to Python, as in a collective that hangs.
HANGS = """
import ctypes
from shardrec.launch.termination import sigterm_asks
mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
with sigterm_asks(1.0, None):
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


def test_a_worker_that_hangs_ends_when_the_grace_is_over() -> None:
    worker = subprocess.Popen(
        [sys.executable, "-P", "-c", HANGS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
    worker.terminate()
    _, said = worker.communicate(timeout=30)
    assert worker.returncode == 75
    assert "no checkpoint within 1 s after SIGTERM" in said


def test_the_grace_fits_into_what_torchrun_leaves() -> None:
    assert grace_seconds(None, UNDER_TORCHRUN) == 25
    longer = UNDER_TORCHRUN | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "125"}
    assert grace_seconds(None, longer) == 120 and grace_seconds(100, longer) == 100
    assert grace_seconds(100, {}) == 100
    with pytest.raises(ValueError, match="--grace must be at most the 30 s"):
        grace_seconds(100, UNDER_TORCHRUN)
    with pytest.raises(ValueError, match="--grace must be above 0"):
        grace_seconds(0, {})
