"""Sampled cross-entropy (CCE-): a block of positions shares K negatives from a counter-based RNG.

Source: arXiv 2509.09682. The default correction ``log(K Q(j))``, with K and Q as drawn, makes the
sum over negatives an unbiased estimate of ``sum over j != y of exp(s_ij)``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from shardrec.kernels.block_logsumexp import Blocks, RowIds, blocks_of_items
from shardrec.kernels.block_logsumexp.cpu_tiles import CpuTiles, cpu_tiles
from shardrec.kernels.cost.terms import (
    LossCost,
    accumulator_bytes,
    expected_distinct,
    listed_cost,
    streaming_bytes,
)
from shardrec.kernels.cost.triton import Listed, listed_bytes, listed_kernels
from shardrec.kernels.loss.candidates import Candidates, Plan
from shardrec.kernels.loss.inputs import Inputs
from shardrec.kernels.loss.operator import Operator
from shardrec.kernels.loss.options import Common, autocast_dtype
from shardrec.kernels.loss.row_fetch import RowFetch
from shardrec.kernels.negatives import Proposal, Uniform, pack, require_catalog, unpack
from shardrec.kernels.negatives.sampler import Sampler, draws_at_once
from shardrec.kernels.ranks.chunks import Chunk
from shardrec.kernels.ranks.traffic import (
    Workload,
    row_traffic,
    sends_fewer_bytes,
    state_traffic,
)
from shardrec.kernels.shard import RowShard

__all__ = ["sampled_cross_entropy", "sampled_cross_entropy_cost"]


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

    ``loss_i = log(exp(s_iy) + sum_k exp(s_in_k - log(K Q(n_k)))) - s_iy``, where Q(j) is the
    probability of drawing item j; a draw equal to the target is left out. Draws are in memory for
    one chunk of positions at a time and are drawn again in backward. Source: arXiv 2509.09682.

    Args:
        states: (N, D) float32, bfloat16 or float16.
        table: (V, D), same dtype except under autocast, or this rank's shard of it.
        targets: (N,) int64 or int32 in [0, V).
        num_negatives: K, draws per block of positions.
        share: Positions per block, which share their draws; 1 as published, None the whole batch.
        seed: Key of the random generator, a signed 64-bit integer.
        step: Training step; another step draws other negatives.
        proposal: Distribution of the draws; uniform when None.
        parity: Use the paper's correction: K counts the draws other than the target, and Q(j) is
            replaced by ``Q(j) / (1 - Q(y))``.
        sparse_grad: Give ``table`` a sparse COO gradient over the rows in use, as ``F.embedding``.
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
        RuntimeError: a second derivative is taken, backward runs twice (see below), or a number
            does not fit in 64 bits.

    On a CPU, for float32 in one process without ``normalize``, mean and sum compute their gradient
    in the forward pass, and backward may run only once; in a compiled graph backward copies it.

    Over several ranks either the states are sent to all shards, or the rows of the draws and of the
    targets are fetched, whichever is fewer bytes (see ``SampledItems.used_items``). Both give the
    same result.

    Collectives: none for a tensor. For a shard those of ``cut_cross_entropy``, and one all-gather
    of the targets. Where rows are fetched, these replace the collectives per chunk: in forward an
    all-gather of shared rows and an all-to-all of others, in backward a reduce-scatter and an
    all-to-all of row gradients.
    """
    if num_negatives < 1 or (share is not None and share < 1):
        raise ValueError(
            f"num_negatives and share must be positive, got {num_negatives} and {share}; "
            "share=1 draws for each position, None once for the batch"
        )
    common = Common(
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
    fuse = _is_final_in_a_block(states, table, num_negatives, common)
    if fuse and isinstance(table, RowShard):
        table = replace(table, group=None)
    return _sampled_cross_entropy(states, table, targets, common, candidates, tables, fuse=fuse)[0]


def _is_final_in_a_block(
    states: Tensor, table: Tensor | RowShard, num_negatives: int, common: Common
) -> bool:
    """Whether forward can compute the gradient: float32 on a CPU, one process, rows not scaled.

    The same answer on every rank.
    """
    rows = table.rows if isinstance(table, RowShard) else table
    if isinstance(table, RowShard) and table.group is not None and table.group.size() > 1:
        return False
    is_float = states.dtype == rows.dtype == torch.float32
    is_float = is_float and autocast_dtype(states) in (None, torch.float32)
    in_torch = states.device.type == "cpu" and common.backend != "triton"
    is_whole = num_negatives <= CpuTiles().items
    return is_float and in_torch and is_whole and not common.normalize


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledItems(Candidates):
    """Candidates of ``sampled_cross_entropy``: the draws of the position's block.

    Attributes are the arguments of ``sampled_cross_entropy``; the proposal as ``pack`` returns it.
    """

    num_negatives: int
    share: int | None
    seed: int
    step: int
    parity: bool
    proposal_kinds: str
    proposal_numbers: list[int]

    def used_items(self, inputs: Inputs, tensors: tuple[Tensor, ...]) -> Tensor | RowFetch:
        """(n,) int64 items drawn and targets, or the plan to fetch their rows.

        With e bytes per number, sending the states to all shards and their gradients back takes
        ``(2 e + 4) N D`` bytes, less what a rank already holds. Fetching M distinct drawn rows on
        every rank, and on each rank the T rows of its other targets, takes ``(e + 4)(M + T) D``
        with their gradients. Fetching is not considered above two draws per position.

        Collectives: an all-gather of the targets.
        """
        layout, sampler = inputs.layout, self._sampler(inputs, tensors)
        all_targets = layout.gather_all(inputs.targets)
        num_draws = sampler.num_blocks * sampler.num_negatives
        if inputs.ranks.group is not None and num_draws <= 2 * layout.num_positions:
            fetch = RowFetch.of(sampler.distinct_items(all_targets.device), all_targets, layout)
            if fetch.sends_fewer_bytes(inputs):
                return fetch
        return sampler.drawn_rows(inputs.row_ids, all_targets)

    def plan(self, inputs: Inputs, local: Inputs, tensors: tuple[Tensor, ...]) -> "_SampledItems":
        """One block of logits for each set of draws."""
        shift = inputs.layout.first_position - local.layout.first_position
        return _SampledItems(local, self._sampler(inputs, tensors), shift)

    def _sampler(self, inputs: Inputs, tensors: tuple[Tensor, ...]) -> Sampler:
        proposal = unpack(self.proposal_kinds, self.proposal_numbers, tensors)
        require_catalog(proposal, inputs.num_items)
        return Sampler(
            proposal=proposal,
            num_negatives=self.num_negatives,
            num_positions=inputs.layout.num_positions,
            share=self.share,
            seed=self.seed,
            step=self.step,
            parity=self.parity,
        )


class _SampledItems(Plan):
    """The candidates of a position are the draws of its block."""

    def __init__(self, inputs: Inputs, sampler: Sampler, shift: int) -> None:
        super().__init__(inputs)
        self._sampler = sampler
        # If rows are fetched, positions are counted from the first one of this rank.
        self._shift = shift
        self._targets = inputs.targets

    def correction(self) -> Tensor | float:
        first = self.layout.first_position + self._shift
        return self._sampler.correction(first, self._targets)

    def chunk_of(self) -> Tensor | None:
        sampler, layout = self._sampler, self.layout
        num_blocks = sampler.num_blocks
        at_once = sampler.blocks_at_once(self._targets.device)
        num_chunks = max(layout.num_chunks(listed=True), -(-num_blocks // at_once))
        if min(num_chunks, num_blocks) == 1:
            return None
        positions = torch.arange(layout.num_positions, device=self._targets.device)
        positions += self._shift
        return positions % num_blocks * min(num_chunks, num_blocks) // num_blocks

    def blocks(
        self, chunk: Chunk, targets: Tensor, row_ids: RowIds, per_position: Sequence[Tensor]
    ) -> Blocks:
        order, starts, present = self._groups(chunk.positions)
        items = self._sampler.draw(present)
        if items.device.type == "cpu":
            items = items.sort(dim=1).values  # so that targets are found by binary search
        offsets = self._sampler.log_probability(items)
        return blocks_of_items(order, starts, items, row_ids, targets, offsets)

    def _groups(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Order of positions by block, first place of each block and the end, and the blocks."""
        num_blocks = self._sampler.num_blocks
        shifted = positions + self._shift if self._shift else positions
        in_order, order = (shifted % num_blocks).sort(stable=True)
        if positions.numel() == self._sampler.num_positions:
            # Every block has a position, which need not be read from the device.
            blocks = torch.arange(num_blocks + 1, device=order.device)
            return order, torch.searchsorted(in_order, blocks), blocks[:-1]
        present, sizes = torch.unique_consecutive(in_order, return_counts=True)
        return order, F.pad(sizes.cumsum(0), (1, 0)), present


_sampled_cross_entropy = Operator("sampled_cross_entropy", SampledItems)


def sampled_cross_entropy_cost(
    work: Workload, num_negatives: int, share: int | None, proposal: str = "uniform"
) -> LossCost:
    """Cost of one step with sampled negatives on one rank, for uniform draws.

    Popularity and in-batch draws touch fewer distinct rows. One process on a CPU computes the
    gradient in forward, with three products. Otherwise the drawn rows are copied once; the rest of
    the workspace is about ten tensors of the size of a chunk's draws and, on a CPU, the tiles. A
    popularity table has one int64 per item of the catalog, on every rank.
    """
    share = max(1, work.num_positions if share is None else share)
    num_draws = -(-work.num_positions // share) * num_negatives
    # Targets follow the data and are not uniform; one row per target is an upper bound.
    touched = expected_distinct(num_draws + work.num_positions, work.num_items) / work.num_ranks
    rows = min(work.num_rows, round(touched))
    is_fused = work.on_cpu and work.num_ranks == 1 and work.element_bytes == 4
    copy = 0 if is_fused else rows * work.width * work.stored_bytes
    draws = 8 * min(max(num_draws, num_negatives), draws_at_once(on_cpu=work.on_cpu))
    received, in_flight = state_traffic(work), streaming_bytes(work)
    shared = expected_distinct(num_draws, work.num_items)
    by_rows = row_traffic(work, shared, work.own_positions)
    if num_draws <= 2 * work.num_positions and sends_fewer_bytes(by_rows, received):
        received = by_rows
        # Fetched rows, as received and sorted by item, and the gradients of both.
        vectors = 2 * (shared + work.own_positions) * work.width
        in_flight = vectors * (work.stored_bytes + 4)
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
        workspace_bytes=copy + 10 * draws + tiles + in_flight + accumulator_bytes(rows, work),
        work=kernels,
        received=received,
        table_bytes=8 * work.num_items * (proposal == "popularity"),
    )
