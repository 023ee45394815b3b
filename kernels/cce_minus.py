"""Sampled cross-entropy (CCE-): negatives from counters, shared by blocks of positions.

Source: arXiv 2509.09682; the correction with K and Q as drawn follows from unbiasedness for
``sum over j != y of exp(s_ij)``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from shardrec.kernels.block_logsumexp import Blocks, RowIds
from shardrec.kernels.block_logsumexp.cpu_tiles import CpuTiles, cpu_tiles
from shardrec.kernels.call import Call, autocast_dtype
from shardrec.kernels.cost.triton import Listed, listed_bytes, listed_kernels
from shardrec.kernels.cost.workload import (
    LossCost,
    Workload,
    accumulator_bytes,
    cheaper,
    expected_distinct,
    listed_cost,
    row_traffic,
    state_traffic,
    streaming_bytes,
)
from shardrec.kernels.loss.candidates import Candidates
from shardrec.kernels.loss.inputs import Problem
from shardrec.kernels.loss.operator import Operator
from shardrec.kernels.loss.row_fetch import RowTrip
from shardrec.kernels.negatives import (
    STREAM_NEGATIVES,
    Proposal,
    Uniform,
    pack,
    require_catalog,
    unpack,
)
from shardrec.kernels.ranks.chunks import Chunk
from shardrec.kernels.shard import RowShard
from shardrec.kernels.streaming import Plan

__all__ = ["Sampler", "sampled_cross_entropy", "sampled_cross_entropy_cost"]

# Draws in memory at a time: 2**20 int64 are 8 MiB.
_DRAWS_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """Which negatives a position meets: a function of (seed, step, global position), of no rank.

    Attributes:
        proposal: Distribution of the draws.
        num_negatives: K, draws per block.
        num_positions: N over all ranks.
        share: Positions that share one set of draws, None for all; global position i is in block
            ``i mod ceil(num_positions / share)``.
        seed: Key of the generator.
        step: Training step.
        parity: Correct with the number of kept draws and ``Q(j) / (1 - Q(y))`` as in the paper,
            instead of K and Q as drawn.
    """

    proposal: Proposal
    num_negatives: int
    num_positions: int
    share: int | None
    seed: int
    step: int
    parity: bool = False

    @property
    def num_blocks(self) -> int:
        """Number of sets of draws."""
        return _num_blocks(self.num_positions, self.share)

    @property
    def blocks_at_once(self) -> int:
        """Number of sets of draws that are in memory together."""
        return max(1, _DRAWS_AT_ONCE // self.num_negatives)

    def draw(self, blocks: Tensor) -> Tensor:
        """(len(blocks), K) int64 items."""
        return self.proposal.draw(
            blocks, self.num_negatives, seed=self.seed, step=self.step, stream=STREAM_NEGATIVES
        )

    def distinct_items(self, device: torch.device) -> Tensor:
        """Ascending items that any block draws; all draws are in memory for it."""
        return torch.unique(self.draw(torch.arange(self.num_blocks, device=device)))

    def log_probability(self, items: Tensor) -> Tensor:
        """Float32 ``log Q`` of each item."""
        return self.proposal.probability(items).log().float()

    def drawn_rows(self, row_ids: RowIds, targets: Tensor) -> Tensor:
        """Ascending items of the shard that are drawn by any block or stand among ``targets``."""
        drawn = torch.zeros(row_ids.count + 1, dtype=torch.bool, device=targets.device)
        drawn[row_ids.find(targets)] = True  # -1, another shard's item, marks the extra entry
        all_blocks = torch.arange(self.num_blocks, device=targets.device)
        for blocks in all_blocks.split(self.blocks_at_once):
            drawn[row_ids.find(self.draw(blocks).flatten())] = True
        return drawn[:-1].nonzero()[:, 0] + row_ids.first

    def correction(self, positions: Tensor, targets: Tensor) -> Tensor:
        """(n,) float32 to subtract from the log-sum-exp of logits lowered by ``log Q``.

        Args:
            positions: (n,) int64 global positions.
            targets: (n,) int64 their targets.
        """
        if not self.parity:
            constant = torch.tensor(float(self.num_negatives), device=targets.device)
            return constant.log().expand(targets.shape)
        kept = torch.empty_like(targets)
        for part in torch.arange(targets.numel(), device=targets.device).split(self.blocks_at_once):
            items = self.draw(positions[part] % self.num_blocks)
            kept[part] = (items != targets[part, None]).sum(1)
        rest = 1 - self.proposal.probability(targets)
        return (kept.clamp(min=1) / rest).log().float()


def sampled_cross_entropy(
    states: Tensor,
    table: Tensor | RowShard,
    targets: Tensor,
    *,
    num_negatives: int,
    share: int | None = 128,
    seed: int,
    step: int = 0,
    proposal: Proposal | None = None,
    parity: bool = False,
    sparse_grad: bool = False,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    temperature: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of every target among K sampled rows, with the sampling bias removed.

    ``loss_i = log(exp(s_iy) + sum_k exp(s_in_k - log(K Q(n_k)))) - s_iy``; a draw equal to the
    target is left out. The draws are never stored beyond one chunk and come again in backward.

    Args:
        states: (N, D) float32, bfloat16 or float16.
        table: (V, D), same dtype except under autocast, or this rank's shard of it.
        targets: (N,) int64 or int32 in [0, V).
        num_negatives: K draws per block of positions.
        share: Positions that share their draws; 1 is the published form, None the whole batch.
        seed: Key of the generator.
        step: Training step; another step draws other negatives.
        proposal: Distribution of the draws; uniform when None.
        parity: Use the paper's correction (kept draws, ``Q(j) / (1 - Q(y))``).
        sparse_grad: Give ``table`` a sparse gradient of the rows touched, as ``F.embedding`` does.
        weights: (N,) float factors of the positions' losses; the mean divides by their sum.
        reduction: "mean", "sum" or "none".
        normalize: Take states and rows at unit length.
        temperature: Divides the logits.
        backend: "auto" goes by the device; "torch" or "triton" forces one.

    Returns:
        () float32, or (N,) with "none". Gradients flow to ``states`` and to the rows. With a shard,
        mean and sum are over all ranks, and backward on all ranks gives each the gradient of that
        number with respect to its own states and rows.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape disagrees, or a target or option is out of range,
            on this rank or another.

    On a CPU, for float32 rows of one process as they are, mean and sum take their gradient in the
    forward pass; in a compiled graph backward makes a copy of it.

    Over several ranks either the states travel to all shards, or the rows that are drawn and those
    of the targets travel to the states: whichever is fewer bytes (see ``SampledItems.touched``).
    The result is the same.

    Collectives: none for a tensor; for a shard one gather of the targets, and those of
    ``streamed_logsumexp`` and ``streamed_gradients``, and of ``fetch_rows`` and
    ``return_gradients`` where rows travel.
    """
    if num_negatives < 1 or (share is not None and share < 1):
        raise ValueError(
            f"num_negatives and share must be positive, got {num_negatives} and {share}; "
            "share=1 draws for each position, None once for the batch"
        )
    call = Call(
        weights=weights,
        reduction=reduction,
        normalize=normalize,
        temperature=temperature,
        backend=backend,
        sparse_grad=sparse_grad,
    )
    if proposal is None:
        proposal = Uniform(table.num_rows if isinstance(table, RowShard) else table.shape[0])
    kinds, numbers, tables = pack(proposal)
    candidates = SampledItems(
        num_negatives=num_negatives,
        share=share,
        seed=seed,
        step=step,
        parity=parity,
        proposal_kinds=kinds,
        proposal_numbers=numbers,
    )
    fuse = _is_final_in_a_block(states, table, num_negatives, call)
    if fuse and isinstance(table, RowShard):
        table = replace(table, group=None)
    return _sampled_cross_entropy(states, table, targets, call, candidates, tables, fuse=fuse)[0]


