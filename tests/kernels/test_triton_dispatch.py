"""Who serves an operation, and what is imported for it."""

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from tests.every_loss import batch, gradients, loss_of, names
from tests.losses import LOSSES
from torch import Tensor

from shardrec.kernels import block_logsumexp, cut_cross_entropy, select
from shardrec.kernels.block_logsumexp import Blocks, EveryPair, cpu
from shardrec.kernels.block_logsumexp.gpu.launch import LaunchProblem
from shardrec.kernels.device import backend as device
from shardrec.kernels.device.backend import choose_backend, gpu_refusal


def run_python(code: str) -> None:
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow  # a process of its own
def test_the_kernels_are_imported_only_where_one_runs() -> None:
    run_python(
        "import sys, torch\n"
        "from shardrec.kernels import cut_cross_entropy\n"
        "assert 'triton' not in sys.modules\n"
        "states = torch.ones(3, 8, requires_grad=True)\n"
        "cut_cross_entropy(states, torch.ones(5, 8), torch.arange(3)).backward()\n"
        "ours = [name for name in sys.modules if name.startswith('shardrec.kernels')]\n"
        "assert not [name for name in ours if '.gpu' in name], ours\n"
        "for name in ('triton', 'torch._dynamo'):  # 1.8 CPU seconds of a first call\n"
        "    assert name not in sys.modules, name\n"
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
        block_logsumexp.forward(states, rows, EveryPair(5, torch.arange(3)), backend)
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


GPUS: dict[str, tuple[str | None, tuple[int, int], str]] = {
    "sm_75": (None, (7, 5), "sm_75"),
    "rocm": ("6.2", (9, 4), "NVIDIA"),
}


def pretend(monkeypatch: pytest.MonkeyPatch, hip: str | None, capability: tuple[int, int]) -> None:
    """Lets tensors of the CPU look like those of a GPU."""
    monkeypatch.setattr(device, "_is_gpu", lambda _: True)
    monkeypatch.setattr(device, "_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", hip)


def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of the path at each call of the block log-sum-exp."""
    ran: list[str] = []
    paths = (("torch", cpu, "forward"), ("torch", cpu, "backward"), ("triton", LaunchProblem, "of"))
    for name, owner, function in paths:
        original = getattr(owner, function)

        def spy(*args: object, name: str = name, original: Any = original) -> object:
            ran.append(name)
            return original(*args)

        monkeypatch.setattr(owner, function, spy)
    return ran


def values(name: str, reduction: str) -> list[Tensor]:
    states, table, targets = batch()
    states.requires_grad_(), table.requires_grad_()
    loss = loss_of(name, states, table, targets, reduction=reduction)
    return gradients(loss, states, table)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", names(is_operator=True))
@pytest.mark.parametrize("name_of_gpu", GPUS)
def test_a_gpu_that_triton_does_not_serve_gets_plain_pytorch_and_a_warning_that_says_why(
    monkeypatch: pytest.MonkeyPatch, name_of_gpu: str, name: str, reduction: str
) -> None:
    hip, capability, words = GPUS[name_of_gpu]
    expected = values(name, reduction)
    pretend(monkeypatch, hip, capability)
    ran = spied(monkeypatch)
    with pytest.warns(UserWarning, match=f"plain PyTorch serves this GPU.*{words}"):
        found = values(name, reduction)
    in_forward = LOSSES[name].in_forward and reduction == "mean"
    assert set(ran) == (set() if in_forward else {"torch"})
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name_of_gpu", GPUS)
def test_triton_is_refused_where_it_is_forced_on_such_a_gpu(
    monkeypatch: pytest.MonkeyPatch, name_of_gpu: str
) -> None:
    hip, capability, words = GPUS[name_of_gpu]
    pretend(monkeypatch, hip, capability)
    with pytest.raises(ValueError, match=f"backend must be 'torch' here.*{words}"):
        choose_backend(torch.zeros(1), "triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_backend(torch.zeros(1), "torch") == "torch"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_newer_gpus_get_triton_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    pretend(monkeypatch, None, capability)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_backend(torch.zeros(1)) == "triton"
        assert choose_backend(torch.zeros(1), "torch") == "torch"


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


def test_precision_follows_the_newer_setting_of_pytorch() -> None:
    """After it was set, ``torch.get_float32_matmul_precision`` raises an error."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert device.precision_of(torch.float32) == "tf32"
        assert device.precision_of(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
