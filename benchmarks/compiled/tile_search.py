"""Time candidate tiles of one Triton kernel on this GPU, after checking their results.

The search starts at the shipped tile and moves to a neighbour (one number halved or doubled) as
long as that is faster. It only runs on request.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from shardrec.kernels.cce import cut_cross_entropy
from shardrec.kernels.cce_minus import sampled_cross_entropy
from shardrec.kernels.device.backend import architecture_of
from shardrec.kernels.device.tiles import KERNELS, Tile, entry_width, tile_for, trial
from shardrec.kernels.negatives import mixed_signs
from shardrec.kernels.rece import reduced_cross_entropy
from shardrec.kernels.select import best_sign_direction, topk_rows

__all__ = ["Found", "Size", "neighbours", "search"]

# A candidate must be this much faster, or noise would decide.
LEAST_GAIN = 0.02
# Kernels that make signs inside the product take at most 128 columns at a time.
SIGN_KERNELS = ("best_sign_direction", "mixed_signs")
REFUSALS = (OutOfResources, triton.CompilationError)

Operation = Callable[[], list[Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """The problem size that candidates are timed on.

    Attributes:
        positions: N.
        items: V.
        width: D.
        dtype: Of states and table.
        negatives: K of the sampled loss.
        queries: Of top-k, and columns of mixed signs.
        repeats: Timed calls of a candidate; the median counts.
    """

    positions: int
    items: int
    width: int
    dtype: torch.dtype
    negatives: int = 1024
    queries: int = 724
    repeats: int = 9


@dataclass(frozen=True, slots=True)
class Found:
    """The result of the search for one kernel.

    Attributes:
        kernel: Its name in the table of tiles.
        architecture: Of the device.
        limit: Largest width that the entry serves.
        tile: The fastest tile.
        seconds: Of its operation, and of that with the shipped tile.
        tried: Candidates timed.
        refused: Candidates that did not compile or fit.
    """

    kernel: str
    architecture: int
    limit: int
    tile: Tile
    seconds: tuple[float, float]
    tried: int
    refused: int

    def entry(self, origin: str) -> str:
        """The line for the table's exceptions; ``origin`` names card and commit."""
        numbers = ", ".join(str(getattr(self.tile, name)) for name in _NUMBERS)
        key = f'({self.architecture}, "{self.kernel}", {self.limit})'
        gain = 1 - self.seconds[0] / self.seconds[1]
        return f'{key}: Tile({numbers}, "{origin}"),  # {gain:.0%} less time'


_NUMBERS = ("positions", "items", "width", "out", "num_warps", "num_stages")


