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
        filter_seen: leave items of the user's history out of the list; a target among them counts
            as missed.
        min_count: fewest training events of an item to be ranked; a target with fewer counts as
            missed. 0 ranks all items.
        sample_users: rank for this many users only: the first of the prepared data, which is
            ordered by a hash of user and seed. So it is a random sample, the same for every run on
            this data.
        batch_size: users per batch on each rank.
        block_states: states, over all ranks, that are scored at a time.
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
        """JSON: the options that the lists depend on; metrics compare only if it is equal."""
        lists = {"ks": list(self.ks), "filter_seen": self.filter_seen, "min_count": self.min_count}
        return {**lists, "sample_users": self.sample_users, "ties": TIES}

    def metric_names(self) -> list[str]:
        """Names of the metrics by which the best checkpoint can be chosen."""
        kinds = ("NDCG", "Recall", "HitRate", "MRR")
        names = [f"{kind}@{k}" for kind in kinds for k in self.ks]
        coverage = [f"Coverage@{k}" for k in self.ks]
        return names + coverage + [f"{name}/known" for name in names]


def default_metric(metrics: Mapping[str, float]) -> str:
    """The default metric if it was measured, else the same kind at the greatest list length."""
    kind = DEFAULT_METRIC.partition("@")[0]
    lengths = [name for name in metrics if name.startswith(f"{kind}@") and "/" not in name]
    longest = max(lengths, key=lambda name: int(name.partition("@")[2]))
    return DEFAULT_METRIC if DEFAULT_METRIC in metrics else longest


def describe_lists(filter_seen: bool, min_count: int) -> dict[str, str]:
    """Text that says which items may be in a list, and how equal scores are ordered.

    >>> describe_lists(True, 1)["candidates"]
    'items with a training event'
    """
    candidates = {0: "the whole catalog", 1: "items with a training event"}
    return {
        "candidates": candidates.get(min_count, f"items with {min_count} training events or more"),
        "seen_items": "removed" if filter_seen else "not removed",
        "ties": TIES,
    }