def _is_final_in_a_block(
    states: Tensor, table: Tensor | RowShard, num_negatives: int, call: Call
) -> bool:
    """Whether the gradient can be taken in forward: float32 on a CPU, all rows here, as they are.

    The same answer on every rank.
    """
    rows = table.rows if isinstance(table, RowShard) else table
    if isinstance(table, RowShard) and table.group is not None and table.group.size() > 1:
        return False
    is_float = states.dtype == rows.dtype == torch.float32
    is_float = is_float and autocast_dtype(states) in (None, torch.float32)
    in_torch = states.device.type == "cpu" and call.backend != "triton"
    is_whole = num_negatives <= CpuTiles().items
    return is_float and in_torch and is_whole and not call.normalize


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledItems(Candidates):
    """The draws of the position's block.

    Attributes are those of ``sampled_cross_entropy``; the proposal is packed.
    """

    rows: ClassVar[str] = "M"
    travels: ClassVar[bool] = True

    num_negatives: int
    share: int | None
    seed: int
    step: int
    parity: bool
    proposal_kinds: str
    proposal_numbers: list[int]

    def touched(self, problem: Problem, tensors: tuple[Tensor, ...]) -> Tensor | RowTrip:
        """The items drawn, and targets, or their trip to the states.

        States travel to the shards, twice, and their gradients back: ``(2 e + 4) N D`` bytes of e
        bytes a number, of which a rank has its share already. Or the M distinct rows drawn travel
        to every rank, and the T rows of its other targets to each, with their gradients back:
        ``(e + 4)(M + T) D``. Rows are not considered where there are more than two draws for each
        position.

        Collectives: a gather of the targets.
        """
        exchange, sampler = problem.exchange, self._sampler(problem, tensors)
        all_targets = exchange.gather_all(problem.targets)
        num_draws = sampler.num_blocks * sampler.num_negatives
        if exchange.layout is not None and num_draws <= 2 * exchange.num_positions:
            trip = RowTrip.of(sampler.distinct_items(all_targets.device), all_targets, exchange)
            if trip.is_cheaper(problem):
                return trip
        return sampler.drawn_rows(problem.row_ids, all_targets)

    def plan(
        self, problem: Problem, meeting: Problem, tensors: tuple[Tensor, ...]
    ) -> "_SampledItems":
        """A block for each set of draws."""
        shift = problem.exchange.first_position - meeting.exchange.first_position
        return _SampledItems(meeting, self._sampler(problem, tensors), shift)

    def _sampler(self, problem: Problem, tensors: tuple[Tensor, ...]) -> Sampler:
        proposal = unpack(self.proposal_kinds, self.proposal_numbers, tensors)
        require_catalog(proposal, problem.num_items)
        return Sampler(
            proposal=proposal,
            num_negatives=self.num_negatives,
            num_positions=problem.exchange.num_positions,
            share=self.share,
            seed=self.seed,
            step=self.step,
            parity=self.parity,
        )


