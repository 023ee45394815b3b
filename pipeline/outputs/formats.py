"""The formats of what stages write: name, version, command, and what a manifest must hold."""

from dataclasses import dataclass

from shardrec.pipeline.outputs.json_files import Shape

__all__ = [
    "EXPORT",
    "GATE",
    "METRICS",
    "POINTER",
    "PREPARED",
    "RECOMMENDATIONS",
    "SYNTH",
    "Format",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A kind of output: a folder with ``manifest.json`` in it, or one file.

    Attributes:
        name: value of the manifest's key "format".
        what: what to call such an output.
        maker: command that writes it.
        remedy: what to do about a damaged one.
        shape: keys that its manifest (a file: itself) must have in addition to format and version.
        is_folder: False for one file.
        version: value of the manifest's key "schema_version".
    """

    name: str
    what: str
    maker: str
    remedy: str
    shape: Shape
    is_folder: bool = True
    version: int = 1

    @property
    def noun(self) -> str:
        """What its path must be, for messages."""
        return "folder" if self.is_folder else "file"


_NONE = type(None)
SYNTH = Format(
    name="shardrec.synth",  # also the key of the note in the Parquet file's footer
    what="a log",
    maker="shardrec synth",
    remedy="generate it again",
    shape={"request": dict, "report": dict},
    is_folder=False,
)
PREPARED = Format(
    name="shardrec.prepared",
    what="a prepared folder",
    maker="shardrec prepare",
    remedy="delete the folder and prepare again",
    shape={
        **{"shardrec_version": str, "config": dict, "source": dict, "columns": dict},
        **{"split": dict, "counts": dict, "quantiles": dict, "load_per_rank": dict, "files": list},
    },
)
METRICS = Format(
    name="shardrec.metrics",
    what="a report",
    maker="shardrec evaluate",
    remedy="make it with `shardrec evaluate --force`",
    shape={"request": dict, "metrics": dict},
    is_folder=False,
)
RECOMMENDATIONS = Format(
    name="shardrec.recommendations",
    what="a folder of lists",
    maker="shardrec recommend",
    remedy="recommend again",
    shape={"request": dict, "files": list},
)
EXPORT = Format(
    name="shardrec.export",
    what="an export",
    maker="shardrec export",
    remedy="export again",
    shape={
        **{"request": dict, "files": list, "catalog_version": str, "scores": str},
        **{"num_items": int, "width": int, "max_length": int},
    },
)
GATE = Format(
    name="shardrec.gate",
    what="a report",
    maker="shardrec gate",
    remedy="make it with `shardrec gate --force`",
    shape={
        **{"request": dict, "passed": bool, "reason": str, "evaluation": dict, "published": dict},
    },
    is_folder=False,
)
POINTER = Format(
    name="shardrec.published",
    what="a pointer",
    maker="shardrec publish",
    remedy="restore it from a copy, or remove it and publish an export again",
    shape={"current": (int, _NONE), "publications": list, "swaps": list},
    is_folder=False,
)
