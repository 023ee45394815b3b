"""Chunks of states travel while others are worked on, and no loss notices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.ranks import Ranks
from torch import Tensor

from shardrec.kernels import (
    RowShard,
    block_logsumexp,
    cut_cross_entropy,
    reduced_cross_entropy,
    sampled_cross_entropy,
    scalable_cross_entropy,
)
from shardrec.kernels.loss import fused
from shardrec.kernels.ranks import traffic as cost
from shardrec.kernels.ranks.communicator import Communicator
from shardrec.kernels.ranks.traffic import LEAST_CHUNKS, MOST_CHUNK_BYTES, num_chunks

NUM_POSITIONS, NUM_ITEMS, WIDTH = 4200, 300, 256
POSITION_ENDS = {2: (3000, 4200), 3: (1500, 1500, 4200)}
ROW_ENDS = {2: (150, 300), 3: (180, 300, 300)}

LOSSES: dict[str, Callable[..., Tensor]] = {
    "cce": lambda x, w, y: cut_cross_entropy(x, w, y),
    "cce-streamed": lambda x, w, y: (
        cut_cross_entropy(x, w, y, reduction="none").sum() / NUM_POSITIONS
    ),
    "cce_minus": lambda x, w, y: sampled_cross_entropy(x, w, y, num_negatives=64, seed=1),
    "sce": lambda x, w, y: plain_scalable(x, w, y),
    "rece": lambda x, w, y: reduced_cross_entropy(x, w, y, num_buckets=16, num_rounds=2, seed=1),
}


def plain_scalable(states: Tensor, table: Tensor | RowShard, targets: Tensor) -> Tensor:
    loss = scalable_cross_entropy(
        states, table, targets, num_buckets=40, items_per_bucket=30, mix=False, seed=1
    )
    assert isinstance(loss, Tensor)
    return loss


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Numbers whose products are exact in float32, so that sce and rece choose alike anywhere."""
    generator = torch.Generator().manual_seed(2)
    states = torch.randint(-3, 4, (NUM_POSITIONS, WIDTH), generator=generator) / 16
    table = torch.randint(-3, 4, (NUM_ITEMS, WIDTH), generator=generator) / 16
    return states, table, torch.randint(0, NUM_ITEMS, (NUM_POSITIONS,), generator=generator)


def part(ends: tuple[int, ...], rank: int) -> slice:
    return slice(ends[rank - 1] if rank else 0, ends[rank])


def own_batch() -> tuple[Tensor, RowShard, Tensor]:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    states, table, targets = batch()
    own, held = part(POSITION_ENDS[num_ranks], rank), part(ROW_ENDS[num_ranks], rank)
    shard = RowShard(table[held].requires_grad_(), held.start, NUM_ITEMS, dist.group.WORLD)
    return states[own].requires_grad_(), shard, targets[own]


def let_lists_be_short(patch: pytest.MonkeyPatch) -> None:
    """Several chunks of listed blocks too, from a batch that a test can afford."""
    patch.setattr(cost, "LEAST_LISTED_BYTES", cost.LEAST_FULL_BYTES)


