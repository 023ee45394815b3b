"""Copies from a GPU into ordinary host memory, through two pinned buffers of a set size."""

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["PINNED_BYTES", "PinnedBuffers"]

# Of both buffers together. PyTorch rounds pinned memory up to powers of two and allocates it at a
# few GB/s, so a whole shard of it would take up to twice its size, and seconds of the first save.
PINNED_BYTES = 128 << 20


class PinnedBuffers:
    """Copies tensors in pieces: one is on its way from the GPU while the one before moves on."""

    def __init__(self, num_bytes: int = PINNED_BYTES, *, pinned: bool = True) -> None:
        """Allocates both buffers.

        Args:
            num_bytes: of both together.
            pinned: whether a GPU copies into them directly; False on a machine without one.
        """
        half = num_bytes // 2
        self._buffers = [torch.empty(half, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copies ``source`` into ``target``, contiguous in host memory, and waits for it."""
        waiting: tuple[torch.cuda.Event | None, Tensor, Tensor] | None = None
        for index, (part, place) in enumerate(self._pieces(source.detach(), target)):
            size = part.numel() * part.element_size()
            stage = self._buffers[index % 2][:size].view(part.dtype)
            stage.copy_(part, non_blocking=True)
            event = torch.cuda.Event() if part.is_cuda else None
            if event is not None:
                event.record()
            if waiting is not None:
                _arrive(*waiting)
            waiting = event, stage, place
        if waiting is not None:
            _arrive(*waiting)

    def _pieces(self, source: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Matching parts of both tensors, as long as a buffer."""
        size = len(self._buffers[0]) // source.element_size()
        parts = source.contiguous().view(-1).split(size)
        return zip(parts, target.view(-1).split(size), strict=True)


def _arrive(event: torch.cuda.Event | None, stage: Tensor, place: Tensor) -> None:
    """Waits until the stage is filled and copies it to its place."""
    if event is not None:
        event.synchronize()
    place.copy_(stage)
