"""CCE- over shards: states are sent, or the rows in use are fetched, by counted bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.ranks import Ranks
from torch import Tensor

from shardrec.kernels import RowShard, sampled_cross_entropy
from shardrec.kernels.cce_minus import sampled_cross_entropy_cost
from shardrec.kernels.negatives import Popularity
from shardrec.kernels.ranks.communicator import Communicator
from shardrec.kernels.ranks.traffic import Workload

NUM_POSITIONS, NUM_ITEMS, WIDTH = 311, 20_003, 12
# Ends of the ranks' positions and rows: uneven, one rank without positions, one without rows.
POSITION_ENDS = {1: (311,), 2: (154, 311), 3: (150, 150, 311)}
ROW_ENDS = {1: (20_003,), 2: (10_002, 20_003), 3: (12_000, 20_003, 20_003)}

# Options, and what is sent where there are several ranks.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "few-shared-by-all": ({"num_negatives": 40, "share": None}, "rows"),
    "two-blocks": ({"num_negatives": 40, "share": 156}, "rows"),
    "sparse-gradient": ({"num_negatives": 40, "share": None, "sparse_grad": True}, "rows"),
    "cosine": ({"num_negatives": 40, "share": None, "normalize": True, "temperature": 0.3}, "rows"),
    "parity": ({"num_negatives": 40, "share": None, "parity": True}, "rows"),
    "popular": ({"num_negatives": 40, "share": None, "proposal": "popularity"}, "rows"),
    "many-shared-by-all": ({"num_negatives": 600, "share": None}, "states"),
    "many-blocks": ({"num_negatives": 40, "share": 16}, "states"),
}


@dataclass
class Result:
    loss: float
    losses: Tensor
    grad_states: Tensor
    grad_rows: Tensor
    all_to_alls: int
    received_bytes: float


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    states = torch.randn(NUM_POSITIONS, WIDTH, generator=generator)
    table = torch.randn(NUM_ITEMS, WIDTH, generator=generator)
    targets = torch.randint(0, NUM_ITEMS, (NUM_POSITIONS,), generator=generator)
    return states, table, targets, torch.rand(NUM_POSITIONS, generator=generator)


def options_of(case: str) -> dict[str, Any]:
    options = dict(CASES[case][0])
    if options.get("proposal") == "popularity":
        counts = torch.arange(NUM_ITEMS) % 97
        options["proposal"] = Popularity(counts)
    return options


class Received:
    """Counts what arrives from other ranks: vectors of the model's width."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.bytes, self.all_to_alls = 0.0, 0
        gather, scatter = Communicator.start_all_gather_rows, Communicator.start_reduce_scatter
        all_to_all = Communicator.all_to_all

        def start_gather(ranks: Communicator, local: Tensor, counts: Any) -> Any:
            self.note(local.new_empty(sum(counts), *local.shape[1:]))
            return gather(ranks, local, counts)

        def start_reduce_scatter(ranks: Communicator, full: Tensor, counts: Any) -> Any:
            if ranks.group is not None:
                self.note(full)
            return scatter(ranks, full, counts)

        def counted_all_to_all(ranks: Communicator, *args: Any) -> Tensor:
            received = all_to_all(ranks, *args)
            self.all_to_alls += 1
            self.note(received)
            return received

        patch.setattr(Communicator, "start_all_gather_rows", start_gather)
        patch.setattr(Communicator, "start_reduce_scatter", start_reduce_scatter)
        patch.setattr(Communicator, "all_to_all", counted_all_to_all)

    def note(self, tensor: Tensor) -> None:
        if tensor.dim() == 2 and tensor.shape[1] == WIDTH:
            others = 1 - 1 / dist.get_world_size()
            self.bytes += tensor.numel() * tensor.element_size() * others


def on_ranks(case: str) -> Result:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    states, table, targets, weights = batch()
    own, held = part(POSITION_ENDS[num_ranks], rank), part(ROW_ENDS[num_ranks], rank)
    shard = RowShard(table[held].requires_grad_(), held.start, NUM_ITEMS, dist.group.WORLD)
    with pytest.MonkeyPatch.context() as patch:
        received = Received(patch)
        mean = losses_of(case, states[own].requires_grad_(), shard, targets[own], weights[own])
    each = losses_of(
        case, states[own].requires_grad_(), shard, targets[own], weights[own], reduction="none"
    )
    return Result(mean.loss, each.losses, mean.grad_states, mean.grad_rows, received.all_to_alls,
                  received.bytes)  # fmt: skip


def losses_of(
    case: str,
    states: Tensor,
    table: Tensor | RowShard,
    targets: Tensor,
    weights: Tensor,
    reduction: str = "mean",
) -> Result:
    rows = table.rows if isinstance(table, RowShard) else table
    value = sampled_cross_entropy(
        states, table, targets, weights=weights, seed=3, step=5, reduction=reduction,
        **options_of(case),
    )  # fmt: skip
    grad_states, grad_rows = torch.autograd.grad(value.sum(), (states, rows))
    dense = grad_rows.to_dense() if grad_rows.is_sparse else grad_rows
    assert grad_rows.is_sparse == bool(CASES[case][0].get("sparse_grad"))
    return Result(float(value.detach().sum()), value.detach(), grad_states, dense, 0, 0.0)


def part(ends: tuple[int, ...], rank: int) -> slice:
    return slice(ends[rank - 1] if rank else 0, ends[rank])


@pytest.mark.parametrize("case", CASES)
def test_either_way_gives_the_loss_and_gradients_of_one_process(ranks: Ranks, case: str) -> None:
    states, table, targets, weights = batch()
    inputs = states.requires_grad_(), table.requires_grad_(), targets, weights
    alone = losses_of(case, *inputs)
    each = losses_of(case, *inputs, reduction="none")
    for num_ranks in (1, 2, 3):
        results = ranks(num_ranks).run(on_ranks, case)
        fetches_rows = CASES[case][1] == "rows" and num_ranks > 1
        # One all-to-all in forward and one in backward, or none.
        assert [result.all_to_alls for result in results] == [2 * fetches_rows] * num_ranks
        for result in results:
            assert result.loss == pytest.approx(alone.loss, rel=2e-6)
        for name, expected in (
            ("losses", each.losses),
            ("grad_states", alone.grad_states),
            ("grad_rows", alone.grad_rows),
        ):
            found = torch.cat([getattr(result, name) for result in results])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ["few-shared-by-all", "many-shared-by-all", "many-blocks"])
def test_the_predicted_bytes_are_those_received_and_decide_which_way_is_taken(
    ranks: Ranks, case: str
) -> None:
    options, way = CASES[case]
    work = Workload(num_positions=NUM_POSITIONS, num_items=NUM_ITEMS, num_ranks=2, width=WIDTH)
    cost = sampled_cross_entropy_cost(work, options["num_negatives"], options["share"])
    assert ("candidates" in cost.received) == (way == "rows")
    assert ("states, twice" in cost.received) == (way == "states")
    for result in ranks(2).run(on_ranks, case):
        assert result.received_bytes == pytest.approx(sum(cost.received.values()), rel=0.05)
