"""JSON files that stages leave for one another, read only after a look at their shape."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Shape", "read_object", "require_shape"]

Shape = Mapping[str, type | tuple[type, ...]]


def read_object(path: Path, shape: Shape, remedy: str) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        path: the file.
        shape: keys that must be there, and of which types their values must be.
        remedy: what to do about another one, for the message.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else; the message names file and key.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, got {error}; {remedy}") from error
    return require_shape(stored, shape, str(path), remedy)


def require_shape(stored: Any, shape: Shape, where: str, remedy: str) -> dict[str, Any]:
    """``stored``, which must be an object with these keys.

    Args:
        stored: what JSON said.
        shape: as in ``read_object``.
        where: the file, or the part of one, for the message.
        remedy: as in ``read_object``.

    Raises:
        ValueError: it is not.

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
            told = f"{key!r} of {where} must be {names}, got {_kind(stored[key])}"
            raise ValueError(f"{told}; {remedy}")
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
