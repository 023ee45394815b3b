"""Products are right at any size, and many sizes do not fill the memory."""

from pathlib import Path

import pytest
import torch

from shardrec.kernels.device.matmul import STEP, times_transposed


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


@pytest.mark.parametrize("sizes", [(0, 3, 4), (1, 1, 1), (64, 128, 64), (65, 128, 64), (5, 64, 0)])
def test_the_product_is_that_of_float64(sizes: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(sizes[0], sizes[2]), torch.randn(sizes[1], sizes[2])
    expected = (left.double() @ right.double().T).float()
    torch.testing.assert_close(times_transposed(left, right), expected, rtol=1e-4, atol=1e-4)
    turned = times_transposed(left, right.T.contiguous().T)
    torch.testing.assert_close(turned, expected, rtol=1e-4, atol=1e-4)


def test_memory_does_not_grow_with_the_number_of_sizes() -> None:
    states, rows = torch.randn(700, STEP), torch.randn(2 * STEP, STEP)
    for size in (STEP, STEP + 1):
        times_transposed(states[:size], rows)
    before = resident_mib()
    for size in range(200, 700):
        times_transposed(states[:size], rows)
    assert resident_mib() - before < 40  # was 300
