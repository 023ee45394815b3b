"""Split the log into training, validation and test: two cut positions in each user's sequence.

Events 0 .. train_end - 1 of a user train, train_end .. test_start - 1 are held out for validation,
and the rest for the test. Each split of ``prepare`` is a way to choose these two numbers.
"""

import dataclasses
import logging
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from shardrec.pipeline.log.config import PrepareConfig
from shardrec.pipeline.log.sort import SortedLog, UserBlock
from shardrec.pipeline.log.times import as_date, date_of_digits, parse_time, unix_unit

Array = npt.NDArray[Any]


# Events that a user needs for one of them to be held out: its target, and two that train.
LEAST_TO_HOLD_OUT = 3
MOST_BEGIN_TOGETHER = 0.5
_LOG = logging.getLogger(__name__)


class Times(Protocol):
    """The times of a sorted log."""

    @property
    def time_range(self) -> tuple[int, int]:
        """The first and the last one."""
        ...

    def time_at(self, share: float) -> int:
        """The time of event floor(share * events) in global time order."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cuts:
    """Where each user's sequence is cut into the splits, counted in events of catalog items.

    Attributes:
        item_kept: (items,) bool, whether the item is in the catalog.
        kept: (users,) bool, whether the user is in the prepared data.
        total: (users,) int64 number of events of the user.
        train_end: (users,) int64; events before this position are for training.
        test_start: (users,) int64; events from this position on are for the test.
        test_time: first time of the test part; None with leave_one_out.
        validation_time: first time of the validation part; None unless validation is by time.
    """

    item_kept: Array
    kept: Array
    total: Array
    train_end: Array
    test_start: Array
    test_time: int | None = None
    validation_time: int | None = None


def split_log(log: SortedLog, config: PrepareConfig, time_type: str) -> Cuts:
    """The items of the catalog, and the positions at which each user's sequence is cut.

    Args:
        log: the sorted log.
        config: split, validation and filters.
        time_type: "int64" or "timestamp[us]", the type of the log's times.

    Raises:
        ValueError: a cut is not inside the log, or the catalog has fewer than two items.
    """
    if config.split == "leave_one_out":
        return _leave_one_out_cuts(log, _kept_items(log, config, None), config)
    test_time, validation_time = cut_times(log, config, time_type)
    if time_type == "int64" and unix_unit(*log.time_range) is None:
        _warn_of_places(log)
    item_kept = _kept_items(log, config, test_time)
    return _temporal_cuts(log, item_kept, config, test_time, validation_time)


def _warn_of_places(log: SortedLog) -> None:
    """Warn if most users begin at one time: then it counts events of a session and is no clock."""
    firsts = [block.time[np.append(True, np.diff(block.user) != 0)] for block in log.blocks()]
    times, counts = np.unique(np.concatenate(firsts), return_counts=True)
    share = counts.max() / counts.sum()
    if share > MOST_BEGIN_TOGETHER and len(log.user_ids) > 1:
        _LOG.warning(
            "%.0f %% of the users begin at time %d: if times are places in a session they are no "
            "clock, and the test part is the ends of long sessions; use split=leave_one_out",
            100 * share,
            times[counts.argmax()],
        )


def positions(block: UserBlock, cuts: Cuts) -> tuple[Array, Array]:
    """Index of each event of a block in its user's sequence, for kept items and kept users.

    Returns:
        (E,) bool mask of the kept events of the block, and (M,) int64 indices of these events.
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


def cut_times(log: Times, config: PrepareConfig, time_type: str) -> tuple[int, int | None]:
    """First time of the test part, and of the validation part if validation is by time.

    Raises:
        ValueError: a cut is not inside the log.
    """
    first, last = log.time_range
    test = _parse_time("test_time", config.test_time, time_type)
    test = log.time_at(config.test_quantile or 0.9) if test is None else test
    shown = [_shown(time, time_type) for time in (first, last, test)]
    if not first < test <= last:
        raise ValueError(
            f"the test part must start after the first and not after the last time of the log "
            f"({shown[0]} to {shown[1]}), got {shown[2]}; set test_time or test_quantile, or use "
            "split=leave_one_out if the times only give an order"
        )
    if config.validation != "time":
        return test, None
    validation = _parse_time("validation_time", config.validation_time, time_type)
    if validation is None:
        validation = log.time_at(config.validation_quantile or 0.8)
    if not first < validation < test:
        raise ValueError(
            f"the validation part must start after {shown[0]} and before the test part at "
            f"{shown[2]}, got {_shown(validation, time_type)}; set validation_time or "
            "validation_quantile"
        )
    return test, validation


