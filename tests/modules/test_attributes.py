"""Composed rows and the way of their gradient back, against one item at a time in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.modules.small_attributes import CATEGORIES, SmallAttributes
from torch import Tensor

from shardrec.modules import attributes as under_test
from shardrec.modules.attributes import AttributeSizes, AttributeVectors, ComposedRows
from shardrec.modules.catalog import Catalog
from shardrec.modules.catalog_config import CatalogConfig

CPU = torch.device("cpu")
NUM_ITEMS, WIDTH = 53, 8
SOURCE = SmallAttributes(NUM_ITEMS)


def make(ids: Tensor | None, first: int = 0, stop: int = NUM_ITEMS) -> ComposedRows:
    vectors = AttributeVectors(SOURCE.sizes, WIDTH, std=0.5, seed=3)
    own = None if ids is None else ids[first:stop]
    return ComposedRows(torch.empty(stop - first, WIDTH), own, SOURCE, vectors, first)


def some_ids() -> Tensor:
    return torch.randn(NUM_ITEMS, WIDTH, generator=torch.Generator().manual_seed(1))


def expected_rows(composed: ComposedRows, ids: Tensor | None, kept: Tensor) -> Tensor:
    vectors = copy.deepcopy(composed.vectors).double()
    return SOURCE.compose(vectors, None if ids is None else ids.double(), kept.double())


@pytest.mark.parametrize("block", [7, 65_536])
@pytest.mark.parametrize("with_ids", [True, False], ids=["add", "only"])
def test_a_row_is_its_id_and_the_vectors_of_its_attributes(
    monkeypatch: pytest.MonkeyPatch, with_ids: bool, block: int
) -> None:
    monkeypatch.setattr(under_test, "BLOCK_ROWS", block)
    ids = some_ids() if with_ids else None
    composed = make(ids)
    composed.compose()
    expected = expected_rows(composed, ids, SOURCE.trained(range(NUM_ITEMS)))
    torch.testing.assert_close(composed.rows.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("block", [7, 65_536])
def test_only_the_rows_that_are_asked_for_are_composed(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(under_test, "BLOCK_ROWS", block)
    composed = make(some_ids())
    composed.drop_ids(0.4, seed=5, step=9)
    composed.compose()
    expected = composed.rows.clone()
    asked = torch.arange(1, NUM_ITEMS, 3)
    composed.rows.fill_(torch.nan)
    composed.compose(asked)
    torch.testing.assert_close(composed.rows[asked], expected[asked])
    assert int(composed.rows.isnan().all(1).sum()) == NUM_ITEMS - len(asked)
    looked_up = torch.tensor([4, 4, 0, 52, 4])
    torch.testing.assert_close(composed.read(looked_up), expected[looked_up])
    assert composed.read(looked_up[:0]).shape == (0, WIDTH)


def test_an_item_without_training_events_has_attributes_alone() -> None:
    composed = make(some_ids())
    composed.compose()
    before = composed.rows.clone()
    other = make(some_ids() + 1)
    other.compose()
    changed = (other.rows != before).any(1)
    assert torch.equal(changed, SOURCE.trained(range(NUM_ITEMS)))


def test_ids_are_dropped_by_seed_step_and_item_alone() -> None:
    ids = torch.full((NUM_ITEMS, WIDTH), 100.0)

    def has_id(first: int, stop: int, seed: int, step: int) -> Tensor:
        composed = make(ids, first, stop)
        composed.drop_ids(0.5, seed=seed, step=step)
        composed.compose()
        return composed.rows[:, 0] > 50

    whole = has_id(0, NUM_ITEMS, seed=2**40 + 1, step=7)
    parts = [has_id(first, stop, 2**40 + 1, 7) for first, stop in ((0, 20), (20, 21), (21, 53))]
    assert torch.equal(torch.cat(parts), whole)
    for seed, step in ((2**40 + 1, 8), (1, 7)):
        assert not torch.equal(has_id(0, NUM_ITEMS, seed, step), whole)


def test_the_share_of_dropped_ids_is_as_asked() -> None:
    source = SmallAttributes(4000)
    vectors = AttributeVectors(source.sizes, 4, std=0.0, seed=3)
    ids = torch.ones(4000, 4)
    composed = ComposedRows(torch.empty(4000, 4), ids, source, vectors, 0)
    composed.drop_ids(0.25, seed=1, step=1)
    composed.compose()
    kept = composed.rows[source.trained(range(4000)), 0]
    assert kept.unique().tolist() == [0.0, 1.0]
    # 3600 items: the standard deviation of the mean is 0.0072.
    assert float(kept.mean()) == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("block", [7, 65_536])
@pytest.mark.parametrize("layout", ["dense", "sparse"])
@pytest.mark.parametrize("with_ids", [True, False], ids=["add", "only"])
def test_gradients_equal_autograd(
    monkeypatch: pytest.MonkeyPatch, with_ids: bool, layout: str, block: int
) -> None:
    monkeypatch.setattr(under_test, "BLOCK_ROWS", block)
    ids = some_ids() if with_ids else None
    composed = make(ids)
    composed.drop_ids(0.4, seed=5, step=9)
    # What was kept shows in the rows: ids far from zero.
    far = make(torch.full((NUM_ITEMS, WIDTH), 100.0))
    far.drop_ids(0.4, seed=5, step=9)
    far.compose()
    kept = far.rows[:, 0] > 50
    assert 5 < int(kept.sum()) < NUM_ITEMS - 10

    gradient = torch.randn(NUM_ITEMS, WIDTH, generator=torch.Generator().manual_seed(2))
    if layout == "sparse":
        gradient[torch.arange(NUM_ITEMS) % 3 > 0] = 0
    truth = copy.deepcopy(composed.vectors).double()
    leaf = None if ids is None else ids.double().requires_grad_()
    SOURCE.compose(truth, leaf, kept.double()).backward(gradient.double())

    given = gradient.to_sparse(1).coalesce() if layout == "sparse" else gradient.clone()
    of_ids = composed.pull_back(given)
    for name, parameter in composed.vectors.named_parameters():
        expected = truth.get_parameter(name).grad
        assert parameter.grad is not None and expected is not None
        torch.testing.assert_close(parameter.grad.double(), expected, rtol=1e-5, atol=1e-5)
    if leaf is None:
        assert of_ids is None
    else:
        assert of_ids is not None and of_ids.is_sparse == (layout == "sparse")
        torch.testing.assert_close(of_ids.to_dense().double(), leaf.grad, rtol=1e-6, atol=1e-6)


def test_a_missing_value_starts_at_zero() -> None:
    vectors = AttributeVectors(SOURCE.sizes, WIDTH, std=0.5, seed=3)
    is_zero = (vectors.values == 0).all(1).nonzero().flatten().tolist()
    assert is_zero == [0, CATEGORIES]


def test_attributes_may_be_vectors_alone_or_codes_alone() -> None:
    for sizes in (AttributeSizes(0, (), 3), AttributeSizes(4, (0,), 0)):
        vectors = AttributeVectors(sizes, WIDTH, std=0.5, seed=3)
        assert vectors.values.shape == (sizes.num_values, WIDTH)
        assert vectors.projection.shape == (sizes.width, WIDTH)


def make_catalog(attributes: str, **options: float) -> Catalog:
    config = CatalogConfig(attributes=attributes, **options)  # type: ignore[arg-type]
    return Catalog(NUM_ITEMS, WIDTH, config, group=None, device=CPU, seed=3, attributes=SOURCE)


def test_rows_follow_a_change_of_the_parameters() -> None:
    catalog = make_catalog("add")
    before = catalog.shard.rows.detach().clone()
    items = torch.arange(NUM_ITEMS)
    torch.testing.assert_close(catalog.lookup(items).detach(), before)
    catalog.begin_step(seed=1, step=1)
    catalog.lookup(items).square().sum().backward()
    catalog.squared_gradient_norm()
    with torch.no_grad():
        for parameter in catalog.attributes.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad)
    catalog.step()
    after = catalog.shard.rows.detach()
    assert (after != before).any(1).all()
    torch.testing.assert_close(catalog.lookup(items).detach(), after)


def test_a_dropped_id_is_there_again_after_a_step_that_is_skipped() -> None:
    catalog = make_catalog("add", id_dropout=0.5)
    whole = catalog.shard.rows.detach().clone()
    catalog.begin_step(seed=1, step=1)
    assert not torch.equal(catalog.shard.rows.detach(), whole)
    catalog.zero_grad()
    assert torch.equal(catalog.shard.rows.detach(), whole)


def test_without_attributes_a_catalog_that_asks_for_them_is_refused() -> None:
    config = CatalogConfig(attributes="add")
    with pytest.raises(ValueError, match="--item-attributes"):
        Catalog(NUM_ITEMS, WIDTH, config, group=None, device=CPU, seed=3)
    with pytest.raises(ValueError, match=r"catalog\.id_dropout must be 0"):
        CatalogConfig(id_dropout=0.1)
    with pytest.raises(ValueError, match="none, add, only"):
        CatalogConfig(attributes="all")


def test_attributes_alone_keep_nothing_for_an_item() -> None:
    state = make_catalog("only", learning_rate=0.1).state_dict()
    assert state["rows"].shape == (NUM_ITEMS, 0)
    assert [name for name in state if name.startswith("optimizer.")] == []
