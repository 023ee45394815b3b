"""Groups of like lengths: the best cut, and the same values whatever the groups."""

import itertools

import pytest
import torch
from torch import Tensor

from shardrec.modules.length_groups import LengthGroups, cut_lengths, num_slots

LENGTHS = torch.tensor([3, 12, 1, 0, 7, 2, 2, 3, 11, 1])


def cost(groups: list[tuple[int, int]], allowance: float) -> float:
    return sum(number * length + allowance for number, length in groups)


@pytest.mark.parametrize("least_saved", [0.0, 0.03, 0.2, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_no_other_cut_of_the_sorted_lengths_is_cheaper(seed: int, least_saved: float) -> None:
    lengths = torch.randint(1, 9, (8,), generator=torch.Generator().manual_seed(seed))
    ascending = lengths.sort().values.tolist()
    allowance = least_saved * sum(ascending)
    found = cut_lengths(lengths, least_saved)
    cheapest = min(
        cost([(b - a, ascending[b - 1]) for a, b in itertools.pairwise([0, *cuts, 8])], allowance)
        for size in range(8)
        for cuts in itertools.combinations(range(1, 8), size)
    )
    assert cost(found, allowance) == pytest.approx(cheapest)
    assert sum(number for number, _ in found) == 8


def test_equal_lengths_are_one_group_without_padding_and_nothing_is_none() -> None:
    assert cut_lengths(torch.full((9,), 4)) == [(9, 4)]
    assert LengthGroups.of(torch.full((9,), 4)).groups[0].slots is None
    assert cut_lengths(torch.zeros(3, dtype=torch.int64)) == []
    assert num_slots(torch.tensor([], dtype=torch.int64)) == 0


def test_sorted_values_come_back_in_their_order() -> None:
    groups = LengthGroups.of(LENGTHS)
    packed = torch.arange(int(LENGTHS.sum()))
    assert torch.equal(groups.restore(groups.sort(packed)), packed)
    starts = LENGTHS.cumsum(0) - LENGTHS
    expected = [
        (position, place, length)
        for length, start in sorted(zip(LENGTHS.tolist(), starts.tolist(), strict=True))
        for place, position in enumerate(range(start, start + length))
    ]
    assert groups.order is not None
    found = zip(
        groups.order.tolist(), groups.indices.tolist(), groups.lengths.tolist(), strict=True
    )
    assert list(found) == expected


def running_sums(values: Tensor, others: Tensor) -> Tensor:
    """Causal and not position-wise: running sums of a product."""
    return (values * others[..., None]).cumsum(1)


def test_a_function_of_groups_is_that_of_single_sequences_with_its_gradient() -> None:
    groups = LengthGroups.of(LENGTHS)
    assert 1 < len(groups.groups) < len(LENGTHS)
    generator = torch.Generator().manual_seed(0)
    number = int(LENGTHS.sum())
    values = torch.randn(number, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    others = torch.randn(number, generator=generator, dtype=torch.float64)
    weights = torch.randn(number, 4, generator=generator, dtype=torch.float64)
    found = groups.restore(groups.apply(running_sums, groups.sort(values), groups.sort(others)))
    parts = zip(values.split(LENGTHS.tolist()), others.split(LENGTHS.tolist()), strict=True)
    expected = torch.cat([running_sums(one[None], other[None])[0] for one, other in parts])
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((one * weights).sum(), values)[0] for one in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_padding_is_zero_and_is_dropped() -> None:
    seen = list[Tensor]()

    def note(values: Tensor) -> Tensor:
        seen.append(values)
        return values + 1

    groups = LengthGroups.of(torch.tensor([5, 4, 5]), least_saved=0.5)
    assert torch.equal(groups.apply(note, torch.ones(14)), torch.full((14,), 2.0))
    assert seen[0].tolist() == [[1, 1, 1, 1, 0], [1] * 5, [1] * 5]


@pytest.mark.parametrize("spread", [0.6, 0.9])
def test_a_few_groups_leave_little_padding_in_a_random_batch(spread: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for size in (16, 128, 512):
        drawn = torch.randn(size, generator=generator).mul(spread).add(2).exp()
        lengths = drawn.long().clamp(1, 50)
        assert 1 - int(lengths.sum()) / num_slots(lengths) < 0.12
        assert len(cut_lengths(lengths)) <= 16
