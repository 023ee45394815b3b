"""Assign a dense index to each item, and keep the indices of an earlier prepared folder.

Trained models and their users store indices, so an item keeps its index even if the new log does
not have it; its count is then 0. New items get the next indices, spread by popularity as the items
of a first folder are. Each rank holds a contiguous block of rows, so new items are on the last
ranks; ``rebalance`` gives every item a new index instead and writes ``item_map.parquet``.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from shardrec.pipeline.outputs.files import MANIFEST_NAME, sha256
from shardrec.pipeline.prepared.balance import spread_by_popularity
from shardrec.pipeline.prepared.manifest import ITEMS_NAME, read_manifest
from shardrec.pipeline.prepared.row_groups import RowGroups

_COLUMNS = ["item_id", "item"]

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FormerItems:
    """The ``items.parquet`` of an earlier prepared folder, opened by ``prepare --items``.

    Attributes:
        path: path of the file.
        kind: kind of the ids, "int64" or "string".
        rows: number of items.
        sha256: SHA-256 of the file, hexadecimal.
        fingerprint: fingerprint of its prepared folder; None if no manifest lies next to the file.
    """

    path: Path
    kind: str
    rows: int
    sha256: str
    fingerprint: str | None

    @classmethod
    def open(cls, path: str, item_type: str) -> "FormerItems":
        """Open the file; checks footer, id type and, if a manifest is next to it, the checksum.

        Args:
            path: path of the file.
            item_type: kind of the ids in the new log, "int64" or "string".

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, not an ``items.parquet``, or has ids of another type.
        """
        file = Path(path)
        if not file.is_file():
            hint = f"; choose {str(file / ITEMS_NAME)!r}" if file.is_dir() else "; check the path"
            raise FileNotFoundError(
                f"items must be the {ITEMS_NAME} of a prepared folder, got {path!r}{hint}"
            )
        groups = RowGroups([file], _COLUMNS)
        kind = str(pq.read_schema(file).field("item_id").type)
        if kind != item_type:
            raise ValueError(
                f"items must have ids of the log's type, {item_type}, got {kind} in {path!r}; "
                "choose a folder that was prepared from logs with such ids"
            )
        return cls(
            path=file,
            kind=kind,
            rows=int(groups.rows.sum()),
            sha256=sha256(file),
            fingerprint=_fingerprint(file),
        )

    def tables(self) -> Iterator[pa.Table]:
        """Tables with the columns ``item_id`` and ``item``, by ascending ``item``.

        Raises:
            ValueError: the indices are not 0, 1, 2, ..., or a row group cannot be read.
        """
        groups = self.groups()
        for index in range(len(groups)):
            yield self.table(groups, index)

    def groups(self) -> RowGroups:
        """The row groups of the file."""
        return RowGroups([self.path], _COLUMNS)

    def table(self, groups: RowGroups, index: int) -> pa.Table:
        """One of the tables; see ``tables``."""
        table, first = groups.read(index, _COLUMNS), int(groups.rows[:index].sum())
        items = table.column("item").to_numpy()
        if not np.array_equal(items, np.arange(first, first + len(items))):
            raise ValueError(
                f"{groups.name(index)}, column item must count from {first}, got other "
                f"numbers; use the {ITEMS_NAME} that prepare wrote"
            )
        return table

    def require_once(self, twice: Sequence[Any] | None) -> None:
        """Raise ValueError if a row with an id is given: one that the file names more than once."""
        if twice is not None:
            raise ValueError(
                f"items must name each id once, got {twice[0]!r} more than once in "
                f"{str(self.path)!r}; use the items.parquet that prepare wrote"
            )

    def describe(self) -> dict[str, Any]:
        """JSON for the manifest: path, rows, sha256, fingerprint."""
        return {
            "path": str(self.path),
            "rows": self.rows,
            "sha256": self.sha256,
            "fingerprint": self.fingerprint,
        }


def index_order(counts: Array, catalog: Array, former: Array | None, rebalance: bool) -> Array:
    """The items of the catalog, sorted by the dense index that each of them gets.

    Args:
        counts: (items,) int64 training events of each item.
        catalog: (V,) int64 items of the catalog.
        former: (items,) int64 earlier index of each item, -1 for a new one; None: all are new.
        rebalance: whether former items may get another index.

    Returns:
        (V,) int64: element k is the item that gets index k.

    Example:
        >>> counts = np.array([9, 0, 5, 7])
        >>> index_order(counts, np.arange(4), np.array([1, 0, -1, -1]), False).tolist()
        [1, 0, 3, 2]
    """
    if former is None or rebalance:
        return _by_popularity(counts, catalog)
    is_former = former[catalog] >= 0
    kept, new = catalog[is_former], catalog[~is_former]
    return np.concatenate([kept[np.argsort(former[kept])], _by_popularity(counts, new)])


def _by_popularity(counts: Array, items: Array) -> Array:
    order: Array = items[spread_by_popularity(counts[items])]
    return order


def _fingerprint(path: Path) -> str | None:
    """The fingerprint of the file's prepared folder, after a check of the file's checksum."""
    if path.name != ITEMS_NAME or not (path.parent / MANIFEST_NAME).is_file():
        return None
    # The large files of an old folder may be gone; only this one is needed.
    return read_manifest(path.parent, verify_checksums=True, only=(ITEMS_NAME,)).fingerprint
