"""Load prepared data as batches of tensors; the order depends on (seed, epoch), not on W.

``epoch_order`` decides the order of an epoch, ``row_groups`` reads, ``batches`` cuts tensors.
No Python loop runs over sequences: list columns become one flat tensor and offsets, and a batch is
index arithmetic on them.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from shardrec.modules.option_checks import require_at_least, require_choice
from shardrec.pipeline.prepared.batches import (
    Batch,
    EvaluationBatch,
    Samples,
    cut_windows,
    gathered,
    num_windows,
    padded,
)
from shardrec.pipeline.prepared.epoch_order import ORDER_VERSION, EpochOrder, Piece, Window
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.prepared.row_groups import RowGroups, flat_list

__all__ = [
    "Batch",
    "BatchConfig",
    "EvaluationBatch",
    "EvaluationBatches",
    "Prepared",
    "TrainingBatches",
]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """Batch size, windows and shuffling.

    Attributes:
        batch_size: sequences in a global batch, over all ranks.
        windows: train on the "last" window of a sequence that is longer than the encoder takes, or
            on "all" its windows.
        shuffle_row_groups: minimum number of row groups in a shuffle window (or all, if there are
            fewer). A larger window shuffles better and takes more memory, and two ranks read the
            same row group less often.
    """

    batch_size: int = 128
    windows: Literal["last", "all"] = "last"
    shuffle_row_groups: int = 32

    def __post_init__(self) -> None:
        """Check the ranges and names."""
        for name in ("batch_size", "shuffle_row_groups"):
            require_at_least(f"batches.{name}", getattr(self, name), 1)
        require_choice("batches.windows", self.windows, ("last", "all"))


class TrainingBatches:
    """This rank's parts of the global batches, epoch after epoch.

    ``for batch in batches`` runs from the current step to the end of the epoch; the next such loop
    runs through the next epoch. Over all ranks, every real position occurs exactly once per epoch.
    All ranks take the same number of steps; in the last, short batch of an epoch some may have no
    sequences. With R replicas, replica r has batches r, r + R, … of each optimizer step, and no
    sequences in the others.

    Collectives: none.

    Attributes:
        epoch: the epoch of the next batch, from 0.
        step: the next batch's index in its epoch.
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
        replica: int = 0,
        num_replicas: int = 1,
        accumulate: int = 1,
    ) -> None:
        """Read the training files' footers, and for windows="all" the lengths of all sequences.

        Args:
            prepared: an open prepared folder.
            config: batch size and windows; the same on every rank.
            max_length: largest number of positions in a window.
            rank: rank of this process in its replica.
            world_size: ranks of a replica, which share its batches.
            seed: seed of the order; the same on every rank.
            replica: index of this rank's replica.
            num_replicas: R.
            accumulate: batches of an optimizer step; a short step ends the epoch.

        Raises:
            FileNotFoundError: a training file is missing.
            ValueError: a number is out of range, or a file is damaged.
        """
        require_at_least("max_length", max_length, 1)
        _check_rank(rank, world_size)
        _check_rank(replica, num_replicas)
        self.prepared, self.config = prepared, config
        self.replica, self.num_replicas, self.accumulate = replica, num_replicas, accumulate
        self.max_length, self.rank, self.world_size, self.seed = max_length, rank, world_size, seed
        self.epoch = self.step = 0
        self._columns = ["items", "weights"] if prepared.has_weights else ["items"]
        self._groups = RowGroups(prepared.train_files, [*self._columns, "length"])
        self._samples = self._count_samples()
        self._num_steps = -(-int(self._samples.sum()) // config.batch_size)

    def __len__(self) -> int:
        """Number of global batches in an epoch."""
        return self._num_steps

    @property
    def bytes_read(self) -> int:
        """Compressed bytes of footers and column chunks that this rank has read."""
        return int(self._groups.bytes_read)

    def target_share(self) -> float:
        """Share of all training targets that an epoch trains on; below 1 if sequences are cut.

        Reads the lengths of all sequences unless windows="all".
        """
        if self.config.windows == "all":
            return 1.0
        lengths = [self._lengths(index) - 1 for index in range(len(self._groups))]
        targets = np.concatenate([np.zeros(0, dtype=np.int64), *lengths]).clip(min=0)
        return float(np.minimum(targets, self.max_length).sum() / max(1, targets.sum()))

    def state_dict(self) -> dict[str, Any]:
        """Epoch, step, and everything that the order depends on (not the number of ranks)."""
        return {"epoch": self.epoch, "step": self.step, "order": self._order_key()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state, at any number of ranks.

        If the epoch was begun by a version of shardrec with another order, it continues at the same
        step in the order of this version, with a warning on rank 0.

        Raises:
            ValueError: the state belongs to another order (data, seed, batch size, ...).
        """
        for name, value in self._order_key().items():
            if name != "version" and state["order"].get(name) != value:
                raise ValueError(
                    f"{name} must be {state['order'].get(name)} to continue from this state,"
                    f" got {value}; restore the setting or start a new run"
                )
        if not 0 <= state["step"] <= len(self):
            raise ValueError(
                f"step must be in [0, {len(self)}], got {state['step']}; load another state"
            )
        self.epoch, self.step = int(state["epoch"]), int(state["step"])
        is_other = state["order"].get("version", 1) != ORDER_VERSION
        if is_other and 0 < self.step < len(self) and self.rank == 0:
            logging.getLogger(__name__).warning(
                "the first %d of the %d batches of epoch %d were in the order of another version "
                "of shardrec: the epoch continues at the same step in the order of this one, so it "
                "has some sequences twice and others not at all; later epochs are complete",
                *(self.step, len(self), self.epoch + 1),
            )

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches from (epoch, step) to the end of the epoch.

        Raises:
            ValueError: a row group is damaged; the message names file, row group and column.
        """
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
        """The batches of a window from ``step`` on; ``step`` is advanced before each yield."""
        slots = window.slots(self.rank, self.world_size)
        run = window.slot_start(np.array(slots))
        samples, random_keys = self._read(order, order.pieces(window, int(run[0]), int(run[1])))
        chosen, counts = order.assign(window, slots, random_keys)
        parts = torch.from_numpy(chosen).split(counts.tolist())
        for index in range(self.step - window.first_step, window.num_steps):
            in_step = (window.first_step + index) % self.accumulate
            own = in_step % self.num_replicas == self.replica
            self.step = window.first_step + index + 1
            yield samples.batch(parts[index] if own else parts[index][:0])

    def _read(
        self, order: EpochOrder, pieces: list[Piece]
    ) -> tuple[Samples, npt.NDArray[np.float64]]:
        """The samples of the pieces in the epoch's order, and their random keys."""
        dtypes = (np.int64, np.float32, np.int64, np.int64, np.float64)
        parts: list[tuple[npt.NDArray[Any], ...]] = [tuple(np.zeros(0, kind) for kind in dtypes)]
        base, weight = 0, parts[0][1]
        for piece in pieces:
            table = self._groups.read(piece.row_group, self._columns)
            values, offsets = self._items(piece.row_group, table)
            if self.prepared.has_weights:
                weight = self._weights(piece.row_group, table, offsets)
            begin, size = cut_windows(offsets, self.max_length, self.config.windows)
            if len(begin) != self._samples[piece.row_group]:
                raise ValueError(
                    f"{self._groups.name(piece.row_group)} must have "
                    f"{self._samples[piece.row_group]} samples, as its column length says, got "
                    f"{len(begin)}; prepare the data again"
                )
            shuffled, random = order.shuffled(piece.row_group, len(begin))
            kept = shuffled[piece.first : piece.last]
            keys = random[piece.first : piece.last]
            parts.append((values, weight, begin[kept] + base, size[kept], keys))
            base += len(values)
        items, weights, starts, lengths, keys = map(np.concatenate, zip(*parts, strict=True))
        flat, start, length = map(torch.from_numpy, (items, starts, lengths))
        flat_weights = torch.from_numpy(weights) if self.prepared.has_weights else None
        return Samples(flat, flat_weights, start, length), keys

    def _items(self, row_group: int, table: pa.Table) -> tuple[Ints, Ints]:
        values, offsets = flat_list(table, "items")
        place = f"{self._groups.name(row_group)}, column items"
        _check_items(values, self.prepared.num_items, place)
        return values.astype(np.int64, copy=False), offsets

    def _weights(self, row_group: int, table: pa.Table, offsets: Ints) -> npt.NDArray[Any]:
        values, own = flat_list(table, "weights")
        if not np.array_equal(own, offsets):
            raise ValueError(
                f"{self._groups.name(row_group)}, column weights must have one weight per item,"
                " got lists of other lengths; prepare the data again"
            )
        return values.astype(np.float32, copy=False)

    def _count_samples(self) -> Ints:
        """(G,) samples in each row group."""
        if self.config.windows == "last":
            return self._groups.rows
        counts = []
        for index in range(len(self._groups)):
            counts.append(int(num_windows(self._lengths(index), self.max_length).sum()))
        return np.array(counts, dtype=np.int64)

    def _lengths(self, index: int) -> Ints:
        """(S,) items of each sequence of a row group."""
        length = self._groups.read(index, ["length"]).column("length").to_numpy()
        lengths: Ints = length.astype(np.int64)
        return lengths

    def _order_key(self) -> dict[str, Any]:
        return {
            "data": self.prepared.fingerprint,
            "seed": self.seed,
            "batch_size": self.config.batch_size,
            "windows": self.config.windows,
            "shuffle_row_groups": self.config.shuffle_row_groups,
            "max_length": self.max_length,
            "version": ORDER_VERSION,
        }


class EvaluationBatches:
    """Batches of this rank's contiguous share of the users of a split.

    Every rank has the same number of batches; the last ones are empty on ranks with fewer users.
    Inside a row group users are sorted by the length of their history, which reduces padding.
    """

    def __init__(
        self,
        prepared: Prepared,
        split: Literal["validation", "test"],
        *,
        batch_size: int,
        max_length: int,
        sample_users: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Read the footer.

        Args:
            prepared: an open prepared folder.
            split: the users to read.
            batch_size: users of one rank in a batch.
            max_length: largest number of items of a history that the encoder reads.
            sample_users: number of users, the first ones of the split; None takes all.
            rank: rank of this process.
            world_size: W.
        """
        require_at_least("batch_size", batch_size, 1)
        require_at_least("max_length", max_length, 1)
        _check_rank(rank, world_size)
        if split not in ("validation", "test"):
            raise ValueError(f"split must be validation or test, got {split!r}; choose one")
        self.prepared, self.batch_size, self.max_length = prepared, batch_size, max_length
        self._groups = RowGroups([prepared.file(f"{split}.parquet")], ["items", "targets"])
        self.num_users = int(self._groups.rows.sum())
        if sample_users is not None:
            self.num_users = min(self.num_users, sample_users)
        self._shares = [self._share(r, world_size) for r in range(world_size)]
        self.rank = rank

    def __len__(self) -> int:
        """Number of batches on each rank."""
        return max(
            sum(-(-(piece.last - piece.first) // self.batch_size) for piece in share)
            for share in self._shares
        )

    def __iter__(self) -> Iterator[EvaluationBatch]:
        """Yield all users of this rank, then empty batches up to the common number.

        Raises:
            ValueError: a row group is damaged; the message names file, row group and column.
        """
        given = 0
        for piece in self._shares[self.rank]:
            for batch in self._batches(piece):
                given += 1
                yield batch
        for _ in range(given, len(self)):
            none = torch.zeros(0, dtype=torch.int64)
            yield EvaluationBatch(none.new_zeros(0, 1), none, (none, none), (none, none), none)

    def _share(self, rank: int, world_size: int) -> list[Piece]:
        """The parts of row groups that belong to a rank."""
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
        before = int(self._groups.rows[: piece.row_group].sum())
        users = torch.arange(piece.first, piece.last)
        users = users[torch.argsort(item_offsets.diff()[users], stable=True)]
        for chosen in users.split(self.batch_size):
            seen = gathered(items, item_offsets, chosen)
            length = seen[1].clamp(max=self.max_length)
            last, _, _ = padded(items, item_offsets[chosen + 1] - length, length)
            wanted = gathered(targets, target_offsets, chosen)
            yield EvaluationBatch(last, length, wanted, seen, before + chosen)


def _check_items(values: npt.NDArray[Any], num_items: int, name: str) -> None:
    if len(values) and (values.min() < 0 or values.max() >= num_items):
        raise ValueError(
            f"{name} must be in [0, {num_items}), got {values.min()} to {values.max()};"
            " prepare the data again"
        )


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}), got {rank}; check the launcher")
