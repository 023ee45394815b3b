"""The inputs of a loss: one batch and one table, validated on every rank."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from shardrec.kernels.block_logsumexp import RowIds
from shardrec.kernels.device.backend import choose_backend
from shardrec.kernels.ranks.chunks import Layout
from shardrec.kernels.ranks.communicator import Communicator
from shardrec.kernels.shard import RowShard

__all__ = ["Inputs", "Scaling", "prepare_inputs", "restore_inputs", "shape_error"]

_REDUCTIONS = ("none", "mean", "sum")
_LEAST_NORM = 1e-12  # as in F.normalize


@dataclass(frozen=True, slots=True)
class Scaling:
    """How logits are computed from states x and rows w: ``s_ij = x_i . w_j / temperature``.

    Attributes:
        normalize: Scale states and rows to unit L2 norm first.
        temperature: Positive; divides the states.
        dtype: Dtype of states and rows in matrix products; None keeps theirs.
    """

    normalize: bool
    temperature: float
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Raises ValueError unless the temperature is positive."""
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be positive, got {self.temperature}; 1.0 leaves logits unchanged"
            )

    def states(self, states: Tensor) -> Tensor:
        """(N, D) states scaled and cast for the matrix products."""
        scaled = self.rows(states)
        return scaled if self.temperature == 1.0 else scaled / self.temperature

    def rows(self, rows: Tensor) -> Tensor:
        """(R, D) rows scaled and cast for the matrix products."""
        scaled = F.normalize(rows, dim=1, eps=_LEAST_NORM) if self.normalize else rows
        return scaled if self.dtype is None else scaled.to(self.dtype)

    def states_gradient(self, states: Tensor, grad: Tensor) -> Tensor:
        """(N, D) gradient of the unscaled states; overwrites ``grad``, that of the scaled ones."""
        grad = grad if self.temperature == 1.0 else grad.div_(self.temperature)
        return self.rows_gradient(states, grad)

    def rows_gradient(self, rows: Tensor, grad: Tensor) -> Tensor:
        """(R, D) gradient of the unscaled rows, in the dtype of the rows.

        ``grad``, the (R, D) float32 gradient of the scaled rows, is overwritten.
        """
        if self.normalize:
            norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float32)
            norm.clamp_(min=_LEAST_NORM)
            unit = rows / norm
            along = torch.linalg.vecdot(unit, grad)[:, None]
            grad = grad.sub_(unit.mul_(along)).div_(norm)
        return grad.to(rows.dtype)


@dataclass(frozen=True, slots=True)
class Inputs:
    """One batch and one table, as this rank sees them.

    Attributes:
        states: (N, D) float, scaled by ``scaling``.
        rows: (R, D) float as the table holds them.
        targets: (N,) int64 global items.
        weights: (N,) float32 weight of each position's loss; None for ones.
        row_ids: The global item of each row.
        num_items: V.
        scaling: How logits are computed from states and rows.
        layout: The ranges of positions and rows of each rank.
        backend: "torch" or "triton", for the operations on states and rows.
    """

    states: Tensor
    rows: Tensor
    targets: Tensor
    weights: Tensor | None
    row_ids: RowIds
    num_items: int
    scaling: Scaling
    layout: Layout
    backend: str

    @property
    def ranks(self) -> Communicator:
        """The communicator of the ranks that hold the table."""
        return self.layout.ranks

    def scaled_rows(self) -> Tensor:
        """(R, D) rows scaled and cast for the matrix products."""
        return self.scaling.rows(self.rows)

    def restrict(self, used: Tensor, rows: Tensor) -> "Inputs":
        """The same inputs with only the rows in use.

        Args:
            used: (M,) int64 rows of this shard, ascending.
            rows: (M, D) those rows.
        """
        return replace(self, rows=rows, row_ids=RowIds.of(used, self.row_ids))

    def coefficients(self, reduction: str, covered: Tensor | None = None) -> Tensor:
        """(N,) float32 factor of each position's loss in the sum or the mean over all ranks.

        Args:
            reduction: none, mean or sum; for none and sum the factors are the weights.
            covered: (N,) bool; other positions get factor 0. If no position of any rank is covered,
                all factors of the mean are 0.

        Collectives: one all-reduce of a number for the mean.
        """
        alone = self.ranks.group is None
        if alone and self.weights is None and covered is None and reduction == "mean":
            factor = 1 / max(1, self.layout.num_positions)
            return torch.full(self.states.shape[:1], factor, device=self.states.device)
        weights = self.weights
        if weights is None:
            weights = torch.ones(self.states.shape[0], device=self.states.device)
        weights = weights if covered is None else weights * covered
        if reduction != "mean":
            return weights
        norm = self.ranks.sum(weights.sum())
        return weights / torch.where(norm > 0, norm, torch.ones_like(norm))

    def reduce(self, loss: Tensor, reduction: str) -> Tensor:
        """Weighted losses (none), or their sum or weighted mean over all ranks.

        Args:
            loss: (N,) float32.
            reduction: none, mean or sum.

        Returns:
            (N,) or () float32; a mean over no position is 0.

        Collectives: one all-reduce of a number, two for the mean.
        """
        weighted = loss * self.coefficients(reduction)
        return weighted if reduction == "none" else self.ranks.total(weighted.sum())


