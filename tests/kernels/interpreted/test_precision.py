"""The precision of PyTorch's float32 products reaches every product of every kernel."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compiled.builds import shipped_cases
from tests.every_loss import loss_of, names
from tests.kernels.counted import counted_launches

from shardrec.kernels import negatives, select

SIGNS: dict[str, Any] = {"seed": 1, "step": 0, "stream": 0}


@pytest.fixture
def torch_precision() -> Iterator[Callable[[str], None]]:
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def run_all(dtype: torch.dtype) -> None:
    """Every kernel with a product, through the functions that launch it."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(5, 8, generator=generator).to(dtype).requires_grad_()
    table = torch.randn(20, 8, generator=generator).to(dtype).requires_grad_()
    targets = torch.arange(5)
    losses = [
        loss_of(name, states, table, targets, backend="triton") for name in names(is_operator=True)
    ]
    torch.autograd.grad(torch.stack(losses).sum(), (states, table))
    select.topk_rows(states.detach(), table.detach(), 1, backend="triton")
    select.best_sign_direction(table.detach(), 5, **SIGNS, backend="triton")
    negatives.mixed_signs(states.detach(), 0, 5, **SIGNS, backend="triton")


@pytest.mark.parametrize(
    ("setting", "dtype", "expected"),
    [
        ("highest", torch.float32, "IEEE"),
        ("high", torch.float32, "TF32"),
        ("high", torch.float16, "IEEE"),
    ],
    ids=str,
)
def test_every_product_has_the_precision_that_pytorch_allows(
    torch_precision: Callable[[str], None],
    setting: str,
    dtype: torch.dtype,
    expected: str,
) -> None:
    torch_precision(setting)
    with counted_launches() as launched:
        run_all(dtype)
    shipped = {case.kernel.fn.__name__ for case in shipped_cases() if case.has_product}
    assert launched.precisions == {kernel: {expected} for kernel in shipped}
