"""A run: its complete config, and its folder.

::

    config.json       the complete config
    run.json          which data it belongs to, whose encoder it is, versions
    metrics.jsonl     steps, validations, checkpoints, end
    tensorboard/      the same as scalars
    checkpoints/      the last few and the best, unless they are elsewhere
    end.json          how the run ended; until it is there the run is interrupted
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import nn

from shardrec.modules.catalog import Catalog, CatalogConfig
from shardrec.modules.encoder import EncoderConfig, TransformerEncoder
from shardrec.modules.losses import CCE, AnyLoss
from shardrec.modules.option_checks import (
    require_above_zero,
    require_at_least,
    require_choice,
    require_within,
)
from shardrec.pipeline.checkpoint.state import versions
from shardrec.pipeline.checkpoint.store import CheckpointConfig, Checkpoints, write_atomically
from shardrec.pipeline.config import from_json, to_json, unknown_name
from shardrec.pipeline.init_config import InitConfig
from shardrec.pipeline.model.measure import MeasureConfig
from shardrec.pipeline.model.model import Model, Precision
from shardrec.pipeline.outputs.json_files import Shape, read_object, require_shape
from shardrec.pipeline.outputs.staging import settle
from shardrec.pipeline.prepared.loader import BatchConfig, Prepared
from shardrec.pipeline.ranks import on_this_rank
from shardrec.pipeline.run.mlflow_logging import MLflowConfig
from shardrec.pipeline.run.profiler import ProfileConfig
from shardrec.pipeline.run.step import OptimizerConfig

__all__ = [
    "LimitConfig",
    "TrainConfig",
    "ValidationConfig",
    "build_model",
    "open_checkpoints",
    "open_run",
    "read_run",
    "require_new",
    "start_run",
    "write_config",
]

OURS = "shardrec"
LARGEST_SEED = 2**63 - 1  # what the operators of torch take
_REMEDY = "use the version of shardrec that wrote it, or train again in another folder"


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitConfig:
    """When a run ends; the first limit reached counts.

    Attributes:
        max_epochs: passes over the training sequences.
        max_steps: optimizer steps.
        max_minutes: wall time of the run on rank 0's clock.
    """

    max_epochs: int | None = 20
    max_steps: int | None = None
    max_minutes: float | None = None

    def __post_init__(self) -> None:
        """Refuse a run without end and limits that allow no step."""
        values = {name: getattr(self, name) for name in ("max_epochs", "max_steps", "max_minutes")}
        if all(value is None for value in values.values()):
            raise ValueError("limits must name at least one limit, got none; set max_epochs")
        for name, value in values.items():
            require_above_zero(f"limits.{name}", value, "none turns it off")


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """When the model is measured on the validation users, and what follows.

    Attributes:
        every_epochs: after this many epochs; None: not by epochs.
        every_steps: after this many steps; None: not by steps.
        metric: the one that decides which checkpoint is best and when to stop; larger is better.
        patience: validations without a better one before the run stops; None: never.
        measure: how the users are ranked.
    """

    every_epochs: int | None = 1
    every_steps: int | None = None
    metric: str = "NDCG@10"
    patience: int | None = None
    measure: MeasureConfig = MeasureConfig(ks=(10,))

    def __post_init__(self) -> None:
        """Refuse a metric that will not be measured, and numbers below 1."""
        known = self.measure.metric_names()
        if self.metric not in known:
            raise ValueError(unknown_name("validation.metric", self.metric, known))
        for name in ("every_epochs", "every_steps", "patience"):
            require_at_least(f"validation.{name}", getattr(self, name), 1, "or set it to none")

    @property
    def is_on(self) -> bool:
        """Whether there are validations at all."""
        return self.every_epochs is not None or self.every_steps is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything a run depends on.

    Attributes:
        data: the prepared folder.
        output: the run folder; must not exist or be empty.
        loss: what is minimised.
        catalog: start and optimizer of the item table.
        encoder: sizes and kind of the encoder; its width is the table's too.
        batches: how sequences become batches.
        optimizer: learning rates of the encoder, clipping, accumulation.
        limits: when to stop.
        validation: when to measure.
        checkpoints: when they are written, where to, how many are kept.
        init_from: the earlier run whose weights this one starts from.
        seed: of all random choices, in [0, 2**63).
        device: "auto", "cpu" or "cuda"; auto takes CUDA where it is.
        precision: of the encoder's products; "auto" is bfloat16 on CUDA, float32 elsewhere.
        log_every: steps between two step lines in metrics.jsonl, TensorBoard and MLflow.
        show_progress: whether rank 0 prints config, plan and progress.
        profile: the steps that are profiled; `profile/` in the run folder then holds the result.
        mlflow: where the run is logged besides its folder.
    """

    data: str
    output: str
    loss: AnyLoss = field(default_factory=CCE)
    catalog: CatalogConfig = field(default_factory=CatalogConfig)
    encoder: EncoderConfig
    batches: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    limits: LimitConfig = field(default_factory=LimitConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    init_from: InitConfig = field(default_factory=InitConfig)
    seed: int = 1
    device: str = "auto"
    precision: Precision = "auto"
    log_every: int = 10
    show_progress: bool = True
    mlflow: MLflowConfig = field(default_factory=MLflowConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        """Refuse names that mean nothing, and numbers that no run can use."""
        require_choice("device", self.device, ("auto", "cpu", "cuda"))
        require_choice("precision", self.precision, get_args(Precision))
        require_at_least("log_every", self.log_every, 1)
        require_within("seed", self.seed, 0, LARGEST_SEED, "any whole number in there will do")
        if self.encoder.width % 4:
            raise ValueError(
                f"encoder.width must be a multiple of 4, got {self.encoder.width}, because item "
                f"vectors are that wide; use {-(-self.encoder.width // 4) * 4}"
            )


def start_run(
    config: TrainConfig,
    prepared: Prepared,
    encoder: str = OURS,
    origin: Mapping[str, Any] | None = None,
) -> Path:
    """Make the run folder and say in it what the run is.

    Args:
        config: of the run; ``config.output`` is the folder.
        prepared: the data.
        encoder: whose encoder it is, in words, where it is not ours.
        origin: JSON; what ``start_from`` took over from an earlier run.

    Returns:
        The folder.
    """
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    details = {
        "data": {"fingerprint": prepared.fingerprint, "num_items": prepared.num_items},
        "encoder": encoder,
        "init_from": origin,
        "versions": versions(),
    }
    write_config(config, folder)
    # A folder is a run once it has this file, so it comes last.
    write_atomically(folder / "run.json", json.dumps(details, indent=1))
    return folder


def write_config(config: TrainConfig, folder: Path) -> None:
    """Write the complete config into a run folder."""
    write_atomically(folder / "config.json", json.dumps(to_json(config), indent=1))


def open_checkpoints(
    folder: Path, config: TrainConfig, group: dist.ProcessGroup | None = None
) -> Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: the run folder, which may have been moved since.
        config: of the run.
        group: the ranks that write or resume together; None for one process.
    """
    where = config.checkpoints.folder or folder / "checkpoints"
    return Checkpoints(where, group, config.checkpoints.keep)


def require_new(folder: Path) -> Path:
    """The folder, if it does not exist or is empty.

    Raises:
        FileExistsError: it holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"output must be a new or empty folder, got {folder}, which holds another run or other "
            "files; choose another name, remove it, or resume the run"
        )
    return folder


def open_run(folder: Path, prepared: Prepared, *, own_encoder: bool = True) -> TrainConfig:
    """The config of a run that belongs to ``prepared``.

    Args:
        folder: a run folder.
        prepared: the data it is to be used with.
        own_encoder: whether the encoder will be built from the config.

    Raises:
        FileNotFoundError: it is not a run folder.
        ValueError: the run was trained on other data, or with an encoder that was handed in, or a
            file of it is damaged.
    """
    details, config = read_run(folder)
    theirs = details["data"]
    if theirs["fingerprint"] != prepared.fingerprint:
        raise ValueError(
            f"the run must belong to the prepared data, got {folder} of {config.data} with "
            f"{theirs['num_items']} items, and data with {prepared.num_items} items and another "
            "fingerprint; give the folder the run was trained on, or train again"
        )
    if own_encoder and details["encoder"] != OURS:
        raise ValueError(
            f"encoder must be given for a run that trained {details['encoder']}, got none; "
            "pass a module of the same shapes"
        )
    return config


def read_run(folder: Path) -> tuple[dict[str, Any], TrainConfig]:
    """What run.json of a run folder says, and its config.

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


def _read_file(folder: Path, name: str, shape: Shape) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        settle(folder)
    if not path.is_file():
        raise FileNotFoundError(
            f"run must be a folder that train wrote, got {folder} without {name}; check the path"
        )
    return read_object(path, shape, _REMEDY)


def build_model(
    config: TrainConfig,
    num_items: int,
    encoder: nn.Module | None,
    group: dist.ProcessGroup | None,
) -> Model:
    """An untrained model: the same encoder on every rank, and this rank's rows.

    Args:
        config: of the run.
        num_items: V.
        encoder: used instead of the one the config describes; rank 0's weights count.
        group: the ranks that share the catalog; None for one process.

    Raises:
        ValueError: the encoder is not a causal module from (B, L, D) to (B, L, D), or the device is
            not there, on this rank or another.

    Collectives: a gather of small objects, a broadcast of the encoder's weights, those of the
    catalog's start.
    """
    device = on_this_rank(lambda: pick_device(config.device), group)
    own = TransformerEncoder(config.encoder, seed=config.seed) if encoder is None else encoder
    own = own.to(device)
    if encoder is not None:
        on_this_rank(lambda: check_encoder(own, config.encoder.width, device), group)
    if group is not None:
        for tensor in own.state_dict().values():
            dist.broadcast(tensor, 0, group=group)
    catalog = Catalog(
        num_items,
        config.encoder.width,
        config.catalog,
        group=group,
        device=device,
        seed=config.seed,
    )
    return Model(own, catalog, config.precision, normalize=config.loss.normalize)


@torch.no_grad()
def check_encoder(encoder: nn.Module, width: int, device: torch.device) -> None:
    """Refuse an encoder of the wrong shape, or one that looks ahead.

    Raises:
        ValueError: it returns another shape, or its first state changes with the last vector.
    """
    was_training = encoder.training
    vectors = torch.ones(2, 2, width, device=device)
    vectors[1, 1] = torch.linspace(-2, 2, width, device=device)
    states = encoder.eval()(vectors)
    encoder.train(was_training)
    if states.shape != vectors.shape:
        raise ValueError(
            f"encoder must return shape {tuple(vectors.shape)} for that input, got "
            f"{tuple(states.shape)}; give a module from (B, L, D) to (B, L, D)"
        )
    if not torch.allclose(states[0, 0], states[1, 0], rtol=1e-3, atol=1e-4):
        raise ValueError(
            "encoder must be causal, got one whose first state changes with the second item; "
            "mask the future, or it will be trained on its own targets"
        )


def pick_device(name: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda" means here.

    Raises:
        ValueError: CUDA is asked for and does not answer.
    """
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ValueError(
            "device must be one that is there, got cuda without a GPU; use auto or cpu"
        )
    use_cuda = found and name != "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if use_cuda else torch.device("cpu")
