"""Output folders that all ranks fill together: whole with a manifest, or not there.

``manifest.json`` is written last and names what was asked for, so that a stage which is asked for
the same again can tell that there is nothing to do.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from shardrec.pipeline.checkpoint.store import write_atomically
from shardrec.pipeline.outputs.json_files import read_object, require_shape
from shardrec.pipeline.outputs.staging import settle, staged_folder
from shardrec.pipeline.prepared.manifest import MANIFEST_NAME, FileEntry
from shardrec.pipeline.ranks import on_all_ranks, on_first_rank

__all__ = ["SharedOutput"]


@dataclass(frozen=True, slots=True)
class SharedOutput:
    """An output folder, on a file system that all ranks see.

    Attributes:
        path: the folder.
        format: what it holds, such as "shardrec.recommendations".
        request: JSON; everything the content depends on.
        group: the ranks that write; None for one process.
        force: whether an output of another request is replaced.
    """

    path: Path
    format: str
    request: Mapping[str, Any]
    group: dist.ProcessGroup | None
    force: bool = False

    def finished(self) -> dict[str, Any] | None:
        """The manifest where the folder holds what this request asks for.

        Raises:
            FileExistsError: the folder holds something else, and must not be replaced.
            ValueError: its manifest is damaged.

        Collectives: one gather of small objects.
        """
        return on_first_rank(self._finished, self.group)

    def write(
        self, part: Callable[[Path], list[FileEntry]], details: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Let every rank write its part, then finish the folder.

        Args:
            part: writes this rank's files below a folder and says which; where it fails on one
                rank it must raise on all of them.
            details: more for the manifest, asked for on rank 0 when all parts are written.

        Returns:
            The manifest, on every rank.

        Raises:
            OSError: a rank could not write; raised on all ranks, and ``path`` is as it was.

        Collectives: a few gathers of small objects, and those of ``part``.
        """
        with contextlib.ExitStack() as stack:

            def start() -> tuple[Path, Path]:
                return stack.enter_context(staged_folder(self.path, replace=self.force))

            result, _ = on_first_rank(start, self.group)
            written = part(result)
            gathered = on_all_ranks(lambda: written, self.group)
            files = [entry for entries in gathered for entry in entries]

            def finish() -> dict[str, Any]:
                manifest = self._manifest(files, details())
                write_atomically(result / MANIFEST_NAME, json.dumps(manifest, indent=1))
                stack.close()
                return manifest

            return on_first_rank(finish, self.group)

    def _manifest(self, files: list[FileEntry], details: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "format": self.format,
            "schema_version": 1,
            "request": dict(self.request),
            **details,
            "files": [dataclasses.asdict(entry) for entry in files],
        }

    def _finished(self) -> dict[str, Any] | None:
        settle(self.path)
        manifest = self._stored()
        if manifest is not None and manifest.get("format") == self.format:
            if not self.force and self._is_this(manifest):
                return manifest
            if self.force:
                return None
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            what = "an output of other input or options" if manifest else "other files"
            raise FileExistsError(
                f"output must be a new or empty folder, got {self.path}, which holds {what}; "
                "choose another name, or replace a former output with --force"
            )
        return None

    def _stored(self) -> dict[str, Any] | None:
        path = self.path / MANIFEST_NAME
        return (
            read_object(path, {}, "remove the folder, or choose another")
            if path.is_file()
            else None
        )

    def _is_this(self, manifest: dict[str, Any]) -> bool:
        """Whether it is of this request and its files are all there."""
        path, remedy = self.path / MANIFEST_NAME, "replace the output with --force"
        require_shape(manifest, {"request": dict, "files": list}, str(path), remedy)
        for entry in manifest["files"]:
            where = f"an entry of 'files' in {path}"
            require_shape(entry, {"path": str, "bytes": int}, where, remedy)
        return bool(manifest["request"] == self.request) and self._has_files(manifest)

    def _has_files(self, manifest: Mapping[str, Any]) -> bool:
        found = ((self.path / entry["path"], entry["bytes"]) for entry in manifest["files"])
        return all(path.is_file() and path.stat().st_size == size for path, size in found)