def prepare_inputs(
    states: Tensor,
    table: Tensor | RowShard,
    targets: Tensor,
    *,
    weights: Tensor | None,
    reduction: str,
    scaling: Scaling,
    backend: str = "auto",
) -> Inputs:
    """The inputs of a loss, validated on every rank before any other collective.

    Args:
        states: (N, D) float; N may differ by rank and be 0.
        table: (V, D) of the same dtype, or this rank's shard of it.
        targets: (N,) integer global items in [0, V).
        weights: (N,) float, not negative, or None for ones.
        reduction: none, mean or sum.
        scaling: How logits are computed from states and rows; if it sets a dtype, states and table
            may have different ones.
        backend: "auto", "torch" or "triton"; see ``choose_backend``.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or a value is wrong on any rank, or the backend does not support this
            device.

    Collectives: with a group, one all-gather of five integers per rank.
    """
    chosen = choose_backend(states, backend)
    shard = table if isinstance(table, RowShard) else RowShard(table, 0, table.shape[0])
    error = shape_error(states, shard.rows, targets, weights, reduction, scaling)
    error = error or _value_error(targets, weights, shard.num_rows)
    if shard.group is None:
        error = error or _lone_shard_error(shard)
        if error:
            raise error
        layout = _single_layout(states, shard.rows)
    else:
        held = shard.rows.shape[0] if shard.rows.dim() else 0
        try:
            layout = Layout.gathered(
                shard.group,
                states.shape[0] if states.dim() else 0,
                range(shard.first_row, shard.first_row + held),
                shard.num_rows,
                shard.rows.device,
                state_bytes=_state_bytes(states, scaling),
                failed=error is not None,
            )
        except ValueError as elsewhere:
            raise error or elsewhere from None
    return _inputs(states, shard, targets, weights, scaling, layout, chosen)


def restore_inputs(
    states: Tensor,
    shard: RowShard,
    targets: Tensor,
    scaling: Scaling,
    backend: str,
    sizes: Tensor | None,
) -> Inputs:
    """The inputs of the forward pass, rebuilt in backward without checks or collectives.

    Args:
        states: As in the forward pass, like ``shard``, ``targets``, ``scaling`` and ``backend``.
        shard: This rank's shard, or the whole table as one.
        targets: (N,) integer global items.
        scaling: How logits are computed from states and rows.
        backend: "auto", "torch" or "triton".
        sizes: ``Layout.sizes()`` of the forward pass; None without a group.
    """
    if shard.group is None or sizes is None:
        layout = _single_layout(states, shard.rows)
    else:
        ranks = Communicator(shard.group)
        positions, rows = sizes.T.tolist()
        layout = Layout(ranks, positions, rows, states.device, _state_bytes(states, scaling))
    chosen = choose_backend(states, backend)
    return _inputs(states, shard, targets, None, scaling, layout, chosen)


