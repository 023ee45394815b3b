"""Who serves an operation, and what is imported for it."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor

from shardrec.kernels import block_logsumexp, cut_cross_entropy, device, select
from shardrec.kernels.block_logsumexp import Blocks, cpu, every_pair
from shardrec.kernels.device import choose_backend, gpu_refusal


def run_python(code: str) -> None:
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_triton_is_imported_only_where_a_kernel_runs() -> None:
    run_python(
        "import sys, torch\n"
        "from shardrec.kernels import cut_cross_entropy\n"
        "states = torch.ones(3, 8, requires_grad=True)\n"
        "cut_cross_entropy(states, torch.ones(5, 8), torch.arange(3)).backward()\n"
        "assert 'triton' not in sys.modules\n"
    )


def test_plain_pytorch_serves_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    original = cpu.forward

    def spy(states: Tensor, rows: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
        ran.append("torch")
        return original(states, rows, blocks)

    monkeypatch.setattr(cpu, "forward", spy)
    states, rows = torch.ones(3, 8), torch.ones(5, 8)
    for backend in ("auto", "torch"):
        block_logsumexp.forward(states, rows, every_pair(5, torch.arange(3)), backend)
    assert ran == ["torch", "torch"]


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_backend_that_cannot_run_is_refused_by_name(backend: str) -> None:
    states, rows = torch.ones(3, 8), torch.ones(5, 8)
    with pytest.raises(ValueError, match="backend must be"):
        cut_cross_entropy(states, rows, torch.arange(3), backend=backend)
    with pytest.raises(ValueError, match="backend must be"):
        select.topk_rows(states, rows, 2, backend=backend)


@pytest.mark.parametrize(
    ("hip", "capability", "words"),
    [
        (None, (8, 0), None),
        (None, (9, 0), None),
        (None, (12, 0), None),
        (None, (7, 5), "sm_75"),
        ("6.2", (9, 4), "NVIDIA"),
    ],
)
def test_which_gpus_triton_serves(
    hip: str | None, capability: tuple[int, int], words: str | None
) -> None:
    reason = gpu_refusal(hip, capability)
    assert (reason is None) == (words is None)
    assert words is None or words in str(reason)


class OldGpuTensor:
    """What ``choose_backend`` looks at, of a tensor on a GPU that is not here."""

    device = torch.device("cuda", 0)
    dtype = torch.float32

    def is_floating_point(self) -> bool:
        return True


def test_an_old_gpu_falls_back_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_capability", lambda _: (7, 5))
    tensor = OldGpuTensor()
    with pytest.warns(UserWarning, match="sm_75"):
        assert choose_backend(tensor) == "torch"  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_backend(tensor, "torch") == "torch"  # type: ignore[arg-type]
        monkeypatch.setattr(device, "_capability", lambda _: (9, 0))
        assert choose_backend(tensor) == "triton"  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sm_75"):
        monkeypatch.setattr(device, "_capability", lambda _: (7, 5))
        choose_backend(tensor, "triton")  # type: ignore[arg-type]


def test_precision_follows_pytorch() -> None:
    assert device.precision_of(torch.float32) == "ieee"
    assert device.precision_of(torch.bfloat16) == "ieee"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert device.precision_of(torch.float32) == "tf32"
        assert device.precision_of(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
