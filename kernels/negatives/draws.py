"""Random integers and signs that are functions of counters, the same on every device and rank."""

import torch
from torch import Tensor

from shardrec.kernels.negatives.reference import philox

__all__ = ["STREAM_HASH", "STREAM_MIX", "STREAM_NEGATIVES", "draw_below", "random_signs"]

# One stream per purpose, so that draws for different purposes never share a counter.
STREAM_NEGATIVES = 0
STREAM_MIX = 1 << 8
STREAM_HASH = 1 << 16


def draw_below(
    bound: int, blocks: Tensor, num_draws: int, *, seed: int, step: int, stream: int
) -> Tensor:
    """(len(blocks), num_draws) int64, uniform in [0, bound); entry (b, k) is of blocks[b] and k.

    A draw is ``floor(bound * u)`` with ``u`` a 64-bit fixed-point fraction, so for ``bound`` up to
    2**31 each value's probability is within 2**-32 of ``1 / bound`` relative.

    Args:
        bound: Number of values, in [1, 2**31).
        blocks: (T,) int64 in [0, 2**32), the block of each line of the result.
        num_draws: Number of draws in a block.
        seed: Key of the generator, 64 bits.
        step: Training step.
        stream: Purpose of the draws; two streams are independent.
    """
    if not 1 <= bound < 2**31:
        raise ValueError(f"bound must be in [1, 2**31), got {bound}; split the catalog")
    calls = torch.arange((num_draws + 1) // 2, device=blocks.device)
    words = philox(seed, calls[None, :], blocks[:, None], step, stream)
    high = torch.stack([words[0], words[2]], dim=-1).flatten(1)[:, :num_draws]
    low = torch.stack([words[1], words[3]], dim=-1).flatten(1)[:, :num_draws]
    return (high * bound + ((low * bound) >> 32)) >> 32


def random_signs(
    first_line: int, num_lines: int, width: int, *, seed: int, step: int, stream: int
) -> Tensor:
    """(num_lines, width) float32 of +1 and -1; entry (i, d) depends on first_line + i and d."""
    lines = torch.arange(first_line, first_line + num_lines)
    calls = torch.arange((width + 127) // 128)
    words = philox(seed, calls[None, :], lines[:, None], step, stream)
    bits = torch.stack(words, dim=-1)[..., None] >> torch.arange(32) & 1
    return bits.flatten(1)[:, :width].float().mul_(-2).add_(1)
