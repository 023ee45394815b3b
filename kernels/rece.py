"""Reduced cross-entropy (RECE): candidates from neighbouring chunks of a random hash, over rounds.

Source: Gusak et al., "RECE: Reduced Cross-Entropy Loss for Large-Catalogue Sequential
Recommenders", arXiv 2408.02354. By default positions are aligned with items by bucket and not by
sort order alone, so that a position is compared with the items of its own bucket although buckets
hold different shares of positions and of items.

The phases, for each of r rounds (``hash_chunks.py`` has 1 to 3):

1. hash: positions and rows get the bucket of the nearest of n_b random sign vectors;
2. count: the histograms of buckets are all-gathered, so that every rank knows where its vectors
   come in the global sort by bucket;
3. cut: that order is cut into n_c chunks, saved for backward;
4. compare: the rows of a position's chunk, and of e chunks on either side, are its candidates
   (``NearbyChunks`` lists them, ``passes.py`` sums them).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardrec.kernels.block_logsumexp import NearbyChunks, RowIds, nearby
from shardrec.kernels.block_logsumexp.cpu_tiles import cpu_tiles
from shardrec.kernels.cost.terms import (
    LossCost,
    accumulator_bytes,
    listed_cost,
    select_cost,
    streaming_bytes,
)
from shardrec.kernels.cost.triton import Listed, listed_kernels, sign_kernels
from shardrec.kernels.hash_chunks import (
    gather_histogram,
    hash_buckets,
    index_dtype,
    item_chunks,
    position_chunks,
    sort_bytes,
)
from shardrec.kernels.loss.candidates import Candidates, Plan, Shape
from shardrec.kernels.loss.inputs import Inputs
from shardrec.kernels.loss.operator import Operator
from shardrec.kernels.loss.options import Common
from shardrec.kernels.ranks.chunks import Chunk
from shardrec.kernels.ranks.traffic import Workload, state_traffic
from shardrec.kernels.shard import RowShard

__all__ = [
    "default_num_buckets",
    "reduced_cross_entropy",
    "reduced_cross_entropy_cost",
]

_DTYPE_OF_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def default_num_buckets(num_positions: int, num_items: int, reach: int) -> int:
    """``sqrt(4 min(N, V) (1 + 2 e))``, at least 1: the paper's n_b for as many chunks as buckets.

    >>> default_num_buckets(10000, 50000, 1)
    346
    """
    fewer = torch.sym_min(num_positions, num_items)
    return torch.sym_max(1, round(torch.sym_sqrt(4 * fewer * (1 + 2 * reach))))


def reduced_cross_entropy(
    states: Tensor,
    table: Tensor | RowShard,
    targets: Tensor,
    *,
    num_buckets: int | None = None,
    num_chunks: int | None = None,
    num_rounds: int = 4,
    num_neighbor_chunks: int = 1,
    align: str = "bucket",
    seed: int,
    step: int = 0,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    temperature: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of every target among the rows that a random hash puts near its position.

    In each round positions and rows are sorted by the nearest of n_b random sign vectors and cut
    into n_c chunks; the candidates of a position are the rows of its chunk and of e chunks
    on either side. A candidate of several rounds counts once. Source: Gusak et al., arXiv
    2408.02354.

    Args:
        states: (N, D) float32, bfloat16 or float16.
        table: (V, D), same dtype except under autocast, or this rank's shard of it.
        targets: (N,) int64 or int32 in [0, V).
        num_buckets: n_b; ``sqrt(4 min(N, V) (1 + 2 e))`` when None.
        num_chunks: n_c; as many as buckets when None.
        num_rounds: r, rounds with hashes of their own.
        num_neighbor_chunks: e, chunks on either side of a position's own.
        align: "bucket" aligns positions with the items of their bucket; "rank" aligns them by
            sort order alone, as published.
        seed: Key of the random generator, a signed 64-bit integer.
        step: Training step; another step draws other vectors.
        weights: (N,) float weight of each position's loss, not negative; None for ones. The mean
            divides by the sum of the weights.
        reduction: "mean", "sum" or "none".
        normalize: Scale states and rows to unit L2 norm.
        temperature: Positive; divides the logits.
        backend: "auto" chooses by device and dtype; "torch" or "triton" forces one.

    Returns:
        () float32, or (N,) weighted losses with "none". Gradients flow to ``states`` and to the
        rows. With a shard, mean and sum are over all ranks; backward must run on all ranks, and
        gives each rank the gradient of this global loss for its own states and rows.

    Raises:
        TypeError: states and table differ in dtype without autocast or are not float, or targets
            are not int64 or int32.
        ValueError: a shape disagrees, or a target or weight is out of range, on any rank; an option
            is out of range, or ``weights`` require a gradient.
        RuntimeError: a second derivative is taken, or a number does not fit in 64 bits.

    Collectives: none for a tensor. For a shard those of ``cut_cross_entropy`` with the gradient in
    backward, and in forward two all-gathers of (r, n_b) int64 histograms.
    """
    _check_options(num_buckets, num_chunks, num_rounds, num_neighbor_chunks, align)
    common = Common(
        weights=weights,
        reduction=reduction,
        normalize=normalize,
        temperature=temperature,
        backend=backend,
    )
    candidates = HashedChunks(
        num_buckets=num_buckets,
        num_chunks=num_chunks,
        num_rounds=num_rounds,
        num_neighbor_chunks=num_neighbor_chunks,
        align=align,
        seed=seed,
        step=step,
    )
    return _reduced_cross_entropy(states, table, targets, common, candidates)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class HashedChunks(Candidates):
    """Candidates of ``reduced_cross_entropy``: items in chunks near the position's in some round.

    Attributes are the arguments of ``reduced_cross_entropy``.
    """

    num_buckets: int | None
    num_chunks: int | None
    num_rounds: int
    num_neighbor_chunks: int
    align: str
    seed: int
    step: int

    def choose(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """(N, r) int32 chunks of the positions and (R, r * itemsize) uint8 chunks of the rows.

        The chunks of the rows are of ``index_dtype(n_c)``, viewed as bytes.

        Collectives: two all-gathers of histograms.
        """
        num_buckets, num_chunks = self._numbers(inputs.layout.num_positions, inputs.num_items)
        row_buckets, own_buckets = (
            hash_buckets(
                vectors,
                num_buckets,
                self.num_rounds,
                seed=self.seed,
                step=self.step,
                backend=inputs.backend,
            )
            for vectors in (inputs.scaled_rows(), inputs.states)
        )
        ranks, backend = inputs.ranks, inputs.backend
        rows = gather_histogram(row_buckets, num_buckets, ranks, backend)
        own = gather_histogram(own_buckets, num_buckets, ranks, backend)
        counts = inputs.layout.num_positions, inputs.num_items
        own_chunks = position_chunks(
            own_buckets, own, rows, num_chunks, self.align, counts, backend
        )
        row_chunks = item_chunks(row_buckets, rows, num_chunks, inputs.num_items, backend)
        return own_chunks, row_chunks.view(torch.uint8)

    def choice_shapes(
        self, num_positions: int, num_rows: int
    ) -> tuple[tuple[Shape, torch.dtype], ...]:
        """Shapes and dtypes of the chunks of positions and of rows that ``choose`` returns."""
        _, num_chunks = self._numbers(num_positions, num_rows)
        num_bytes = self.num_rounds * index_dtype(num_chunks).itemsize
        positions, rows = (num_positions, self.num_rounds), (num_rows, num_bytes)
        return (positions, torch.int32), (rows, torch.uint8)

    def plan(self, inputs: Inputs, local: Inputs, tensors: tuple[Tensor, ...]) -> "_HashedPlan":
        """Blocks of logits: a chunk of positions times the nearby chunks of rows."""
        own_chunks, row_bytes = tensors
        bytes_of_chunk = row_bytes.shape[1] // self.num_rounds
        row_chunks = row_bytes.view(_DTYPE_OF_BYTES[bytes_of_chunk])
        _, num_chunks = self._numbers(inputs.layout.num_positions, inputs.num_items)
        return _HashedPlan(local, self.num_neighbor_chunks, num_chunks, own_chunks, row_chunks)

    def _numbers(self, num_positions: int, num_items: int) -> tuple[int, int]:
        """n_b and n_c, with the defaults filled in."""
        num_buckets = self.num_buckets
        if num_buckets is None:
            num_buckets = default_num_buckets(num_positions, num_items, self.num_neighbor_chunks)
        return num_buckets, num_buckets if self.num_chunks is None else self.num_chunks


class _HashedPlan(Plan):
    """The candidates of a position are the items of its chunk and of ``reach`` on either side."""

    def __init__(
        self,
        inputs: Inputs,
        reach: int,
        num_chunks: int,
        position_chunks: Tensor,
        row_chunks: Tensor,
    ) -> None:
        super().__init__(inputs)
        self.per_position = (position_chunks,)
        self._row_chunks = row_chunks
        self._reach, self._num_chunks = reach, num_chunks

    def blocks(
        self, chunk: Chunk, targets: Tensor, row_ids: RowIds, per_position: Sequence[Tensor]
    ) -> NearbyChunks:
        (position_chunks,) = per_position
        return NearbyChunks(
            position_chunks,
            self._row_chunks,
            self._reach,
            self._num_chunks,
            row_ids.find(targets),
        )


_reduced_cross_entropy = Operator("reduced_cross_entropy", HashedChunks)


def _check_options(
    num_buckets: int | None,
    num_chunks: int | None,
    num_rounds: int,
    num_neighbor_chunks: int,
    align: str,
) -> None:
    """Raises ValueError if an option of RECE is out of range."""
    numbers = (num_buckets or 1, num_chunks or 1, num_rounds, num_neighbor_chunks + 1)
    if min(numbers) < 1 or num_buckets == 0 or num_chunks == 0:
        raise ValueError(
            "num_buckets, num_chunks and num_rounds must be positive and num_neighbor_chunks not "
            f"negative, got {num_buckets}, {num_chunks}, {num_rounds} and {num_neighbor_chunks}; "
            "None takes the default"
        )
    if align not in ("bucket", "rank"):
        raise ValueError(f"align must be 'bucket' or 'rank', got {align!r}; choose one")


def rows_near(num_rows: int, num_chunks: int, reach: int) -> float:
    """Average number of candidates of a position in one round.

    The first and last chunks have fewer neighbours.

    >>> rows_near(100, 10, 1), rows_near(100, 1, 3)
    (28.0, 100.0)
    """
    near = sum(
        min(chunk + reach, num_chunks - 1) - max(chunk - reach, 0) + 1
        for chunk in range(num_chunks)
    )
    return num_rows * near / num_chunks**2


def reduced_cross_entropy_cost(
    work: Workload,
    num_buckets: int | None,
    num_chunks: int | None,
    num_rounds: int,
    num_neighbor_chunks: int,
) -> LossCost:
    """Cost of one step of RECE on one rank.

    In memory until backward: per row and round the chunk, one or two bytes, and per position and
    round five int32. Some rows at a time are sorted by their chunk of one round (three int64 each,
    four on a GPU). On a GPU all rows are sorted by their bucket, of as many rounds as
    ``hash_chunks.KEYS_AT_ONCE`` allows, and the signs of all rounds are stored.
    """
    reach = num_neighbor_chunks
    num_buckets = num_buckets or default_num_buckets(work.num_positions, work.num_items, reach)
    num_chunks = num_chunks or num_buckets
    chunk_bytes = index_dtype(num_chunks).itemsize
    per_chunk = work.num_positions / min(num_chunks, max(1, work.num_positions))
    near = rows_near(work.num_rows, num_chunks, reach)
    vectors = work.own_positions + work.num_rows
    most = nearby.ROWS_AT_ONCE if work.on_cpu else nearby.GPU_ROWS_AT_ONCE
    at_once = min(most, work.num_rows)
    held = num_rounds * (chunk_bytes * work.num_rows + 20 * work.own_positions)
    if work.on_cpu:
        hashed = num_rounds * select_cost(num_buckets, vectors, work)
        blocks = listed_cost(work.num_positions * num_rounds * near, per_chunk, work)
        held += 24 * at_once + cpu_tiles().listed_bytes(work.width, per_chunk)
    else:
        hashed = num_rounds * sign_kernels("best_sign_direction", num_buckets, vectors, work)
        listed = Listed(
            pairs=work.num_positions * num_rounds * near,
            positions=per_chunk,
            rows=near * at_once / max(1, work.num_rows),
            entries=num_rounds * work.num_rows,
            touched=num_rounds * work.num_rows,
            rounds=True,
        )
        blocks = listed_kernels(listed, work)
        held += max(32 * at_once, sort_bytes(work.num_rows, num_rounds))
        held += num_rounds * num_buckets * work.width * work.element_bytes
    return LossCost(
        touched_rows=work.num_rows,
        is_dense=True,
        workspace_bytes=held + accumulator_bytes(work.num_rows, work) + streaming_bytes(work),
        work=hashed + blocks,
        received=state_traffic(work),
    )
