"""What the four losses share: checks, scaling of the logits, from log-sum-exps to one number."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["candidate_loss", "check_inputs", "reduce_loss", "scale_rows", "scale_states"]

_REDUCTIONS = ("none", "mean", "sum")


def check_inputs(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    reduction: str,
    temperature: float,
    num_items: int | None = None,
) -> None:
    """Raises where shapes, dtypes or the range of the targets are wrong; returns nothing.

    Args:
        states: Must be (N, D) float.
        table: Must be (R, D) of the same dtype.
        targets: Must be (N,) integer in [0, num_items).
        weights: Must be (N,) float, not negative, or None.
        reduction: Must be none, mean or sum.
        temperature: Must be positive.
        num_items: V; the rows of ``table`` when None.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or a value is wrong.
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {_REDUCTIONS}, got {reduction!r}; choose one")
    if not temperature > 0:
        raise ValueError(
            f"temperature must be positive, got {temperature}; 1.0 leaves logits alone"
        )
    if states.dim() != 2 or table.dim() != 2 or states.shape[1] != table.shape[1]:
        raise ValueError(
            "states and table must be (N, D) and (V, D), got "
            f"{tuple(states.shape)} and {tuple(table.shape)}; pack real positions before the loss"
        )
    if not states.is_floating_point() or states.dtype != table.dtype:
        raise TypeError(
            f"states and table must share one float dtype, got {states.dtype} and {table.dtype}; "
            "cast one of them"
        )
    if targets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"targets must be int64, got {targets.dtype}; cast them with .long()")
    for name, tensor in (("targets", targets), ("weights", weights)):
        if tensor is not None and tensor.shape != states.shape[:1]:
            raise ValueError(
                f"{name} must have shape {tuple(states.shape[:1])}, got {tuple(tensor.shape)}; "
                "give one per row of states"
            )
    num_items = table.shape[0] if num_items is None else num_items
    if targets.numel() and not (0 <= int(targets.min()) and int(targets.max()) < num_items):
        raise ValueError(
            f"targets must be in [0, {num_items}), got {int(targets.min())}..{int(targets.max())}; "
            "remove padding and use indices of this catalog"
        )
    if weights is not None and weights.numel() and not bool((weights >= 0).all()):
        raise ValueError(f"weights must not be negative, got {float(weights.min())}; clip them")


def scale_states(states: Tensor, normalize: bool, temperature: float) -> Tensor:
    """(N, D) states, of unit length when ``normalize``, divided by ``temperature``."""
    states = F.normalize(states, dim=1) if normalize else states
    return states if temperature == 1.0 else states / temperature


def scale_rows(rows: Tensor, normalize: bool) -> Tensor:
    """(R, D) rows, of unit length when ``normalize``."""
    return F.normalize(rows, dim=1) if normalize else rows


def candidate_loss(logsumexp: Tensor, target_logits: Tensor) -> Tensor:
    """``log(exp(target) + exp(logsumexp)) - target``, exact for confident rows; same shape.

    The target is no candidate, so nothing is subtracted from 1: the gradient of a row that is nearly
    sure is as precise as any other.

    >>> candidate_loss(torch.tensor([0.0, -torch.inf]), torch.tensor([0.0, 3.0]))
    tensor([0.6931, 0.0000])
    """
    return F.softplus(logsumexp - target_logits)


def reduce_loss(
    loss: Tensor, weights: Tensor | None, reduction: str, covered: Tensor | None = None
) -> Tensor:
    """The weighted losses (none), their sum, or their mean over the sum of weights.

    Args:
        loss: (N,) float32.
        weights: (N,) float or None for ones.
        reduction: none, mean or sum.
        covered: (N,) bool; positions outside count neither in the sum nor in the mean.

    Returns:
        (N,) or () float32; a mean over no position is 0.
    """
    weights = torch.ones_like(loss) if weights is None else weights.to(loss.dtype)
    if covered is not None:
        weights = weights * covered
    if reduction == "none":
        return loss * weights
    total = (loss * weights).sum()
    if reduction == "sum":
        return total
    norm = weights.sum()
    return total / torch.where(norm > 0, norm, torch.ones_like(norm))
