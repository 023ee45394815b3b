"""The export stage: write a run's item vectors, encoder and optional index for serving.

::

    items/part-00000-of-00002.parquet   item_id, item, count, vector; each rank writes its rows,
                                        and rank 0 one more part for items added after training
    encoder.safetensors                 weights of the encoder; a module of the user's is written
                                        as a program, encoder.pt2
    items.faiss                         if an index was requested
    successors.parquet                  if the run has a memory
    manifest.json                       run, data, catalog version, files; written last

``shardrec.pipeline.serve`` reads it without the training stack.
"""

import copy
import dataclasses
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from shardrec import __version__
from shardrec.kernels.ranks.communicator import Communicator
from shardrec.pipeline.model.model import Model
from shardrec.pipeline.outputs.files import FileEntry, describe_file, describe_parquet
from shardrec.pipeline.outputs.formats import EXPORT
from shardrec.pipeline.outputs.stage_output import StageOutput
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.prepared.ids import stored, stored_type
from shardrec.pipeline.prepared.item_ids import ItemIds
from shardrec.pipeline.ranks import default_group, on_all_ranks, on_first_rank, on_this_rank
from shardrec.pipeline.run.trained import Source
from shardrec.pipeline.serve import Recommender, read_recommender
from shardrec.pipeline.served.ann_index import INDEX, IndexConfig, build_index
from shardrec.pipeline.served.encoder_file import inputs, read_encoder, reads_lengths, write_encoder
from shardrec.pipeline.served.memory import SUCCESSORS
from shardrec.pipeline.served.new_items import NewItems

__all__ = ["ExportConfig", "Exported", "encoder_difference", "export"]

