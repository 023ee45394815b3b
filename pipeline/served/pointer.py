"""Which export is served: a pointer that is swapped in one step, with its history.

A pointer is one small JSON file::

    current         number of the publication that is served
    publications    one entry each: the export, what it was trained on, how it was measured
    swaps           when the pointer moved, from which number to which

Readers see the file before a swap or after it, never between; this holds on shared file systems,
where renaming a file within a folder is one step as well.
"""

import dataclasses
import datetime
import fcntl
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardrec.pipeline.checkpoint.store import write_atomically
from shardrec.pipeline.outputs.json_files import Shape, read_object, require_shape
from shardrec.pipeline.outputs.staging import settle
from shardrec.pipeline.prepared.manifest import MANIFEST_NAME, sha256

__all__ = ["FORMAT", "Publication", "Published", "export_folder", "read_published", "swap"]

FORMAT = "shardrec.published"
_REMEDY = "restore it from a copy, or remove it and publish an export anew"
_ENTRY: Shape = {
    **{"number": int, "export": str, "manifest": str, "lists": (str, type(None)), "source": dict},
    **{"catalog_version": str, "evaluation": (dict, type(None)), "previous": (int, type(None))},
    "left_by_rollback": bool,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Publication:
    """An export that was published.

    Attributes:
        number: 1 for the first of a pointer.
        export: its folder; relative to the pointer's folder where it is below that.
        manifest: SHA-256 of the export's manifest, which holds those of its files.
        lists: folder of recommendations of the same weights, or None.
        source: JSON; run id, checkpoint, its weights' hash, and the data's fingerprint.
        catalog_version: of the export's items.
        evaluation: JSON; what a gate knew of its metrics, or None.
        previous: number of the publication it took the place of.
        left_by_rollback: whether a rollback moved away from it.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """What a pointer holds.

    Attributes:
        number: of the publication that is served; None before the first.
        publications: all there were, by number.
        swaps: JSON; time, action, number before and after.
    """

    number: int | None = None
    publications: tuple[Publication, ...] = ()
    swaps: tuple[dict[str, Any], ...] = ()

    @property
    def current(self) -> Publication | None:
        """The publication that is served."""
        return None if self.number is None else self.find(self.number)

    def find(self, number: int) -> Publication:
        """The publication of a number.

        Raises:
            ValueError: there is none.
        """
        for publication in self.publications:
            if publication.number == number:
                return publication
        known = ", ".join(str(publication.number) for publication in self.publications) or "none"
        raise ValueError(f"number must be that of a publication ({known}), got {number}; pick one")

    def moved(self, action: str, publication: Publication) -> "Published":
        """This pointer when it names ``publication``, which is put among the others."""
        others = [p for p in self.publications if p.number != publication.number]
        publications = sorted([*others, publication], key=lambda p: p.number)
        swap = {
            "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "action": action,
            "from": self.number,
            "to": publication.number,
        }
        return Published(
            number=publication.number,
            publications=tuple(publications),
            swaps=(*self.swaps, swap),
        )


def read_published(path: Path) -> Published:
    """What a pointer holds; nothing where there is no such file yet.

    Raises:
        ValueError: the file is no pointer of this version, or it is damaged.
    """
    if not path.exists():
        return Published()
    data = read_object(path, {}, _REMEDY)
    if (data.get("format"), data.get("schema_version")) != (FORMAT, 1):
        raise ValueError(
            f"{path} must be a pointer of format {FORMAT!r}, version 1, got another file; name one "
            "that `shardrec publish` wrote, or a new one"
        )
    shape: Shape = {"current": (int, type(None)), "publications": list, "swaps": list}
    require_shape(data, shape, str(path), _REMEDY)
    where = f"an entry of 'publications' in {path}"
    entries = [require_shape(one, _ENTRY, where, _REMEDY) for one in data["publications"]]
    numbers = [entry["number"] for entry in entries]
    if data["current"] not in (None, *numbers):
        raise ValueError(
            f"'current' of {path} must be the number of a publication, got {data['current']} and "
            f"{numbers}; {_REMEDY}"
        )
    publications = [Publication(**{name: entry[name] for name in _ENTRY}) for entry in entries]
    return Published(
        number=data["current"], publications=tuple(publications), swaps=tuple(data["swaps"])
    )


def swap(path: Path, change: Callable[[Published], Published]) -> tuple[Published, bool]:
    """What a pointer holds after a change, and whether that is anything new.

    Writers wait for one another; a change that raises leaves the pointer as it is.

    Args:
        path: the pointer; made where there is none.
        change: from what the pointer holds to what it shall hold.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = read_published(path)
        after = change(before)
        if after != before:
            write_atomically(path, json.dumps(_to_json(after), indent=1))
    return after, after != before


def export_folder(path: Path) -> Path:
    """The folder of the export that a pointer names; a path that is no file is its own answer.

    Raises:
        FileNotFoundError: the pointer names nothing yet, or the export is gone.
        ValueError: the file is no pointer, or the export has changed since it was published.
    """
    if not path.is_file():
        return path
    current = read_published(path).current
    if current is None:
        raise FileNotFoundError(f"{path} must name an export, got none; run `shardrec publish`")
    folder = path.parent / current.export
    require_unchanged(folder, current)
    return folder


def require_unchanged(folder: Path, publication: Publication) -> None:
    """Refuse an export that is gone or another than the one that was published.

    Raises:
        FileNotFoundError, ValueError: with what to do.
    """
    manifest = folder / MANIFEST_NAME
    if not manifest.is_file():
        settle(folder)
    if not manifest.is_file():
        raise FileNotFoundError(
            f"publication {publication.number} must still have its export, got no {manifest}; "
            "roll back to another number, or publish a new export"
        )
    if sha256(manifest) != publication.manifest:
        raise ValueError(
            f"{folder} must be as it was published, got another export in its place; publish it "
            "under a new number, or roll back to another one"
        )


def _to_json(published: Published) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "schema_version": 1,
        "current": published.number,
        "publications": [dataclasses.asdict(entry) for entry in published.publications],
        "swaps": list(published.swaps),
    }
