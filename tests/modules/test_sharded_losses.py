"""Invariant A for the losses: the same batch on 1, 2 or 3 ranks gives the same numbers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from tests.every_loss import config_cases, config_of, dense
from tests.losses import LOSSES
from tests.pipeline.choices import (
    Choice,
    assert_same_choices,
    of_all_ranks,
    recorded_choices,
)
from tests.ranks import RankError, Ranks
from tests.tolerance import TOLERANCE

from shardrec.kernels import RowShard
from shardrec.modules.losses import CCE, Step

NUM_POSITIONS, NUM_ITEMS, WIDTH = 53, 211, 12
SEED = 8  # one with which every choice is certain
# Ends of the ranks' positions and rows: uneven, one rank without positions, one without rows.
POSITION_ENDS = {1: (53,), 2: (37, 53), 3: (20, 20, 53)}
ROW_ENDS = {1: (211,), 2: (106, 211), 3: (120, 211, 211)}


@dataclass
class Result:
    loss: float
    statistics: dict[str, float]
    grad_states: torch.Tensor
    grad_rows: torch.Tensor
    choices: list[Choice]


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    states = torch.randn(NUM_POSITIONS, WIDTH, generator=generator)
    table = torch.randn(NUM_ITEMS, WIDTH, generator=generator)
    targets = torch.randint(0, NUM_ITEMS, (NUM_POSITIONS,), generator=generator)
    weights = torch.rand(NUM_POSITIONS, generator=generator)
    counts = torch.randint(0, 50, (NUM_ITEMS,), generator=generator)
    return states, table, targets, weights, counts


def part(ends: tuple[int, ...], rank: int) -> slice:
    return slice(ends[rank - 1] if rank else 0, ends[rank])


def sharded_loss(case: str, with_group: bool = True, in_bfloat16: bool = False) -> Result:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    states, table, targets, weights, counts = batch()
    if in_bfloat16:  # eighths have exact sums, so every shape of a product chooses alike
        states, table = (one.mul(8).round().div(8) for one in (states, table))
    own, held = part(POSITION_ENDS[num_ranks], rank), part(ROW_ENDS[num_ranks], rank)
    own_states = states[own].clone().requires_grad_()
    rows = table[held].clone().requires_grad_()
    group = dist.group.WORLD if with_group else None
    shard = RowShard(rows, held.start, NUM_ITEMS, group)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16)
    with recorded_choices() as choices, autocast:
        output = config_of(case)(
            own_states,
            shard,
            targets[own],
            weights=weights[own],
            step=Step(seed=3, step=7, item_counts=counts),
        )
    output.loss.backward()
    return Result(
        float(output.loss),
        output.statistics,
        dense(own_states.grad),
        dense(rows.grad),
        choices,
    )


@pytest.mark.parametrize("case", config_cases())
def test_ranks_do_not_change_a_loss_or_its_gradients(ranks: Ranks, case: str) -> None:
    alone = ranks(1).run(sharded_loss, case, False)[0]
    assert alone.loss > 0 and alone.grad_states.abs().sum() > 0 and alone.grad_rows.abs().sum() > 0
    for num_ranks in (1, 2, 3):
        results = ranks(num_ranks).run(sharded_loss, case)
        if LOSSES[case.partition("-")[0]].chooses:
            assert len(alone.choices) == 1
            assert_same_choices([result.choices for result in results], alone.choices)
        for result in results:
            assert result.loss == pytest.approx(alone.loss, rel=2e-6)
            assert result.statistics == alone.statistics
        grad_states = torch.cat([result.grad_states for result in results])
        grad_rows = torch.cat([result.grad_rows for result in results])
        torch.testing.assert_close(grad_states, alone.grad_states, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(grad_rows, alone.grad_rows, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", config_cases())
def test_ranks_do_not_change_a_loss_in_bfloat16(ranks: Ranks, case: str) -> None:
    alone = ranks(1).run(sharded_loss, case, False, True)[0]
    exact = ranks(1).run(sharded_loss, case, False)[0]
    near = TOLERANCE[torch.bfloat16]
    assert alone.loss == pytest.approx(exact.loss, rel=10 * near)
    for num_ranks in (1, 2, 3):
        results = ranks(num_ranks).run(sharded_loss, case, True, True)
        for choice in alone.choices:
            found = of_all_ranks([result.choices[0] for result in results])
            assert all(map(torch.equal, found.chosen, choice.chosen))
        for result in results:
            assert result.loss == pytest.approx(alone.loss, rel=near)
        for name in ("grad_states", "grad_rows"):
            gradient = torch.cat([getattr(result, name) for result in results])
            assert gradient.dtype == torch.float32
            expected = getattr(alone, name)
            atol = near * float(expected.abs().max())
            torch.testing.assert_close(gradient, expected, rtol=near, atol=atol)


def refused_on_one_rank() -> str:
    states = torch.zeros(2, 4)
    target = 99 if dist.get_rank() == 1 else 0
    shard = RowShard(torch.zeros(5, 4), 5 * dist.get_rank(), 10, dist.group.WORLD)
    try:
        CCE()(states, shard, torch.tensor([0, target]), step=Step(seed=0, step=0))
    except ValueError as error:
        return str(error)
    return ""


def test_a_bad_target_on_one_rank_is_an_error_on_every_rank(ranks: Ranks) -> None:
    messages = ranks(2).run(refused_on_one_rank)
    assert "refusal on rank 1 of 2" in messages[0]
    assert "targets must be in [0, 10), got 0..99" in messages[1]


def refused_rows(first_rows: list[int], num_items: list[int]) -> str:
    rank = dist.get_rank()
    shard = RowShard(torch.zeros(5, 4), first_rows[rank], num_items[rank], dist.group.WORLD)
    try:
        CCE()(torch.zeros(1, 4), shard, torch.tensor([0]), step=Step(seed=0, step=0))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("first_rows", "num_items"),
    [([5, 0], [10, 10]), ([0, 6], [11, 11]), ([0, 5], [10, 11]), ([0, 5], [9, 9])],
    ids=["swapped", "gap", "two sizes", "padded"],
)
def test_shards_that_are_not_the_table_are_an_error_on_every_rank(
    first_rows: list[int], num_items: list[int], ranks: Ranks
) -> None:
    for message in ranks(2).run(refused_rows, first_rows, num_items):
        assert "shards must hold every row of the table once, in the order of ranks" in message
        first, total = first_rows[1], num_items[1]
        assert f"{first}:{first + 5} of {total}; check" in message


def test_a_failing_function_is_reported(ranks: Ranks) -> None:
    with pytest.raises(RankError, match="KeyError"):
        ranks(2).run(sharded_loss, "no such case")
