"""Make vectors for items added after training, from their attributes alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from shardrec.pipeline.log.attributes import AttributeChoice, AttributeFile
from shardrec.pipeline.log.item_attributes import places
from shardrec.pipeline.prepared.attribute_rows import as_rows
from shardrec.pipeline.prepared.attributes import COLUMNS_NAME, AttributeColumn, read_columns
from shardrec.pipeline.prepared.folder import Prepared

__all__ = ["NewItems"]


@dataclass(frozen=True, slots=True)
class NewItems:
    """Files of item attributes, with items that the prepared folder may lack.

    Attributes:
        file: the opened files.
        columns: attributes of the prepared folder, with the meaning of their codes.
    """

    file: AttributeFile
    columns: Sequence[AttributeColumn]

    @classmethod
    def open(cls, source: str, prepared: Prepared) -> "NewItems":
        """Open the files, after checking that they have the columns the folder was prepared with.

        Raises:
            FileNotFoundError: there is no Parquet file.
            ValueError: the folder has no attributes, or a column is missing or of another type.
        """
        manifest = prepared.manifest
        if all(entry.path != COLUMNS_NAME for entry in manifest.files):
            raise ValueError(
                f"items must come with data that has attributes, got {prepared.path} without; "
                "prepare it with --item-attributes"
            )
        columns, config, item = (
            read_columns(prepared.path),
            manifest.config,
            manifest.columns["item"],
        )
        choice = AttributeChoice(
            item=config.get("attribute_item_column") or item["name"],
            columns=tuple(column.name for column in columns),
            numbers=tuple(config.get("attribute_numbers") or ()),
        )
        file = AttributeFile.open(source, choice, item["type"])
        for column in columns:
            if file.kinds[column.name] != column.kind:
                raise _other_type(column, file.kinds[column.name])
        return cls(file, columns)

    @torch.no_grad()
    def vectors(self, known: pa.Array, model: nn.Module) -> tuple[pa.Array, Tensor]:
        """(n,) ids of the items that are not ``known``, and their (n, D) float32 vectors.

        Values that training did not know count as missing.

        Args:
            known: (V,) item ids of the catalog.
            model: the trained ``AttributeVectors``.

        Raises:
            ValueError: an id or a value is invalid.
        """
        ids = self.file.item_ids()
        rows = np.flatnonzero(places(ids, known) < 0)
        arrays = [self._encoded(column, rows) for column in self.columns]
        attributes = as_rows(self.columns, arrays, len(rows))
        device = next(model.parameters()).device
        return ids.take(pa.array(rows)), model(attributes.to(device)).cpu()

    def _encoded(self, column: AttributeColumn, rows: Any) -> pa.Array:
        raw, dtype = self.file.raw(column.name, rows)
        width = raw.type.list_size if column.kind == "vector" else 0
        if (dtype, width) != (column.type, column.width):
            raise _other_type(column, f"{dtype} {width or ''}".strip())
        return column.encode(raw)


def _other_type(column: AttributeColumn, found: str) -> ValueError:
    wanted = f"{column.kind} of {column.type} {column.width or ''}".strip()
    return ValueError(
        f"column {column.name!r} of items must be a {wanted} as in the prepared folder, got "
        f"{found}; convert it"
    )
