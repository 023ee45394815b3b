"""What the launchers of the block log-sum-exp share. Importing this file imports triton."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from shardrec.kernels.block_logsumexp.blocks import Blocks
from shardrec.kernels.device.backend import alignment, architecture_of, operand, precision_of
from shardrec.kernels.device.tiles import Tile, tile_for

__all__ = ["LaunchProblem", "Upstream"]


@dataclass(frozen=True, slots=True)
class LaunchProblem:
    """States and rows as kernels read them, the blocks of one launch, and the dtype as it came."""

    states: Tensor
    rows: Tensor
    blocks: Blocks
    dtype: torch.dtype

    @staticmethod
    def of(states: Tensor, rows: Tensor, blocks: Blocks) -> "LaunchProblem":
        """What the launchers of a problem start from."""
        return LaunchProblem(operand(states), operand(rows), blocks, states.dtype)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return 0 in (self.states.numel(), self.rows.numel(), self.blocks.num_blocks)

    @property
    def width(self) -> int:
        """D."""
        return self.states.shape[1]

    def tile(self, kernel: str) -> Tile:
        """The tile of a kernel on this device."""
        architecture = architecture_of(self.states.device)
        kernel = kernel if self.blocks.rounds is None else f"{kernel}_rounds"
        return tile_for(kernel, self.width, self.dtype, architecture)

    def options(self, tile: Tile) -> dict[str, int | str]:
        """Compile-time arguments that all kernels of products share."""
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
        """Parts of the width, each with programs of its own."""
        return triton.cdiv(self.width, tile.out)


@dataclass(frozen=True, slots=True)
class Upstream:
    """What the gradients of logits are made of."""

    shift: Tensor  # (num_slots,) log-sum-exp, 0 where there is none
    grad: Tensor  # (num_slots,) gradient over ``scale``
    scale: Tensor  # (1,) power of two

    @staticmethod
    def of(logsumexp: Tensor, grad_logsumexp: Tensor, dtype: torch.dtype) -> "Upstream":
        """Those of (num_slots,) log-sum-exps and their gradients."""
        shift = logsumexp.masked_fill(logsumexp == -torch.inf, 0.0)
        return Upstream(shift, *_scaled(grad_logsumexp, dtype))


def _scaled(grad: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The gradient over a power of two, so that shares of float16 neither underflow nor overflow.

    Shares are rounded to the dtype of the states before the second product; in float16 a uniform
    softmax over a million rows would vanish there.
    """
    if dtype is not torch.float16 or not grad.numel():
        return grad.float().contiguous(), torch.ones(1, device=grad.device)
    exponent = torch.frexp(grad.float().abs().max()).exponent.reshape(1) - 14
    one = torch.ones(1, device=grad.device)
    return torch.ldexp(grad.float(), -exponent), torch.ldexp(one, exponent)
