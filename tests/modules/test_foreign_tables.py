"""The losses over tables that are not ours: DTensor, and the example's own loop."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.ranks import Ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from shardrec.kernels import RowShard, sampled_cross_entropy

# Runs of several processes: seconds each.
pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "hand_written_loop.py"


def loss_over_dtensor() -> tuple[float, torch.Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    table = torch.randn(31, 8, generator=torch.Generator().manual_seed(0))
    states = torch.randn(10, 8, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(10) * 3
    weight = torch.nn.Parameter(distribute_tensor(table, mesh, [Shard(0)]))
    assert isinstance(weight.data, DTensor)
    rows = weight.data.to_local().requires_grad_()
    block = -(-31 // dist.get_world_size())
    shard = RowShard(rows, dist.get_rank() * block, 31, mesh.get_group())
    own = slice(0, 4) if dist.get_rank() == 0 else slice(4, 10)
    loss = sampled_cross_entropy(states[own], shard, targets[own], num_negatives=7, seed=0)
    loss.backward()
    assert rows.grad is not None
    return float(loss.detach()), rows.grad


def test_a_dtensor_gives_the_loss_and_gradient_of_the_whole_table(ranks: Ranks) -> None:
    table = torch.randn(31, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    states = torch.randn(10, 8, generator=torch.Generator().manual_seed(1))
    loss = sampled_cross_entropy(states, table, torch.arange(10) * 3, num_negatives=7, seed=0)
    loss.backward()
    results = ranks(2).run(loss_over_dtensor)
    assert all(abs(value - float(loss.detach())) < 1e-5 for value, _ in results)
    torch.testing.assert_close(torch.cat([grad for _, grad in results]), table.grad)


def test_the_example_trains_on_two_processes() -> None:
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(EXAMPLE)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", output)]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]
