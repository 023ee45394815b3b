"""Find the Parquet files at a path, glob or URI, and check the type of id columns."""

import fnmatch
import os
import re

import pyarrow as pa
import pyarrow.fs as fs
import pyarrow.parquet as pq

from shardrec.pipeline.outputs.addresses import warn_of_keys, without_keys

__all__ = [
    "check_path",
    "find_files",
    "id_kind",
    "is_text",
    "read_item_ids",
    "require_ids",
    "value_type",
]

_GLOB_CHARACTERS = "*?["
_SETTINGS = re.compile(r"\?\w+=[^/?&]*(&\w+=[^/?&]*)*$")


def check_path(name: str, path: str) -> None:
    """Raise ValueError, naming the option ``name``, for an empty path, a NUL, or no UTF-8."""
    if not path:
        raise ValueError(f"{name} must be a path, got ''; the current folder is '.'")
    if "\0" in path:
        raise ValueError(f"{name} must be a path without NUL, got {path!r}; check the path")
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be a path in UTF-8, got {path!r}; rename the file or folder"
        ) from error


def find_files(source: str, name: str = "events") -> tuple[fs.FileSystem, list[str]]:
    """The file system and the sorted Parquet files at ``source``.

    Args:
        source: a file, a folder (searched recursively, without names that start with "_" or "."),
            a glob, or a URI that pyarrow opens. An existing path is never treated as a glob.
        name: what the files are, for messages.

    Raises:
        FileNotFoundError: there is no such path, or no Parquet file.
        ValueError: the path is invalid, the URI has an unknown scheme, or a file name is not UTF-8.
    """
    check_path(name, source)
    warn_of_keys(name, source)
    shown = without_keys(source)
    folder, pattern = _split_glob(source)
    filesystem, root = _open(folder or ".", name)
    info = filesystem.get_file_info(root)
    if info.type == fs.FileType.NotFound:
        raise FileNotFoundError(f"{name} must be an existing path, got {shown!r}; check the path")
    if info.type == fs.FileType.File:
        return filesystem, [root]
    paths = _below(filesystem, root, pattern)
    if not paths:
        raise FileNotFoundError(
            f"{name} must name at least one .parquet file, got {shown!r} with none; check the path"
        )
    for path in paths:
        check_path(name, path)
    return filesystem, paths


def id_kind(dtype: pa.DataType) -> str:
    """The kind of an id column: "int64", "string", or the name of any other type."""
    value = value_type(dtype)
    if pa.types.is_integer(value):
        return "int64"
    return "string" if is_text(value) else str(dtype)


def require_ids(dtype: pa.DataType, name: str, path: str) -> str:
    """The kind of an id column, "int64" or "string".

    Raises:
        ValueError: the type is another one.
    """
    kind = id_kind(dtype)
    if kind not in ("int64", "string"):
        raise ValueError(
            f"column {name!r} of {path!r} must be integer or string, got {dtype}; convert the ids"
        )
    return kind


def value_type(dtype: pa.DataType) -> pa.DataType:
    """The value type of a dictionary type; any other type unchanged."""
    return dtype.value_type if pa.types.is_dictionary(dtype) else dtype


def is_text(dtype: pa.DataType) -> bool:
    """Whether the type is one of Arrow's three string types."""
    return bool(
        pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or dtype == pa.string_view()
    )


def _split_glob(source: str) -> tuple[str, str]:
    """The folder above the first part with a wildcard, and the pattern from there on.

    The query of a URI stays with the folder.

    Example:
        >>> _split_glob("s3://logs/day=*/part-?.parquet")
        ('s3://logs/', 'day=*/part-?.parquet')
        >>> _split_glob("s3://logs/day=*?region=eu-west-1&scheme=http")
        ('s3://logs/?region=eu-west-1&scheme=http', 'day=*')
    """
    settings = _SETTINGS.search(source) if "://" in source else None
    if settings is not None:
        folder, pattern = _split_glob(source[: settings.start()])
        return folder + settings[0], pattern
    parts = source.split("/")
    for count, part in enumerate(parts):
        if not any(character in part for character in _GLOB_CHARACTERS):
            continue
        if "://" in source or not os.path.exists("/".join(parts[: count + 1])):
            return "/".join([*parts[:count], ""]) if count else "", "/".join(parts[count:])
    return source, ""


def _open(text: str, name: str) -> tuple[fs.FileSystem, str]:
    try:
        if "://" in text:
            filesystem, path = fs.FileSystem.from_uri(text)
            return filesystem, path
        return fs.LocalFileSystem(), text
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(
            f"{name} must be a path or a URI that pyarrow opens, got {without_keys(text)!r} "
            f"({without_keys(str(error))}); use s3://, gs://, hdfs:// or file://"
        ) from None  # the error of pyarrow quotes keys


def _below(filesystem: fs.FileSystem, root: str, pattern: str) -> list[str]:
    found = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    files = [_path_of(info) for info in found if info.type == fs.FileType.File]
    skip = len(root.rstrip("/")) + 1
    return sorted(path for path in files if _is_wanted(path[skip:], pattern))


def _path_of(info: fs.FileInfo) -> str:
    try:
        return str(info.path)
    except UnicodeDecodeError as error:
        return os.fsdecode(error.object)


def _is_wanted(path: str, pattern: str) -> bool:
    """Whether a path below the folder is a visible Parquet file that matches the pattern."""
    if any(part[0] in "._" for part in path.split("/") if part):
        return False
    return path.endswith((".parquet", ".pq")) and (not pattern or _matches(path, pattern))


def _matches(path: str, pattern: str) -> bool:
    parts, wanted = path.split("/"), pattern.split("/")
    if "**" in wanted:
        return fnmatch.fnmatchcase(path, pattern.replace("**/", "*"))
    pairs = zip(parts, wanted, strict=False)
    return len(parts) == len(wanted) and all(fnmatch.fnmatchcase(a, b) for a, b in pairs)


def read_item_ids(name: str, source: str) -> pa.Array:
    """The column ``item_id`` of some Parquet files.

    Args:
        name: of the option, for messages.
        source: a file, a folder, a glob or a URI.

    Raises:
        FileNotFoundError: there is no Parquet file.
        ValueError: a file has no such column.
    """
    filesystem, paths = find_files(source, name)
    tables = []
    for path in paths:
        names = pq.read_schema(path, filesystem=filesystem).names
        if "item_id" not in names:
            raise ValueError(
                f"{name} must be Parquet with a column item_id, got {path!r} with "
                f"{', '.join(names)}; rename its column"
            )
        options = {"filesystem": filesystem, "page_checksum_verification": True}
        tables.append(pq.read_table(path, columns=["item_id"], **options))
    return pa.concat_tables(tables).column("item_id").combine_chunks()
