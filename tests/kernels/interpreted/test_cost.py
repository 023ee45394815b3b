"""What the Triton kernels are said to cost, held to what they do in the interpreter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.every_loss import loss_of
from tests.kernels.counted import counted_launches, peak_bytes
from tests.losses import LOSSES as entries
from torch import Tensor

from shardrec.kernels import block_logsumexp, reduced_cross_entropy, select
from shardrec.kernels.block_logsumexp import Blocks, NearbyChunks, nearby
from shardrec.kernels.cost.terms import KernelCost
from shardrec.kernels.cost.triton import Listed, listed_kernels, sign_kernels, topk_kernels
from shardrec.kernels.hash_chunks import sizes
from shardrec.kernels.negatives import mixed_signs
from shardrec.kernels.ranks.traffic import Workload
from shardrec.modules.losses import RECE

D = 64
# Sizes that the interpreter's tiles of 32 x 32 fit, so that no product is made of padding. What the
# model leaves out, such as ids, is a few bytes for each vector of 256.
MOST_IDS = 1.2


def work_of(num_positions: int, num_items: int, width: int = D) -> Workload:
    return Workload(
        num_positions=num_positions,
        num_items=num_items,
        num_ranks=1,
        width=width,
        on_cpu=False,
        architecture=0,
    )


def batch(num_positions: int, num_items: int, width: int = D) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(num_positions, width, generator=generator).requires_grad_()
    table = torch.randn(num_items, width, generator=generator).requires_grad_()
    return states, table, torch.randint(0, num_items, (num_positions,), generator=generator)


# Options and N, V and D.
LOSSES: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "cce": ({}, (64, 256, D)),
    "cce-wide": ({}, (32, 64, 192)),
    "cce_minus": ({"num_negatives": 64, "share": 32}, (64, 1000, D)),
    "cce_minus-each": ({"num_negatives": 32, "share": 1}, (8, 1000, D)),
}


@pytest.mark.parametrize("case", LOSSES)
def test_a_loss_multiplies_and_moves_what_is_said(case: str) -> None:
    name, (options, size) = case.partition("-")[0], LOSSES[case]
    given = options | ({"sparse_grad": True} if entries[name].has_sparse_grad else {})
    with counted_launches() as counted:
        loss_of(name, *batch(*size), **given, backend="triton").backward()
    cost = entries[name].config(**options).cost(work_of(*size))
    # Negatives of single positions are no matrix product.
    assert counted.flops == (0 if case == "cce_minus-each" else cost.flops)
    assert cost.work.bytes <= counted.bytes <= MOST_IDS * cost.work.bytes


def listed_blocks() -> tuple[Blocks, Listed]:
    """Two blocks of 32 positions and 64 rows."""
    blocks = Blocks(
        pair_positions=torch.randperm(64),
        pair_starts=torch.tensor([0, 32, 64]),
        items=torch.randperm(128),
        item_starts=torch.tensor([0, 64]),
        item_ends=torch.tensor([64, 128]),
        targets=torch.arange(64),
        num_slots=64,
    )
    return blocks, Listed(pairs=64 * 64, positions=32, rows=64, entries=128, touched=128)


def nearby_blocks() -> tuple[NearbyChunks, Listed]:
    """Two rounds of two chunks of 32 positions and 64 rows, which do not reach each other."""
    chunks = torch.arange(2).repeat(64)
    of_rows = torch.stack([chunks, chunks.flip(0)], 1).to(torch.uint8)
    of_positions = of_rows[::2].int().contiguous()
    of_positions = torch.arange(2, dtype=torch.int32).repeat_interleave(32)[:, None].repeat(1, 2)
    blocks = NearbyChunks(of_positions, of_rows, 0, 2, torch.arange(64))
    pairs = 2 * 64 * 64
    return blocks, Listed(pairs=pairs, positions=32, rows=64, entries=256, touched=256, rounds=True)


@pytest.mark.parametrize("made", [listed_blocks, nearby_blocks], ids=["listed", "rounds"])
def test_listed_blocks_multiply_and_move_what_is_said(
    made: Callable[[], tuple[Blocks | NearbyChunks, Listed]],
) -> None:
    states, rows = (one.detach() for one in batch(64, 128)[:2])
    blocks, listed = made()
    grad, grad_rows = torch.ones(64), torch.zeros(128, D)
    with counted_launches() as counted:
        logsumexp, _ = block_logsumexp.forward(states, rows, blocks, "triton")
        block_logsumexp.backward(states, rows, blocks, logsumexp, grad, grad, grad_rows, "triton")
    said = listed_kernels(listed, work_of(64, 128))
    assert counted.flops == said.flops
    assert said.bytes <= counted.bytes <= 1.5 * said.bytes


CHOICES: dict[str, tuple[Callable[[Tensor], Any], KernelCost, float]] = {
    "signs": (
        lambda rows: select.best_sign_direction(
            rows, 64, seed=1, step=0, stream=0, backend="triton"
        ),
        sign_kernels("best_sign_direction", 64, 256, work_of(1, 1)),
        0.0,
    ),
    "mix": (
        lambda rows: mixed_signs(rows, 0, 128, seed=1, step=0, stream=0, backend="triton"),
        sign_kernels("mixed_signs", 128, 256, work_of(1, 1)),
        0.0,
    ),
    # The groups that are scored again are no matrix product.
    "best": (
        lambda rows: select.topk_rows(rows[:32], rows, 2, "triton"),
        topk_kernels(32, 256, 2, work_of(1, 1)),
        2.0 * 32 * 16 * 2 * D,
    ),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choices_multiply_and_move_what_is_said(name: str) -> None:
    choose, said, without_product = CHOICES[name]
    rows = batch(1, 256)[1].detach()
    with counted_launches() as counted:
        choose(rows)
    assert counted.flops == said.flops - without_product
    assert said.bytes <= counted.bytes <= 1.5 * said.bytes


def rece(num_items: int) -> tuple[int, int]:
    """Bytes that a step holds at most besides both gradients, and what is said."""
    num_positions, width = 16, 16
    states, table, targets = batch(num_positions, num_items, width)

    def call() -> None:
        reduced_cross_entropy(
            states, table, targets, num_buckets=4, num_rounds=2, seed=1, backend="triton"
        ).backward()

    gradients = 4 * (num_positions + num_items) * width
    work = work_of(num_positions, num_items, width)
    said = RECE(num_buckets=4, num_rounds=2).cost(work).workspace_bytes
    return peak_bytes(call) - gradients, said


def test_rece_holds_a_byte_for_each_row_and_round_and_sorts_one_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nearby, "GPU_ROWS_AT_ONCE", 64)
    monkeypatch.setattr(sizes, "KEYS_AT_ONCE", 1)
    (small, said_small), (large, said_large) = rece(128), rece(256)
    assert large - small <= said_large - said_small == (2 + 28) * 128
    for held, said in ((small, said_small), (large, said_large)):
        # The sort of a CPU makes none of the copies that the radix sort of a GPU makes.
        assert 0.25 * said < held < 1.5 * said
