"""Checkpoint folders: complete once the manifest exists, loadable on any number of ranks.

A run keeps the last few and the best::

    checkpoints/step-00000120/rank-00000.bin  tensors that rank 0 wrote, raw bytes; a file per rank
                              metadata.json   where each tensor is stored
                              state.json      progress, config, versions, numbers
                              manifest.json   sizes and checksums, written last

The phases of a save:
1. Rank 0 deletes what an earlier attempt left in the folder, its manifest first.
2. Every rank writes its file.
3. Rank 0 writes the JSON files, the manifest last.
4. Rank 0 deletes older checkpoints.
A killed process leaves a folder without a manifest, which readers ignore and the next save deletes.

``format.py`` describes the files. Nothing in a checkpoint is unpickled or executed.
"""

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from shardrec.kernels.ranks.communicator import Communicator
from shardrec.pipeline.checkpoint.format import (
    Piece,
    StoredTensor,
    TensorReader,
    joined,
    metadata_from_json,
    metadata_to_json,
    write_pieces,
)
from shardrec.pipeline.checkpoint.manifest import (
    MANIFEST,
    DamagedCheckpointError,
    FileEntry,
    Manifest,
)
from shardrec.pipeline.checkpoint.state import CheckpointState, is_row_name, join_state
from shardrec.pipeline.outputs.json_files import parse_json, require_shape
from shardrec.pipeline.outputs.storage import Folder, open_folder
from shardrec.pipeline.ranks import on_all_ranks, on_first_rank, on_this_rank

__all__ = [
    "CheckpointState",
    "Checkpoints",
    "DamagedCheckpointError",
    "StoredCheckpoint",
    "load_checkpoint",
    "save_checkpoint",
]

METADATA, STATE = "metadata.json", "state.json"
_Part = tuple[str, dict[str, StoredTensor], FileEntry]  # a rank's file: name, content, checksum


