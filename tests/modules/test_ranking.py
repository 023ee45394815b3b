"""Sharded ranking equals sorting the whole catalog, ties included, at every number of ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from tests.modules.shares import on_every_number_of_ranks
from tests.ranks import Ranks
from torch import Tensor

from shardrec.kernels.shard import RowShard
from shardrec.modules.ranking import Blocks, Ragged, ranks_in_lists, tie_keys, top_items


@dataclass(frozen=True)
class Problem:
    """Small whole numbers: every sum is exact and ties are everywhere."""

    states: Tensor
    table: Tensor
    seen: Ragged
    targets: Ragged
    allowed: Tensor


def whole_numbers(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-2, 3, shape, generator=generator).float()


def ragged(generator: torch.Generator, num_users: int, most: int, num_items: int) -> Ragged:
    lengths = torch.randint(0, most + 1, (num_users,), generator=generator)
    rows = [torch.randperm(num_items, generator=generator)[:length] for length in lengths.tolist()]
    return torch.cat([*rows, lengths[:0]]), lengths


def problem_of(num_users: int, num_items: int, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    return Problem(
        states=whole_numbers(generator, num_users, 6),
        table=whole_numbers(generator, num_items, 6),
        seen=ragged(generator, num_users, min(9, num_items), num_items),
        targets=ragged(generator, num_users, min(3, num_items), num_items),
        allowed=torch.rand(num_items, generator=generator) < 0.8,
    )


def rows_of(pairs: Ragged) -> list[list[int]]:
    return [part.tolist() for part in pairs[0].split(pairs[1].tolist())]


def sorted_catalog(
    problem: Problem, user: int, hidden: set[int], first_item: int = 0
) -> list[tuple[float, int]]:
    """Pairs of negative score and item, best first; ties by the key of ``first_item`` + item."""
    scores = (problem.states[user].double() @ problem.table.double().T).tolist()
    pairs = [(-score, item) for item, score in enumerate(scores) if item not in hidden]
    keys = tie_keys(torch.arange(first_item, first_item + len(scores))).tolist()
    return sorted(pairs, key=lambda pair: (pair[0], keys[pair[1]]))


def expected_top(
    problem: Problem, k: int, *, hide: bool, first_item: int = 0
) -> tuple[list[list[float]], list[list[int]]]:
    scores, items = [], []
    blocked = set((~problem.allowed).nonzero()[:, 0].tolist()) if hide else set()
    for user, seen in enumerate(rows_of(problem.seen)):
        hidden = set(seen) | blocked if hide else set()
        best = sorted_catalog(problem, user, hidden, first_item)[:k]
        missing = k - len(best)
        scores.append([-score for score, _ in best] + [float("-inf")] * missing)
        items.append([item for _, item in best] + [-1] * missing)
    return scores, items


def expected_ranks(problem: Problem, *, hide: bool, first_item: int = 0) -> list[int]:
    """Places in the sorted catalog; its size for a target that is hidden."""
    ranks = []
    blocked = set((~problem.allowed).nonzero()[:, 0].tolist()) if hide else set()
    for user, (seen, targets) in enumerate(
        zip(rows_of(problem.seen), rows_of(problem.targets), strict=True)
    ):
        for target in targets:
            hidden = set(seen) | blocked if hide else set()
            order = [item for _, item in sorted_catalog(problem, user, hidden, first_item)]
            ranks.append(order.index(target) if target in order else len(problem.table))
    return ranks


def whole(problem: Problem) -> RowShard:
    return RowShard(problem.table, 0, len(problem.table), None)


def own_part(pairs: Ragged, first: int, last: int) -> Ragged:
    offsets = [0, *pairs[1].cumsum(0).tolist()]
    return pairs[0][offsets[first] : offsets[last]], pairs[1][first:last]


def rank_a_share(
    problem: Problem, row_edges: list[int], user_edges: list[int], k: int, hide: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rank = dist.get_rank()
    low, high = row_edges[rank], row_edges[rank + 1]
    first, last = user_edges[rank], user_edges[rank + 1]
    shard = RowShard(problem.table[low:high], low, len(problem.table), dist.group.WORLD)
    states, blocks = problem.states[first:last], Blocks(states=5, rows=7)
    seen, targets = (own_part(pairs, first, last) for pairs in (problem.seen, problem.targets))
    allowed = problem.allowed if hide else None
    seen_or_none = seen if hide else None
    scores, items = top_items(states, shard, k, seen=seen_or_none, allowed=allowed, blocks=blocks)
    num_items = len(problem.table)
    _, everything = top_items(
        states, shard, num_items, seen=seen_or_none, allowed=allowed, blocks=blocks
    )
    return scores, items, ranks_in_lists(everything, targets, missing=num_items)


@pytest.mark.parametrize("hide", [False, True], ids=["all", "hidden"])
@on_every_number_of_ranks
def test_lists_and_ranks_equal_a_full_sort_on_every_number_of_ranks(
    ranks: Ranks, row_edges: list[int], user_edges: list[int], hide: bool
) -> None:
    problem = problem_of(13, 41)
    pool = ranks(len(row_edges) - 1)
    parts = pool.run(rank_a_share, problem, row_edges, user_edges, 4, hide)
    scores, items, places = (torch.cat(column) for column in zip(*parts, strict=True))
    expected_scores, expected_items = expected_top(problem, 4, hide=hide)
    assert items.tolist() == expected_items
    assert scores.tolist() == expected_scores
    assert places.tolist() == expected_ranks(problem, hide=hide)


@pytest.mark.parametrize("k", [1, 3, 17, 60])
@pytest.mark.parametrize(
    "blocks", [Blocks(states=1, rows=1), Blocks(states=4, rows=10), Blocks()], ids=str
)
@pytest.mark.parametrize(("num_users", "num_items"), [(9, 53), (1, 1), (20, 2), (0, 5)])
def test_block_sizes_change_nothing(num_users: int, num_items: int, blocks: Blocks, k: int) -> None:
    problem = problem_of(num_users, num_items, seed=k)
    scores, items = top_items(
        problem.states,
        whole(problem),
        k,
        seen=problem.seen,
        allowed=problem.allowed,
        blocks=blocks,
    )
    expected_scores, expected_items = expected_top(problem, k, hide=True)
    assert (scores.dtype, items.dtype) == (torch.float32, torch.int64)
    assert (scores.tolist(), items.tolist()) == (expected_scores, expected_items)
    places = ranks_in_lists(items, problem.targets, missing=num_items)
    expected = expected_ranks(problem, hide=True)
    assert places.tolist() == [rank if rank < k else num_items for rank in expected]


def test_many_tiles_and_groups_equal_a_full_sort() -> None:
    problem = problem_of(3, 20_011)
    blocks = Blocks(states=4096, rows=1_700)
    scores, items = top_items(problem.states, whole(problem), 25, blocks=blocks)
    expected_scores, expected_items = expected_top(problem, 25, hide=False)
    assert items.tolist() == expected_items
    assert scores.tolist() == expected_scores


def test_random_floats_rank_as_a_float64_sort_where_margins_exceed_rounding() -> None:
    generator = torch.Generator().manual_seed(1)
    states, table = (torch.randn(n, 16, generator=generator) for n in (40, 3000))
    exact = states.double() @ table.double().T
    sorted_scores = exact.sort(1, descending=True)
    clear = (sorted_scores.values.diff(dim=1).abs() > 1e-5)[:, :10].all(1)
    assert clear.sum() > 20
    shard = RowShard(table, 0, 3000, None)
    scores, items = top_items(states, shard, 10, blocks=Blocks(states=7, rows=500))
    assert torch.equal(items[clear], sorted_scores.indices[clear, :10])
    torch.testing.assert_close(scores.double(), sorted_scores.values[:, :10], rtol=0, atol=1e-5)
    targets = torch.randint(0, 3000, (40,), generator=generator)
    own = exact.gather(1, targets[:, None])
    at_most = (exact > own + 1e-5).sum(1), (exact > own - 1e-5).sum(1) - 1
    _, everything = top_items(states, shard, 3000)
    places = ranks_in_lists(everything, (targets, torch.ones_like(targets)), missing=3000)
    assert ((at_most[0] <= places) & (places <= at_most[1])).all()


def test_indices_above_two_to_the_24_stay_exact() -> None:
    problem = problem_of(11, 37)
    first_row = 2**24 + 1
    shard = RowShard(problem.table, first_row, first_row + 37, None)
    shift = lambda pairs: (pairs[0] + first_row, pairs[1])  # noqa: E731
    seen, targets = shift(problem.seen), shift(problem.targets)
    allowed = torch.ones(first_row + 37, dtype=torch.bool)
    allowed[first_row:] = problem.allowed
    _, items = top_items(problem.states, shard, 5, seen=seen, allowed=allowed)
    expected = torch.tensor(expected_top(problem, 5, hide=True, first_item=first_row)[1])
    assert torch.equal(items, torch.where(expected < 0, -1, expected + first_row))
    _, everything = top_items(problem.states, shard, 37, seen=seen, allowed=allowed)
    places = ranks_in_lists(everything, targets, missing=37)
    assert places.tolist() == expected_ranks(problem, hide=True, first_item=first_row)


def test_padding_rows_are_never_returned_or_counted() -> None:
    problem = problem_of(5, 10)
    rows = torch.cat((problem.table, 100 * torch.ones(3, 6)))
    padded = RowShard(rows, 0, 10, None)
    states = problem.states.abs() + 1
    assert torch.equal(top_items(states, padded, 12)[1], top_items(states, whole(problem), 12)[1])


def test_repeated_and_shared_pairs_of_seen_items_are_handled() -> None:
    states, table = torch.ones(2, 1), torch.tensor([[5.0], [4.0], [3.0], [2.0]])
    shard = RowShard(table, 0, 4, None)
    seen = torch.tensor([0, 0, 1, 1]), torch.tensor([3, 1])
    assert top_items(states, shard, 2, seen=seen)[1].tolist() == [[2, 3], [0, 2]]


def test_half_precision_tables_are_scored_in_float32() -> None:
    problem = problem_of(6, 20)
    half = RowShard(problem.table.bfloat16(), 0, 20, None)
    scores, items = top_items(problem.states.bfloat16(), half, 5)
    assert scores.dtype == torch.float32
    assert items.tolist() == expected_top(problem, 5, hide=False)[1]


def test_no_gradient_and_no_change_of_inputs() -> None:
    problem = problem_of(6, 20)
    table, before = problem.table.clone().requires_grad_(), problem.states.clone()
    scores, _ = top_items(problem.states, RowShard(table, 0, 20, None), 5, seen=problem.seen)
    assert not scores.requires_grad
    assert torch.equal(problem.states, before)


def test_ranks_in_lists_equal_exact_ranks_within_the_list() -> None:
    problem = problem_of(30, 60)
    shard = whole(problem)
    _, items = top_items(problem.states, shard, 20, seen=problem.seen)
    everything = replace(problem, allowed=torch.ones(60, dtype=torch.bool))
    exact = torch.tensor(expected_ranks(everything, hide=True))
    found = ranks_in_lists(items, problem.targets, missing=60)
    assert torch.equal(found, exact.where(exact < 20, 60))


def test_scores_that_are_not_numbers_are_refused() -> None:
    table = torch.ones(4, 2)
    table[2] = float("nan")
    shard = RowShard(table, 0, 4, None)
    with pytest.raises(FloatingPointError, match="scores must be numbers, got 3 NaN"):
        top_items(torch.ones(3, 2), shard, 2)


def lists_under_autocast(problem: Problem) -> Tensor:
    rank = dist.get_rank()
    half = len(problem.table) // 2
    rows = problem.table[:half] if rank == 0 else problem.table[half:]
    shard = RowShard(rows, rank * half, len(problem.table), dist.group.WORLD)
    with torch.autocast("cpu", torch.bfloat16):
        return top_items(problem.states, shard, len(problem.table))[1]


def test_autocast_changes_no_rank(ranks: Ranks) -> None:
    generator = torch.Generator().manual_seed(2)
    whole_problem = problem_of(11, 40)
    # Random floats, which bfloat16 would round and so put into another order.
    table = torch.randn(whole_problem.table.shape, generator=generator)
    problem = replace(whole_problem, table=table)
    expected = top_items(problem.states, whole(problem), 40)[1]
    for found in ranks(2).run(lists_under_autocast, problem):
        assert torch.equal(found, expected)


def not_numbers(rank_of_nan: int) -> str:
    rank = dist.get_rank()
    rows = torch.ones(2, 2)
    if rank == rank_of_nan:
        rows[0] = float("nan")
    shard = RowShard(rows, 2 * rank, 4, dist.group.WORLD)
    try:
        top_items(torch.ones(3, 2), shard, 2)
    except FloatingPointError as error:
        return str(error)
    return "no error"


def test_a_score_that_is_not_a_number_counts_once_for_each_state(ranks: Ranks) -> None:
    for message in ranks(2).run(not_numbers, 1):
        assert message.startswith("scores must be numbers, got 6 NaN"), message


def refuse_on_one_rank(bad_rank: int) -> str:
    rank = dist.get_rank()
    shard = RowShard(torch.ones(3, 2), 3 * rank, 6, dist.group.WORLD)
    seen = torch.tensor([99 if rank == bad_rank else 1]), torch.tensor([1])
    try:
        top_items(torch.ones(1, 2), shard, 1, seen=seen)
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_wrong_argument_on_one_rank_stops_all_of_them(ranks: Ranks) -> None:
    first, second = ranks(2).run(refuse_on_one_rank, 1)
    assert first.startswith("arguments must fit on every rank, got a refusal on ranks [1]")
    assert second.startswith("seen must be items in [0, 6), got 99 to 99")


def rank_with_other_forms(case: str) -> str:
    rank = dist.get_rank()
    num_rows = 7 if case == "gap" else 6
    shard = RowShard(torch.ones(3, 2), 3 * rank, num_rows, dist.group.WORLD)
    seen = (torch.tensor([1]), torch.tensor([1])) if case == "seen" and rank else None
    try:
        top_items(torch.ones(1, 2), shard, 2 if case == "k" and rank else 1, seen=seen)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("k", "must be the same on every rank"),
        ("seen", "must be the same on every rank"),
        ("gap", "must hold 7 rows together, got 6"),
    ],
)
def test_ranks_that_disagree_are_stopped(ranks: Ranks, case: str, message: str) -> None:
    assert all(message in answer for answer in ranks(2).run(rank_with_other_forms, case))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"states": torch.ones(3, 5)}, r"states must be of shape \(B, 2\), got \(3, 5\)"),
        ({"allowed": torch.ones(3, dtype=torch.bool)}, "allowed must be bool of length 4"),
        ({"allowed": torch.ones(4)}, "allowed must be bool of length 4, got torch.float32"),
        (
            {"seen": (torch.tensor([1]), torch.tensor([1, 1, 0]))},
            "seen must have one length for each of 3 states, adding up to its 1 values",
        ),
        (
            {"seen": (torch.tensor([4]), torch.tensor([1, 0, 0]))},
            r"seen must be items in \[0, 4\), got 4 to 4",
        ),
        (
            {"seen": (torch.tensor([0.0]), torch.tensor([1, 0, 0]))},
            "seen must be int64, got torch.float32",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    arguments = {"states": torch.ones(3, 2), "k": 2, **changes}
    shard = RowShard(torch.ones(4, 2), 0, 4, None)
    with pytest.raises(ValueError, match=message):
        top_items(shard=shard, **arguments)  # type: ignore[arg-type]


def test_tie_keys_are_distinct_and_far_from_the_order_of_the_items() -> None:
    for first in (0, 2**31 - 50_000, 2**40):
        keys = tie_keys(torch.arange(first, first + 100_000))
        assert keys.min() >= 0 and len(keys.unique()) == 100_000
        # The mean place of the first thousand items, in units of its standard deviation.
        place = keys.argsort().argsort()[:1000].double().mean() / 100_000
        assert abs(place - 0.5) < 4 * (1 / 12 / 1000) ** 0.5
        assert torch.equal(tie_keys(torch.tensor([first + 7])), keys[7:8])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_ranks_as_the_cpu_does() -> None:
    problem = problem_of(50, 3000)
    move = lambda pairs: (pairs[0].cuda(), pairs[1].cuda())  # noqa: E731
    shard = RowShard(problem.table.cuda(), 0, 3000, None)
    states, seen, targets = problem.states.cuda(), move(problem.seen), move(problem.targets)
    allowed = problem.allowed.cuda()
    scores, items = top_items(states, shard, 20, seen=seen, allowed=allowed)
    assert (scores.tolist(), items.tolist()) == expected_top(problem, 20, hide=True)
    _, everything = top_items(states, shard, 3000, seen=seen, allowed=allowed)
    places = ranks_in_lists(everything, targets, missing=3000)
    assert places.tolist() == expected_ranks(problem, hide=True)
