"""The recommend stage: write the best items of every user as (user_id, item_ids, scores) Parquet.

Each rank streams a contiguous share of the users and writes their rows, in the order of the
histories; the table stays sharded.
"""

import dataclasses
import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from shardrec.kernels.ranks.communicator import Communicator
from shardrec.modules.ranking import Blocks, top_items
from shardrec.pipeline.model.model import Model
from shardrec.pipeline.outputs.files import FileEntry, describe_parquet
from shardrec.pipeline.outputs.formats import RECOMMENDATIONS
from shardrec.pipeline.outputs.stage_output import StageOutput
from shardrec.pipeline.prepared.batches import gathered, padded
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.prepared.histories import Histories, HistoryChunk
from shardrec.pipeline.prepared.item_ids import ItemIds
from shardrec.pipeline.prepared.parquet_files import find_files
from shardrec.pipeline.ranks import default_group, in_step, on_this_rank
from shardrec.pipeline.run.trained import Source

__all__ = ["RecommendConfig", "Recommendations", "recommend"]

_BATCHES_PER_CHUNK = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class RecommendConfig:
    """Options of ``recommend``: users, candidates and list length.

    Attributes:
        run: run folder of train.
        prepared: the folder the run was trained on; holds the item ids.
        output: folder to write, new or empty.
        histories: Parquet of users and lists of item ids, most recent last; none: the users of
            split in the prepared folder.
        split: users of the prepared folder, if histories is none.
        user_column: users of the histories, integers or strings; written as given.
        items_column: lists of item ids in the histories.
        k: items for each user.
        filter_seen: leave out items of the user's history.
        allow: Parquet with a column item_id: nothing else is recommended.
        deny: Parquet with a column item_id: never recommended.
        min_count: training events an item must have; one with none has an untrained vector.
        checkpoint: the weights to load.
        force: replace an earlier output of this stage.
        batch_size: users at a time on each rank.
        block_states: states of all ranks that are scored at a time.
        block_rows: rows of a shard that are scored at a time.
    """

    run: str
    prepared: str
    output: str
    histories: str | None = None
    split: Literal["validation", "test"] = "test"
    user_column: str = "user_id"
    items_column: str = "items"
    k: int = 10
    filter_seen: bool = True
    allow: str | None = None
    deny: str | None = None
    min_count: int = 1
    checkpoint: Literal["best", "last"] = "best"
    force: bool = False
    batch_size: int = 256
    block_states: int = 256
    block_rows: int = 65_536

    def __post_init__(self) -> None:
        """Refuse sizes below 1, and a negative min_count."""
        for name in ("k", "batch_size", "block_states", "block_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")
        if self.min_count < 0:
            raise ValueError(f"min_count must be at least 0, got {self.min_count}; 0 takes all")


@dataclass(frozen=True, slots=True)
class Recommendations:
    """The output of ``recommend``.

    Attributes:
        manifest: of the output folder; ``counts`` says what was skipped.
        is_new: False if the output was there and nothing had to be done.
        seconds: wall time, including loading the model.
        users_per_second: users over the time after loading; 0 if nothing was done.
    """

    manifest: dict[str, Any]
    is_new: bool
    seconds: float
    users_per_second: float


@torch.no_grad()
def recommend(config: RecommendConfig, *, encoder: nn.Module | None = None) -> Recommendations:
    """Write the ``k`` best items of every user; the lists are the same on any number of ranks.

    Every history has one row; the part files, read in order of their names, keep the input order.
    Items that the catalog does not have are counted and skipped; a user without a known item gets
    empty lists. A list is shorter than ``k`` if fewer items are left.

    Args:
        config: users and options; the same on every rank.
        encoder: the module given to ``train``, if any.

    Returns:
        The manifest, the same on every rank, and the rate.

    Raises:
        FileNotFoundError: there is no run, no data, no histories or no complete checkpoint.
        FileExistsError: the output folder holds something else.
        ValueError: the run does not fit the data, or an input does not fit the catalog.

    Collectives: many, on the default group; every rank must call it.
    """
    started, group = time.monotonic(), default_group()
    prepared = on_this_rank(lambda: Prepared.open(config.prepared), group)
    source = Source.find(config.run, prepared, config.checkpoint, encoder)
    histories, candidates = on_this_rank(
        lambda: (_open_histories(config, prepared), _Candidates.read(config, prepared)), group
    )
    request = _request(config) | {
        "source": source.identity,
        "histories": histories.files,
        "candidates": candidates.digest,
    }
    path = Path(config.output)
    output = StageOutput(
        path=path, format=RECOMMENDATIONS, request=request, force=config.force, group=group
    )
    found = output.find()
    if found is not None:
        return Recommendations(found, False, time.monotonic() - started, 0.0)
    model = source.load(prepared, encoder)
    work = _Work(config, model, histories, candidates, source.config.encoder.max_length)
    loaded = time.monotonic()
    with output.write() as (folder, _):
        files = work.write(folder)
        manifest = output.finish(lambda: work.details(source), folder, files)
    done = time.monotonic()
    rate = histories.num_users / max(1e-9, done - loaded)
    return Recommendations(manifest, True, done - started, rate)


