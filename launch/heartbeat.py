"""Heartbeats: detect and name the rank that stopped responding.

A collective that fails or times out reports at best which connection broke. The phases, none of
which needs a collective:
1. A thread on every rank writes a heartbeat to a shared store once a second: a counter, the number
   of collectives begun, and the line of code the main thread is at.
2. When a collective is slow or has failed, ``absent`` reads all heartbeats twice, ``MISSED``
   intervals apart. A rank with an unchanged counter is gone; one that has begun fewer collectives
   than this rank is behind.
3. A rank that ends sends a last heartbeat with the reason.
4. On GPUs, where a collective waits for a dead rank until its timeout aborts the process, a thread
   looks for lost ranks while nothing advances, and ends this process with their names.
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
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

__all__ = ["FINISHED", "Absence", "LostRankError", "Peers", "Store"]

Result = TypeVar("Result")

# A rank counts as gone after this many missed heartbeats in a row.
MISSED = 3
# Seconds without a new collective after which a thread looks for lost ranks, and how often.
LOOK_S, LOOKS = 30.0, 5
# The reason of a rank that has done its work.
FINISHED = "it has finished"


class Store(Protocol):
    """The methods of a ``torch.distributed`` store that heartbeats use."""

    def set(self, key: str, value: str, /) -> None:
        """Set the value of ``key``."""

    def get(self, key: str, /) -> bytes:
        """The value of ``key``; waits until it is set."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all ``keys`` are set."""

    def clone(self) -> "Store":
        """A client of the same store over a new connection."""


class LostRankError(RuntimeError):
    """A rank died, left or stopped responding; the message names it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Heartbeat:
    """The content of a heartbeat."""

    number: int  # 1 for the first heartbeat of the rank
    process: str  # process id and host name
    collectives: int  # begun so far in the default group
    where: str  # the line its main thread was at
    left: str | None  # why it left; "" if not by its own error; None while it runs


@dataclass(frozen=True, slots=True)
class Absence:
    """The ranks that do not respond or lag behind, as one line of text for each.

    Attributes:
        gone: died, left, or sent no heartbeat.
        behind: alive, but has begun fewer collectives than this rank.
        lost: those that are gone after they had begun and before they had finished.
    """

    gone: list[str]
    behind: list[str]
    lost: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        """The ranks that are gone, or else those that are behind; "" if there are none."""
        return "; ".join(self.gone or self.behind)


class Peers:
    """Sends this rank's heartbeats and reports the ranks that do not respond.

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
        end: Callable[[str], None] | None = None,
    ) -> None:
        """Connect to the store; ``start`` sends the first heartbeat.

        Args:
            store: shared by all ranks. It is cloned, because others may wait in this connection.
            rank: rank of this process.
            world_size: W.
            keeper: rank that hosts the store, which is lost with it; None: the launcher hosts it.
            timeout_s: timeout of a collective; after half of it a warning names the missing ranks.
            interval_s: seconds between two heartbeats.
            end: called in a thread with the names of lost ranks, to end this process; None where a
                collective with a lost rank raises an error by itself.
        """
        self.rank, self.world_size, self.keeper = rank, world_size, keeper
        self.timeout_s, self.interval_s = timeout_s, interval_s
        self.patience_s = MISSED * interval_s
        self._end = end
        self._to_write, self._to_read = store.clone(), store.clone()
        self._number = 0
        self._left: str | None = None
        self._of_keeper: _Heartbeat | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)

    def start(self) -> None:
        """Start to send heartbeats; ``leave`` stops it."""
        self._thread.start()

    def leave(self, reason: str) -> None:
        """Send a last heartbeat with the reason, and stop.

        Args:
            reason: why this rank leaves; "" if it is not because of an error of its own.
        """
        self._over.set()
        self._thread.join(self.patience_s)
        self._left = reason
        _in_time(self._send, self.patience_s)

    def absent(self) -> Absence:
        """The ranks that are gone or behind; waits ``MISSED`` intervals between two readings."""
        before = _in_time(self._read_all, self.patience_s)
        time.sleep(self.patience_s)
        after = _in_time(self._read_all, self.patience_s)
        if before is None or after is None:
            return Absence([self._without_store()], [])
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        gone = [_why_gone(rank, before[rank], after[rank]) for rank in others]
        left = [after[rank] for rank in others]
        lost = [why for why, last in zip(gone, left, strict=True) if last and last.left != FINISHED]
        level = _collectives()
        behind = [_why_behind(rank, after[rank], level) for rank in others]
        found = ([one for one in lines if one] for lines in (gone, behind, lost))
        return Absence(*found)

    def gone(self) -> list[str]:
        """The ranks that died, left, or sent no heartbeat; empty if that cannot be determined.

        It cannot be determined once the launcher, which hosts the store, is gone; the ranks may
        still be training.
        """
        return [] if self.keeper is None and self._is_cut_off() else self.absent().gone

    def _is_cut_off(self) -> bool:
        return _in_time(self._read_all, self.patience_s) is None

    def _run(self) -> None:
        reached, since, looked = -1, 0.0, 0.0
        try:
            while not self._over.is_set():
                self._send()
                if self.keeper is not None:
                    self._of_keeper = _read(self._to_write, self.keeper)
                now, level = time.monotonic(), _collectives()
                if level != reached:
                    reached, since, looked = level, now, now
                if self._end is not None and now - looked > min(LOOK_S, self.timeout_s / 2):
                    looked = now
                    threading.Thread(target=self._end_if_lost, daemon=True).start()
                if now - since > self.timeout_s / 2:
                    since = now + self.timeout_s  # one warning per wait
                    threading.Thread(target=self._warn, daemon=True).start()
                self._over.wait(self.interval_s)
        except RuntimeError:  # the store is lost, and no rank can be reached
            return

    def _end_if_lost(self) -> None:
        """Calls ``end`` if a rank is lost, several times in a row: a compiler may stop a thread."""
        lost = list[str]()
        for _ in range(LOOKS):
            lost = self.absent().lost
            if not lost or self._over.is_set():
                return
        if self._end is not None:
            self._end("; ".join(lost))

    def _warn(self) -> None:
        """Warn early: a collective that times out on a GPU ends the process without our message."""
        if self.rank <= 1 and str(absent := self.absent()):  # two ranks warn: one may be missing
            message = "no progress for %.0f s, of at most %.0f: %s"
            log = logging.getLogger(__name__)
            log.warning(message, self.timeout_s / 2, self.timeout_s, absent)

    def _send(self) -> None:
        self._number += 1
        heartbeat = _Heartbeat(
            number=self._number,
            process=f"process {os.getpid()} on {socket.gethostname()}",
            collectives=_collectives(),
            where=_main_thread(),
            left=self._left,
        )
        self._to_write.set(_key(self.rank), json.dumps(dataclasses.asdict(heartbeat)))

    def _read_all(self) -> list[_Heartbeat | None]:
        return [_read(self._to_read, rank) for rank in range(self.world_size)]

    def _without_store(self) -> str:
        """The message when the store is lost: the rank that hosted it, by its last heartbeat."""
        if self.keeper is None:
            return "no answer from the store that the launcher of rank 0 hosts"
        last = self._of_keeper
        who = f"rank {self.keeper}" + (f" ({last.process})" if last else "")
        return f"{who} sends no heartbeat, and the store that it hosts does not answer" + (
            f", it was last at {last.where}" if last else ""
        )