def _num_blocks(num_positions: int, share: int | None) -> int:
    return 1 if share is None else torch.sym_max(1, -(-num_positions // share))


class _SampledItems(Plan):
    """The plan in which the candidates of a position are the draws of its block.

    Args:
        problem: Where the items meet the states.
        sampler: Which items a block draws.
        shift: What a position of the problem lacks to its place in the global batch.
    """

    def __init__(self, problem: Problem, sampler: Sampler, shift: int) -> None:
        super().__init__(problem)
        self._sampler = sampler
        self._shift = shift
        self._targets = problem.targets

    def correction(self) -> Tensor:
        positions = torch.arange(self.num_slots, device=self._targets.device) + self._shift
        positions += self.exchange.first_position
        return self._sampler.correction(positions, self._targets)

    def chunk_of(self) -> Tensor:
        sampler, exchange = self._sampler, self.exchange
        num_blocks = sampler.num_blocks
        num_chunks = max(exchange.min_chunks, -(-num_blocks // sampler.blocks_at_once))
        positions = torch.arange(exchange.num_positions, device=self._targets.device)
        positions += self._shift
        return positions % num_blocks * min(num_chunks, num_blocks) // num_blocks

    def blocks(
        self, chunk: Chunk, targets: Tensor, row_ids: RowIds, per_position: Sequence[Tensor]
    ) -> Blocks:
        block_of = (chunk.positions + self._shift) % self._sampler.num_blocks
        order = torch.argsort(block_of, stable=True)
        present, sizes = torch.unique_consecutive(block_of[order], return_counts=True)
        items = self._sampler.draw(present)
        if items.device.type == "cpu":
            items = items.sort(dim=1).values  # targets among them are found by bisection
        rows = row_ids.find(items)
        here = rows >= 0
        item_ends = here.sum(1).cumsum(0)
        return Blocks(
            pair_positions=order,
            pair_starts=F.pad(sizes.cumsum(0), (1, 0)),
            items=rows[here],
            item_starts=F.pad(item_ends[:-1], (1, 0)),
            item_ends=item_ends,
            targets=row_ids.find(targets),
            num_slots=order.numel(),
            offsets=self._sampler.log_probability(items[here]),
        )


_sampled_cross_entropy = Operator("sampled_cross_entropy", SampledItems)


def sampled_cross_entropy_cost(
    work: Workload, num_negatives: int, share: int | None, proposal: str = "uniform"
) -> LossCost:
    """What sampled negatives cost a rank, where the draws are uniform.

    A draw from popularity, or from the batch, meets fewer rows. One process on a CPU takes the
    gradient in forward, with three products. Else the rows drawn are copied once; beside the copy
    there are the draws of a chunk, in about ten forms, and the batches of a CPU. A table of
    popularity has an int64 for every item of the catalog, on every rank.
    """
    share = max(1, work.num_positions if share is None else share)
    num_draws = -(-work.num_positions // share) * num_negatives
    # Targets are drawn from the log and not uniformly: at most one row for each.
    touched = expected_distinct(num_draws + work.num_positions, work.num_items) / work.num_ranks
    rows = min(work.num_rows, round(touched))
    is_fused = work.on_cpu and work.num_ranks == 1 and work.element_bytes == 4
    copy = 0 if is_fused else rows * work.width * work.element_bytes
    draws = 8 * min(max(num_draws, num_negatives), _DRAWS_AT_ONCE)
    received, travelling = state_traffic(work), streaming_bytes(work)
    shared = expected_distinct(num_draws, work.num_items)
    by_rows = row_traffic(work, shared, work.own_positions)
    if num_draws <= 2 * work.num_positions and cheaper(by_rows, received):
        received = by_rows
        # The rows as they arrive and in order, with both gradients.
        vectors = 2 * (shared + work.own_positions) * work.width
        travelling = vectors * (work.element_bytes + 4)
    pairs = work.num_positions * num_negatives / work.num_ranks
    if work.on_cpu:
        kernels = listed_cost(pairs, share, work, products=3 if is_fused else 4)
        tiles = cpu_tiles().listed_bytes(work.width, share)
    else:
        entries = num_draws / work.num_ranks
        listed = Listed(
            pairs=pairs, positions=share, rows=num_negatives, entries=entries, touched=rows
        )
        kernels, tiles = listed_kernels(listed, work), listed_bytes(entries, work)
    return LossCost(
        touched_rows=rows,
        is_dense=False,
        workspace_bytes=copy + 10 * draws + tiles + travelling + accumulator_bytes(rows, work),
        work=kernels,
        received=received,
        table_bytes=8 * work.num_items * (proposal == "popularity"),
    )
