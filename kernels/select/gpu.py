"""Triton kernels of the selections, and their launchers.

The phases of top-k: (1) one matrix product over all rows, of which only the largest score of each
group of 16 rows is stored; (2) choose the k best groups; (3) score the rows of these groups again
and choose the k best rows. They are in the k best groups, with ties too: a group that is left out
comes after k groups that are at least as good. FLOP: 2 Q R D + 32 Q k D; the workspace does not
depend on R.

Tiles have the same shape for any number of rows, so a score depends on its two vectors alone, and
equal vectors have equal scores. Scores are compared at coarse precision, as on a CPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardrec.kernels.device.backend import alignment, architecture_of, operand, precision_of
from shardrec.kernels.device.tiles import tile_for
from shardrec.kernels.negatives.gpu import counters, sign_tile
from shardrec.kernels.select.coarse import DROPPED
from shardrec.kernels.select.search import top_lowest

# mypy: disable-error-code="no-untyped-def"

__all__ = [
    "best_sign_direction",
    "best_sign_direction_kernel",
    "group_maxima_kernel",
    "score_groups_kernel",
    "topk_rows",
]

GROUP = tl.constexpr(16)
COARSE = tl.constexpr(-(1 << DROPPED))  # the bits of a score that are compared
# Group maxima, or scores of candidates, in memory at a time.
TILE_SCORES = 1 << 21
# Candidates per program of ``score_groups_kernel``.
CANDIDATES = 128


@triton.jit
def coarse_tile(b_scores):
    """float32 scores rounded towards zero to a mantissa of ten bits; see ``coarse.coarse``."""
    return (b_scores.to(tl.int32, bitcast=True) & COARSE).to(tl.float32, bitcast=True)


@triton.jit
def group_maxima_kernel(
    queries, rows, maxima, first_row, num_queries, num_rows, num_groups, width,
    POSITIONS: tl.constexpr, ITEMS: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(num_queries, num_groups) largest coarse score of each group of rows from ``first_row`` on.

    Grid: (tiles of rows, tiles of queries); one writer per maximum.
    """
    width = width // ALIGN * ALIGN  # tells the compiler how rows are aligned
    o_queries = tl.program_id(1).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    first = tl.program_id(0).to(tl.int64) * ITEMS
    o_rows = first_row + first + tl.arange(0, ITEMS)
    m_queries, m_rows = o_queries < num_queries, o_rows < num_rows
    b_scores = tl.zeros((POSITIONS, ITEMS), dtype=tl.float32)
    for first_column in range(0, width, WIDTH):
        o_columns = first_column + tl.arange(0, WIDTH)
        m_columns = o_columns < width
        b_queries = tl.load(
            queries + o_queries[:, None] * width + o_columns[None, :],
            mask=m_queries[:, None] & m_columns[None, :],
            other=0.0,
        )
        b_rows = tl.load(
            rows + o_rows[:, None] * width + o_columns[None, :],
            mask=m_rows[:, None] & m_columns[None, :],
            other=0.0,
        )
        b_scores = tl.dot(b_queries, tl.trans(b_rows), b_scores, input_precision=PRECISION)
    b_scores = tl.where(m_rows[None, :], b_scores, -float("inf"))
    b_maxima = tl.max(tl.reshape(b_scores, (POSITIONS, ITEMS // GROUP, GROUP)), 2)
    b_maxima = coarse_tile(b_maxima)
    o_groups = first // GROUP + tl.arange(0, ITEMS // GROUP)
    mask = m_queries[:, None] & (o_groups < num_groups)[None, :]
    tl.store(maxima + o_queries[:, None] * num_groups + o_groups[None, :], b_maxima, mask=mask)


@triton.jit
def score_groups_kernel(
    queries, rows, groups, scores, num_rows, num_groups, width,
    ITEMS: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """(Q, num_groups * 16) coarse scores of the rows of (Q, num_groups) groups.

    Grid: tiles of candidates of every query; one writer per score. No matrix product, as each query
    has other rows.
    """
    width = width // ALIGN * ALIGN  # tells the compiler how rows are aligned
    num_tiles = tl.cdiv(num_groups * GROUP, ITEMS)
    i_query = (tl.program_id(0) // num_tiles).to(tl.int64)
    o_candidates = tl.program_id(0) % num_tiles * ITEMS + tl.arange(0, ITEMS)
    m_candidates = o_candidates < num_groups * GROUP
    o_groups = i_query * num_groups + o_candidates // GROUP
    b_groups = tl.load(groups + o_groups, mask=m_candidates, other=0)
    o_rows = b_groups * GROUP + o_candidates % GROUP
    m_rows = m_candidates & (o_rows < num_rows)
    b_scores = tl.zeros((ITEMS,), dtype=tl.float32)
    for first_column in range(0, width, WIDTH):
        o_columns = first_column + tl.arange(0, WIDTH)
        m_columns = o_columns < width
        b_query = tl.load(queries + i_query * width + o_columns, mask=m_columns, other=0.0)
        b_rows = tl.load(
            rows + o_rows[:, None] * width + o_columns[None, :],
            mask=m_rows[:, None] & m_columns[None, :],
            other=0.0,
        )
        b_scores += tl.sum(b_rows.to(tl.float32) * b_query.to(tl.float32)[None, :], 1)
    b_scores = coarse_tile(tl.where(m_rows, b_scores, -float("inf")))
    o_scores = i_query * num_groups * GROUP + o_candidates
    tl.store(scores + o_scores, b_scores, mask=m_candidates)


@triton.jit(do_not_specialize=["seed", "step", "stream"])
def best_sign_direction_kernel(
    vectors, best, seed, step, stream, num_vectors, num_directions, width,
    POSITIONS: tl.constexpr, ITEMS: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(num_vectors,) int64 sign vector of largest inner product; ties: the lower index.

    Grid: tiles of ITEMS vectors. Sign vectors are generated from counters, POSITIONS at a time.
    """
    width = width // ALIGN * ALIGN  # tells the compiler how rows are aligned
    o_vectors = tl.program_id(0).to(tl.int64) * ITEMS + tl.arange(0, ITEMS)
    m_vectors = o_vectors < num_vectors
    seed, step, stream = seed.to(tl.int64), step.to(tl.int64), stream.to(tl.int64)
    b_best = tl.full((ITEMS,), -float("inf"), dtype=tl.float32)
    b_index = tl.zeros((ITEMS,), dtype=tl.int32)
    for direction in range(0, num_directions, POSITIONS):
        o_directions = direction + tl.arange(0, POSITIONS)
        b_scores = tl.zeros((ITEMS, POSITIONS), dtype=tl.float32)
        for first_column in range(0, width, WIDTH):
            o_columns = first_column + tl.arange(0, WIDTH)
            b_vectors = tl.load(
                vectors + o_vectors[:, None] * width + o_columns[None, :],
                mask=m_vectors[:, None] & (o_columns < width)[None, :],
                other=0.0,
            )
            b_signs = sign_tile(o_directions, first_column, seed, step, stream, WIDTH)
            b_signs = tl.trans(b_signs.to(b_vectors.dtype))
            b_scores = tl.dot(b_vectors, b_signs, b_scores, input_precision=PRECISION)
        b_scores = tl.where((o_directions < num_directions)[None, :], b_scores, -float("inf"))
        b_largest, b_where = tl.max(b_scores, 1, return_indices=True)
        b_index = tl.where(b_largest > b_best, b_where + direction, b_index)
        b_best = tl.maximum(b_best, b_largest)
    tl.store(best + o_vectors, b_index.to(tl.int64), mask=m_vectors)


def topk_rows(queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(Q, k) coarse scores and (Q, k) rows, best first; ties: the lower row; see ``cpu.topk_rows``.

    Unlike on a CPU, a score within rounding error of the border between two coarse scores may get
    either, and NaN scores are ignored.
    """
    num_queries, num_rows = queries.shape[0], rows.shape[0]
    k = min(k, num_rows)
    if 0 in (num_queries, k):
        scores = queries.new_empty((num_queries, k), dtype=torch.float32)
        return scores, scores.long()
    queries, rows = operand(queries), operand(rows)
    groups = _best_groups(queries, rows, k)
    at_once = max(1, TILE_SCORES // (groups.shape[1] * GROUP.value))
    parts = [
        _best_of_groups(part, rows, part_groups, k)
        for part, part_groups in zip(queries.split(at_once), groups.split(at_once), strict=True)
    ]
    return torch.cat([scores for scores, _ in parts]), torch.cat([index for _, index in parts])


def best_sign_direction(
    vectors: Tensor, num_directions: int, *, seed: int, step: int, stream: int
) -> Tensor:
    """(n,) int64 index of the best of ``num_directions`` sign vectors, which are never stored."""
    num_vectors, width = vectors.shape
    best = torch.zeros(num_vectors, dtype=torch.int64, device=vectors.device)
    if not vectors.numel():
        return best
    tile = tile_for("best_sign_direction", width, vectors.dtype, architecture_of(vectors.device))
    best_sign_direction_kernel[(triton.cdiv(num_vectors, tile.items),)](
        operand(vectors),
        best,
        *counters(seed, step, stream),
        num_vectors,
        num_directions,
        width,
        POSITIONS=tile.positions,
        ITEMS=tile.items,
        WIDTH=tile.width,
        ALIGN=alignment(width),
        PRECISION=precision_of(vectors.dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return best


def _best_groups(queries: Tensor, rows: Tensor, k: int) -> Tensor:
    """(Q, min(k, groups)) int64 groups with the largest maxima, in ascending order."""
    num_queries, num_rows = queries.shape[0], rows.shape[0]
    num_groups = triton.cdiv(num_rows, GROUP.value)
    if num_groups <= k:
        return torch.arange(num_groups, device=rows.device).expand(num_queries, -1).contiguous()
    maxima = torch.empty((num_queries, 0), dtype=torch.float32, device=rows.device)
    groups = torch.empty((num_queries, 0), dtype=torch.int64, device=rows.device)
    at_once = max(2 * k, TILE_SCORES // num_queries)
    for first in range(0, num_groups, at_once):
        part = _group_maxima(queries, rows, first, min(at_once, num_groups - first))
        best, index = top_lowest(part, min(k, part.shape[1]))
        # Earlier groups come first, so ``top_lowest`` keeps the lower of two equal groups.
        maxima, groups = torch.cat([maxima, best], 1), torch.cat([groups, index + first], 1)
        maxima, kept = top_lowest(maxima, min(k, maxima.shape[1]))
        groups = groups.gather(1, kept)
    return groups.sort(dim=1).values


def _group_maxima(queries: Tensor, rows: Tensor, first_group: int, num_groups: int) -> Tensor:
    """(Q, num_groups) float32 largest coarse score of each group from ``first_group`` on."""
    width = rows.shape[1]
    tile = tile_for("group_maxima", width, rows.dtype, architecture_of(rows.device))
    maxima = torch.empty((queries.shape[0], num_groups), dtype=torch.float32, device=rows.device)
    grid = (
        triton.cdiv(num_groups * GROUP.value, tile.items),
        triton.cdiv(queries.shape[0], tile.positions),
    )
    group_maxima_kernel[grid](
        queries,
        rows,
        maxima,
        first_group * GROUP.value,
        queries.shape[0],
        rows.shape[0],
        num_groups,
        width,
        POSITIONS=tile.positions,
        ITEMS=tile.items,
        WIDTH=tile.width,
        ALIGN=alignment(width),
        PRECISION=precision_of(rows.dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return maxima


def _best_of_groups(queries: Tensor, rows: Tensor, groups: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(Q, k) coarse scores and rows of the best rows of each query's groups."""
    num_candidates = groups.shape[1] * GROUP.value
    scores = torch.empty(
        (queries.shape[0], num_candidates), dtype=torch.float32, device=rows.device
    )
    width = rows.shape[1]
    score_groups_kernel[(queries.shape[0] * triton.cdiv(num_candidates, CANDIDATES),)](
        queries,
        rows,
        groups.contiguous(),
        scores,
        rows.shape[0],
        groups.shape[1],
        width,
        ITEMS=CANDIDATES,
        WIDTH=min(64, triton.next_power_of_2(width)),
        ALIGN=alignment(width),
    )
    best, columns = top_lowest(scores, k)
    return best, groups.gather(1, columns // GROUP.value) * GROUP.value + columns % GROUP.value
