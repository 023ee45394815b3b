"""Sorting in bounded memory: a log that does not fit spills to disk, and the result is the same."""

import contextlib
import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.pipeline.event_logs import write_random_log

from shardrec.pipeline.log.columns import EventColumns
from shardrec.pipeline.log.files import ParquetLog
from shardrec.pipeline.log.reader import EventLog
from shardrec.pipeline.log.sort import SortOptions, sort_log
from shardrec.pipeline.prepare import PrepareConfig, prepare

EVENTS = 3_000_000
LIMIT = "32MB"
LIMIT_BYTES = 32_000_000


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A log that no compression brings below the memory limit."""
    path = tmp_path_factory.mktemp("log") / "log.parquet"
    write_random_log(path, EVENTS, time_bits=60)
    assert path.stat().st_size > LIMIT_BYTES
    return str(path)


@contextlib.contextmanager
def largest_size(folder: Path) -> Iterator[Callable[[], int]]:
    """The most bytes that the files of a folder have had since the start of a ``with``."""
    sizes, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            with contextlib.suppress(FileNotFoundError):
                sizes.append(sum(entry.stat().st_size for entry in os.scandir(folder)))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: max(sizes)
    finally:
        over.set()
        thread.join()


@pytest.mark.slow
def test_a_log_beyond_the_memory_limit_spills_and_gives_the_same_files(
    log: str, tmp_path: Path
) -> None:
    manifests, spilled = [], []
    for limit in (LIMIT, "4GB"):
        output = tmp_path / limit
        with largest_size(tmp_path / f".{limit}.partial" / "work" / "spill") as size:
            config = PrepareConfig(
                events=log, output=str(output), memory_limit=limit, threads=1, validation="none"
            )
            manifests.append(prepare(config))
            spilled.append(size())
    assert spilled[0] > LIMIT_BYTES // 4 and spilled[1] == 0
    assert manifests[0].files == manifests[1].files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["32MB", "4GB"]


def test_an_interrupted_query_ends_at_once_as_an_interruption(log: str, tmp_path: Path) -> None:
    columns = EventColumns(user="user_id", item="item_id", time="timestamp")
    options = SortOptions(memory_limit="1GB", threads=1, seed=0, keep_duplicates=False)
    events = EventLog.open(log, columns)
    threading.Thread(target=interrupt_when_read, args=(events,), daemon=True).start()
    started = time.monotonic()
    # Libraries that other tests import have put handlers of their own there.
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            sort_log(events, tmp_path, options)
    finally:
        signal.signal(signal.SIGINT, former)
    assert time.monotonic() - started < 60
    assert not (tmp_path / "events.duckdb").exists()


@pytest.mark.parametrize("text", [False, True], ids=["integers", "text"])
def test_the_orders_of_users_and_items_are_the_same_under_any_release(
    text: bool, tmp_path: Path
) -> None:
    ids = [str(number) if number % 3 else f"é{number}" for number in range(500)]
    values = ids if text else list(range(500))
    table = {"user_id": values, "item_id": values, "timestamp": list(range(500))}
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    columns = EventColumns(user="user_id", item="item_id", time="timestamp")
    options = SortOptions(memory_limit="1GB", threads=1, seed=3, keep_duplicates=False)
    found = sort_log(EventLog.open(str(tmp_path / "log.parquet"), columns), tmp_path, options)

    def digest(value: object) -> bytes:  # read from its last byte
        return hashlib.md5(f"3:{value}".encode()).digest()[::-1]

    assert found.user_ids.to_pylist() == sorted(values, key=digest)
    by_bytes = sorted(values, key=lambda value: str(value).encode() if text else value)
    assert found.item_ids.to_pylist() == by_bytes


def test_a_log_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = range(300)
    table = {"user_id": [k % 9 for k in times], "item_id": [k % 7 for k in times]}
    for part in range(3):
        pq.write_table(pa.table(table | {"timestamp": times}), tmp_path / f"{part}.parquet")
    read: list[str] = []
    batches = ParquetLog.batches

    def counted(file: ParquetLog, names: Sequence[str], rows: int) -> Any:
        read.append(Path(file.source.path).name)
        return batches(file, names, rows)

    monkeypatch.setattr(ParquetLog, "batches", counted)
    prepare(PrepareConfig(events=f"{tmp_path}/*.parquet", output=str(tmp_path / "out")))
    assert read == ["0.parquet", "1.parquet", "2.parquet"]


def interrupt_when_read(log: EventLog) -> None:
    """SIGINT to this process when nothing but queries of about a second is left to do."""
    while log.events_read < EVENTS:
        time.sleep(0.001)
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)
