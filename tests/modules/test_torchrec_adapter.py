from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from tests.ranks import Ranks
from torchrec.distributed import collective_utils, comm_ops

from shardrec.modules import torchrec_adapter
from shardrec.modules.torchrec_adapter import (
    FUSED_OPTIMIZERS,
    ShardedTable,
)

CPU = torch.device("cpu")


def build(num_rows: int = 10, optimizer: str = "sgd") -> ShardedTable:
    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    return ShardedTable(num_rows, 4, optimizer=optimizer, eps=1e-8, group=group, device=CPU)


def test_every_private_name_still_exists() -> None:
    table = build()
    assert torchrec_adapter._find_tbe(table._model) is table._tbe
    assert isinstance(collective_utils._INITIALIZED, bool)
    assert isinstance(comm_ops.GRADIENT_DIVISION, bool)


@pytest.mark.parametrize("name", ["_lookups", "_emb_modules", "emb_module"])
def test_a_private_name_that_is_gone_is_named(name: str) -> None:
    found: object = object()
    for other in reversed(torchrec_adapter._WAY_TO_TBE):
        found = SimpleNamespace() if other == name else SimpleNamespace(**{other: found})
    with pytest.raises(RuntimeError, match=rf"torchrec must have one object at .*\.{name}, got"):
        torchrec_adapter._find_tbe(found)


def test_another_kind_of_table_is_named() -> None:
    found: object = torch.nn.Linear(1, 1)
    for name in reversed(torchrec_adapter._WAY_TO_TBE):
        found = SimpleNamespace(**{name: [found]})
    with pytest.raises(RuntimeError, match="torchrec must have SplitTableBatched"):
        torchrec_adapter._find_tbe(found)


def test_rows_alias_the_storage_that_lookups_read() -> None:
    table = build()
    table.rows.copy_(torch.arange(40.0).view(10, 4))
    assert table.begin_lookup(torch.tensor([9, 2]))()[:, 0].tolist() == [36.0, 8.0]


def test_backward_records_pairs_and_changes_no_row() -> None:
    table = build()
    table.set_learning_rate(1.0)
    before = table.rows.clone()
    (
        table.begin_lookup(torch.tensor([3, 5, 3]))() * torch.tensor([[1.0], [2.0], [3.0]])
    ).sum().backward()
    assert torch.equal(table.rows, before)
    ((rows, gradients),) = table.pairs
    assert rows.tolist() == [3, 5, 3]
    assert gradients[:, 0].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("optimizer", FUSED_OPTIMIZERS)
def test_update_touches_the_given_rows_once(optimizer: str) -> None:
    table = build(optimizer=optimizer)
    table.set_learning_rate(0.5)
    before = table.rows.clone()
    table.update_rows(torch.tensor([7, 1]), torch.full((2, 4), 2.0))
    expected = torch.zeros(10, 4)
    expected[[1, 7]] = 1.0 if optimizer == "sgd" else 0.5  # Adagrad's first step has length lr
    torch.testing.assert_close(before - table.rows, expected)
    states = table.optimizer_states()
    assert {name: value.shape for name, value in states.items()} == {
        "sgd": {},
        "adagrad": {"sum": (10, 4)},
        "rowwise_adagrad": {"sum": (10,)},
    }[optimizer]


def test_a_table_larger_than_memory_is_refused_before_it_is_made() -> None:
    with pytest.raises(ValueError, match="catalog must fit in the memory of 1 ranks"):
        build(num_rows=10**12)


def test_building_and_looking_up_warn_of_nothing_and_restore_log_levels(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loggers = [
        logging.getLogger(name)
        for name in ("torchrec.distributed.planner", "torch.fx._symbolic_trace")
    ]
    levels = [logger.level for logger in loggers]
    build().begin_lookup(torch.tensor([1]))().sum().backward()
    assert [logger.level for logger in loggers] == levels
    assert [one for one in caplog.records if one.levelno >= logging.WARNING] == []


def count_gradients(divide: bool) -> tuple[list[float], bool]:
    """Look-up gradients by local row when every rank asks for all ten items."""
    before = comm_ops.get_gradient_division()
    comm_ops.set_gradient_division(divide)
    try:
        table = build()
        table.begin_lookup(torch.arange(10))().sum().backward()
        counts = torch.zeros(len(table.rows))
        for rows, gradients in table.pairs:
            counts.index_add_(0, rows, gradients[:, 0])
        return counts.tolist(), comm_ops.get_gradient_division()
    finally:
        comm_ops.set_gradient_division(before)


@pytest.mark.parametrize("divide", [True, False], ids=["divided", "not-divided"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_lookup_gradients_are_sums_whatever_torchrec_divides(
    ranks: Ranks, num_ranks: int, divide: bool
) -> None:
    for counts, setting in ranks(num_ranks).run(count_gradients, divide):
        assert counts == pytest.approx([num_ranks] * len(counts))
        assert setting == divide, "the setting belongs to other users too"


def first_rows(num_rows: int) -> tuple[int, int]:
    table = build(num_rows)
    return table.first_row, table.rows.shape[0]


@pytest.mark.parametrize(
    ("num_rows", "expected"),
    [(10, [(0, 4), (4, 4), (8, 2)]), (4, [(0, 2), (2, 2), (4, 0)]), (1, [(0, 1), (1, 0), (1, 0)])],
)
def test_shards_are_equal_blocks_and_the_last_may_be_short_or_empty(
    ranks: Ranks, num_rows: int, expected: list[tuple[int, int]]
) -> None:
    assert ranks(3).run(first_rows, num_rows) == expected


@pytest.mark.parametrize("num_items", [0, 1, 1023, 5000])
def test_ids_travel_in_many_small_bags_whatever_their_number(
    num_items: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU a thread sorts the ids of a bag, so that one bag would leave all others idle."""
    table, seen = build(), list[torch.Tensor]()
    send = torch.ops.fbgemm.block_bucketize_sparse_features

    def recorded(lengths: torch.Tensor, *args: object, **options: object) -> object:
        seen.append(lengths)
        return send(lengths, *args, **options)

    monkeypatch.setattr(torch.ops.fbgemm, "block_bucketize_sparse_features", recorded)
    found = table.begin_lookup(torch.arange(num_items) % 10)()
    assert torch.equal(found, table.rows[torch.arange(num_items) % 10])
    (lengths,) = seen
    assert lengths.numel() == torchrec_adapter.BAGS and lengths.sum() == num_items
    assert lengths.max() - lengths.min() <= 1
