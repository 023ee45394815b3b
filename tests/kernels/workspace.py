"""Peak memory of one loss and its gradients, printed by a process of its own.

Run with the name of a case of ``test_memory.py``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from shardrec.kernels import (
    cut_cross_entropy,
    reduced_cross_entropy,
    sampled_cross_entropy,
    scalable_cross_entropy,
)

N, V, D, K, NUM_BUCKETS = 4096, 60_000, 64, 1024, 2000


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


if __name__ == "__main__":
    print(json.dumps(peak_mib(sys.argv[1])))
