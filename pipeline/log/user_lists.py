"""Turn an event log into a Parquet file with the history of each user as a list."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shardrec.pipeline.log.columns import EventColumns
from shardrec.pipeline.log.config import sort_threads
from shardrec.pipeline.log.reader import EventLog
from shardrec.pipeline.log.sort import SortOptions, sort_log

__all__ = ["UserLists"]

_MEMORY = "512MB"


@dataclasses.dataclass(frozen=True, slots=True)
class UserLists:
    """An event log that is to be read as one list of items per user."""

    log: EventLog

    @classmethod
    def open(cls, events: str, user: str, item: str, time: str) -> "UserLists":
        """Find the files and check their columns, with the errors of ``prepare``."""
        return cls(EventLog.open(events, EventColumns(user=user, item=item, time=time)))

    @property
    def files(self) -> list[dict[str, Any]]:
        """Path, size, number of rows and digest of each file, as JSON."""
        return [dataclasses.asdict(file) for file in self.log.files]

    def write(self, folder: Path) -> Path:
        """Write ``histories.parquet`` with user_id and items, oldest first; returns its path.

        The log is sorted in bounded memory. Events that are equal in all of these columns count
        once, as in ``prepare``; the order of the users is arbitrary.

        Raises:
            ValueError: a file cannot be decoded.
            OSError: the disk is full.
        """
        work, path = folder / "sorted", folder / "histories.parquet"
        work.mkdir()
        how = SortOptions(
            memory_limit=_MEMORY, threads=sort_threads(None), seed=1, keep_duplicates=False
        )
        found = sort_log(self.log, work, how, None)
        items = pa.large_list(found.item_ids.type)
        schema = pa.schema([("user_id", found.user_ids.type), ("items", items)])
        with pq.ParquetWriter(path, schema) as writer:
            for block in found.blocks():
                counts = found.user_events[block.first_user : block.stop_user]
                lists = pa.LargeListArray.from_arrays(
                    pa.array(np.append(0, np.cumsum(counts)), pa.int64()),
                    found.item_ids.take(pa.array(block.item)),
                )
                users = found.user_ids.slice(block.first_user, len(counts))
                writer.write_table(pa.table([users, lists], schema=schema))
        return path
