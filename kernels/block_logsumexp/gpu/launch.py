"""Arguments that all launchers of the block log-sum-exp share. Importing it imports triton."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from shardrec.kernels.device.backend import alignment, architecture_of, operand, precision_of
from shardrec.kernels.device.tiles import Tile, tile_for

__all__ = ["LaunchProblem", "Upstream"]


@dataclass(frozen=True, slots=True)
class LaunchProblem:
    """The inputs of all launches: states and rows as kernels read them, targets, original dtype."""

    states: Tensor
    rows: Tensor
    targets: Tensor
    dtype: torch.dtype

    @staticmethod
    def of(states: Tensor, rows: Tensor, targets: Tensor) -> "LaunchProblem":
        """The problem with (N, D) states and (R, D) rows made readable for kernels."""
        return LaunchProblem(operand(states), operand(rows), targets, states.dtype)

    @property
    def width(self) -> int:
        """D, the width of states and rows."""
        return self.states.shape[1]

    def tile(self, kernel: str) -> Tile:
        """The tile shape of a kernel on this device."""
        return tile_for(kernel, self.width, self.dtype, architecture_of(self.states.device))

    def options(self, tile: Tile) -> dict[str, int | str]:
        """Compile-time arguments that all kernels with matrix products share."""
        return {
            "POSITIONS": tile.positions,
            "ITEMS": tile.items,
            "WIDTH": tile.width,
            "ALIGN": alignment(self.width),
            "PRECISION": precision_of(self.dtype),
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }

    def num_out(self, tile: Tile) -> int:
        """Number of parts into which the output width is split over programs."""
        return triton.cdiv(self.width, tile.out)


@dataclass(frozen=True, slots=True)
class Upstream:
    """Upstream gradients of the log-sum-exps: dL/dlogit = exp(logit - shift) * grad * scale."""

    shift: Tensor  # (num_slots,) log-sum-exp; a slot with -inf has no candidate and no dL/dlogit
    grad: Tensor  # (num_slots,) gradient of the log-sum-exp, divided by ``scale``
    scale: Tensor | None  # (1,) power of two; None for 1

    @staticmethod
    def of(logsumexp: Tensor, grad_logsumexp: Tensor, dtype: torch.dtype) -> "Upstream":
        """The upstream gradients for (num_slots,) log-sum-exps and their gradients."""
        return Upstream(logsumexp, *_scaled(grad_logsumexp, dtype))


def _scaled(grad: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The gradient divided by a power of two, so that float16 neither underflows nor overflows.

    dL/dlogits are rounded to the dtype of the states before the second matrix product; in float16
    those of a uniform softmax over a million rows would round to 0.
    """
    if dtype is not torch.float16 or not grad.numel():
        return grad.float().contiguous(), None
    exponent = torch.frexp(grad.float().abs().max()).exponent.reshape(1) - 14
    one = torch.ones(1, device=grad.device)
    return torch.ldexp(grad.float(), -exponent), torch.ldexp(one, exponent)
