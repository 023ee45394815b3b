"""What ``prepare`` asks of an engine, which sorts and writes a log, and what it gets back."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from shardrec.pipeline.log.columns import EventColumns
from shardrec.pipeline.log.config import PrepareConfig
from shardrec.pipeline.log.item_attributes import ItemAttributes
from shardrec.pipeline.log.item_indices import FormerItems
from shardrec.pipeline.log.reader import EventLog
from shardrec.pipeline.log.repetition import Repetition
from shardrec.pipeline.outputs.files import FileEntry

__all__ = ["Content", "Engine", "Folders", "Histogram", "Source", "require_training_users"]

Array = npt.NDArray[Any]
_QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)


@dataclasses.dataclass(frozen=True, slots=True)
class Histogram:
    """The different values of some numbers, ascending, and how often each occurs."""

    values: Array
    counts: Array

    @classmethod
    def of(cls, numbers: Array) -> "Histogram":
        """The histogram of an array."""
        return cls(*np.unique(numbers, return_counts=True))

    def quantiles(self) -> dict[str, int]:
        """The least, the median, and so on, by the share of the numbers up to them.

        Example:
            >>> Histogram.of(np.arange(1, 11)).quantiles()
            {'0': 1, '0.5': 5, '0.9': 9, '0.99': 10, '1': 10}
        """
        ends = np.cumsum(self.counts)
        ranks = np.ceil(ends[-1] * np.array(_QUANTILES) - 1).clip(0)
        found = self.values[np.searchsorted(ends, ranks, side="right")]
        return {f"{q:g}": int(value) for q, value in zip(_QUANTILES, found, strict=True)}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """What an engine has written and counted.

    Attributes:
        test_time, validation_time: as in ``Cuts``.
        num_events: events of the log without dropped duplicates and repeats.
        repetition: of the events.
        events_in_catalog: those of ``num_events`` whose item is in the catalog.
        former_counts: numbers of former and new items; empty without former items.
        counts: numbers of users, items, sequences and targets.
        lengths: events of the training sequences.
        item_counts: training events of the items.
        load_per_rank: as in the manifest.
        files: what was written.
    """

    test_time: int | None
    validation_time: int | None
    num_events: int
    repetition: Repetition
    events_in_catalog: int
    former_counts: Mapping[str, int]
    counts: Mapping[str, int]
    lengths: Histogram
    item_counts: Histogram
    load_per_rank: dict[str, list[float]]
    files: tuple[FileEntry, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """What is prepared: the log, and the former items and attributes where options name them."""

    log: EventLog
    former: FormerItems | None
    attributes: ItemAttributes | None


@dataclasses.dataclass(frozen=True, slots=True)
class Folders:
    """Where an engine writes: ``output`` becomes the prepared folder, ``work`` is deleted."""

    output: Path
    work: Path


class Engine(Protocol):
    """Sorts a log and writes what belongs into a prepared folder."""

    def open(self, source: str, columns: EventColumns) -> EventLog:
        """The log; see ``EventLog.open``."""
        ...

    def write(self, config: PrepareConfig, source: Source, folders: Folders) -> Content:
        """Write everything but the manifest.

        Raises:
            ValueError: the log or the earlier items are invalid, or nothing is left to train on.
            MemoryError, OSError: memory or disk do not suffice.
        """
        ...


def require_training_users(num_sequences: int, config: PrepareConfig) -> None:
    """Raise ValueError if there is no training sequence."""
    if num_sequences == 0:
        raise ValueError(
            "at least one user must have 2 or more training events, got none; check user_column "
            f"(is it a session or a row number?), lower min_user_events={config.min_user_events} "
            "or move the split"
        )
