"""Reports of stages: one JSON file each, kept while the request for it is the same."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardrec.pipeline.checkpoint.store import write_atomically
from shardrec.pipeline.outputs.json_files import Shape, require_shape

__all__ = ["StoredReport", "read_json", "read_report"]


@dataclass(frozen=True, slots=True)
class StoredReport:
    """A report that appears whole or not at all, and names what was asked for.

    Attributes:
        path: the file.
        format: what it reports, such as "shardrec.metrics".
        request: JSON; everything the content depends on.
        force: whether a report of another request is replaced.
        shape: keys that are needed besides, and the types of their values.
    """

    path: Path
    format: str
    request: Mapping[str, Any]
    force: bool = False
    shape: Shape = field(default_factory=dict)

    def finished(self) -> dict[str, Any] | None:
        """The report where the file holds what this request asks for.

        Raises:
            FileExistsError: the file holds something else, and must not be replaced.
            ValueError: it is such a report, but damaged.
        """
        if not self.path.exists():
            return None
        found = read_json(self.path)
        if found.get("format") != self.format:
            raise FileExistsError(
                f"output must be a new file or a {self.format} report, got {self.path}, which is "
                "another file; choose another --output or remove it"
            )
        if self.force:
            return None
        shape = {"request": dict, **self.shape}
        require_shape(found, shape, str(self.path), "replace it with --force")
        if found["request"] != self.request:
            theirs = found["request"]
            names = [name for name in self.request if self.request[name] != theirs.get(name)]
            raise FileExistsError(
                f"output must be a new file or hold this very report, got {self.path}, which "
                f"differs in {', '.join(names)}; choose another --output, or replace it with "
                "--force"
            )
        return found

    def write(self, details: Mapping[str, Any]) -> dict[str, Any]:
        """Write the report and return it."""
        head = {"format": self.format, "schema_version": 1, "request": dict(self.request)}
        report = head | dict(details)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(report, indent=1, allow_nan=False))
        return report


def read_report(path: Path, format: str, maker: str, shape: Shape) -> dict[str, Any]:
    """A report that another stage wrote.

    Args:
        path: the file.
        format: what it must report.
        maker: the command that writes such reports.
        shape: keys that are needed, and the types of their values.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there must be a report {path}, got none; run `{maker}` first")
    report = read_json(path)
    if (report.get("format"), report.get("schema_version")) != (format, 1):
        raise ValueError(
            f"{path} must be a report of format {format!r}, version 1, got another file; "
            f"make it with `{maker}`"
        )
    return require_shape(report, shape, str(path), f"make it with `{maker} --force`")


def read_json(path: Path) -> dict[str, Any]:
    """The table that a JSON file holds; an empty one where it holds something else."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, IsADirectoryError):
        return {}
    return stored if isinstance(stored, dict) else {}
