"""The manifest of a prepared folder: what is in it, where it came from, and whether it is complete.

``manifest.json`` is written last, so a folder that has one is whole; sizes and checksums say
whether it still is.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from shardrec.pipeline.staging import settle

FORMAT = "shardrec.prepared"
SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
ITEMS_NAME = "items.parquet"
ITEM_MAP_NAME = "item_map.parquet"
_HASH_BLOCK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """One Parquet file of a prepared folder.

    Attributes:
        path: relative to the folder, with "/" between its parts.
        bytes: size of the file.
        sha256: hexadecimal digest of the whole file.
        rows: rows in the file.
        row_groups: row groups in the file.
    """

    path: str
    bytes: int
    sha256: str
    rows: int
    row_groups: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Everything a reader may want to know before it opens a file.

    Attributes:
        shardrec_version: version that wrote the folder.
        config: the options of ``prepare`` that change its output.
        source: ``{"files": [{path, bytes, rows, footer_sha256}]}`` of the event log, and ``items``,
            ``{path, rows, sha256, fingerprint}``, where the items of a former folder were kept.
        columns: name and type of user, item, time and weight (None without weights).
        split: kind, targets, validation, and the cuts in the log's own time unit.
        counts: events, users, items, sequences and targets, kept and dropped.
        quantiles: of the training sequences' lengths and of the items' counts.
        load_per_rank: for 2, 4 and 8 ranks, each rank's share of the training events.
        files: every Parquet file of the folder.
    """

    shardrec_version: str
    config: dict[str, Any]
    source: dict[str, Any]
    columns: dict[str, Any]
    split: dict[str, Any]
    counts: dict[str, int]
    quantiles: dict[str, dict[str, int]]
    load_per_rank: dict[str, list[float]]
    files: tuple[FileEntry, ...]

    @property
    def fingerprint(self) -> str:
        """Short hash of the files' checksums: equal for equal data."""
        files = sorted((file.path, file.sha256) for file in self.files)
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]

    def file(self, path: str) -> FileEntry:
        """The entry of one file.

        Raises:
            KeyError: the manifest lists no such file.
        """
        for entry in self.files:
            if entry.path == path:
                return entry
        raise KeyError(path)


def holds_prepared(folder: Path) -> bool:
    """Whether ``prepare`` wrote what is in ``folder``, complete or not, in any version."""
    try:
        data = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(data, Mapping) and data.get("format") == FORMAT


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` into ``folder`` and wait until it is on the disk."""
    data = {"format": FORMAT, "schema_version": SCHEMA_VERSION} | dataclasses.asdict(manifest)
    with open(folder / MANIFEST_NAME, "w", encoding="utf-8") as stream:
        json.dump(data, stream, indent=2)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_manifest(
    folder: Path, *, verify_checksums: bool = False, only: Collection[str] | None = None
) -> Manifest:
    """The manifest of ``folder``, after checking that the files it lists are there.

    Args:
        folder: what ``prepare`` wrote.
        verify_checksums: also read every file and compare its digest.
        only: paths of the files to check; None checks all.

    Raises:
        FileNotFoundError: the folder has no manifest, or a listed file is gone.
        ValueError: the manifest is not ours, of another schema version, or a file has changed.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        settle(folder)
    if not path.is_file():
        raise FileNotFoundError(
            f"a prepared folder must hold {MANIFEST_NAME}, got {str(folder)!r}; "
            "run `shardrec prepare` to make one"
        )
    manifest = _parse(path)
    for entry in manifest.files:
        if only is None or entry.path in only:
            _check_file(folder, entry, verify_checksums)
    return manifest


def describe_file(folder: Path, path: str, rows: int, row_groups: int) -> FileEntry:
    """The entry of a file that has just been written below ``folder``."""
    size = (folder / path).stat().st_size
    digest = sha256(folder / path)
    return FileEntry(path=path, bytes=size, sha256=digest, rows=rows, row_groups=row_groups)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _parse(path: Path) -> Manifest:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} must be JSON, got {error}; delete the folder and prepare again"
        ) from error
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise ValueError(
            f"{str(path)!r} must be a manifest of format {FORMAT!r}, got another file; "
            "name a folder that `shardrec prepare` wrote"
        )
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"the schema version of {str(path)!r} must be {SCHEMA_VERSION}, got "
            f"{data.get('schema_version')!r}; prepare the log again with this version of shardrec"
        )
    names = [field.name for field in dataclasses.fields(Manifest)]
    missing = [name for name in names if name not in data]
    if missing:
        raise ValueError(
            f"{str(path)!r} must have the keys {', '.join(names)}, got none of "
            f"{', '.join(missing)}; prepare the log again"
        )
    files = tuple(FileEntry(**entry) for entry in data["files"])
    return Manifest(**{name: data[name] for name in names if name != "files"}, files=files)


def _check_file(folder: Path, entry: FileEntry, verify_checksum: bool) -> None:
    path = folder / entry.path
    if not path.is_file():
        raise FileNotFoundError(
            f"{str(path)!r} must exist because the manifest lists it, got no such file; "
            "delete the folder and prepare again"
        )
    size = path.stat().st_size
    if size != entry.bytes:
        raise ValueError(
            f"{str(path)!r} must have {entry.bytes} bytes, got {size}; "
            "delete the folder and prepare again"
        )
    if verify_checksum and sha256(path) != entry.sha256:
        raise ValueError(
            f"the SHA-256 of {str(path)!r} must be {entry.sha256}, got another; "
            "delete the folder and prepare again"
        )
