"""Sort the whole log by (user, time, file, row) into plain columns on disk, in bounded memory.

The phases; DuckDB does 1 to 3 and spills to disk at its memory limit:
1. `_ingest` copies the checked events into a table.
2. `_number` numbers the users in a seeded hash order, which becomes the order of the sequences, and
   the items by id.
3. `_write_columns` joins the numbers to the events and streams them in sorted order.
4. The stream is cut where user or time changes (`tie_aligned`), exact duplicates are dropped in
   each tie, repeats if asked, and each column is appended to a file of its own.
Events of one user at one time keep the order of the log (files in natural order, then rows), or are
ordered by a hash of user, item, time and seed, which does not depend on the order of the log.
"""

import contextlib
import dataclasses
import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shardrec.pipeline.log.item_indices import FormerItems
from shardrec.pipeline.log.reader import EventLog
from shardrec.pipeline.log.repetition import Repetition, Repetitions, tie_aligned
from shardrec.pipeline.prepared.ids import short_message

Array = npt.NDArray[Any]
_BLOCK_EVENTS = 1 << 20
_ARROW_ROWS = 131_072
TIME_CELLS = 65_536
_DISK_IS_FULL = ("No space left on device", "Disk quota exceeded", "max_temp_directory_size")
_INTERRUPT_EVERY_S = 0.1
_SQL_TYPES = {"int64": "BIGINT", "string": "VARCHAR"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SortOptions:
    """How to sort: limits of DuckDB, seed of the users' order, and treatment of repetitions."""

    memory_limit: str
    threads: int
    seed: int
    keep_duplicates: bool
    drop_repeats: bool = False
    shuffle_ties: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class UserBlock:
    """All events of users ``first_user .. stop_user - 1``."""

    first_user: int
    stop_user: int
    user: Array  # (E,) int64, ascending
    item: Array  # (E,) int64, index into SortedLog.item_ids
    time: Array  # (E,) int64, ascending inside a user
    weight: Array | None  # (E,) float32


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SortedLog:
    """A log sorted by user and time, as column files on disk, with its user and item ids.

    Attributes:
        folder: holds one file per column.
        user_ids: (users,) ids in the seeded hash order; columns hold indices into it.
        item_ids: (items,) ids of the items of the log and of the earlier folder, ascending.
        former: (items,) int64 earlier index of each item, -1 for a new one; None without former
            items.
        user_events: (users,) int64 events of each user.
        repetition: numbers of tied, repeated and duplicate events.
        has_weight: whether the events have weights.
        time_range: first and last time, as int64 of the log's time type.
    """

    folder: Path
    user_ids: pa.Array
    item_ids: pa.Array
    former: Array | None
    user_events: Array
    repetition: Repetition
    has_weight: bool
    time_range: tuple[int, int]

    @property
    def num_events(self) -> int:
        """Number of events that were kept."""
        return int(self.user_events.sum())

    def blocks(self) -> Iterator[UserBlock]:
        """Blocks of whole users in order, about a million events each (more if one user has)."""
        ends = np.cumsum(self.user_events)
        starts = ends - self.user_events
        cuts = np.flatnonzero(np.diff(starts // _BLOCK_EVENTS)) + 1
        bounds = [0, *cuts.tolist(), len(starts)]
        for first, stop in zip(bounds[:-1], bounds[1:], strict=True):
            count = int(ends[stop - 1] - starts[first])
            yield self._block(first, stop, int(starts[first]), count)

    def _block(self, first: int, stop: int, start: int, count: int) -> UserBlock:
        return UserBlock(
            first_user=first,
            stop_user=stop,
            user=np.repeat(np.arange(first, stop), self.user_events[first:stop]),
            item=self._read("item", np.int64, start, count),
            time=self._read("time", np.int64, start, count),
            weight=self._read("weight", np.float32, start, count) if self.has_weight else None,
        )

    def _read(self, name: str, dtype: Any, start: int, count: int) -> Array:
        offset = start * np.dtype(dtype).itemsize
        return np.fromfile(self.folder / name, dtype=dtype, count=count, offset=offset)

    def time_at(self, share: float) -> int:
        """The time of event floor(share * num_events), from 0, in global time order."""
        return time_of_share(share, self.num_events, self.time_range, self._count_times)

    def _count_times(self, low: int, high: int, width: int) -> tuple[int, Array]:
        counts, below = np.zeros(TIME_CELLS, np.int64), 0
        for times in self._time_parts():
            inside = times[(times >= low) & (times <= high)]
            below += int((times < low).sum())
            # Two times may lie 2**64 apart, so their distance is unsigned and wraps.
            distances = inside.view(np.uint64) - np.uint64(low % 2**64)
            cells = (distances // np.uint64(width)).astype(np.int64)
            counts += np.bincount(cells, minlength=TIME_CELLS)
        return below, counts

    def _time_parts(self) -> Iterator[Array]:
        for start in range(0, self.num_events, _BLOCK_EVENTS):
            yield self._read("time", np.int64, start, _BLOCK_EVENTS)


def time_of_share(
    share: float,
    num_events: int,
    time_range: tuple[int, int],
    count: Callable[[int, int, int], tuple[int, Array]],
) -> int:
    """The time of event floor(share * events) in global time order.

    Counts times in cells and repeats inside the cell of the wanted event until one time is left: a
    few passes over the times, and no sort.

    Args:
        share: of the events before it.
        num_events: number of events.
        time_range: the first and the last time.
        count: for low, high and a width: the number of times below ``low``, and (TIME_CELLS,) int64
            numbers of times from ``low`` to ``high`` in cells of ``width``.
    """
    rank = min(int(share * num_events), num_events - 1)
    low, high = time_range
    while low < high:
        width = -(-(high - low + 1) // TIME_CELLS)
        below, counts = count(low, high, width)
        cell = int(np.searchsorted(np.cumsum(counts), rank - below, side="right"))
        low, high = low + cell * width, min(high, low + (cell + 1) * width - 1)
    return low


def sort_log(
    log: EventLog, folder: Path, options: SortOptions, former: FormerItems | None = None
) -> SortedLog:
    """Read ``log`` once and write its events, sorted by user and time, to ``folder``.

    Args:
        log: the events.
        folder: an empty folder on a local disk, for the columns and DuckDB's temporary files.
        options: limits, seed and repetitions.
        former: items of an earlier folder; they enter ``item_ids`` even if the log lacks them.

    Raises:
        ValueError: a value of the log is invalid, no event is left, or ``former`` repeats an id.
        MemoryError: ``memory_limit`` is too low.
        OSError: the disk is full.
    """
    with _database(folder, options) as database:
        return _until_interrupted(database, lambda: _sort(database, log, folder, options, former))


def _until_interrupted(
    database: duckdb.DuckDBPyConnection, work: Callable[[], SortedLog]
) -> SortedLog:
    """The result of ``work``; an exception from a signal in this thread stops its queries at once.

    DuckDB does not notice a signal during a query, or swallows the exception of its handler, so
    the queries run in another thread.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        done = pool.submit(work)
        try:
            return done.result()
        finally:
            while not done.done():
                database.interrupt()
                wait([done], timeout=_INTERRUPT_EVERY_S)
            # The future's exception refers to this frame and so to the future: a cycle that would
            # keep the database open, and the next connection to that file waiting.
            del done


def _sort(
    database: duckdb.DuckDBPyConnection,
    log: EventLog,
    folder: Path,
    options: SortOptions,
    former: FormerItems | None,
) -> SortedLog:
    _ingest(database, log)
    row = database.execute("SELECT count(*) FROM events").fetchone()
    require_events(row[0] if row else 0, log)
    seeded = f"md5_number(concat('{options.seed}:', id)), id"
    user_ids = _number(database, "user", seeded)
    item_ids, former_index = _number_items(database, former)
    columns = _write_columns(database, folder, len(user_ids), options, log)
    return SortedLog(
        folder=folder,
        user_ids=user_ids,
        item_ids=item_ids,
        former=former_index,
        user_events=columns.user_events,
        repetition=columns.repetition,
        has_weight=log.columns.has_weights,
        time_range=columns.time_range,
    )


@contextlib.contextmanager
def _database(folder: Path, options: SortOptions) -> Iterator[duckdb.DuckDBPyConnection]:
    path = folder / "events.duckdb"
    if set(os.path.realpath(path)) & set("?\\"):  # it puts ".wal" before ?, and takes \ for a slash
        found = os.path.realpath(folder.parent)
        raise ValueError(f"output must be in a folder without ? and \\, got {found!r}; move it")
    settings = {
        "memory_limit": options.memory_limit,
        "threads": options.threads,
        "temp_directory": str(folder / "spill"),
        "preserve_insertion_order": False,
        "arrow_large_buffer_size": True,  # text columns may be larger than 2 GiB
    }
    try:
        database = duckdb.connect(str(path), config=settings)
        try:
            yield database
        finally:
            database.close()
            path.unlink(missing_ok=True)
    except duckdb.Error as error:
        explained = _explained(error, options)
        if explained is None:
            raise
        raise explained from error


def _explained(error: duckdb.Error, options: SortOptions) -> Exception | None:
    """The exception to raise instead; DuckDB reports a full disk by several kinds of error."""
    text = str(error)
    if any(sign in text for sign in _DISK_IS_FULL):
        return OSError(errno.ENOSPC, short_message(error))
    if isinstance(error, duckdb.IOException):
        return OSError(
            f"the folder of the output must be on a disk that works, got {short_message(error)}; "
            "choose another folder"
        )
    if isinstance(error, duckdb.OutOfMemoryException):
        return MemoryError(
            f"memory_limit must be large enough to sort the log, got {options.memory_limit!r} "
            f"({short_message(error)}); raise it, or lower threads"
        )
    return None


def _ingest(database: duckdb.DuckDBPyConnection, log: EventLog) -> None:
    user, item = _SQL_TYPES[log.user_type], _SQL_TYPES[log.item_type]
    weight = ", weight FLOAT" if log.columns.has_weights else ""
    database.execute(
        f"CREATE TABLE events (user_id {user}, item_id {item}, time BIGINT, row BIGINT, "
        f"event INTEGER{weight})"
    )
    # One commit per part: a single transaction used 2.1 GiB for 20 million events, this 0.7 GiB.
    for table in log.tables():
        database.register("part", table.combine_chunks())
        database.execute("INSERT INTO events SELECT * FROM part")
        database.unregister("part")


def require_events(num_events: int, log: EventLog) -> None:
    """Raise ValueError if no event of the log was selected; it must have been read."""
    if num_events:
        return
    if log.events_read:
        raise ValueError(
            f"event_types must select at least one event, got {list(log.columns.event_types)} "
            f"where the log has {log.describe_event_types()}; fix the names"
        )
    raise ValueError("the event log must hold at least one event, got none; check the path")


def _number_items(
    database: duckdb.DuckDBPyConnection, former: FormerItems | None
) -> tuple[pa.Array, Array | None]:
    """Number the items of the log and the former ones; their ids and earlier indices."""
    if former is None:
        return _number(database, "item", "id"), None
    _ingest_former(database, former)
    ids = _number(database, "item", "id", "UNION SELECT id FROM former_items")
    found = database.sql(
        "SELECT coalesce(f.item, -1) FROM item_numbers n LEFT JOIN former_items f USING (id) "
        "ORDER BY n.number"
    ).to_arrow_table()
    return ids, found.column(0).to_numpy()


def _ingest_former(database: duckdb.DuckDBPyConnection, former: FormerItems) -> None:
    database.execute(f"CREATE TABLE former_items (id {_SQL_TYPES[former.kind]}, item BIGINT)")
    for table in former.tables():
        database.register("part", table)
        database.execute("INSERT INTO former_items SELECT item_id, item FROM part")
        database.unregister("part")
    former.require_once(
        database.execute(
            "SELECT id FROM former_items GROUP BY id HAVING count(*) > 1 LIMIT 1"
        ).fetchone()
    )


def _number(database: duckdb.DuckDBPyConnection, kind: str, order: str, more: str = "") -> pa.Array:
    """Number the ids of ``kind`` by ``order`` in a table ``<kind>_numbers``; return the ids."""
    database.execute(
        f"CREATE TABLE {kind}_numbers AS "
        f"SELECT id, (row_number() OVER (ORDER BY {order}) - 1)::BIGINT AS number "
        f"FROM (SELECT DISTINCT {kind}_id AS id FROM events {more})"
    )
    ids = database.sql(f"SELECT id FROM {kind}_numbers ORDER BY number").to_arrow_table()
    return ids.column(0).combine_chunks()


@dataclasses.dataclass(slots=True)
class _Columns:
    """Totals over the columns written so far."""

    user_events: Array
    repetition: Repetition = dataclasses.field(default_factory=Repetition)
    time_range: tuple[int, int] = (2**63 - 1, -(2**63))

    def add(self, user: Array, time: Array) -> None:
        first, last = int(user[0]), int(user[-1])
        self.user_events[first : last + 1] += np.bincount(user - first)
        low, high = self.time_range
        self.time_range = min(low, int(time.min())), max(high, int(time.max()))


def _write_columns(
    database: duckdb.DuckDBPyConnection,
    folder: Path,
    num_users: int,
    options: SortOptions,
    log: EventLog,
) -> _Columns:
    weight = ", e.weight" if log.columns.has_weights else ""
    ties = "e.row"
    if options.shuffle_ties:
        ties = f"md5_number(concat_ws(':', '{options.seed}', u.id, i.id, e.time)), e.event, e.row"
    events = database.sql(
        f"SELECT u.number, i.number, e.time, e.event{weight} FROM events e "
        "JOIN user_numbers u ON e.user_id = u.id JOIN item_numbers i ON e.item_id = i.id "
        f"ORDER BY u.number, e.time, {ties}"
    ).to_arrow_reader(_ARROW_ROWS)
    written = _Columns(np.zeros(num_users, np.int64))
    repetitions = Repetitions(options.keep_duplicates, options.drop_repeats)
    names = ["item", "time"] + (["weight"] if weight else [])
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "wb")) for name in names}
        for columns in tie_aligned(events):
            kept = repetitions.reduce(columns)
            if not len(kept[0]):
                continue
            written.add(kept[0], kept[2])
            parts = dict(zip(["user", "item", "time", "event", "weight"], kept, strict=False))
            for name, file in files.items():
                file.write(parts[name].data)  # unlike tofile, raises the OSError of the system
    written.repetition = repetitions.total
    return written
