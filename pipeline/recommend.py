"""The recommend stage: write each user's best items as Parquet (user_id, item_ids, scores).

Each rank streams a contiguous share of the users and writes their rows, in the order of the
histories; the table stays sharded.
"""

import dataclasses
import hashlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardrec.kernels.ranks.communicator import Communicator
from shardrec.modules.ranking import Blocks, by_popularity
from shardrec.pipeline.log.user_lists import UserLists
from shardrec.pipeline.model.baseline_ranker import BaselineRanker
from shardrec.pipeline.model.config import TIES, describe_lists
from shardrec.pipeline.model.lists import Lists, list_schema
from shardrec.pipeline.model.ranker import Ranker, StateRanker
from shardrec.pipeline.outputs.files import FileEntry, describe_parquet
from shardrec.pipeline.outputs.formats import RECOMMENDATIONS
from shardrec.pipeline.outputs.stage_output import StageOutput
from shardrec.pipeline.prepared.batches import gathered, padded
from shardrec.pipeline.prepared.data_files import read_item_ids
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.prepared.histories import Histories, HistoryChunk
from shardrec.pipeline.prepared.item_ids import ItemIds
from shardrec.pipeline.ranked import find_ranked
from shardrec.pipeline.ranks import default_group, in_step, on_first_rank, on_this_rank

__all__ = ["RecommendConfig", "Recommendations", "recommend"]

_BATCHES_PER_CHUNK = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class RecommendConfig:
    """Options of ``recommend``: users, candidates and list length.

    Attributes:
        run: run folder of train, or the folder of a baseline.
        prepared: the folder the run was trained on; holds the item ids.
        output: folder to write, new or empty.
        histories: Parquet of users and lists of item ids, most recent last; none: the users of
            split in the prepared folder.
        events: instead of histories, an event log, as prepare reads it.
        split: which users of the prepared folder, if there are neither histories nor events.
        user_column: column of the user ids in histories or events, integers or strings; written
            unchanged.
        items_column: column of the lists of item ids in histories.
        item_column, time_column: columns of the events.
        k: number of items for each user.
        vectors: write the model's state of each user too, in a column vector; its inner products
            with the item vectors of an export are the scores without a memory's share.
        filter_seen: leave out items of the user's history.
        allow: Parquet with a column item_id; only these items are recommended.
        deny: Parquet with a column item_id; these items are never recommended.
        min_count: fewest training events of an item to be recommended; the vector of an item
            without any is untrained.
        checkpoint: the weights to load.
        force: replace an earlier output of this stage.
        batch_size: users per batch on each rank.
        block_states: states, over all ranks, that are scored at a time.
        block_rows: rows of a shard that are scored at a time.
    """

    run: str
    prepared: str
    output: str
    histories: str | None = None
    events: str | None = None
    split: Literal["validation", "test"] = "test"
    user_column: str = "user_id"
    items_column: str = "items"
    item_column: str = "item_id"
    time_column: str = "timestamp"
    k: int = 10
    vectors: bool = False
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
        if self.histories is not None and self.events is not None:
            raise ValueError(
                f"histories must come without events, got {self.histories} and {self.events}; "
                "remove one"
            )
        if self.min_count < 0:
            raise ValueError(f"min_count must be at least 0, got {self.min_count}; 0 takes all")


@dataclass(frozen=True, slots=True)
class Recommendations:
    """The output of ``recommend``.

    Attributes:
        manifest: manifest of the output folder; its ``counts`` say what was skipped.
        is_new: False if the output was there and nothing had to be done.
        seconds: wall time, including loading the model.
        users_per_second: number of users divided by the time after loading; 0 if nothing was done.
    """

    manifest: dict[str, Any] = field(repr=False)
    is_new: bool
    seconds: float
    users_per_second: float


