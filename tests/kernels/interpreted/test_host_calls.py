"""A loss in Triton starts few operations, and waits for the device once: its targets are checked.

The limits are near to what the code takes; code that takes fewer lowers them. Sizes do not matter
as long as one chunk holds all positions, so that small ones are counted.
"""

from collections.abc import Callable

import pytest
import torch
from tests.kernels.host_calls import HostCalls, counted_host_calls
from torch import Tensor

from shardrec.kernels import (
    cut_cross_entropy,
    hybrid_cross_entropy,
    reduced_cross_entropy,
    sampled_cross_entropy,
    scalable_cross_entropy,
)
from shardrec.kernels.device import backend as device

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def scalable(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    loss = scalable_cross_entropy(
        states, table, targets, items_per_bucket=16, seed=1, backend="triton"
    )
    assert isinstance(loss, Tensor)
    return loss


def sampled(share: int, sparse: bool = False) -> Loss:
    return lambda x, w, y: sampled_cross_entropy(
        x,
        w,
        y,
        num_negatives=20,
        share=share,
        seed=1,
        sparse_grad=sparse,
        backend="triton",
    )


def reduced(num_rounds: int) -> Loss:
    return lambda x, w, y: reduced_cross_entropy(
        x, w, y, num_buckets=24, num_rounds=num_rounds, seed=1, backend="triton"
    )


LOSSES: dict[str, Loss] = {
    "cce": lambda x, w, y: cut_cross_entropy(x, w, y, backend="triton"),
    "cce_minus": sampled(16),
    "cce_minus-single": sampled(1),
    "cce_minus-sparse": sampled(16, sparse=True),
    "sce": scalable,
    "hce": lambda x, w, y: hybrid_cross_entropy(
        x, w, y, items_per_bucket=16, num_negatives=16, seed=1, backend="triton"
    ),
    "rece": reduced(4),
}
# Most operations of PyTorch, launches of kernels, and waits, of forward and backward.
MOST = {
    "cce": (36, 6, 1),
    "cce_minus": (60, 12, 1),
    "cce_minus-single": (66, 8, 1),
    "cce_minus-sparse": (100, 13, 3),
    "sce": (150, 14, 1),
    "hce": (165, 15, 6),
    "rece": (145, 33, 1),
}


@pytest.fixture(autouse=True)
def unwritten_elements_show() -> None:
    """What other tests fill, so that an element that was not written shows, is not counted here."""


def counted(name: str, num_positions: int, num_items: int) -> HostCalls:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(num_positions, 8, generator=generator).requires_grad_()
    table = torch.randn(num_items, 8, generator=generator).requires_grad_()
    targets = torch.randint(0, num_items, (num_positions,), generator=generator)
    with counted_host_calls() as found:
        LOSSES[name](states, table, targets).backward()
    return found


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_asks_little_of_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # What chooses by the device, such as draws, must choose as on a GPU.
    monkeypatch.setattr(device, "_is_gpu", lambda _: True)
    monkeypatch.setattr(device, "_capability", lambda _: (9, 0))
    counted(name, 20, 300), counted(name, 70, 900)  # makes the constants of these sizes
    few, many = counted(name, 20, 300), counted(name, 70, 900)
    most = MOST[name]
    for found in (few, many):
        said = (found.operations.total(), found.kernels.total(), found.waits.total())
        assert all(a <= b for a, b in zip(said, most, strict=True)), (said, found)
    if name == "sce":  # more groups of rows than a bucket has
        few, many = counted(name, 20, 300), counted(name, 20, 900)
    assert few.operations.total() == many.operations.total()
    assert few.waits == many.waits


def test_what_waits_is_counted() -> None:
    with counted_host_calls() as found:
        torch.ones(3).nonzero()
        torch.ones(3)[torch.ones(3) > 0] = torch.ones(())
        float(torch.ones(1)), torch.ones(2).tolist(), torch.tensor([1])
    waits = {"nonzero": 1, "index_put_": 1, "__float__": 1, "tolist": 1, "lift_fresh": 1}
    assert found.waits == waits