class Checkpoints:
    """The checkpoints of a run, in one folder: the last few and the best."""

    def __init__(
        self,
        folder: Path | str | Folder,
        group: dist.ProcessGroup | None,
        keep: int = 2,
        run: str | None = None,
    ) -> None:
        """Store the folder.

        Args:
            folder: of all checkpoints of the run.
            group: the ranks that write together.
            keep: how many checkpoints to keep, besides the best.
            run: id of the run; checkpoints of another id are refused. None: of any.
        """
        self.folder = open_folder(folder)
        self.group = group
        self.keep = keep
        self.run = run

    def save(self, step: int, state: CheckpointState, *, best: bool) -> Folder:
        """The folder of a new checkpoint; deletes all others except the last ``keep`` and the best.

        Raises:
            OSError, TypeError: as ``save_checkpoint``; rank 0 then deletes what was written.

        Collectives: as ``save_checkpoint``, and an all-gather of a small object.
        """
        folder = self.folder / f"step-{step:08d}"
        try:
            save_checkpoint(folder, state, self.group, best=best, run=self.run)
        except Exception:
            # A failed write may have filled the disk: free it.
            with contextlib.suppress(OSError):
                if Communicator(self.group).rank == 0:
                    folder.remove(MANIFEST)
            raise
        try:
            on_first_rank(lambda: self._prune(step), self.group)
        except (OSError, ValueError) as error:
            message = "old checkpoints in %s could not be deleted: %s"
            logging.getLogger(__name__).warning(message, self.folder, error)
        return folder

    def find(self, which: Literal["last", "best"]) -> Folder:
        """The folder of the last or best checkpoint; without validation the last is the best.

        Checks manifests and file sizes. If the last checkpoint is damaged, a warning names it and
        the previous one is returned.

        Raises:
            FileNotFoundError: there is none.
            DamagedCheckpointError: the best one is damaged.
            ValueError: a checkpoint is of another run, was renamed, or has a wrong signature.
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
        """Folder and state of the last checkpoint that every rank can read; None if there is none.

        A damaged checkpoint is skipped with a warning, and the previous one is tried.

        Args:
            rows: the table rows that this rank loads.

        Raises:
            ValueError: as ``find``.

        Collectives: one all-gather of small objects, and one for each checkpoint tried.
        """
        for name in on_first_rank(self._whole_names, self.group):
            read = functools.partial(load_checkpoint, self.folder / name, rows)
            try:
                return self.folder / name, on_this_rank(read, self.group)
            except DamagedCheckpointError as error:
                if Communicator(self.group).rank == 0:
                    _warn(error)
        return None

    def is_empty(self) -> bool:
        """Whether there is no checkpoint folder, not even an incomplete one."""
        return not self._names()

    def _manifests(self) -> Iterator[Manifest]:
        """Manifests of completed checkpoints, the last first."""
        for name in reversed(self._names()):
            try:
                manifest = Manifest.find(self.folder / name)
            except DamagedCheckpointError as error:
                _warn(error)
                continue
            if manifest is not None:
                self._require_own(manifest)
                yield manifest

    def _require_own(self, manifest: Manifest) -> None:
        """Refuse a checkpoint that was copied from another run, or renamed."""
        found = manifest.folder
        if None not in (self.run, manifest.run) and manifest.run != self.run:
            what = f"of this run, {self.run}, got one of run {manifest.run}"
        elif manifest.name not in (None, found.name):
            what = f"under the name it was written with, got {manifest.name} as {found.name}"
        else:
            return
        raise ValueError(f"checkpoint {found} must be {what}; move it out of the folder")

    def _whole(self) -> Iterator[Manifest]:
        """Manifests of checkpoints with all their files, the last first."""
        for manifest in self._manifests():
            try:
                manifest.check_sizes()
                yield manifest
            except DamagedCheckpointError as error:
                _warn(error)

    def _whole_names(self) -> list[str]:
        return [manifest.folder.name for manifest in self._whole()]

    def _prune(self, step: int) -> None:
        """Keep the last few and the best up to ``step``; later ones are stale after a resume."""
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
    run: str | None = None,
) -> None:
    """Write a checkpoint to ``folder``, the manifest last; an earlier one there is replaced.

    Args:
        folder: a path or address that all ranks can write.
        state: the state to save; each rank writes its rows of ``table``, and rank 0 all the rest.
        group: the ranks that write together; None for one process.
        best: whether it is the best checkpoint of its run so far.
        run: id of the run, stored in the manifest.

    Raises:
        OSError: a rank could not write; raised on all ranks, and ``folder`` has no manifest.
        TypeError: the state holds something other than tensors.

    Collectives: three all-gathers of small objects on ``group``.
    """
    opened = open_folder(folder)
    on_first_rank(lambda: opened.remove(MANIFEST), group)
    written = on_all_ranks(lambda: _write_part(opened, state, Communicator(group).rank), group)
    parts = [part for part in written if part is not None]
    on_first_rank(lambda: _complete(opened, state, best, parts, run), group)


def load_checkpoint(folder: Path | str | Folder, rows: range | None = None) -> CheckpointState:
    """The state in a checkpoint with the given table rows; any number of ranks may have saved it.

    ``rows`` None means all rows; rows beyond the saved table are left out. ``table["first_row"]``
    of the result is the first row read.

    Raises:
        FileNotFoundError: the manifest is missing: the checkpoint is not complete.
        DamagedCheckpointError: a file differs from the manifest.
        ValueError: the checkpoint is of another format version.

    Collectives: none.
    """
    return StoredCheckpoint(folder).load(rows)


class StoredCheckpoint:
    """A complete checkpoint that is read in parts; checks each file's checksum once.

    Opening it and reading a part raise the errors of ``load_checkpoint``.
    """

    def __init__(self, folder: Path | str | Folder) -> None:
        """Read the metadata, but no tensor yet."""
        manifest = Manifest.read(open_folder(folder))
        self.numbers = _parsed(manifest, STATE, _numbers)
        sizes = {name: entry.size for name, entry in manifest.files.items()}
        parse = functools.partial(metadata_from_json, sizes=sizes)
        self._tensors = _parsed(manifest, METADATA, parse)
        self._reader = TensorReader(manifest, self._tensors)
        tables = [one.shape[:1] for name, one in self._tensors.items() if is_row_name(name)]
        if not tables or set(tables) != {(self.num_rows,)}:
            raise self._damaged(f"tables of {self.num_rows} rows, got {tables[:9]}")

    @property
    def num_rows(self) -> int:
        """V, the number of rows of the saved table."""
        return int(self.numbers["table"]["num_rows"])

    def load(self, rows: range | None = None) -> CheckpointState:
        """The state with the given table rows; None for all rows."""
        wanted = range(self.num_rows) if rows is None else rows
        tensors = self._read(self._tensors, wanted)
        try:
            return join_state(tensors, self.numbers, wanted.start)
        except (ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
            raise self._damaged(f"a state, got {error!r}") from error

    def load_rows(self, rows: range, names: Collection[str]) -> dict[str, Tensor]:
        """The given rows of some table tensors, by name, such as "rows" or "optimizer.sum"."""
        tensors = self._read([f"table.{name}" for name in names], rows)
        return {name.removeprefix("table."): value for name, value in tensors.items()}

    def _read(self, names: Collection[str], rows: range) -> dict[str, Tensor]:
        """Read tensors by name: ``rows`` of those of the table, all of the others."""
        known = range(rows.start, max(rows.start, min(rows.stop, self.num_rows)))
        missing = [name for name in names if name not in self._tensors]
        if missing:
            raise self._damaged(f"the tensor {missing[0]}, got none")
        whole = {name: range((*self._tensors[name].shape, 1)[0]) for name in names}
        return self._reader.read(
            {name: known if is_row_name(name) else whole[name] for name in names}
        )

    def _damaged(self, what: str) -> DamagedCheckpointError:
        return DamagedCheckpointError(
            f"{self._reader.manifest.folder}/{METADATA} must describe {what}; use another one"
        )


def _write_part(folder: Folder, state: CheckpointState, rank: int) -> _Part | None:
    """Write this rank's rows, and on rank 0 the replicated tensors; None if there are none."""
    whole, rows = state.tensors()
    num_rows, name = int(state.table["num_rows"]), f"rank-{rank:05d}.bin"
    pieces = {k: Piece(v, state.rows.start, num_rows) for k, v in rows.items() if v.shape[0]}
    if rank == 0:
        pieces |= {k: Piece(v, 0, (*v.shape, 1)[0]) for k, v in whole.items()}
    return (name, *write_pieces(folder, name, pieces)) if pieces else None


