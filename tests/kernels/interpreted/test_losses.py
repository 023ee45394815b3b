"""The four losses through the Triton kernels equal those in plain PyTorch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from shardrec.kernels import (
    cut_cross_entropy,
    reduced_cross_entropy,
    sampled_cross_entropy,
    scalable_cross_entropy,
)
from shardrec.kernels.block_logsumexp import cpu as block_cpu
from shardrec.kernels.block_logsumexp import dispatch as block_gpu
from shardrec.kernels.block_logsumexp import nearby
from shardrec.kernels.block_logsumexp.gpu import gathered as gpu_gathered
from shardrec.kernels.device import backend as device
from shardrec.kernels.device.backend import choose_backend
from shardrec.kernels.negatives import gpu as negatives_gpu
from shardrec.kernels.select import gpu as select_gpu

N, V, D = 45, 61, 12

Loss = Callable[[Tensor, Tensor, Tensor, str], Any]

LOSSES: dict[str, Loss] = {
    "cce": lambda x, w, y, backend: cut_cross_entropy(x, w, y, backend=backend),
    "cce-scaled": lambda x, w, y, backend: cut_cross_entropy(
        x, w, y, normalize=True, temperature=0.3, backend=backend
    ),
    "cce_minus": lambda x, w, y, backend: sampled_cross_entropy(
        x, w, y, num_negatives=37, share=16, seed=1, backend=backend
    ),
    "cce_minus-each": lambda x, w, y, backend: sampled_cross_entropy(
        x, w, y, num_negatives=5, share=1, seed=1, backend=backend
    ),
    "cce_minus-sparse": lambda x, w, y, backend: sampled_cross_entropy(
        x, w, y, num_negatives=9, share=None, seed=1, sparse_grad=True, backend=backend
    ),
    "sce": lambda x, w, y, backend: scalable_cross_entropy(
        x, w, y, num_buckets=6, positions_per_bucket=11, items_per_bucket=19, seed=2,
        backend=backend,
    ),
    "sce-plain": lambda x, w, y, backend: scalable_cross_entropy(
        x, w, y, num_buckets=5, positions_per_bucket=90, items_per_bucket=90, mix=False, seed=2,
        backend=backend,
    ),
    "rece": lambda x, w, y, backend: reduced_cross_entropy(
        x, w, y, num_buckets=9, num_rounds=3, seed=3, backend=backend
    ),
}  # fmt: skip


def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(N, D, generator=generator, requires_grad=True)
    table = torch.randn(V, D, generator=generator, requires_grad=True)
    return states, table, torch.randint(0, V, (N,), generator=generator)


def values(loss: Loss, backend: str) -> list[Tensor]:
    states, table, targets = problem()
    value = loss(states, table, targets, backend)
    grads = torch.autograd.grad(value, (states, table))
    return [value.detach(), *(g.to_dense() if g.is_sparse else g for g in grads)]


@pytest.mark.parametrize("name", LOSSES)
def test_triton_equals_torch(name: str) -> None:
    ours, expected = values(LOSSES[name], "triton"), values(LOSSES[name], "torch")
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def test_rece_listed_in_many_parts_equals_torch_and_repeats_its_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nearby, "GPU_ROWS_AT_ONCE", 23)
    expected = values(LOSSES["rece"], "torch")
    first, second = (values(LOSSES["rece"], "triton") for _ in range(2))
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
    values(LOSSES["sce"], backend)
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
    values(LOSSES["sce"], "auto")
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
        LOSSES[name](*problem(), "triton")
    assert set(ran) == {"topk_rows", "best_sign_direction", "mixed_signs"}


@pytest.mark.parametrize("name", ["cce_minus", "cce_minus-each"])
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
    values(LOSSES[name], "triton")
    assert ran == (["forward", "backward"] if name == "cce_minus-each" else [])


def test_a_chosen_backend_is_reported() -> None:
    assert choose_backend(torch.zeros(1), "triton") == "triton"
    assert choose_backend(torch.zeros(1)) == "torch"
    with pytest.raises(ValueError, match="float64"):
        choose_backend(torch.zeros(1, dtype=torch.float64), "triton")
