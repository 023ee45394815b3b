"""Find a checkpoint of a trained run and load its model on the ranks of the default group."""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from shardrec.kernels.ranks.communicator import Communicator
from shardrec.pipeline.checkpoint.manifest import MANIFEST
from shardrec.pipeline.checkpoint.store import load_checkpoint
from shardrec.pipeline.model.model import Model
from shardrec.pipeline.outputs.json_files import read_json
from shardrec.pipeline.outputs.storage import Folder
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.ranks import default_group, on_first_rank, on_this_rank
from shardrec.pipeline.run.average import UNAVERAGED
from shardrec.pipeline.run.build import build_model, open_attributes, pick_device
from shardrec.pipeline.run.config import TrainConfig
from shardrec.pipeline.run.folder import END, MEMORY, open_checkpoints, open_run
from shardrec.pipeline.run.layout import layout_for_ranking
from shardrec.pipeline.run.memory import find_memory
from shardrec.pipeline.run.mesh import open_layout
from shardrec.pipeline.run.own_code import own_encoder
from shardrec.pipeline.served.memory import SUCCESSORS, read_memory

__all__ = ["Source", "load_model"]


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint of a run, found but not loaded.

    Attributes:
        config: the config of the run.
        checkpoint: folder of the checkpoint.
        identity: JSON: run id, checkpoint, hash of the weights, fingerprint of the data, and hash
            of the memory if there is one.
        memory: manifest of the run's memory; None if there is none.
        successors: file of the memory's successors; None if there is none.
    """

    config: TrainConfig
    checkpoint: Folder
    identity: dict[str, Any]
    memory: dict[str, Any] | None = None
    successors: Path | None = None

    @classmethod
    def find(
        cls,
        run: str,
        prepared: Prepared,
        which: Literal["best", "last"],
        encoder: nn.Module | None = None,
        *,
        with_memory: bool = True,
    ) -> "Source":
        """The best or last checkpoint of a run, which must have been trained on ``prepared``.

        ``encoder`` is the module given to ``train``, if any. The run's memory, if it has one, is
        included unless ``with_memory`` is False.

        Raises:
            FileNotFoundError: there is no run, or no complete checkpoint.
            ValueError: the run was trained on other data, or its memory was made for other weights.

        Collectives: one all-gather of small objects on the default group.
        """

        def find() -> "Source":
            source = _find(Path(run), prepared, which, encoder)
            return _with_memory(Path(run), source) if with_memory else source

        return on_first_rank(find, default_group())

    def load(self, prepared: Prepared, encoder: nn.Module | None = None) -> Model:
        """The model with the checkpoint's weights; raises the errors of ``load_model``.

        Collectives: on the default group; every rank must call it.
        """
        model, _ = self.load_with_progress(prepared, encoder)
        return model

    def load_with_progress(
        self, prepared: Prepared, encoder: nn.Module | None = None
    ) -> tuple[Model, Mapping[str, Any]]:
        """The model as from ``load``, and the progress stored with the checkpoint."""
        model, progress = load_model(self.config, self.checkpoint, prepared, encoder)
        if self.memory is None or self.successors is None or not self.memory["scale"]:
            return model, progress
        memory = on_this_rank(
            functools.partial(
                read_memory,
                self.successors,
                self.memory,
                prepared.num_items,
                model.catalog.row_range,
                model.device,
            ),
            default_group(),
        )
        return dataclasses.replace(model, memory=memory), progress


def load_model(
    config: TrainConfig, checkpoint: Folder, prepared: Prepared, encoder: nn.Module | None = None
) -> tuple[Model, Mapping[str, Any]]:
    """The model of a complete checkpoint, and the progress stored with it.

    Raises:
        DamagedCheckpointError: a file is missing or differs from the manifest; raised on all
            ranks.
        ValueError: the checkpoint is of another format version, or the encoder is not a causal
            module from (B, L, D) to (B, L, D).
        RuntimeError: the encoder's weights differ from the checkpoint's in name or shape.

    Collectives: on the default group; every rank must call it.
    """
    group = default_group()
    encoder = on_this_rank(lambda: own_encoder(config) if encoder is None else encoder, group)
    attributes = open_attributes(config, prepared, group)
    layout = layout_for_ranking(config.parallel.shards, Communicator(group).size)
    device = on_this_rank(lambda: pick_device(config.device), group)
    sharing, replicas = open_layout(layout, device)
    model = build_model(config, prepared.num_items, encoder, sharing, attributes, replicas)
    state = on_this_rank(lambda: load_checkpoint(checkpoint, model.catalog.row_range), group)
    try:
        model.encoder.load_state_dict(state.encoder)
        model.catalog.attributes.load_state_dict(state.attributes)
        table = {name: one for name, one in state.table.items() if name != UNAVERAGED}
        model.catalog.load_state_dict(table)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise RuntimeError(
            f"{checkpoint} must hold the weights of this model, got {error}; give the encoder that "
            "was trained, or use another checkpoint"
        ) from error
    model.encoder.eval()
    return model, state.progress


def _find(run: Path, prepared: Prepared, which: Literal["best", "last"], encoder: Any) -> Source:
    config = open_run(run, prepared, own_encoder=encoder is None)
    checkpoint = open_checkpoints(run, config).find(which)
    if which == "best":
        _warn_of_missing_best(run, checkpoint)
    identity = {
        "run": _digest((run / "run.json").read_bytes() + (run / "config.json").read_bytes()),
        "checkpoint": checkpoint.name,
        "weights": _digest(checkpoint.read(MANIFEST)),
        "data": prepared.fingerprint,
    }
    return Source(config, checkpoint, identity)


def _with_memory(run: Path, source: Source) -> Source:
    memory = find_memory(run, source.identity)
    if memory is None:
        return source
    identity = source.identity | {"memory": _digest(json.dumps(memory, sort_keys=True).encode())}
    return dataclasses.replace(
        source, identity=identity, memory=memory, successors=run / MEMORY / SUCCESSORS
    )


def _warn_of_missing_best(run: Path, found: Folder) -> None:
    """Say so where the best checkpoint is not the one that the run's end names."""
    step = read_json(run / END).get("best_step")
    if type(step) is int and found.name != f"step-{step:08d}":
        logging.getLogger(__name__).warning(
            "the best checkpoint of %s, of step %d, is gone or damaged: %s is used instead",
            run,
            step,
            found,
        )


def _digest(content: bytes) -> str:
    """A short hash."""
    return hashlib.sha256(content).hexdigest()[:16]
