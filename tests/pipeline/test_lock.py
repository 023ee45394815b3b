"""One run writes a folder at a time, and the lock does not outlive its holder."""

import errno
import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from shardrec.pipeline.outputs.lock import RunLock

HOLDER = """
import sys, time
from pathlib import Path
from shardrec.pipeline.outputs.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_the_message_says_who_holds_the_folder_and_a_killed_holder_lets_go(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-P", "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    lock = RunLock(tmp_path)
    with pytest.raises(FileExistsError, match=f"process {holder.pid} on {socket.gethostname()}"):
        lock.acquire()
    assert lock.holder().startswith(f"process {holder.pid} on"), "asking changed what is written"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    lock.acquire()
    assert lock.holder().startswith(f"process {os.getpid()} on")
    with pytest.raises(FileExistsError):
        RunLock(tmp_path).acquire()
    lock.release()
    RunLock(tmp_path).acquire()


def test_a_lock_that_was_removed_with_its_folder_is_taken_where_others_see_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, system_flock, tries = RunLock(tmp_path), fcntl.flock, 0

    def remove_first(file: int, how: int) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:  # another run ended between our opening of the file and our locking it
            lock.path.unlink()
        system_flock(file, how)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    lock.acquire()
    assert tries == 2 and lock.holder().startswith(f"process {os.getpid()} on")
    with pytest.raises(FileExistsError):
        RunLock(tmp_path).acquire()


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:  # no file system here refuses, so the call does
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING):
        RunLock(tmp_path).acquire()
    assert "cannot be locked on this file system" in caplog.text
