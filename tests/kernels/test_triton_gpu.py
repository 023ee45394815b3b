"""The kernels on a real GPU: against plain PyTorch in float64, and the same bits every time."""

from typing import Any

import pytest
import torch
from tests.every_loss import cases, dense, loss_of
from tests.losses import LOSSES
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def gradients(case: str, states: Tensor, table: Tensor, targets: Tensor, backend: str) -> Any:
    states, table = states.detach().requires_grad_(), table.detach().requires_grad_()
    value = loss_of(case, states, table, targets, backend=backend)
    return [value.detach(), *map(dense, torch.autograd.grad(value, (states, table)))]


def problem(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(width)
    states = torch.randn(777, width, generator=generator) * width**-0.25
    table = torch.randn(1501, width, generator=generator) * width**-0.25
    targets = torch.randint(0, 1501, (777,), generator=generator)
    return states.to("cuda", dtype), table.to("cuda", dtype), targets.cuda()


# Near ties of half-precision products choose other candidates.
CASES = [
    (case, dtype)
    for case in cases(is_operator=True)
    for dtype in TOLERANCE
    if dtype is torch.float32 or not LOSSES[case.partition("-")[0]].chooses
]


@pytest.mark.parametrize(("case", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("width", [8, 20, 64, 100, 128, 256, 512, 1024])
def test_the_kernels_equal_plain_pytorch(case: str, width: int, dtype: torch.dtype) -> None:
    states, table, targets = problem(width, dtype)
    ours = gradients(case, states, table, targets, "triton")
    truth = gradients(case, states.double(), table.double(), targets, "torch")
    for a, b in zip(ours, truth, strict=True):
        scale = float(b.abs().max())
        torch.testing.assert_close(a.double(), b, rtol=0.0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("case", cases(is_operator=True))
def test_twenty_runs_give_the_same_bits(case: str) -> None:
    inputs = problem(64, torch.bfloat16)
    first = gradients(case, *inputs, "triton")
    for _ in range(19):
        again = gradients(case, *inputs, "triton")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
