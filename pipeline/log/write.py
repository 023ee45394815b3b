"""Write the prepared Parquet files from the sorted log, one block of users at a time."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from shardrec.pipeline.log.config import PrepareConfig
from shardrec.pipeline.log.sort import SortedLog, UserBlock
from shardrec.pipeline.log.split import Cuts, positions
from shardrec.pipeline.outputs.files import FileEntry, describe_file
from shardrec.pipeline.prepared.ids import stored, stored_type
from shardrec.pipeline.prepared.manifest import ITEM_MAP_NAME, ITEMS_NAME

Array = npt.NDArray[Any]
_GROUPS_PER_PART = 256
_ITEM_GROUP_ROWS = 262_144


class RowGroupWriter:
    """Writes Parquet files with exactly ``group_rows`` rows per row group (fewer in the last).

    Args:
        folder: the prepared folder.
        pattern: file name in ``folder``; with "{part:05d}" a new file starts every 256 row groups.
        schema: schema of the files; a text column may be large_string in the tables written.
        group_rows: number of rows in a row group.
    """

    def __init__(self, folder: Path, pattern: str, schema: pa.Schema, group_rows: int) -> None:
        """Store the arguments; files are opened with the first rows."""
        self.folder, self.pattern, self.schema = folder, pattern, schema
        self.group_rows = group_rows
        self.pending: pa.Table | None = None
        self.file: pq.ParquetWriter | None = None
        self.rows = self.groups = 0
        self.entries: list[FileEntry] = []

    def write(self, table: pa.Table) -> None:
        """Add rows to the output; row groups are written as they fill up."""
        self.pending = table if self.pending is None else pa.concat_tables([self.pending, table])
        whole = self.pending.num_rows // self.group_rows * self.group_rows
        for start in range(0, whole, self.group_rows):
            self._write_group(self.pending.slice(start, self.group_rows))
        self.pending = self.pending.slice(whole).combine_chunks()

    def close(self) -> list[FileEntry]:
        """Write the last row group (an empty file without rows); return the manifest entries."""
        pending = self.schema.empty_table() if self.pending is None else self.pending
        if pending.num_rows or not (self.entries or self.file):
            self._write_group(pending)
        self._finish_file()
        return self.entries

    def _write_group(self, table: pa.Table) -> None:
        if self.file is None:
            path = self.folder / self._path()
            path.parent.mkdir(exist_ok=True)
            self.file = pq.ParquetWriter(
                path,
                self.schema,
                compression="zstd",
                compression_level=1,
                use_dictionary=False,
                write_page_checksum=True,
            )
        self.file.write_table(stored(table, self.schema), row_group_size=self.group_rows)
        self.rows += table.num_rows
        self.groups += 1 if table.num_rows else 0
        if self.groups == _GROUPS_PER_PART and "{" in self.pattern:
            self._finish_file()

    def _finish_file(self) -> None:
        if self.file is None:
            return
        self.file.close()
        self.entries.append(describe_file(self.folder, self._path(), self.rows, self.groups))
        self.file, self.rows, self.groups = None, 0, 0

    def _path(self) -> str:
        return self.pattern.format(part=len(self.entries))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """The output of ``write_sequences``.

    Attributes:
        files: entries for the manifest.
        counts: numbers of sequences, users and targets, under their names in the manifest.
        lengths: (sequences,) int64 number of events in each training sequence.
    """

    files: list[FileEntry]
    counts: dict[str, int]
    lengths: Array


def write_items(folder: Path, item_ids: pa.Array, counts: Array) -> FileEntry:
    """Write ``items.parquet`` with item_id, item and count, by ascending ``item``."""
    items = np.arange(len(counts), dtype=np.int64)
    table = pa.table({"item_id": item_ids, "item": items, "count": counts})
    schema = table.schema.set(0, pa.field("item_id", stored_type(item_ids.type)))
    writer = RowGroupWriter(folder, ITEMS_NAME, schema, _ITEM_GROUP_ROWS)
    writer.write(table)
    return writer.close()[0]


def write_item_map(folder: Path, former: Array, item_index: Array) -> FileEntry:
    """Write ``item_map.parquet`` with former_item and item, by ascending ``former_item``.

    Args:
        folder: the prepared folder.
        former: (items,) int64 earlier index of each item, -1 for a new one.
        item_index: (items,) int64 index of each item.
    """
    known = np.flatnonzero(former >= 0)
    known = known[np.argsort(former[known])]
    table = pa.table({"former_item": former[known], "item": item_index[known]})
    writer = RowGroupWriter(folder, ITEM_MAP_NAME, table.schema, _ITEM_GROUP_ROWS)
    writer.write(table)
    return writer.close()[0]


def write_sequences(
    folder: Path,
    log: SortedLog,
    cuts: Cuts,
    item_index: Array,
    counts: Array,
    config: PrepareConfig,
) -> Written:
    """Write training sequences, validation and test in the order of the sorted log.

    Args:
        folder: the prepared folder.
        log: the sorted log.
        cuts: cut positions of each user.
        item_index: (items,) int64 dense index of each item; unused for items outside the catalog.
        counts: (items,) int64 training events of each item; targets with 0 are counted as new.
        config: options of ``prepare``; gives the kind of targets and the size of a row group.
    """
    schemas, group_rows = _schemas(log), config.sequences_per_row_group
    train = RowGroupWriter(folder, "train/part-{part:05d}.parquet", schemas[0], group_rows)
    held_out = {
        split: RowGroupWriter(folder, f"{split}.parquet", schemas[1], group_rows)
        for split in ("validation", "test")
    }
    tallies = {split: np.zeros(3, np.int64) for split in held_out}
    is_new = np.zeros(len(item_index), bool)
    is_new[item_index[cuts.item_kept]] = counts[cuts.item_kept] == 0
    lengths = []
    for block in log.blocks():
        sequences = _Sequences.of(block, cuts, item_index)
        train.write(_train_table(log, sequences))
        lengths.append(sequences.train_end[sequences.train_end >= 2])
        bounds = [sequences.train_end, sequences.test_start, sequences.total]
        for (split, writer), start, stop in zip(held_out.items(), bounds, bounds[1:], strict=False):
            table = _evaluation_table(log, sequences, start, stop, config.targets == "last")
            tallies[split] += _tally(table, is_new)
            writer.write(table)
    files = [entry for writer in (train, *held_out.values()) for entry in writer.close()]
    numbers = {
        f"{split}_{counted}": int(value)
        for split, tally in tallies.items()
        for counted, value in zip(["users", "targets", "targets_new_items"], tally, strict=True)
    }
    all_lengths = np.concatenate(lengths)
    numbers |= {
        "train_sequences": len(all_lengths),
        "train_sequence_events": int(all_lengths.sum()),
    }
    return Written(files=files, counts=numbers, lengths=all_lengths)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Sequences:
    """The sequences of one block: U users, M events."""

    user: Array  # (U,) index into SortedLog.user_ids
    starts: Array  # (U,) first event of each user in items
    total: Array  # (U,) as in Cuts
    train_end: Array  # (U,)
    test_start: Array  # (U,)
    items: Array  # (M,) dense indices
    weights: Array | None  # (M,)

    @classmethod
    def of(cls, block: UserBlock, cuts: Cuts, item_index: Array) -> "_Sequences":
        users = np.arange(block.first_user, block.stop_user)
        users = users[cuts.kept[users]]
        mask, _ = positions(block, cuts)
        total = cuts.total[users]
        return cls(
            user=users,
            starts=np.cumsum(total) - total,
            total=total,
            train_end=cuts.train_end[users],
            test_start=cuts.test_start[users],
            items=item_index[block.item[mask]],
            weights=None if block.weight is None else block.weight[mask],
        )


def _schemas(log: SortedLog, user_type: pa.DataType | None = None) -> tuple[pa.Schema, pa.Schema]:
    """Of the training sequences, and of histories with targets; by default as in the files."""
    user = pa.field("user_id", user_type or stored_type(log.user_ids.type), nullable=False)
    items = pa.list_(pa.field("element", pa.int64(), nullable=False))
    weights = pa.list_(pa.field("element", pa.float32(), nullable=False))
    length = pa.field("length", pa.int32(), nullable=False)
    train = [user, pa.field("items", items, nullable=False), length]
    if log.has_weight:
        train.append(pa.field("weights", weights, nullable=False))
    evaluation = [user, train[1], pa.field("targets", items, nullable=False)]
    return pa.schema(train), pa.schema(evaluation)


def _train_table(log: SortedLog, sequences: _Sequences) -> pa.Table:
    schema = _schemas(log, log.user_ids.type)[0]
    rows = np.flatnonzero(sequences.train_end >= 2)
    starts, lengths = sequences.starts[rows], sequences.train_end[rows]
    columns = [
        log.user_ids.take(pa.array(sequences.user[rows])),
        _lists(sequences.items, starts, lengths, schema.field("items").type),
        pa.array(lengths, pa.int32()),
    ]
    if sequences.weights is not None:
        columns.append(_lists(sequences.weights, starts, lengths, schema.field("weights").type))
    return pa.Table.from_arrays(columns, schema=schema)


def _evaluation_table(
    log: SortedLog, sequences: _Sequences, start: Array, stop: Array, last_only: bool
) -> pa.Table:
    schema = _schemas(log, log.user_ids.type)[1]
    first = np.maximum(start, stop - 1) if last_only else start
    rows = np.flatnonzero((stop > start) & (first >= 1))
    begin, first = sequences.starts[rows], first[rows]
    columns = [
        log.user_ids.take(pa.array(sequences.user[rows])),
        _lists(sequences.items, begin, first, schema.field("items").type),
        _lists(sequences.items, begin + first, stop[rows] - first, schema.field("targets").type),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _lists(values: Array, starts: Array, lengths: Array, dtype: pa.DataType) -> pa.Array:
    """A list array with element k = values[starts[k] : starts[k] + lengths[k]]."""
    offsets = np.append(0, np.cumsum(lengths))
    index = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.array(values[index]), type=dtype
    )


def _tally(table: pa.Table, is_new: Array) -> Array:
    """(3,) numbers of users, targets, and targets without training events."""
    targets = table["targets"].combine_chunks().flatten().to_numpy()
    return np.array([table.num_rows, len(targets), int(is_new[targets].sum())])
