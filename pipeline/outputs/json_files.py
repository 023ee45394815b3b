"""Read JSON files with checked keys and types, and write files atomically."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardrec.pipeline.outputs.staging import staged_file

__all__ = ["Shape", "read_json", "read_object", "require_shape", "write_atomically"]

Shape = Mapping[str, type | tuple[type, ...]]
"""Keys that an object must have, and the types that their values may have."""


def read_object(path: Path, shape: Shape, remedy: str) -> dict[str, Any]:
    """The object in a JSON file, with its keys checked.

    Args:
        path: the file.
        shape: the keys it must have.
        remedy: what to do about a file without them, for the message.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else; the message names file and key.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, got {error}; {remedy}") from error
    return require_shape(stored, shape, str(path), remedy)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file or it holds something else."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return {}
    return stored if isinstance(stored, dict) else {}


def write_atomically(path: Path, text: str) -> None:
    """Write or replace a text file atomically and durably (fsync, then rename)."""
    with staged_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def require_shape(stored: Any, shape: Shape, where: str, remedy: str) -> dict[str, Any]:
    """Return ``stored`` after checking that it is an object with these keys.

    Args:
        stored: a value from a JSON file.
        shape: as in ``read_object``.
        where: the file, or the part of one, for the message.
        remedy: as in ``read_object``.

    Raises:
        ValueError: it is something else.

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
