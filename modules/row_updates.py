"""Optimizers of the item table: each updates a row at most once per step.

A gradient is either dense (R, D) or coalesced sparse COO over rows. The phases of an update: split
the gradient into ranges of rows, then update one range after the other, so that the extra memory
is one range and not a copy of the shard. Only ``adam``, which changes every row, updates the shard
as a whole and makes a sparse gradient dense.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from shardrec.modules.catalog_config import CatalogConfig, rows_at_once
from shardrec.modules.torchrec_adapter import ShardedTable

__all__ = [
    "AdamUpdate",
    "FusedUpdate",
    "RowUpdate",
    "SparseAdamUpdate",
    "build_update",
    "chunks",
    "empty_gradient",
    "merged_pairs",
    "sparse_gradient",
]


class RowUpdate(Protocol):
    """An optimizer for the rows of one shard."""

    def apply(self, gradient: Tensor, learning_rate: float, step: int) -> None:
        """Updates rows in place by a dense (R, D) or coalesced COO gradient; step counts from 1."""

    def states(self) -> dict[str, Tensor]:
        """Optimizer states by name, (R,) or (R, D), aliasing the live ones."""


class FusedUpdate:
    """SGD, Adagrad or row-wise Adagrad through fbgemm's fused backward."""

    def __init__(self, table: ShardedTable) -> None:
        """Stores the table, which was built with the optimizer."""
        self.table = table
        self.range = _range_of(table.rows)

    def apply(self, gradient: Tensor, learning_rate: float, step: int) -> None:
        """Updates the rows with an entry in the gradient."""
        self.table.set_learning_rate(learning_rate)
        for rows, values in chunks(gradient, self.range):
            self.table.update_rows(rows, values)

    def states(self) -> dict[str, Tensor]:
        """``sum``: sums of squared gradients (R, D), or of their row means (R,); empty for sgd."""
        return self.table.optimizer_states()


