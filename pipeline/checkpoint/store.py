"""Checkpoints: folders, complete once their manifest is there, loadable on any number of ranks.

A run keeps the last few and the best::

    checkpoints/step-00000120/rank-00000.bin  tensors that rank 0 wrote, raw bytes; a file a rank
                              metadata.json   which tensor lies where
                              state.json      progress, config, versions, numbers
                              manifest.json   sizes and checksums, written last

``torch.distributed.checkpoint`` plans, writes and reads; ``checkpoint_format`` says how a file
looks. Nothing in a checkpoint is unpickled or executed.
"""

import contextlib
import functools
import json
import logging
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from shardrec.modules.option_checks import require_above_zero, require_at_least
from shardrec.pipeline.checkpoint.format import (
    RowLoadPlanner,
    RowReader,
    RowSavePlanner,
    RowWriter,
    metadata_from_json,
    metadata_to_json,
)
from shardrec.pipeline.checkpoint.manifest import (
    MANIFEST,
    DamagedCheckpointError,
    FileEntry,
    Manifest,
)
from shardrec.pipeline.checkpoint.state import CheckpointState, is_row_name, join_state
from shardrec.pipeline.outputs.json_files import require_shape
from shardrec.pipeline.outputs.storage import Folder, open_folder
from shardrec.pipeline.ranks import on_first_rank, on_this_rank, rank_of, size_of

__all__ = [
    "CheckpointConfig",
    "CheckpointState",
    "Checkpoints",
    "DamagedCheckpointError",
    "StoredCheckpoint",
    "load_checkpoint",
    "save_checkpoint",
]

