"""No loss stores positions x items, nor what its published form stores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shardrec.kernels import (
    cut_cross_entropy,
    reduced_cross_entropy,
    sampled_cross_entropy,
    scalable_cross_entropy,
)
from shardrec.kernels.cce import cut_cross_entropy_cost
from shardrec.kernels.cce_minus import sampled_cross_entropy_cost
from shardrec.kernels.cost import Workload
from shardrec.kernels.rece import reduced_cross_entropy_cost
from shardrec.kernels.sce import scalable_cross_entropy_cost

N, V, D, K, NUM_BUCKETS = 4096, 60_000, 64, 1024, 2000
MIB = 1 << 20
# What would be stored, in MiB, by the shortest way to write each loss.
STORED = {
    "cce": N * V * 4 / MIB,
    "cce_streamed": N * V * 4 / MIB,
    "cce_minus": N * K * D * 4 / MIB,
    "cce_minus_single": N * K * D * 4 / MIB,
    "sce": NUM_BUCKETS * V * 4 / MIB,
    "rece": NUM_BUCKETS * V * 4 / MIB,
}
WORK = Workload(num_positions=N, num_items=V, num_ranks=1, width=D)
COSTS = {
    "cce": cut_cross_entropy_cost(WORK),
    "cce_streamed": cut_cross_entropy_cost(replace(WORK, num_items=10 * V)),
    "cce_minus": sampled_cross_entropy_cost(WORK, K, 128),
    "cce_minus_single": sampled_cross_entropy_cost(WORK, K, 1),
    "sce": scalable_cross_entropy_cost(WORK, NUM_BUCKETS, 8, 16),
    "rece": reduced_cross_entropy_cost(WORK, NUM_BUCKETS, None, 2, 1),
}


def run(name: str, states: torch.Tensor, table: torch.Tensor, targets: torch.Tensor) -> None:
    if name == "cce":
        loss = cut_cross_entropy(states, table, targets)
    elif name == "cce_streamed":
        loss = cut_cross_entropy(states, table, targets, reduction="none").mean()
    elif name.startswith("cce_minus"):
        share = 1 if name.endswith("single") else 128
        loss = sampled_cross_entropy(
            states, table, targets, num_negatives=K, share=share, seed=0, sparse_grad=True
        )
    elif name == "sce":
        either = scalable_cross_entropy(
            states,
            table,
            targets,
            num_buckets=NUM_BUCKETS,
            positions_per_bucket=8,
            items_per_bucket=16,
            seed=0,
            sparse_grad=True,
        )
        assert isinstance(either, torch.Tensor)
        loss = either
    else:
        loss = reduced_cross_entropy(
            states, table, targets, num_buckets=NUM_BUCKETS, num_rounds=2, seed=0
        )
    loss.backward()


def peak_mib(name: str) -> float:
    """Peak resident memory above what was there before, in this process."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(N, D, generator=generator).requires_grad_()
    table = torch.randn(V, D, generator=generator).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    few = slice(0, 64)  # loads the libraries
    run(name, states[few].detach().requires_grad_(), table, targets[few])
    table.grad = None
    Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    before = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
    run(name, states, table, targets)
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return (peak - before) / 1024


@pytest.mark.parametrize("name", STORED)
def test_the_workspace_is_a_fraction_of_what_is_usually_stored(name: str) -> None:
    command = [sys.executable, "-P", __file__, name]
    # One fixed threshold returns every block at once: what the allocator keeps is not measured.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    output = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=True, env=environment
    )
    peak = json.loads(output.stdout)
    own_gradients = (V + N) * D * 4 / MIB
    # The table's gradient twice: where a gradient is handed on it may be copied once.
    assert peak - 2 * own_gradients < STORED[name] / 6, f"{peak:.0f} MiB of {STORED[name]:.0f}"
    # What the model says: the workspace, gradients of rows and of states.
    cost = COSTS[name]
    rows = V if cost.is_dense else cost.touched_rows
    said = (cost.workspace_bytes + (rows + N) * D * 4) / MIB
    assert 0.7 * said < peak < 1.15 * said, f"{peak:.1f} MiB, said {said:.1f} MiB"


if __name__ == "__main__":
    print(json.dumps(peak_mib(sys.argv[1])))
