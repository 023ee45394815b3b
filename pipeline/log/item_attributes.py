"""Join files of item attributes with the catalog, and write the attributes in item order."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shardrec.pipeline.log.attributes import AttributeChoice, AttributeFile, fit_column
from shardrec.pipeline.log.config import PrepareConfig
from shardrec.pipeline.outputs.files import (
    MANIFEST_NAME,
    FileEntry,
    describe_file,
    describe_parquet,
)
from shardrec.pipeline.prepared.attributes import (
    ATTRIBUTES_NAME,
    COLUMNS_NAME,
    AttributeColumn,
    read_columns,
    write_columns,
)
from shardrec.pipeline.prepared.manifest import read_manifest

__all__ = ["ItemAttributes"]

_GROUP_ROWS = 262_144  # as in items.parquet
_BUCKETS = 16

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemAttributes:
    """The attributes that ``prepare --item-attributes`` reads.

    Attributes:
        file: the opened files.
        former: the attribute columns of the folder that ``--items`` names, by column name; their
            codes are kept.
        admits: whether items that occur only in these files enter the catalog.
    """

    file: AttributeFile
    former: Mapping[str, AttributeColumn]
    admits: bool

    @classmethod
    def open(cls, config: PrepareConfig, item_type: str) -> "ItemAttributes | None":
        """Open the files that the options name; None if they name none.

        Args:
            config: the options of ``prepare``.
            item_type: kind of the log's item ids.

        Raises:
            FileNotFoundError, ValueError: as ``AttributeFile.open`` and ``read_manifest``.
        """
        if config.item_attributes is None:
            return None
        choice = AttributeChoice(
            item=config.attribute_item_column or config.item_column,
            columns=config.attributes,
            numbers=config.attribute_numbers,
            buckets=config.attribute_buckets or _BUCKETS,
        )
        file = AttributeFile.open(config.item_attributes, choice, item_type)
        former = {column.name: column for column in _former_columns(config)}
        return cls(file=file, former=former, admits=config.admit_items)

    def describe(self) -> dict[str, Any]:
        """JSON for the manifest: path, size in bytes and checksum of each file."""
        return {"files": self.file.describe()}

    def write(self, folder: Path, item_ids: pa.Array, seen: pa.Array) -> "WrittenAttributes":
        """Write codes and vectors in the order of the catalog, and the meaning of the codes.

        Args:
            folder: the prepared folder.
            item_ids: ids of the catalog's items so far, in the order of their indices.
            seen: ids of the log and of the former items; others are admitted to the catalog.

        Raises:
            ValueError: an id or a value is invalid; the message names file and column.
        """
        ids = self.file.item_ids()
        new = ids.filter(pa.array(places(ids, seen) < 0)).sort() if self.admits else ids[:0]
        item_ids = pa.concat_arrays([item_ids, new.cast(item_ids.type)])
        rows = places(item_ids, ids)
        columns, arrays = [], []
        for name, kind in self.file.kinds.items():
            raw, dtype = self.file.raw(name, rows)
            column = fit_column(
                name,
                kind,
                raw,
                dtype,
                buckets=self.file.choice.buckets,
                former=self.former.get(name),
            )
            columns.append(column)
            arrays.append(column.encode(raw))
        schema = pa.schema([pa.field(one.name, one.arrow_type) for one in columns])
        pq.write_table(
            pa.Table.from_arrays(arrays, schema=schema),
            folder / ATTRIBUTES_NAME,
            row_group_size=_GROUP_ROWS,
            compression="zstd",
            write_page_checksum=True,
        )
        write_columns(folder, columns)
        found = int((rows >= 0).sum())
        return WrittenAttributes(
            item_ids=item_ids,
            files=(describe_parquet(folder, ATTRIBUTES_NAME), describe_file(folder, COLUMNS_NAME)),
            counts={
                "items_admitted": len(new),
                "items_with_attributes": found,
                "attribute_rows_without_item": len(ids) - found,
                "attribute_values": sum(column.num_codes for column in columns),
            },
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenAttributes:
    """The output of ``ItemAttributes.write``.

    Attributes:
        item_ids: (V,) item ids of the catalog, those of admitted items last.
        files: entries for the manifest.
        counts: numbers of items and values, under their names in the manifest.
    """

    item_ids: pa.Array
    files: tuple[FileEntry, ...]
    counts: dict[str, int]


def places(wanted: pa.Array, ids: pa.Array) -> Array:
    """(n,) int64 index in ``ids`` of each of the ``wanted`` ids; -1 for an id that is not there.

    Example:
        >>> places(pa.array([7, 5]), pa.array([5, 6])).tolist()
        [-1, 0]
    """
    found = pc.index_in(wanted, value_set=ids.cast(wanted.type))
    filled: Array = pc.fill_null(found, -1).to_numpy().astype(np.int64)
    return filled


def _former_columns(config: PrepareConfig) -> list[AttributeColumn]:
    folder = None if config.items is None else Path(config.items).parent
    if folder is None or not (folder / MANIFEST_NAME).is_file():
        return []
    # Its sequences may be gone; only these columns are needed.
    manifest = read_manifest(folder, verify_checksums=True, only=(COLUMNS_NAME,))
    if all(entry.path != COLUMNS_NAME for entry in manifest.files):
        return []
    return read_columns(folder)
