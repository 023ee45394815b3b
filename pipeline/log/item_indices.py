"""Keeping the items of an earlier prepared folder: which they are, and who gets which index.

An index may be stored anywhere once a model was trained, so an item keeps its index for good: also
an item that the new log lacks, which stays with count 0. New items get the indices that follow.
Rows lie on the ranks in contiguous blocks, so new items fall on the last ranks; among themselves
they are spread by popularity, as all items of a first folder are. ``rebalance`` gives every item a
new index instead, and says in ``item_map.parquet`` where each went.
"""

import dataclasses
from collections.abc import Iterator
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
    """The ``items.parquet`` of an earlier folder, found whole as far as that can be told.

    Attributes:
        path: of the file.
        kind: "int64" or "string".
        rows: how many items it has.
        sha256: of the file.
        fingerprint: of the prepared folder it lies in; None for a file that stands alone.
    """

    path: Path
    kind: str
    rows: int
    sha256: str
    fingerprint: str | None

    @classmethod
    def open(cls, path: str, item_type: str) -> "FormerItems":
        """Check footer and type; the checksum too where a manifest lies beside the file.

        Args:
            path: of the file.
            item_type: "int64" or "string", what the ids of the new log are.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, no ``items.parquet``, or has ids of another type.
        """
        file = Path(path)
        if not file.is_file():
            hint = f"; say {str(file / ITEMS_NAME)!r}" if file.is_dir() else "; check the path"
            raise FileNotFoundError(
                f"items must be the {ITEMS_NAME} of a prepared folder, got {path!r}{hint}"
            )
        groups = RowGroups([file], _COLUMNS)
        kind = str(pq.read_schema(file).field("item_id").type)
        if kind != item_type:
            raise ValueError(
                f"items must have ids of the log's type, {item_type}, got {kind} in {path!r}; "
                "name a folder that was prepared from logs with such ids"
            )
        return cls(
            path=file,
            kind=kind,
            rows=int(groups.rows.sum()),
            sha256=sha256(file),
            fingerprint=_fingerprint(file),
        )

    def tables(self) -> Iterator[pa.Table]:
        """Tables with ``item_id`` and ``item``, in the order of ``item``.

        Raises:
            ValueError: the indices do not count from 0, or a row group cannot be read.
        """
        groups, expected = RowGroups([self.path], _COLUMNS), 0
        for index in range(len(groups)):
            table = groups.read(index, _COLUMNS)
            items = table.column("item").to_numpy()
            if not np.array_equal(items, np.arange(expected, expected + len(items))):
                raise ValueError(
                    f"{groups.name(index)}, column item must count from {expected}, got other "
                    f"numbers; give the {ITEMS_NAME} that prepare wrote"
                )
            expected += len(items)
            yield table

    def describe(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {
            "path": str(self.path),
            "rows": self.rows,
            "sha256": self.sha256,
            "fingerprint": self.fingerprint,
        }


def index_order(counts: Array, catalog: Array, former: Array | None, rebalance: bool) -> Array:
    """The items in the order of their dense index.

    Args:
        counts: (items,) int64, training events of each item.
        catalog: (V,) int64, the items of the catalog.
        former: (items,) int64, the index an item has had, -1 for a new one; None: all are new.
        rebalance: whether former items may get another index.

    Returns:
        (V,) int64: element k is the item that gets index k.

    Example:
        >>> counts = np.array([9, 0, 5, 7])
        >>> index_order(counts, np.arange(4), np.array([1, 0, -1, -1]), False).tolist()
        [1, 0, 3, 2]
    """
    if former is None or rebalance:
        return _spread(counts, catalog)
    is_former = former[catalog] >= 0
    kept, new = catalog[is_former], catalog[~is_former]
    return np.concatenate([kept[np.argsort(former[kept])], _spread(counts, new)])


def _spread(counts: Array, items: Array) -> Array:
    order: Array = items[spread_by_popularity(counts[items])]
    return order


def _fingerprint(path: Path) -> str | None:
    """The fingerprint of the folder that the file belongs to, after comparing its checksum."""
    if path.name != ITEMS_NAME or not (path.parent / MANIFEST_NAME).is_file():
        return None
    # The large files of an old folder may be gone; only this one is needed.
    return read_manifest(path.parent, verify_checksums=True, only=(ITEMS_NAME,)).fingerprint
