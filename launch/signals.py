"""SIGTERM: workers stop after a step and write a checkpoint, other stages clean up.

Schedulers send it before they take a machine away, and torchrun before it starts workers again.
"""

import contextlib
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from shardrec.launch.cli import FAILED, PREEMPTED

if TYPE_CHECKING:
    from shardrec.launch.heartbeat import Peers

__all__ = ["GRACE_S", "TERMINATED", "exit_on_sigterm", "grace_seconds", "stop_on_sigterm"]

TERMINATED = 128 + signal.SIGTERM
GRACE_S = 25.0
# Seconds of torchrun's limit that are kept for the process to exit.
MARGIN_S = 5.0
LIMIT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Context manager: inside it, SIGTERM raises ``SystemExit(143)`` in the main thread.

    For stages of one process: temporary files are removed as after any exception, and a second
    SIGTERM does not interrupt this. Outside the main thread, where Python accepts no handlers,
    SIGTERM is not handled.
    """

    def leave(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def grace_seconds(asked: float | None, environment: Mapping[str, str]) -> float:
    """The grace period of a worker: seconds from SIGTERM until it must have ended.

    Args:
        asked: value of ``--grace``; None takes the longest that the launcher allows.
        environment: environment variables, which hold the limit of torchrun, if any.

    Raises:
        ValueError: the value is not above 0, or torchrun would kill the worker earlier.

    Example:
        >>> grace_seconds(None, {}), grace_seconds(None, {LIMIT: "125", "TORCHELASTIC_RUN_ID": "1"})
        (25.0, 120.0)
    """
    if asked is not None and not 0 < asked < math.inf:
        raise ValueError(f"--grace must be a number above 0, got {asked}; give seconds")
    if "TORCHELASTIC_RUN_ID" not in environment:
        return GRACE_S if asked is None else asked
    limit = float(environment.get(LIMIT, GRACE_S + MARGIN_S))
    if asked is not None and asked > limit:
        raise ValueError(
            f"--grace must be at most the {limit:.0f} s after which torchrun kills its workers, "
            f"got {asked}; raise {LIMIT}, or --grace of `shardrec launch train`"
        )
    return asked if asked is not None else max(1.0, limit - MARGIN_S)


@contextlib.contextmanager
def stop_on_sigterm(grace_s: float, peers: "Peers | None") -> Iterator[Callable[[], bool]]:
    """Context manager that yields a function that tells whether SIGTERM has arrived.

    After SIGTERM the process exits, with a line that says why, if the ``with`` block has not ended
    within the grace period, or if another rank is gone, so that a checkpoint can no longer be
    written. A thread does this, because the main thread may be waiting in a collective, where
    Python runs no handler.

    Args:
        grace_s: grace period in seconds.
        peers: the other ranks; None in a single process.
    """
    came, over = threading.Event(), threading.Event()
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        if not _sigterm_comes(reader):
            return
        came.set()
        threading.Thread(target=_end_late, args=(over, grace_s), daemon=True).start()
        if peers is not None:
            _end_without(peers, over)

    threading.Thread(target=watch, name="sigterm", daemon=True).start()
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield came.is_set
    finally:
        over.set()
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)
        writer.close()


def _sigterm_comes(signals: socket.socket) -> bool:
    """Wait for SIGTERM's number on the socket; False if the other end is closed before."""
    with signals:
        while received := signals.recv(1):
            if received[0] == signal.SIGTERM:
                return True
    return False


def _end_late(over: threading.Event, grace_s: float) -> None:
    if not over.wait(grace_s):
        _end(
            PREEMPTED,
            f"no checkpoint within {grace_s:.0f} s after SIGTERM; a resumed run continues from "
            "the one before (raise --grace for more time)",
        )


def _end_without(peers: "Peers", over: threading.Event) -> None:
    """Exit once a rank is missing twice in a row: one that is only slow may still respond."""
    missing = 0
    while not over.wait(0.1):
        gone = peers.absent().gone
        missing = missing + 1 if gone else 0
        if missing == 2 and not over.is_set():
            _end(FAILED, f"SIGTERM arrived, and no checkpoint can be written: {'; '.join(gone)}")


def _end(code: int, message: str) -> None:
    print(f"shardrec train: {message}", file=sys.stderr, flush=True)
    os._exit(code)
