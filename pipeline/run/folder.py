"""Write and read the files of a run folder.

::

    config.json       the complete config
    run.json          fingerprint of the data, kind of encoder, versions
    item_attributes.json    meaning of the codes of the items' attributes, if the run uses them
    metrics.jsonl     steps, validations, checkpoints, end
    tensorboard/      the same as scalars
    checkpoints/      the last few and the best, unless checkpoints.folder is set
    memory/           output of memorize, if it was run
    end.json          how the run ended; a run without it is interrupted
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from shardrec.pipeline.checkpoint.state import versions
from shardrec.pipeline.checkpoint.store import Checkpoints
from shardrec.pipeline.config import flatten, from_json, to_json
from shardrec.pipeline.outputs.addresses import stored_without_keys
from shardrec.pipeline.outputs.json_files import (
    Shape,
    read_json,
    read_object,
    require_inside,
    require_shape,
    write_atomically,
)
from shardrec.pipeline.outputs.staging import settle
from shardrec.pipeline.prepared.attributes import read_columns, write_columns
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.run.config import TrainConfig

__all__ = [
    "END",
    "MEMORY",
    "METRICS",
    "OWN_ENCODER",
    "encoder_name",
    "is_free",
    "open_checkpoints",
    "open_run",
    "read_run",
    "require_new",
    "run_id",
    "start_run",
    "write_config",
]

# Options that a resumed run may change: they affect neither weights nor the choice of the best.
_FREE = (
    *("data", "output", "device", "log_every", "show_progress", "limits.max_minutes"),
    "callbacks",
)
_FREE_PARTS = ("checkpoints.", "mlflow.", "parallel.", "profile.")

END = "end.json"
MEMORY = "memory"
METRICS = "metrics.jsonl"
OWN_ENCODER = "shardrec"
_REMEDY = "use the version of shardrec that wrote it, or train again in another folder"


def encoder_name(encoder: nn.Module | None) -> str:
    """The encoder's name in run.json: "shardrec", or the class name of a user-supplied module."""
    return OWN_ENCODER if encoder is None else type(encoder).__qualname__


def is_free(name: str) -> bool:
    """Whether a resumed run may change this option."""
    return name in _FREE or name.startswith(_FREE_PARTS)


def start_run(
    config: TrainConfig,
    prepared: Prepared,
    encoder: str = OWN_ENCODER,
    origin: Mapping[str, Any] | None = None,
) -> Path:
    """Create the run folder with config.json and run.json; returns its path.

    Args:
        config: the config of the run; ``config.output`` is the folder.
        prepared: the data.
        encoder: result of ``encoder_name``.
        origin: JSON result of ``start_from``, if the run starts from an earlier one.
    """
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    details = {
        "id": _new_id(config, prepared, encoder),
        "data": {"fingerprint": prepared.fingerprint, "num_items": prepared.num_items},
        "encoder": encoder,
        "init_from": origin,
        "versions": versions(),
    }
    write_config(config, folder)
    if config.catalog.attributes != "none":
        write_columns(folder, read_columns(prepared.path))
    # A folder is a run folder once it has this file, so it is written last.
    write_atomically(folder / "run.json", json.dumps(details, indent=1))
    return folder


def write_config(config: TrainConfig, folder: Path) -> None:
    """Write the complete config into a run folder, without the access keys in addresses."""
    stored = stored_without_keys(to_json(config))
    write_atomically(folder / "config.json", json.dumps(stored, indent=1))


def open_checkpoints(
    folder: Path, config: TrainConfig, group: dist.ProcessGroup | None = None
) -> Checkpoints:
    """The checkpoints of the run in ``folder``, even if the folder was moved after the start."""
    where = config.checkpoints.folder or folder / "checkpoints"
    return Checkpoints(where, group, config.checkpoints.keep, run_id(folder))


def run_id(folder: Path) -> str | None:
    """The id of a run, which its checkpoints store too; None for a run before version 0.3."""
    found = read_json(folder / "run.json").get("id")
    return found if isinstance(found, str) else None


def require_new(folder: Path) -> Path:
    """The folder, after checking that it does not exist or is empty.

    Raises:
        FileExistsError: the folder is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"output must be a new or empty folder, got {folder}, which holds another run or other "
            "files; choose another name, remove it, or resume the run"
        )
    return folder


def open_run(folder: Path, prepared: Prepared, *, own_encoder: bool = True) -> TrainConfig:
    """The config of a run, after checking that it was trained on ``prepared``.

    ``own_encoder`` tells whether the encoder will be built from the config.

    Raises:
        FileNotFoundError: it is not a run folder.
        ValueError: the run was trained on other data, it needs a user-supplied encoder, or one of
            its files is damaged.
    """
    details, config = read_run(folder)
    data = details["data"]
    if data["fingerprint"] != prepared.fingerprint:
        raise ValueError(
            f"the run must belong to the prepared data, got {folder} of {config.data} with "
            f"{data['num_items']} items, and data with {prepared.num_items} items and another "
            "fingerprint; give the folder the run was trained on, or train again"
        )
    is_built = details["encoder"] == OWN_ENCODER or config.own_encoder.module is not None
    if own_encoder and not is_built:
        raise ValueError(
            f"encoder must be given for a run that trained {details['encoder']}, got none; "
            "pass a module of the same shapes"
        )
    return config


def read_run(folder: Path) -> tuple[dict[str, Any], TrainConfig]:
    """The content of run.json in a run folder, and the config of the run.

    Raises:
        FileNotFoundError: it is not a run folder.
        ValueError: a file is damaged or of another version; the message names it.
    """
    details = _read_file(folder, "run.json", {"data": dict, "encoder": str})
    where = f"'data' in {folder / 'run.json'}"
    require_shape(details["data"], {"fingerprint": str, "num_items": int}, where, _REMEDY)
    stored = _read_file(folder, "config.json", {})
    try:
        return details, from_json(TrainConfig, stored)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{folder / 'config.json'} must be the config of a run: {error}; {_REMEDY}"
        ) from error


def _new_id(config: TrainConfig, prepared: Prepared, encoder: str) -> str:
    """A short hash of what decides the weights: equal runs write equal checkpoints."""
    options = {name: value for name, value in flatten(config) if not is_free(name)}
    decisive = [options, prepared.fingerprint, encoder]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]


def _read_file(folder: Path, name: str, shape: Shape) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        settle(folder)
    if not path.is_file():
        raise FileNotFoundError(
            f"run must be a folder that train wrote, got {folder} without {name}; check the path"
        )
    return read_object(require_inside(path, _REMEDY), shape, _REMEDY)
