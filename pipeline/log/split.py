"""Which events train, validate and test: two cut positions in each user's sorted sequence.

A user's events 0 .. train_end - 1 train, train_end .. test_start - 1 are held out for validation,
test_start .. are for testing. Every split of ``prepare`` is a way to choose these two numbers.
"""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from shardrec.pipeline.log.sort import Block, SortedLog

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cuts:
    """Cut positions of every user, in events that the item filter left.

    Attributes:
        item_kept: (items,) bool, whether the item is in the catalog.
        kept: (users,) bool, whether the user trains and is evaluated.
        total: (users,) int64, the user's events.
        train_end: (users,) int64; events before it train.
        test_start: (users,) int64; events from it on are for testing.
    """

    item_kept: Array
    kept: Array
    total: Array
    train_end: Array
    test_start: Array


def count_items(log: SortedLog, before: int | None) -> Array:
    """(items,) int64 events of each item, those before time ``before`` only when it is given."""
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
        validation_users: how many users give up their last event before ``test_time``, evenly
            spread over those with three or more; None means one in ten and at most 10,000.
    """
    total, test_start = count_users(log, item_kept, [None, test_time])
    kept = test_start >= max(min_user_events, 1)
    if validation_time is not None:
        train_end = count_users(log, item_kept, [validation_time])[0]
    else:
        eligible = np.flatnonzero(kept & (test_start >= 3))
        tenth = -(-len(eligible) // 10)
        wanted = min(tenth, 10_000) if validation_users is None else validation_users
        train_end = test_start.copy()
        train_end[_spread(eligible, wanted)] -= 1
    return Cuts(
        item_kept=item_kept, kept=kept, total=total, train_end=train_end, test_start=test_start
    )


def leave_one_out_cuts(
    log: SortedLog, item_kept: Array, *, min_user_events: int, validation_users: int | None
) -> Cuts:
    """The last event tests and the one before it validates; under three events, all train.

    Args:
        log: the sorted log.
        item_kept: (items,) bool, the catalog.
        min_user_events: events that a user needs.
        validation_users: how many users validate (evenly spread); None means all.
    """
    total = count_users(log, item_kept, [None])[0]
    kept = total >= max(min_user_events, 1)
    long = total >= 3
    test_start = total - long
    train_end = test_start.copy()
    eligible = np.flatnonzero(kept & long)
    train_end[
        _spread(eligible, len(eligible) if validation_users is None else validation_users)
    ] -= 1
    return Cuts(
        item_kept=item_kept, kept=kept, total=total, train_end=train_end, test_start=test_start
    )


def positions(block: Block, cuts: Cuts) -> tuple[Array, Array]:
    """Where the block's events of kept items and kept users stand in their sequences.

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
    """(items,) int64 training events of each item: the only popularity anything may use."""
    counts = np.zeros(len(log.item_ids), np.int64)
    for block in log.blocks():
        mask, place = positions(block, cuts)
        train = place < cuts.train_end[block.user[mask]]
        counts += np.bincount(block.item[mask][train], minlength=len(counts))
    return counts


def _spread(chosen_from: Array, count: int) -> Array:
    """``count`` of the values, evenly spread over their order; all where there are fewer.

    Example:
        >>> _spread(np.arange(10), 3).tolist()
        [0, 3, 6]
    """
    count = min(count, len(chosen_from))
    return chosen_from[np.arange(count) * len(chosen_from) // max(count, 1)]
