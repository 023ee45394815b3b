"""Find what ``--run`` names, a checkpoint of a run or a baseline, and make a ranker from it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from shardrec.modules.ranking import Blocks
from shardrec.pipeline.baseline import open_baseline
from shardrec.pipeline.model.ranker import Ranker, StateRanker
from shardrec.pipeline.outputs.files import MANIFEST_NAME
from shardrec.pipeline.outputs.formats import BASELINE
from shardrec.pipeline.outputs.json_files import read_json
from shardrec.pipeline.outputs.stage_output import read_output
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.ranks import default_group, on_first_rank, on_this_rank
from shardrec.pipeline.run.trained import Source

__all__ = ["Ranked", "find_ranked", "is_baseline"]

Which = Literal["best", "last"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranked:
    """A checkpoint or a baseline, found but not loaded.

    Attributes:
        identity: JSON that identifies the weights or the baseline, with the data's fingerprint
            under "data".
        scores: kind of the scores in the lists, such as "cosine".
        load: returns the ranker, and JSON that says what was loaded. Collectives: on the default
            group; every rank must call it.
    """

    identity: dict[str, Any]
    scores: str
    load: Callable[[], tuple[Ranker, dict[str, Any]]]


def find_ranked(
    run: str, prepared: Prepared, which: Which, encoder: nn.Module | None, blocks: Blocks
) -> Ranked:
    """The best or last checkpoint of a run, or a baseline; it must belong to ``prepared``.

    Args:
        run: run folder of train, or folder of baseline.
        prepared: the data.
        which: the checkpoint of a run; must be "best" for a baseline.
        encoder: the module given to ``train``, if any.
        blocks: block sizes of the ranking.

    Raises:
        FileNotFoundError: the folder is neither a run nor a baseline, or has no complete
            checkpoint.
        ValueError: it belongs to other data.

    Collectives: one or two all-gathers of small objects on the default group.
    """
    group = default_group()
    if on_first_rank(lambda: is_baseline(Path(run)), group):
        return on_this_rank(lambda: _find_baseline(Path(run), prepared, which), group)
    source = Source.find(run, prepared, which, encoder)

    def load() -> tuple[Ranker, dict[str, Any]]:
        model, progress = source.load_with_progress(prepared, encoder)
        loaded = {"which": which, "folder": source.checkpoint.name, "step": progress["step"]}
        return StateRanker.of(model, source.config.encoder.max_length, blocks), loaded

    scores = "cosine" if source.config.loss.normalize else "inner product"
    scores += " plus memory" if source.memory is not None and source.memory["scale"] else ""
    return Ranked(identity=source.identity, scores=scores, load=load)


def is_baseline(folder: Path) -> bool:
    """Whether ``shardrec baseline`` wrote this folder."""
    return read_json(folder / MANIFEST_NAME).get("format") == BASELINE.name


def _find_baseline(folder: Path, prepared: Prepared, which: Which) -> Ranked:
    if which != "best":
        raise ValueError(f"checkpoint must come with a run, got {which} for a baseline; remove it")
    request = read_output(folder, BASELINE)["request"]
    group = default_group()
    # Opened now and not in ``load``: a baseline of other data is refused before the output is.
    ranker = open_baseline(folder, prepared, group)
    return Ranked(
        identity={"baseline": request["kind"], **request},
        scores="sum of item-to-item scores; -1, -2, … for items without one, by popularity",
        load=lambda: (ranker, {"baseline": request["kind"]}),
    )
