"""The four losses through the Triton kernels equal those in plain PyTorch."""

import pytest
import torch
from tests.every_loss import cases, dense, loss_of
from torch import Tensor

from shardrec.kernels.block_logsumexp import cpu as block_cpu
from shardrec.kernels.block_logsumexp import nearby
from shardrec.kernels.block_logsumexp.gpu import dispatch as block_gpu
from shardrec.kernels.block_logsumexp.gpu import gathered as gpu_gathered
from shardrec.kernels.device import backend as device
from shardrec.kernels.device.backend import choose_backend
from shardrec.kernels.negatives import gpu as negatives_gpu
from shardrec.kernels.select import gpu as select_gpu

N, V, D = 45, 61, 12


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
    monkeypatch.setattr(nearby, "GPU_ROWS_AT_ONCE", 23)
    expected = values("rece", "torch")
    first, second = (values("rece", "triton") for _ in range(2))
    for a, b, c in zip(first, second, expected, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=2e-5, atol=2e-6)


def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of the path at each call of the block log-sum-exp."""
    ran = []
    for name, module in (("torch", block_cpu), ("triton", block_gpu)):
        for function in ("forward", "backward"):
            original = getattr(module, function)

            def spy(*args: object, name: str = name, original: object = original) -> object:
                ran.append(name)
                return original(*args)  # type: ignore[operator]

            monkeypatch.setattr(module, function, spy)
    return ran


@pytest.mark.parametrize("backend", ["torch", "triton", "auto"])
def test_the_backend_that_was_asked_for_ran(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = spied(monkeypatch)
    values("sce", backend)
    assert ran == ["triton" if backend == "triton" else "torch"] * 2


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
    ran = spied(monkeypatch)
    values("sce", "auto")
    assert ran == [expected] * 2


def test_sce_and_rece_choose_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for module, function in (
        (select_gpu, "topk_rows"),
        (select_gpu, "best_sign_direction"),
        (negatives_gpu, "mixed_signs"),
    ):
        original = getattr(module, function)

        def spy(*args: object, f: str = function, g: object = original, **kw: object) -> object:
            ran.append(f)
            return g(*args, **kw)  # type: ignore[operator]

        monkeypatch.setattr(module, function, spy)
    for name in ("sce", "rece"):
        loss_of(name, *problem(), backend="triton")
    assert set(ran) == {"topk_rows", "best_sign_direction", "mixed_signs"}


@pytest.mark.parametrize("name", ["cce_minus", "cce_minus-single"])
def test_negatives_of_single_positions_are_gathered(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    for function in ("forward", "backward"):
        original = getattr(gpu_gathered, function)

        def spy(*args: object, f: str = function, g: object = original) -> None:
            ran.append(f)
            g(*args)  # type: ignore[operator]

        monkeypatch.setattr(gpu_gathered, function, spy)
    values(name, "triton")
    assert ran == (["forward", "backward"] if name == "cce_minus-single" else [])


def test_a_chosen_backend_is_reported() -> None:
    assert choose_backend(torch.zeros(1), "triton") == "triton"
    assert choose_backend(torch.zeros(1)) == "torch"
    with pytest.raises(ValueError, match="float64"):
        choose_backend(torch.zeros(1, dtype=torch.float64), "triton")
