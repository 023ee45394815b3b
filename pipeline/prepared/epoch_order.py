"""The order of an epoch: which batch each training sample is in, at any number of ranks.

The phases:
1. Permute the row groups; the samples of all row groups in this order are the list.
2. Cut the list into shuffle windows of whole batches (`EpochOrder.window`).
3. A window is a matrix of batches x places, filled place by place: place p of all its batches is a
   contiguous range of the list, in one or two row groups. A rank takes a contiguous range of places
   of every batch, so a contiguous range of the list (`Window.places`, `EpochOrder.pieces`).
4. Inside a row group, assign places so that each place gets short and long samples evenly, and
   batches so that the samples of one batch have similar lengths (`EpochOrder.assign`).

All ranks together open at most W - 1 row groups twice inside a window, and one more at the border
of two windows: with G row groups and w in a window, at most G * (1 + W / w). Only the range of
places depends on the rank.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["EpochOrder", "Piece", "Window"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Lengths within this ratio are ordered at random, so that batches differ from epoch to epoch.
LENGTH_JITTER = 0.1


@dataclass(frozen=True, slots=True)
class Piece:
    """Samples ``first .. last`` (in the epoch's shuffled order) of one row group."""

    row_group: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Window:
    """Batches ``first_step .. first_step + num_steps`` and the range of samples in them."""

    first_step: int
    num_steps: int
    first_sample: int
    num_samples: int
    batch_size: int

    @property
    def full_places(self) -> int:
        """Number of places that every batch of the window fills; the epoch's last has only these.

        >>> Window(0, num_steps=3, first_sample=0, num_samples=8, batch_size=3).full_places
        2
        """
        return self.num_samples - (self.num_steps - 1) * self.batch_size

    def place_start(self, place: Ints | int) -> Ints:
        """Start of the range of a place, counted from the window's first sample."""
        place = np.asarray(place, dtype=np.int64)
        return place * self.num_steps - np.maximum(place - self.full_places, 0)

    def places(self, rank: int, world_size: int) -> tuple[int, int]:
        """The range of places of each batch that belongs to a rank."""
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
            seed: of the run.
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

    def pieces(self, window: Window, start: int, stop: int) -> tuple[list[Piece], int]:
        """The parts of row groups that hold samples ``start .. stop`` of the window.

        Each part is everything the window has of a row group, even if the range needs less. Also
        returns the position in the window of the first sample of the first part.
        """
        if start >= stop:
            return [], 0
        opening = window.first_sample
        closing = opening + window.num_samples
        first = int(np.searchsorted(self.ends, opening + start, side="right"))
        last = int(np.searchsorted(self.ends, opening + stop, side="left"))
        begins = np.append(0, self.ends)[first : last + 1]
        firsts = np.maximum(opening, begins) - begins
        lasts = np.minimum(closing, self.ends[first : last + 1]) - begins
        parts = zip(self.row_groups[first : last + 1], firsts, lasts, strict=True)
        pieces = [Piece(*map(int, part)) for part in parts]
        return pieces, int(begins[0]) + pieces[0].first - opening

    def shuffled(self, row_group: int, num_samples: int) -> tuple[Ints, Floats]:
        """The epoch's order inside a row group, and a random key in [0, 1) for each sample."""
        generator = self._generator(1, row_group)
        return generator.permutation(num_samples), generator.random(num_samples)

    def assign(
        self,
        window: Window,
        start: int,
        sizes: Ints,
        lengths: Ints,
        random_keys: Floats,
        places: tuple[int, int],
    ) -> tuple[Ints, Ints]:
        """Assign the samples of a range of places to the batches of a window.

        Args:
            window: the window.
            start: position in the window of the first sample.
            sizes: (P,) number of samples in each piece, in the order of the list.
            lengths: (S,) positions in each sample, piece after piece.
            random_keys: (S,) random keys of the samples.
            places: the range; its samples are all in the pieces.

        Returns:
            (T,) indices of the range's samples, batch by batch and by place inside a batch, and
            (num_steps,) how many of them are in each batch.
        """
        key = lengths * (1.0 + LENGTH_JITTER * (random_keys - 0.5))
        place = self._place(window, start, sizes, key)
        taken = np.flatnonzero((place >= places[0]) & (place < places[1]))
        taken = taken[np.lexsort((random_keys[taken], key[taken], place[taken]))]
        place = place[taken]
        # Inside a place the shortest sample goes to the first batch of the permutation, and so on;
        # the last batch of an epoch has fewer places.
        offset = np.arange(len(taken)) + window.place_start(places[0]) - window.place_start(place)
        step_of = self._generator(2, window.first_step).permutation(window.num_steps)
        short = int(np.argmax(step_of))
        offset += (place >= window.full_places) & (offset >= short)
        step = step_of[offset]
        by_batch = np.lexsort((place, step))
        return taken[by_batch], np.bincount(step, minlength=window.num_steps)

    def _place(self, window: Window, start: int, sizes: Ints, key: Floats) -> Ints:
        """(S,) the place of each sample: every place gets short and long ones of a piece evenly."""
        piece = np.repeat(np.arange(len(sizes)), sizes)
        # The place of each position, and its relative depth in the place's part of the piece.
        position = np.arange(start, start + len(key))
        starts = window.place_start(np.arange(window.batch_size + 1))
        place = np.searchsorted(starts, position, side="right") - 1
        share = piece * (window.batch_size + 1) + place
        _, first, count = np.unique(share, return_index=True, return_counts=True)
        depth = (np.arange(len(key)) - np.repeat(first, count) + 0.5) / np.repeat(count, count)
        result = np.empty(len(key), dtype=np.int64)
        result[np.lexsort((key, piece))] = place[np.lexsort((place, depth, piece))]
        return result

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.Generator(
            np.random.PCG64(np.random.SeedSequence([self.seed, self.epoch, *key]))
        )
