"""Write the files of a prepared folder on Spark: each by one task, and byte for byte as DuckDB's.

A task writes its file on the executor's own disk and copies it into the folder under another name,
which it then renames: a task that runs twice leaves one whole file.
"""

import dataclasses
import functools
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from shardrec.pipeline.log.config import PrepareConfig
from shardrec.pipeline.log.write import (
    GROUPS_PER_PART,
    HELD_OUT,
    TRAIN_FILES,
    RowGroupWriter,
    Sequences,
    held_out_schema,
    item_map_writer,
    items_writer,
    train_schema,
)
from shardrec.pipeline.outputs.files import FileEntry
from shardrec.pipeline.prepared.manifest import ITEM_MAP_NAME, ITEMS_NAME
from shardrec.pipeline.spark.catalog import Catalog
from shardrec.pipeline.spark.sort import SparkLog
from shardrec.pipeline.spark.split import Split
from shardrec.pipeline.spark.workspace import (
    Batches,
    Tallies,
    Workspace,
    guarded,
)

__all__ = ["write_item_map", "write_items", "write_sequences"]

Array = npt.NDArray[np.int64]
_ENTRY = "path string, bytes bigint, sha256 string, rows bigint, row_groups bigint"
_ID_TYPES = {"bigint": pa.int64(), "string": pa.string()}
_USER = -1
_NUMBERS = ("users", "targets", "targets_new_items")

MakeWriter = Callable[[Path, str], RowGroupWriter]


def write_items(folder: Path, catalog: Catalog) -> FileEntry:
    """Write ``items.parquet``; by one task, in the order of the index."""
    table = catalog.items.select("item_id", F.col("index").alias("item"), "count")
    ids = _ID_TYPES[dict(table.dtypes)["item_id"]]
    return _write_one(folder, table, ITEMS_NAME, "item", lambda place, _: items_writer(place, ids))


def write_item_map(folder: Path, catalog: Catalog) -> FileEntry:
    """Write ``item_map.parquet``; by one task, in the order of the former index."""
    former = catalog.items.filter("former >= 0")
    table = former.select(F.col("former").alias("former_item"), F.col("index").alias("item"))
    make = lambda place, _: item_map_writer(place)  # noqa: E731
    return _write_one(folder, table, ITEM_MAP_NAME, "former_item", make)


