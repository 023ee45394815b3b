"""Batches and the comparison that every loss goes through."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tests.tolerance import assert_as_close_as_eager
from torch import Tensor

SIZES = [(1, 1, 4), (1, 7, 8), (13, 1, 4), (37, 101, 12), (300, 517, 20), (64, 5000, 8)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Losses = Callable[[Tensor, Tensor, Tensor], Tensor]


def ids(value: object) -> str | None:
    if isinstance(value, tuple):
        return "N{}-V{}-D{}".format(*value)
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def batch(size: tuple[int, int, int], scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    num_positions, num_items, width = size
    generator = torch.Generator().manual_seed(num_positions + num_items)
    states = torch.randn(num_positions, width, generator=generator) * scale
    table = torch.randn(num_items, width, generator=generator)
    targets = torch.randint(0, num_items, (num_positions,), generator=generator)
    return states, table, targets


def values_and_gradients(
    losses: Losses, states: Tensor, table: Tensor, targets: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    states = states.to(dtype).requires_grad_()
    table = table.to(dtype).requires_grad_()
    upstream = torch.linspace(0.5, 1.5, states.shape[0])
    loss = losses(states, table, targets)
    gradients = torch.autograd.grad((loss * upstream.to(loss.dtype)).sum(), (states, table))
    return [loss.detach(), *(g.to_dense() if g.is_sparse else g for g in gradients)]


def check(
    ours: Losses, reference: Losses, batch: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
) -> None:
    # The truth starts from the rounded inputs, so that only the arithmetic is compared.
    rounded = (batch[0].to(dtype), batch[1].to(dtype), batch[2])
    truth = values_and_gradients(reference, *rounded, torch.float64)
    eager = values_and_gradients(reference, *rounded, dtype)
    result = values_and_gradients(ours, *rounded, dtype)
    # A log-sum-exp is stored as one float, so a probability is as exact as that float's last bit.
    logits = rounded[0].double() @ rounded[1].double().T
    slack = float(logits.detach().abs().max()) * torch.finfo(torch.float32).eps
    for mine, theirs, right in zip(result, eager, truth, strict=True):
        assert_as_close_as_eager(mine, theirs, right, slack)
