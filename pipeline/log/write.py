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
GROUPS_PER_PART = 256
_ITEM_GROUP_ROWS = 262_144
HELD_OUT = ("validation", "test")
TRAIN_FILES = "train/part-{part:05d}.parquet"
LEAST_TO_TRAIN = 2


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
        # In one chunk, so that pages end at the same rows however the rows came here.
        whole = stored(table.combine_chunks(), self.schema)
        self.file.write_table(whole, row_group_size=self.group_rows)
        self.rows += table.num_rows
        self.groups += 1 if table.num_rows else 0
        if self.groups == GROUPS_PER_PART and "{" in self.pattern:
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
    writer = items_writer(folder, item_ids.type)
    writer.write(pa.table({"item_id": item_ids, "item": items, "count": counts}))
    return writer.close()[0]


def items_writer(folder: Path, ids: pa.DataType) -> RowGroupWriter:
    """The writer of ``items.parquet``: item_id, item and count, in the order of ``item``."""
    fields = {"item_id": stored_type(ids), "item": pa.int64(), "count": pa.int64()}
    return RowGroupWriter(folder, ITEMS_NAME, pa.schema(fields), _ITEM_GROUP_ROWS)


def item_map_writer(folder: Path) -> RowGroupWriter:
    """The writer of ``item_map.parquet``: former_item and item, in the order of the first."""
    schema = pa.schema({"former_item": pa.int64(), "item": pa.int64()})
    return RowGroupWriter(folder, ITEM_MAP_NAME, schema, _ITEM_GROUP_ROWS)


def write_item_map(folder: Path, former: Array, item_index: Array) -> FileEntry:
    """Write ``item_map.parquet`` with former_item and item, by ascending ``former_item``.

    Args:
        folder: the prepared folder.
        former: (items,) int64 earlier index of each item, -1 for a new one.
        item_index: (items,) int64 index of each item.
    """
    known = np.flatnonzero(former >= 0)
    known = known[np.argsort(former[known])]
    writer = item_map_writer(folder)
    writer.write(pa.table({"former_item": former[known], "item": item_index[known]}))
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
    user, group_rows = stored_type(log.user_ids.type), config.sequences_per_row_group
    schema = train_schema(user, log.has_weight)
    train = RowGroupWriter(folder, TRAIN_FILES, schema, group_rows)
    held_out = {
        split: RowGroupWriter(folder, f"{split}.parquet", held_out_schema(user), group_rows)
        for split in HELD_OUT
    }
    tallies = {split: np.zeros(3, np.int64) for split in held_out}
    is_new = np.zeros(len(item_index), bool)
    is_new[item_index[cuts.item_kept]] = counts[cuts.item_kept] == 0
    lengths = []
    for block in log.blocks():
        sequences = _sequences(log, block, cuts, item_index)
        rows, table = sequences.train()
        train.write(table)
        lengths.append(sequences.train_end[rows])
        for split, file in held_out.items():
            _, table = sequences.held_out(split, config.targets == "last")
            tallies[split] += _tally(table, is_new)
            file.write(table)
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


def _sequences(log: SortedLog, block: UserBlock, cuts: Cuts, item_index: Array) -> "Sequences":
    users = np.arange(block.first_user, block.stop_user)
    users = users[cuts.kept[users]]
    mask, _ = positions(block, cuts)
    return Sequences(
        user_ids=log.user_ids.take(pa.array(users)),
        total=cuts.total[users],
        train_end=cuts.train_end[users],
        test_start=cuts.test_start[users],
        items=item_index[block.item[mask]],
        weights=None if block.weight is None else block.weight[mask],
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sequences:
    """The sequences of some users: U users, M events."""

    user_ids: pa.Array  # (U,)
    total: Array  # (U,) as in Cuts
    train_end: Array  # (U,)
    test_start: Array  # (U,)
    items: Array  # (M,) dense indices
    weights: Array | None  # (M,)

    @property
    def starts(self) -> Array:
        """(U,) first event of each user."""
        starts: Array = np.cumsum(self.total) - self.total
        return starts

    def train(self) -> tuple[Array, pa.Table]:
        """The users whose events train, and the rows of the training files for them."""
        rows = np.flatnonzero(self.train_end >= LEAST_TO_TRAIN)
        starts, lengths = self.starts[rows], self.train_end[rows]
        schema = train_schema(self.user_ids.type, self.weights is not None)
        columns = [
            self.user_ids.take(pa.array(rows)),
            _lists(self.items, starts, lengths, schema.field("items").type),
            pa.array(lengths, pa.int32()),
        ]
        if self.weights is not None:
            columns.append(_lists(self.weights, starts, lengths, schema.field("weights").type))
        return rows, pa.Table.from_arrays(columns, schema=schema)

    def held_out(self, split: str, last_only: bool) -> tuple[Array, pa.Table]:
        """The users who have targets in a split, and the rows of its file for them."""
        bounds = [self.train_end, self.test_start, self.total]
        start, stop = bounds[HELD_OUT.index(split) :][:2]
        first = np.maximum(start, stop - 1) if last_only else start
        rows = np.flatnonzero((stop > start) & (first >= 1))
        begin, first = self.starts[rows], first[rows]
        schema = held_out_schema(self.user_ids.type)
        columns = [
            self.user_ids.take(pa.array(rows)),
            _lists(self.items, begin, first, schema.field("items").type),
            _lists(self.items, begin + first, stop[rows] - first, schema.field("targets").type),
        ]
        return rows, pa.Table.from_arrays(columns, schema=schema)


_ITEMS = pa.list_(pa.field("element", pa.int64(), nullable=False))
_WEIGHTS = pa.list_(pa.field("element", pa.float32(), nullable=False))


def train_schema(user: pa.DataType, has_weight: bool) -> pa.Schema:
    """Of training sequences."""
    weights = [pa.field("weights", _WEIGHTS, nullable=False)] if has_weight else []
    return pa.schema(
        [
            pa.field("user_id", user, nullable=False),
            pa.field("items", _ITEMS, nullable=False),
            pa.field("length", pa.int32(), nullable=False),
            *weights,
        ]
    )


def held_out_schema(user: pa.DataType) -> pa.Schema:
    """Of histories with targets."""
    return pa.schema(
        [
            pa.field("user_id", user, nullable=False),
            pa.field("items", _ITEMS, nullable=False),
            pa.field("targets", _ITEMS, nullable=False),
        ]
    )


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
