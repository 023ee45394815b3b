"""Prepared data as batches of tensors, deterministic by (seed, epoch) and the same for any W.

What is where in an epoch is decided in `shardrec.pipeline.order`; reading is in `shardrec.pipeline.row_groups`. There is no Python loop over
sequences: list columns become one flat tensor and offsets, and a batch is index arithmetic on them.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from shardrec.pipeline.manifest import Manifest, read_manifest
from shardrec.pipeline.order import EpochOrder, Piece, Window
from shardrec.pipeline.row_groups import RowGroups, flat_list

__all__ = [
    "Batch",
    "BatchConfig",
    "EvaluationBatch",
    "EvaluationBatches",
    "Prepared",
    "TrainingBatches",
]

Ints = npt.NDArray[np.int64]
Ragged = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prepared folder whose manifest was read and found complete."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> "Prepared":
        """Read and check the manifest.

        Raises:
            FileNotFoundError, ValueError: the folder is not a complete prepared folder.
        """
        return cls(Path(path), read_manifest(Path(path)))

    @property
    def num_items(self) -> int:
        """V."""
        return self.manifest.counts["items"]

    @property
    def num_train_sequences(self) -> int:
        """Rows of the training files."""
        return self.manifest.counts["train_sequences"]

    @property
    def has_weights(self) -> bool:
        """Whether events carry a weight."""
        return self.manifest.columns["weight"] is not None

    @property
    def train_files(self) -> list[Path]:
        """The training files in order."""
        names = sorted(file.path for file in self.manifest.files)
        return [self.path / name for name in names if name.startswith("train/")]

    @property
    def fingerprint(self) -> str:
        """Short hash of the files' checksums: equal for equal data."""
        files = sorted((file.path, file.sha256) for file in self.manifest.files)
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]

    def item_counts(self) -> Tensor:
        """(V,) int64 training events of each item."""
        return torch.from_numpy(self._items("count").to_numpy().astype(np.int64))

    def item_ids(self) -> pa.Array:
        """(V,) the log's own ids (int64 or string) by item."""
        return self._items("item_id")

    def _items(self, name: str) -> pa.Array:
        path = self.path / "items.parquet"
        groups = RowGroups([path], ["item_id", "item", "count"])
        columns = [groups.read(index, [name]).column(name) for index in range(len(groups))]
        empty = pq.read_schema(path).field(name).type
        return pa.concat_arrays(
            [c for column in columns for c in column.chunks] or [pa.array([], empty)]
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """This rank's part of a global batch; B may be 0, L is at least 1.

    Attributes:
        items: (B, L) int64, oldest first, padded with 0 on the right.
        lengths: (B,) int64 real positions.
        targets: (B, L) int64 next items, padded with 0.
        weights: (B, L) float32 of the targets, padded with 0; None where the data has none.
    """

    items: Tensor
    lengths: Tensor
    targets: Tensor
    weights: Tensor | None = None

    @property
    def num_positions(self) -> int:
        """N, real positions."""
        return int(self.lengths.sum())

    def real_positions(self) -> Tensor:
        """(N,) int64 indices of the real positions in the flattened (B * L)."""
        length = self.items.shape[1]
        real = torch.arange(length, device=self.lengths.device) < self.lengths[:, None]
        return real.flatten().nonzero().flatten()

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on another device."""
        weights = None if self.weights is None else self.weights.to(device)
        return Batch(
            self.items.to(device), self.lengths.to(device), self.targets.to(device), weights
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """How sequences become batches.

    Attributes:
        batch_size: sequences in a global batch, over all ranks.
        windows: of a sequence longer than the encoder takes, its "last" window or "all" of them.
        shuffle_row_groups: row groups in a shuffle window, at least. More mix better and take more memory.
    """

    batch_size: int = 128
    windows: Literal["last", "all"] = "last"
    shuffle_row_groups: int = 32

    def __post_init__(self) -> None:
        """Refuse sizes below one and unknown names."""
        _at_least_one("batch_size", self.batch_size)
        _at_least_one("shuffle_row_groups", self.shuffle_row_groups)
        if self.windows not in ("last", "all"):
            raise ValueError(f"windows must be last or all, got {self.windows!r}; pick one")


@dataclass(frozen=True, slots=True)
class _Samples:
    """Samples of some row groups over one flat tensor: sample s reads ``start[s] .. start[s] + length[s]``."""

    items: Tensor
    weights: Tensor | None
    start: Tensor
    length: Tensor

    def batch(self, chosen: Tensor) -> Batch:
        """The chosen samples, padded to the longest of them."""
        start, length = self.start[chosen], self.length[chosen]
        items, real, place = _padded(self.items, start, length)
        weights = None
        if self.weights is not None:
            weights = self.weights[place + real] * real
        return Batch(items, length, self.items[place + real] * real, weights)


class TrainingBatches:
    """This rank's parts of the global batches, epoch after epoch.

    ``for batch in batches`` runs from where the loader stands to the end of the epoch; the next loop is
    the next epoch. Every real position comes exactly once in an epoch over all ranks. In the last, short batch of an epoch some ranks may have no sequences.
    All ranks take the same number of steps. Reading opens no collective.

    Attributes:
        epoch: the epoch of the next batch, from 0.
        step: the next batch's index in its epoch.
        bytes_read: stored bytes read by this rank so far (property).
        padding_share: padding among the positions given out by this rank so far (property).
    """

    def __init__(
        self,
        prepared: Prepared,
        config: BatchConfig,
        *,
        max_length: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        """Read the footers of the training files (and the lengths of all sequences for windows="all").

        Args:
            prepared: an open prepared folder.
            config: batch size and windows; the same on every rank.
            max_length: positions in a window, at most.
            rank: this process.
            world_size: W.
            seed: of the order; the same on every rank.
        """
        _at_least_one("max_length", max_length)
        _check_rank(rank, world_size)
        self.prepared, self.config = prepared, config
        self.max_length, self.rank, self.world_size, self.seed = max_length, rank, world_size, seed
        self.epoch = self.step = 0
        self._columns = ["items", "weights"] if prepared.has_weights else ["items"]
        self._groups = RowGroups(prepared.train_files, [*self._columns, "length"])
        self._positions = self._slots = 0
        self._samples = self._count_samples()
        self._num_steps = -(-int(self._samples.sum()) // config.batch_size)

    def __len__(self) -> int:
        """Global batches in an epoch."""
        return self._num_steps

    @property
    def bytes_read(self) -> int:
        """Stored bytes of footers and column chunks read by this rank."""
        return self._groups.bytes_read

    @property
    def padding_share(self) -> float:
        """Padding among all positions this rank gave out, 0 before the first."""
        return 1.0 - self._positions / self._slots if self._slots else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, and what the order depends on; not the number of ranks."""
        return {"epoch": self.epoch, "step": self.step, "order": self._order_key()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place, at any number of ranks.

        Raises:
            ValueError: the state belongs to another order (data, seed, batch size, ...).
        """
        for name, value in self._order_key().items():
            if state["order"].get(name) != value:
                raise ValueError(
                    f"{name} must be {state['order'].get(name)} to go on from this state, got {value};"
                    " restore the setting or start a new run"
                )
        if not 0 <= state["step"] <= len(self):
            raise ValueError(
                f"step must be in [0, {len(self)}], got {state['step']}; load another state"
            )
        self.epoch, self.step = int(state["epoch"]), int(state["step"])

    def __iter__(self) -> Iterator[Batch]:
        """Batches from (epoch, step) to the end of the epoch."""
        if self.step >= len(self) > 0:
            self.epoch, self.step = self.epoch + 1, 0
        epoch = self.epoch
        order = EpochOrder(
            self._samples,
            self.config.batch_size,
            self.config.shuffle_row_groups,
            seed=self.seed,
            epoch=epoch,
        )
        while self.epoch == epoch and self.step < len(self):
            window = order.window(self.step)
            yield from self._window_batches(order, window)
        if self.epoch == epoch:
            self.epoch, self.step = epoch + 1, 0

    def _window_batches(self, order: EpochOrder, window: Window) -> Iterator[Batch]:
        """The batches of a window from ``step`` on; ``step`` moves before a batch is given out."""
        places = window.places(self.rank, self.world_size)
        run = window.place_start(np.array(places))
        pieces = order.pieces(window, int(run[0]), int(run[1]))
        samples, luck = self._read(order, pieces)
        start = order.offset(window, pieces)
        sizes = np.array([piece.last - piece.first for piece in pieces], dtype=np.int64)
        chosen, counts = order.deal(window, start, sizes, samples.length.numpy(), luck, places)
        parts = torch.from_numpy(chosen).split(counts.tolist())
        for index in range(self.step - window.first_step, window.num_steps):
            batch = samples.batch(parts[index])
            self._positions += batch.num_positions
            self._slots += batch.items.numel()
            self.step = window.first_step + index + 1
            yield batch

    def _read(
        self, order: EpochOrder, pieces: list[Piece]
    ) -> tuple[_Samples, npt.NDArray[np.float64]]:
        """The samples of the pieces in the epoch's order, and their random numbers."""
        items, weights, starts, lengths, luck, base = [], [], [], [], [], 0
        for piece in pieces:
            table = self._groups.read(piece.row_group, self._columns)
            values, offsets = self._items(piece.row_group, table)
            start, length = _windows(offsets, self.max_length, self.config.windows)
            shuffled, random = order.shuffled(piece.row_group, len(start))
            kept = shuffled[piece.first : piece.last]
            items.append(values)
            if self.prepared.has_weights:
                weights.append(self._weights(piece.row_group, table, offsets))
            starts.append(start[kept] + base)
            lengths.append(length[kept])
            luck.append(random[piece.first : piece.last])
            base += len(values)
        flat = torch.from_numpy(_joined(items, np.int64))
        weight = (
            torch.from_numpy(_joined(weights, np.float32)) if self.prepared.has_weights else None
        )
        start, length = (torch.from_numpy(_joined(part, np.int64)) for part in (starts, lengths))
        return _Samples(flat, weight, start, length), _joined(luck, np.float64)

    def _items(self, row_group: int, table: pa.Table) -> tuple[Ints, Ints]:
        values, offsets = flat_list(table, "items")
        _check_items(
            values, self.prepared.num_items, f"{self._groups.name(row_group)}, column items"
        )
        return values.astype(np.int64, copy=False), offsets

    def _weights(self, row_group: int, table: pa.Table, offsets: Ints) -> npt.NDArray[Any]:
        values, own = flat_list(table, "weights")
        if not np.array_equal(own, offsets):
            raise ValueError(
                f"{self._groups.name(row_group)}, column weights must have one weight an item,"
                " got lists of other lengths; prepare the data again"
            )
        return values.astype(np.float32, copy=False)

    def _count_samples(self) -> Ints:
        """(G,) samples in each row group."""
        if self.config.windows == "last":
            return self._groups.rows
        counts = []
        for index in range(len(self._groups)):
            length = self._groups.read(index, ["length"]).column("length").to_numpy()
            counts.append(int(_num_windows(length.astype(np.int64), self.max_length).sum()))
        return np.array(counts, dtype=np.int64)

    def _order_key(self) -> dict[str, Any]:
        return {
            "data": self.prepared.fingerprint,
            "seed": self.seed,
            "batch_size": self.config.batch_size,
            "windows": self.config.windows,
            "shuffle_row_groups": self.config.shuffle_row_groups,
            "max_length": self.max_length,
        }


@dataclass(frozen=True, slots=True)
class EvaluationBatch:
    """Some users of this rank; B may be 0, L is at least 1.

    Attributes:
        items: (B, L) int64, the last L items of each history, padded with 0 on the right.
        lengths: (B,) int64.
        targets: values (T,) and lengths (B,): the items each user took next, oldest first.
        seen: values (S,) and lengths (B,): the whole history of each user.
    """

    items: Tensor
    lengths: Tensor
    targets: Ragged
    seen: Ragged

    def to(self, device: torch.device | str) -> "EvaluationBatch":
        """The batch on another device."""
        return EvaluationBatch(
            self.items.to(device),
            self.lengths.to(device),
            (self.targets[0].to(device), self.targets[1].to(device)),
            (self.seen[0].to(device), self.seen[1].to(device)),
        )


class EvaluationBatches:
    """This rank's contiguous share of the users of a split, a row group at a time.

    Every rank gives out the same number of batches; where its users are used up they are empty. Inside a row group users come
    by length of history, so that little is computed on padding.
    """

    def __init__(
        self,
        prepared: Prepared,
        split: Literal["validation", "test"],
        *,
        batch_size: int,
        max_length: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Read the footer.

        Args:
            prepared: an open prepared folder.
            split: which users.
            batch_size: users of one rank in a batch.
            max_length: items of a history that the encoder reads.
            rank: this process.
            world_size: W.
        """
        _at_least_one("batch_size", batch_size)
        _at_least_one("max_length", max_length)
        _check_rank(rank, world_size)
        if split not in ("validation", "test"):
            raise ValueError(f"split must be validation or test, got {split!r}; pick one")
        self.prepared, self.batch_size, self.max_length = prepared, batch_size, max_length
        self._groups = RowGroups([prepared.path / f"{split}.parquet"], ["items", "targets"])
        self.num_users = int(self._groups.rows.sum())
        self._shares = [self._share(r, world_size) for r in range(world_size)]
        self.rank = rank

    def __len__(self) -> int:
        """Batches that each rank gives out."""
        return max(
            sum(-(-(piece.last - piece.first) // self.batch_size) for piece in share)
            for share in self._shares
        )

    def __iter__(self) -> Iterator[EvaluationBatch]:
        """All users of this rank, then empty batches up to the common number."""
        given = 0
        for piece in self._shares[self.rank]:
            for batch in self._batches(piece):
                given += 1
                yield batch
        for _ in range(given, len(self)):
            none = torch.zeros(0, dtype=torch.int64)
            yield EvaluationBatch(none.new_zeros(0, 1), none, (none, none), (none, none))

    def _share(self, rank: int, world_size: int) -> list[Piece]:
        """The parts of row groups that are in the share of a rank."""
        start = self.num_users * rank // world_size
        stop = self.num_users * (rank + 1) // world_size
        ends = np.cumsum(self._groups.rows)
        pieces = []
        for index, (end, rows) in enumerate(
            zip(ends.tolist(), self._groups.rows.tolist(), strict=True)
        ):
            first, last = max(start - (end - rows), 0), min(stop - (end - rows), rows)
            if first < last:
                pieces.append(Piece(index, first, last))
        return pieces

    def _batches(self, piece: Piece) -> Iterator[EvaluationBatch]:
        table = self._groups.read(piece.row_group, ["items", "targets"])
        name = self._groups.name(piece.row_group)
        columns = []
        for column in ("items", "targets"):
            values, offsets = flat_list(table, column)
            _check_items(values, self.prepared.num_items, f"{name}, column {column}")
            columns.append((torch.from_numpy(values.copy()), torch.from_numpy(offsets)))
        (items, item_offsets), (targets, target_offsets) = columns
        users = torch.arange(piece.first, piece.last)
        users = users[torch.argsort(item_offsets.diff()[users], stable=True)]
        for chosen in users.split(self.batch_size):
            seen = _gathered(items, item_offsets, chosen)
            length = seen[1].clamp(max=self.max_length)
            padded, _, _ = _padded(items, item_offsets[chosen + 1] - length, length)
            yield EvaluationBatch(padded, length, _gathered(targets, target_offsets, chosen), seen)


def _windows(offsets: Ints, max_length: int, windows: str) -> tuple[Ints, Ints]:
    """Start and number of positions of each sample of (rows + 1,) list offsets.

    A sequence of n items has n - 1 positions; windows are cut from its end, so that the first is the short one.

    >>> start, length = _windows(np.array([0, 6]), 2, "all")
    >>> start.tolist(), length.tolist()
    ([3, 1, 0], [2, 2, 1])
    """
    rows = np.diff(offsets)
    counts = _num_windows(rows, max_length)
    if windows == "last":
        counts = np.ones_like(counts)
    row = np.repeat(np.arange(len(rows)), counts)
    index = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    end = np.maximum(rows[row] - 1, 0) - index * max_length
    start = np.maximum(end - max_length, 0)
    return offsets[row] + start, end - start


def _num_windows(lengths: Ints, max_length: int) -> Ints:
    """Windows of sequences of so many items; one at least, so that every row is a sample."""
    return np.maximum(-(-(lengths - 1) // max_length), 1)


def _padded(values: Tensor, start: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Runs of ``values`` as rows, padded with 0; the (B, L) mask of real places; their index in ``values``."""
    longest = max(int(length.max()), 1) if len(length) else 1
    offset = torch.arange(longest)
    real = offset < length[:, None]
    place = (start[:, None] + offset) * real
    return values[place] * real if len(length) else place, real, place


def _gathered(values: Tensor, offsets: Tensor, rows: Tensor) -> Ragged:
    """The lists of ``rows`` end to end, and their lengths."""
    lengths = offsets[rows + 1] - offsets[rows]
    before = lengths.cumsum(0) - lengths
    shift = torch.repeat_interleave(offsets[rows] - before, lengths)
    return values[torch.arange(len(shift)) + shift], lengths


def _joined(parts: list[npt.NDArray[Any]], dtype: type) -> npt.NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)


def _check_items(values: npt.NDArray[Any], num_items: int, name: str) -> None:
    if len(values) and (values.min() < 0 or values.max() >= num_items):
        raise ValueError(
            f"{name} must be in [0, {num_items}), got {values.min()} to {values.max()};"
            " prepare the data again"
        )


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}), got {rank}; check the launcher")


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}; raise it")