@torch.no_grad()
def recommend(config: RecommendConfig, *, encoder: nn.Module | None = None) -> Recommendations:
    """Write the ``k`` best items of every user; the lists are the same on any number of ranks.

    Every history gives one row; the part files, read in the order of their names, keep the input
    order. Items that the catalog lacks are counted and skipped; a user without a known item gets
    the most popular items, with null for the scores. A list is shorter than ``k`` if fewer items
    are left.

    Args:
        config: users and options; the same on every rank.
        encoder: the module given to ``train``, if any.

    Returns:
        The manifest, the same on every rank, whether it is new, and the rate.

    Raises:
        FileNotFoundError: there is no run, no data, no histories or no complete checkpoint.
        FileExistsError: the output folder holds something else.
        ValueError: the run was not trained on this data, or an input does not fit the catalog.

    Collectives: many, on the default group; every rank must call it.
    """
    started, group = time.monotonic(), default_group()
    prepared = on_this_rank(lambda: Prepared.open(config.prepared), group)
    blocks = Blocks(states=config.block_states, rows=config.block_rows)
    ranked = find_ranked(config.run, prepared, config.checkpoint, encoder, blocks)
    source, candidates = on_this_rank(
        lambda: (_open_histories(config, prepared), _Candidates.read(config, prepared)), group
    )
    request = _request(config) | {
        "source": ranked.identity,
        "histories": source.files,
        "candidates": candidates.digest,
    }
    path = Path(config.output)
    output = StageOutput(
        path=path, format=RECOMMENDATIONS, request=request, force=config.force, group=group
    )
    found = output.find()
    if found is not None:
        return Recommendations(found, False, time.monotonic() - started, 0.0)
    ranker, _ = ranked.load()
    _check_vectors(config, ranker)
    counts = on_this_rank(prepared.item_counts, group)
    fallback = BaselineRanker.of_order(by_popularity(counts), group)
    loaded = time.monotonic()
    with output.write() as (folder, temporary):
        histories = _lists_of(source, prepared, temporary, group)
        work = _Work(config, ranker, fallback, histories, candidates)
        files = work.write(folder)
        manifest = output.finish(lambda: work.details(ranked.scores), folder, files)
    _warn_of_unknown(manifest["counts"], group)
    done = time.monotonic()
    rate = histories.num_users / max(1e-9, done - loaded)
    return Recommendations(manifest, True, done - started, rate)


