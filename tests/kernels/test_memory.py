"""No loss stores positions x items, nor what its published form stores."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.kernels.workspace import peak_mib
from tests.loss_entry import LARGE
from tests.losses import LOSSES
from tests.ranks import Ranks

from shardrec.kernels.ranks.traffic import Workload

pytestmark = pytest.mark.slow

MIB = 1 << 20
CASES = [
    f"{name}-{workspace}".removesuffix("-")
    for name, loss in LOSSES.items()
    for workspace in loss.workspaces
]


@pytest.fixture(scope="module")
def processes() -> Iterator[Ranks]:
    """They return every block at once: what allocators keep is not measured."""
    pool = Ranks({"MALLOC_MMAP_THRESHOLD_": "65536"})
    yield pool
    pool.close()


@pytest.fixture
def process(processes: Ranks) -> Ranks:
    """A fresh one."""
    processes.stop()
    return processes


@pytest.mark.parametrize("case", CASES)
def test_the_workspace_is_a_fraction_of_what_is_usually_stored(case: str, process: Ranks) -> None:
    name, _, workspace = case.partition("-")
    measured = LOSSES[name].workspaces[workspace]
    num_positions, num_items, width = LARGE
    (peak,) = process(1).run(peak_mib, case)
    own_gradients = (num_positions + num_items) * width * 4 / MIB
    # The table's gradient twice: where a gradient is handed on it may be copied once.
    stored = 4 * measured.stored / MIB
    assert peak - 2 * own_gradients < stored / 6, f"{peak:.0f} MiB of {stored:.0f}"
    # What the model says: the workspace, gradients of rows and of states.
    work = Workload(
        num_positions=num_positions,
        # Of a table ten times as large it says what a pass without a gradient in forward takes.
        num_items=num_items * (10 if measured.reduction == "none" else 1),
        num_ranks=1,
        width=width,
    )
    cost = LOSSES[name].config(**measured.options).cost(work)
    rows = num_items if cost.is_dense else cost.touched_rows
    said = (cost.workspace_bytes + (rows + num_positions) * width * 4) / MIB
    assert 0.7 * said < peak < 1.15 * said, f"{peak:.1f} MiB, said {said:.1f} MiB"
