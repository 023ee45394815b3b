"""The order of training data: which sample is in which global batch, at any number of ranks.

An epoch permutes the row groups and cuts the list of their samples into shuffle windows of whole
batches. A window is a matrix of batches x places, filled place by place: place p of all batches of
the window comes from one run of the list, so from one or two row groups. A rank takes a contiguous
range of places of every batch, hence a contiguous run of the list: all ranks together open at most
W - 1 row groups twice inside a window, and one more where two windows meet. With G row groups and
w in a window they open at most G * (1 + W / w). Nothing depends on the rank but its range.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["EpochOrder", "Piece", "Window"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Lengths within this share of each other trade places, so that batches differ from epoch to epoch.
LENGTH_JITTER = 0.1


@dataclass(frozen=True, slots=True)
class Piece:
    """Samples ``first .. last`` (in the epoch's shuffled order) of one row group."""

    row_group: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Window:
    """Batches ``first_step .. first_step + num_steps`` and the run of samples they are made of."""

    first_step: int
    num_steps: int
    first_sample: int
    num_samples: int
    batch_size: int

    @property
    def full_places(self) -> int:
        """Places that every batch has; the epoch's last batch has only these.

        >>> Window(0, num_steps=3, first_sample=0, num_samples=8, batch_size=3).full_places
        2
        """
        return self.num_samples - (self.num_steps - 1) * self.batch_size

    def place_start(self, place: Ints | int) -> Ints:
        """Where the run of a place starts, counted from the window's first sample."""
        place = np.asarray(place, dtype=np.int64)
        return place * self.num_steps - np.maximum(place - self.full_places, 0)

    def places(self, rank: int, world_size: int) -> tuple[int, int]:
        """The range of places that a rank takes of each batch."""
        return (
            self.batch_size * rank // world_size,
            self.batch_size * (rank + 1) // world_size,
        )


class EpochOrder:
    """The order of one epoch."""

    def __init__(
        self, samples: Ints, batch_size: int, shuffle_row_groups: int, *, seed: int, epoch: int
    ) -> None:
        """Permute the row groups and cut the windows.

        Args:
            samples: (G,) number of samples in each row group.
            batch_size: samples in a global batch.
            shuffle_row_groups: row groups in a window, at least (where there are as many).
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
        """The window that ``step`` lies in."""
        index = int(np.searchsorted(self.cuts, step, side="right")) - 1
        first, last = int(self.cuts[index]), int(self.cuts[index + 1])
        start = first * self.batch_size
        stop = min(last * self.batch_size, self.num_samples)
        return Window(first, last - first, start, stop - start, self.batch_size)

    def pieces(self, window: Window, start: int, stop: int) -> list[Piece]:
        """The parts of row groups that hold samples ``start .. stop`` of the window, whole.

        A part is all that the window holds of a row group, also where the range needs less of it.
        """
        if start >= stop:
            return []
        opening = window.first_sample
        closing = opening + window.num_samples
        first = int(np.searchsorted(self.ends, opening + start, side="right"))
        last = int(np.searchsorted(self.ends, opening + stop, side="left"))
        pieces = []
        for index in range(first, last + 1):
            begin = int(self.ends[index - 1]) if index else 0
            pieces.append(
                Piece(
                    int(self.row_groups[index]),
                    max(opening, begin) - begin,
                    min(closing, int(self.ends[index])) - begin,
                )
            )
        return pieces

    def offset(self, window: Window, pieces: list[Piece]) -> int:
        """List position of the first sample of the first piece, counted from the window's first."""
        if not pieces:
            return 0
        index = int(np.flatnonzero(self.row_groups == pieces[0].row_group)[0])
        begin = int(self.ends[index - 1]) if index else 0
        return begin + pieces[0].first - window.first_sample

    def shuffled(self, row_group: int, num_samples: int) -> tuple[Ints, Floats]:
        """The epoch's order inside a row group, and a random number in [0, 1) for each sample."""
        generator = self._generator(1, row_group)
        return generator.permutation(num_samples), generator.random(num_samples)

    def deal(
        self,
        window: Window,
        start: int,
        sizes: Ints,
        lengths: Ints,
        luck: Floats,
        places: tuple[int, int],
    ) -> tuple[Ints, Ints]:
        """Which samples are where in the batches of a window, for a range of places.

        Args:
            window: the window.
            start: list position of the first sample, counted from the window's first.
            sizes: (P,) samples of each piece, in the order of the list.
            lengths: (S,) positions in each sample, piece after piece.
            luck: (S,) random numbers of the samples.
            places: the range; its runs lie inside the pieces.

        Returns:
            (T,) indices of the samples of the range, batch by batch and by place inside a batch,
            and (num_steps,) how many of them each batch takes.
        """
        key = lengths * (1.0 + LENGTH_JITTER * (luck - 0.5))
        place = self._place(window, start, sizes, key)
        taken = np.flatnonzero((place >= places[0]) & (place < places[1]))
        taken = taken[np.lexsort((luck[taken], key[taken], place[taken]))]
        place = place[taken]
        # Shortest first down the batches; the last batch of an epoch lacks some places.
        offset = np.arange(len(taken)) + window.place_start(places[0]) - window.place_start(place)
        step_of = self._generator(2, window.first_step).permutation(window.num_steps)
        short = int(np.argmax(step_of))
        offset += (place >= window.full_places) & (offset >= short)
        step = step_of[offset]
        by_batch = np.lexsort((place, step))
        return taken[by_batch], np.bincount(step, minlength=window.num_steps)

    def _place(self, window: Window, start: int, sizes: Ints, key: Floats) -> Ints:
        """(S,) the place of each sample; each gets short and long samples of a piece evenly."""
        piece = np.repeat(np.arange(len(sizes)), sizes)
        # Every list position's place, and how far down its place's share of the piece it is.
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
