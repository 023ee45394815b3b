"""The publish stage: let the pointer file name a new export; ``rollback`` returns to an old one.

The verdict of ``gate`` is required: it must have passed this very export in a comparison with the
publication that is served now. Only ``force`` publishes without it.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardrec.pipeline.outputs.files import MANIFEST_NAME, sha256
from shardrec.pipeline.outputs.formats import GATE, RECOMMENDATIONS
from shardrec.pipeline.outputs.json_files import require_shape
from shardrec.pipeline.outputs.stage_output import read_output
from shardrec.pipeline.served.pointer import (
    Publication,
    Published,
    Served,
    read_export,
    require_unchanged,
    update,
)

__all__ = ["PublishConfig", "Refused", "RollbackConfig", "Served", "publish", "rollback"]


class Refused(RuntimeError):
    """Publishing is blocked by a failed gate or an earlier rollback."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishConfig:
    """Options of ``publish``.

    Attributes:
        export: output folder of export.
        published: pointer file to change (JSON); created if missing.
        gate: verdict of gate that let this export pass; required unless force.
        lists: output folder of recommend, from the same weights as the export.
        force: publish without a verdict of gate, or an export that was rolled back.
    """

    export: str
    published: str
    gate: str | None = None
    lists: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        """Refuse to publish without a gate's report, unless forced."""
        if self.gate is None and not self.force:
            raise ValueError(
                "gate must be the report of a gate that let the export pass, got none; run "
                "`shardrec gate` and give its report with --gate, or publish without it by --force"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RollbackConfig:
    """Options of ``rollback``: the publication to return to.

    Attributes:
        published: pointer file to change (JSON).
        to: number of the publication; none: the previous one.
    """

    published: str
    to: int | None = None


def publish(config: PublishConfig) -> Served:
    """Make the pointer file name the export, after checking every file of the export.

    Raises:
        FileNotFoundError: an input is missing.
        ValueError: inputs do not belong together.
        Refused: the gate did not let the export pass, another model has been published since, or
            this export was rolled back.
    """
    wanted = _publication(config)
    report = None if config.gate is None else _read_gate(Path(config.gate), wanted)

    def change(published: Published) -> Published:
        current = published.current
        if current is not None and current.is_same_as(wanted):
            return published
        _check_allowed(config, published, wanted, report)
        numbers = [publication.number for publication in published.publications]
        publication = dataclasses.replace(
            wanted,
            number=max(numbers, default=0) + 1,
            previous=published.number,
            evaluation=report and report["evaluation"],
        )
        return published.moved("publish", publication)

    return update(Path(config.published), change)


def rollback(config: RollbackConfig) -> Served:
    """Make the pointer file name an earlier publication, after checking that export.

    Without a number, every call goes back one more publication; with one, a second call does
    nothing.

    Raises:
        FileNotFoundError: there is no pointer, or the export is missing.
        ValueError: there is no earlier publication, or its export has changed.
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
        read_export(require_unchanged(pointer, target))
        marked = tuple(
            dataclasses.replace(p, left_by_rollback=True) if p.number == published.number else p
            for p in published.publications
        )
        left = dataclasses.replace(published, publications=marked)
        return left.moved("rollback", dataclasses.replace(target, left_by_rollback=False))

    return update(pointer, change)


def _publication(config: PublishConfig) -> Publication:
    """The requested publication, which has no number yet."""
    folder, base = Path(config.export), Path(config.published).parent
    manifest = read_export(folder)
    source = manifest["request"]["source"]
    if config.lists is not None:
        _check_lists(Path(config.lists), source)
    return Publication(
        number=0,
        export=_relative_path(folder, base),
        manifest=sha256(folder / MANIFEST_NAME),
        lists=None if config.lists is None else _relative_path(Path(config.lists), base),
        source=source,
        catalog_version=manifest["catalog_version"],
        evaluation=None,
        previous=None,
    )


def _check_lists(folder: Path, source: dict[str, Any]) -> None:
    found = read_output(folder, RECOMMENDATIONS)["request"].get("source")
    if found != source:
        raise ValueError(
            f"lists must come from the weights of the export, got {folder} of {found} and an "
            f"export of {source}; recommend again from the same run and checkpoint"
        )


def _read_gate(path: Path, wanted: Publication) -> dict[str, Any]:
    """The report of a gate that let this export pass."""
    report = read_output(path, GATE)
    evaluation, published = report["evaluation"], report["published"]
    require_shape(evaluation, {"source": dict}, f"'evaluation' in {path}", GATE.remedy)
    number = {"number": (int, type(None))}
    require_shape(published, number, f"'published' in {path}", GATE.remedy)
    if evaluation["source"] != wanted.source:
        raise ValueError(
            f"gate must be about the weights of the export, got {path} about "
            f"{evaluation['source']} and an export of {wanted.source}; evaluate, gate and export "
            "the same checkpoint"
        )
    if not report["passed"]:
        raise Refused(f"the export must have passed its gate, got: {report['reason']}")
    return report


def _check_allowed(
    config: PublishConfig,
    published: Published,
    wanted: Publication,
    report: dict[str, Any] | None,
) -> None:
    """Refuse an outdated gate, and an export that a rollback moved away from."""
    if report is not None and report["published"]["number"] != published.number:
        raise Refused(
            f"the gate must have compared with what is published, number {published.number}, got a "
            f"comparison with number {report['published']['number']}; run the gate again"
        )
    left = [p for p in published.publications if p.left_by_rollback and p.is_same_as(wanted)]
    if left and not config.force:
        raise Refused(
            f"the export must not be one that a rollback moved away from, got number "
            f"{left[0].number}; publish a better one, or this one again with --force"
        )


def _target(published: Published, number: int | None) -> Publication:
    if number is not None:
        return published.find(number)
    current = published.current
    if current is None or current.previous is None:
        raise ValueError(
            f"there must be a publication before number {published.number}, got none; publish "
            "another export, or choose one with --to"
        )
    return published.find(current.previous)


def _relative_path(folder: Path, base: Path) -> str:
    """The path stored in the pointer: relative if inside ``base``, since both move together."""
    folder, base = folder.resolve(), base.resolve()
    return str(folder.relative_to(base)) if folder.is_relative_to(base) else str(folder)
