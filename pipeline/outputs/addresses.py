"""Addresses such as ``s3://bucket/folder``: what they open, and how keys stay out of files.

An address such as ``s3://KEY:SECRET@bucket/run`` opens a store, and would otherwise be stored with
the run, shown in its report and quoted by errors.
"""

import logging
import re
from typing import Any
from urllib.parse import quote

import pyarrow as pa
from pyarrow import fs

__all__ = ["SETTINGS", "open_address", "stored_without_keys", "warn_of_keys", "without_keys"]

SETTINGS = re.compile(r"\?\w+=[^/?&]*(&\w+=[^/?&]*)*$")
_SPELLINGS = {"s3a": "s3", "s3n": "s3"}  # Hadoop's names of S3
_RESERVED = "/:@!$&'()*+,;=~"
# All between "://" and "@": up to the first slash, or, after a colon, a secret with slashes in it.
_USER_INFO = re.compile(
    r"(?<=://)(?:[^\s/?#'\"@]*|[^\s/?#'\"@:]+:(?!\d+[/?#])[^\s'\"@]*)@(?=[^\s'\"])"
)
_QUERY = re.compile(r"\?[^\s'\"#?]+=[^\s'\"#?]*")
_SECRET_NAME = re.compile("secret|token|passw|pwd|key|sig|sas|credential|auth", re.IGNORECASE)


def open_address(text: str, name: str) -> tuple[Any, str]:
    """The ``pyarrow.fs`` file system, and the path in it.

    Blanks and other characters that a URI cannot hold may be typed as they are. A percent sign
    starts an escape where that names something that exists, else it stands for itself.

    Args:
        text: a local path, or an address; settings may follow, as in ``s3://bucket/x?region=eu``.
        name: what it is, for messages.

    Raises:
        ValueError: pyarrow has no file system for the address.
    """
    scheme, colon, rest = text.partition("://")
    if not colon:
        return fs.LocalFileSystem(), text
    found = SETTINGS.search(rest)
    settings = found[0] if found else ""
    place, slash, path = rest.removesuffix(settings).partition("/")
    scheme = _SPELLINGS.get(scheme.lower(), scheme.lower())
    head, shown = f"{scheme}://{place}{slash}", without_keys(text)

    def opened(safe: str) -> tuple[Any, str]:
        return _from_uri(head + quote(path, safe=safe) + settings, shown, name)

    escaped = opened(f"{_RESERVED}%")
    if "%" not in path or _exists(*escaped):
        return escaped
    literal = opened(_RESERVED)
    return literal if _exists(*literal) else escaped


def _exists(system: Any, path: str) -> bool:
    return bool(system.get_file_info(path).type != fs.FileType.NotFound)


def _from_uri(uri: str, shown: str, name: str) -> tuple[Any, str]:
    try:
        system, path = fs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        reason = without_keys(str(error).replace(uri, shown))
        raise ValueError(
            f"{name} must be a path or a URI that pyarrow opens, got {shown!r} ({reason}); "
            "use s3://, gs://, hdfs:// or file://"
        ) from None  # the error of pyarrow quotes keys
    return system, path


def without_keys(text: str) -> str:
    """A text without the keys in its addresses: user, password and secret query parameters.

    Example:
        >>> without_keys("got 's3://KEY:SECRET@bucket/run?scheme=http&session_token=T'; check it")
        "got 's3://bucket/run?scheme=http'; check it"
    """
    return _QUERY.sub(lambda found: _cleaned(found[0]), _USER_INFO.sub("", text))


def stored_without_keys(value: Any) -> Any:
    """A JSON value with ``without_keys`` applied to every text in it."""
    if isinstance(value, str):
        return without_keys(value)
    if isinstance(value, dict):
        return {name: stored_without_keys(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(stored_without_keys(one) for one in value)
    return value


def warn_of_keys(name: str, address: str | None) -> None:
    """Warn where the option ``name`` holds keys, which every user of the machine can see."""
    if address is not None and without_keys(address) != address:
        logging.getLogger(__name__).warning(
            "%s holds keys, which process lists and shell histories show; they are left out of "
            "files and messages, so later stages need them from the environment anyway "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or MLFLOW_TRACKING_TOKEN): give them "
            "there",
            name,
        )


def _cleaned(query: str) -> str:
    """A query, with its "?", without the secret parameters."""
    parts = query[1:].split("&")
    kept = [part for part in parts if not _SECRET_NAME.search(part.partition("=")[0])]
    return f"?{'&'.join(kept)}" if kept else ""
