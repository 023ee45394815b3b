"""Checkpoints: folders, complete once their manifest is there, loadable on any number of ranks.

A run keeps the last and the best::

    checkpoints/index.json                  {"last": "step-00000120", "best": "step-00000080"}
    checkpoints/step-00000120/manifest.json sizes and checksums, written last
                              state.json    step, progress, config
                              encoder.pt    encoder and its optimizer
                              table-00000-of-00002.pt  this rank's rows and their optimizer memory

Nothing here is unpickled: tensors are read with ``weights_only``.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from shardrec.pipeline.group import on_all_ranks, on_first_rank, rank_of, size_of

__all__ = [
    "CheckpointState",
    "Checkpoints",
    "load_checkpoint",
    "save_checkpoint",
    "write_atomically",
]

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointState:
    """What a checkpoint holds, seen from one rank.

    Attributes:
        encoder: ``state_dict()`` of the encoder, equal on all ranks.
        optimizer: ``state_dict()`` of the encoder's optimizer.
        table: tensors of the table shard: row-aligned ones, and numbers of shape () among which
            ``first_row`` and ``num_rows`` say which rows these are.
        progress: JSON; steps, data position, best metric: what else a resumed run needs.
        config: JSON; the config of the run.
    """

    encoder: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    table: Mapping[str, Tensor]
    progress: Mapping[str, Any]
    config: Mapping[str, Any]


class Checkpoints:
    """The last and the best checkpoint of a run."""

    def __init__(self, folder: Path, group: dist.ProcessGroup | None) -> None:
        """Store the run's checkpoint folder and the ranks that write it together."""
        self.folder = folder
        self.group = group

    def save(self, step: int, state: CheckpointState, *, best: bool) -> Path:
        """Write one more, make it the last (and the best), then delete those that are neither.

        Collectives: as ``save_checkpoint``.
        """
        path = self.folder / f"step-{step:08d}"
        save_checkpoint(path, state, self.group)
        on_first_rank(lambda: self._keep(path.name, best), self.group)
        return path

    def find(self, which: Literal["last", "best"]) -> Path:
        """The folder of the last or best checkpoint; without validation the last is the best.

        Raises:
            FileNotFoundError: there is none.
        """
        names = self._index()
        name = names.get(which, names.get("last"))
        if name is None:
            raise FileNotFoundError(
                f"{self.folder} must hold a complete checkpoint, got none; "
                "train until the first checkpoint is written"
            )
        return self.folder / name

    def _keep(self, name: str, best: bool) -> None:
        names = self._index() | {"last": name} | ({"best": name} if best else {})
        write_atomically(self.folder / "index.json", json.dumps(names))
        for old in self.folder.glob("step-*"):
            if old.name not in names.values():
                shutil.rmtree(old)

    def _index(self) -> dict[str, str]:
        path = self.folder / "index.json"
        return json.loads(path.read_text()) if path.exists() else {}


def save_checkpoint(
    folder: Path, state: CheckpointState, group: dist.ProcessGroup | None = None
) -> None:
    """Write ``folder`` under a temporary name, manifest last, then rename it.

    Args:
        folder: must not exist as a complete checkpoint; on a file system all ranks see.
        state: ``table`` is this rank's; the rest is written by rank 0.
        group: the ranks that write together; None for one process.

    Raises:
        OSError: a rank could not write; raised on all ranks, and ``folder`` is as it was.

    Collectives: three gathers of a small object.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    on_first_rank(lambda: _start(partial), group)
    written = on_all_ranks(lambda: _write(partial, state, group), group)
    files = {name: entry for part in written for name, entry in part.items()}
    on_first_rank(lambda: _finish(partial, folder, files), group)


def load_checkpoint(folder: Path, rows: range | None = None) -> CheckpointState:
    """Read a checkpoint, whatever number of ranks wrote it.

    Args:
        folder: a complete checkpoint.
        rows: the rows of the table wanted on this rank; None for all. Rows beyond the saved
            table are left out.

    Returns:
        The state; ``table["first_row"]`` is the first row read.

    Raises:
        FileNotFoundError: the manifest is missing: the checkpoint is not complete.
        ValueError: a file differs from the manifest.
    """
    manifest = _read_manifest(folder)
    details = json.loads(_checked(folder, "state.json", manifest).read_text())
    encoder = torch.load(_checked(folder, "encoder.pt", manifest), weights_only=True)
    return CheckpointState(
        encoder=encoder["encoder"],
        optimizer=encoder["optimizer"],
        table=_load_table(folder, manifest, rows),
        progress=details["progress"],
        config=details["config"],
    )


def write_atomically(path: Path, text: str) -> None:
    """Write a whole text file or nothing: under a temporary name, then renamed."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _start(partial: Path) -> None:
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)


