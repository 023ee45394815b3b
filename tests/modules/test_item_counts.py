"""Tables of a proposal: built once for a run, of the size that a plan counts."""

import pytest
import torch
from tests.kernels.interpreted.counted import peak_bytes
from torch import Tensor

from shardrec.kernels.negatives import Popularity
from shardrec.kernels.ranks.traffic import Workload
from shardrec.modules.item_counts import ItemCounts
from shardrec.modules.losses import CCEMinus, Loss, Step

NUM_ITEMS = 50_000


def counts_of_items() -> Tensor:
    return torch.randint(0, 99, (NUM_ITEMS,), generator=torch.Generator().manual_seed(0))


def losses_of_two_steps(loss: Loss, counts: Tensor | ItemCounts) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(9, 4, generator=generator)
    table = torch.randn(NUM_ITEMS, 4, generator=generator)
    steps = (Step(seed=1, step=step, item_counts=counts) for step in range(2))
    return [float(loss(states, table, torch.arange(9), step=step).loss) for step in steps]


@pytest.mark.parametrize("proposal", ["popularity", "in_batch", "mixed"])
def test_a_table_is_built_once_and_draws_the_same(
    proposal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    original = Popularity.__init__

    def spy(self: Popularity, counts: Tensor, exponent: float = 1.0) -> None:
        built.append(exponent)
        original(self, counts, exponent)

    monkeypatch.setattr(Popularity, "__init__", spy)
    loss = CCEMinus(num_negatives=20, proposal=proposal, popularity_exponent=0.5)
    kept = losses_of_two_steps(loss, ItemCounts(counts_of_items()))
    assert built == [0.5] * (proposal == "popularity")
    assert kept[0] != kept[1]
    assert kept == losses_of_two_steps(loss, counts_of_items())


@pytest.mark.parametrize("proposal", ["popularity", "in_batch", "mixed"])
@pytest.mark.parametrize("size", [NUM_ITEMS - 1, NUM_ITEMS + 1])
def test_counts_of_another_catalog_are_refused(proposal: str, size: int) -> None:
    loss = CCEMinus(num_negatives=20, proposal=proposal)
    with pytest.raises(ValueError, match=f"count for each of {NUM_ITEMS} items, got {size};"):
        losses_of_two_steps(loss, torch.ones(size, dtype=torch.int64))


def test_a_plan_counts_the_table_and_it_is_built_in_twice_its_size() -> None:
    counts = ItemCounts(counts_of_items())
    for ranks in (1, 4):
        work = Workload(num_positions=100, num_items=NUM_ITEMS, num_ranks=ranks, width=8)
        (table,) = counts.popularity(1.0).tables
        assert CCEMinus(proposal="popularity").cost(work).table_bytes == table.nbytes
        assert CCEMinus(proposal="mixed").cost(work).table_bytes == 0
    held = peak_bytes(lambda: Popularity(counts.counts))
    assert 2 * table.nbytes <= held <= 2.1 * table.nbytes
