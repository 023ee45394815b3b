"""The sum of row gradients over replicas: exact, the same bits everywhere, by the cheaper way."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from tests.group_traffic import counted_traffic
from tests.ranks import Ranks
from torch import Tensor

from shardrec.modules.replicas import Replicas
from shardrec.modules.row_updates import sparse_gradient

NUM_ROWS, WIDTH = 40, 4
# What each replica has: a dense gradient, none, or so many sparse rows.
CASES: dict[str, list[str | int]] = {
    "dense": ["dense", "dense", "dense"],
    "dense and none": ["none", "dense", "none"],
    "dense and sparse": [5, "dense", "none"],
    "few rows": [3, 6, 2],
    "few rows and none": ["none", 7, "none"],
    "many rows": [38, 39, 37],
    "one without an entry": [0, 4, 0],
    "none": ["none", "none", "none"],
}


def gradient_of(kind: str | int, replica: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(replica)
    if kind == "none":
        return None
    values = torch.randn(NUM_ROWS, WIDTH, generator=generator) * 10.0**replica
    if isinstance(kind, str):
        return values
    rows = torch.randperm(NUM_ROWS, generator=generator)[:kind].sort().values
    return sparse_gradient(rows, values[rows], NUM_ROWS)


def summed(kinds: list[str | int]) -> tuple[Tensor | None, Tensor | None, list[str]]:
    """The sum as dense and its rows if it is sparse, and which collectives ran."""
    replica = dist.get_rank()
    group = dist.group.WORLD
    assert group is not None
    rows = torch.zeros(NUM_ROWS, WIDTH)
    with counted_traffic() as traffic:
        found = Replicas(group, group).sum_gradients(gradient_of(kinds[replica], replica), rows)
    names = sorted(name for (_, name), sent in traffic.items() if sent > 16)
    if found is None or not found.is_sparse:
        return found, None, names
    return found.to_dense(), found.indices()[0], names


@pytest.mark.parametrize("num_replicas", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_the_sum_is_exact_and_the_same_on_all_replicas(
    ranks: Ranks, case: str, num_replicas: int
) -> None:
    kinds = CASES[case][:num_replicas]
    parts = [gradient_of(kind, replica) for replica, kind in enumerate(kinds)]
    there = [part for part in parts if part is not None]
    (first, entries, names), *others = ranks(num_replicas).run(summed, kinds)
    if not there:
        assert first is None
        return
    assert first is not None
    expected = sum(part.to_dense().double() for part in there)
    torch.testing.assert_close(first.double(), expected, rtol=1e-6, atol=1e-5)
    if any(kind == "dense" for kind in kinds):
        assert entries is None and names == ["allreduce"]
    else:
        touched = torch.cat([part.indices()[0] for part in there]).unique()
        assert entries is not None and torch.equal(entries, touched)
        assert names == (["allreduce"] if case == "many rows" else ["_allgather_base"])
    for other, its_entries, _ in others:
        assert other is not None and torch.equal(other, first)
        assert entries is None or (its_entries is not None and torch.equal(its_entries, entries))


def differ_in_a_bit(rank: int) -> str:
    group = dist.group.WORLD
    assert group is not None
    rows = torch.ones(5, WIDTH)
    if dist.get_rank() == rank:
        rows[3, 1] = torch.nextafter(rows[3, 1], torch.tensor(2.0))
    try:
        Replicas(group, group).require_equal([torch.zeros(5), rows])
    except RuntimeError as error:
        return str(error)
    return "equal"


def test_replicas_that_differ_in_one_bit_are_found_on_all_ranks(ranks: Ranks) -> None:
    assert ranks(3).run(differ_in_a_bit, -1) == ["equal"] * 3
    for said in ranks(3).run(differ_in_a_bit, 1):
        assert "the 3 replicas of the table must hold the same bits" in said


def parts(num_rows: int) -> tuple[int, int]:
    group = dist.group.WORLD
    assert group is not None
    part = Replicas(group, group).part(num_rows)
    return part.start, part.stop


def test_replicas_save_each_row_once(ranks: Ranks) -> None:
    assert ranks(3).run(parts, 7) == [(0, 2), (2, 4), (4, 7)]
    assert ranks(2).run(parts, 1) == [(0, 0), (0, 1)]
