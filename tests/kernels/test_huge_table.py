"""Rows above element 2**31 of a table, in plain PyTorch."""

import pytest
from tests.kernels.huge_table import check_blocks, check_sampled


@pytest.mark.parametrize("kind", ["listed", "offsets", "gathered"])
def test_lists_of_the_last_rows_of_a_huge_table(kind: str) -> None:
    check_blocks(kind, "torch")


@pytest.mark.parametrize("share", [1, 4])
def test_targets_at_the_end_of_a_huge_table(share: int) -> None:
    check_sampled(share, "torch")
