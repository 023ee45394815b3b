"""The order of an epoch: which batch each training sample is in, at any number of ranks.

The phases:
1. Permute the row groups; the samples of all row groups in this order form the list.
2. Cut the list into shuffle windows of whole batches (`EpochOrder.window`).
3. A window is a matrix of batches x slots, filled slot by slot: slot s of all its batches is a
   contiguous range of the list, in one or two row groups. A rank takes a contiguous range of slots
   of every batch, and so a contiguous range of the list (`Window.slots`, `EpochOrder.pieces`).
4. Samples are shuffled inside their row group, and each slot's samples over the batches
   (`EpochOrder.assign`): a batch is a random draw from the window, one sample from each slot.
   Batches do not depend on sequence lengths. Batches of similar lengths would need less padding,
   but a step with few positions would then count as much as one with many; the encoder avoids
   padding inside a batch instead.

The number of positions of a rank in a batch is therefore a sum of random lengths: balanced over an
epoch, and the more balanced in a single step the more sequences a rank has. (The table is sharded
by items, so the cost of the loss on a rank does not depend on this number.)

All ranks together open at most W - 1 row groups twice inside a window, and one more where two
windows meet: with G row groups and w per window, at most G * (1 + W / w) reads. Only the range of
slots depends on the rank.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["ORDER_VERSION", "EpochOrder", "Piece", "Window"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Raise it when equal seeds give another order than before. Up to 0.2.0 it was 1.
ORDER_VERSION = 2


@dataclass(frozen=True, slots=True)
class Piece:
    """Samples [first, last) of one row group, in the epoch's shuffled order."""

    row_group: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Window:
    """Batches [first_step, first_step + num_steps) of an epoch and the range of their samples."""

    first_step: int
    num_steps: int
    first_sample: int
    num_samples: int
    batch_size: int

    @property
    def full_slots(self) -> int:
        """Number of slots filled in every batch of the window; the epoch's last batch has no more.

        >>> Window(0, num_steps=3, first_sample=0, num_samples=8, batch_size=3).full_slots
        2
        """
        return self.num_samples - (self.num_steps - 1) * self.batch_size

    def slot_start(self, slot: Ints | int) -> Ints:
        """Index of the first sample of a slot, counted from the window's first sample."""
        slot = np.asarray(slot, dtype=np.int64)
        return slot * self.num_steps - np.maximum(slot - self.full_slots, 0)

    def slots(self, rank: int, world_size: int) -> tuple[int, int]:
        """First slot of a rank in every batch, and the slot after its last."""
        return (
            self.batch_size * rank // world_size,
            self.batch_size * (rank + 1) // world_size,
        )


class EpochOrder:
    """The order of one epoch; equal seeds and epochs give equal orders on every rank."""

    def __init__(
        self, samples: Ints, batch_size: int, shuffle_row_groups: int, *, seed: int, epoch: int
    ) -> None:
        """Permute the row groups and cut the windows.

        Args:
            samples: (G,) number of samples in each row group.
            batch_size: samples in a global batch.
            shuffle_row_groups: least number of row groups in a window (or all, if there are fewer).
            seed: seed of the run.
            epoch: counted from 0.
        """
        self.seed, self.epoch = seed, epoch
        self.batch_size = batch_size
        self.row_groups: Ints = self._generator(0).permutation(len(samples))
        self.ends: Ints = np.cumsum(samples[self.row_groups])
        self.num_samples = int(self.ends[-1]) if len(samples) else 0
        self.num_steps = -(-self.num_samples // batch_size)
        num_windows = min(max(1, len(samples) // shuffle_row_groups), max(1, self.num_steps))
        self.cuts: Ints = np.arange(num_windows + 1) * self.num_steps // num_windows

    def window(self, step: int) -> Window:
        """The window that contains ``step``."""
        index = int(np.searchsorted(self.cuts, step, side="right")) - 1
        first, last = int(self.cuts[index]), int(self.cuts[index + 1])
        start = first * self.batch_size
        stop = min(last * self.batch_size, self.num_samples)
        return Window(first, last - first, start, stop - start, self.batch_size)

    def pieces(self, window: Window, start: int, stop: int) -> list[Piece]:
        """The parts of row groups that hold samples [start, stop) of the window."""
        if start >= stop:
            return []
        opening, closing = window.first_sample + start, window.first_sample + stop
        first = int(np.searchsorted(self.ends, opening, side="right"))
        last = int(np.searchsorted(self.ends, closing, side="left"))
        begins = np.append(0, self.ends)[first : last + 1]
        firsts = np.maximum(opening, begins) - begins
        lasts = np.minimum(closing, self.ends[first : last + 1]) - begins
        parts = zip(self.row_groups[first : last + 1], firsts, lasts, strict=True)
        return [Piece(*map(int, part)) for part in parts]

    def shuffled(self, row_group: int, num_samples: int) -> tuple[Ints, Floats]:
        """(n,) order of the samples in a row group, and (n,) a random key in [0, 1) for each."""
        generator = self._generator(1, row_group)
        return generator.permutation(num_samples), generator.random(num_samples)

    def assign(
        self, window: Window, slots: tuple[int, int], random_keys: Floats
    ) -> tuple[Ints, Ints]:
        """Assign the samples of a range of slots to the batches of a window.

        Args:
            window: the window.
            slots: the range, as from ``Window.slots``.
            random_keys: (T,) random keys of the samples in these slots, in the order of the list.

        Returns:
            (T,) indices of the samples, batch by batch and by slot inside a batch, and
            (num_steps,) number of samples in each batch.
        """
        last = min(slots[1], max(slots[0], window.num_samples))  # later slots hold no sample
        starts = window.slot_start(np.arange(slots[0], last + 1))
        index = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        # The samples of a slot by their keys; the first goes to the window's first batch, and so
        # on. Slots that the last batch of an epoch lacks hold one sample less.
        by_slot = np.lexsort((random_keys, index))
        step = np.arange(len(index)) + starts[0] - starts[index]
        by_batch = np.argsort(step, kind="stable")
        return by_slot[by_batch], np.bincount(step, minlength=window.num_steps)

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.Generator(
            np.random.PCG64(np.random.SeedSequence([self.seed, self.epoch, *key]))
        )
