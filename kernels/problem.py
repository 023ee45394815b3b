"""One batch against one table: what every loss here starts from and ends with."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from shardrec.kernels.block_logsumexp import RowIds
from shardrec.kernels.collective import Collective
from shardrec.kernels.device import choose_backend
from shardrec.kernels.exchange import Alone, Exchange
from shardrec.kernels.shard import RowShard

__all__ = ["Problem", "Scaling", "candidate_loss", "pose"]

_REDUCTIONS = ("none", "mean", "sum")


@dataclass(frozen=True, slots=True)
class Scaling:
    """``s_ij = x_i . w_j / temperature``, of unit vectors when ``normalize``."""

    normalize: bool
    temperature: float

    def __post_init__(self) -> None:
        """Checks the temperature."""
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be positive, got {self.temperature}; 1.0 leaves logits alone"
            )


@dataclass(frozen=True, slots=True)
class Problem:
    """One batch against one table, as this rank sees them.

    Attributes:
        states: (N, D) float, scaled by ``scaling``.
        rows: (R, D) float as the table holds them, same dtype.
        targets: (N,) int64 global items.
        weights: (N,) float32 factors of the positions' losses.
        row_ids: Which items the rows are.
        num_items: V.
        scaling: How logits follow from states and rows.
        exchange: The way to the other ranks.
        backend: What serves the operations on states and rows, "torch" or "triton".
    """

    states: Tensor
    rows: Tensor
    targets: Tensor
    weights: Tensor
    row_ids: RowIds
    num_items: int
    scaling: Scaling
    exchange: Exchange
    backend: str

    def scaled_rows(self) -> Tensor:
        """(R, D) rows, of unit length when the scaling says so."""
        return F.normalize(self.rows, dim=1) if self.scaling.normalize else self.rows

    def restrict(self, items: Tensor, sparse: bool) -> "Problem":
        """The same problem over the rows of ``items`` alone, so that nothing has the size of V.

        Args:
            items: (M,) int64 global items, repeats allowed; those of other shards are left out.
            sparse: Whether the table gets a sparse gradient.
        """
        found = self.row_ids.find(items)
        used = torch.unique(found[found >= 0])
        row_ids = RowIds(first=0, count=used.numel(), sparse=used + self.row_ids.first)
        return replace(self, rows=F.embedding(used, self.rows, sparse=sparse), row_ids=row_ids)

    def coefficients(self, reduction: str) -> Tensor:
        """(N,) float32 factor of each position's loss in the sum or the mean over all ranks.

        Collectives: one sum of a number for the mean.
        """
        if reduction == "sum":
            return self.weights
        norm = self.exchange.sum(self.weights.sum())
        return self.weights / torch.where(norm > 0, norm, torch.ones_like(norm))

    def reduce(self, loss: Tensor, reduction: str, covered: Tensor | None = None) -> Tensor:
        """The weighted losses (none), or over all ranks their sum or mean by the sum of weights.

        Args:
            loss: (N,) float32.
            reduction: none, mean or sum.
            covered: (N,) bool; positions outside count neither in the sum nor in the mean.

        Returns:
            (N,) or () float32; a mean over no position is 0.

        Collectives: one sum of a number, two for the mean.
        """
        weights = self.weights if covered is None else self.weights * covered
        if reduction == "none":
            return loss * weights
        total = self.exchange.total((loss * weights).sum())
        if reduction == "sum":
            return total
        norm = self.exchange.sum(weights.sum())
        return total / torch.where(norm > 0, norm, torch.ones_like(norm))


def pose(
    states: Tensor,
    table: Tensor | RowShard,
    targets: Tensor,
    *,
    weights: Tensor | None,
    reduction: str,
    scaling: Scaling,
    backend: str = "auto",
) -> Problem:
    """The problem, checked on every rank before anything travels.

    Args:
        states: (N, D) float; N may differ by rank and be 0.
        table: (V, D) of the same dtype, or this rank's shard of it.
        targets: (N,) integer global items in [0, V).
        weights: (N,) float, not negative, or None for ones.
        reduction: none, mean or sum.
        scaling: How logits follow from states and rows.
        backend: "auto", "torch" or "triton"; see ``choose_backend``.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or a value is wrong, here or on another rank, or the backend does not
            serve this device.

    Collectives: with a group, one gather of three numbers.
    """
    chosen = choose_backend(states, backend)
    shard = table if isinstance(table, RowShard) else RowShard(table, 0, table.shape[0])
    refusal = _refusal(states, shard, targets, weights, reduction)
    exchange: Exchange
    if shard.group is None:
        if refusal:
            raise refusal
        exchange = Alone(states.shape[0], shard.rows.shape[0], states.device)
    else:
        num_positions = states.shape[0] if states.dim() else 0
        state_bytes = states.shape[-1] * states.element_size() if states.dim() else 0
        try:
            exchange = Collective(
                shard.group,
                num_positions,
                shard.rows.shape[0],
                shard.rows.device,
                state_bytes=state_bytes,
                failed=refusal is not None,
            )
        except ValueError as error:
            raise refusal or error from None
    scaled = F.normalize(states, dim=1) if scaling.normalize else states
    scaled = scaled if scaling.temperature == 1.0 else scaled / scaling.temperature
    ones = torch.ones(states.shape[0], device=states.device)
    return Problem(
        states=scaled,
        rows=shard.rows,
        targets=targets.long(),
        weights=ones if weights is None else weights.float(),
        row_ids=RowIds(first=shard.first_row, count=shard.rows.shape[0]),
        num_items=shard.num_rows,
        scaling=scaling,
        exchange=exchange,
        backend=chosen,
    )


def candidate_loss(logsumexp: Tensor, target_logits: Tensor) -> Tensor:
    """``log(exp(target) + exp(logsumexp)) - target``, exact for confident rows; same shape.

    The target is no candidate, so nothing is subtracted from 1: the gradient of a row that is
    nearly sure is as precise as any other.

    >>> candidate_loss(torch.tensor([0.0, -torch.inf]), torch.tensor([0.0, 3.0]))
    tensor([0.6931, 0.0000])
    """
    return F.softplus(logsumexp - target_logits)


def _refusal(
    states: Tensor, shard: RowShard, targets: Tensor, weights: Tensor | None, reduction: str
) -> TypeError | ValueError | None:
    if reduction not in _REDUCTIONS:
        return ValueError(f"reduction must be one of {_REDUCTIONS}, got {reduction!r}; choose one")
    rows = shard.rows
    if states.dim() != 2 or rows.dim() != 2 or states.shape[1] != rows.shape[1]:
        return ValueError(
            "states and table must be (N, D) and (V, D), got "
            f"{tuple(states.shape)} and {tuple(rows.shape)}; pack real positions before the loss"
        )
    if not states.is_floating_point() or states.dtype != rows.dtype:
        return TypeError(
            f"states and table must share one float dtype, got {states.dtype} and {rows.dtype}; "
            "cast one of them"
        )
    return _vector_refusal(states.shape[0], shard.num_rows, targets, weights)


def _vector_refusal(
    num_positions: int, num_items: int, targets: Tensor, weights: Tensor | None
) -> TypeError | ValueError | None:
    if targets.dtype not in (torch.int32, torch.int64):
        return TypeError(f"targets must be int64, got {targets.dtype}; cast them with .long()")
    for name, vector in (("targets", targets), ("weights", weights)):
        if vector is not None and vector.shape != (num_positions,):
            return ValueError(
                f"{name} must have shape ({num_positions},), got {tuple(vector.shape)}; "
                "give one per row of states"
            )
    if num_positions and not 0 <= int(targets.min()) <= int(targets.max()) < num_items:
        return ValueError(
            f"targets must be in [0, {num_items}), got {int(targets.min())}..{int(targets.max())}; "
            "remove padding and use indices of this catalog"
        )
    if weights is not None and num_positions and not bool((weights >= 0).all()):
        return ValueError(f"weights must not be negative, got {float(weights.min())}; clip them")
    return None
