"""A trained run opened for use: its model on the ranks of the default group, and what it is."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from shardrec.pipeline.checkpoint import Checkpoints
from shardrec.pipeline.evaluate import load_model
from shardrec.pipeline.group import default_group, on_first_rank
from shardrec.pipeline.model import Model
from shardrec.pipeline.prepared import Prepared
from shardrec.pipeline.run import TrainConfig, open_run

__all__ = ["Source"]


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint of a run, found but not loaded.

    Attributes:
        config: of the run.
        checkpoint: its folder.
        identity: JSON; run id, checkpoint, its weights' hash, and the data's fingerprint.
    """

    config: TrainConfig
    checkpoint: Path
    identity: dict[str, Any]

    @classmethod
    def find(
        cls,
        run: str,
        prepared: Prepared,
        which: Literal["best", "last"],
        encoder: nn.Module | None = None,
    ) -> "Source":
        """Find the best or last checkpoint of ``run``, which must belong to ``prepared``.

        Args:
            run: the run folder.
            prepared: the data the run was trained on.
            which: which weights.
            encoder: the module handed to ``train``, where one was.

        Raises:
            FileNotFoundError: there is no run, or no complete checkpoint.
            ValueError: the run does not fit the data.

        Collectives: on the default group.
        """
        return on_first_rank(lambda: _find(Path(run), prepared, which, encoder), default_group())

    def load(self, prepared: Prepared, encoder: nn.Module | None = None) -> Model:
        """The model with the checkpoint's weights.

        Collectives: on the default group.
        """
        model, _ = load_model(self.config, self.checkpoint, prepared, encoder)
        return model


def _find(run: Path, prepared: Prepared, which: Literal["best", "last"], encoder: Any) -> Source:
    config = open_run(run, prepared, own_encoder=encoder is None)
    checkpoint = Checkpoints(run / "checkpoints", None).find(which)
    identity = {
        "run": _digest(run / "run.json", run / "config.json"),
        "checkpoint": checkpoint.name,
        "weights": _digest(checkpoint / "manifest.json"),
        "data": prepared.fingerprint,
    }
    return Source(config, checkpoint, identity)


def _digest(*paths: Path) -> str:
    """Short hash of some files."""
    content = b"".join(path.read_bytes() for path in paths)
    return hashlib.sha256(content).hexdigest()[:16]