class Log:
    """What happened in which order: starts and ends of travel, and the work on a chunk."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.largest_bytes = 0
        for name, label in (
            ("start_all_gather_rows", "states"),
            ("start_reduce_scatter", "gradients"),
        ):
            self.watch(patch, name, label)
        for function in ("forward", "backward"):
            self.note_calls(patch, block_logsumexp, function)
        self.note_calls(patch, fused, "_add_group")

    def watch(self, patch: pytest.MonkeyPatch, name: str, label: str) -> None:
        original = getattr(Communicator, name)

        def start(ranks: Communicator, tensor: Tensor, counts: Any) -> Callable[[], Tensor]:
            wait = original(ranks, tensor, counts)
            if tensor.dim() != 2 or tensor.shape[1] != WIDTH:
                return wait
            size = sum(counts) * WIDTH * tensor.element_size()
            self.largest_bytes = max(self.largest_bytes, size)
            self.events.append(f"send {label}")

            def noted() -> Tensor:
                self.events.append(f"have {label}")
                return wait()

            return noted

        patch.setattr(Communicator, name, start)

    def note_calls(self, patch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        original = getattr(module, name)

        def noted(*args: Any) -> Any:
            if self.events[-1] != "work":  # the groups of a fused chunk are one piece of work
                self.events.append("work")
            return original(*args)

        patch.setattr(module, name, noted)


def events_of(name: str) -> tuple[list[str], list[str], int]:
    """Events of forward and of backward on this rank, and the largest chunk in bytes."""
    states, shard, targets = own_batch()
    with pytest.MonkeyPatch.context() as patch:
        let_lists_be_short(patch)
        log = Log(patch)
        loss = LOSSES[name](states, shard, targets).sum()
        forward = list(log.events)
        loss.backward()
    return forward, log.events[len(forward) :], log.largest_bytes


def expected(num: int, gradients: bool) -> list[str]:
    """One chunk ahead with the states, one behind with the gradients."""
    events = ["send states"]
    for index in range(num):
        events += ["send states"] * (index + 1 < num) + ["have states", "work"]
        if gradients:
            events += ["send gradients"] + ["have gradients"] * (index > 0)
    return events + ["have gradients"] * gradients


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_states_and_gradients_travel_while_another_chunk_is_worked_on(
    ranks: Ranks, num_ranks: int
) -> None:
    num = num_chunks(NUM_POSITIONS, 4 * WIDTH, listed=False)
    assert num == LEAST_CHUNKS
    for name in ("cce-streamed", "rece", "cce"):
        for forward, backward, largest in ranks(num_ranks).run(events_of, name):
            if name == "cce":  # takes its gradient in forward
                assert forward == expected(num, gradients=True) and not backward
            else:
                assert forward == expected(num, gradients=False)
                assert backward == expected(num, gradients=True)
            assert largest <= 1.01 * NUM_POSITIONS / num * 4 * WIDTH


def sharded(name: str) -> tuple[float, Tensor, Tensor]:
    states, shard, targets = own_batch()
    with pytest.MonkeyPatch.context() as patch:
        let_lists_be_short(patch)
        loss = LOSSES[name](states, shard, targets)
        chunks = cost.num_chunks(NUM_POSITIONS, 4 * WIDTH, listed=True)
        assert chunks == LEAST_CHUNKS
        grad_states, grad_rows = torch.autograd.grad(loss, (states, shard.rows))
    return float(loss.detach()), grad_states, grad_rows


@pytest.mark.parametrize("name", LOSSES)
def test_several_chunks_change_neither_a_loss_nor_its_gradients(ranks: Ranks, name: str) -> None:
    states, table, targets = batch()
    states, table = states.requires_grad_(), table.requires_grad_()
    loss = LOSSES[name](states, table, targets)
    grads = torch.autograd.grad(loss, (states, table))
    for num_ranks in (2, 3):
        results = ranks(num_ranks).run(sharded, name)
        values = [value for value, _, _ in results]
        # Without a reduction a rank knows the losses of its own positions.
        found = sum(values) if name == "cce-streamed" else values[0]
        assert found == pytest.approx(float(loss.detach()), rel=5e-6)
        for index in (0, 1):
            gradient = torch.cat([result[1 + index] for result in results])
            scale = float(grads[index].abs().max())
            torch.testing.assert_close(gradient, grads[index], rtol=1e-3, atol=1e-5 * scale)


def test_chunks_are_bounded_and_worth_their_calls() -> None:
    for num_positions in (1, 100, 5_000, 70_000, 3_000_000):
        for state_bytes in (16, 256, 2048):
            for listed in (False, True):
                least = cost.LEAST_LISTED_BYTES if listed else cost.LEAST_FULL_BYTES
                num = num_chunks(num_positions, state_bytes, listed=listed)
                each = num_positions * state_bytes / num
                assert each <= MOST_CHUNK_BYTES
                assert num == 1 or each >= least
                assert num >= LEAST_CHUNKS or each < 2 * least
