"""Every Triton kernel built for GPUs that are not here: registers, shared memory, instructions."""

import pytest
import torch
from compiled.builds import ARCHITECTURES, MAX_SHARED_BYTES, Case, shipped_cases

from shardrec.kernels.device.tiles import KERNELS, tile_for

CASES = shipped_cases()
INSTRUCTIONS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}

pytestmark = pytest.mark.slow


# In float32 one kernel of each family: the full and the listed softmax, gathering, selections and
# draws. Forms and dtypes beyond these are built by benchmarks/compile_kernels.py.
SINGLE = [
    (name, precision)
    for name in ("full_rows_backward", "listed_forward", "group_maxima", "mixed_signs")
    for precision in ("ieee", "tf32")
] + [("gathered_forward", "ieee")]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: f"sm_{a}")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_kernel_fits_its_gpu(case: Case, architecture: int) -> None:
    _, build = case.build(width=64, dtype=torch.bfloat16, architecture=architecture)
    assert build.spilled_bytes == 0
    assert build.shared_bytes <= MAX_SHARED_BYTES[architecture]
    # A kernel of four registers once came out of a build that had dropped its products.
    assert build.registers >= 16
    assert build.matrix_instruction == (INSTRUCTIONS[architecture] if case.has_product else "")
    if case.has_product:
        work = build.multiply_adds / case.least(64, torch.bfloat16, architecture).multiply_adds
        # The first turn of a loop over the width may stand in the loop around it too.
        assert 1 <= work <= 2
        assert build.loop_instructions > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: f"sm_{a}")
@pytest.mark.parametrize(("name", "precision"), SINGLE, ids="-".join)
def test_float32_uses_the_matrix_unit_only_where_tf32_is_allowed(
    name: str, precision: str, architecture: int
) -> None:
    case = next(case for case in CASES if case.name == name)
    _, build = case.build(
        width=64, dtype=torch.float32, architecture=architecture, precision=precision
    )
    assert build.shared_bytes <= MAX_SHARED_BYTES[architecture]
    has_instruction = case.has_product and precision == "tf32"
    assert build.matrix_instruction == (INSTRUCTIONS[architecture] if has_instruction else "")
    least = case.least(64, torch.float32, architecture, precision)
    if case.has_product:
        assert 1 <= build.multiply_adds / least.multiply_adds < 2.05


def test_every_kernel_with_a_product_has_a_tile_for_every_width_and_gpu() -> None:
    for kernel in KERNELS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for architecture in (0, 80, 86, 90, 100):
                for width in (1, 8, 20, 64, 100, 256, 1024):
                    tile = tile_for(kernel, width, dtype, architecture)
                    sizes = (tile.positions, tile.items, tile.width, tile.out)
                    assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)
                    assert tile.origin
    assert {case.tiles for case in CASES if case.tiles} == set(KERNELS)
