"""Triton kernels of the selections, and their launchers.

The phases of top-k: (1) one matrix product over all rows, of which only the largest score of each
group of 16 rows is stored; (2) choose the k best groups; (3) score the rows of these groups again
and choose the k best rows. They are in the k best groups, with ties too: a group that is left out
comes after k groups that are at least as good. FLOP: 2 Q R D + 32 Q k D; the workspace does not
depend on R.

What is chosen from are int64 keys, the score above the complement of the index: they are distinct,
so that ``torch.topk`` has no ties to break, and the lower of two indices with equal scores wins.

Tiles have the same shape for any number of rows, so a score depends on its two vectors alone, and
equal vectors have equal scores. Scores are compared at coarse precision, as on a CPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardrec.kernels.device.backend import alignment, architecture_of, operand, precision_of
from shardrec.kernels.device.tiles import tile_for
from shardrec.kernels.negatives.gpu import fill_signs
from shardrec.kernels.select import search
from shardrec.kernels.select.coarse import DROPPED

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
LOW_WORD = tl.constexpr((1 << 32) - 1)
# Candidates per program of ``score_groups_kernel``.
CANDIDATES = 128


@triton.jit
def coarse_tile(b_scores):
    """float32 scores rounded towards zero to a mantissa of ten bits; see ``coarse.coarse``."""
    return (b_scores.to(tl.int32, bitcast=True) & COARSE).to(tl.float32, bitcast=True)


@triton.jit
def keys_of(b_scores, o_index):
    """int64 keys, larger for a larger float32 score, and of equal scores for a lower index."""
    b_bits = tl.where(b_scores == 0.0, 0.0, b_scores).to(tl.int32, bitcast=True)
    b_ordered = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)
    return (b_ordered.to(tl.int64) << 32) | (LOW_WORD - o_index)


@triton.jit(do_not_specialize=["first_row", "num_queries", "num_rows", "num_groups"])
def group_maxima_kernel(
    queries, rows, keys, first_row, num_queries, num_rows, num_groups, width,
    POSITIONS: tl.constexpr, ITEMS: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(num_queries, num_groups) keys of the largest score in each group from ``first_row`` on.

    Grid: for each tile of rows, the tiles of queries, so that rows are read from memory once; one
    writer per key.
    """
    width = width // ALIGN * ALIGN  # tells the compiler how rows are aligned
    num_tiles = tl.cdiv(num_queries, POSITIONS)
    o_queries = (tl.program_id(0) % num_tiles).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    first = (tl.program_id(0) // num_tiles).to(tl.int64) * ITEMS
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
    b_keys = keys_of(b_maxima, (first_row // GROUP + o_groups)[None, :])
    mask = m_queries[:, None] & (o_groups < num_groups)[None, :]
    tl.store(keys + o_queries[:, None] * num_groups + o_groups[None, :], b_keys, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_groups"])
def score_groups_kernel(
    queries, rows, groups, keys, num_rows, num_groups, width,
    ITEMS: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """(Q, num_groups * 16) keys of the rows of (Q, num_groups) groups.

    Grid: tiles of candidates of every query; one writer per key. No matrix product, as each query
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
    o_keys = i_query * num_groups * GROUP + o_candidates
    tl.store(keys + o_keys, keys_of(b_scores, o_rows), mask=m_candidates)


@triton.jit(do_not_specialize=["num_vectors", "num_directions"])
def best_sign_direction_kernel(
    vectors, directions, best, num_vectors, num_directions, width,
    POSITIONS: tl.constexpr, ITEMS: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(rounds, num_vectors) integers: the direction of largest inner product; ties: the lower one.

    Grid: (tiles of ITEMS vectors, rounds). ``directions`` is (rounds, num_directions, width), of
    which a program reads POSITIONS lines at a time.
    """
    width = width // ALIGN * ALIGN  # tells the compiler how rows are aligned
    o_vectors = tl.program_id(0).to(tl.int64) * ITEMS + tl.arange(0, ITEMS)
    m_vectors = o_vectors < num_vectors
    i_round = tl.program_id(1).to(tl.int64)
    directions += i_round * num_directions * width
    b_best = tl.full((ITEMS,), -float("inf"), dtype=tl.float32)
    b_index = tl.zeros((ITEMS,), dtype=tl.int32)
    for direction in range(0, num_directions, POSITIONS):
        o_directions = direction + tl.arange(0, POSITIONS)
        m_directions = o_directions < num_directions
        b_scores = tl.zeros((ITEMS, POSITIONS), dtype=tl.float32)
        for first_column in range(0, width, WIDTH):
            o_columns = first_column + tl.arange(0, WIDTH)
            b_vectors = tl.load(
                vectors + o_vectors[:, None] * width + o_columns[None, :],
                mask=m_vectors[:, None] & (o_columns < width)[None, :],
                other=0.0,
            )
            b_signs = tl.load(
                directions + o_directions[:, None] * width + o_columns[None, :],
                mask=m_directions[:, None] & (o_columns < width)[None, :],
                other=0.0,
            )
            b_scores = tl.dot(b_vectors, tl.trans(b_signs), b_scores, input_precision=PRECISION)
        b_scores = tl.where(m_directions[None, :], b_scores, -float("inf"))
        b_largest, b_where = tl.max(b_scores, 1, return_indices=True)
        b_index = tl.where(b_largest > b_best, b_where + direction, b_index)
        b_best = tl.maximum(b_best, b_largest)
    tl.store(
        best + i_round * num_vectors + o_vectors, b_index.to(best.dtype.element_ty), mask=m_vectors
    )


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
    at_once = max(1, search.KEYS_AT_ONCE // (groups.shape[1] * GROUP.value))
    parts = [
        _row_keys(part, rows, part_groups).topk(k).values
        for part, part_groups in zip(queries.split(at_once), groups.split(at_once), strict=True)
    ]
    keys = parts[0] if len(parts) == 1 else torch.cat(parts)
    return _scores_of(keys), _index_of(keys)


def best_sign_direction(
    vectors: Tensor, best: Tensor, num_directions: int, *, seed: int, step: int, stream: int
) -> None:
    """Writes the best of ``num_directions`` sign vectors of each round to (r, n) ``best``.

    Round i has the stream ``stream + i``. The signs are stored meanwhile, in the dtype of the
    vectors, r n_b D of them: they are made once and not by every program.
    """
    if not vectors.numel():
        best.zero_()
        return
    (num_vectors, width), num_rounds = vectors.shape, best.shape[0]
    tile = tile_for("best_sign_direction", width, vectors.dtype, architecture_of(vectors.device))
    precision, vectors = precision_of(vectors.dtype), operand(vectors)
    signs = vectors.new_empty((num_rounds, num_directions, width))
    best_sign_direction_kernel[(triton.cdiv(num_vectors, tile.items), num_rounds)](
        vectors,
        fill_signs(signs, 0, seed=seed, step=step, stream=stream),
        best,
        num_vectors,
        num_directions,
        width,
        POSITIONS=tile.positions,
        ITEMS=tile.items,
        WIDTH=tile.width,
        ALIGN=alignment(width),
        PRECISION=precision,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _scores_of(keys: Tensor) -> Tensor:
    bits = (keys >> 32).int()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _index_of(keys: Tensor) -> Tensor:
    return LOW_WORD.value - (keys & LOW_WORD.value)


def _best_groups(queries: Tensor, rows: Tensor, k: int) -> Tensor:
    """(Q, min(k, groups)) int64 groups with the largest maxima, in any order."""
    num_queries, num_rows = queries.shape[0], rows.shape[0]
    num_groups = triton.cdiv(num_rows, GROUP.value)
    if num_groups <= k:
        return torch.arange(num_groups, device=rows.device).expand(num_queries, -1).contiguous()
    best: Tensor | None = None
    at_once = max(k, search.KEYS_AT_ONCE // num_queries)
    for first in range(0, num_groups, at_once):
        keys = _group_keys(queries, rows, first, min(at_once, num_groups - first))
        found = keys.topk(min(k, keys.shape[1]), sorted=False).values
        if best is not None:
            merged = torch.cat([best, found], 1)
            found = merged.topk(min(k, merged.shape[1]), sorted=False).values
        best = found
    assert best is not None
    return _index_of(best)


def _group_keys(queries: Tensor, rows: Tensor, first_group: int, num_groups: int) -> Tensor:
    """(Q, num_groups) int64 keys of the largest score of each group from ``first_group`` on."""
    width = rows.shape[1]
    tile = tile_for("group_maxima", width, rows.dtype, architecture_of(rows.device))
    keys = torch.empty((queries.shape[0], num_groups), dtype=torch.int64, device=rows.device)
    num_tiles = triton.cdiv(num_groups * GROUP.value, tile.items)
    group_maxima_kernel[(num_tiles * triton.cdiv(queries.shape[0], tile.positions),)](
        queries,
        rows,
        keys,
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
    return keys


def _row_keys(queries: Tensor, rows: Tensor, groups: Tensor) -> Tensor:
    """(Q, 16 m) int64 keys of the rows of each query's m groups."""
    num_candidates = groups.shape[1] * GROUP.value
    keys = torch.empty((queries.shape[0], num_candidates), dtype=torch.int64, device=rows.device)
    width = rows.shape[1]
    score_groups_kernel[(queries.shape[0] * triton.cdiv(num_candidates, CANDIDATES),)](
        queries,
        rows,
        groups.contiguous(),
        keys,
        rows.shape[0],
        groups.shape[1],
        width,
        ITEMS=CANDIDATES,
        WIDTH=min(64, triton.next_power_of_2(width)),
        ALIGN=alignment(width),
    )
    return keys