def search(kernel: str, size: Size, device: torch.device | str, most: int = 60) -> Found:
    """Search the fastest tile of one kernel.

    Args:
        kernel: One of ``KERNELS``.
        size: The work.
        device: A GPU, or the CPU where Triton interprets.
        most: Candidates at most.

    Raises:
        ValueError: no such kernel.
        AssertionError: a candidate gives other results than the shipped tile.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {KERNELS}, got {kernel!r}; choose one")
    device = torch.device(device)
    operation = _operations(size, device)[kernel]
    shipped = tile_for(kernel, size.width, size.dtype, architecture_of(device))
    expected = operation()
    best, best_seconds = shipped, _seconds(operation, device, size.repeats)
    shipped_seconds, seen, refused = best_seconds, {_numbers(shipped)}, 0
    queue = neighbours(kernel, best, size.width)
    while len(seen) <= most and (tile := next(queue, None)) is not None:
        if _numbers(tile) in seen:
            continue
        seen.add(_numbers(tile))
        with trial(kernel, tile):
            try:
                _require_same(kernel, tile, operation(), expected)
            except REFUSALS:
                refused += 1
                continue
            seconds = _seconds(operation, device, size.repeats)
        if seconds < (1 - LEAST_GAIN) * best_seconds:
            best, best_seconds = tile, seconds
            queue = neighbours(kernel, best, size.width)
    return Found(
        kernel,
        architecture_of(device),
        entry_width(kernel, size.width, size.dtype),
        best,
        (best_seconds, shipped_seconds),
        len(seen) - 1 - refused,
        refused,
    )


def neighbours(kernel: str, tile: Tile, width: int) -> Iterator[Tile]:
    """The tiles with one number halved or doubled, or one load in flight more or less.

    >>> tile = Tile(32, 16, 16, 16, 4, 1)
    >>> [(t.positions, t.items) for t in neighbours("full_forward", tile, 16)][:3]
    [(16, 16), (64, 16), (32, 32)]
    """
    padded = max(16, 1 << (width - 1).bit_length())
    widest = min(padded, 128 if kernel in SIGN_KERNELS else 256)
    limits = {
        "positions": (16, 256),
        "items": (16, 256),
        "width": (16, widest),
        "out": (16, widest),
        "num_warps": (2, 16),
    }
    for name, (least, most) in limits.items():
        value = getattr(tile, name)
        for other in (value // 2, value * 2):
            if least <= other <= most:
                yield replace(tile, **{name: other})
    for stages in (tile.num_stages - 1, tile.num_stages + 1):
        if 1 <= stages <= 5:
            yield replace(tile, num_stages=stages)


def _numbers(tile: Tile) -> tuple[int, ...]:
    return tuple(getattr(tile, name) for name in _NUMBERS)


def _operations(size: Size, device: torch.device) -> dict[str, Operation]:
    """For each kernel, a call that spends most of its time in it."""
    generator = torch.Generator().manual_seed(0)
    scale = size.width**-0.25
    states = torch.randn(size.positions, size.width, generator=generator) * scale
    table = torch.randn(size.items, size.width, generator=generator) * scale
    targets = torch.randint(0, size.items, (size.positions,), generator=generator).to(device)
    states, table = (part.to(device, size.dtype).requires_grad_() for part in (states, table))
    queries = states.detach()[: size.queries]
    # Multiples of 1/8 have exact sums in any order, so that near ties choose alike.
    exact = (table.detach() * 8).round() / 8

    def forward(loss: Callable[..., Tensor], **options: int) -> Operation:
        def run() -> list[Tensor]:
            with torch.no_grad():
                return [loss(states, table, targets, backend="triton", **options)]

        return run

    def backward(loss: Callable[..., Tensor], **options: int) -> Operation:
        def run() -> list[Tensor]:
            value = loss(states, table, targets, backend="triton", **options)
            return [value.detach(), *torch.autograd.grad(value, (states, table))]

        return run

    sampled = {"num_negatives": size.negatives, "seed": 1}
    single = sampled | {"share": 1}
    hashed = {"num_rounds": 2, "seed": 1}
    best = partial(best_sign_direction, seed=1, step=0, stream=0, backend="triton")
    mixed = partial(mixed_signs, seed=1, step=0, stream=0, backend="triton")
    return {
        "full_forward": forward(cut_cross_entropy),
        "full_states_backward": backward(cut_cross_entropy),
        "full_rows_backward": backward(cut_cross_entropy),
        "listed_forward": forward(sampled_cross_entropy, **sampled),
        "listed_states_backward": backward(sampled_cross_entropy, **sampled),
        "listed_rows_backward": backward(sampled_cross_entropy, **sampled),
        "gathered_forward": forward(sampled_cross_entropy, **single),
        "gathered_states_backward": backward(sampled_cross_entropy, **single),
        "gathered_rows_backward": backward(sampled_cross_entropy, **single),
        "listed_forward_rounds": forward(reduced_cross_entropy, **hashed),
        "listed_states_backward_rounds": backward(reduced_cross_entropy, **hashed),
        "listed_rows_backward_rounds": backward(reduced_cross_entropy, **hashed),
        "group_maxima": lambda: [topk_rows(queries, table.detach(), 64, "triton")[0]],
        "best_sign_direction": lambda: [best(exact, size.queries).float()],
        "mixed_signs": lambda: [mixed(states.detach(), 0, size.queries)],
    }


def _require_same(kernel: str, tile: Tile, found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        scale = float(theirs.float().abs().max()) if theirs.numel() else 0.0
        error = float((mine.float() - theirs.float()).abs().max()) if theirs.numel() else 0.0
        limit = (1e-4 if theirs.dtype is torch.float32 else 2e-2) * scale
        assert error <= limit, f"{kernel} with {tile} is off by {error:.2g} of {scale:.2g}"


def _seconds(operation: Operation, device: torch.device, repeats: int) -> float:
    """Median seconds of a call."""
    times = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        operation()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