_QUERIES = 1000  # states that the recall of an index is measured on


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Options of ``export``.

    Attributes:
        run: run folder of train.
        prepared: the folder the run was trained on; holds the item ids.
        output: folder to write, new or empty.
        items: Parquet with attributes of items, with the columns that `prepare --item-attributes`
            read; items that the catalog lacks are added, with 0 training events.
        checkpoint: the weights to export.
        faiss: a FAISS factory string, such as HNSW32 or IVF1024,Flat, for an index of the items
            that training saw, built on one rank that holds all vectors; none: no index.
        faiss_search: parameters of the index's search, such as efSearch=128 or nprobe=16.
        force: replace an earlier output of this stage.
        block_rows: number of table rows that are written at a time.
    """

    run: str
    prepared: str
    output: str
    items: str | None = None
    checkpoint: Literal["best", "last"] = "best"
    faiss: str | None = None
    faiss_search: str | None = None
    force: bool = False
    block_rows: int = 65_536

    def __post_init__(self) -> None:
        """Refuse empty blocks, and options of an index that is not built."""
        if self.block_rows < 1:
            raise ValueError(f"block_rows must be at least 1, got {self.block_rows}; raise it")
        if self.faiss is None and self.faiss_search is not None:
            raise ValueError(
                f"faiss_search must come with an index, got {self.faiss_search!r} without faiss; "
                "add --faiss HNSW32"
            )

    @property
    def index(self) -> IndexConfig | None:
        """The index to build, if any."""
        return None if self.faiss is None else IndexConfig(self.faiss, self.faiss_search)


@dataclass(frozen=True, slots=True)
class Exported:
    """The output of ``export``.

    Attributes:
        manifest: manifest of the output folder.
        is_new: False if the output was there and nothing had to be done.
        seconds: wall time.
    """

    manifest: dict[str, Any] = field(repr=False)
    is_new: bool
    seconds: float


def export(config: ExportConfig, *, encoder: nn.Module | None = None) -> Exported:
    """Write item vectors with the log's own ids, and the encoder; returns the manifest.

    Args:
        config: the same on every rank.
        encoder: the module given to ``train``, if any.

    Returns:
        The manifest, the same on every rank.

    Raises:
        FileNotFoundError: there is no run, no data or no complete checkpoint.
        FileExistsError: the output folder holds something else.
        ValueError: the run was not trained on this data, ``torch.export`` cannot trace a
            user-supplied encoder, or FAISS cannot make the index.
        RuntimeError: the written encoder returns other states than the one in memory.

    Collectives: on the default group; every rank must call it.
    """
    started, group = time.monotonic(), default_group()
    prepared = on_this_rank(lambda: Prepared.open(config.prepared), group)
    source = Source.find(config.run, prepared, config.checkpoint, encoder)
    index = config.index
    new = on_this_rank(lambda: _open_new_items(config, prepared, source), group)
    request = {
        "source": source.identity,
        "faiss": index and dataclasses.asdict(index),
        "items": new and new.file.describe(),
    }
    output = StageOutput(
        path=Path(config.output), format=EXPORT, request=request, force=config.force, group=group
    )
    found = output.find()
    if found is not None:
        return Exported(found, False, time.monotonic() - started)
    on_first_rank(lambda: _check_index(index, source), group)
    model = source.load(prepared, encoder)
    work = on_this_rank(lambda: _Work(config, model, source, prepared, new), group)
    with output.write() as (folder, _):
        files = work.write(folder)
        manifest = output.finish(work.details, folder, files)
    return Exported(manifest, True, time.monotonic() - started)


class _Work:
    """Writes this rank's rows, and on rank 0 the encoder and the index."""

    def __init__(
        self,
        config: ExportConfig,
        model: Model,
        source: Source,
        prepared: Prepared,
        new: NewItems | None,
    ) -> None:
        self.config, self.model, self.source, self.prepared = config, model, source, prepared
        self.ids, self.counts = ItemIds(prepared.item_ids()), prepared.item_counts()
        self.new = new
        self.measured: dict[str, Any] = {}

    def write(self, folder: Path) -> list[FileEntry]:
        group = self.model.group
        written = on_all_ranks(lambda: self._write_rows(folder), group)
        rows = [entry for entries in written for entry in entries]
        more = on_first_rank(lambda: self._write_rest(folder, rows), group)
        rank = Communicator(group).rank
        return written[rank] + (more if rank == 0 else [])

    def _write_rest(self, folder: Path, rows: Sequence[FileEntry]) -> list[FileEntry]:
        new = self._write_new_rows(folder)
        return new + self._write_served(folder, [*rows, *new]) + self._memory(folder)

    def details(self) -> dict[str, Any]:
        """The manifest without its request; complete on rank 0."""
        config = self.source.config.encoder
        return {
            "catalog_version": self.ids.version,
            "num_items": len(self.ids),
            "width": config.width,
            "max_length": config.max_length,
            "scores": "cosine" if self.model.normalize else "inner product",
            "reads_lengths": reads_lengths(self.model.encoder),
            "versions": {"shardrec": __version__, "torch": torch.__version__},
            **self.measured,
        }

    def _write_rows(self, folder: Path) -> list[FileEntry]:
        """Write this rank's rows, of the first replica."""
        catalog = self.model.catalog
        if catalog.replicas is not None and catalog.replicas.index:
            return []
        (folder / "items").mkdir(exist_ok=True)
        shard, name = catalog.shard, self._part(Communicator(catalog.group).rank)
        with pq.ParquetWriter(folder / name, self._schema()) as writer:
            for start in range(0, shard.rows.shape[0], self.config.block_rows):
                rows = shard.rows.detach()[start : start + self.config.block_rows].cpu()
                writer.write_table(self._table(rows, shard.first_row + start))
        return [describe_parquet(folder, name)]

    def _write_new_rows(self, folder: Path) -> list[FileEntry]:
        """Write the items that came after training, after those of the catalog; on rank 0."""
        if self.new is None:
            return []
        name, first = self._part(Communicator(self.model.catalog.group).size), len(self.ids)
        ids, rows = self.new.vectors(self.ids.ids, self.model.catalog.attributes)
        self.ids = ItemIds(pa.concat_arrays([self.ids.ids, ids.cast(self.ids.ids.type)]))
        self.counts = torch.cat([self.counts, self.counts.new_zeros(len(ids))])
        self.measured["items_after_training"] = len(ids)
        pq.write_table(self._table(rows, first), folder / name)
        return [describe_parquet(folder, name)]

    def _part(self, index: int) -> str:
        total = Communicator(self.model.catalog.group).size + (self.new is not None)
        return f"items/part-{index:05d}-of-{total:05d}.parquet"

    def _schema(self) -> pa.Schema:
        vector = pa.list_(pa.float32(), self.source.config.encoder.width)
        columns = {"item": pa.int64(), "count": pa.int64(), "vector": vector}
        return pa.schema({"item_id": stored_type(self.ids.ids.type), **columns})

    def _table(self, rows: Tensor, first: int) -> pa.Table:
        items = np.arange(first, first + len(rows))
        values = pa.array(rows.contiguous().view(-1).numpy())
        vectors = pa.FixedSizeListArray.from_arrays(values, rows.shape[1])
        block = self.counts[first : first + len(rows)].numpy()
        schema = self._schema()
        wide = schema.set(0, pa.field("item_id", self.ids.ids.type))
        return stored(pa.table([self.ids.of(items), items, block, vectors], schema=wide), schema)

    def _write_served(self, folder: Path, rows: Sequence[FileEntry]) -> list[FileEntry]:
        """Write the encoder, compare it with the live one, and build the index if asked for."""
        config, encoder = self.source.config.encoder, self.model.encoder
        name, ours = write_encoder(folder, encoder, config.width, config.max_length)
        self.measured["encoder"] = ours
        entry = describe_file(folder, name)
        written = self.details() | {"files": [dataclasses.asdict(one) for one in (*rows, entry)]}
        again = read_encoder(folder, written, trust_code=True)
        self.measured["encoder_difference"] = encoder_difference(
            again, encoder, config.width, config.max_length
        )
        return [entry, *self._index(folder, written)]

    def _index(self, folder: Path, written: dict[str, Any]) -> list[FileEntry]:
        """Build the index from the Parquet that all ranks have written."""
        index = self.config.index
        if index is None:
            return []
        served = read_recommender(folder, written, min_count=1, trust_code=True)
        states = _example_states(served, self.prepared)
        path = folder / INDEX
        self.measured["faiss"] = build_index(path, index, served.scored, served.allowed, states)
        return [describe_file(folder, INDEX)]

    def _memory(self, folder: Path) -> list[FileEntry]:
        """Copy the successors of the run's memory, if it has one."""
        memory, source = self.model.memory, self.source.successors
        if memory is None or source is None:
            return []
        shutil.copyfile(source, folder / SUCCESSORS)
        self.measured["memory"] = {
            "scale": memory.scale,
            "ages": memory.ages,
            "decay": memory.decay,
        }
        return [describe_parquet(folder, SUCCESSORS)]