def _write(
    partial: Path, state: CheckpointState, group: dist.ProcessGroup | None
) -> dict[str, dict[str, Any]]:
    rank = rank_of(group)
    table = f"table-{rank:05d}-of-{size_of(group):05d}.pt"
    rows = {name: value.detach().cpu().contiguous() for name, value in state.table.items()}
    files = {table: _save(partial / table, rows)}
    files[table] |= {"first_row": int(rows["first_row"]), "rows": _count(rows)}
    if rank == 0:
        encoder = {"encoder": dict(state.encoder), "optimizer": dict(state.optimizer)}
        files["encoder.pt"] = _save(partial / "encoder.pt", encoder)
        details = {"progress": dict(state.progress), "config": dict(state.config)}
        write_atomically(partial / "state.json", json.dumps(details, indent=1))
        files["state.json"] = _entry(partial / "state.json")
    return files


def _finish(partial: Path, folder: Path, files: Mapping[str, Any]) -> None:
    write_atomically(partial / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1))
    if folder.exists():
        shutil.rmtree(folder)
    partial.replace(folder)


def _save(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    with path.open("wb") as file:
        torch.save(values, file)
        file.flush()
        os.fsync(file.fileno())
    return _entry(path)


def _load_table(folder: Path, manifest: Mapping[str, Any], rows: range | None) -> dict[str, Tensor]:
    """The wanted rows, put together from the shards that hold some of them."""
    names = sorted(name for name in manifest if name.startswith("table-"))
    held = [
        range(e["first_row"], e["first_row"] + e["rows"]) for e in map(manifest.__getitem__, names)
    ]
    wanted = range(0, max(part.stop for part in held)) if rows is None else rows
    parts = []
    for name, part in zip(names, held, strict=True):
        start, stop = max(part.start, wanted.start), min(part.stop, wanted.stop)
        if start < stop or name == names[0]:
            shard = torch.load(_checked(folder, name, manifest), weights_only=True, mmap=True)
            first = min(start, part.stop) - part.start
            parts.append(_slice(shard, first, max(first, stop - part.start)))
    table = {name: _join(name, parts) for name in parts[0]}
    return table | {"first_row": torch.tensor(wanted.start)}


def _slice(shard: Mapping[str, Tensor], first: int, stop: int) -> dict[str, Tensor]:
    return {name: value[first:stop] if value.ndim else value for name, value in shard.items()}


def _join(name: str, parts: list[dict[str, Tensor]]) -> Tensor:
    if not parts[0][name].ndim:
        return parts[0][name]
    return torch.cat([part[name] for part in parts])


def _count(rows: Mapping[str, Tensor]) -> int:
    return next(value.shape[0] for value in rows.values() if value.ndim)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.exists():
        raise FileNotFoundError(
            f"checkpoint must hold {MANIFEST}, got none in {folder}; "
            "it is not complete, use another"
        )
    manifest = json.loads(path.read_text())
    if manifest["format"] != FORMAT:
        raise ValueError(
            f"checkpoint format must be {FORMAT}, got {manifest['format']} in {folder}; "
            "read it with the version that wrote it"
        )
    return manifest["files"]


def _checked(folder: Path, name: str, manifest: Mapping[str, Any]) -> Path:
    """The path of a file whose size and checksum are those of the manifest."""
    path, expected = folder / name, manifest[name]
    found = _entry(path) if path.exists() else {"bytes": 0, "sha256": "no file"}
    for key, value in found.items():
        if value != expected[key]:
            raise ValueError(
                f"{path} must have {key} {expected[key]}, got {value}; "
                "the file is damaged, use another checkpoint"
            )
    return path


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