def _single_layout(states: Tensor, rows: Tensor) -> Layout:
    return Layout(Communicator(None), [states.shape[0]], [rows.shape[0]], states.device)


def _state_bytes(states: Tensor, scaling: Scaling) -> int:
    """Bytes of a state between ranks, where it has the dtype of the products."""
    dtype = scaling.dtype or states.dtype
    return states.shape[-1] * dtype.itemsize if states.dim() else 0


def _inputs(
    states: Tensor,
    shard: RowShard,
    targets: Tensor,
    weights: Tensor | None,
    scaling: Scaling,
    layout: Layout,
    backend: str,
) -> Inputs:
    count = shard.rows.shape[0]
    return Inputs(
        states=scaling.states(states),
        rows=shard.rows,
        targets=targets.long(),
        weights=None if weights is None else weights.float(),
        row_ids=RowIds(shard.first_row, count, is_complete=count == shard.num_rows),
        num_items=shard.num_rows,
        scaling=scaling,
        layout=layout,
        backend=backend,
    )


def shape_error(
    states: Tensor,
    rows: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    reduction: str,
    scaling: Scaling,
) -> TypeError | ValueError | None:
    """The error in shapes, dtypes or reduction, or None; reads no tensor values."""
    if reduction not in _REDUCTIONS:
        return ValueError(f"reduction must be one of {_REDUCTIONS}, got {reduction!r}; choose one")
    if states.dim() != 2 or rows.dim() != 2 or states.shape[1] != rows.shape[1]:
        return ValueError(
            "states and table must be (N, D) and (V, D), got "
            f"{tuple(states.shape)} and {tuple(rows.shape)}; pack real positions before the loss"
        )
    alike = states.dtype == rows.dtype or scaling.dtype is not None
    if not (states.is_floating_point() and rows.is_floating_point() and alike):
        return TypeError(
            f"states and table must share one float dtype, got {states.dtype} and {rows.dtype}; "
            "cast one of them or use autocast"
        )
    if targets.dtype not in (torch.int32, torch.int64):
        return TypeError(
            f"targets must be int64 or int32, got {targets.dtype}; cast them with .long()"
        )
    for name, vector in (("targets", targets), ("weights", weights)):
        if vector is not None and vector.shape != (states.shape[0],):
            return ValueError(
                f"{name} must have shape ({states.shape[0]},), got {tuple(vector.shape)}; "
                "give one per row of states"
            )
    return None


def _lone_shard_error(shard: RowShard) -> ValueError | None:
    """The error of a shard without a group that is not the whole table, or None."""
    if (shard.first_row, shard.num_rows) == (0, shard.rows.shape[0]):
        return None
    return ValueError(
        f"a shard without a group must hold rows 0:{shard.num_rows}, got {shard.rows.shape[0]} "
        f"rows from {shard.first_row} on; give the group, or the whole table"
    )


def _value_error(targets: Tensor, weights: Tensor | None, num_items: int) -> ValueError | None:
    """The error in the values of targets or weights, or None; waits for the device once."""
    if not targets.numel():
        return None
    limits = list(targets.aminmax())
    if weights is not None:
        # Integers up to 2**53 are exact, and a minimum is NaN if any weight is.
        limits = [limit.double() for limit in (*limits, *weights.aminmax())]
    low, high, *of_weights = torch.stack(limits).tolist()
    if not 0 <= low <= high < num_items:
        return ValueError(
            f"targets must be in [0, {num_items}), got {int(low)}..{int(high)}; "
            "remove padding and use indices of this catalog"
        )
    if weights is not None and not 0 <= of_weights[0] <= of_weights[1] < torch.inf:
        bad = weights[~(weights.isfinite() & (weights >= 0))]
        return ValueError(
            f"weights must be finite and not negative, got {float(bad[0])}; replace them"
        )
    return None
