"""A FAISS index over exported item vectors: approximate search where exact search is too slow.

It holds only items with a training event. ``faiss`` is imported by the functions that need it, so
that exports without an index do not depend on it.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardrec.kernels.shard import RowShard
from shardrec.modules.memory import PairScores
from shardrec.modules.ranking import top_items

__all__ = ["INDEX", "IndexConfig", "build_index", "index_top_items", "index_top_with", "open_index"]

INDEX = "items.faiss"
RECALL_K, _LEAST_RECALL = 10, 0.8


@dataclass(frozen=True, slots=True)
class IndexConfig:
    """Options of an index.

    Attributes:
        factory: a string of ``faiss.index_factory``, such as HNSW32 or IVF1024,Flat.
        search: parameters of the search, such as efSearch=128 or nprobe=16; stored in the index.
    """

    factory: str
    search: str | None = None

    def empty(self, width: int) -> Any:
        """An empty FAISS index for inner products of vectors of this width.

        Raises:
            ValueError: FAISS does not know the factory string or a parameter.
        """
        import faiss

        try:
            index = faiss.index_factory(width, f"IDMap2,{self.factory}", faiss.METRIC_INNER_PRODUCT)
            if self.search is not None:
                parameters: Any = faiss.ParameterSpace()  # annotated for one overload only
                parameters.set_index_parameters(index, self.search)
        except RuntimeError as error:
            raise ValueError(
                f"faiss must be an index that FAISS can make for width {width}, got "
                f"{self.factory!r} with {self.search!r} and {str(error).splitlines()[-1]}; "
                "use HNSW32 with efSearch=64, or IVF1024,Flat with nprobe=16"
            ) from error
        return index


def build_index(
    path: Path, config: IndexConfig, scored: Tensor, allowed: Tensor, states: Tensor
) -> dict[str, Any]:
    """Write an index of the allowed rows; returns its options, size and recall.

    Args:
        path: the file to write.
        config: options of the index.
        scored: (V, D) float32 rows to score states against.
        allowed: (V,) bool, items to put into the index.
        states: (Q, D) float32 queries to measure the recall on.

    Returns:
        JSON: the options, the number of items, and the recall@10 of the queries relative to exact
        search. A low recall is warned of: a graph such as HNSW leads astray where many vectors are
        equal.

    Raises:
        ValueError: FAISS does not know the options, or has too few rows to train them.
    """
    import faiss

    index, items = config.empty(scored.shape[1]), allowed.nonzero()[:, 0]
    rows = scored[items].numpy()
    try:
        index.train(rows)
    except RuntimeError as error:
        raise ValueError(
            f"faiss must be an index that {len(items):,} items can train, got {config.factory!r} "
            f"and {str(error).splitlines()[-1]}; ask for fewer lists, or for HNSW32"
        ) from error
    index.add_with_ids(rows, items.numpy())
    faiss.write_index(index, str(path))
    recall = _recall(index, scored, allowed, states)
    if recall < _LEAST_RECALL:
        message = (
            "the index finds only %.0f %% of the %d best items (%d of %d vectors are equal to "
            "another); search more widely (faiss_search), or exactly"
        )
        equal = len(items) - len(scored[items].unique(dim=0))
        logging.getLogger(__name__).warning(message, 100 * recall, RECALL_K, equal, len(items))
    return {
        "factory": config.factory,
        "search": config.search,
        "num_items": len(items),
        "queries": len(states),
        f"recall@{RECALL_K}": recall,
    }


def open_index(path: Path) -> Any:
    """The index in a file; FAISS does not validate it, so open only files that you trust."""
    import faiss

    return faiss.read_index(str(path))


def index_top_items(
    index: Any, states: Tensor, k: int, seen: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """(B, k) scores and (B, k) items that the index finds for each state, best first.

    Args:
        index: result of ``open_index``.
        states: (B, D) float32.
        k: length of the lists.
        seen: (S,) items that must not be returned, concatenated, and (B,) their number for each
            state; None excludes none.

    Returns:
        Scores (B, k) float32 and items (B, k) int64. Where fewer are found, the list ends with
        score -inf and item -1.
    """
    more = 0 if seen is None or not len(seen[1]) else int(seen[1].max())
    more = min(more, max(0, int(index.ntotal) - k))
    found = index.search(states.contiguous().numpy(), k + more)
    scores, items = (torch.from_numpy(part) for part in found)  # (B, k + more), items -1 at the end
    hidden = items < 0
    if seen is not None:
        values, lengths = seen
        size = int(torch.cat([items.reshape(-1), values]).max()) + 1
        pairs = torch.repeat_interleave(lengths) * size + values
        own = torch.arange(len(items))[:, None] * size + items
        hidden |= torch.isin(own, pairs)
    best, order = scores.masked_fill(hidden, -math.inf).topk(k)
    return best, items.gather(1, order).masked_fill_(best == -math.inf, -1)


def index_top_with(
    index: Any,
    states: Tensor,
    k: int,
    seen: tuple[Tensor, Tensor] | None,
    added: PairScores,
    scored: Tensor,
) -> tuple[Tensor, Tensor]:
    """(B, k) scores and (B, k) items by the index and a memory together, best first.

    The items in ``added`` are scored exactly; the index finds the best of all others.

    Args:
        index: result of ``open_index``.
        states: (B, D) float32.
        k: length of the lists.
        seen: (S,) items that must not be returned, concatenated, and (B,) their number for each
            state; None excludes none.
        added: scores that the memory adds to some items; only items that may be returned.
        scored: (V, D) float32 rows to score states against.

    Returns:
        As ``index_top_items``.
    """
    hidden = added.states * len(scored) + added.items
    if seen is not None:
        keys = torch.repeat_interleave(seen[1]) * len(scored) + seen[0]
        added = added.where(~torch.isin(hidden, keys))
        hidden = torch.cat([hidden, keys]).unique()
    lengths = torch.bincount(hidden // len(scored), minlength=len(states))
    scores, items = index_top_items(index, states, k, (hidden.sort()[0] % len(scored), lengths))
    own = added.scores + (scored[added.items] * states[added.states]).sum(1)
    more, more_items = _by_state(added.states, own, added.items, len(states))
    best, order = torch.cat([scores, more], 1).topk(k)
    return best, torch.cat([items, more_items], 1).gather(1, order)


def _by_state(
    owner: Tensor, scores: Tensor, items: Tensor, num_states: int
) -> tuple[Tensor, Tensor]:
    """Scores and items as (B, most) tensors, padded with -inf and -1."""
    order = owner.argsort(stable=True)
    counts = torch.bincount(owner, minlength=num_states)
    place = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner[order]]
    shape = num_states, int(counts.max()) if num_states else 0
    dense, columns = torch.full(shape, -math.inf), torch.full(shape, -1)
    dense[owner[order], place], columns[owner[order], place] = scores[order], items[order]
    return dense, columns


def _recall(index: Any, scored: Tensor, allowed: Tensor, states: Tensor) -> float:
    """Share of the exact best items that the index finds."""
    shard = RowShard(scored, 0, len(scored), None)
    _, exact = top_items(states, shard, RECALL_K, allowed=allowed)
    _, found = index_top_items(index, states, RECALL_K)
    hits = (found[:, :, None] == exact[:, None, :]) & (exact >= 0)[:, None, :]
    return round(float(hits.sum() / (exact >= 0).sum()), 6)
