"""No loss stores positions x items, nor what its published form stores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
from tests.kernels.workspace import NUM_BUCKETS, D, K, N, V
from tests.side_by_side import asked_for, side_by_side

from shardrec.kernels.cce import cut_cross_entropy_cost
from shardrec.kernels.cce_minus import sampled_cross_entropy_cost
from shardrec.kernels.ranks.traffic import Workload
from shardrec.kernels.rece import reduced_cross_entropy_cost
from shardrec.kernels.sce import scalable_cross_entropy_cost

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


def peak_mib_in_a_process(name: str) -> float:
    command = [sys.executable, "-P", str(Path(__file__).with_name("workspace.py")), name]
    # One fixed threshold returns every block at once: what the allocator keeps is not measured.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    output = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=True, env=environment
    )
    return float(json.loads(output.stdout))


@pytest.fixture(scope="module")
def peaks(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[float]]]:
    with side_by_side(peak_mib_in_a_process, asked_for(request, "name")) as started:
        yield started


@pytest.mark.parametrize("name", STORED)
def test_the_workspace_is_a_fraction_of_what_is_usually_stored(
    name: str, peaks: dict[str, Future[float]]
) -> None:
    peak = peaks[name].result()
    own_gradients = (V + N) * D * 4 / MIB
    # The table's gradient twice: where a gradient is handed on it may be copied once.
    assert peak - 2 * own_gradients < STORED[name] / 6, f"{peak:.0f} MiB of {STORED[name]:.0f}"
    # What the model says: the workspace, gradients of rows and of states.
    cost = COSTS[name]
    rows = V if cost.is_dense else cost.touched_rows
    said = (cost.workspace_bytes + (rows + N) * D * 4) / MIB
    assert 0.7 * said < peak < 1.15 * said, f"{peak:.1f} MiB, said {said:.1f} MiB"