def _read(store: Store, rank: int) -> _Heartbeat | None:
    """The last heartbeat of a rank; None before its first."""
    there = store.check([_key(rank)])
    return _Heartbeat(**json.loads(store.get(_key(rank)))) if there else None


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"


def _why_gone(rank: int, before: _Heartbeat | None, after: _Heartbeat | None) -> str | None:
    if after is None:
        return f"rank {rank} has not started"
    if after.left is not None:
        return f"rank {rank} has left: {after.left}" if after.left else None
    if before is not None and before.number == after.number:
        return f"rank {rank} ({after.process}) sends no heartbeat, it was last at {after.where}"
    return None


def _why_behind(rank: int, last: _Heartbeat | None, level: int) -> str | None:
    if last is None or last.left is not None or last.collectives >= level:
        return None
    return f"rank {rank} ({last.process}) is alive but has not joined, it is at {last.where}"


def _collectives() -> int:
    """How many collectives this rank has begun in the default group, by any of its backends."""
    group = dist.group.WORLD if dist.is_initialized() else None
    if group is None:
        return 0
    # The group's own number is that of one backend: it does not count gloo's beside NCCL's.
    backends: list[Any] = [group._get_backend(device) for device in group._device_types]
    return sum(int(one._get_sequence_number_for_group()) for one in backends)


def _main_thread() -> str:
    """File, line and function of the main thread."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "its end"
    file = os.sep.join(frame.f_code.co_filename.split(os.sep)[-2:])
    return f"{file}:{frame.f_lineno} ({frame.f_code.co_name})"


def _in_time(work: Callable[[], Result], seconds: float) -> Result | None:
    """The result of ``work``; None if it raises or takes longer, as when the store is lost."""
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
