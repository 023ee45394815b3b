"""The lock of a run folder: one run writes it at a time, on whatever machine."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path

__all__ = ["LOCK", "RunLock"]

LOCK = ".lock"
# What a file system answers that knows no locks; one that is read-only has others.
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class RunLock:
    """Keeps a second run out of a run folder; gone with the process that holds it.

    The kernel keeps the lock, so nothing is left behind by a process that was killed. On a network
    file system its server keeps it for all machines (NFS 4, and Lustre with ``flock``). The file
    says who holds it, for people and for the message.
    """

    def __init__(self, folder: Path) -> None:
        """Store the folder; nothing is locked yet."""
        self.path = folder / LOCK
        self._file: int | None = None

    def acquire(self) -> None:
        """Take the lock, unless it is held already.

        Raises:
            FileExistsError: another process holds it; the message says which.
            OSError: the folder cannot be written.
        """
        while self._file is None:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                _lock(file, self.path)
                if _is_at(file, self.path):  # its last holder may have removed it since
                    os.ftruncate(file, 0)
                    os.pwrite(file, json.dumps(_ourselves()).encode(), 0)
                    self._file = file
            finally:
                if self._file is None:
                    os.close(file)

    def release(self) -> None:
        """Let others have the folder."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def holder(self) -> str:
        """In words, who wrote last that it holds the lock."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            said = json.loads(self.path.read_text(encoding="utf-8"))
            since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(said["since"]))
            return f"process {said['process']} on {said['host']} since {since}"
        return "a process that has not said which"


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is still the one that others find at ``path``."""
    return path.exists() and os.path.samestat(os.fstat(file), path.stat())


def _lock(file: int, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise FileExistsError(
            f"output must be trained by one run at a time, got {path.parent}, which is held by "
            f"{RunLock(path.parent).holder()}; wait for its end, stop it, or choose another name"
        ) from error
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        logging.getLogger(__name__).warning(
            "%s cannot be locked on this file system (%s): see to it that no second run is given "
            "the same folder",
            path.parent,
            error,
        )


def _ourselves() -> dict[str, object]:
    return {"process": os.getpid(), "host": socket.gethostname(), "since": round(time.time(), 1)}
