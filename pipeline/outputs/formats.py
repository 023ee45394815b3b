"""The output formats of the stages: name, version, command, and keys of the manifest."""

from dataclasses import dataclass

from shardrec.pipeline.outputs.json_files import Shape

__all__ = [
    "BASELINE",
    "EXPORT",
    "GATE",
    "MEMORY",
    "METRICS",
    "POINTER",
    "PREPARED",
    "RECOMMENDATIONS",
    "SYNTH",
    "Format",
]


@dataclass(frozen=True, slots=True)
class Format:
    """An output format: a folder with a manifest in it, or one file.

    Attributes:
        name: value of the manifest's key "format".
        what: noun phrase for such an output in messages.
        maker: command that writes it.
        shape: keys, besides format and version, that its manifest (or the file itself) must have.
        is_folder: False if the output is one file.
        version: value of the manifest's key "schema_version".
        hint: what to do about a damaged output, if the command cannot make another.
        is_signed: whether it is signed if a key is set (``outputs/signing.py``).
        manifest: name of the manifest; readers of Parquet folders ignore names that begin with "_".
    """

    name: str
    what: str
    maker: str
    shape: Shape
    is_folder: bool = True
    version: int = 1
    hint: str = ""
    is_signed: bool = False
    manifest: str = "manifest.json"

    @property
    def remedy(self) -> str:
        """What to do about a damaged output, for messages."""
        return self.hint or f"make another with `{self.maker} --force`"

    @property
    def noun(self) -> str:
        """The noun for its path in messages, "folder" or "file"."""
        return "folder" if self.is_folder else "file"


_NUMBER = (int, type(None))
_REQUEST: Shape = {"request": dict}
_FILES: Shape = {"request": dict, "files": list}
_PREPARED: Shape = {
    **{"shardrec_version": str, "config": dict, "source": dict, "columns": dict, "split": dict},
    **{"counts": dict, "quantiles": dict, "load_per_rank": dict, "files": list},
}
_EXPORT: Shape = {
    **{"catalog_version": str, "scores": str, "num_items": int, "width": int, "max_length": int}
}
_BASELINE: Shape = {"kind": str, "data": str, "counts": dict, "versions": dict}
_MEMORY: Shape = {"scale": float, "ages": int, "decay": float}
_GATE: Shape = {"passed": bool, "reason": str, "evaluation": dict, "published": dict}
_POINTER: Shape = {"current": _NUMBER, "publications": list, "swaps": list}

# The name is also a metadata key in the footer of the Parquet file.
SYNTH = Format("shardrec.synth", "a log", "shardrec synth", _REQUEST, is_folder=False)
PREPARED = Format("shardrec.prepared", "a prepared folder", "shardrec prepare", _PREPARED)
METRICS = Format(
    "shardrec.metrics", "a report", "shardrec evaluate", {**_REQUEST, "metrics": dict}, False
)
BASELINE = Format("shardrec.baseline", "a baseline", "shardrec baseline", {**_FILES, **_BASELINE})
MEMORY = Format("shardrec.memory", "a memory", "shardrec memorize", {**_FILES, **_MEMORY})
RECOMMENDATIONS = Format(
    "shardrec.recommendations", "lists", "shardrec recommend", _FILES, manifest="_manifest.json"
)
SIMILAR = Format(
    "shardrec.similar", "lists of items", "shardrec similar", _FILES, manifest="_manifest.json"
)
EXPORT = Format(
    "shardrec.export", "an export", "shardrec export", {**_FILES, **_EXPORT}, is_signed=True
)
GATE = Format("shardrec.gate", "a report", "shardrec gate", {**_REQUEST, **_GATE}, False)
POINTER = Format(
    "shardrec.published",
    "a pointer",
    "shardrec publish",
    _POINTER,
    is_folder=False,
    hint="restore it from a copy, or remove it and publish an export again",
    is_signed=True,
)
