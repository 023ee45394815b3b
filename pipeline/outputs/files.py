"""Manifest entries for the files of an output, and their check: sizes and checksums."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from shardrec.pipeline.outputs.json_files import Shape, is_inside, require_shape

MANIFEST_NAME = "manifest.json"
# In a run: metrics of the baselines on the validation users.
BESIDE = "baselines.json"
_HASH_BLOCK_BYTES = 1 << 20
_ENTRY: Shape = {"path": str, "bytes": int, "sha256": str}


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """Manifest entry of one file: path, size, checksum, rows.

    Attributes:
        path: relative to the folder, with "/" between its parts.
        bytes: size of the file.
        sha256: hexadecimal digest of the whole file.
        rows: rows in the file; 0 if it is not Parquet.
        row_groups: row groups in the file; 0 if it is not Parquet.
    """

    path: str
    bytes: int
    sha256: str
    rows: int
    row_groups: int


def describe_file(folder: Path, path: str, rows: int = 0, row_groups: int = 0) -> FileEntry:
    """The entry of a file that was just written below ``folder``."""
    return FileEntry(
        path=path,
        bytes=(folder / path).stat().st_size,
        sha256=sha256(folder / path),
        rows=rows,
        row_groups=row_groups,
    )


def describe_parquet(folder: Path, path: str) -> FileEntry:
    """The entry of a Parquet file that was just written below ``folder``."""
    from pyarrow.parquet import read_metadata  # not needed to read manifests

    footer = read_metadata(folder / path)
    return describe_file(folder, path, footer.num_rows, footer.num_row_groups)


def check_files(folder: Path, entries: Iterable[Any], remedy: str, *, verify: bool) -> None:
    """Raise an error if a file of an output is missing or differs from the manifest.

    Args:
        folder: the output.
        entries: the value of "files" in its manifest.
        remedy: what to do about a wrong file, for the message.
        verify: also compare checksums, for which every file is read.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file has changed or lies outside of the folder, or an entry is damaged.
    """
    for entry in entries:
        require_shape(entry, _ENTRY, f"an entry of 'files' in {folder / MANIFEST_NAME}", remedy)
        path = _inside(folder, entry["path"], remedy)
        if not path.is_file():
            raise FileNotFoundError(
                f"{str(path)!r} must exist because the manifest lists it, got no such file; "
                f"{remedy}"
            )
        size = path.stat().st_size
        if verify and sha256(path) != entry["sha256"]:
            raise ValueError(
                f"the SHA-256 of {str(path)!r} must be {entry['sha256']}, got another; {remedy}"
            )
        if size != entry["bytes"]:
            raise ValueError(
                f"{str(path)!r} must have {entry['bytes']} bytes, got {size}; {remedy}"
            )


def _inside(folder: Path, name: str, remedy: str) -> Path:
    """The path of a listed file, which neither its name nor a link may lead out of the folder."""
    parts, path = PurePosixPath(name), folder / name
    leads_out = parts.is_absolute() or ".." in parts.parts or "\0" in name
    if leads_out or not is_inside(path, folder):
        raise ValueError(
            f"an entry of 'files' in {folder / MANIFEST_NAME} must be a file inside of the folder, "
            f"got {name!r}; {remedy}"
        )
    return path


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as stream:
        return digest(stream)


def digest(stream: BinaryIO) -> str:
    """Hexadecimal SHA-256 of the rest of a stream, read in blocks."""
    found = hashlib.sha256()
    while block := stream.read(_HASH_BLOCK_BYTES):
        found.update(block)
    return found.hexdigest()
