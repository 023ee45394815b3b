"""What each loss is said to cost, held to the products that it makes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.every_loss import loss_of, names
from tests.kernels.counted import peak_bytes, product_flops
from tests.losses import LOSSES
from torch import Tensor

from shardrec.kernels import cut_cross_entropy
from shardrec.kernels.block_logsumexp import EveryPair, cpu
from shardrec.kernels.cce import cut_cross_entropy_cost
from shardrec.kernels.cost.terms import KernelCost, full_cost, listed_cost, select_cost
from shardrec.kernels.ranks.traffic import Workload
from shardrec.modules.losses import RECE, SCE, CCEMinus, Loss, Step

N, V, D = 512, 3000, 16
WORK = Workload(num_positions=N, num_items=V, num_ranks=1, width=D)


def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(N, D, generator=generator).requires_grad_()
    table = torch.randn(V, D, generator=generator).requires_grad_()
    return states, table, torch.randint(0, V, (N,), generator=generator)


COSTED: dict[str, Loss] = {name: loss.config() for name, loss in LOSSES.items()}
COSTED["cce_minus-few"] = CCEMinus(num_negatives=100, share=16)
SHARED: dict[str, Loss] = {
    name: LOSSES[name].config(**LOSSES[name].options) for name in names(is_operator=True)
}
SHARED["sce-many"], SHARED["rece-many"] = SCE(items_per_bucket=16), RECE()


@pytest.mark.parametrize("case", COSTED)
@pytest.mark.slow
def test_the_products_said_are_the_products_made(case: str) -> None:
    loss, inputs = COSTED[case], problem()
    made = product_flops(lambda: loss(*inputs, step=Step(seed=1, step=0)).loss.backward())
    slack = LOSSES[case.partition("-")[0]].padding
    assert made == pytest.approx(loss.cost(WORK).flops, rel=slack)


def test_the_products_of_the_softmax_are_three_or_four() -> None:
    inputs = problem()
    fused = product_flops(lambda: loss_of("cce", *inputs).backward())
    assert fused == cut_cross_entropy_cost(WORK).flops == 6 * N * V * D
    streamed = product_flops(lambda: loss_of("cce", *inputs, reduction="none").sum().backward())
    assert streamed == full_cost(4, 1024, WORK).flops == 8 * N * V * D


def test_the_block_of_every_pair_takes_four_products() -> None:
    states, rows, targets = (one.detach() for one in problem())
    blocks, grad = EveryPair(V, targets), torch.ones(N)

    def both_passes() -> None:
        logsumexp, _ = cpu.forward(states, rows, blocks)
        cpu.backward(states, rows, blocks, logsumexp, grad, grad, torch.zeros(V, D))

    assert product_flops(both_passes) == 8 * N * V * D


def test_traffic_is_that_which_one_counts_by_hand() -> None:
    # One tile: states are read three times and their gradient is written, rows likewise and their
    # gradient is read before.
    assert full_cost(4, N, WORK).bytes == 4 * D * (N * 4 + V * 5)
    assert full_cost(4, N // 2, WORK).bytes == 4 * D * (N * 4 + 2 * V * 5)
    # A row is read and written into a copy in both passes; its gradient is written, read and added.
    assert listed_cost(100.0, 10.0, WORK).bytes == 10 * D * (2 * 2 * 4 + 3 * 4)
    assert select_cost(7, V, WORK) == KernelCost(2.0 * 7 * V * D, 4 * D * (V + 7))
    assert 2 * KernelCost(1.0, 2.0) + KernelCost(1.0, 1.0) == KernelCost(3.0, 5.0)


@pytest.mark.parametrize("case", SHARED)
def test_ranks_share_the_products_of_triton(case: str) -> None:
    one = Workload(num_positions=600, num_items=9000, num_ranks=1, width=D, on_cpu=False)
    loss = SHARED[case]
    whole, part = loss.cost(one).work, loss.cost(replace(one, num_ranks=3)).work
    # Each rank looks again at the groups of rows that it chose.
    assert whole.flops <= 3 * part.flops <= 1.3 * whole.flops
    assert part.bytes < whole.bytes < 6 * part.bytes


@pytest.mark.slow
def test_rows_of_two_bytes_have_a_gradient_of_four_beside_their_own() -> None:
    num_positions, num_items, width = 256, 100_000, 64
    states = torch.randn(num_positions, width, dtype=torch.bfloat16).requires_grad_()
    table = torch.randn(num_items, width, dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(0, num_items, (num_positions,))

    def call() -> None:
        cut_cross_entropy(states, table, targets, reduction="none").sum().backward()

    work = Workload(
        num_positions=num_positions, num_items=num_items, num_ranks=1, width=width, element_bytes=2
    )
    in_float32 = cut_cross_entropy_cost(replace(work, element_bytes=4)).workspace_bytes
    workspace = cut_cross_entropy_cost(work).workspace_bytes
    assert workspace == in_float32 + 4 * num_items * width
    said = workspace + 2 * num_items * width
    assert 0.8 * said < peak_bytes(call) < 1.1 * said
