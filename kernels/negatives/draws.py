"""Random integers and signs from a counter-based generator, the same on every device and rank."""

import torch
from torch import Tensor

from shardrec.kernels.device.backend import choose_backend
from shardrec.kernels.negatives.reference import philox

__all__ = [
    "STREAM_HASH",
    "STREAM_ID_DROPOUT",
    "STREAM_MIX",
    "STREAM_NEGATIVES",
    "STREAM_SMOOTHING",
    "draw_below",
    "mixed_signs",
    "random_signs",
]

# Signs in memory at a time; 16 bytes each while they are generated.
_MIX_SIGNS = 1 << 18

# One stream per purpose, so that draws for different purposes never share a counter.
STREAM_NEGATIVES = 0
STREAM_MIX = 1 << 8
STREAM_HASH = 1 << 16
STREAM_ID_DROPOUT = 1 << 24
STREAM_SMOOTHING = 1 << 25


def draw_below(
    bound: int,
    blocks: Tensor,
    num_draws: int,
    *,
    seed: int,
    step: int,
    stream: int,
    backend: str = "auto",
) -> Tensor:
    """(len(blocks), num_draws) int64 uniform in [0, bound); entry (b, k) depends on blocks[b], k.

    A draw is ``floor(bound * u)`` with ``u`` a 64-bit fixed-point fraction, so for ``bound`` up to
    2**31 the relative error of each value's probability ``1 / bound`` is at most 2**-32.

    Args:
        bound: Number of values, in [1, 2**31).
        blocks: (T,) int64 in [0, 2**32), the block of each line of the result.
        num_draws: Number of draws per block.
        seed: Key of the generator, 64 bits.
        step: Training step.
        stream: Purpose of the draws; different streams are independent.
        backend: "auto", "torch" or "triton"; all give the same draws.

    Raises:
        ValueError: ``bound`` is out of range, or the backend does not support this device.
    """
    if not 1 <= bound < 2**31:
        raise ValueError(f"bound must be in [1, 2**31), got {bound}; split the catalog")
    if choose_backend(blocks, backend) == "triton":
        from shardrec.kernels.negatives import gpu

        return gpu.draw_below(bound, blocks, num_draws, seed=seed, step=step, stream=stream)
    calls = torch.arange((num_draws + 1) // 2, device=blocks.device)
    words = philox(seed, calls[None, :], blocks[:, None], step, stream)
    high = torch.stack([words[0], words[2]], dim=-1).flatten(1)[:, :num_draws]
    low = torch.stack([words[1], words[3]], dim=-1).flatten(1)[:, :num_draws]
    return (high * bound + ((low * bound) >> 32)) >> 32


def random_signs(
    first_line: int,
    num_lines: int,
    width: int,
    *,
    seed: int,
    step: int,
    stream: int,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Tensor:
    """(num_lines, width) float32 of +1 and -1; entry (i, d) depends on first_line + i and d.

    Args:
        first_line: Counter of the first line.
        num_lines: Number of lines.
        width: Signs per line.
        seed: Key of the generator, 64 bits.
        step: Training step.
        stream: Purpose of the draws.
        device: Device of the result.
        backend: "auto", "torch" or "triton"; all give the same signs.
    """
    if choose_backend(torch.empty(0, device=device), backend) == "triton":
        from shardrec.kernels.negatives import gpu

        return gpu.random_signs(
            first_line, num_lines, width, device, seed=seed, step=step, stream=stream
        )
    lines = torch.arange(first_line, first_line + num_lines, device=device)
    calls = torch.arange((width + 127) // 128, device=device)
    words = philox(seed, calls[None, :], lines[:, None], step, stream)
    # The words fit in 32 bits, and 32-bit integers take half the time of 64-bit ones.
    columns = torch.stack(words, dim=-1).int()[..., None]
    bits = columns >> torch.arange(32, dtype=torch.int32, device=device) & 1
    return bits.flatten(1)[:, :width].float().mul_(-2).add_(1)


def mixed_signs(
    states: Tensor,
    first_line: int,
    num_columns: int,
    *,
    seed: int,
    step: int,
    stream: int,
    backend: str = "auto",
) -> Tensor:
    """(num_columns, D) float32 ``sum_i sign(first_line + i, column) * states[i]``.

    The signs are those of ``random_signs``, in memory one tile at a time.

    Args:
        states: (N, D) float; no gradient is taken.
        first_line: Line of the signs for ``states[0]``.
        num_columns: Number of combinations.
        seed: Key of the generator.
        step: Training step.
        stream: Purpose of the draws.
        backend: "auto", "torch" or "triton"; Triton generates the signs inside the product.
    """
    if choose_backend(states, backend) == "triton":
        from shardrec.kernels.negatives import gpu

        return gpu.mixed_signs(states, first_line, num_columns, seed=seed, step=step, stream=stream)
    total = torch.zeros((num_columns, states.shape[1]), device=states.device)
    tile = max(1, _MIX_SIGNS // max(1, num_columns))
    for start in range(0, states.shape[0], tile):
        part = states[start : start + tile].float()
        line, lines = first_line + start, part.shape[0]
        signs = random_signs(
            line,
            lines,
            num_columns,
            seed=seed,
            step=step,
            stream=stream,
            device=states.device,
            backend="torch",
        )
        total.addmm_(signs.T, part)
    return total
