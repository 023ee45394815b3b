"""The four losses through the Triton kernels equal those in plain PyTorch."""

import pytest
import torch
from tests.every_loss import cases, dense, loss_of
from tests.kernels.counted import counted_launches
from torch import Tensor

from shardrec.kernels.block_logsumexp import nearby
from shardrec.kernels.device import backend as device
from shardrec.kernels.device.backend import choose_backend

N, V, D = 21, 37, 12

LISTED, GATHERED = (
    {f"{kind}_forward_kernel", f"{kind}_states_backward_kernel", f"{kind}_rows_backward_kernel"}
    for kind in ("listed", "gathered")
)


def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(N, D, generator=generator, requires_grad=True)
    table = torch.randn(V, D, generator=generator, requires_grad=True)
    return states, table, torch.randint(0, V, (N,), generator=generator)


def values(case: str, backend: str) -> list[Tensor]:
    states, table, targets = problem()
    value = loss_of(case, states, table, targets, backend=backend)
    return [value.detach(), *map(dense, torch.autograd.grad(value, (states, table)))]


@pytest.mark.parametrize("case", cases(is_operator=True))
def test_triton_equals_torch(case: str) -> None:
    ours, expected = values(case, "triton"), values(case, "torch")
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def test_rece_listed_in_many_parts_equals_torch_and_repeats_its_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nearby, "GPU_ROWS_AT_ONCE", 13)
    expected = values("rece", "torch")
    first, second = (values("rece", "triton") for _ in range(2))
    for a, b, c in zip(first, second, expected, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("backend", ["torch", "triton", "auto"])
def test_the_backend_that_was_asked_for_ran(backend: str) -> None:
    with counted_launches() as launched:
        values("sce", backend)
    assert bool(launched.kernels) == (backend == "triton")
    assert (launched.kernels >= LISTED) == (backend == "triton")


@pytest.mark.parametrize(
    ("hip", "capability", "expected"),
    [(None, (8, 0), "triton"), (None, (7, 5), "torch"), ("6.2", (9, 4), "torch")],
)
@pytest.mark.filterwarnings("ignore:plain PyTorch serves this GPU")
def test_the_gpu_decides_where_nobody_does(
    monkeypatch: pytest.MonkeyPatch, hip: str | None, capability: tuple[int, int], expected: str
) -> None:
    monkeypatch.setattr(device, "_is_gpu", lambda _: True)
    monkeypatch.setattr(device, "_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    with counted_launches() as launched:
        values("sce", "auto")
    assert bool(launched.kernels) == (expected == "triton")
    assert (launched.kernels >= LISTED) == (expected == "triton")


def test_sce_and_rece_choose_with_triton() -> None:
    with counted_launches() as launched:
        for name in ("sce", "rece"):
            loss_of(name, *problem(), backend="triton")
    choices = {"score_groups_kernel", "best_sign_direction_kernel", "mixed_signs_kernel"}
    assert launched.kernels >= choices


@pytest.mark.parametrize("case", ["cce_minus", "cce_minus-single"])
def test_negatives_of_single_positions_are_gathered(case: str) -> None:
    with counted_launches() as launched:
        values(case, "triton")
    gathered = {name for name in launched.kernels if name.startswith("gathered")}
    assert gathered == (GATHERED if case == "cce_minus-single" else set())


def test_a_chosen_backend_is_reported() -> None:
    assert choose_backend(torch.zeros(1), "triton") == "triton"
    assert choose_backend(torch.zeros(1)) == "torch"
    with pytest.raises(ValueError, match="float64"):
        choose_backend(torch.zeros(1, dtype=torch.float64), "triton")
