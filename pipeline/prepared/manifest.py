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

from shardrec.pipeline.outputs.json_files import read_object, require_shape
from shardrec.pipeline.outputs.staging import settle

FORMAT = "shardrec.prepared"
SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
ITEMS_NAME = "items.parquet"
ITEM_MAP_NAME = "item_map.parquet"
_HASH_BLOCK_BYTES = 1 << 20
_AGAIN = "delete the folder and prepare again"


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
        load_per_rank: for 2, 3, 4 and 8 ranks, each rank's share of the training events.
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


_SHAPES: dict[str, dict[str, type | tuple[type, ...]]] = {
    "counts": dict.fromkeys(("items", "train_sequences", "train_users", "validation_users"), int),
    "columns": {"user": dict, "item": dict, "time": dict, "weight": (dict, type(None))},
    "source": {"files": list},
}


def _parse(path: Path) -> Manifest:
    data = read_object(path, {}, _AGAIN)
    if data.get("format") != FORMAT:
        raise ValueError(
            f"{str(path)!r} must be a manifest of format {FORMAT!r}, got another file; "
            "name a folder that `shardrec prepare` wrote"
        )
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"the schema version of {str(path)!r} must be {SCHEMA_VERSION}, got "
            f"{data.get('schema_version')!r}; prepare the log again with this version of shardrec"
        )
    names = [field.name for field in dataclasses.fields(Manifest) if field.name != "files"]
    shape: dict[str, type] = dict.fromkeys(names, dict)
    require_shape(data, shape | {"shardrec_version": str, "files": list}, str(path), _AGAIN)
    for part, known in _SHAPES.items():
        require_shape(data[part], known, f"{part!r} in {path}", _AGAIN)
    return Manifest(**{name: data[name] for name in names}, files=_files(data["files"], path))


def _files(entries: list[Any], path: Path) -> tuple[FileEntry, ...]:
    shape = {"path": str, "bytes": int, "sha256": str, "rows": int, "row_groups": int}
    files = []
    for entry in entries:
        require_shape(entry, shape, f"an entry of 'files' in {path}", _AGAIN)
        files.append(FileEntry(**{name: entry[name] for name in shape}))
    return tuple(files)


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