def _complete(
    folder: Folder, state: CheckpointState, best: bool, parts: list[_Part], run: str | None
) -> None:
    """Write metadata.json and state.json, then the manifest."""
    files = {name: entry for name, _, entry in parts}
    numbers = json.dumps(state.numbers(), indent=1).encode()
    tensors = metadata_to_json(joined(stored for _, stored, _ in parts))
    for name, content in ((METADATA, tensors), (STATE, numbers)):
        folder.write(name, content)
        files[name] = FileEntry.of(content)
    Manifest(folder, best, files, run, None if run is None else folder.name).write()


def _numbers(content: bytes) -> dict[str, Any]:
    """Parse and check the JSON of ``CheckpointState.numbers``."""
    shape = {"progress": dict, "config": dict, "optimizer": list, "table": dict, "versions": dict}
    stored = require_shape(parse_json(content), shape, STATE, "use another checkpoint")
    require_shape(stored["table"], {"num_rows": int}, "table", "use another checkpoint")
    return stored


def _parsed(manifest: Manifest, name: str, parse: Callable[[bytes], Any]) -> Any:
    """Parse a small file after checking its checksum."""
    manifest.check(name)
    try:
        return parse(manifest.folder.read(name))
    except ValueError as error:
        raise DamagedCheckpointError(
            f"{manifest.folder}/{name} must be JSON as a checkpoint has it, got {error}; "
            "use another checkpoint"
        ) from error


def _warn(error: Exception) -> None:
    logging.getLogger(__name__).warning("a checkpoint is skipped: %s", error)
