"""Find the files of a log at a path, glob or URI, recognised by their first bytes."""

import dataclasses
import fnmatch
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as fs
import pyarrow.parquet as pq

from shardrec.pipeline.outputs.addresses import warn_of_keys, without_keys
from shardrec.pipeline.outputs.file_systems import SETTINGS, open_address
from shardrec.pipeline.prepared.ids import plain_ids, require_ids

__all__ = [
    "FileKind",
    "Found",
    "check_path",
    "find_files",
    "natural_order",
    "partition_values",
    "read_item_ids",
]

_GLOB_CHARACTERS = "*?["
_TABLES = ("_delta_log", ".hoodie")
_ICEBERG = ".metadata.json"
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
_MAGIC_BYTES = 8
_READERS = 16
# First bytes -> format, or codec, of a file; "other" formats hold events that are not read.
_FORMATS = {b"PAR1": "parquet", b"PARE": "parquet"}
_OTHERS = {b"ORC": "ORC", b"Obj\x01": "Avro", b"ARROW1": "Arrow"}
_CODECS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22M\x18": "lz4"}
_PACKED = {b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}
_PARQUET = (".parquet", ".pq")
_SUFFIXES = {".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".tsv": "csv"}
_SUFFIXES |= {".json": "json", ".jsonl": "json", ".ndjson": "json"}
_CODEC_SUFFIXES = (".gz", ".gzip", ".bz2", ".zst", ".zstd", ".lz4", ".xz", ".zip", ".snappy")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FileKind:
    """Format of a file, "parquet", "csv" or "json", and the codec that compresses it, if any."""

    format: str
    codec: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The result of ``find_files``: the files of a log.

    Attributes:
        filesystem: holds the files.
        kinds: format and codec of each file by path, in natural order.
        passed_over: visible files that hold no events and are not read, in natural order.
    """

    filesystem: fs.FileSystem
    kinds: Mapping[str, FileKind]
    passed_over: tuple[str, ...] = ()

    @property
    def paths(self) -> list[str]:
        """The paths of the files, in natural order."""
        return list(self.kinds)

    def parquet_paths(self, name: str) -> list[str]:
        """The paths of the files, after checking that all are Parquet.

        Args:
            name: option that names the files, for the message.

        Raises:
            ValueError: a file is CSV or JSON lines.
        """
        for path, kind in self.kinds.items():
            if kind.format != "parquet":
                raise ValueError(
                    f"{name} must be Parquet, got {kind.format} in {path!r}; write it as Parquet"
                )
        return self.paths


def check_path(name: str, path: str) -> None:
    """Raise ValueError, naming the option ``name``, if a path is empty, has a NUL or no UTF-8."""
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


def find_files(source: str, name: str = "events") -> Found:
    """The Parquet, CSV and JSON lines files at ``source``.

    Parquet is recognised by its first bytes, whatever the file's name; CSV and JSON lines by the
    suffix, which the suffix of a codec may follow.

    Args:
        source: a file, a folder (searched recursively, without names that start with "_" or "."),
            a glob of files and folders, or a URI that pyarrow opens. An existing path is never
            treated as a glob.
        name: option that names the files, for messages.

    Raises:
        FileNotFoundError: there is no such path, or no file that can be read.
        ValueError: the path is invalid, the URI has an unknown scheme, a file name is not UTF-8,
            the files are of two formats or of one that is not read, or they belong to a table whose
            metadata say which of them are current.
    """
    check_path(name, source)
    warn_of_keys(name, source)
    folder, pattern = _split_glob(source)
    filesystem, root = open_address(folder or ".", name)
    source = without_keys(source)  # in messages
    info = filesystem.get_file_info(root)
    if info.type == fs.FileType.NotFound:
        raise FileNotFoundError(f"{name} must be an existing path, got {source!r}; check the path")
    _refuse_table(name, source, _tables_above(filesystem, root))
    if info.type == fs.FileType.File:
        kind = _kind(filesystem, info)
        if kind is None:
            raise ValueError(
                f"{name} must be Parquet, or CSV or JSON lines whose name ends in .csv, .tsv, "
                f".json, .jsonl or .ndjson, got {source!r}; rename or convert it"
            )
        return Found(filesystem=filesystem, kinds={root: kind})
    return _find_below(filesystem, root, pattern, source, name)


def partition_values(path: str) -> dict[str, str | None]:
    """The values in a path's folder names, such as ``day=2024-01-31``; the innermost folder wins.

    Example:
        >>> partition_values("log/day=2024-01-31 08%3A00/kind=__HIVE_DEFAULT_PARTITION__/a.parquet")
        {'day': '2024-01-31 08:00', 'kind': None}
    """
    pairs = (part.partition("=") for part in path.split("/")[:-1] if "=" in part[1:])
    return {unquote(key): None if value == _NO_VALUE else unquote(value) for key, _, value in pairs}


def read_item_ids(name: str, source: str) -> pa.Array:
    """(n,) the column ``item_id`` of some Parquet files, as int64 or large_string.

    Args:
        name: option that names the files, for messages.
        source: a file, a folder, a glob or a URI.

    Raises:
        FileNotFoundError: there is no Parquet file.
        ValueError: a file has no such column, or its ids are of another kind than in the first.
    """
    found, chunks = find_files(source, name), []
    for path in found.parquet_paths(name):
        with found.filesystem.open_input_file(path) as stream:
            schema = pq.ParquetFile(stream).schema_arrow
            if "item_id" not in schema.names:
                raise ValueError(
                    f"{name} must be Parquet with a column item_id, got {path!r} with "
                    f"{', '.join(schema.names)}; rename its column"
                )
            column = pq.ParquetFile(stream).read(["item_id"]).column("item_id")
        if len(column):
            require_ids(column.type, "item_id", path)
            chunks += plain_ids(column, f"{path!r}, column 'item_id'").chunks
        if len({chunk.type for chunk in chunks}) > 1:
            raise ValueError(
                f"{name} must have one type of ids in all files, got another in {path!r}; "
                "convert them"
            )
    return pa.chunked_array(chunks, chunks[0].type if chunks else pa.null()).combine_chunks()


def natural_order(paths: Iterable[str]) -> list[str]:
    """The paths sorted, with the numbers in them compared by value.

    Example:
        >>> natural_order(["h=10/a", "h=2/a", "h=2/B"])
        ['h=2/B', 'h=2/a', 'h=10/a']
    """
    return sorted(paths, key=lambda path: (_natural(path), path))


def _natural(path: str) -> list[tuple[int, int]]:
    """A key in which a number stands where its first digit would."""
    parts = re.findall(r"[0-9]+|[^0-9]", path)
    return [(ord("0"), int(part)) if "0" <= part[0] <= "9" else (ord(part), 0) for part in parts]


def _find_below(
    filesystem: fs.FileSystem, root: str, pattern: str, source: str, name: str
) -> Found:
    infos = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    by_path = {_path_of(info): info for info in infos}
    files = [path for path, info in by_path.items() if info.type == fs.FileType.File]
    skip = len(root.rstrip("/")) + 1
    wanted = [path for path in files if _is_wanted(path[skip:], pattern)]
    wanted = natural_order(path for path in wanted if by_path[path].size or _by_name(path))
    for table in _tables_in(by_path):
        if any(path.startswith(f"{table}/") for path in wanted):
            _refuse_table(name, source, [table])
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda path: _kind(filesystem, by_path[path]), wanted)
        kinds = dict(zip(wanted, found, strict=True))
    taken = _without_descriptions({path: kind for path, kind in kinds.items() if kind})
    passed_over = tuple(path for path in kinds if path not in taken)
    if not taken:
        others = f", {len(passed_over)} other files" if passed_over else ""
        raise FileNotFoundError(
            f"{name} must name at least one .parquet file, or one of CSV or JSON lines, got "
            f"{source!r} with none{others}; check the path"
        )
    for path in taken:
        check_path(name, path)
    _require_one_format(taken, name)
    return Found(filesystem=filesystem, kinds=taken, passed_over=passed_over)


def _without_descriptions(kinds: Mapping[str, FileKind]) -> dict[str, FileKind]:
    """The files without those named .json, where there are others: a manifest is no log."""
    others = {path: kind for path, kind in kinds.items() if not path.lower().endswith(".json")}
    return others or dict(kinds)


def _require_one_format(kinds: Mapping[str, FileKind], name: str) -> None:
    examples = {kind.format: path for path, kind in reversed(list(kinds.items()))}
    if len(examples) > 1:
        shown = " and ".join(f"{format} ({path!r})" for format, path in sorted(examples.items()))
        raise ValueError(
            f"{name} must be files of one format, got {shown}; the same events may be in both: "
            "name one kind by a glob such as 'folder/*.parquet'"
        )


def _kind(filesystem: fs.FileSystem, info: fs.FileInfo) -> FileKind | None:
    """What a file holds, by its first bytes and then its name; None if no events."""
    path, named = _path_of(info), _by_name(_path_of(info))
    if path.lower().endswith(_PARQUET) or not info.size:
        return FileKind(format="parquet") if path.lower().endswith(_PARQUET) else None
    with filesystem.open_input_file(info.path) as file:
        start = file.read(_MAGIC_BYTES)
    for magic, format in _FORMATS.items():
        if start.startswith(magic):
            return FileKind(format=format)
    codec = _starting_with(start, _CODECS)
    other = _starting_with(start, _OTHERS if named is None else _OTHERS | _PACKED)
    if named == "parquet":  # within a compressed file
        other = codec or other or "something else"
    if other is not None:
        raise ValueError(
            f"{path!r} must be Parquet, or CSV or JSON lines that may be compressed by gzip, bz2, "
            f"zstd or lz4, got {other}; write it as Parquet"
        )
    return None if named is None else FileKind(format=named, codec=codec)


def _starting_with(start: bytes, kinds: Mapping[bytes, str]) -> str | None:
    return next((kind for magic, kind in kinds.items() if start.startswith(magic)), None)


def _by_name(path: str) -> str | None:
    """The format that a file's name tells, without the suffix of a codec."""
    name = PurePosixPath(path.lower())
    if name.suffix in _CODEC_SUFFIXES:
        return _SUFFIXES.get(PurePosixPath(name.stem).suffix)
    return _SUFFIXES.get(name.suffix)


def _tables_in(infos: Mapping[str, fs.FileInfo]) -> list[str]:
    """Folders of tables: those that hold metadata of Delta, Hudi or Iceberg."""
    tables = {path.rpartition("/")[0] for path in infos if path.rpartition("/")[2] in _TABLES}
    for path in infos:
        folder, _, name = path.rpartition("/")
        if _ICEBERG in name and folder.endswith("/metadata"):
            tables.add(folder.removesuffix("/metadata"))
    return sorted(tables)


def _tables_above(filesystem: fs.FileSystem, root: str) -> list[str]:
    """Folders of tables that hold ``root``, which may be a file or a partition of one."""
    local = isinstance(filesystem, fs.LocalFileSystem)
    path = PurePosixPath(os.path.abspath(root) if local else root)
    above = [str(folder) for folder in (path, *path.parents) if folder.name]
    try:
        signs = [f"{folder}/{name}" for folder in above for name in _TABLES]
        found = filesystem.get_file_info(signs)
        tables = [info.path.rpartition("/")[0] for info in found if info.type.value]
        for folder in above:
            metadata = fs.FileSelector(f"{folder}/metadata", allow_not_found=True)
            names = [info.base_name for info in filesystem.get_file_info(metadata)]
            tables += [folder] if any(_ICEBERG in name for name in names) else []
    except OSError:  # folders above the log that may not be read
        return []
    return tables


def _refuse_table(name: str, source: str, tables: Sequence[str]) -> None:
    if tables:
        raise ValueError(
            f"{name} must be plain files, got {source!r} of the table {tables[0]!r} (Delta, Iceberg"
            " or Hudi), whose folder also holds deleted and replaced rows; write its current rows "
            "to Parquet with the table's own reader, such as DuckDB's delta_scan or iceberg_scan"
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
    settings = SETTINGS.search(source) if "://" in source else None
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


def _path_of(info: fs.FileInfo) -> str:
    try:
        return str(info.path)
    except UnicodeDecodeError as error:
        return os.fsdecode(error.object)


def _is_wanted(path: str, pattern: str) -> bool:
    """Whether a path below the folder is visible, and it or a folder above it fits the pattern."""
    if any(_is_hidden(part) for part in path.split("/") if part):
        return False
    parts = path.split("/")
    heads = ["/".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return not pattern or any(_matches(head, pattern) for head in heads)


def _is_hidden(part: str) -> bool:
    return part[0] == "." or (part[0] == "_" and "=" not in part)


def _matches(path: str, pattern: str) -> bool:
    parts, wanted = path.split("/"), pattern.split("/")
    if "**" in wanted:
        return fnmatch.fnmatchcase(path, pattern.replace("**/", "*"))
    pairs = zip(parts, wanted, strict=False)
    return len(parts) == len(wanted) and all(fnmatch.fnmatchcase(a, b) for a, b in pairs)
