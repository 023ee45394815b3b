"""Open the file system of an address such as ``s3://bucket/folder``."""

import re
from typing import Any
from urllib.parse import quote

import pyarrow as pa
from pyarrow import fs

from shardrec.pipeline.outputs.addresses import without_keys

__all__ = ["SETTINGS", "open_address"]

SETTINGS = re.compile(r"\?\w+=[^/?&]*(&\w+=[^/?&]*)*$")
_SPELLINGS = {"s3a": "s3", "s3n": "s3"}  # Hadoop's names of S3
_RESERVED = "/:@!$&'()*+,;=~"


def open_address(text: str, name: str) -> tuple[Any, str]:
    """The ``pyarrow.fs`` file system of an address, and the path in it.

    Blanks and other characters that a URI cannot hold need no escaping. Percent escapes are decoded
    if the decoded path exists, and kept as they are otherwise.

    Args:
        text: a local path, or an address; settings may follow, as in ``s3://bucket/x?region=eu``.
        name: option that holds the address, for messages.

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
