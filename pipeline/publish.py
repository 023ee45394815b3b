"""Publishing: a pointer is made to name an export, or what it named before.

What ``gate`` wrote comes along: it must have let this very export pass, against the publication
that is still served. Only ``force`` publishes without it.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardrec.pipeline.gate import FORMAT as GATE_FORMAT
from shardrec.pipeline.outputs.json_files import Shape, read_object, require_shape
from shardrec.pipeline.outputs.staging import settle
from shardrec.pipeline.prepared.manifest import MANIFEST_NAME, sha256
from shardrec.pipeline.serve import read_manifest
from shardrec.pipeline.served.pointer import Publication, Published, require_unchanged, swap
from shardrec.pipeline.stored_report import read_report

__all__ = ["PublishConfig", "Refused", "RollbackConfig", "Swapped", "publish", "rollback"]


class Refused(RuntimeError):
    """A gate or a rollback stands against the publication."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishConfig:
    """What to publish.

    Attributes:
        export: folder of export.
        published: pointer to swap, a JSON file; made where there is none.
        gate: report of gate that lets this export pass; required but for force.
        lists: folder of recommend, of the same weights as the export.
        force: publish without a gate's report, or again what a rollback moved away from.
    """

    export: str
    published: str
    gate: str | None = None
    lists: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        """Refuse a publication that nobody has compared with the one before."""
        if self.gate is None and not self.force:
            raise ValueError(
                "gate must be the report of a gate that let the export pass, got none; run "
                "`shardrec gate` and give its report with --gate, or publish unasked with --force"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RollbackConfig:
    """Where to go back to.

    Attributes:
        published: pointer to swap, a JSON file.
        to: number of the publication; none takes the one before the present one.
    """

    published: str
    to: int | None = None


@dataclass(frozen=True, slots=True)
class Swapped:
    """What a pointer names now.

    Attributes:
        publication: the one that is served.
        is_new: False where it was so already and nothing was done.
    """

    publication: Publication
    is_new: bool


def publish(config: PublishConfig) -> Swapped:
    """Let the pointer name the export, after checking every file of it.

    Raises:
        FileNotFoundError: an input is missing.
        ValueError: inputs do not belong together.
        Refused: the gate did not let the export pass, another model was published since, or a
            rollback moved away from this export.
    """
    wanted = _publication(config)
    report = None if config.gate is None else _read_gate(Path(config.gate), wanted)

    def change(published: Published) -> Published:
        current = published.current
        if current is not None and _is_same(current, wanted):
            return published
        _require_leave(config, published, wanted, report)
        numbers = [publication.number for publication in published.publications]
        return published.moved(
            "publish",
            dataclasses.replace(
                wanted,
                number=max(numbers, default=0) + 1,
                previous=published.number,
                evaluation=report and report["evaluation"],
            ),
        )

    published, is_new = swap(Path(config.published), change)
    return Swapped(_served(published), is_new)


def rollback(config: RollbackConfig) -> Swapped:
    """Let the pointer name an earlier publication, after checking that its export is whole.

    Without a number every call goes one further back; with one, calling again does nothing.

    Raises:
        FileNotFoundError: there is no pointer, or the export is gone.
        ValueError: there is nothing to go back to, or the export has changed.
    """
    pointer = Path(config.published)
    if not pointer.is_file():
        raise FileNotFoundError(
            f"published must be a pointer that `shardrec publish` wrote, got {pointer}; check the "
            "path"
        )

    def change(published: Published) -> Published:
        target = _target(published, config.to)
        if target.number == published.number:
            return published
        folder = pointer.parent / target.export
        require_unchanged(folder, target)
        read_manifest(folder)
        left = dataclasses.replace(_served(published), left_by_rollback=True)
        others = tuple(left if p.number == left.number else p for p in published.publications)
        marked = dataclasses.replace(published, publications=others)
        return marked.moved("rollback", dataclasses.replace(target, left_by_rollback=False))

    published, is_new = swap(pointer, change)
    return Swapped(_served(published), is_new)


def _publication(config: PublishConfig) -> Publication:
    """What would be published, before it has a number."""
    folder, base = Path(config.export), Path(config.published).parent
    manifest = read_manifest(folder)
    source = manifest["request"]["source"]
    if config.lists is not None:
        _require_lists(Path(config.lists), source)
    return Publication(
        number=0,
        export=_spell(folder, base),
        manifest=sha256(folder / MANIFEST_NAME),
        lists=None if config.lists is None else _spell(Path(config.lists), base),
        source=source,
        catalog_version=manifest["catalog_version"],
        evaluation=None,
        previous=None,
    )


def _require_lists(folder: Path, source: dict[str, Any]) -> None:
    path = folder / MANIFEST_NAME
    if not path.is_file():
        settle(folder)
    if not path.is_file():
        raise FileNotFoundError(
            f"lists must be a folder of `shardrec recommend`, got {folder} without {MANIFEST_NAME}"
        )
    theirs = read_object(path, {"request": dict}, "recommend again")["request"].get("source")
    if theirs != source:
        raise ValueError(
            f"lists must come from the weights of the export, got {folder} of {theirs} and an "
            f"export of {source}; recommend again from the same run and checkpoint"
        )


def _read_gate(path: Path, wanted: Publication) -> dict[str, Any]:
    """The report of a gate that let this export pass."""
    maker = "shardrec gate"
    shape: Shape = {"passed": bool, "reason": str, "evaluation": dict, "published": dict}
    report = read_report(path, GATE_FORMAT, maker, shape)
    again = f"make it with `{maker} --force`"
    require_shape(report["evaluation"], {"source": dict}, f"'evaluation' in {path}", again)
    number = {"number": (int, type(None))}
    require_shape(report["published"], number, f"'published' in {path}", again)
    if report["evaluation"]["source"] != wanted.source:
        raise ValueError(
            f"gate must be about the weights of the export, got {path} about "
            f"{report['evaluation']['source']} and an export of {wanted.source}; evaluate, gate "
            "and export the same checkpoint"
        )
    if not report["passed"]:
        raise Refused(f"the export must have passed its gate, got: {report['reason']}")
    return report


def _require_leave(
    config: PublishConfig,
    published: Published,
    wanted: Publication,
    report: dict[str, Any] | None,
) -> None:
    """Refuse what a gate of before, or a rollback, stands against."""
    if report is not None and report["published"]["number"] != published.number:
        raise Refused(
            f"the gate must have compared with what is published, number {published.number}, got a "
            f"comparison with number {report['published']['number']}; run the gate again"
        )
    left = [p for p in published.publications if p.left_by_rollback and _is_same(p, wanted)]
    if left and not config.force:
        raise Refused(
            f"the export must not be one that a rollback moved away from, got number "
            f"{left[0].number}; publish a better one, or this one again with --force"
        )


def _is_same(one: Publication, other: Publication) -> bool:
    names = ("export", "manifest", "lists")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _target(published: Published, number: int | None) -> Publication:
    if number is not None:
        return published.find(number)
    previous = _served(published).previous
    if previous is None:
        raise ValueError(
            f"there must be a publication before number {published.number}, got none; publish "
            "another export, or say which with --to"
        )
    return published.find(previous)


def _served(published: Published) -> Publication:
    current = published.current
    assert current is not None, "a pointer that exists names something"
    return current


def _spell(folder: Path, base: Path) -> str:
    """The folder as the pointer names it: relative where both move together."""
    folder, base = folder.resolve(), base.resolve()
    return str(folder.relative_to(base)) if folder.is_relative_to(base) else str(folder)