class _Work:
    """Writes the lists of this rank's share of the users."""

    def __init__(
        self,
        config: RecommendConfig,
        model: Model,
        histories: Histories,
        candidates: "_Candidates",
        max_length: int,
    ) -> None:
        self.config, self.model, self.histories = config, model, histories
        self.candidates, self.max_length = candidates, max_length
        self.shard = model.scored_shard()
        self.k = min(config.k, self.shard.num_rows)  # no list is longer
        self.allowed = None if candidates.allowed.all() else candidates.allowed.to(model.device)
        self.blocks = Blocks(states=config.block_states, rows=config.block_rows)
        self.rank, self.size = Communicator(model.group).rank, Communicator(model.group).size
        # users without history, items of histories, unknown items, lists shorter than k
        self.sums = torch.zeros(4, dtype=torch.int64, device=model.device)

    def write(self, folder: Path) -> list[FileEntry]:
        name = f"part-{self.rank:05d}-of-{self.size:05d}.parquet"
        ids = self.histories.catalog.ids.type
        schema = pa.schema(
            {
                "user_id": self.histories.user_type,
                "item_ids": pa.list_(ids),
                "scores": pa.list_(pa.float32()),
            }
        )
        group = self.model.group
        with on_this_rank(lambda: pq.ParquetWriter(folder / name, schema), group) as writer:
            for batch in in_step(self._batches(writer), group, self.model.device):
                batch.lists.put(batch.rows, *self._rank(batch))
            on_this_rank(writer.close, group)  # writes the footer
        Communicator(group).sum_(self.sums)
        return on_this_rank(lambda: [describe_parquet(folder, name)], group)

    def details(self, source: Source) -> dict[str, Any]:
        """The manifest without its request."""
        without, items, unknown, short = self.sums.tolist()
        return {
            "catalog_version": self.histories.catalog.version,
            "scores": "cosine" if source.config.loss.normalize else "inner product",
            "counts": {
                "users": self.histories.num_users,
                "users_without_history": without,
                "history_items": items,
                "unknown_items": unknown,
                "short_lists": short,
                **self.candidates.counts,
            },
        }

    def _rank(self, batch: "_Batch") -> tuple[Tensor, Tensor]:
        """Scores and items (B, k) of a batch, on the CPU."""
        device = self.model.device
        states = self.model.last_states(batch.items.to(device), batch.lengths.to(device))
        seen = (batch.seen[0].to(device), batch.seen[1].to(device))
        scores, items = top_items(
            states,
            self.shard,
            self.k,
            seen=seen if self.config.filter_seen else None,
            allowed=self.allowed,
            blocks=self.blocks,
        )
        return scores.cpu(), items.cpu()

    def _batches(self, writer: pq.ParquetWriter) -> Iterator["_Batch"]:
        """This rank's batches, equally many on every rank; writes a chunk after its last batch."""
        num_users, size = self.histories.num_users, self.config.batch_size
        first, last = (num_users * rank // self.size for rank in (self.rank, self.rank + 1))
        given = 0
        for chunk in self.histories.chunks(first, last, size * _BATCHES_PER_CHUNK):
            lists = _Lists.empty(len(chunk.user_ids), self.k)
            for rows in torch.argsort(chunk.offsets.diff(), stable=True).split(size):
                given += 1
                yield _Batch.of(chunk, rows, lists, self.max_length)
            self._count(chunk, lists)
            writer.write_table(lists.table(chunk.user_ids, self.histories.catalog, writer.schema))
        most = -(-num_users // self.size)
        for _ in range(given, -(-most // size)):
            yield _Batch.empty(self.k)

    def _count(self, chunk: HistoryChunk, lists: "_Lists") -> None:
        lengths = chunk.offsets.diff()
        short = ((lists.items[:, -1] < 0) | (self.k < self.config.k)) & (lengths > 0)
        numbers = [
            int((lengths == 0).sum()),
            len(chunk.items) + chunk.num_unknown,
            chunk.num_unknown,
            int(short.sum()),
        ]
        self.sums += torch.tensor(numbers, device=self.sums.device)


@dataclass(frozen=True, slots=True)
class _Lists:
    """Recommended lists of a chunk: scores and items (n, k); item -1 after the end of a list."""

    scores: Tensor
    items: Tensor

    @classmethod
    def empty(cls, num_users: int, k: int) -> "_Lists":
        items = torch.full((num_users, k), -1)
        return cls(torch.full((num_users, k), -math.inf), items)

    def put(self, rows: Tensor, scores: Tensor, items: Tensor) -> None:
        self.scores[rows], self.items[rows] = scores, items

    def table(self, user_ids: pa.Array, catalog: ItemIds, schema: pa.Schema) -> pa.Table:
        there = self.items >= 0
        offsets = torch.zeros(len(there) + 1, dtype=torch.int32)
        torch.cumsum(there.sum(1), 0, out=offsets[1:])
        ids, scores = catalog.of(self.items[there].numpy()), pa.array(self.scores[there].numpy())
        columns = [pa.ListArray.from_arrays(offsets.numpy(), values) for values in (ids, scores)]
        return pa.table([user_ids, *columns], schema=schema)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Users of a chunk that have a history; B may be 0."""

    items: Tensor  # (B, L) last items of each history, right padded
    lengths: Tensor  # (B,)
    seen: tuple[Tensor, Tensor]  # whole histories, values and lengths
    rows: Tensor  # (B,) positions of the users in the chunk
    lists: _Lists  # of the chunk

    @classmethod
    def of(cls, chunk: HistoryChunk, rows: Tensor, lists: _Lists, max_length: int) -> "_Batch":
        rows = rows[chunk.offsets.diff()[rows] > 0]
        seen = gathered(chunk.items, chunk.offsets, rows)
        lengths = seen[1].clamp(max=max_length)
        items, _, _ = padded(chunk.items, chunk.offsets[rows + 1] - lengths, lengths)
        return cls(items, lengths, seen, rows, lists)

    @classmethod
    def empty(cls, k: int) -> "_Batch":
        none = torch.zeros(0, dtype=torch.int64)
        return cls(none.new_zeros(0, 1), none, (none, none), none, _Lists.empty(0, k))


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Which items may be recommended at all."""

    allowed: Tensor  # (V,) bool
    counts: dict[str, int]  # how many were left out, and why

    @property
    def digest(self) -> str:
        """Short hash of ``allowed``."""
        return hashlib.sha256(self.allowed.numpy().tobytes()).hexdigest()[:16]

    @classmethod
    def read(cls, config: RecommendConfig, prepared: Prepared) -> "_Candidates":
        allowed = prepared.item_counts() >= config.min_count
        counts = {"items": prepared.num_items, "untrained_items": int((~allowed).sum())}
        catalog = ItemIds(prepared.item_ids())
        for name, path in (("allow", config.allow), ("deny", config.deny)):
            if path is not None:
                named = catalog.items(_read_list(name, path))
                counts[f"{name}_unknown_items"] = int((named < 0).sum())
                listed = torch.zeros_like(allowed)
                listed[named[named >= 0]] = True
                allowed &= listed if name == "allow" else ~listed
        counts["candidates"] = int(allowed.sum())
        if not counts["candidates"]:
            raise ValueError(
                "allow, deny and min_count must leave at least one item, got none of "
                f"{prepared.num_items} items; check that the lists hold ids of this catalog"
            )
        return cls(allowed, counts)


def _open_histories(config: RecommendConfig, prepared: Prepared) -> Histories:
    catalog = ItemIds(prepared.item_ids())
    if config.histories is not None:
        users, items = config.user_column, config.items_column
        return Histories(config.histories, catalog, users=users, items=items)
    path = prepared.file(f"{config.split}.parquet")
    return Histories(str(path), catalog, users="user_id", items="items", dense=True)


def _read_list(name: str, source: str) -> pa.Array:
    """The column ``item_id`` of some Parquet files."""
    filesystem, paths = find_files(source, name)
    tables = []
    for path in paths:
        names = pq.read_schema(path, filesystem=filesystem).names
        if "item_id" not in names:
            raise ValueError(
                f"{name} must be Parquet with a column item_id, got {path!r} with "
                f"{', '.join(names)}; rename its column"
            )
        tables.append(
            pq.read_table(
                path,
                columns=["item_id"],
                filesystem=filesystem,
                page_checksum_verification=True,
            )
        )
    return pa.concat_tables(tables).column("item_id").combine_chunks()


def _request(config: RecommendConfig) -> dict[str, Any]:
    """The options that change the content, without those about how it is computed."""
    how = ("run", "prepared", "output", "force", "batch_size", "block_states", "block_rows")
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in how}
