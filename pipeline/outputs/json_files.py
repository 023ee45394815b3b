"""Read JSON files with checked keys and types, and write files atomically.

All JSON that this project reads passes through ``parse_json``. A file may come from an untrusted
source: its size, depth and kind are limited, and every defect is a ValueError that names the file.
"""

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardrec.pipeline.outputs.staging import staged_file

__all__ = [
    "LARGEST_BYTES",
    "Shape",
    "is_inside",
    "parse_json",
    "read_json",
    "read_object",
    "read_text",
    "require_inside",
    "require_shape",
    "write_atomically",
]

Shape = Mapping[str, type | tuple[type, ...]]
"""Keys that an object must have, and the types that their values may have."""

LARGEST_BYTES = 256 << 20  # of a JSON file; the manifest of 100,000 files has 25 MB
_DEEPEST = 50


def read_object(path: Path, shape: Shape, remedy: str) -> dict[str, Any]:
    """The object in a JSON file, after checking its keys and their types.

    Args:
        path: the file.
        shape: the keys that the object must have, with their types.
        remedy: what to do about a wrong file, for the message.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the content is something else; the message names file and key.
    """
    try:
        stored = parse_json(read_text(path, LARGEST_BYTES))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, got {error}; {remedy}") from error
    return require_shape(stored, shape, str(path), remedy)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file is missing or holds something else."""
    try:
        stored = parse_json(read_text(path, LARGEST_BYTES))
    except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return {}
    return stored if isinstance(stored, dict) else {}


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: the text is not JSON, too large, nested too deeply, or has a key twice.

    Example:
        >>> parse_json('{"a": 1, "a": 2}')
        Traceback (most recent call last):
        ValueError: the key 'a' twice
    """
    if len(text) > LARGEST_BYTES:
        raise ValueError(f"more than {LARGEST_BYTES:,} bytes")
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(f"more than {_DEEPEST} levels") from None
    if _is_deeper(value, _DEEPEST):
        raise ValueError(f"more than {_DEEPEST} levels")
    return value


def read_text(path: Path, most_bytes: int, errors: str = "strict") -> str:
    """The UTF-8 text of a regular file; ``errors`` as in ``bytes.decode``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has more than ``most_bytes``, is not UTF-8, or is not a regular file (reading
            a pipe could block).
    """
    with open(path, "rb", opener=_open_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("something that is not a file")
        if os.fstat(file.fileno()).st_size > most_bytes:
            raise ValueError(f"more than {most_bytes:,} bytes")
        content = file.read()
    return content.decode(errors=errors)


def require_inside(path: Path, remedy: str) -> Path:
    """``path``, after checking that it is not a link to a file outside its folder.

    Raises:
        ValueError: it is such a link; the author of the folder could have any file read.
    """
    if not is_inside(path, path.parent):
        raise ValueError(
            f"{path} must be a file inside of its folder, got a link that leads out; {remedy}"
        )
    return path


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path, with links resolved, is below ``folder``."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def write_atomically(path: Path, text: str) -> None:
    """Write or replace a text file atomically and durably (fsync, then rename)."""
    with staged_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def require_shape(stored: Any, shape: Shape, where: str, remedy: str) -> dict[str, Any]:
    """``stored``, after checking that it is an object with these keys.

    Args:
        stored: a value from a JSON file.
        shape: as in ``read_object``.
        where: the file, or the part of a file, for the message.
        remedy: as in ``read_object``.

    Raises:
        ValueError: it is not; the message names the key.

    Example:
        >>> require_shape({"path": "a", "bytes": 3}, {"bytes": int}, "files[0]", "write it again")
        {'path': 'a', 'bytes': 3}
    """
    if not isinstance(stored, dict):
        raise ValueError(f"{where} must be a JSON object, got {_kind(stored)}; {remedy}")
    for key, kinds in shape.items():
        if key not in stored:
            found = ", ".join(map(str, stored)) or "nothing"
            raise ValueError(f"{where} must have the key {key!r}, got {found}; {remedy}")
        allowed = kinds if isinstance(kinds, tuple) else (kinds,)
        if type(stored[key]) not in allowed:
            names = " or ".join(_NAMES[kind] for kind in allowed)
            found = _kind(stored[key])
            raise ValueError(f"{key!r} of {where} must be {names}, got {found}; {remedy}")
    return stored


_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def _kind(value: Any) -> str:
    return _NAMES.get(type(value), type(value).__name__)


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without waiting for the other end of a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of two equal keys other readers may take the other one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} twice")
    return found


def _is_deeper(value: Any, levels: int) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_is_deeper(one, levels - 1) for one in parts)
