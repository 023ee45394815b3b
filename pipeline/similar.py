"""The similar stage: write each item's nearest items as Parquet (item_id, item_ids, scores)."""

import dataclasses
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from shardrec.kernels.ranks.communicator import Communicator
from shardrec.modules.option_checks import require_at_least, require_choice
from shardrec.modules.ranking import Blocks, top_items
from shardrec.pipeline.model.config import TIES
from shardrec.pipeline.model.lists import Lists, list_schema
from shardrec.pipeline.model.model import Model
from shardrec.pipeline.outputs.files import FileEntry, describe_parquet
from shardrec.pipeline.outputs.formats import SIMILAR
from shardrec.pipeline.outputs.stage_output import StageOutput
from shardrec.pipeline.prepared.data_files import read_item_ids
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.prepared.item_ids import ItemIds
from shardrec.pipeline.ranks import default_group, in_step, on_this_rank
from shardrec.pipeline.run.trained import Source

__all__ = ["SimilarConfig", "SimilarItems", "similar"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SimilarConfig:
    """Options of ``similar``: items, candidates and list length.

    Attributes:
        run: run folder of train.
        prepared: the folder the run was trained on; holds the item ids.
        output: folder to write, new or empty.
        items: Parquet with a column item_id; none: every item of the catalog.
        k: number of nearest items of each item, not counting itself.
        by: similarity of two items: the cosine of their vectors, or the inner product (dot).
        min_count: fewest training events of an item to be listed; the vector of an item without any
            is untrained.
        checkpoint: the weights to load.
        force: replace an earlier output of this stage.
        batch_size: items per batch on each rank.
        block_rows: rows of a shard that are scored at a time.
    """

    run: str
    prepared: str
    output: str
    items: str | None = None
    k: int = 10
    by: Literal["cosine", "dot"] = "cosine"
    min_count: int = 1
    checkpoint: Literal["best", "last"] = "best"
    force: bool = False
    batch_size: int = 256
    block_rows: int = 65_536

    def __post_init__(self) -> None:
        """Refuse sizes below 1, and a negative min_count."""
        for name in ("k", "batch_size", "block_rows"):
            require_at_least(name, getattr(self, name), 1)
        require_at_least("min_count", self.min_count, 0)
        require_choice("by", self.by, ("cosine", "dot"))


@dataclass(frozen=True, slots=True)
class SimilarItems:
    """The output of ``similar``.

    Attributes:
        manifest: manifest of the output folder; its ``counts`` say how many items were requested.
        is_new: False if the output was there and nothing had to be done.
        seconds: wall time, including loading the model.
    """

    manifest: dict[str, Any]
    is_new: bool
    seconds: float


@torch.no_grad()
def similar(config: SimilarConfig) -> SimilarItems:
    """Write the ``k`` nearest items of each item; the lists are the same on any number of ranks.

    The part files, read in the order of their names, keep the order of the requested items. An item
    that the catalog lacks gets an empty list, with null for the scores.

    Args:
        config: items and options; the same on every rank.

    Raises:
        FileNotFoundError: there is no run, no data, no file of items or no complete checkpoint.
        FileExistsError: the output folder holds something else.
        ValueError: the run was not trained on this data, or the ids are of another type.

    Collectives: many, on the default group; every rank must call it.
    """
    started, group = time.monotonic(), default_group()
    prepared = on_this_rank(lambda: Prepared.open(config.prepared), group)
    source = Source.find(config.run, prepared, config.checkpoint)
    asked = on_this_rank(lambda: _Asked.read(config, prepared), group)
    request = _request(config) | {"source": source.identity, "asked": asked.digest, "ties": TIES}
    path = Path(config.output)
    output = StageOutput(
        path=path, format=SIMILAR, request=request, force=config.force, group=group
    )
    found = output.find()
    if found is not None:
        return SimilarItems(found, False, time.monotonic() - started)
    model = source.load(prepared)
    allowed = on_this_rank(prepared.item_counts, group) >= config.min_count
    with output.write() as (folder, _):
        files = _write(config, model, asked, allowed.to(model.device), folder)
        counts = {"items": len(asked.items), "unknown_items": int((asked.items < 0).sum())}
        details = {"catalog_version": asked.catalog.version, "counts": counts}
        manifest = output.finish(lambda: details, folder, files)
    return SimilarItems(manifest, True, time.monotonic() - started)


@dataclass(frozen=True, slots=True)
class _Asked:
    """The items asked for."""

    catalog: ItemIds
    ids: pa.Array  # (n,)
    items: Tensor  # (n,) int64, -1 for those that the catalog lacks

    @classmethod
    def read(cls, config: SimilarConfig, prepared: Prepared) -> "_Asked":
        catalog = ItemIds(prepared.item_ids())
        ids = catalog.ids if config.items is None else read_item_ids("items", config.items)
        return cls(catalog, ids, catalog.items(ids))

    @property
    def digest(self) -> str:
        """Short hash of the ids."""
        text = "\n".join(map(str, self.ids.to_pylist()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write(
    config: SimilarConfig, model: Model, asked: _Asked, allowed: Tensor, folder: Path
) -> list[FileEntry]:
    """Write the lists of this rank's share of the items."""
    group, rank, size = model.group, Communicator(model.group).rank, Communicator(model.group).size
    first, last = (len(asked.items) * one // size for one in (rank, rank + 1))
    k = min(config.k, model.catalog.num_items)  # no list is longer
    share, items = Lists.of_everybody(torch.full((k,), -1), last - first), asked.items
    shard = model.catalog.shard
    rows = shard.rows.detach()
    rows = F.normalize(rows) if config.by == "cosine" else rows
    shard = dataclasses.replace(shard, rows=rows)
    blocks = Blocks(states=config.batch_size * size, rows=config.block_rows)
    for places in in_step(
        _batches(config, items[first:last], -(-len(items) // size)), group, model.device
    ):
        own = items[first:last][places].to(model.device)
        vectors = model.catalog.begin_lookup(own)()
        states = F.normalize(vectors) if config.by == "cosine" else vectors
        itself = own, torch.ones_like(own)
        scores, found = top_items(states, shard, k, seen=itself, allowed=allowed, blocks=blocks)
        share.put(places, scores.cpu(), found.cpu())
    name = f"part-{rank:05d}-of-{size:05d}.parquet"
    schema = list_schema("item_id", asked.ids.type, asked.catalog.ids.type)
    table = share.table(asked.ids[first:last], asked.catalog, schema)
    on_this_rank(lambda: pq.write_table(table, folder / name), group)
    return on_this_rank(lambda: [describe_parquet(folder, name)], group)


def _batches(config: SimilarConfig, items: Tensor, most: int) -> Iterator[Tensor]:
    """Places of known items among this rank's, in batches, equally many on every rank."""
    known = (items >= 0).nonzero()[:, 0]
    for start in range(0, most, config.batch_size):
        yield known[start : start + config.batch_size]


def _request(config: SimilarConfig) -> dict[str, Any]:
    """The options that change the content."""
    how = ("run", "prepared", "output", "items", "force", "batch_size", "block_rows")
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in how}