def _shown(time: int, time_type: str) -> str:
    return as_date(time) if time_type == "timestamp[us]" else str(time)


def _parse_time(name: str, time: int | str | None, time_type: str) -> int | None:
    """The time in the log's unit; a number such as 20240131 is a date where the log has dates."""
    if time is None:
        return None
    if isinstance(time, int):
        date = date_of_digits(time) if time_type == "timestamp[us]" else None
        return time if date is None else date
    if time_type != "timestamp[us]":
        raise ValueError(
            f"{name} must be a number because the log's times are, got {time!r}; "
            "give it in the log's unit"
        )
    try:
        return parse_time(time)
    except ValueError as error:
        raise ValueError(
            f"{name} must be ISO text or a number, got {time!r}; write 2024-01-31"
        ) from error


def _kept_items(log: SortedLog, config: PrepareConfig, test_time: int | None) -> Array:
    """(items,) bool, the catalog; filters count events before ``test_time`` or in all."""
    counts = np.zeros(len(log.item_ids), np.int64)
    for block in log.blocks() if config.min_item_events else ():
        items = block.item if test_time is None else block.item[block.time < test_time]
        counts += np.bincount(items, minlength=len(counts))
    kept: Array = counts >= config.min_item_events
    if log.former is not None:
        kept |= log.former >= 0
    require_catalog(int(kept.sum()))
    return kept


def require_catalog(num_items: int) -> None:
    """Raise ValueError if a catalog is too small."""
    if num_items < 2:
        raise ValueError(
            f"the catalog must have at least 2 items, got {num_items}; "
            "check item_column and lower min_item_events"
        )


def is_kept(num_events: Any, config: PrepareConfig) -> Any:
    """Whether users are kept, by their events before the test part (leave_one_out: in all).

    The numbers may be an array, or a column of a table elsewhere; so is the result.
    """
    return num_events >= max(config.min_user_events, 1)


def num_validation_users(config: PrepareConfig, num_eligible: int) -> int:
    """How many of the eligible users are for validation."""
    if config.validation != "users":
        return 0
    tenth = min(-(-num_eligible // 10), 10_000)
    default = num_eligible if config.split == "leave_one_out" else tenth
    return min(config.validation_users or default, num_eligible)


def _temporal_cuts(
    log: SortedLog,
    item_kept: Array,
    config: PrepareConfig,
    test_time: int,
    validation_time: int | None,
) -> Cuts:
    times = [None, test_time] + ([] if validation_time is None else [validation_time])
    total, test_start, *train_ends = _user_events(log, item_kept, times)
    kept = is_kept(test_start, config)
    if train_ends:
        train_end = train_ends[0]
    else:
        eligible = np.flatnonzero(kept & (test_start >= LEAST_TO_HOLD_OUT))
        train_end = test_start.copy()
        train_end[_evenly(eligible, num_validation_users(config, len(eligible)))] -= 1
    return Cuts(
        item_kept=item_kept,
        kept=kept,
        total=total,
        train_end=train_end,
        test_start=test_start,
        test_time=test_time,
        validation_time=validation_time,
    )


def _leave_one_out_cuts(log: SortedLog, item_kept: Array, config: PrepareConfig) -> Cuts:
    """The last event is for the test, the one before for validation; none of a user with < 3."""
    total = _user_events(log, item_kept, [None])[0]
    kept = is_kept(total, config)
    test_start = total - (total >= LEAST_TO_HOLD_OUT)
    train_end = test_start.copy()
    eligible = np.flatnonzero(kept & (total >= LEAST_TO_HOLD_OUT))
    train_end[_evenly(eligible, num_validation_users(config, len(eligible)))] -= 1
    return Cuts(
        item_kept=item_kept, kept=kept, total=total, train_end=train_end, test_start=test_start
    )


def _user_events(log: SortedLog, item_kept: Array, before: list[int | None]) -> list[Array]:
    """For each time, (users,) int64 events of kept items before it; None counts all."""
    results = [np.zeros(len(log.user_ids), np.int64) for _ in before]
    for block in log.blocks():
        kept = item_kept[block.item]
        size = block.stop_user - block.first_user
        for result, time in zip(results, before, strict=True):
            mask = kept if time is None else kept & (block.time < time)
            users = block.user[mask] - block.first_user
            result[block.first_user : block.stop_user] = np.bincount(users, minlength=size)
    return results


def _evenly(chosen_from: Array, count: int) -> Array:
    """``count`` of the values at even distances; all if there are fewer.

    Example:
        >>> _evenly(np.arange(10), 3).tolist()
        [0, 3, 6]
    """
    count = min(count, len(chosen_from))
    return chosen_from[np.arange(count) * len(chosen_from) // max(count, 1)]
