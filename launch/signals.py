"""Signals: training stops after a step and writes a checkpoint, other stages clean up.

Schedulers send SIGTERM before they take a machine away, and torchrun before it starts workers
again; SIGHUP comes when a terminal or an SSH session is closed, SIGINT from Ctrl-C.
"""

import contextlib
import math
import os
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from shardrec.launch.cli import FAILED, INTERRUPTED, PREEMPTED
from shardrec.pipeline.run.interruption import Interrupted, Preempted

if TYPE_CHECKING:
    from shardrec.launch.heartbeat import Peers

__all__ = [
    "GRACE_S",
    "TERMINATED",
    "exit_on_sigterm",
    "grace_seconds",
    "leave_terminal",
    "stop_on_signals",
    "taken",
]

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
    try:
        limit = float(environment.get(LIMIT, GRACE_S + MARGIN_S))
    except ValueError:
        raise ValueError(
            f"{LIMIT} must be a number of seconds, got {environment[LIMIT]!r}; set it to 30"
        ) from None
    if asked is not None and asked > limit:
        raise ValueError(
            f"--grace must be at most the {limit:.0f} s after which torchrun kills its workers, "
            f"got {asked}; raise {LIMIT}, or --grace of `shardrec launch train`"
        )
    return asked if asked is not None else max(1.0, limit - MARGIN_S)


@contextlib.contextmanager
def stop_on_signals(grace_s: float, peers: "Peers | None") -> Iterator[Callable[[], bool]]:
    """Context manager that yields a function: whether SIGTERM, SIGHUP or SIGINT has arrived.

    After a signal the process exits, with a line that says why, if the ``with`` block has not ended
    within the grace period, if another rank is gone, so that a checkpoint can no longer be written,
    or at a second SIGINT. A thread does this, because the main thread may be waiting in a
    collective, where Python runs no handler.

    Args:
        grace_s: seconds from SIGTERM or SIGHUP to the end; after SIGINT the user can send another
            one instead.
        peers: the other ranks; None in a single process.

    Raises:
        Interrupted: in place of ``Preempted``, if SIGINT was the first signal.
    """
    arrived: list[int] = []
    over = threading.Event()
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        for number in _arriving(reader):
            arrived.append(number)
            if number == signal.SIGHUP:
                leave_terminal()
            if len(arrived) == 1:
                ask = (number, over, grace_s, peers)
                threading.Thread(target=_ask, args=ask, daemon=True).start()
            # After SIGINT torchrun passes the next one on as SIGTERM.
            elif signal.SIGINT in (number, arrived[0]) and not over.is_set():
                _end(INTERRUPTED, "ended at once; --resume=auto continues from the last checkpoint")

    threading.Thread(target=watch, name="signals", daemon=True).start()
    former = {number: signal.signal(number, lambda *_: None) for number in taken()}
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield lambda: bool(arrived)
    except Preempted as stopped:
        if arrived[:1] == [signal.SIGINT]:
            raise Interrupted(str(stopped)) from stopped
        raise
    finally:
        over.set()
        signal.set_wakeup_fd(wakeup)
        for number, handler in former.items():
            signal.signal(number, handler or signal.SIG_DFL)
        writer.close()


def taken() -> list[signal.Signals]:
    """The signals that ask to stop, except those that nohup or a shell has set to be ignored."""
    asking = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    return [number for number in asking if signal.getsignal(number) != signal.SIG_IGN]


def leave_terminal() -> None:
    """Stop writing to a terminal that is closed, because each line would raise an error."""
    with open(os.devnull, "w") as nowhere:
        for number in (1, 2):
            if stat.S_ISCHR(os.fstat(number).st_mode):
                os.dup2(nowhere.fileno(), number)


def _ask(number: int, over: threading.Event, grace_s: float, peers: "Peers | None") -> None:
    """What follows the first signal, in a thread of its own."""
    if number != signal.SIGINT:
        threading.Thread(target=_end_late, args=(over, grace_s), daemon=True).start()
    elif peers is None or peers.rank == 0:
        _say("Ctrl-C: a checkpoint is written after this step; Ctrl-C again ends at once")
    if peers is not None:
        _end_without(peers, over)


def _arriving(reader: socket.socket) -> Iterator[int]:
    """The numbers of the signals, as they arrive, until the other end is closed."""
    asking = taken()
    with reader:
        while received := reader.recv(1):
            if received[0] in asking:
                yield received[0]


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
        gone = peers.gone()
        missing = missing + 1 if gone else 0
        if missing == 2 and not over.is_set():
            _end(FAILED, f"no checkpoint can be written: {'; '.join(gone)}")


def _end(code: int, message: str) -> None:
    _say(message)
    os._exit(code)


def _say(message: str) -> None:
    with contextlib.suppress(OSError):
        print(f"shardrec train: {message}", file=sys.stderr, flush=True)
