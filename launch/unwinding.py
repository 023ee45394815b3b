"""SIGTERM in stages of one process: ends them as an interruption does, with nothing left over.

A stage of several workers is left to the system: one that waits in a collective would not hear it.
"""

import contextlib
import signal
from collections.abc import Iterator

__all__ = ["TERMINATED", "sigterm_unwinds"]

TERMINATED = 128 + signal.SIGTERM


@contextlib.contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """For the length of a ``with``, SIGTERM raises ``SystemExit(143)`` in the main thread.

    Temporary files go as they do after any exception. A second SIGTERM does not disturb that.
    """

    def unwind(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(TERMINATED)

    former = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
