"""The pointer: a small JSON file that names the export to serve, with its history.

::

    current         number of the publication that is served
    publications    for each the export, the data it was trained on, and its metrics
    swaps           changes of ``current``: time, action, number before and number after

The file is replaced by a rename, so that readers see it either before or after a change, also on a
shared file system.
"""

import dataclasses
import datetime
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardrec.pipeline.outputs.files import MANIFEST_NAME, check_files, sha256
from shardrec.pipeline.outputs.formats import EXPORT, POINTER
from shardrec.pipeline.outputs.json_files import Shape, require_shape, write_atomically
from shardrec.pipeline.outputs.lock import lock_file, open_lock
from shardrec.pipeline.outputs.signing import signed
from shardrec.pipeline.outputs.stage_output import read_output
from shardrec.pipeline.outputs.staging import find_file

_ENTRY: Shape = {
    **{"number": int, "export": str, "manifest": str, "lists": (str, type(None)), "source": dict},
    **{"catalog_version": str, "evaluation": (dict, type(None)), "previous": (int, type(None))},
    "left_by_rollback": bool,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Publication:
    """An export that was published.

    Attributes:
        number: number of the publication, counted from 1.
        export: folder of the export; relative to the pointer's folder if it lies below it.
        manifest: SHA-256 of the export's manifest, which holds the checksums of its files.
        lists: folder of recommendations from the same weights, or None.
        source: run id, checkpoint, hash of its weights, and fingerprint of the data, as JSON.
        catalog_version: catalog version of the export's items.
        evaluation: metrics in the gate's verdict, as JSON, or None.
        previous: number of the publication that it replaced.
        left_by_rollback: whether it has been rolled back.
    """

    number: int
    export: str
    manifest: str
    lists: str | None
    source: dict[str, Any]
    catalog_version: str
    evaluation: dict[str, Any] | None
    previous: int | None
    left_by_rollback: bool = False

    def is_same_as(self, other: "Publication") -> bool:
        """Whether two publications have the same export and lists."""
        ours, theirs = ((p.export, p.manifest, p.lists) for p in (self, other))
        return ours == theirs


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """The content of a pointer file.

    Attributes:
        number: number of the publication that is served; None before the first.
        publications: all publications, in order of their numbers.
        swaps: changes of ``number`` as JSON: time, action, number before and after.
    """

    number: int | None = None
    publications: tuple[Publication, ...] = ()
    swaps: tuple[dict[str, Any], ...] = ()

    @property
    def current(self) -> Publication | None:
        """The publication that is served; None before the first."""
        return None if self.number is None else self.find(self.number)

    def find(self, number: int) -> Publication:
        """The publication with this number.

        Raises:
            ValueError: there is no such publication.
        """
        for publication in self.publications:
            if publication.number == number:
                return publication
        known = ", ".join(str(publication.number) for publication in self.publications) or "none"
        raise ValueError(
            f"number must be that of a publication ({known}), got {number}; choose one of them"
        )

    def moved(self, action: str, publication: Publication) -> "Published":
        """A copy with ``publication`` as the current one, and the change added to ``swaps``."""
        others = [p for p in self.publications if p.number != publication.number]
        step = {
            "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "action": action,
            "from": self.number,
            "to": publication.number,
        }
        return Published(
            number=publication.number,
            publications=tuple(sorted([*others, publication], key=lambda p: p.number)),
            swaps=(*self.swaps, step),
        )


@dataclass(frozen=True, slots=True)
class Served:
    """The result of ``publish`` or ``rollback``: the publication that is served now.

    Attributes:
        publication: the publication that is served now.
        is_new: False if it was served already and nothing was done.
    """

    publication: Publication
    is_new: bool


def read_published(path: Path) -> Published:
    """The content of a pointer file; an empty ``Published`` if there is no file yet.

    Raises:
        ValueError: the file is not a pointer of this version, or is damaged.
    """
    if not path.exists():
        return Published()
    stored = read_output(path, POINTER)
    where = f"an entry of 'publications' in {path}"
    entries = [require_shape(one, _ENTRY, where, POINTER.remedy) for one in stored["publications"]]
    numbers = [entry["number"] for entry in entries]
    if stored["current"] not in (None, *numbers):
        raise ValueError(
            f"'current' of {path} must be the number of a publication, got {stored['current']} and "
            f"{numbers}; {POINTER.remedy}"
        )
    publications = [Publication(**{name: entry[name] for name in _ENTRY}) for entry in entries]
    return Published(
        number=stored["current"], publications=tuple(publications), swaps=tuple(stored["swaps"])
    )


def update(path: Path, change: Callable[[Published], Published]) -> Served:
    """Apply ``change`` to a pointer file and replace it atomically; concurrent writers wait.

    Args:
        path: the pointer file; created if it is missing.
        change: function from the current content to the new one; if it raises, nothing changes.

    Raises:
        ValueError: the file is not a pointer of this version, or is damaged.
        OSError: the file or its lock cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(open_lock(path.with_name(f".{path.name}.lock")), "w") as lock:
        lock_file(lock.fileno(), path, wait=True)
        before = read_published(path)
        after = change(before)
        if after != before:
            write_atomically(path, json.dumps(signed(_to_json(after)), indent=1))
    assert after.current is not None, "a change makes the pointer name something"
    return Served(after.current, after != before)


def export_folder(path: Path) -> Path:
    """The export that a pointer file names; a folder is returned unchanged.

    Raises:
        FileNotFoundError: the pointer names nothing yet, or the export is missing.
        ValueError: the file is not a pointer, or the export has changed since it was published.
    """
    if not path.is_file():
        return path
    current = read_published(path).current
    if current is None:
        raise FileNotFoundError(f"{path} must name an export, got none; run `shardrec publish`")
    return require_unchanged(path, current)


def require_unchanged(pointer: Path, publication: Publication) -> Path:
    """The folder of a published export, after checking that its manifest is unchanged.

    Raises:
        FileNotFoundError: the export is missing.
        ValueError: its folder now holds another export.
    """
    folder = pointer.parent / publication.export
    manifest = find_file(folder, MANIFEST_NAME)
    if manifest is None:
        raise FileNotFoundError(
            f"publication {publication.number} must still have its export, got no "
            f"{folder / MANIFEST_NAME}; roll back to another number, or publish a new export"
        )
    if sha256(manifest) != publication.manifest:
        raise ValueError(
            f"{folder} must be as it was published, got another export in its place; publish it "
            "under a new number, or roll back to another one"
        )
    return folder


def read_export(folder: Path) -> dict[str, Any]:
    """The manifest of a complete export, after comparing the checksums of its files.

    Raises:
        FileNotFoundError: there is no manifest, or a file is missing.
        ValueError: the folder is not an export, or a file has changed.
    """
    manifest = read_output(folder, EXPORT)
    where = f"'request' in {folder / MANIFEST_NAME}"
    require_shape(manifest["request"], {"source": dict}, where, EXPORT.remedy)
    mixed = "export again: files of two exports do not fit together"
    check_files(folder, manifest["files"], mixed, verify=True)
    return manifest


def _to_json(published: Published) -> dict[str, Any]:
    return {
        "format": POINTER.name,
        "schema_version": POINTER.version,
        "current": published.number,
        "publications": [dataclasses.asdict(entry) for entry in published.publications],
        "swaps": list(published.swaps),
    }
