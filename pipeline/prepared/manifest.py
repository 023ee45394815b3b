"""The manifest of a prepared folder: its files, their source, their counts and checksums.

``manifest.json`` is written last, so a folder that has one is complete; sizes and checksums reveal
later changes.
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from shardrec.pipeline.outputs.files import MANIFEST_NAME, FileEntry, check_files
from shardrec.pipeline.outputs.formats import PREPARED
from shardrec.pipeline.outputs.json_files import Shape, require_shape, write_atomically
from shardrec.pipeline.outputs.stage_output import read_output

ITEMS_NAME = "items.parquet"
ITEM_MAP_NAME = "item_map.parquet"
_PARTS: dict[str, Shape] = {
    "counts": dict.fromkeys(("items", "train_sequences", "train_users", "validation_users"), int),
    "columns": {"user": dict, "item": dict, "time": dict, "weight": (dict, type(None))},
    "source": {"files": list},
}
_ENTRY: Shape = {"path": str, "bytes": int, "sha256": str, "rows": int, "row_groups": int}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The content of ``manifest.json``: options, source, split, counts and files.

    Attributes:
        shardrec_version: version that wrote the folder.
        config: the options of ``prepare`` that change its output.
        source: ``{"files": [{path, bytes, rows, footer_sha256}]}`` of the event log; ``items``, as
            ``{path, rows, sha256, fingerprint}``, if the items of an earlier folder were kept; and
            ``item_attributes``, as ``{files}``, if the items have attributes.
        columns: name and type of user, item, time and weight (None without weights).
        split: kind, targets, validation, and the cut times in the log's own unit.
        counts: numbers of events, users, items, sequences and targets, kept and dropped.
        quantiles: quantiles of the training sequences' lengths and of the items' counts.
        load_per_rank: for 2, 3, 4 and 8 ranks, each rank's share of the training events.
        files: every file of the folder except this one.
    """

    shardrec_version: str
    config: dict[str, Any] = dataclasses.field(repr=False)
    source: dict[str, Any] = dataclasses.field(repr=False)
    columns: dict[str, Any] = dataclasses.field(repr=False)
    split: dict[str, Any] = dataclasses.field(repr=False)
    counts: dict[str, int]
    quantiles: dict[str, dict[str, int]] = dataclasses.field(repr=False)
    load_per_rank: dict[str, list[float]] = dataclasses.field(repr=False)
    files: tuple[FileEntry, ...] = dataclasses.field(repr=False)

    @property
    def fingerprint(self) -> str:
        """Short hash of the files' checksums: equal for equal data."""
        files = sorted((file.path, file.sha256) for file in self.files)
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]

    def file(self, path: str) -> FileEntry:
        """The entry of a file with this path.

        Raises:
            KeyError: the manifest lists no such file.
        """
        for entry in self.files:
            if entry.path == path:
                return entry
        raise KeyError(path)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` into ``folder``, durably."""
    head = {"format": PREPARED.name, "schema_version": PREPARED.version}
    text = json.dumps(head | dataclasses.asdict(manifest), indent=2)
    write_atomically(folder / MANIFEST_NAME, f"{text}\n")


def read_manifest(
    folder: Path, *, verify_checksums: bool = False, only: Collection[str] | None = None
) -> Manifest:
    """The manifest of ``folder``, after checking existence and sizes of the files it lists.

    Args:
        folder: output of ``prepare``.
        verify_checksums: also read every file and compare its digest.
        only: paths of the files to check; None checks all.

    Raises:
        FileNotFoundError: the folder has no manifest, or a listed file is gone.
        ValueError: the manifest has another format or schema version, or a file has changed.
    """
    stored = read_output(folder, PREPARED)
    manifest = parse_manifest(stored, folder)
    entries = [entry for entry in stored["files"] if only is None or entry["path"] in only]
    check_files(folder, entries, PREPARED.remedy, verify=verify_checksums)
    return manifest


def parse_manifest(stored: dict[str, Any], folder: Path) -> Manifest:
    """The manifest in a JSON object.

    Raises:
        ValueError: a part is missing or damaged.
    """
    path = folder / MANIFEST_NAME
    for part, shape in _PARTS.items():
        require_shape(stored[part], shape, f"{part!r} in {path}", PREPARED.remedy)
    where = f"an entry of 'files' in {path}"
    entries = [require_shape(one, _ENTRY, where, PREPARED.remedy) for one in stored["files"]]
    files = tuple(FileEntry(**{name: entry[name] for name in _ENTRY}) for entry in entries)
    names = [field.name for field in dataclasses.fields(Manifest) if field.name != "files"]
    return Manifest(**{name: stored[name] for name in names}, files=files)
