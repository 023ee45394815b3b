from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.modules.small_catalogs import (
    BETAS,
    CPU,
    WIDTH,
    Case,
    alone,
    build,
    encoder_loss,
    initial_rows,
    learning_rate,
    own_part,
    table_loss,
)
from tests.ranks import Ranks
from torch import Tensor
from torch.nn import functional as F

from shardrec.modules.catalog import Catalog
from shardrec.modules.catalog_config import OPTIMIZERS, CatalogConfig

STEPS = 3
MAX_NORM = 1.5


def train_sharded(case: Case) -> dict[str, Any]:
    """What this rank has after a few steps with accumulation and global clipping."""
    catalog = build(case)
    norms = []
    for step in range(STEPS):
        for micro_batch in range(case.num_micro_batches):
            vectors = catalog.lookup(own_part(case.items(step, micro_batch)))
            loss = encoder_loss(vectors)
            if case.loss != "none":
                shard = catalog.shard
                loss = loss + table_loss(case, step, shard.rows, shard.first_row)
            loss.backward()
        catalog.merge_gradients()
        square = catalog.squared_gradient_norm()
        dist.all_reduce(square)
        norms.append(float(square.sqrt()))
        catalog.step((MAX_NORM / square.sqrt()).clamp(max=1), learning_rate(step))
    return {"norms": norms, "state": catalog.state_dict()}


class RowwiseAdagrad:
    """Written out: one accumulator a row, of the mean square of its gradient."""

    def __init__(self, parameters: list[Tensor], lr: float, eps: float) -> None:
        (self.rows,) = parameters
        self.param_groups = [{"lr": lr}]
        self.eps = eps
        self.sum = torch.zeros(self.rows.shape[0])

    @torch.no_grad()
    def step(self) -> None:
        gradient = self.rows.grad
        assert gradient is not None
        self.sum += gradient.square().mean(1)
        self.rows -= self.param_groups[0]["lr"] * gradient / (self.sum.sqrt() + self.eps)[:, None]


def reference_optimizer(case: Case, rows: Tensor) -> Any:
    makers: dict[str, Callable[[], Any]] = {
        "sgd": lambda: torch.optim.SGD([rows], lr=0.0),
        "adagrad": lambda: torch.optim.Adagrad([rows], lr=0.0, eps=1e-6),
        "rowwise_adagrad": lambda: RowwiseAdagrad([rows], lr=0.0, eps=1e-6),
        "adam": lambda: torch.optim.Adam([rows], lr=0.0, betas=BETAS, eps=1e-6),
        "sparse_adam": lambda: torch.optim.SparseAdam([rows], lr=1.0, betas=BETAS, eps=1e-6),
    }
    return makers[case.optimizer]()


def train_alone(case: Case) -> dict[str, Any]:
    """The same run with a plain tensor for the table and an optimizer of torch."""
    rows = initial_rows(case.num_items, seed=3).requires_grad_()
    sparse = case.loss != "dense"
    optimizer = reference_optimizer(case, rows)
    norms: list[float] = []
    for step in range(STEPS):
        rows.grad = None
        for micro_batch in range(case.num_micro_batches):
            loss = encoder_loss(F.embedding(case.items(step, micro_batch), rows, sparse=sparse))
            if case.loss != "none":
                loss = loss + table_loss(case, step, rows, 0)
            loss.backward()
        assert rows.grad is not None
        gradient = rows.grad.to_dense() if rows.grad.is_sparse else rows.grad
        norms.append(float(gradient.norm()))
        gradient = gradient * min(1.0, MAX_NORM / norms[-1])
        if case.optimizer == "sparse_adam":
            named = rows.grad.coalesce().indices() if sparse else torch.arange(len(rows))[None]
            gradient = torch.sparse_coo_tensor(
                named, gradient[named[0]], rows.shape, check_invariants=True
            )
        rows.grad = gradient
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        optimizer.step()
    return {"norms": norms, "rows": rows.detach()}


