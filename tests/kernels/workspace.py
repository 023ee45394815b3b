"""Peak memory of one loss and its gradients, measured by a process that does nothing else."""

from __future__ import annotations

from pathlib import Path

import torch
from tests.loss_entry import DRAWN, LARGE
from tests.losses import LOSSES


def run(case: str, states: torch.Tensor, table: torch.Tensor, targets: torch.Tensor) -> None:
    name, _, workspace = case.partition("-")
    entry = LOSSES[name]
    measured = entry.workspaces[workspace]
    sparse = {"sparse_grad": True} if entry.has_sparse_grad else {}
    options = measured.options | sparse | {"reduction": measured.reduction}
    drawn = DRAWN if entry.has_draws else {}
    loss = entry.function(states, table, targets, **drawn, **options)
    (loss[0] if isinstance(loss, tuple) else loss).mean().backward()


def peak_mib(case: str) -> float:
    """Peak resident memory above what was there before, in this process."""
    num_positions, num_items, width = LARGE
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(num_positions, width, generator=generator).requires_grad_()
    table = torch.randn(num_items, width, generator=generator).requires_grad_()
    targets = torch.randint(0, num_items, (num_positions,), generator=generator)
    few = slice(0, 64)  # loads the libraries
    run(case, states[few].detach().requires_grad_(), table, targets[few])
    table.grad = None
    Path("/proc/self/clear_refs").write_text("5")
    before = status_kib("VmRSS")
    run(case, states, table, targets)
    return (status_kib("VmHWM") - before) / 1024


def status_kib(name: str) -> int:
    """A line of the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
