"""The recipe ``default``: options of a run by the size of the prepared log.

The rules and the sweep behind them are in docs/which-loss.md.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from shardrec.modules.catalog_config import CatalogConfig
from shardrec.modules.encoder_config import EncoderConfig
from shardrec.modules.losses import CCE, AnyLoss, CCEMinus
from shardrec.pipeline.model.config import MeasureConfig
from shardrec.pipeline.outputs.files import MANIFEST_NAME
from shardrec.pipeline.prepared.loader import BatchConfig
from shardrec.pipeline.run.config import (
    LimitConfig,
    MemoryConfig,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)

__all__ = ["LogSize", "default", "options_for", "read_size", "said"]

LEARNING_RATE = 4e-3  # of unit-length vectors, with Adam
MANY_ITEMS = 1_000_000  # one number of optimizer state a row instead of two vectors
WIDE_ITEMS = 200_000
FEW_ITEMS = 4_096  # the exact softmax costs no more than a sampled one
MOST_EVENTS_IN_MEMORY = 50_000_000  # pairs are counted in one process, up to three an event
SCALES = (0.0, 1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 24.0)
USUAL_SCALE = 4.0  # where no validation users choose one
SAMPLED_USERS = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class LogSize:
    """What the recipe is chosen by: counts of the training part of a prepared log.

    Attributes:
        items: V, the whole catalog.
        events: training events.
        sequences: training sequences, one a user.
        validation_users: users to choose the best weights by.
        long_sequence: length, in events, that one sequence in a hundred exceeds.
    """

    items: int = 20_000
    events: int = 500_000
    sequences: int = 50_000
    validation_users: int = 10_000
    long_sequence: int = 50

    @classmethod
    def of_items(cls, items: int) -> "LogSize":
        """A log with as many events an item and a sequence as the default values."""
        events = 25 * items
        return cls(items=items, events=events, sequences=events // 10)

    @property
    def events_per_item(self) -> float:
        """Mean number of training events of an item."""
        return self.events / max(1, self.items)


def default(data: str, output: str) -> TrainConfig:
    """Chosen by counts of the prepared log; as for 20,000 items and 500,000 events without one."""
    return options_for(read_size(data), data, output)


def read_size(data: str) -> LogSize:
    """The size of a prepared log; of a middling log if there is no such folder yet.

    Then ``train`` fails as it would with any recipe, while a job for a cluster can be described
    where its data is not.

    Raises:
        ValueError: the manifest is damaged.
    """
    if not (Path(data) / MANIFEST_NAME).is_file():
        return LogSize()
    from shardrec.pipeline.prepared.manifest import read_manifest

    manifest = read_manifest(Path(data), only=())
    counts, lengths = manifest.counts, manifest.quantiles["train_sequence_length"]
    return LogSize(
        items=counts["items"],
        events=counts["train_sequence_events"],
        sequences=counts["train_sequences"],
        validation_users=counts["validation_users"],
        long_sequence=lengths["0.99"],
    )


def options_for(size: LogSize, data: str, output: str) -> TrainConfig:
    """The options for a log of this size."""
    has_many, is_measured = size.items > MANY_ITEMS, size.validation_users > 0
    return TrainConfig(
        data=data,
        output=output,
        loss=_loss(size.items),
        catalog=CatalogConfig(
            optimizer="rowwise_adagrad" if has_many else "adam",
            learning_rate=0.02 if has_many else LEARNING_RATE,
            betas=(0.9, 0.98),
        ),
        encoder=EncoderConfig(
            width=_width(size),
            max_length=_length(size),
            num_heads=2,
            dropout=_dropout(size),
        ),
        batches=BatchConfig(batch_size=_batch_size(size), windows="all"),
        optimizer=OptimizerConfig(
            learning_rate=LEARNING_RATE, warmup_steps=100, decay="cosine", clip_norm=5.0
        ),
        limits=LimitConfig(max_epochs=_epochs(size)),
        validation=ValidationConfig(
            every_epochs=1 if is_measured else None,
            patience=3 if is_measured else None,
            measure=MeasureConfig(ks=(10,), sample_users=SAMPLED_USERS),
        ),
        memory=MemoryConfig(
            neighbors=32 if size.events <= MOST_EVENTS_IN_MEMORY else 0,
            scales=SCALES if is_measured else (USUAL_SCALE,),
        ),
    )


def _loss(items: int) -> AnyLoss:
    if items <= FEW_ITEMS:
        return CCE(normalize=True, temperature=0.07)
    negatives = 1024 if items <= MANY_ITEMS else 4096
    return CCEMinus(num_negatives=negatives, share=128, normalize=True, temperature=0.07)


def _width(size: LogSize) -> int:
    """Narrower where the update of the table would be most of a step."""
    return 128 if size.items <= WIDE_ITEMS else 64


def _length(size: LogSize) -> int:
    """The length, in tens, that 99 % of the sequences do not exceed, in [10, 50]."""
    return min(50, max(10, -(-size.long_sequence // 10) * 10))


def _dropout(size: LogSize) -> float:
    """Less where items have many events to learn from, as SASRec was published with."""
    return 0.3 if size.events_per_item < 100 else 0.2


def _batch_size(size: LogSize) -> int:
    """A power of two that makes about 200 steps an epoch, in [32, 512]."""
    power = round(math.log2(max(1, _windows(size)) / 200))
    return 1 << min(9, max(5, power))


def _windows(size: LogSize) -> int:
    """About how many windows an epoch has: one a sequence, more where sequences are long."""
    return size.sequences + size.events // _length(size)


def _epochs(size: LogSize) -> int:
    """12 up to 300,000 events, fewer above: with four times the events half the epochs."""
    return max(3, min(12, round(12 * math.sqrt(3e5 / max(1, size.events)))))


def said(size: LogSize) -> str:
    """Two lines: what the recipe chose, and from which counts."""
    config = options_for(size, "", "")
    loss, encoder = config.loss, config.encoder
    negatives = f" with {loss.num_negatives:,} negatives" if isinstance(loss, CCEMinus) else ""
    return (
        f"recipe default for {size.items:,} items, {size.events:,} training events "
        f"({size.events_per_item:.1f} an item) in {size.sequences:,} sequences:\n"
        f"  {loss.name}{negatives}, width {encoder.width}, length {encoder.max_length}, dropout "
        f"{encoder.dropout:g}, batches of {config.batches.batch_size} windows, at most "
        f"{config.limits.max_epochs} epochs"
    )
