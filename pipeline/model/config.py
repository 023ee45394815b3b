"""Precision and evaluation options of a model; imports neither TorchRec nor torchmetrics."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from shardrec.modules.option_checks import require_at_least

__all__ = [
    "DEFAULT_METRIC",
    "TIES",
    "MeasureConfig",
    "Precision",
    "default_metric",
    "describe_lists",
]

# What checkpoints, gates, reports and the demo are judged by, where nothing else is chosen.
DEFAULT_METRIC = "NDCG@10"
TIES = "by a hash of the item"

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureConfig:
    """How evaluation users are ranked.

    Attributes:
        ks: list lengths of the metrics.
        filter_seen: leave out items of the history; a target among them counts as missed.
        min_count: training events an item must have to be ranked; a target with fewer counts as
            missed. 0 ranks all.
        sample_users: rank for so many users only: the first ones of the prepared data, whose order
            is by a hash of user and seed. A random sample, the same for every run on this data.
        batch_size: users at a time on each rank.
        block_states: states of all ranks that are scored at a time.
        block_rows: rows of a shard that are scored at a time.
    """

    ks: tuple[int, ...] = (5, 10, 20)
    filter_seen: bool = True
    min_count: int = 1
    sample_users: int | None = None
    batch_size: int = 256
    block_states: int = 256
    block_rows: int = 65_536

    def __post_init__(self) -> None:
        """Refuse list lengths and sizes below 1."""
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"ks must be list lengths of at least 1, got {self.ks}; use 5,10")
        for name in ("batch_size", "block_states", "block_rows", "sample_users"):
            require_at_least(name, getattr(self, name), 1)
        require_at_least("min_count", self.min_count, 0)

    @property
    def protocol(self) -> dict[str, Any]:
        """JSON: all that decides which lists the users get; measurements differ where it does."""
        lists = {"ks": list(self.ks), "filter_seen": self.filter_seen, "min_count": self.min_count}
        return {**lists, "sample_users": self.sample_users, "ties": TIES}

    def metric_names(self) -> list[str]:
        """The metrics a best checkpoint can be chosen by."""
        kinds = ("NDCG", "Recall", "HitRate", "MRR")
        names = [f"{kind}@{k}" for kind in kinds for k in self.ks]
        coverage = [f"Coverage@{k}" for k in self.ks]
        return names + coverage + [f"{name}/known" for name in names]


def default_metric(metrics: Mapping[str, float]) -> str:
    """The metric that models are judged by, or the same kind at the greatest length there is."""
    kind = DEFAULT_METRIC.partition("@")[0]
    lengths = [name for name in metrics if name.startswith(f"{kind}@") and "/" not in name]
    longest = max(lengths, key=lambda name: int(name.partition("@")[2]))
    return DEFAULT_METRIC if DEFAULT_METRIC in metrics else longest


def describe_lists(filter_seen: bool, min_count: int) -> dict[str, str]:
    """Which items may be in a list, and the order of equal ones, for readers.

    >>> describe_lists(True, 1)["candidates"]
    'items with a training event'
    """
    candidates = {0: "the whole catalog", 1: "items with a training event"}
    return {
        "candidates": candidates.get(min_count, f"items with {min_count} training events or more"),
        "seen_items": "removed" if filter_seen else "not removed",
        "ties": TIES,
    }
