"""File locks: one process at a time writes a folder, across machines.

The kernel holds a lock, so a killed process leaves none behind. On a network file system the server
holds it for all machines (NFS 4, and Lustre with ``flock``).
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path

__all__ = ["LOCK", "BusyError", "RunLock", "lock_file", "open_lock"]

LOCK = ".lock"
# Error numbers of a file system without locks; a read-only one returns others.
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class BusyError(FileExistsError):
    """Another process is writing there; the same command may succeed after that process ends."""


class RunLock:
    """The lock of a run folder, so that only one run writes it.

    The file says which process holds the lock, for people and for the error message.
    """

    def __init__(self, folder: Path) -> None:
        """Store the folder; nothing is locked yet."""
        self.path = folder / LOCK
        self._file: int | None = None

    def acquire(self) -> None:
        """Take the lock, unless this object holds it already.

        Raises:
            BusyError: another process holds it; the message says which.
            OSError: the folder cannot be written.
        """
        while self._file is None:
            file = open_lock(self.path)
            try:
                if not lock_file(file, self.path):
                    raise BusyError(
                        f"output must be trained by one run at a time, got {self.path.parent}, "
                        f"which is held by {self.holder()}; wait for its end, stop it, or choose "
                        "another name"
                    )
                if _is_at(file, self.path):  # its last holder may have removed it since
                    os.ftruncate(file, 0)
                    os.pwrite(file, json.dumps(_this_process()).encode(), 0)
                    self._file = file
            finally:
                if self._file is None:
                    os.close(file)

    def release(self) -> None:
        """Release the lock, so that another process can take it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def holder(self) -> str:
        """The process that took the lock last, as text for messages."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, OverflowError):
            stored = json.loads(self.path.read_bytes()[:1000])
            since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(stored["since"]))
            return f"process {stored['process']} on {stored['host']} since {since}"
        return "a process that has not said which"


def open_lock(path: Path) -> int:
    """File descriptor of a lock file, which is created if missing; a link is not followed.

    Raises:
        OSError: it cannot be opened, or is a link (which could point to any file).
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def lock_file(file: int, path: Path, *, wait: bool = False) -> bool:
    """Lock an open file until it is closed; False if another process holds the lock.

    If the file system has no locks, this warns and returns True.

    Args:
        file: descriptor, open for writing.
        path: path of the file, for the warning.
        wait: wait for the other process instead of returning False.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        logging.getLogger(__name__).warning(
            "%s cannot be locked on this file system (%s): make sure that no second process "
            "writes there",
            path.parent,
            error,
        )
    return True


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is still the one that others find at ``path``."""
    return path.exists() and os.path.samestat(os.fstat(file), path.stat())


def _this_process() -> dict[str, object]:
    return {"process": os.getpid(), "host": socket.gethostname(), "since": round(time.time(), 1)}