def write_sequences(
    workspace: Workspace,
    folder: Path,
    log: SparkLog,
    split: Split,
    catalog: Catalog,
    config: PrepareConfig,
) -> tuple[list[FileEntry], dict[str, int]]:
    """Write training sequences, validation and test; their entries, and numbers of targets."""
    has_weight = "weight" in split.events.columns
    user_type = dict(log.users.dtypes)["user_id"]
    found = Tallies(workspace)
    schema = (
        f"file string, user bigint, user_id {user_type}, items array<bigint>, length int, "
        f"targets array<bigint>{', weights array<float>' if has_weight else ''}"
    )
    rows = _ordered(log, split, catalog).mapInArrow(guarded(_sequences(config, found)), schema)
    num_files = -(-split.num_train // _rows_of_file(config)) + len(HELD_OUT)
    files = rows.repartition(num_files, "file").sortWithinPartitions("file", "user")
    make = functools.partial(
        _sequence_writer, _ID_TYPES[user_type], has_weight, config.sequences_per_row_group
    )
    written = {entry.path: entry for entry in _write(folder, files, make)}
    for name in (f"{held_out}.parquet" for held_out in HELD_OUT):
        if name not in written:  # no user has targets there
            written[name] = make(folder, name).close()[0]
    entries = [written.pop(f"{held_out}.parquet") for held_out in HELD_OUT]
    tallies = sum(found.by_task().values(), np.zeros((len(HELD_OUT), len(_NUMBERS)), np.int64))
    numbers = {
        f"{held_out}_{counted}": int(value)
        for held_out, tally in zip(HELD_OUT, tallies, strict=True)
        for counted, value in zip(_NUMBERS, tally, strict=True)
    }
    return [*(written[name] for name in sorted(written)), *entries], numbers


def _rows_of_file(config: PrepareConfig) -> int:
    return config.sequences_per_row_group * GROUPS_PER_PART


def _ordered(log: SparkLog, split: Split, catalog: Catalog) -> DataFrame:
    """Each kept user's id and cuts in a row of position -1, then the user's events in order.

    One shuffle and one sort; a join of the users would be another of each.
    """
    items = catalog.items.select("item", "index", (F.col("count") == 0).alias("is_new"))
    events = split.events.join(items, "item").drop("item")
    users = split.users.join(log.users, "user").withColumn("position", F.lit(_USER).cast("bigint"))
    rows = users.unionByName(events, allowMissingColumns=True)
    return rows.repartition("user").sortWithinPartitions("user", "position")


def _sequences(
    config: PrepareConfig, found: Tallies
) -> Callable[[Batches], Iterator[pa.RecordBatch]]:
    """Turns ordered events into the rows of the files, each with the name of its file."""
    last_only, rows_of_file = config.targets == "last", _rows_of_file(config)

    def build(batches: Batches) -> Iterator[pa.RecordBatch]:
        tally = np.zeros((len(HELD_OUT), len(_NUMBERS)), np.int64)
        for of_users, events in map(_kept, _whole_users(batches)):
            if not of_users.num_rows:
                continue
            user = of_users["user"].to_numpy()
            sequences = _sequences_of(events, of_users)
            rows, table = sequences.train()
            parts = of_users["train_row"].take(rows).to_numpy() // rows_of_file
            names = [TRAIN_FILES.format(part=int(part)) for part in parts]
            yield from _with_names(table, names, user[rows], sequences)
            news = dataclasses.replace(
                sequences, items=events["is_new"].cast(pa.int64()).to_numpy()
            )
            for index, split in enumerate(HELD_OUT):
                rows, table = sequences.held_out(split, last_only)
                names = [f"{split}.parquet"] * len(rows)
                yield from _with_names(table, names, user[rows], sequences)
                new = news.held_out(split, last_only)[1]["targets"]
                targets = pc.list_flatten(new).to_numpy()
                tally[index] += [len(rows), len(targets), int(targets.sum())]
        found.add(tally)

    return build


def _whole_users(batches: Batches) -> Iterator[pa.Table]:
    """Tables of whole users, of batches in the order of users."""
    rest: list[pa.RecordBatch] = []
    for batch in batches:
        if not batch.num_rows:
            continue
        user = batch.column("user").to_numpy()
        cut = int(np.searchsorted(user, user[-1]))
        if rest and rest[-1].column("user")[0].as_py() != user[-1]:
            yield pa.Table.from_batches([*rest, batch.slice(0, cut)])
            rest = []
        elif cut:
            yield pa.Table.from_batches([batch.slice(0, cut)])
        rest.append(batch.slice(cut))
    if rest:
        yield pa.Table.from_batches(rest)


def _kept(rows: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The rows of kept users, and those of their events; see ``_ordered``."""
    user = rows["user"].to_numpy()
    is_user = rows["position"].to_numpy() == _USER
    first = np.flatnonzero(np.append(True, user[1:] != user[:-1]))
    kept = np.repeat(is_user[first], np.diff(np.append(first, len(user))))
    return rows.filter(pa.array(is_user)), rows.filter(pa.array(kept & ~is_user))


def _sequences_of(events: pa.Table, users: pa.Table) -> Sequences:
    has_weight = "weight" in events.column_names
    return Sequences(
        user_ids=users["user_id"].combine_chunks(),
        total=users["total"].to_numpy(),
        train_end=users["train_end"].to_numpy(),
        test_start=users["test_start"].to_numpy(),
        items=events["index"].to_numpy(),
        weights=events["weight"].to_numpy() if has_weight else None,
    )


def _with_names(
    table: pa.Table, names: list[str], users: Array, sequences: Sequences
) -> Iterator[pa.RecordBatch]:
    """All columns of the rows; those that their file does not have are empty."""
    count = table.num_rows
    integers, weights = pa.list_(pa.int64()), pa.list_(pa.float32())
    columns = {name: table[name] for name in table.column_names}
    columns |= {"file": pa.array(names, pa.string()), "user": pa.array(users)}
    columns.setdefault("length", pa.array(np.zeros(count, np.int32)))
    columns.setdefault("targets", pa.array([[]] * count, integers))
    fields = {"file": pa.string(), "user": pa.int64(), "user_id": table["user_id"].type}
    fields |= {"items": integers, "length": pa.int32(), "targets": integers}
    if sequences.weights is not None:
        columns.setdefault("weights", pa.array([[]] * count, weights))
        fields["weights"] = weights
    # Spark takes rows of one schema only, down to what may be null.
    rows = pa.table({name: columns[name] for name in fields}).cast(pa.schema(fields))
    yield from rows.combine_chunks().to_batches()


def _sequence_writer(
    user: pa.DataType, has_weight: bool, group_rows: int, folder: Path, name: str
) -> RowGroupWriter:
    held_out = name in [f"{split}.parquet" for split in HELD_OUT]
    schema = held_out_schema(user) if held_out else train_schema(user, has_weight)
    return RowGroupWriter(folder, name, schema, group_rows)


def _write_one(
    folder: Path, table: DataFrame, name: str, order: str, make: MakeWriter
) -> FileEntry:
    rows = table.withColumn("file", F.lit(name)).repartition(1).sortWithinPartitions(order)
    (entry,) = _write(folder, rows, make)
    return entry


def _write(folder: Path, rows: DataFrame, make: MakeWriter) -> list[FileEntry]:
    """Write the files that the column ``file`` names; the rows of each are together, in order."""

    def write(batches: Batches) -> Iterator[pa.RecordBatch]:
        for name, tables in _files(batches):
            with tempfile.TemporaryDirectory(prefix="shardrec-") as own:
                writer = make(Path(own), name)
                for table in tables:
                    writer.write(table.select(writer.schema.names))
                (entry,) = writer.close()
                _deliver(Path(own) / name, folder / name)
            values = dataclasses.asdict(entry)
            yield pa.RecordBatch.from_pydict({key: [value] for key, value in values.items()})

    found = rows.mapInArrow(guarded(write), _ENTRY).collect()
    return [FileEntry(**row.asDict()) for row in found]


def _files(batches: Batches) -> Iterator[tuple[str, Iterator[pa.Table]]]:
    """Each file's name and its tables, which must be taken before the next file."""
    pieces = _pieces(batches)
    following = next(pieces, None)
    while following is not None:
        name = following[0]

        def tables() -> Iterator[pa.Table]:
            nonlocal following
            while following is not None and following[0] == name:  # noqa: B023
                yield following[1]
                following = next(pieces, None)

        yield name, tables()


def _pieces(batches: Batches) -> Iterator[tuple[str, pa.Table]]:
    for batch in batches:
        ends = pc.run_end_encode(batch.column("file"))
        start = 0
        for end, name in zip(ends.run_ends.to_pylist(), ends.values.to_pylist(), strict=True):
            yield name, pa.Table.from_batches([batch.slice(start, end - start)])
            start = end


def _deliver(own: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    arriving = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        shutil.copyfile(own, arriving)
        os.replace(arriving, target)
    finally:
        arriving.unlink(missing_ok=True)