METADATA, STATE = "metadata.json", "state.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written, where to, and how many are kept.

    One is written after each validation and at the end of the run in any case.

    Attributes:
        folder: a folder, or an address that pyarrow opens (s3://bucket/prefix), for this run alone;
            None: "checkpoints" in the run folder.
        every_steps: after this many steps; None: not by steps.
        every_minutes: after this long on rank 0's clock; None: not by time.
        keep: the last so many are kept, and the best.
        background: train on while a copy of table and optimizer is written; needs their memory
            once more. Otherwise training waits.
    """

    folder: str | None = None
    every_steps: int | None = None
    every_minutes: float | None = 15.0
    keep: int = 2
    background: bool = True

    def __post_init__(self) -> None:
        """Refuse numbers that would keep nothing or never end."""
        require_at_least("checkpoints.keep", self.keep, 1)
        for name in ("every_steps", "every_minutes"):
            require_above_zero(f"checkpoints.{name}", getattr(self, name), "none turns it off")


class Checkpoints:
    """The last and the best checkpoints of a run."""

    def __init__(
        self, folder: Path | str | Folder, group: dist.ProcessGroup | None, keep: int = 2
    ) -> None:
        """Store where they are, the ranks that write them together, and how many to keep."""
        self.folder = open_folder(folder)
        self.group = group
        self.keep = keep

    def save(self, step: int, state: CheckpointState, *, best: bool) -> Folder:
        """Write one more, make it the last (and the best), then delete what is neither.

        Collectives: as ``save_checkpoint``, and a gather of a small object.
        """
        folder = self.folder / f"step-{step:08d}"
        try:
            save_checkpoint(folder, state, self.group, best=best)
        except Exception:
            # A disk that was full should not stay so.
            with contextlib.suppress(OSError):
                if rank_of(self.group) == 0:
                    folder.remove(MANIFEST)
            raise
        try:
            on_first_rank(lambda: self._prune(step), self.group)
        except OSError as error:
            message = "old checkpoints in %s could not be deleted: %s"
            logging.getLogger(__name__).warning(message, self.folder, error)
        return folder

    def find(self, which: Literal["last", "best"]) -> Folder:
        """The last or best checkpoint; without validation the last is the best.

        Looks at manifests and at the sizes of files. A last one that is damaged is named in a
        warning, and the one before it is taken.

        Raises:
            FileNotFoundError: there is none.
            DamagedCheckpointError: the best one is damaged.
        """
        if which == "best":
            for manifest in self._manifests():
                if manifest.best:
                    manifest.check_sizes()
                    return manifest.folder
        last = next(self._whole(), None)
        if last is None:
            raise FileNotFoundError(
                f"{self.folder} must hold a complete checkpoint, got none; "
                "train until the first checkpoint is written"
            )
        return last.folder

    def load_last(self, rows: range) -> tuple[Folder, CheckpointState] | None:
        """The last checkpoint of which every rank can read its part; None if there is none.

        One that turns out to be damaged is named in a warning, and the one before it is taken.

        Args:
            rows: of the table, wanted on this rank.

        Collectives: gathers of small objects: one, and one for each checkpoint tried.
        """
        for name in on_first_rank(self._whole_names, self.group):
            read = functools.partial(load_checkpoint, self.folder / name, rows)
            try:
                return self.folder / name, on_this_rank(read, self.group)
            except DamagedCheckpointError as error:
                if rank_of(self.group) == 0:
                    _warn(error)
        return None

    def is_empty(self) -> bool:
        """Whether there is not even the beginning of one."""
        return not self._names()

    def _manifests(self) -> Iterator[Manifest]:
        """Those of checkpoints that were completed, the last first."""
        for name in reversed(self._names()):
            try:
                manifest = Manifest.find(self.folder / name)
            except DamagedCheckpointError as error:
                _warn(error)
                continue
            if manifest is not None:
                yield manifest

    def _whole(self) -> Iterator[Manifest]:
        """Those whose files are all there, the last first."""
        for manifest in self._manifests():
            try:
                manifest.check_sizes()
                yield manifest
            except DamagedCheckpointError as error:
                _warn(error)

    def _whole_names(self) -> list[str]:
        return [manifest.folder.name for manifest in self._whole()]

    def _prune(self, step: int) -> None:
        """Delete all but the last few and the best up to ``step``; later ones were given up."""
        whole = [one for one in self._whole() if one.folder.name <= f"step-{step:08d}"]
        best = [one for one in whole if one.best]
        kept = {one.folder.name for one in whole[: self.keep] + best[:1]}
        for name in self._names():
            if name not in kept:
                (self.folder / name).remove(MANIFEST)

    def _names(self) -> list[str]:
        return [name for name in self.folder.folders() if name.startswith("step-")]


def save_checkpoint(
    folder: Path | str | Folder,
    state: CheckpointState,
    group: dist.ProcessGroup | None = None,
    *,
    best: bool = False,
) -> None:
    """Write a checkpoint, its manifest last; what was in ``folder`` is replaced.

    Args:
        folder: where all ranks can write.
        state: ``table`` is this rank's; the rest is written by rank 0.
        group: the ranks that write together; None for one process.
        best: whether it is the best of its run so far.

    Raises:
        OSError: a rank could not write; raised on all ranks, and ``folder`` has no manifest.
        TypeError: the state holds something else than tensors.

    Collectives: of small objects on ``group``: a gather, and those of DCP's planning and writing.
    """
    at = open_folder(folder)
    on_first_rank(lambda: at.remove(MANIFEST), group)
    whole, rows = on_this_rank(state.tensors, group)
    num_rows = int(state.table["num_rows"])

    def complete(metadata: Metadata, files: dict[str, FileEntry]) -> None:
        numbers = json.dumps(state.numbers(), indent=1).encode()
        for name, content in ((METADATA, metadata_to_json(metadata)), (STATE, numbers)):
            at.write(name, content)
            files[name] = FileEntry.of(content)
        Manifest(at, best, files).write()

    with _plain_errors(size_of(group)), _without_advice(alone=group is None):
        save_tensors(
            whole | rows,
            storage_writer=RowWriter(at, f"rank-{rank_of(group):05d}.bin", complete),
            planner=RowSavePlanner(rows, state.rows.start, num_rows),
            process_group=group,
            no_dist=group is None,
        )


def load_checkpoint(folder: Path | str | Folder, rows: range | None = None) -> CheckpointState:
    """Read a checkpoint, whatever number of ranks wrote it.

    Args:
        folder: a complete checkpoint.
        rows: the rows of the table wanted on this rank; None for all. Rows beyond the saved
            table are left out.

    Returns:
        The state; ``table["first_row"]`` is the first row read.

    Raises:
        FileNotFoundError: the manifest is missing: the checkpoint is not complete.
        DamagedCheckpointError: a file differs from the manifest.
        ValueError: another version of this package wrote it.

    Collectives: none.
    """
    return StoredCheckpoint(folder).load(rows)


class StoredCheckpoint:
    """A complete checkpoint that is read in parts; each file is compared with its checksum once.

    Raises as ``load_checkpoint`` does, when it is opened or when a part is read.
    """

    def __init__(self, folder: Path | str | Folder) -> None:
        """Read what it says of itself, and no tensor yet."""
        manifest = Manifest.read(open_folder(folder))
        self.numbers = _parsed(manifest, STATE, _numbers)
        self._metadata = _parsed(manifest, METADATA, metadata_from_json)
        self._reader = RowReader(manifest, self._metadata)

    @property
    def num_rows(self) -> int:
        """V of its table."""
        return int(self.numbers["table"]["num_rows"])

    def load(self, rows: range | None = None) -> CheckpointState:
        """All of it, with these rows of the table; None for all rows."""
        wanted = range(self.num_rows) if rows is None else rows
        tensors = self._read(self._metadata.state_dict_metadata, wanted)
        return join_state(tensors, self.numbers, wanted.start)

    def load_rows(self, rows: range, names: Collection[str]) -> dict[str, Tensor]:
        """These rows of some tensors of the table, by name, such as "rows" or "optimizer.sum"."""
        tensors = self._read([f"table.{name}" for name in names], rows)
        return {name.removeprefix("table."): value for name, value in tensors.items()}

    def _read(self, names: Iterable[str], rows: range) -> dict[str, Tensor]:
        count = max(0, min(rows.stop, self.num_rows) - rows.start)
        tensors = {}
        for name in names:
            stored = self._metadata.state_dict_metadata[name]
            shape = (count, *stored.size[1:]) if is_row_name(name) else stored.size
            tensors[name] = torch.empty(shape, dtype=stored.properties.dtype)
        with _plain_errors(1), _without_advice(alone=True):
            load_tensors(
                tensors,
                storage_reader=self._reader,
                planner=RowLoadPlanner(rows.start, frozenset(filter(is_row_name, tensors))),
                no_dist=True,
            )
        return tensors


def _numbers(content: bytes) -> dict[str, Any]:
    """What ``CheckpointState.numbers`` gave."""
    shape = {"progress": dict, "config": dict, "optimizer": list, "table": dict, "versions": dict}
    stored = require_shape(json.loads(content), shape, STATE, "use another checkpoint")
    require_shape(stored["table"], {"num_rows": int}, "table", "use another checkpoint")
    return stored


def _parsed(manifest: Manifest, name: str, parse: Callable[[bytes], Any]) -> Any:
    """What a small file says, once it is known to be the one that was written."""
    manifest.check(name)
    try:
        return parse(manifest.folder.read(name))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(
            f"{manifest.folder}/{name} must be JSON as a checkpoint has it, got {error!r}; "
            "use another checkpoint"
        ) from error


@contextlib.contextmanager
def _plain_errors(num_ranks: int) -> Iterator[None]:
    """Raise what went wrong, and not DCP's list of it; a note names the rank."""
    try:
        yield
    except CheckpointException as failed:
        rank, (error, _) = min(failed.failures.items(), key=lambda item: item[0])
        if num_ranks > 1:
            error.add_note(f"raised on rank {rank} of {num_ranks}")
        raise error from None


@contextlib.contextmanager
def _without_advice(*, alone: bool) -> Iterator[None]:
    """Hide DCP's warning that one process saves or loads alone.

    Only then: filters belong to all threads, and a background write shares its ranks' group.
    """
    with contextlib.ExitStack() as stack:
        if alone:
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _warn(error: Exception) -> None:
    logging.getLogger(__name__).warning("a checkpoint is passed over: %s", error)
