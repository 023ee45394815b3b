"""Open a prepared folder for reading: manifest, training files, item counts and ids."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from shardrec.pipeline.outputs.files import check_files
from shardrec.pipeline.outputs.formats import PREPARED
from shardrec.pipeline.prepared.ids import wide
from shardrec.pipeline.prepared.manifest import ITEMS_NAME, Manifest, read_manifest
from shardrec.pipeline.prepared.row_groups import RowGroups

__all__ = ["Prepared"]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A complete prepared folder and its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> "Prepared":
        """Open a prepared folder, after reading and checking its manifest.

        Raises:
            FileNotFoundError, ValueError: the folder is not a complete prepared folder.
        """
        return cls(Path(path), read_manifest(Path(path)))

    @property
    def num_items(self) -> int:
        """V, the number of items."""
        return self.manifest.counts["items"]

    @property
    def has_weights(self) -> bool:
        """Whether events carry a weight."""
        return self.manifest.columns["weight"] is not None

    @property
    def train_files(self) -> list[Path]:
        """Paths of the training files, in order."""
        names = sorted(file.path for file in self.manifest.files)
        return [self.path / name for name in names if name.startswith("train/")]

    @property
    def fingerprint(self) -> str:
        """Short hash of the files' checksums; equal for equal data."""
        return self.manifest.fingerprint

    def file(self, name: str) -> Path:
        """The path of a file that the manifest lists and ``open`` has checked.

        Raises:
            ValueError: the manifest does not list it.
        """
        try:
            return self.path / self.manifest.file(name).path
        except KeyError:
            raise ValueError(
                f"the manifest of {self.path} must list {name}, got none; {PREPARED.remedy}"
            ) from None

    def item_counts(self) -> Tensor:
        """(V,) int64 training events of each item."""
        return torch.from_numpy(self._items("count").to_numpy().astype(np.int64))

    def item_ids(self) -> pa.Array:
        """(V,) item ids of the log (int64 or large_string), by dense index."""
        return self._items("item_id")

    def _items(self, name: str) -> pa.Array:
        path = self.file(ITEMS_NAME)
        # Its footer has no checksum of its own, and another id or count would go unnoticed.
        entry = asdict(self.manifest.file(ITEMS_NAME))
        check_files(self.path, [entry], PREPARED.remedy, verify=True)
        groups = RowGroups([path], ["item_id", "item", "count"])
        columns = [groups.read(index, [name]).column(name) for index in range(len(groups))]
        empty = pq.read_schema(path).field(name).type
        return pa.concat_arrays(
            [wide(c) for column in columns for c in column.chunks] or [wide(pa.array([], empty))]
        )