class AdamUpdate:
    """torch.optim.Adam on the whole shard; rows without an entry have the gradient 0."""

    def __init__(self, rows: Tensor, betas: tuple[float, float], eps: float) -> None:
        """Allocates both moments; ``rows`` (R, D) are updated in place."""
        self.rows = rows.detach().requires_grad_()
        self.optimizer = torch.optim.Adam([self.rows], betas=betas, eps=eps, fused=True)
        # Allocated now and not in the first step, so that ``plan`` predicts peak memory.
        self.state = {
            "step": torch.zeros((), device=rows.device),
            "exp_avg": torch.zeros_like(rows, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(rows, requires_grad=False),
        }
        self.optimizer.state[self.rows] = self.state

    def apply(self, gradient: Tensor, learning_rate: float, step: int) -> None:
        """Updates every row, with or without an entry in the gradient."""
        if not self.rows.numel():
            return
        self.state["step"].fill_(step - 1)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.rows.grad = gradient.to_dense() if gradient.is_sparse else gradient
        self.optimizer.step()
        self.rows.grad = None

    def states(self) -> dict[str, Tensor]:
        """The two moments, ``exp_avg`` and ``exp_avg_sq``, (R, D) each."""
        return {name: self.state[name] for name in ("exp_avg", "exp_avg_sq")}


class SparseAdamUpdate:
    """torch.optim.SparseAdam, one per range of rows; moments of other rows stay unchanged."""

    def __init__(self, rows: Tensor, betas: tuple[float, float], eps: float) -> None:
        """Allocates both moments; ``rows`` (R, D) are updated in place."""
        self.exp_avg = torch.zeros_like(rows, requires_grad=False)
        self.exp_avg_sq = torch.zeros_like(rows, requires_grad=False)
        size = _range_of(rows) // 4  # SparseAdam allocates about a dozen copies of a range
        self.starts = range(0, rows.shape[0], size)
        self.parameters = [
            rows.detach()[start : start + size].requires_grad_() for start in self.starts
        ]
        self.optimizers = []
        for start, parameter in zip(self.starts, self.parameters, strict=True):
            optimizer = torch.optim.SparseAdam([parameter], betas=betas, eps=eps)
            optimizer.state[parameter] = {
                "step": 0,
                "exp_avg": self.exp_avg[start : start + size],
                "exp_avg_sq": self.exp_avg_sq[start : start + size],
            }
            self.optimizers.append(optimizer)

    def apply(self, gradient: Tensor, learning_rate: float, step: int) -> None:
        """Updates the rows with an entry in the gradient; for a dense one, all rows."""
        for start, parameter, optimizer in zip(
            self.starts, self.parameters, self.optimizers, strict=True
        ):
            optimizer.param_groups[0]["lr"] = learning_rate
            optimizer.state[parameter]["step"] = step - 1
            parameter.grad = _rows_between(gradient, start, start + parameter.shape[0])
            optimizer.step()
            parameter.grad = None

    def states(self) -> dict[str, Tensor]:
        """The two moments, ``exp_avg`` and ``exp_avg_sq``, (R, D) each."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}


def build_update(optimizer: str, config: CatalogConfig, table: ShardedTable) -> RowUpdate:
    """The optimizer of this name for a table, with the other options of ``config``."""
    if optimizer == "adam":
        return AdamUpdate(table.rows, config.betas, config.eps)
    if optimizer == "sparse_adam":
        return SparseAdamUpdate(table.rows, config.betas, config.eps)
    return FusedUpdate(table)


def _range_of(rows: Tensor) -> int:
    return rows_at_once(rows.shape[0], rows.shape[1], rows.device.type)


def chunks(gradient: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The gradient in parts of at most ``size`` rows: (M,) int64 rows and (M, D) values.

    Args:
        gradient: dense (R, D) or coalesced COO.
        size: number of rows.
    """
    if gradient.is_sparse:
        rows, values = gradient.indices()[0], gradient.values()
        yield from zip(rows.split(size), values.split(size), strict=True)
        return
    for start in range(0, gradient.shape[0], size):
        values = gradient[start : start + size]
        yield torch.arange(start, start + values.shape[0], device=gradient.device), values


def _rows_between(gradient: Tensor, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a gradient as coalesced COO (stop - start, D), values not copied."""
    if gradient.is_sparse:
        rows = gradient.indices()[0]
        bounds = torch.tensor([start, stop], device=rows.device)
        first, last = torch.searchsorted(rows, bounds).tolist()
        local, values = rows[first:last] - start, gradient.values()[first:last]
    else:
        local, values = torch.arange(stop - start, device=gradient.device), gradient[start:stop]
    return sparse_gradient(local, values, stop - start)


def empty_gradient(rows: Tensor) -> Tensor:
    """A sparse gradient without entries."""
    none = torch.empty(0, dtype=torch.int64, device=rows.device)
    return sparse_gradient(none, rows.new_empty((0, rows.shape[1])), rows.shape[0])


def merged_pairs(pairs: Sequence[tuple[Tensor, Tensor]], table: Tensor) -> Tensor:
    """The sum of (rows (M,), gradients (M, D)) pairs as one coalesced COO (R, D), in their order.

    Args:
        pairs: at least one; rows are int64 and may occur again.
        table: (R, D), of which they are gradients.
    """
    rows, positions = torch.cat([rows for rows, _ in pairs]).unique(return_inverse=True)
    values = table.new_zeros((rows.numel(), table.shape[1]), requires_grad=False)
    start = 0
    for part, gradients in pairs:
        values.index_add_(0, positions[start : start + part.numel()], gradients)
        start += part.numel()
    return sparse_gradient(rows, values, table.shape[0])


def sparse_gradient(rows: Tensor, values: Tensor, num_rows: int) -> Tensor:
    """Coalesced COO tensor from distinct sorted rows and their values, without a copy."""
    return torch.sparse_coo_tensor(
        rows[None],
        values,
        (num_rows, values.shape[1]),
        is_coalesced=True,
        check_invariants=False,
    )
