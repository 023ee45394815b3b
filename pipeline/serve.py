"""Recommend from an export, in one process, without the training stack.

Needs torch, numpy, pyarrow and safetensors: no TorchRec, no fbgemm, no process group; FAISS only
for approximate search.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardrec.kernels.shard import RowShard
from shardrec.modules.memory import Memory, recent_items
from shardrec.modules.option_checks import require_at_least, require_choice
from shardrec.modules.ranking import by_popularity, top_items
from shardrec.pipeline.prepared.item_ids import ItemIds
from shardrec.pipeline.served.ann_index import (
    INDEX,
    index_top_items,
    index_top_with,
    open_index,
)
from shardrec.pipeline.served.encoder_file import read_encoder, require_trust
from shardrec.pipeline.served.items import known_ids, read_items
from shardrec.pipeline.served.memory import SUCCESSORS, read_memory
from shardrec.pipeline.served.pointer import export_folder, read_export

__all__ = ["Recommender", "read_recommender"]

ItemId = int | str
# Longest history that an index is asked to search beyond; longer ones are searched exactly.
_MOST_HIDDEN = 4096


@dataclass(frozen=True, slots=True, repr=False)
class Recommender:
    """Recommends with an exported encoder and the item vectors it was trained with.

    Attributes:
        manifest: manifest of the export: run, data, catalog version.
        ids: item id of each row of ``vectors``.
        vectors: (V, D) float32 input vectors of the encoder.
        scored: (V, D) float32 rows to score states against: ``vectors``, or these at unit length.
        allowed: (V,) bool, items that may be recommended.
        popular: (V,) int64 items, by falling number of training events.
        encoder: module from (B, L, D) to (B, L, D); also takes (B,) lengths if
            ``manifest["reads_lengths"]``.
        index: FAISS index to search instead of all vectors; None searches exactly.
        memory: adds scores to successors of recent items; None adds nothing.
    """

    manifest: dict[str, Any]
    ids: ItemIds
    vectors: Tensor
    scored: Tensor
    allowed: Tensor
    popular: Tensor
    encoder: nn.Module
    index: Any = None
    memory: Memory | None = None

    def __repr__(self) -> str:
        """The numbers of items and their width, and the version of the catalog."""
        size = f"{len(self.ids):,} items of width {self.vectors.shape[1]}"
        how = "exact" if self.index is None else "approximate"
        return f"Recommender({size}, catalog {self.manifest['catalog_version']}, {how} search)"

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        catalog_version: str | None = None,
        min_count: int = 1,
        approximate: bool = False,
        trust_code: bool = False,
    ) -> "Recommender":
        """Load an export after checking that its files belong together.

        No code in the files is run unless ``trust_code`` is set.

        Args:
            folder: output of ``shardrec export``, or the pointer of ``shardrec publish``.
            catalog_version: the catalog version that the export must have; None accepts any.
            min_count: fewest training events of an item to be recommended; 0 accepts all.
            approximate: search the index of `shardrec export --faiss`, which holds the items with
                a training event; exactly where it finds too few items for a list.
            trust_code: also open files that can run arbitrary code: an encoder.pt2 (a user-supplied
                encoder, or an export of version 0.2.0 or earlier) and a FAISS index. Set it only
                for exports that you made, or that come from someone you trust.

        Raises:
            FileNotFoundError: the export is not complete.
            ValueError: a file has changed since the export, the catalog version differs, there is
                no index to search, or a file could run code and ``trust_code`` is not set.
        """
        folder = export_folder(Path(folder))
        manifest = read_export(folder)
        if approximate:
            _require_index(folder, manifest, min_count)
            require_trust(folder / INDEX, "a file of FAISS", trust_code, "search exactly")
        served = read_recommender(folder, manifest, min_count, trust_code=trust_code)
        if catalog_version is not None:
            _require_version(catalog_version, served.ids.version, f"export {folder}")
        index = open_index(folder / INDEX) if approximate else None
        return dataclasses.replace(served, index=index)

    @torch.no_grad()
    def recommend(
        self,
        histories: Sequence[Sequence[ItemId]],
        k: int = 10,
        *,
        filter_seen: bool = True,
        allow: Sequence[ItemId] | None = None,
        deny: Sequence[ItemId] = (),
    ) -> list[list[tuple[ItemId, float]]]:
        """The ``k`` best items and their scores for each history.

        Args:
            histories: item ids of each user, most recent last; ids that the catalog lacks are
                skipped.
            k: length of the lists, at least 1.
            filter_seen: leave out items of the history.
            allow: ids of the only items to return in this call; None allows all that may be
                recommended. With ``allow`` or ``deny`` the search is exact.
            deny: ids of items not to return in this call.

        Returns:
            For each history a list of at most ``k`` pairs (id, score), best first. If no item of a
            history is known, it holds the most popular items, with NaN for the scores.

        Raises:
            TypeError: an id is not of the catalog's type; the message says which.
            ValueError: ``k`` is below 1.
        """
        require_at_least("k", k, 1)
        kind = self.ids.ids.type
        lists = [*known_ids(histories, kind), *known_ids([allow or ()], kind, "allow")]
        lists += known_ids([deny], kind, "deny")
        *known, named, denied = self._items(lists)
        allowed = self._allowed(None if allow is None else named, denied)
        k = min(k, len(self.ids))
        rows = [index for index, items in enumerate(known) if len(items)]
        popular = self.popular[allowed[self.popular]][:k]
        fallback = [(name, math.nan) for name in self.ids.of(popular.numpy()).to_pylist()]
        result: list[list[tuple[ItemId, float]]] = [list(fallback) for _ in histories]
        if not rows:
            return result
        asked = [known[row] for row in rows]
        scores, items = self._top(asked, k, filter_seen, allowed)
        for row, own_scores, own_items in zip(rows, scores, items, strict=True):
            result[row] = self._named(own_scores, own_items)
        return result

    @torch.no_grad()
    def similar(self, items: Sequence[ItemId], k: int = 10) -> list[list[tuple[ItemId, float]]]:
        """The ``k`` nearest items of each item by the cosine of their vectors, without itself.

        Args:
            items: item ids.
            k: length of the lists, at least 1.

        Returns:
            For each item a list of at most ``k`` pairs (id, cosine), best first; empty for an id
            that the catalog lacks.

        Raises:
            TypeError: an id is not of the catalog's type.
            ValueError: ``k`` is below 1.
        """
        require_at_least("k", k, 1)
        known = self.ids.items(next(known_ids([items], self.ids.ids.type, "items")))
        there = known[known >= 0]
        unit = F.normalize(self.vectors)
        shard = RowShard(unit, 0, len(self.ids), None)
        seen = there, torch.ones_like(there)
        k = min(k, len(self.ids))
        found = zip(*top_items(unit[there], shard, k, seen=seen, allowed=self.allowed), strict=True)
        return [self._named(*next(found)) if item >= 0 else [] for item in known.tolist()]

    def states(self, histories: Sequence[Tensor]) -> Tensor:
        """(B, D) float32 states after the last item of each non-empty history of dense indices.

        With a memory and cosine scores the states have unit length, because the memory's scores are
        added to cosines.
        """
        padded, lengths = self._padded(histories)
        # Exports of 0.2.0 and before do not say it: none of their encoders did.
        others = (lengths,) if self.manifest.get("reads_lengths", False) else ()
        states: Tensor = self.encoder(self.vectors[padded], *others)
        last = states[torch.arange(len(lengths)), lengths - 1]
        is_cosine = self.manifest["scores"] == "cosine"
        return F.normalize(last) if is_cosine and self.memory is not None else last

    def _padded(self, histories: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(B, L) the last items that the encoder reads, padded on the right, and (B,) lengths."""
        recent = [items[-self.manifest["max_length"] :] for items in histories]
        lengths = torch.tensor([len(items) for items in recent])
        return nn.utils.rnn.pad_sequence(recent, batch_first=True), lengths

    def _items(self, lists: Sequence[pa.Array]) -> list[Tensor]:
        """The known items of each list of ids; the catalog is read once for all of them."""
        items = self.ids.items(pa.chunked_array(lists)).split([len(ids) for ids in lists])
        return [one[one >= 0] for one in items]

    def _allowed(self, named: Tensor | None, denied: Tensor) -> Tensor:
        """(V,) bool; ``self.allowed`` itself where a request changes nothing."""
        if named is None and not len(denied):
            return self.allowed
        allowed = self.allowed.clone()
        if named is not None:
            only = torch.zeros_like(allowed)
            only[named] = True
            allowed &= only
        allowed[denied] = False
        return allowed

    def _named(self, scores: Tensor, items: Tensor) -> list[tuple[ItemId, float]]:
        """A list as pairs of id and score; -1 ends a short one."""
        there = items >= 0
        names = self.ids.of(items[there].numpy()).to_pylist()
        return list(zip(names, scores[there].tolist(), strict=True))

    def _top(
        self, histories: Sequence[Tensor], k: int, filter_seen: bool, allowed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scores and items (B, k), by the index where there is one and where it finds enough."""
        lengths = torch.tensor([len(items) for items in histories])
        seen = (torch.cat(list(histories)), lengths) if filter_seen else None
        states, recent = self.states(histories), None
        if self.memory is not None:
            padded, read = self._padded(histories)
            is_history = torch.arange(padded.shape[1]) < read[:, None]
            recent = recent_items(padded, is_history, self.memory.ages)
        hidden = int(lengths.max()) if filter_seen else 0
        if self.index is None or allowed is not self.allowed or hidden > _MOST_HIDDEN:
            return top_items(
                states,
                RowShard(self.scored, 0, len(self.ids), None),
                k,
                seen=seen,
                allowed=allowed,
                memory=self.memory,
                recent=recent,
            )
        if self.memory is None or recent is None:
            scores, items = index_top_items(self.index, states, k, seen)
        else:
            added = self.memory.scores(recent)
            added = added.where(allowed[added.items])
            scores, items = index_top_with(self.index, states, k, seen, added, self.scored)
        short = (items[:, -1] < 0).nonzero()[:, 0]
        if len(short):  # few lists were probed, or many equal vectors hide the others
            exact, asked = dataclasses.replace(self, index=None), [histories[row] for row in short]
            scores[short], items[short] = exact._top(asked, k, filter_seen, allowed)
        return scores, items


def read_recommender(
    folder: Path, manifest: dict[str, Any], min_count: int, *, trust_code: bool
) -> Recommender:
    """A recommender with exact search, from the files of an export; arguments as in ``open``.

    Raises:
        ValueError: the items differ from those in the manifest, or the encoder is refused.
    """
    require_choice(f"scores of {folder}", manifest["scores"], ("cosine", "inner product"))
    require_at_least(f"max_length of {folder}", manifest["max_length"], 1, "export the run again")
    ids, counts, vectors = read_items(folder, manifest)
    _require_version(manifest["catalog_version"], ids.version, f"items of {folder}")
    scored = F.normalize(vectors) if manifest["scores"] == "cosine" else vectors
    encoder = read_encoder(folder, manifest, trust_code=trust_code)
    popular, allowed, memory = by_popularity(counts), counts >= min_count, None
    if "memory" in manifest:
        rows = range(len(ids))
        path = folder / SUCCESSORS
        memory = read_memory(path, manifest["memory"], len(ids), rows, vectors.device)
    return Recommender(manifest, ids, vectors, scored, allowed, popular, encoder, memory=memory)


def _require_index(folder: Path, manifest: dict[str, Any], min_count: int) -> None:
    if INDEX not in {entry["path"] for entry in manifest["files"]}:
        raise ValueError(
            f"an export must hold an index for approximate search, got none in {folder}; "
            "export with --faiss HNSW32, or search exactly"
        )
    if min_count != 1:
        raise ValueError(
            f"min_count must be 1 for approximate search, got {min_count}; the index holds the "
            "items with a training event: search exactly"
        )


def _require_version(expected: str, found: str, what: str) -> None:
    if expected != found:
        raise ValueError(
            f"{what} must be of catalog version {expected}, got {found}; an index means another "
            "item there: export a run that was trained on this catalog"
        )
