"""What travels between ranks when a catalog is ranked: states, ragged items, candidates, counts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from shardrec.modules.shard import RowShard

__all__ = ["Ragged", "Ranks", "real_rows", "rounds"]

Ragged = tuple[Tensor, Tensor]
"""Items of several users: values (sum of lengths,) int64 and lengths (B,) int64."""


class Ranks:
    """The collectives of a group; without a group each hands back what it got."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        """Look up this rank's place in ``group``."""
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def agree(
        self, states: Tensor, shard: RowShard, refusal: str | None, form: tuple[int, ...]
    ) -> list[int]:
        """Number of states by rank.

        Raises on every rank when one of them refuses its arguments, when ``form`` (what decides
        which collectives follow) differs between ranks, or when the shards leave a gap.
        """
        num_states = len(states) if states.dim() else 0
        header = [num_states, len(real_rows(shard)), refusal is not None, *form]
        table = self.gather(torch.tensor([header], device=states.device), [1] * self.size)
        if refusal is not None:
            raise ValueError(refusal)
        refused = table[:, 2].nonzero().flatten().tolist()
        if refused:
            raise ValueError(
                f"arguments must fit on every rank, got a refusal on ranks {refused}; "
                "the error there says why"
            )
        if (table[:, 3:] != table[0, 3:]).any():
            raise ValueError(
                "k, the presence of seen items and blocks must be the same on every rank, got "
                f"{table[:, 3:].tolist()}; pass the same options everywhere"
            )
        if self.group is not None and int(table[:, 1].sum()) != shard.num_rows:
            raise ValueError(
                f"the shards of all ranks must hold {shard.num_rows} rows together, got "
                f"{int(table[:, 1].sum())}; check num_rows and first_row of each RowShard"
            )
        return table[:, 0].tolist()

    def gather(self, values: Tensor, sizes: list[int], start: int = 0) -> Tensor:
        """Values of all ranks in rank order: ``sizes[rank]`` of each, from ``start`` on."""
        local = values[start : start + sizes[self.rank]]
        if self.group is None or max(sizes) == 0:
            return local
        padded = local.new_zeros(max(sizes), *local.shape[1:])
        padded[: len(local)] = local
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def gather_ragged(self, ragged: Ragged, sizes: list[int], start: int) -> Ragged:
        """Items of a chunk of states, and the column (index in the chunk) of each."""
        values, lengths = ragged
        first = int(lengths[:start].sum())
        lengths = self.gather(lengths, sizes, start)
        per_rank = [int(part.sum()) for part in lengths.split(sizes)]
        return self.gather(values, per_rank, first), torch.repeat_interleave(lengths)

    def send_back(self, found: Tensor, sizes: list[int]) -> Tensor:
        """(all states, k) candidates of this shard -> (own states, W * k) of all shards."""
        if self.group is None:
            return found
        own = sizes[self.rank]
        parts = found.new_empty(self.size * own, found.shape[1])
        splits = [own] * self.size
        dist.all_to_all_single(parts, found.contiguous(), splits, sizes, group=self.group)
        return parts.view(self.size, own, found.shape[1]).transpose(0, 1).flatten(1)

    def owned(self, columns: Tensor, sizes: list[int]) -> Tensor:
        """Mask of the gathered items whose states are this rank's own."""
        first = sum(sizes[: self.rank])
        return (columns >= first) & (columns < first + sizes[self.rank])

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def require_numbers(self, scores: Tensor) -> None:
        """Raises on every rank when one of them met NaN."""
        bad = self.sum(scores.isnan().sum())
        if bad:
            raise ValueError(
                f"scores must be numbers, got {int(bad)} NaN; the model or the table has diverged"
            )


def rounds(counts: list[int], num_states: int) -> Iterator[tuple[int, list[int]]]:
    """First state of each chunk, and how many each rank has in it.

    >>> list(rounds([3, 0], num_states=4))
    [(0, [2, 0]), (2, [1, 0])]
    """
    share = max(1, num_states // len(counts))
    for start in range(0, max(counts), share):
        yield start, [min(max(count - start, 0), share) for count in counts]


def real_rows(shard: RowShard) -> Tensor:
    """(R, D) rows of a shard without padding beyond the table's end; no gradient."""
    return shard.rows.detach()[: max(0, shard.num_rows - shard.first_row)]
