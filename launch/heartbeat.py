"""Signs of life: which rank the others are waiting for.

A collective that fails or times out says at best which connection broke. Here every rank tells a
store once a second that it lives, where it is, and how many collectives it has begun, so that the
others can say who is missing. None of this needs a collective.
"""

import dataclasses
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch.distributed as dist

__all__ = ["Absence", "LostRankError", "Peers", "Sign", "Store"]

Result = TypeVar("Result")

# A rank counts as silent when it has missed so many signs in a row.
MISSED = 3


class Store(Protocol):
    """The part of ``torch.distributed``'s stores that is used here."""

    def set(self, key: str, value: str, /) -> None:
        """Let ``key`` have a value."""

    def get(self, key: str, /) -> bytes:
        """The value; waits until there is one."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all have a value."""

    def clone(self) -> "Store":
        """The same store over another connection."""


class LostRankError(RuntimeError):
    """A rank died, left, or stopped taking part; the message names it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sign:
    """What a rank said last.

    Attributes:
        number: counts its signs.
        process: which process on which machine.
        collectives: begun so far in the default group.
        where: the line its main thread was at.
        left: why it left, in words; "" where that is no fault of its own, None where it has not
            left.
    """

    number: int
    process: str
    collectives: int
    where: str
    left: str | None


@dataclass(frozen=True, slots=True)
class Absence:
    """In words, one entry a rank, the ranks that do not take part.

    Attributes:
        gone: died, left, or gave no sign of life.
        behind: alive, but in fewer collectives than the rank that asks.
    """

    gone: list[str]
    behind: list[str]

    def __str__(self) -> str:
        """Those gone; where there are none, those behind; "" where all take part."""
        return "; ".join(self.gone or self.behind)


class Peers:
    """Tells the other ranks that this one lives, and finds out which of them do not.

    Collectives: none.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        *,
        keeper: int | None = 0,
        timeout_s: float = 600.0,
        interval_s: float = 1.0,
    ) -> None:
        """Store who this is; ``start`` gives the first sign.

        Args:
            store: of all ranks. Connections of its own are made, for others may wait in this one.
            rank: of this process.
            world_size: W.
            keeper: rank that keeps the store, which is gone with it; None: the launcher does.
            timeout_s: of a collective; after half of it a warning says who is waited for.
            interval_s: seconds between two signs.
        """
        self.rank, self.world_size, self.keeper = rank, world_size, keeper
        self.timeout_s, self.interval_s = timeout_s, interval_s
        self.patience_s = MISSED * interval_s
        self._to_write, self._to_read = store.clone(), store.clone()
        self._number = 0
        self._left: str | None = None
        self._of_keeper: Sign | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="signs-of-life", daemon=True)

    def start(self) -> None:
        """Give signs until ``leave``."""
        self._thread.start()

    def leave(self, reason: str) -> None:
        """Give the last sign.

        Args:
            reason: what the others are told; "" where it is no fault of this rank.
        """
        self._over.set()
        self._thread.join(self.patience_s)
        self._left = reason
        _in_time(self._say, self.patience_s)

    def absent(self) -> Absence:
        """Who does not take part; takes as long as it takes to miss a few signs."""
        before = _in_time(self._signs, self.patience_s)
        time.sleep(self.patience_s)
        after = _in_time(self._signs, self.patience_s)
        if before is None or after is None:
            return Absence([self._without_store()], [])
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        gone = [_why_gone(rank, before[rank], after[rank]) for rank in others]
        level = _collectives()
        behind = [_why_behind(rank, after[rank], level) for rank in others]
        return Absence([one for one in gone if one], [one for one in behind if one])

    def _run(self) -> None:
        reached, since = -1, 0.0
        try:
            while not self._over.is_set():
                self._say()
                if self.keeper is not None:
                    self._of_keeper = _read(self._to_write, self.keeper)
                now, level = time.monotonic(), _collectives()
                if level != reached:
                    reached, since = level, now
                elif now - since > self.timeout_s / 2:
                    since = now + self.timeout_s  # once a wait
                    threading.Thread(target=self._warn, daemon=True).start()
                self._over.wait(self.interval_s)
        except RuntimeError:  # the store went away: nobody can be told any more
            return

    def _warn(self) -> None:
        """Say who is waited for: a collective on a GPU ends the process without a word of ours."""
        if self.rank <= 1 and str(absent := self.absent()):  # two tell, one may be the absent
            message = "no progress for %.0f s, of at most %.0f: %s"
            log = logging.getLogger(__name__)
            log.warning(message, self.timeout_s / 2, self.timeout_s, absent)

    def _say(self) -> None:
        self._number += 1
        sign = Sign(
            number=self._number,
            process=f"process {os.getpid()} on {socket.gethostname()}",
            collectives=_collectives(),
            where=_main_thread(),
            left=self._left,
        )
        self._to_write.set(_key(self.rank), json.dumps(dataclasses.asdict(sign)))

    def _signs(self) -> list[Sign | None]:
        """The last sign of each rank."""
        return [_read(self._to_read, rank) for rank in range(self.world_size)]

    def _without_store(self) -> str:
        """Who is gone where the store is, from what was known before."""
        if self.keeper is None:
            return "no answer from the store that the launcher of rank 0 keeps"
        last = self._of_keeper
        who = f"rank {self.keeper}" + (f" ({last.process})" if last else "")
        return f"{who} gives no sign of life, nor does the store that it keeps" + (
            f", it was last at {last.where}" if last else ""
        )


def _read(store: Store, rank: int) -> Sign | None:
    """The last sign of a rank; None where there was none yet."""
    there = store.check([_key(rank)])
    return Sign(**json.loads(store.get(_key(rank)))) if there else None


def _key(rank: int) -> str:
    return f"signs-of-life/{rank}"


def _why_gone(rank: int, before: Sign | None, after: Sign | None) -> str | None:
    if after is None:
        return f"rank {rank} has not started"
    if after.left is not None:
        return f"rank {rank} has left: {after.left}" if after.left else None
    if before is not None and before.number == after.number:
        return f"rank {rank} ({after.process}) gives no sign of life, it was last at {after.where}"
    return None


def _why_behind(rank: int, sign: Sign | None, level: int) -> str | None:
    if sign is None or sign.left is not None or sign.collectives >= level:
        return None
    return f"rank {rank} ({sign.process}) lives but does not come, it is at {sign.where}"


def _collectives() -> int:
    """How many collectives this rank has begun in the default group."""
    group = dist.group.WORLD if dist.is_initialized() else None
    return 0 if group is None else int(group._get_sequence_number_for_group())  # type: ignore[attr-defined]


def _main_thread() -> str:
    """File, line and function that the main thread is at."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "its end"
    file = os.sep.join(frame.f_code.co_filename.split(os.sep)[-2:])
    return f"{file}:{frame.f_lineno} ({frame.f_code.co_name})"


def _in_time(work: Callable[[], Result], seconds: float) -> Result | None:
    """What ``work`` returned; None where it raised or took longer, as at a store that is gone."""
    results: list[Result] = []

    def run() -> None:
        try:
            results.append(work())
        except RuntimeError:
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None