@pytest.mark.parametrize("loss", ["dense", "sparse", "none"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("num_ranks", "num_items"),
    [(1, 13), (2, 13), (3, 13), (3, 2)],
    ids=["W1", "W2", "W3", "W3-with-an-empty-shard"],
)
def test_one_row_gets_one_update_at_any_number_of_ranks(
    ranks: Ranks, num_ranks: int, num_items: int, optimizer: str, loss: str
) -> None:
    case = Case(optimizer, num_items, loss)
    expected = train_alone(case)
    found = ranks(num_ranks).run(train_sharded, case)
    rows = torch.cat([one["state"]["rows"] for one in found])
    torch.testing.assert_close(rows, expected["rows"], rtol=1e-5, atol=2e-6)
    for one in found:
        assert one["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert max(expected["norms"]) > MAX_NORM, "clipping has to be at work"


def look_up(case: Case, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    catalog = build(case)
    return catalog.lookup(parts[dist.get_rank()]).detach(), catalog.shard.rows.detach()


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_lookup_returns_vectors_in_the_order_asked(ranks: Ranks, num_ranks: int) -> None:
    case = Case("sgd", 10, "none")
    parts = [
        torch.tensor([9, 0, 3, 3, 7, 1]),
        torch.tensor([], dtype=torch.int64),
        torch.arange(10),
    ]
    found = ranks(num_ranks).run(look_up, case, parts)
    table = torch.cat([rows for _, rows in found])
    for (vectors, _), items in zip(found, parts, strict=False):
        assert torch.equal(vectors, table[items])


def make_shard(num_items: int) -> tuple[Tensor, int, int, bool]:
    shard = build(Case("sgd", num_items, "none")).shard
    return shard.rows.detach(), shard.first_row, shard.num_rows, shard.group is None


@pytest.mark.parametrize("num_items", [1, 2, 4, 20_000])
def test_initial_rows_depend_on_seed_and_item_only(ranks: Ranks, num_items: int) -> None:
    expected = initial_rows(num_items, seed=3)
    for num_ranks in (1, 2, 3):
        found = ranks(num_ranks).run(make_shard, num_items)
        assert torch.equal(torch.cat([rows for rows, *_ in found]), expected)
        for rows, first_row, num_rows, ungrouped in found:
            assert torch.equal(rows, expected[first_row : first_row + len(rows)])
            assert num_rows == num_items
            assert ungrouped == (num_ranks == 1)
    assert not torch.equal(initial_rows(num_items, seed=4), expected)


def test_initial_rows_are_normal_with_the_given_deviation() -> None:
    rows = initial_rows(20_000, seed=1)
    assert float(rows.std()) == pytest.approx(0.5, rel=0.01)
    assert float(rows.mean()) == pytest.approx(0.0, abs=0.01)
    assert rows.unique(dim=0).shape == rows.shape


def test_making_a_catalog_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    initial_rows(50, seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_lookup_gradient_stays_sparse_until_a_dense_one_joins() -> None:
    catalog = alone("sgd")
    catalog.lookup(torch.tensor([4, 7, 4])).sum().backward()
    catalog.merge_gradients()
    gradient = catalog.shard.rows.grad
    assert gradient is not None and gradient.is_sparse and gradient.is_coalesced()
    assert gradient.indices().tolist() == [[4, 7]]
    assert gradient.values()[:, 0].tolist() == [2.0, 1.0]
    catalog.shard.rows.sum().backward()
    catalog.lookup(torch.tensor([4])).sum().backward()
    catalog.merge_gradients()
    gradient = catalog.shard.rows.grad
    assert gradient is not None and not gradient.is_sparse
    assert gradient[[3, 4, 7], 0].tolist() == [1.0, 4.0, 2.0]


def test_merging_twice_changes_nothing() -> None:
    catalog = alone("sgd")
    catalog.lookup(torch.tensor([4, 7, 4])).sum().backward()
    norms = [float(catalog.squared_gradient_norm()) for _ in range(2)]
    assert norms == [5.0 * WIDTH] * 2


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zero_grad_forgets_lookups_and_losses(optimizer: str) -> None:
    catalog = alone(optimizer)
    catalog.lookup(torch.tensor([4])).sum().backward()
    catalog.shard.rows.sum().backward()
    catalog.zero_grad()
    assert float(catalog.squared_gradient_norm()) == 0.0
    before = catalog.shard.rows.detach().clone()
    catalog.step()
    assert torch.equal(catalog.shard.rows, before)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_step_counts_once_and_clears_the_gradient(optimizer: str) -> None:
    catalog = alone(optimizer)
    for count in (1, 2):
        catalog.lookup(torch.tensor([4])).sum().backward()
        catalog.step(learning_rate=0.5)
        state = catalog.state_dict()
        assert int(state["num_steps"]) == count
        assert float(state["learning_rate"]) == 0.5
        assert catalog.shard.rows.grad is None


def test_lookup_without_autograd_records_nothing() -> None:
    catalog = alone("sgd")
    with torch.no_grad():
        assert not catalog.lookup(torch.tensor([1, 2])).requires_grad
    assert float(catalog.squared_gradient_norm()) == 0.0


def look_up_two_at_a_time() -> Tensor:
    """Vectors of two look-ups begun before an update of the rows, taken after it."""
    catalog = build(Case("sgd", 10, "none"))
    rank = dist.get_rank()
    first = catalog.begin_lookup(torch.arange(rank, 10))
    second = catalog.begin_lookup(torch.full((2 * rank,), 9))
    with torch.no_grad():
        rows = catalog.shard.rows
        rows.copy_((catalog.shard.first_row + torch.arange(len(rows)))[:, None].expand_as(rows))
    return torch.cat([first(), second()]).detach()[:, 0]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_lookup_begun_early_reads_the_rows_as_they_are_at_its_end(
    ranks: Ranks, world_size: int
) -> None:
    for rank, found in enumerate(ranks(world_size).run(look_up_two_at_a_time)):
        assert found.tolist() == [*range(rank, 10), *[9] * 2 * rank]


def look_up_wrong_item(bad_rank: int) -> str:
    catalog = build(Case("sgd", 10, "none"))
    items = torch.tensor([3, 10 if dist.get_rank() == bad_rank else 4])
    begun = catalog.begin_lookup(items)
    with pytest.raises(ValueError) as caught:
        begun()
    vectors = catalog.lookup(torch.tensor([1]))  # nobody is left waiting
    return f"{caught.value} {vectors.shape[0]}"


def test_item_outside_the_catalog_is_refused_on_every_rank(ranks: Ranks) -> None:
    found = ranks(3).run(look_up_wrong_item, 1)
    assert "items must be in [0, 10), got 10 on this rank" in found[1]
    for rank in (0, 2):
        assert "got an item on another rank" in found[rank]


def test_wrong_item_tensors_are_refused() -> None:
    catalog = alone("sgd")
    for items in (torch.tensor([1], dtype=torch.int32), torch.tensor([[1]]), torch.tensor([0.5])):
        with pytest.raises(TypeError, match="items must be one-dimensional int64"):
            catalog.lookup(items)
    with pytest.raises(ValueError, match=r"got -1 on this rank"):
        catalog.lookup(torch.tensor([2, -1]))


def test_misspelt_or_senseless_options_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean rowwise_adagrad"):
        CatalogConfig(optimizer="rowwise_adagard")
    with pytest.raises(ValueError, match="learning_rate must be"):
        CatalogConfig(learning_rate=-1.0)
    with pytest.raises(ValueError, match="betas must be"):
        CatalogConfig(betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="width must be a positive multiple of 4, got 6; use 8"):
        Catalog(5, 6, CatalogConfig(), group=None, device=CPU, seed=0)
    with pytest.raises(ValueError, match="num_items must be at least 1"):
        Catalog(0, 8, CatalogConfig(), group=None, device=CPU, seed=0)


def build_without_a_group() -> str:
    with pytest.raises(ValueError) as caught:
        Catalog(5, 8, CatalogConfig(), group=None, device=CPU, seed=0)
    return str(caught.value)


def test_several_ranks_need_a_group(ranks: Ranks) -> None:
    for message in ranks(2).run(build_without_a_group):
        assert message.startswith("group must be given")


def train_on_a_subgroup(case: Case, members: list[int]) -> Tensor | None:
    group = dist.new_group(members)
    if dist.get_rank() not in members:
        return None
    catalog = Catalog(case.num_items, WIDTH, case.config, group=group, device=CPU, seed=3)
    items = case.items(0, 0)
    part = items[:4] if dist.get_rank() == members[0] else items[4:]
    shard = catalog.shard
    loss = encoder_loss(catalog.lookup(part))
    (loss + table_loss(case, 0, shard.rows, shard.first_row)).backward()
    catalog.step(learning_rate=learning_rate(0))
    return shard.rows.detach()


def test_catalog_may_live_on_a_part_of_the_ranks(ranks: Ranks) -> None:
    case = Case("rowwise_adagrad", 13, "dense")
    found = ranks(3).run(train_on_a_subgroup, case, [1, 2])
    assert found[0] is None
    whole = ranks(3).run(train_on_a_subgroup, case, [0, 1])
    torch.testing.assert_close(torch.cat(found[1:]), torch.cat(whole[:2]))


def test_description_names_the_plan(ranks: Ranks) -> None:
    for text in ranks(3).run(describe, 7):
        assert "catalog: 7 rows x 8 float32, row_wise over 3 ranks, kernel fused in cpu" in text
        assert "optimizer: rowwise_adagrad, deferred; 36 bytes a row" in text
        assert "rank 2: 1 rows from 6" in text


def describe(num_items: int) -> str:
    return build(Case("rowwise_adagrad", num_items, "none")).describe()
