"""Read the successors of a memory, as ``memorize`` writes them and an export holds them."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from shardrec.modules.memory import Memory
from shardrec.pipeline.prepared.row_groups import RowGroups

__all__ = ["PAIRS", "SUCCESSORS", "read_memory"]

SUCCESSORS = "successors.parquet"
PAIRS = pa.schema([("item", pa.int32()), ("successor", pa.int32()), ("strength", pa.float32())])


def read_memory(
    path: Path,
    manifest: dict[str, Any],
    num_items: int,
    rows: range,
    device: torch.device,
) -> Memory:
    """The memory of one rank: the successors in a file that are among its ``rows``.

    Args:
        path: the ``successors.parquet``.
        manifest: holds scale, ages and decay.
        num_items: V.
        rows: range of items in this rank's shard.
        device: device of the result.

    Raises:
        FileNotFoundError, ValueError: the file is missing or damaged, or an item is not in [0, V).
    """
    groups = RowGroups([path], PAIRS.names)
    parts: dict[str, list[npt.NDArray[Any]]] = {
        field.name: [np.zeros(0, field.type.to_pandas_dtype())] for field in PAIRS
    }
    for index in range(len(groups)):
        table = groups.read(index, PAIRS.names)
        _check_items(table, num_items, groups.name(index))
        successor = table.column("successor").to_numpy()
        kept = (successor >= rows.start) & (successor < rows.stop)
        for name, found in parts.items():
            found.append(table.column(name).to_numpy()[kept])
    item, successors, strengths = (torch.from_numpy(np.concatenate(p)) for p in parts.values())
    counts = torch.bincount(item, minlength=num_items)
    return Memory(
        offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(device),
        successors=successors.to(device),
        strengths=strengths.to(device),
        scale=manifest["scale"],
        ages=manifest["ages"],
        decay=manifest["decay"],
    )


def _check_items(table: pa.Table, num_items: int, place: str) -> None:
    for name in ("item", "successor"):
        values = table.column(name).to_numpy()
        if len(values) and not 0 <= values.min() <= values.max() < num_items:
            raise ValueError(
                f"{place}, column {name} must be in [0, {num_items}), got {values.min()} to "
                f"{values.max()}; run `shardrec memorize --force`"
            )
