"""The export stage: a run in, what a service needs out.

::

    items/part-00000-of-00002.parquet   item_id, item, count, vector; each rank writes its rows
    encoder.pt2                         torch.export: (B, L, D) to (B, L, D), any B and L
    manifest.json                       run, data, catalog version, files; written last

``shardrec.pipeline.serve`` reads it without the training stack.
"""

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from shardrec import __version__
from shardrec.pipeline.group import default_group, on_this_rank, rank_of, size_of
from shardrec.pipeline.item_ids import ItemIds
from shardrec.pipeline.manifest import FileEntry, describe_file
from shardrec.pipeline.model import Model
from shardrec.pipeline.prepared import Prepared
from shardrec.pipeline.serve import ENCODER, FORMAT
from shardrec.pipeline.shared_output import SharedOutput
from shardrec.pipeline.trained import Source

__all__ = ["ExportConfig", "Exported", "export", "export_encoder"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """What to export, and where to.

    Attributes:
        run: folder of train.
        prepared: the folder the run was trained on; it says what the item ids are.
        output: folder to write, new or empty.
        checkpoint: which weights.
        force: replace what another run of this stage left in output.
        block_rows: rows of the table that are written at a time.
    """

    run: str
    prepared: str
    output: str
    checkpoint: Literal["best", "last"] = "best"
    force: bool = False
    block_rows: int = 65_536

    def __post_init__(self) -> None:
        """Refuse blocks of no rows."""
        if self.block_rows < 1:
            raise ValueError(f"block_rows must be at least 1, got {self.block_rows}; raise it")


@dataclass(frozen=True, slots=True)
class Exported:
    """What ``export`` wrote, or found already written.

    Attributes:
        manifest: of the output folder.
        is_new: False where the output was there and nothing had to be done.
        seconds: wall time.
    """

    manifest: dict[str, Any]
    is_new: bool
    seconds: float


def export(config: ExportConfig, *, encoder: nn.Module | None = None) -> Exported:
    """Write item vectors with the log's own ids, and the encoder as a program.

    Args:
        config: the same on every rank.
        encoder: the module handed to ``train``, where one was.

    Returns:
        The manifest, the same on every rank.

    Raises:
        FileNotFoundError: there is no run, no data or no complete checkpoint.
        FileExistsError: the output folder holds something else.
        ValueError: the run does not fit the data, or ``torch.export`` cannot trace the encoder.

    Collectives: on the default group; every rank must call it.
    """
    started, group = time.monotonic(), default_group()
    prepared = on_this_rank(lambda: Prepared.open(config.prepared), group)
    source = Source.find(config.run, prepared, config.checkpoint, encoder)
    request = {"source": source.identity}
    output = SharedOutput(Path(config.output), FORMAT, request, group, config.force)
    found = output.finished()
    if found is not None:
        return Exported(found, False, time.monotonic() - started)
    model = source.load(prepared, encoder)
    ids = ItemIds(prepared.item_ids())

    def part(folder: Path) -> list[FileEntry]:
        return on_this_rank(
            lambda: _write_part(folder, model, source, prepared, ids, config.block_rows), group
        )

    manifest = output.write(part, lambda: _details(source, ids, model))
    return Exported(manifest, True, time.monotonic() - started)


def export_encoder(encoder: nn.Module, width: int, max_length: int) -> torch.export.ExportedProgram:
    """The encoder as a program on the CPU in float32, for any number and length of sequences.

    Args:
        encoder: (B, L, D) to (B, L, D); left as it is.
        width: D.
        max_length: the longest L.

    Raises:
        ValueError: ``torch.export`` cannot trace it.
    """
    alone = copy.deepcopy(encoder).cpu().eval()
    dims: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    if max_length > 1:
        dims[1] = torch.export.Dim("length", min=1, max=max_length)
    example = torch.zeros(3, min(max_length, 5), width)
    try:
        return torch.export.export(alone, (example,), dynamic_shapes=(dims,))
    except Exception as error:
        raise ValueError(
            f"encoder must be one that torch.export can trace for any number and length of "
            f"sequences, got {type(encoder).__name__} and {type(error).__name__}: {error}; "
            "take branches on values and fixed sizes out of its forward"
        ) from error


def _write_part(
    folder: Path, model: Model, source: Source, prepared: Prepared, ids: ItemIds, block_rows: int
) -> list[FileEntry]:
    rank, size = rank_of(model.group), size_of(model.group)
    name = f"items/part-{rank:05d}-of-{size:05d}.parquet"
    (folder / "items").mkdir(exist_ok=True)
    shard = model.catalog.shard
    counts = prepared.item_counts()
    schema = pa.schema(
        {
            "item_id": ids.ids.type,
            "item": pa.int64(),
            "count": pa.int64(),
            "vector": pa.list_(pa.float32(), shard.rows.shape[1]),
        }
    )
    with pq.ParquetWriter(folder / name, schema) as writer:
        for start in range(0, shard.rows.shape[0], block_rows):
            rows = shard.rows.detach()[start : start + block_rows].cpu()
            writer.write_table(_table(rows, shard.first_row + start, ids, counts, schema))
    footer = pq.read_metadata(folder / name)
    files = [describe_file(folder, name, footer.num_rows, footer.num_row_groups)]
    if rank == 0:
        config = source.config.encoder
        program = export_encoder(model.encoder, config.width, config.max_length)
        torch.export.save(program, folder / ENCODER)
        files.append(describe_file(folder, ENCODER, 0, 0))
    return files


def _table(rows: Tensor, first: int, ids: ItemIds, counts: Tensor, schema: pa.Schema) -> pa.Table:
    """One block of rows with their ids."""
    items = np.arange(first, first + len(rows))
    values = pa.array(rows.contiguous().view(-1).numpy())
    vectors = pa.FixedSizeListArray.from_arrays(values, rows.shape[1])
    block = counts[first : first + len(rows)].numpy()
    return pa.table([ids.of(items), items, block, vectors], schema=schema)


def _details(source: Source, ids: ItemIds, model: Model) -> Mapping[str, Any]:
    config = source.config.encoder
    return {
        "catalog_version": ids.version,
        "num_items": len(ids),
        "width": config.width,
        "max_length": config.max_length,
        "scores": "cosine" if model.normalize else "inner product",
        "versions": {"shardrec": __version__, "torch": torch.__version__},
    }
