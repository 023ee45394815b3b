"""The output of a stage: complete, with the request that produced it, or absent.

An output is a folder with a manifest, which is written last, or one file. The protocol of a stage:
1. ``find`` returns the manifest if an output for the same request is complete: the stage is
   idempotent. Other content is refused, unless ``force`` allows replacing it.
2. ``write`` creates and locks a staging folder next to ``path``; all ranks write their files in it.
3. ``finish`` gathers the entries of all files; rank 0 writes the manifest.
4. At the end of ``write``, rank 0 renames the staging folder to ``path`` and releases the lock.
Each phase ends with an all-gather, so an error on one rank is raised on all ranks.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from shardrec.pipeline.outputs.addresses import stored_without_keys
from shardrec.pipeline.outputs.files import MANIFEST_NAME, FileEntry, check_files
from shardrec.pipeline.outputs.formats import Format
from shardrec.pipeline.outputs.json_files import (
    read_json,
    read_object,
    require_inside,
    require_shape,
    write_atomically,
)
from shardrec.pipeline.outputs.signing import require_signature, signed
from shardrec.pipeline.outputs.staging import (
    find_file,
    place_of,
    require_place,
    require_writable,
    settle,
    staged_folder,
)

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["StageOutput", "read_output"]

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class StageOutput:
    """The output for one request, on a file system shared by all ranks.

    Attributes:
        path: the folder or file.
        format: the format of its content.
        request: everything that the content depends on, as JSON.
        force: whether to replace an output for another request.
        group: the ranks that write it together; None for one process, which needs no torch.
        stored: function that reads the manifest, with the request under "request", from an existing
            path; it returns an empty dict if there is no manifest. Needed if the request is stored
            in another way.
    """

    path: Path
    format: Format
    request: Mapping[str, Any]
    force: bool = False
    group: "dist.ProcessGroup | None" = None
    stored: Callable[[Path], dict[str, Any]] | None = None

    def find(self) -> dict[str, Any] | None:
        """The manifest if the output is already complete; None if it must be written.

        Raises:
            FileExistsError: the path holds something else that must not be replaced.

        Collectives: one all-gather of small objects.
        """
        return self._on_first_rank(self._find)

    @contextlib.contextmanager
    def write(self) -> Iterator[tuple[Path, Path]]:
        """Context manager: a staging folder, renamed to ``path`` at the end, and a temporary one.

        If the block raises, ``path`` is left unchanged; the block must then raise on all ranks.

        Raises:
            FileExistsError: another process is writing the same output.
            OSError: nothing can be written next to ``path``.

        Collectives: two all-gathers of small objects.
        """
        # Only rank 0 locks, makes and renames folders; the others wait for it.
        with contextlib.ExitStack() as stack:
            folders = staged_folder(self.path, replace=self.force)
            yield self._on_first_rank(lambda: stack.enter_context(folders))
            self._on_first_rank(stack.close)

    def finish(
        self,
        details: Callable[[], Mapping[str, Any]],
        folder: Path | None = None,
        files: Sequence[FileEntry] = (),
    ) -> dict[str, Any]:
        """Write the manifest (or the single output file) and return its content on every rank.

        Args:
            details: returns further content of the manifest; called on rank 0 when all files are
                written.
            folder: the staging folder of ``write``; None if the output is one file.
            files: entries of the files that this rank has written.

        Raises:
            OSError: the manifest cannot be written.

        Collectives: two all-gathers of small objects.
        """
        entries = [entry for part in self._on_all_ranks(lambda: files) for entry in part]

        def finish() -> dict[str, Any]:
            manifest = self._head() | dict(details())
            if folder is not None:
                manifest["files"] = [dataclasses.asdict(entry) for entry in entries]
            manifest = signed(manifest) if self.format.is_signed else manifest
            path = self.path if folder is None else folder / self.format.manifest
            path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(manifest, indent=1, allow_nan=folder is not None)
            write_atomically(path, text)
            return manifest

        return self._on_first_rank(finish)

    def _head(self) -> dict[str, Any]:
        version = {"format": self.format.name, "schema_version": self.format.version}
        return version | {"request": stored_without_keys(dict(self.request))}

    def _find(self) -> dict[str, Any] | None:
        found = self._find_result()
        if found is None:
            require_place(self.path)
            if not self.format.is_folder:  # where it is one, the staging folder shows it
                require_writable(self.path)
        return found

    def _find_result(self) -> dict[str, Any] | None:
        place = place_of(self.path)
        settle(place)
        if self._is_free(place):
            return None
        stored = self._read()
        if stored.get("format") != self.format.name:
            what = "holds other files" if self.path.is_dir() else "is another file"
            made = f"a complete result of `{self.format.maker}`, got {self.path}, which {what}"
            raise self._refusal(made, "delete it")
        if self.force:
            return None
        self._require_whole(stored)
        asked, before = self._head()["request"], stored["request"]
        names = [name for name, value in asked.items() if value != before.get(name)]
        if names:
            found = f"{self.path} of other input or options, which differs in {', '.join(names)}"
            raise self._refusal(f"hold this very result, got {found}", "replace it with --force")
        return stored

    def _is_free(self, place: Path) -> bool:
        """Whether nothing is there, or an empty folder where a folder is wanted."""
        if not os.path.lexists(place):
            return True
        return self.format.is_folder and place.is_dir() and not any(place.iterdir())

    def _read(self) -> dict[str, Any]:
        if self.stored is not None:
            return self.stored(self.path)
        if not self.format.is_folder:
            return read_json(self.path)
        return read_json(_find_manifest(self.path, self.format) or self.path / MANIFEST_NAME)

    def _require_whole(self, stored: dict[str, Any]) -> None:
        try:
            if stored.get("schema_version") != self.format.version:
                raise ValueError(f"it is of schema version {stored.get('schema_version')!r}")
            require_shape(stored, self.format.shape, str(self.path), "it is damaged")
            if self.format.is_signed:
                require_signature(stored, self.path)
            if self.format.is_folder:
                check_files(self.path, stored["files"], "it is damaged", verify=False)
        except (OSError, ValueError) as error:
            whole = f"a complete result, got {self.path} ({error})"
            raise self._refusal(whole, "replace it with --force") from error

    def _refusal(self, expected: str, choice: str) -> FileExistsError:
        noun = self.format.noun
        return FileExistsError(
            f"output must be a new {noun} or {expected}; choose another {noun} or {choice}"
        )

    def _on_first_rank(self, work: Callable[[], Result]) -> Result:
        if self.group is None:
            return work()
        from shardrec.pipeline.ranks import on_first_rank  # needs torch

        return on_first_rank(work, self.group)

    def _on_all_ranks(self, work: Callable[[], Result]) -> list[Result]:
        if self.group is None:
            return [work()]
        from shardrec.pipeline.ranks import on_all_ranks  # needs torch

        return on_all_ranks(work, self.group)


def read_output(path: Path, format: Format) -> dict[str, Any]:
    """The manifest of a complete output, or the content if the output is one file.

    Raises:
        FileNotFoundError: there is no such output.
        ValueError: it is of another format or version, or damaged; the message names file and key.
    """
    maker = f"`{format.maker}`"
    file = _find_manifest(path, format) if format.is_folder else path
    if file is None or not file.is_file():
        raise FileNotFoundError(
            f"{format.what} must hold {format.manifest}, got {path}; run {maker} to make one"
            if format.is_folder
            else f"there must be {format.what} {path}, got none; run {maker} first"
        )
    if format.is_folder:
        require_inside(file, format.remedy)
    stored = read_object(file, {}, format.remedy)
    found = stored.get("format"), stored.get("schema_version")
    if found != (format.name, format.version):
        what = "a manifest" if format.is_folder else format.what
        raise ValueError(
            f"{file} must be {what} of format {format.name!r}, version {format.version}, got "
            f"{found[0]!r}, {found[1]!r}; choose one that {maker} of this version wrote"
        )
    if format.is_signed:
        require_signature(stored, file)
    return require_shape(stored, format.shape, str(file), format.remedy)


def _find_manifest(folder: Path, format: Format) -> Path | None:
    """The manifest of a folder; lists of version 0.2.0 have one named like those of the others."""
    return find_file(folder, format.manifest) or find_file(folder, MANIFEST_NAME)
