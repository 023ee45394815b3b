"""The manifest of a checkpoint: its files with their sizes and checksums.

It is written last: a folder without a manifest, or with a truncated one, is no checkpoint.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from shardrec.pipeline.outputs.files import digest
from shardrec.pipeline.outputs.json_files import Shape, parse_json, require_shape
from shardrec.pipeline.outputs.signing import require_signature, signed
from shardrec.pipeline.outputs.storage import Folder

__all__ = ["BLOCK_BYTES", "MANIFEST", "DamagedCheckpointError", "FileEntry", "Manifest"]

MANIFEST = "manifest.json"
FORMAT = 2
BLOCK_BYTES = 1 << 24
ANOTHER = "it is not complete or of another version, use another checkpoint"


class DamagedCheckpointError(ValueError):
    """A file of a checkpoint is missing, truncated or altered; the message names it."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, content: bytes) -> "FileEntry":
        """Size and SHA-256 of this content."""
        return cls(len(content), hashlib.sha256(content).hexdigest())


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of a complete checkpoint, and whether it is the best one.

    Attributes:
        folder: folder of the checkpoint.
        best: whether it was the best checkpoint of its run when it was written.
        files: size and checksum of each file, by name.
        run: id of its run; None for a checkpoint written without, as all before version 0.3.
        name: name of the folder that it was written to; None where ``run`` is None.
    """

    folder: Folder
    best: bool
    files: Mapping[str, FileEntry]
    run: str | None = None
    name: str | None = None

    @classmethod
    def find(cls, folder: Folder) -> "Manifest | None":
        """The manifest in ``folder``; None if there is none.

        Raises:
            DamagedCheckpointError: the manifest is truncated or malformed.
            SignatureError: a signing key is set, and the manifest was not signed with it.
            ValueError: the manifest is of another format.
        """
        if folder.size(MANIFEST) is None:
            return None
        where = f"{folder}/{MANIFEST}"
        try:
            stored = parse_json(folder.read(MANIFEST))
        except ValueError as error:
            raise DamagedCheckpointError(f"{where} must be JSON, got {error}; {ANOTHER}") from error
        found = stored.get("format") if isinstance(stored, dict) else None
        if isinstance(found, int) and found != FORMAT:
            raise ValueError(
                f"checkpoint format must be {FORMAT}, got {found} in {folder}; evaluate and export "
                "it with the version of shardrec that wrote it, or train again"
            )
        try:
            shape: Shape = {"format": int, "best": bool, "files": dict}
            known = require_shape(stored, shape, where, ANOTHER)
            texts: Shape = {key: (str, type(None)) for key in ("run", "name") if key in known}
            require_shape(known, texts, where, ANOTHER)
            files = {name: _entry(name, one, where) for name, one in known["files"].items()}
        except ValueError as error:
            raise DamagedCheckpointError(str(error)) from None
        require_signature(stored, where)
        return cls(folder, known["best"], files, known.get("run"), known.get("name"))

    @classmethod
    def read(cls, folder: Folder) -> "Manifest":
        """The manifest of a folder that must have one; also raises what ``find`` raises.

        Raises:
            FileNotFoundError: there is none: the checkpoint is not complete.
        """
        found = cls.find(folder)
        if found is None:
            raise FileNotFoundError(
                f"checkpoint must hold {MANIFEST}, got none in {folder}; "
                "it is not complete, use another"
            )
        return found

    def write(self) -> None:
        """Write ``manifest.json``, which completes the checkpoint; all its files must exist."""
        entries = {name: dataclasses.asdict(one) for name, one in sorted(self.files.items())}
        stored = {"format": FORMAT, "best": self.best, "files": entries}
        if self.run is not None:
            stored |= {"run": self.run, "name": self.name}
        self.folder.write(MANIFEST, json.dumps(signed(stored), indent=1).encode())

    def check_sizes(self) -> None:
        """Raise DamagedCheckpointError if a file is missing or has another size."""
        for name in self.files:
            self._check_name(name)
            self._check_size(name)

    def check(self, name: str) -> None:
        """Raise DamagedCheckpointError if a file is not listed or differs in size or checksum."""
        self._check_name(name)
        self._check_size(name)
        with self.folder.open(name) as file:
            found = digest(file)
        if found != self.files[name].sha256:
            raise self._damaged(name, "sha256", self.files[name].sha256, found)

    def _check_name(self, name: str) -> None:
        if name not in self.files or "/" in name or "\0" in name:
            raise DamagedCheckpointError(
                f"{self.folder} must have a manifest that names {name!r} and files inside of it, "
                "got one that does not; use another checkpoint"
            )

    def _check_size(self, name: str) -> None:
        found = self.folder.size(name)
        if found != self.files[name].size:
            raise self._damaged(name, "bytes", self.files[name].size, found)

    def _damaged(self, name: str, what: str, expected: object, found: object) -> Exception:
        shown = "no file" if found is None else found
        return DamagedCheckpointError(
            f"{self.folder}/{name} must have {what} {expected}, got {shown}; "
            "the file is damaged, use another checkpoint"
        )


def _entry(name: str, stored: object, where: str) -> FileEntry:
    shape = {"size": int, "sha256": str}
    known = require_shape(stored, shape, f"{name!r} in {where}", ANOTHER)
    return FileEntry(known["size"], known["sha256"])
