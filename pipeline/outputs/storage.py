"""Folders of files on a local disk or in an object store, through ``pyarrow.fs``.

A file is durable when it is closed. Nothing is renamed, because object stores cannot rename: a
folder is complete once the file that is written last exists. ``checkpoints.folder`` of a run may be
any such folder.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from shardrec.pipeline.outputs.addresses import without_keys
from shardrec.pipeline.outputs.file_systems import open_address
from shardrec.pipeline.outputs.json_files import LARGEST_BYTES

__all__ = ["Folder", "open_folder"]


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder on a local disk, or a prefix in an object store.

    Attributes:
        system: the ``pyarrow.fs`` file system.
        path: path in that file system.
        scheme: "file", "s3", "gs", …
    """

    system: Any
    path: str
    scheme: str = "file"

    def __truediv__(self, name: str) -> "Folder":
        """A folder inside this one; it need not exist."""
        return Folder(self.system, f"{self.path}/{name}", self.scheme)

    def __str__(self) -> str:
        """The path, with its scheme unless local; never shows keys or other settings."""
        return self.path if self.is_local else f"{self.scheme}://{self.path}"

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def is_local(self) -> bool:
        """Whether it is on a local (mounted) file system."""
        return self.scheme == "file"

    def folders(self) -> list[str]:
        """Sorted names of the subfolders; empty if the folder does not exist."""
        found = self.system.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        return sorted(one.base_name for one in found if one.type == fs.FileType.Directory)

    def size(self, name: str) -> int | None:
        """Size of a file in bytes; None if it is missing, or a link out of the folder."""
        if self.is_local and not _is_inside(self.path, name):
            return None
        found = self.system.get_file_info(f"{self.path}/{name}")
        return int(found.size) if found.type == fs.FileType.File else None

    def read(self, name: str, most_bytes: int = LARGEST_BYTES) -> bytes:
        """The content of a small file.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: the file has more than ``most_bytes``.
        """
        with self.open(name) as file:
            if file.size() > most_bytes:
                raise ValueError(f"{self}/{name} must have at most {most_bytes:,} bytes, got more")
            return bytes(file.read())

    def open(self, name: str) -> Any:
        """A file object open for reading, with ``read``, ``readinto``, ``seek`` and ``close``."""
        return self.system.open_input_file(f"{self.path}/{name}")

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[Any]:
        """Context manager: a file open for writing, durable when the block ends.

        Raises:
            OSError: the file cannot be written.
        """
        if self.is_local:
            os.makedirs(self.path, exist_ok=True)
        try:
            with self.system.open_output_stream(f"{self.path}/{name}") as file:
                yield file
            if self.is_local:
                _sync(f"{self.path}/{name}")
                _sync(self.path)
        except OSError as error:
            if error.errno is None or self.path in str(error):
                raise
            # A full disk says nothing of a path when it is written to.
            raise OSError(error.errno, os.strerror(error.errno), f"{self}/{name}") from error

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        with self.create(name) as file:
            file.write(content)

    def remove(self, first: str) -> None:
        """Delete the folder and its content, starting with the file ``first``."""
        if self.size(first) is not None:
            self.system.delete_file(f"{self.path}/{first}")
        found = self.system.get_file_info(self.path)
        if found.type == fs.FileType.Directory:
            self.system.delete_dir(self.path)


def open_folder(location: str | Path | Folder) -> Folder:
    """The folder at a path, or at an address such as ``s3://bucket/prefix``.

    Access keys and regions of object stores are taken from where the store's own tools take them.
    Settings may follow the address: ``s3://bucket/prefix?endpoint_override=host:9000&scheme=http``.

    Raises:
        ValueError: pyarrow has no file system for the address.
    """
    if isinstance(location, Folder):
        return location
    text = str(location)
    scheme, colon, _ = text.partition("://")
    if not colon:
        return Folder(fs.LocalFileSystem(), str(Path(text).absolute()))
    try:
        system, path = open_address(text, "folder")
    except (ValueError, OSError) as error:
        raise ValueError(
            f"folder must be a path or an address that pyarrow opens, got {without_keys(text)}; "
            f"use s3://bucket/prefix ({without_keys(str(error))})"
        ) from None  # the error of pyarrow quotes keys
    return Folder(system, path.rstrip("/"), scheme)


def _is_inside(folder: str, name: str) -> bool:
    """Whether a name in a local folder stays in it, links followed."""
    real = os.path.realpath(f"{folder}/{name}")
    return real.startswith(f"{os.path.realpath(folder)}/")


def _sync(path: str) -> None:
    """Wait until a local file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
