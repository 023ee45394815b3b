"""Split the log into training, validation and test: two cut positions in each user's sequence.

Events 0 .. train_end - 1 of a user train, train_end .. test_start - 1 are held out for validation,
and the rest for the test. Each split of ``prepare`` is a way to choose these two numbers.
"""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from shardrec.pipeline.log.sort import SortedLog, UserBlock

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cuts:
    """The cut positions of each user, counted in events of catalog items.

    Attributes:
        item_kept: (items,) bool, whether the item is in the catalog.
        kept: (users,) bool, whether the user is in the prepared data.
        total: (users,) int64 events of the user.
        train_end: (users,) int64; events before it train.
        test_start: (users,) int64; events from it on are for the test.
    """

    item_kept: Array
    kept: Array
    total: Array
    train_end: Array
    test_start: Array


def count_items(log: SortedLog, before: int | None) -> Array:
    """(items,) int64 events of each item, before time ``before`` or in all."""
    counts = np.zeros(len(log.item_ids), np.int64)
    for block in log.blocks():
        items = block.item if before is None else block.item[block.time < before]
        counts += np.bincount(items, minlength=len(counts))
    return counts


def count_users(log: SortedLog, item_kept: Array, before: list[int | None]) -> list[Array]:
    """For each time in ``before``, (users,) int64 events of kept items earlier than it (or all)."""
    results = [np.zeros(len(log.user_ids), np.int64) for _ in before]
    for block in log.blocks():
        kept = item_kept[block.item]
        size = block.stop_user - block.first_user
        for result, time in zip(results, before, strict=True):
            mask = kept if time is None else kept & (block.time < time)
            users = block.user[mask] - block.first_user
            result[block.first_user : block.stop_user] = np.bincount(users, minlength=size)
    return results


def temporal_cuts(
    log: SortedLog,
    item_kept: Array,
    *,
    test_time: int,
    validation_time: int | None,
    min_user_events: int,
    validation_users: int | None,
) -> Cuts:
    """Cuts by time; validation by time, or by the last training event of some users.

    Args:
        log: the sorted log.
        item_kept: (items,) bool, the catalog.
        test_time: first time of the test part.
        validation_time: first time of the validation part, or None to validate by users.
        min_user_events: events before ``test_time`` that a user needs.
        validation_users: number of users whose last event before ``test_time`` validates, chosen
            evenly from those with three or more; None means one in ten, at most 10,000.
    """
    times = [None, test_time] + ([] if validation_time is None else [validation_time])
    total, test_start, *train_ends = count_users(log, item_kept, times)
    kept = test_start >= max(min_user_events, 1)
    if train_ends:
        train_end = train_ends[0]
    else:
        eligible = np.flatnonzero(kept & (test_start >= 3))
        tenth = -(-len(eligible) // 10)
        wanted = min(tenth, 10_000) if validation_users is None else validation_users
        train_end = test_start.copy()
        train_end[_evenly(eligible, wanted)] -= 1
    return Cuts(
        item_kept=item_kept, kept=kept, total=total, train_end=train_end, test_start=test_start
    )


def leave_one_out_cuts(
    log: SortedLog, item_kept: Array, *, min_user_events: int, validation_users: int | None
) -> Cuts:
    """The last event tests and the one before it validates; all train below three events.

    Args:
        log: the sorted log.
        item_kept: (items,) bool, the catalog.
        min_user_events: events that a user needs.
        validation_users: number of users that validate, chosen evenly; None means all.
    """
    total = count_users(log, item_kept, [None])[0]
    kept = total >= max(min_user_events, 1)
    long = total >= 3
    test_start = total - long
    train_end = test_start.copy()
    eligible = np.flatnonzero(kept & long)
    train_end[
        _evenly(eligible, len(eligible) if validation_users is None else validation_users)
    ] -= 1
    return Cuts(
        item_kept=item_kept, kept=kept, total=total, train_end=train_end, test_start=test_start
    )


def positions(block: UserBlock, cuts: Cuts) -> tuple[Array, Array]:
    """Positions of a block's events in their sequences, for kept items and kept users.

    Returns:
        (E,) bool mask over the block, and (M,) int64 positions of the masked events.
    """
    catalog = cuts.item_kept[block.item]
    counts = cuts.total[block.first_user : block.stop_user]
    starts = np.cumsum(counts) - counts
    place = np.arange(int(counts.sum())) - np.repeat(starts, counts)
    of_kept_users = cuts.kept[block.user[catalog]]
    mask = catalog.copy()
    mask[catalog] = of_kept_users
    return mask, place[of_kept_users]


def training_counts(log: SortedLog, cuts: Cuts) -> Array:
    """(items,) int64 training events of each item; popularity always means these counts."""
    counts = np.zeros(len(log.item_ids), np.int64)
    for block in log.blocks():
        mask, place = positions(block, cuts)
        train = place < cuts.train_end[block.user[mask]]
        counts += np.bincount(block.item[mask][train], minlength=len(counts))
    return counts


def _evenly(chosen_from: Array, count: int) -> Array:
    """``count`` of the values at even distances; all if there are fewer.

    Example:
        >>> _evenly(np.arange(10), 3).tolist()
        [0, 3, 6]
    """
    count = min(count, len(chosen_from))
    return chosen_from[np.arange(count) * len(chosen_from) // max(count, 1)]
