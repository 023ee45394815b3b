"""What a test of every loss needs: cases of the registry, a batch, a loss and its truth.

A case is the name of a loss or ``name-variant``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tests.loss_entry import DRAWN
from tests.losses import LOSSES
from torch import Tensor

from shardrec.kernels import RowShard
from shardrec.modules.losses import Loss

# Normalize and temperature.
SCALINGS = {
    "plain": (False, 1.0),
    "unit": (True, 1.0),
    "cosine": (True, 0.1),
    "warm": (False, 2.5),
    "saturated": (False, 0.01),
}
WEIGHTS = torch.linspace(0.0, 2.0, 60)


def names(**flags: bool) -> list[str]:
    """Names of the losses whose entries have these flags."""
    return [
        name
        for name, loss in LOSSES.items()
        if all(getattr(loss, flag) == value for flag, value in flags.items())
    ]


def cases(**flags: bool) -> list[str]:
    """Every variant of the functions of these losses."""
    return [
        f"{name}-{variant}".removesuffix("-")
        for name in names(**flags)
        for variant in LOSSES[name].function_variants()
    ]


def config_cases(**flags: bool) -> list[str]:
    """Every variant of the classes of options of these losses."""
    return [
        f"{name}-{variant}".removesuffix("-")
        for name in names(**flags)
        for variant in LOSSES[name].shared_variants() | LOSSES[name].config_variants
    ]


def config_of(case: str) -> Loss:
    """A loss with its options for training; None of a function is 0 there."""
    name, _, variant = case.partition("-")
    loss = LOSSES[name]
    options = (loss.shared_variants() | loss.config_variants)[variant]
    given: dict[str, Any] = {key: 0 if one is None else one for key, one in options.items()}
    return loss.config(**given)


def evaluate(
    case: str, states: Tensor, table: Tensor | RowShard, targets: Tensor, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The loss of a function, and the mask of covered positions where it gives one."""
    name, _, variant = case.partition("-")
    loss = LOSSES[name]
    options = loss.function_variants()[variant] | options
    options = DRAWN | options if loss.has_draws else options
    result = loss.function(states, table, targets, **options)
    return result if isinstance(result, tuple) else (result, None)


def loss_of(
    case: str, states: Tensor, table: Tensor | RowShard, targets: Tensor, **options: Any
) -> Tensor:
    """The loss of a function alone."""
    return evaluate(case, states, table, targets, **options)[0]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """60 states and 83 rows of width 12, float32, and targets of which some share an item."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(60, 12, generator=generator)
    table = torch.randn(83, 12, generator=generator)
    return states, table, torch.randint(0, 83, (60,), generator=generator)


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    """The loss, and the dense gradients of a sum that weighs positions and counts thrice."""
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype) if loss.dim() else 1
    found = torch.autograd.grad(3 * (loss * upstream).sum(), inputs)
    return [loss.detach(), *(dense(one) for one in found)]


def dense(gradient: Tensor | None) -> Tensor:
    """A gradient that must be there, without zeros left out."""
    assert gradient is not None
    return gradient.to_dense() if gradient.is_sparse else gradient


def scaled(
    states: Tensor, table: Tensor, normalize: bool, temperature: float
) -> tuple[Tensor, Tensor]:
    """States and rows as products take them."""
    if normalize:
        states = states / states.square().sum(1, keepdim=True).sqrt()
        table = table / table.square().sum(1, keepdim=True).sqrt()
    return states / temperature, table


def reduced(losses: Tensor, covered: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    """Weighted losses, their sum, or that over the sum of the covered positions' weights."""
    factors = covered.double() if weights is None else covered * weights.double()
    if reduction == "none":
        return losses * factors
    return (losses * factors).sum() / (factors.sum() if reduction == "mean" else 1)


def truth(
    case: str,
    *,
    normalize: bool = False,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
    **options: Any,
) -> list[Tensor]:
    """Value and gradients of states and table, float64, of the loss of ``batch()``."""
    name, _, _ = case.partition("-")
    loss = LOSSES[name]
    states, table, targets = batch()
    states, table = states.double().requires_grad_(), table.double().requires_grad_()
    exact, rows = scaled(states, table, normalize, temperature)
    losses, covered = loss.definition(exact, rows, targets, **(loss.options | options))
    return gradients(reduced(losses, covered, weights, reduction), states, table)


def assert_equals_truth(
    found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 2e-5
) -> None:
    """As exact as float32 sums of such logits are, relative to the largest number."""
    for ours, right in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == right.shape
        assert right.any(), "a zero shows nothing"
        error = float((ours.double() - right).abs().max() / right.abs().max())
        assert error < tolerance, f"{error:.3g} of the largest value"
