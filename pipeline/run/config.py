"""The complete config of a run; does not import TorchRec, so ``plan`` and ``--help`` are fast."""

from dataclasses import dataclass, field, fields
from typing import Literal, get_args
from urllib.parse import urlsplit

from shardrec.modules.catalog_config import CatalogConfig
from shardrec.modules.encoder import EncoderConfig
from shardrec.modules.losses import CCE, AnyLoss
from shardrec.modules.option_checks import (
    require_above_zero,
    require_at_least,
    require_betas,
    require_choice,
    require_within,
)
from shardrec.pipeline.model.config import DEFAULT_METRIC, MeasureConfig, Precision
from shardrec.pipeline.near_names import unknown_name
from shardrec.pipeline.prepared.loader import BatchConfig

__all__ = [
    "CheckpointConfig",
    "InitConfig",
    "LimitConfig",
    "MLflowConfig",
    "MemoryConfig",
    "OptimizerConfig",
    "OwnEncoderConfig",
    "ParallelConfig",
    "ProfileConfig",
    "TrainConfig",
    "ValidationConfig",
]

LARGEST_SEED = 2**63 - 1  # the largest that torch operators take


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitConfig:
    """When a run ends: at the first limit that is reached.

    Attributes:
        max_epochs: passes over the training sequences.
        max_steps: optimizer steps.
        max_minutes: wall time of the run on rank 0's clock, which reserves time for a last
            validation as long as the previous one, but none for the last checkpoint.
    """

    max_epochs: int | None = 20
    max_steps: int | None = None
    max_minutes: float | None = None

    def __post_init__(self) -> None:
        """Refuse a run without end and limits that allow no step."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        if all(value is None for value in values.values()):
            raise ValueError("limits must name at least one limit, got none; set max_epochs")
        for name, value in values.items():
            require_above_zero(f"limits.{name}", value, "none turns it off")


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """When the model is measured on the validation users, and when to stop.

    Attributes:
        every_epochs: number of epochs between validations; None: not by epochs.
        every_steps: number of steps between validations; None: not by steps.
        metric: metric that decides which checkpoint is best and when to stop; larger is better.
        patience: number of validations without improvement after which the run stops; None: never.
        measure: how the users are ranked.
    """

    every_epochs: int | None = 1
    every_steps: int | None = None
    metric: str = DEFAULT_METRIC
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
        """Whether the run has validations."""
        return self.every_epochs is not None or self.every_steps is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """How encoder and table are updated; the table's own options are in ``CatalogConfig``.

    Attributes:
        learning_rate: learning rate of the encoder; the table's is ``catalog.learning_rate``.
        betas: decay rates of Adam's two moments.
        eps: constant added to the square root in Adam's update.
        weight_decay: decoupled weight decay (AdamW) of the encoder.
        warmup_steps: steps over which both learning rates rise linearly from 0.
        decay: schedule after warm-up, "constant" or "cosine" (to 0 at the last step of the run).
        clip_norm: largest L2 norm of the gradient over encoder and table together; None: no limit.
        accumulate: micro-batches per optimizer step, with gradients as of one large batch.
        ema_decay: share of an exponential moving average of all weights that a step leaves, such as
            0.999; validation, checkpoints and all later stages use the average. 0: no average.
        ema_every: steps between two updates of that average; each reads and writes all weights.
        max_skipped: number of consecutive steps with a loss or gradient that is not finite after
            which the run fails.
    """

    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay: Literal["constant", "cosine"] = "constant"
    clip_norm: float | None = None
    accumulate: int = 1
    ema_decay: float = 0.0
    ema_every: int = 10
    max_skipped: int = 10

    def __post_init__(self) -> None:
        """Refuse numbers that no run can use."""
        least = {"accumulate": 1, "ema_every": 1, "max_skipped": 1, "warmup_steps": 0}
        for name, bound in least.items():
            require_at_least(f"optimizer.{name}", getattr(self, name), bound)
        require_within("optimizer.ema_decay", self.ema_decay, 0, 0.999999, "give e.g. 0.999")
        if self.ema_every != 10 and not self.ema_decay:
            raise ValueError(
                f"optimizer.ema_every must come with optimizer.ema_decay, got {self.ema_every} "
                "without; set optimizer.ema_decay=0.999"
            )
        require_at_least("optimizer.learning_rate", self.learning_rate, 0, "give e.g. 1e-3")
        require_within("optimizer.learning_rate", self.learning_rate, 0, 1e30, "give e.g. 1e-3")
        require_at_least("optimizer.weight_decay", self.weight_decay, 0, "0 turns it off")
        # With 0 a weight whose gradient is 0 would become 0 / 0.
        require_above_zero("optimizer.eps", self.eps, "give e.g. 1e-8")
        require_above_zero("optimizer.clip_norm", self.clip_norm, "none turns it off")
        require_betas("optimizer.betas", self.betas)
        require_choice("optimizer.decay", self.decay, ("constant", "cosine"))


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How the ranks of a job are laid out; does not change the result.

    Attributes:
        shards: ranks that share one table. More ranks than that hold replicas of it, which take
            the batches of a step (``optimizer.accumulate``) side by side. 0: all ranks; None: those
            of a node, if there are several nodes and at least as many batches in a step, else all.
    """

    shards: int | None = None

    def __post_init__(self) -> None:
        """Refuse numbers below 0."""
        require_at_least("parallel.shards", self.shards, 0, "0 is all ranks")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written, where to, and how many are kept.

    A checkpoint is always written after each validation and at the end of the run.

    Attributes:
        folder: a folder, or an address that pyarrow opens (s3://bucket/prefix), that no other run
            uses; None: "checkpoints" in the run folder.
        every_steps: number of steps between checkpoints; None: not by steps.
        every_minutes: minutes between checkpoints, on rank 0's clock; None: not by time.
        keep: number of the latest checkpoints to keep, in addition to the best.
        background: continue training while a copy of table and optimizer state is written, which
            takes host memory of the same size. Otherwise training waits.
    """

    folder: str | None = None
    every_steps: int | None = None
    every_minutes: float | None = 15.0
    keep: int = 2
    background: bool = True

    def __post_init__(self) -> None:
        """Refuse numbers that would keep nothing or never end."""
        require_at_least("checkpoints.keep", self.keep, 1)
        for name in ("every_steps", "every_minutes"):
            require_above_zero(f"checkpoints.{name}", getattr(self, name), "none turns it off")


@dataclass(frozen=True, kw_only=True, slots=True)
class InitConfig:
    """Warm start: the earlier run to start from, and what is taken from it.

    Attributes:
        run: folder of an earlier run; None: random weights.
        checkpoint: which checkpoint of that run, "best" or "last".
        prepared: prepared folder of the earlier run, to match items by their ids; None: match by
            the item indices that `prepare --items` kept, or else by the ids in the folder that the
            earlier run's config names.
        optimizer: "keep" the state and the step counters of both optimizers, or "reset" them.
        new_rows: initial vectors of items that the earlier run did not know: "random" as in a new
            table, or the "mean" of the known items' vectors. Their optimizer state starts fresh.
    """

    run: str | None = None
    checkpoint: Literal["best", "last"] = "best"
    prepared: str | None = None
    optimizer: Literal["keep", "reset"] = "keep"
    new_rows: Literal["random", "mean"] = "random"

    def __post_init__(self) -> None:
        """Refuse unknown names, and options that do nothing without a run."""
        require_choice("init_from.checkpoint", self.checkpoint, ("best", "last"))
        require_choice("init_from.optimizer", self.optimizer, ("keep", "reset"))
        require_choice("init_from.new_rows", self.new_rows, ("random", "mean"))
        changed = [one.name for one in fields(self) if getattr(self, one.name) != one.default]
        if changed and self.run is None:
            raise ValueError(
                f"init_from.{changed[0]} must come with init_from.run, got none; "
                "name the run to start from"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig:
    """A memory of item pairs that training ends with, as ``memorize`` adds it; off by default.

    Attributes:
        neighbors: number of successors of each item to keep, the strongest; 0: no memory.
        scales: candidates for how much a strength of 1 adds to a logit; the best on the validation
            users is kept, and a single value without asking them.
    """

    neighbors: int = 0
    scales: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)

    def __post_init__(self) -> None:
        """Refuse numbers below 0, and an empty list."""
        require_at_least("memory.neighbors", self.neighbors, 0, "0 is no memory")
        if not self.scales or not all(0 <= scale < float("inf") for scale in self.scales):
            raise ValueError(
                f"memory.scales must be numbers of at least 0, got {self.scales}; use 0,1,2,4,8"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class MLflowConfig:
    """The MLflow store that a run is logged to, in addition to its own folder.

    Attributes:
        uri: address of the tracking store, such as sqlite:///runs.db or a server; None: no logging.
        experiment: name of the experiment; created if missing.
        run_name: name of the MLflow run; None: the name of the run folder.
    """

    uri: str | None = None
    experiment: str = "shardrec"
    run_name: str | None = None

    def __post_init__(self) -> None:
        """Refuse a password: the config is stored with the run and shown in reports."""
        if self.uri is not None and urlsplit(self.uri).password is not None:
            raise ValueError(
                "mlflow.uri must be without a password, because the config is stored with the run, "
                "got one; give it in MLFLOW_TRACKING_PASSWORD, or in the database's password file"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    """Which steps of a run are profiled.

    Attributes:
        steps: number of steps to profile; 0: none.
        warmup: number of steps before them; the first steps load libraries and allocate memory.
    """

    steps: int = 0
    warmup: int = 5

    def __post_init__(self) -> None:
        """Refuse numbers that no run can use."""
        if self.steps < 0 or self.warmup < 1:
            raise ValueError(
                "profile.steps must be at least 0 and profile.warmup at least 1, got "
                f"{self.steps} and {self.warmup}; steps=0 turns it off"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnEncoderConfig:
    """An encoder of your own; `encoder=package.module:Class` on the command line sets it.

    Attributes:
        module: a class of torch.nn.Module, as package.module:Class, whose objects turn (B, L, D)
            item vectors into (B, L, D) states; None: the encoder that encoder.kind names.
        options: arguments of its constructor, as name=value; options of encoder whose name equals
            that of an argument are passed to it as well.
    """

    module: str | None = None
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse options without a module."""
        if self.options and self.module is None:
            raise ValueError(
                f"own_encoder.options must come with own_encoder.module, got "
                f"{','.join(self.options)}; name the class"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """All options of a run.

    Attributes:
        data: the prepared folder.
        output: the run folder, new or empty.
        loss: the loss to minimise, with its options.
        catalog: initialisation and optimizer of the item table.
        encoder: sizes and kind of the encoder; its width is the table's too.
        batches: how sequences become batches.
        optimizer: learning rates of the encoder, clipping, accumulation.
        parallel: how many ranks share a table.
        limits: when to stop.
        validation: when to measure.
        checkpoints: when they are written, where to, how many are kept.
        memory: item pairs that are counted after training and added to the scores.
        init_from: the earlier run to take weights from (a warm start).
        seed: seed of all random choices, in [0, 2**63).
        device: "auto", "cpu" or "cuda"; auto takes CUDA if available.
        precision: of the products of encoder and loss, and of states between ranks; "auto" is
            bfloat16 on GPUs of compute capability 8.0 or more, float32 elsewhere. Weights, table,
            gradients and optimizer states are float32.
        log_every: steps between two step lines in metrics.jsonl, TensorBoard and MLflow.
        show_progress: whether rank 0 prints config, plan and progress.
        mlflow: the MLflow store to log to, in addition to the run folder.
        profile: the steps to profile; the result is written to `profile/` in the run folder.
        own_encoder: a module of your own in place of the encoder.
        callbacks: classes or functions that make callbacks of your own, as package.module:Class.
    """

    data: str
    output: str
    loss: AnyLoss = field(default_factory=CCE)
    catalog: CatalogConfig = field(default_factory=CatalogConfig)
    encoder: EncoderConfig
    batches: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    limits: LimitConfig = field(default_factory=LimitConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    init_from: InitConfig = field(default_factory=InitConfig)
    seed: int = 1
    device: str = "auto"
    precision: Precision = "auto"
    log_every: int = 10
    show_progress: bool = True
    mlflow: MLflowConfig = field(default_factory=MLflowConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    own_encoder: OwnEncoderConfig = field(default_factory=OwnEncoderConfig)
    callbacks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse unknown names, and numbers that no run can use."""
        require_choice("device", self.device, ("auto", "cpu", "cuda"))
        require_choice("precision", self.precision, get_args(Precision))
        require_at_least("log_every", self.log_every, 1)
        require_within("seed", self.seed, 0, LARGEST_SEED, "any whole number in there will do")
        if self.encoder.width % 4:
            raise ValueError(
                f"encoder.width must be a multiple of 4, got {self.encoder.width}, because item "
                f"vectors are that wide; use {-(-self.encoder.width // 4) * 4}"
            )