@torch.no_grad()
def encoder_difference(
    written: nn.Module, encoder: nn.Module, width: int, max_length: int
) -> float:
    """Largest absolute difference of the states of the written encoder and the one in memory.

    Raises:
        RuntimeError: it is larger than rounding can explain.
    """
    alone = copy.deepcopy(encoder).cpu().eval()
    generator, worst = torch.Generator().manual_seed(1), 0.0
    for shape in ((1, 1), (2, max_length), (5, -(-max_length // 2))):
        vectors = torch.randn(*shape, width, generator=generator)
        lengths = torch.randint(1, shape[1] + 1, shape[:1], generator=generator)
        given = inputs(alone, vectors, lengths)
        expected = alone(*given)
        difference = float((written(*given) - expected).abs().max())
        worst = max(worst, difference)
        if not difference <= 1e-4 * max(1.0, float(expected.abs().max())):
            raise RuntimeError(
                f"the exported encoder must return the states of the original, got a difference of "
                f"{difference:.3g} for a batch of shape {shape}; remove state and randomness "
                "from its forward"
            )
    return worst


@torch.no_grad()
def _example_states(served: Recommender, prepared: Prepared) -> Tensor:
    """(Q, D) states after training sequences, as queries for the index."""
    file = pq.ParquetFile(prepared.train_files[0])
    batch = next(file.iter_batches(_QUERIES, columns=["items"]))
    histories = [torch.tensor(items) for items in batch.column("items").to_pylist()]
    parts = [histories[first : first + 100] for first in range(0, len(histories), 100)]
    return torch.cat([served.states(part) for part in parts])


def _open_new_items(config: ExportConfig, prepared: Prepared, source: Source) -> NewItems | None:
    if config.items is None:
        return None
    if source.config.catalog.attributes == "none":
        raise ValueError(
            f"items must come with a run that uses attributes, got {config.run} with "
            "catalog.attributes=none; train with catalog.attributes=add"
        )
    return NewItems.open(config.items, prepared)


def _check_index(index: IndexConfig | None, source: Source) -> None:
    """Refuse an unknown index before anything is loaded."""
    if index is not None:
        index.empty(source.config.encoder.width)
