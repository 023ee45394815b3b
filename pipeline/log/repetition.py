"""Events that repeat: exact duplicates, ties in time, and consecutive events with the same item.

They are counted in the stream of sorted events, in this order: exact duplicates are counted, and
dropped unless they are to be kept; ties and repeats are counted among the remaining events; repeats
are dropped if ``drop_repeats`` is set.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["Repetition", "Repetitions", "describe_repetition", "tie_aligned"]

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Repetition:
    """How many events of a log repeat, by kind of repetition.

    Attributes:
        duplicates: events that equal an earlier one in every column read.
        duplicates_dropped: how many of the duplicates were dropped.
        tied: events that share their time with another event of the same user.
        repeats: events with the same item as the user's previous event.
        repeats_dropped: how many of the repeats were dropped.
    """

    duplicates: int = 0
    duplicates_dropped: int = 0
    tied: int = 0
    repeats: int = 0
    repeats_dropped: int = 0

    def __add__(self, other: "Repetition") -> "Repetition":
        """The sums of both."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Repetition(*(one + another for one, another in pairs))

    def counts(self) -> dict[str, int]:
        """The numbers under their names in the manifest, without the dropped duplicates."""
        return {
            "events_duplicated": self.duplicates,
            "events_tied_in_time": self.tied,
            "events_repeating_an_item": self.repeats,
            "repeats_dropped": self.repeats_dropped,
        }


def describe_repetition(counts: Mapping[str, int]) -> list[str]:
    """One line for each kind of repetition in the log, with the option that controls it.

    Args:
        counts: ``counts`` of a manifest; a manifest of an earlier version without them gives no
            line.

    Example:
        >>> describe_repetition({"events_read": 40, "events_tied_in_time": 10})
        ['25.0 % of the events share their time with another of the user (--ties orders them)']
    """
    total = max(counts["events_read"] - counts.get("events_other_type", 0), 1)
    lines = {
        "events_duplicated": "equal an earlier one (--keep-duplicates keeps them)",
        "events_tied_in_time": "share their time with another of the user (--ties orders them)",
        "events_repeating_an_item": "have the item of the user's event before (--drop-repeats)",
    }
    return [
        f"{100 * counts[name] / total:.1f} % of the events {words}"
        for name, words in lines.items()
        if counts.get(name)
    ]


class Repetitions:
    """Counts and drops repetitions in a stream of events (user, item, time, event[, weight]).

    Attributes:
        total: the numbers of all parts reduced so far.
    """

    def __init__(self, keep_duplicates: bool, drop_repeats: bool) -> None:
        """Store what to do with duplicates and repeats."""
        self.keep_duplicates, self.drop_repeats = keep_duplicates, drop_repeats
        self.total = Repetition()
        self._last = np.full(2, -1)  # user and item of the event before

    def reduce(self, columns: list[Array]) -> list[Array]:
        """The events of a part that are kept, as columns; parts are those of ``tie_aligned``."""
        duplicate = _duplicates(columns)
        num_duplicates = int(duplicate.sum())
        if num_duplicates and not self.keep_duplicates:
            columns = [column[~duplicate] for column in columns]
        repeat = self._repeats(columns[0], columns[1])
        total = self.total
        self.total = Repetition(
            duplicates=total.duplicates + num_duplicates,
            duplicates_dropped=total.duplicates_dropped
            + (0 if self.keep_duplicates else num_duplicates),
            tied=total.tied + int(_tied(columns).sum()),
            repeats=total.repeats + int(repeat.sum()),
            repeats_dropped=total.repeats_dropped + int(repeat.sum()) * self.drop_repeats,
        )
        return [column[~repeat] for column in columns] if self.drop_repeats else columns

    def _repeats(self, user: Array, item: Array) -> Array:
        users = np.append(self._last[0], user)
        items = np.append(self._last[1], item)
        self._last = np.array([user[-1], item[-1]])
        repeat: Array = (users[1:] == users[:-1]) & (items[1:] == items[:-1])
        return repeat


def tie_aligned(reader: Iterable[pa.RecordBatch]) -> Iterator[list[Array]]:
    """Columns (user, item, time, event[, weight]) in parts that never cut a tie in time."""
    rest: list[Array] = []
    for batch in reader:
        columns = [column.to_numpy() for column in batch.columns]
        if rest:
            columns = [np.concatenate(pair) for pair in zip(rest, columns, strict=True)]
        changes = np.flatnonzero(~_ties(columns[0], columns[2]))
        cut = int(changes[-1]) + 1 if len(changes) else 0
        if cut:
            yield [column[:cut] for column in columns]
        rest = [column[cut:] for column in columns]
    if rest:
        yield rest


def _ties(user: Array, time: Array) -> Array:
    """(E - 1,) bool: event k + 1 has the user and the time of event k."""
    same: Array = (user[1:] == user[:-1]) & (time[1:] == time[:-1])
    return same


def _tied(columns: list[Array]) -> Array:
    """(E,) bool: another event has the user and the time of this one."""
    tie = _ties(columns[0], columns[2])
    tied: Array = np.append(tie, False) | np.append(False, tie)
    return tied


def _duplicates(columns: list[Array]) -> Array:
    """(E,) bool: the event equals an earlier one in every column."""
    duplicate = np.zeros(len(columns[0]), bool)
    in_tie = np.flatnonzero(_tied(columns))
    if not len(in_tie):
        return duplicate
    group = np.append(0, np.cumsum(~_ties(columns[0], columns[2])))[in_tie]
    keys = [group, columns[1][in_tie]] + [column[in_tie] for column in columns[3:]]
    order = np.lexsort(keys[::-1])
    repeats = np.ones(len(order) - 1, bool)
    for key in keys:
        repeats &= key[order][1:] == key[order][:-1]
    duplicate[in_tie[order[1:][repeats]]] = True
    return duplicate
