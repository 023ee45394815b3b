"""What each loss is said to cost, held to the products that it makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tests.kernels.interpreted.counted import peak_bytes
from torch.utils.flop_counter import FlopCounterMode

from shardrec.kernels import cut_cross_entropy
from shardrec.kernels.block_logsumexp import cpu, every_pair
from shardrec.kernels.cce import cut_cross_entropy_cost
from shardrec.kernels.cce_minus import SampledItems, sampled_cross_entropy_cost
from shardrec.kernels.cost.terms import KernelCost, LossCost, full_cost, listed_cost, select_cost
from shardrec.kernels.loss import passes
from shardrec.kernels.loss.candidates import Candidates
from shardrec.kernels.loss.fused import fused_blocks, fused_cross_entropy
from shardrec.kernels.loss.inputs import Inputs, Scaling, prepare_inputs
from shardrec.kernels.negatives import Uniform, pack
from shardrec.kernels.ranks.traffic import Workload
from shardrec.kernels.rece import HashedChunks, reduced_cross_entropy_cost
from shardrec.kernels.sce import HardBuckets, scalable_cross_entropy_cost

N, V, D = 512, 3000, 16
WORK = Workload(num_positions=N, num_items=V, num_ranks=1, width=D)

# Candidates, what the loss is said to cost, and how far padding may take it from that.
CASES: dict[str, tuple[Candidates, LossCost, float]] = {
    "cce_minus": (
        SampledItems(
            num_negatives=100,
            share=16,
            seed=1,
            step=0,
            parity=False,
            proposal_kinds=pack(Uniform(V))[0],
            proposal_numbers=pack(Uniform(V))[1],
        ),
        sampled_cross_entropy_cost(WORK, 100, 16),
        0.001,
    ),
    "sce": (
        HardBuckets(
            num_buckets=None,
            positions_per_bucket=None,
            items_per_bucket=40,
            mix=True,
            seed=1,
            step=0,
        ),
        scalable_cross_entropy_cost(WORK, None, None, 40),
        0.2,
    ),
    "rece": (
        HashedChunks(
            num_buckets=None,
            num_chunks=None,
            num_rounds=4,
            num_neighbor_chunks=1,
            align="bucket",
            seed=1,
            step=0,
        ),
        reduced_cross_entropy_cost(WORK, None, None, 4, 1),
        0.3,
    ),
}


def problem() -> Inputs:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(N, D, generator=generator)
    table = torch.randn(V, D, generator=generator)
    targets = torch.randint(0, V, (N,), generator=generator)
    return prepare_inputs(
        states, table, targets, weights=None, reduction="mean", scaling=Scaling(False, 1.0)
    )


def counter() -> FlopCounterMode:
    """Counts the products of oneDNN too."""

    def linear_flop(left: list[int], right: list[int], *_: object, **__: object) -> int:
        return 2 * left[0] * left[1] * right[0]

    operator = torch.ops.mkldnn._linear_pointwise
    return FlopCounterMode(display=False, custom_mapping={operator: linear_flop})


@pytest.mark.parametrize("name", CASES)
def test_the_products_said_are_the_products_made(name: str) -> None:
    candidates, cost, slack = CASES[name]
    inputs = problem()
    with counter() as counted:
        if name == "cce_minus":
            fused_blocks(inputs, candidates, [], inputs.coefficients("mean"))
        else:
            _, _, saved = passes.forward(inputs, candidates, [], "mean", copies_rows=True)
            passes.backward(inputs, candidates, [], saved, torch.ones(()))
    assert counted.get_total_flops() == pytest.approx(cost.flops, rel=slack)


def test_the_products_of_the_softmax_are_three_or_four() -> None:
    inputs = problem()
    with counter() as counted:
        fused_cross_entropy(inputs, inputs.coefficients("mean"))
    assert counted.get_total_flops() == cut_cross_entropy_cost(WORK).flops == 6 * N * V * D
    blocks, grad = every_pair(V, inputs.targets), torch.ones(N)
    with counter() as counted:
        logsumexp, _ = cpu.forward(inputs.states, inputs.rows, blocks)
        cpu.backward(inputs.states, inputs.rows, blocks, logsumexp, grad, grad, torch.zeros(V, D))
    assert counted.get_total_flops() == full_cost(4, 1024, WORK).flops == 8 * N * V * D


def test_traffic_is_that_which_one_counts_by_hand() -> None:
    # One tile: states are read three times and their gradient is written, rows likewise and their
    # gradient is read before.
    assert full_cost(4, N, WORK).bytes == 4 * D * (N * 4 + V * 5)
    assert full_cost(4, N // 2, WORK).bytes == 4 * D * (N * 4 + 2 * V * 5)
    # A row is read and written into a copy in both passes; its gradient is written, read and added.
    assert listed_cost(100.0, 10.0, WORK).bytes == 10 * D * (2 * 2 * 4 + 3 * 4)
    assert select_cost(7, V, WORK) == KernelCost(2.0 * 7 * V * D, 4 * D * (V + 7))
    assert 2 * KernelCost(1.0, 2.0) + KernelCost(1.0, 1.0) == KernelCost(3.0, 5.0)


def test_ranks_share_the_products_of_triton() -> None:
    one = Workload(num_positions=600, num_items=9000, num_ranks=1, width=D, on_cpu=False)
    costs: list[Callable[[Workload], LossCost]] = [
        cut_cross_entropy_cost,
        lambda work: sampled_cross_entropy_cost(work, 64, 20),
        lambda work: scalable_cross_entropy_cost(work, None, None, 16),
        lambda work: reduced_cross_entropy_cost(work, None, None, 4, 1),
    ]
    for cost in costs:
        whole, part = cost(one).work, cost(replace(one, num_ranks=3)).work
        # Each rank looks again at the groups of rows that it chose.
        assert whole.flops <= 3 * part.flops <= 1.3 * whole.flops
        assert part.bytes < whole.bytes < 6 * part.bytes


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
