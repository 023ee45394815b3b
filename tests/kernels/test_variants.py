"""Numbers that change from batch to batch do not compile a kernel anew.

A GPU is pretended: launches stop where a variant is chosen, so that kernels write nothing. What
they should have written is 0.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from shardrec.kernels import (
    cut_cross_entropy,
    hybrid_cross_entropy,
    reduced_cross_entropy,
    sampled_cross_entropy,
    scalable_cross_entropy,
)
from shardrec.kernels.device import backend as device
from shardrec.kernels.select import gpu as select

LOSSES: dict[str, Callable[..., Any]] = {
    "cce": cut_cross_entropy,
    "cce_minus": lambda *batch, **options: sampled_cross_entropy(
        *batch, num_negatives=20, share=16, seed=1, **options
    ),
    "cce_minus-single": lambda *batch, **options: sampled_cross_entropy(
        *batch, num_negatives=20, share=1, seed=1, **options
    ),
    "sce": lambda *batch, **options: scalable_cross_entropy(
        *batch, items_per_bucket=16, seed=1, **options
    ),
    "hce": lambda *batch, **options: hybrid_cross_entropy(
        *batch, items_per_bucket=16, num_negatives=16, seed=1, **options
    ),
    "rece": lambda *batch, **options: reduced_cross_entropy(
        *batch, num_rounds=2, seed=1, **options
    ),
}
VARIANTS = defaultdict[str, set[str]]


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> Iterator[VARIANTS]:
    """For each kernel the keys by which Triton caches what it compiled."""
    found: VARIANTS = defaultdict(set)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binders: dict[JITFunction[Any], Any] = {}

    def run(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if kernel not in binders:
            binders[kernel] = create_function_from_signature(
                kernel.signature, kernel.params, backend
            )
        _, specialization, chosen = binders[kernel](*args, **options)
        found[kernel.fn.__name__].add(f"{specialization} {chosen}")

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(torch, "empty", torch.zeros)
    monkeypatch.setattr(Tensor, "new_empty", Tensor.new_zeros)
    monkeypatch.setattr(select, "_index_of", torch.zeros_like)
    monkeypatch.setattr(device, "_is_gpu", lambda _: True)
    monkeypatch.setattr(device, "_capability", lambda _: (9, 0))
    yield found


def batch(num_positions: int, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    states = torch.zeros(num_positions, table.shape[1], requires_grad=True)
    return states, table, torch.zeros(num_positions, dtype=torch.int64)


@pytest.mark.parametrize("name", LOSSES)
def test_few_variants_serve_all_batches(name: str, variants: VARIANTS) -> None:
    table = torch.zeros(5_000, 64, requires_grad=True)
    sizes = random.Random(0)
    for step in range(170):
        num_positions = sizes.choice([1, 16, 128, sizes.randint(1, 600)])
        options = {} if name == "cce" else {"step": step}
        loss = LOSSES[name](*batch(num_positions, table), backend="triton", **options)
        loss.backward()
    assert variants
    assert {kernel: len(keys) for kernel, keys in variants.items() if len(keys) > 2} == {}
