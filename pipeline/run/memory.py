"""Find the memory that ``memorize`` wrote into a run folder."""

from pathlib import Path
from typing import Any

from shardrec.pipeline.outputs import formats
from shardrec.pipeline.outputs.stage_output import read_output
from shardrec.pipeline.run.folder import MEMORY

__all__ = ["find_memory"]


def find_memory(run: Path, source: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of the memory of a run; None if there is none.

    Args:
        run: run folder.
        source: ``Source.identity`` of the weights that the memory is to be used with.

    Raises:
        ValueError: its scale was chosen for other weights, or it is damaged.
    """
    path = run / MEMORY
    if not path.exists():
        return None
    manifest = read_output(path, formats.MEMORY)
    chosen_for = manifest["request"]["source"]
    if chosen_for != source:
        names = [name for name in source if source[name] != chosen_for.get(name)]
        raise ValueError(
            f"the memory must be of the weights that are loaded, got {path}, which differs in "
            f"{', '.join(names)}; run `shardrec memorize --force` with this checkpoint, or delete "
            "that folder to use the model alone"
        )
    return manifest
