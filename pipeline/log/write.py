"""Writing the prepared Parquet files from the sorted log, one block of users at a time."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from shardrec.pipeline.log.sort import Block, SortedLog
from shardrec.pipeline.log.split import Cuts, positions
from shardrec.pipeline.outputs.files import FileEntry, describe_file
from shardrec.pipeline.prepared.manifest import ITEM_MAP_NAME, ITEMS_NAME

Array = npt.NDArray[Any]
_GROUPS_PER_PART = 256
_ITEM_GROUP_ROWS = 262_144


class RowGroupWriter:
    """Parquet files of row groups with exactly ``group_rows`` rows (the last may have fewer).

    Args:
        folder: where ``pattern`` is relative to.
        pattern: file name; "{part:05d}" in it starts a new file every 256 row groups.
        schema: of the tables.
        group_rows: rows of a row group.
    """

    def __init__(self, folder: Path, pattern: str, schema: pa.Schema, group_rows: int) -> None:
        """Store the arguments; files are opened as rows come."""
        self.folder, self.pattern, self.schema = folder, pattern, schema
        self.group_rows = group_rows
        self.pending = schema.empty_table()
        self.file: pq.ParquetWriter | None = None
        self.rows = self.groups = 0
        self.entries: list[FileEntry] = []

    def write(self, table: pa.Table) -> None:
        """Add rows; whole row groups go to the disk."""
        self.pending = pa.concat_tables([self.pending, table])
        whole = self.pending.num_rows // self.group_rows * self.group_rows
        for start in range(0, whole, self.group_rows):
            self._write_group(self.pending.slice(start, self.group_rows))
        self.pending = self.pending.slice(whole).combine_chunks()

    def close(self) -> list[FileEntry]:
        """Write what is pending (an empty file when there was nothing) and describe the files."""
        if self.pending.num_rows or not (self.entries or self.file):
            self._write_group(self.pending)
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
        self.file.write_table(table, row_group_size=self.group_rows)
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
    """What ``write_sequences`` wrote.

    Attributes:
        files: the entries for the manifest.
        counts: numbers of sequences, users and targets, by the manifest's names.
        lengths: (sequences,) int64, events of each training sequence.
    """

    files: list[FileEntry]
    counts: dict[str, int]
    lengths: Array


def write_items(folder: Path, item_ids: pa.Array, order: Array, counts: Array) -> FileEntry:
    """Write ``items.parquet``: item_id, item and count, in the order of ``item``."""
    table = pa.table(
        {
            "item_id": item_ids.take(pa.array(order)),
            "item": np.arange(len(order), dtype=np.int64),
            "count": counts[order],
        }
    )
    writer = RowGroupWriter(folder, ITEMS_NAME, table.schema, _ITEM_GROUP_ROWS)
    writer.write(table)
    return writer.close()[0]


def write_item_map(folder: Path, former: Array, item_index: Array) -> FileEntry:
    """Write ``item_map.parquet``: former_item and item, in the order of ``former_item``.

    Args:
        folder: where it goes.
        former: (items,) int64, the index an item has had, -1 for a new one.
        item_index: (items,) int64, the index it has now.
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
    *,
    last_target_only: bool,
    group_rows: int,
) -> Written:
    """Write training sequences, validation and test in the order of the sorted log.

    Args:
        folder: where the files go.
        log: the sorted log.
        cuts: who trains on what.
        item_index: (items,) int64, the dense index of each item (any value outside the catalog).
        counts: (items,) int64, training events, to tell new items among the targets.
        last_target_only: keep one target a user, with all before it as history.
        group_rows: sequences in a row group.
    """
    schemas = _schemas(log)
    train = RowGroupWriter(folder, "train/part-{part:05d}.parquet", schemas[0], group_rows)
    validation = RowGroupWriter(folder, "validation.parquet", schemas[1], group_rows)
    test = RowGroupWriter(folder, "test.parquet", schemas[1], group_rows)
    is_new = np.zeros(len(item_index), bool)
    is_new[item_index[cuts.item_kept]] = counts[cuts.item_kept] == 0
    lengths, tallies = [], {"validation": np.zeros(3, np.int64), "test": np.zeros(3, np.int64)}
    for block in log.blocks():
        sequences = _Sequences.of(block, cuts, item_index)
        train.write(_train_table(log, sequences))
        lengths.append(sequences.train_end[sequences.train_end >= 2])
        for name, writer, start, stop in (
            ("validation", validation, sequences.train_end, sequences.test_start),
            ("test", test, sequences.test_start, sequences.total),
        ):
            table = _evaluation_table(log, sequences, start, stop, last_target_only)
            tallies[name] += _tally(table, is_new)
            writer.write(table)
    files = [*train.close(), *validation.close(), *test.close()]
    numbers = {
        f"{name}_{what}": int(value)
        for name, tally in tallies.items()
        for what, value in zip(["users", "targets", "targets_new_items"], tally, strict=True)
    }
    all_lengths = np.concatenate(lengths)
    numbers |= {
        "train_sequences": len(all_lengths),
        "train_sequence_events": int(all_lengths.sum()),
    }
    return Written(files=files, counts=numbers, lengths=all_lengths)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Sequences:
    """The sequences of one block: U users, M events.

    ``user`` (U,) numbers; ``starts`` (U,) first event of each in ``items``; ``total``,
    ``train_end``, ``test_start`` (U,); ``items`` (M,) dense indices; ``weights`` (M,) or None.
    """

    user: Array
    starts: Array
    total: Array
    train_end: Array
    test_start: Array
    items: Array
    weights: Array | None

    @classmethod
    def of(cls, block: Block, cuts: Cuts, item_index: Array) -> "_Sequences":
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


def _schemas(log: SortedLog) -> tuple[pa.Schema, pa.Schema]:
    user = pa.field("user_id", log.user_ids.type, nullable=False)
    items = pa.list_(pa.field("element", pa.int64(), nullable=False))
    weights = pa.list_(pa.field("element", pa.float32(), nullable=False))
    length = pa.field("length", pa.int32(), nullable=False)
    train = [user, pa.field("items", items, nullable=False), length]
    if log.has_weight:
        train.append(pa.field("weights", weights, nullable=False))
    evaluation = [user, train[1], pa.field("targets", items, nullable=False)]
    return pa.schema(train), pa.schema(evaluation)


def _train_table(log: SortedLog, sequences: _Sequences) -> pa.Table:
    schema = _schemas(log)[0]
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
    schema = _schemas(log)[1]
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
    """A list array whose element k is values[starts[k] : starts[k] + lengths[k]]."""
    offsets = np.append(0, np.cumsum(lengths))
    index = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.array(values[index]), type=dtype
    )


def _tally(table: pa.Table, is_new: Array) -> Array:
    """(3,) users, targets, and targets whose item has no training event."""
    targets = table["targets"].combine_chunks().flatten().to_numpy()
    return np.array([table.num_rows, len(targets), int(is_new[targets].sum())])