class _Work:
    """Writes the lists of this rank's share of the users."""

    def __init__(
        self,
        config: RecommendConfig,
        ranker: Ranker,
        fallback: Ranker,
        histories: Histories,
        candidates: "_Candidates",
    ) -> None:
        self.config, self.ranker, self.fallback = config, ranker, fallback
        self.histories, self.candidates = histories, candidates
        self.k = min(config.k, len(candidates.allowed))  # no list is longer
        self.width = 0
        if config.vectors and isinstance(ranker, StateRanker):
            self.width = ranker.shard.rows.shape[1]
        self.allowed = None if candidates.allowed.all() else candidates.allowed
        self.rank, self.size = Communicator(ranker.group).rank, Communicator(ranker.group).size
        # users without history, items of histories, unknown items, lists shorter than k
        self.sums = torch.zeros(4, dtype=torch.int64, device=ranker.device)

    def write(self, folder: Path) -> list[FileEntry]:
        name = f"part-{self.rank:05d}-of-{self.size:05d}.parquet"
        ids = self.histories.catalog.ids.type
        schema = list_schema("user_id", self.histories.user_type, ids, self.width)
        group = self.ranker.group
        with on_this_rank(lambda: pq.ParquetWriter(folder / name, schema), group) as writer:
            for batch in in_step(self._batches(writer), group, self.ranker.device):
                batch.lists.put(batch.rows, *self._rank(batch))
            on_this_rank(writer.close, group)  # writes the footer
        Communicator(group).sum_(self.sums)
        return on_this_rank(lambda: [describe_parquet(folder, name)], group)

    def details(self, scores: str) -> dict[str, Any]:
        """The manifest without its request."""
        without, items, unknown, short = self.sums.tolist()
        return {
            "catalog_version": self.histories.catalog.version,
            "scores": scores,
            "protocol": describe_lists(self.config.filter_seen, self.config.min_count),
            "counts": {
                "users": self.histories.num_users,
                "users_without_history": without,
                "history_items": items,
                "unknown_items": unknown,
                "short_lists": short,
                **self.candidates.counts,
            },
        }

    def _rank(self, batch: "_Batch") -> list[Tensor]:
        """Scores and items (B, k) of a batch, and (B, D) vectors if asked for, on the CPU."""
        device, ranker, vectors = self.ranker.device, self.ranker, list[Tensor]()
        seen = (batch.seen[0].to(device), batch.seen[1].to(device))
        items, lengths = batch.items.to(device), batch.lengths.to(device)
        if self.width:
            assert isinstance(ranker, StateRanker)
            vectors = [ranker.scorer(items, lengths)]
            ranker = dataclasses.replace(ranker, scorer=lambda *_: vectors[0])
        found = ranker.top(
            items,
            lengths,
            self.k,
            seen if self.config.filter_seen else None,
            None if self.allowed is None else self.allowed.to(device),
        )
        return [one.cpu() for one in (*found, *vectors)]

    def _popular(self) -> Tensor:
        """(k,) the list of a user without history; -1 at the end of a short one."""
        none = torch.zeros(1, dtype=torch.int64)
        return self.fallback.top(none[:, None], none, self.k, None, self.allowed)[1][0]

    def _batches(self, writer: pq.ParquetWriter) -> Iterator["_Batch"]:
        """This rank's batches, equally many on every rank; writes a chunk after its last batch."""
        num_users, size = self.histories.num_users, self.config.batch_size
        first, last = (num_users * rank // self.size for rank in (self.rank, self.rank + 1))
        given, popular = 0, self._popular()
        for chunk in self.histories.chunks(first, last, size * _BATCHES_PER_CHUNK):
            lists = Lists.of_everybody(popular, len(chunk.user_ids), self.width)
            for rows in torch.argsort(chunk.offsets.diff(), stable=True).split(size):
                given += 1
                yield _Batch.of(chunk, rows, lists, self.ranker.max_length)
            self._count(chunk, lists)
            writer.write_table(lists.table(chunk.user_ids, self.histories.catalog, writer.schema))
        most = -(-num_users // self.size)
        for _ in range(given, -(-most // size)):
            yield _Batch.empty(self.k, self.width)

    def _count(self, chunk: HistoryChunk, lists: Lists) -> None:
        lengths = chunk.offsets.diff()
        short = (lists.items[:, -1] < 0) | (self.k < self.config.k)
        numbers = [
            int((lengths == 0).sum()),
            len(chunk.items) + chunk.num_unknown,
            chunk.num_unknown,
            int(short.sum()),
        ]
        self.sums += torch.tensor(numbers, device=self.sums.device)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Users of a chunk that have a history; B may be 0."""

    items: Tensor  # (B, L) last items of each history, right padded
    lengths: Tensor  # (B,)
    seen: tuple[Tensor, Tensor]  # whole histories, values and lengths
    rows: Tensor  # (B,) positions of the users in the chunk
    lists: Lists  # of the chunk

    @classmethod
    def of(cls, chunk: HistoryChunk, rows: Tensor, lists: Lists, max_length: int) -> "_Batch":
        rows = rows[chunk.offsets.diff()[rows] > 0]
        seen = gathered(chunk.items, chunk.offsets, rows)
        lengths = seen[1].clamp(max=max_length)
        items, _, _ = padded(chunk.items, chunk.offsets[rows + 1] - lengths, lengths)
        return cls(items, lengths, seen, rows, lists)

    @classmethod
    def empty(cls, k: int, width: int) -> "_Batch":
        none = torch.zeros(0, dtype=torch.int64)
        lists = Lists.of_everybody(none.new_zeros(k), 0, width)
        return cls(none.new_zeros(0, 1), none, (none, none), none, lists)


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
                named = catalog.items(read_item_ids(name, path))
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


def _warn_of_unknown(counts: dict[str, int], group: dist.ProcessGroup | None) -> None:
    """Warn if many items of the histories are unknown: they may be ids of another catalog."""
    unknown, total = counts["unknown_items"], counts["history_items"]
    if unknown > total / 10 and Communicator(group).rank == 0:
        message = "%.0f %% of the items in the histories are not in the catalog (%d of %d): %s"
        advice = "check that they are ids of the log that was prepared"
        logging.getLogger(__name__).warning(message, 100 * unknown / total, unknown, total, advice)


def _open_histories(config: RecommendConfig, prepared: Prepared) -> Histories | UserLists:
    user = config.user_column
    if config.events is not None:
        return UserLists.open(config.events, user, config.item_column, config.time_column)
    catalog = ItemIds(prepared.item_ids())
    if config.histories is not None:
        return Histories(config.histories, catalog, users=user, items=config.items_column)
    path = prepared.file(f"{config.split}.parquet")
    return Histories(str(path), catalog, users="user_id", items="items", dense=True)


def _lists_of(
    source: Histories | UserLists,
    prepared: Prepared,
    folder: Path,
    group: dist.ProcessGroup | None,
) -> Histories:
    """The histories; those of an event log are sorted into ``folder`` by rank 0 first."""
    if isinstance(source, Histories):
        return source
    path = str(on_first_rank(lambda: source.write(folder), group))
    catalog = ItemIds(prepared.item_ids())
    return on_this_rank(lambda: Histories(path, catalog, users="user_id", items="items"), group)


def _check_vectors(config: RecommendConfig, ranker: Ranker) -> None:
    if config.vectors and not isinstance(ranker, StateRanker):
        raise ValueError(
            f"vectors must be false for a baseline, got true for {config.run}, which has no states "
            "of users; name the run of a model"
        )


def _request(config: RecommendConfig) -> dict[str, Any]:
    """The options that change the content, without those about how it is computed."""
    how = ("run", "prepared", "output", "force", "batch_size", "block_states", "block_rows")
    asked = {name: value for name, value in dataclasses.asdict(config).items() if name not in how}
    if config.events is None:  # lists of earlier versions do not name these
        for name in ("events", "item_column", "time_column"):
            del asked[name]
    if not config.vectors:
        del asked["vectors"]
    return asked | {"ties": TIES}
