from __future__ import annotations

import pytest
import torch
from tests.modules.small_catalogs import (
    Case,
    alone,
    build,
    encoder_loss,
    learning_rate,
    own_part,
    table_loss,
)
from tests.ranks import Ranks
from torch import Tensor

from shardrec.modules.catalog_config import OPTIMIZERS


def train_and_keep(case: Case, states: list[dict[str, Tensor]] | None) -> dict[str, Tensor]:
    """Two steps after loading the joined state of another number of ranks, or from scratch."""
    catalog = build(case)
    if states is not None:
        catalog.load_state_dict(join(states))
    for step in range(2):
        first = catalog.num_steps
        vectors = catalog.lookup(own_part(case.items(first, 0)))
        shard = catalog.shard
        (encoder_loss(vectors) + table_loss(case, first, shard.rows, shard.first_row)).backward()
        catalog.step(learning_rate=None if step else learning_rate(first))
    return catalog.state_dict()


def join(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The state of one process from those of all ranks."""
    joined = dict(states[0])
    for name in joined:
        if name == "rows" or name.startswith("optimizer."):
            joined[name] = torch.cat([state[name] for state in states])
    return joined


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_saved_at_one_number_of_ranks_goes_on_at_another(
    ranks: Ranks, optimizer: str
) -> None:
    case = Case(optimizer, 13, "sparse")
    states = ranks(3).run(train_and_keep, case, None)
    expected = join(ranks(1).run(train_and_keep, case, states))
    assert int(expected["num_steps"]) == 4
    for num_ranks in (2, 3):
        found = join(ranks(num_ranks).run(train_and_keep, case, states))
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_saved_state_is_restored_exactly(optimizer: str) -> None:
    catalog, other = alone(optimizer), alone(optimizer)
    catalog.lookup(torch.tensor([4, 5])).sum().backward()
    catalog.step(learning_rate=0.7)
    other.load_state_dict(catalog.state_dict())
    for name, value in other.state_dict().items():
        assert torch.equal(value, catalog.state_dict()[name]), name
    for each in (catalog, other):
        each.lookup(torch.tensor([4, 9])).square().sum().backward()
        each.step()
    assert torch.equal(catalog.shard.rows, other.shard.rows)


def test_state_of_a_smaller_catalog_leaves_new_rows_as_initialised() -> None:
    small, large = alone("adagrad", 20), alone("adagrad", 25)
    small.lookup(torch.tensor([4])).sum().backward()
    small.step()
    new_rows = large.shard.rows.detach()[20:].clone()
    large.load_state_dict(small.state_dict())
    assert torch.equal(large.shard.rows[:20], small.shard.rows)
    assert torch.equal(large.shard.rows[20:], new_rows)


def test_state_that_does_not_fit_is_refused() -> None:
    catalog = alone("adagrad")
    state = catalog.state_dict()
    with pytest.raises(ValueError, match="another optimizer"):
        catalog.load_state_dict(alone("sgd").state_dict())
    with pytest.raises(ValueError, match="join the saved shards"):
        catalog.load_state_dict(state | {"rows": state["rows"][:5]})
    with pytest.raises(ValueError, match="join the saved shards"):
        catalog.load_state_dict(alone("adagrad", 30).state_dict())
    with pytest.raises(ValueError, match="build the catalog with the saved width"):
        catalog.load_state_dict(state | {"rows": state["rows"][:, :4]})
