from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from tests.ranks import RankError, Ranks


@dataclass
class Number:
    value: int


def total(number: Number) -> Number:
    value = torch.tensor(number.value + dist.get_rank())
    dist.all_reduce(value)
    return Number(int(value))


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("asked to fail")
    dist.barrier()


def end_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise SystemExit(3)
    dist.barrier()


def threads() -> int:
    return torch.get_num_threads()


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_ranks_add_up(ranks: Ranks, num_ranks: int) -> None:
    expected = Number(sum(10 + rank for rank in range(num_ranks)))
    assert ranks(num_ranks).run(total, Number(10)) == [expected] * num_ranks


def test_processes_are_kept_between_runs(ranks: Ranks) -> None:
    ranks(2).run(threads)
    before = [worker.pid for worker in ranks.workers[:2]]
    ranks(2).run(total, Number(1))
    assert [worker.pid for worker in ranks.workers[:2]] == before


def test_workers_use_one_thread(ranks: Ranks) -> None:
    assert ranks(2).run(threads) == [1, 1]


def test_failing_rank_is_named_and_the_next_run_works(ranks: Ranks) -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2:(.|\n)*asked to fail"):
        ranks(2).run(fail_on, 1)
    assert ranks(2).run(total, Number(0)) == [Number(1)] * 2


@pytest.mark.slow
def test_no_answer_in_time_is_an_error(ranks: Ranks) -> None:
    with pytest.raises(RankError, match="rank"):
        ranks(2).run(end_on, 0, timeout=3)
    assert ranks(1).run(total, Number(5)) == [Number(5)]
