"""The results of the stages for scripts and notebooks: folders that become tables."""

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from shardrec.pipeline.model.config import default_metric

if TYPE_CHECKING:
    from shardrec.pipeline.run.callbacks import EndReport
    from shardrec.pipeline.serve import Recommender

__all__ = ["Evaluation", "Export", "Lists", "PreparedLog", "TrainedRun"]


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class _Result(ABC):
    """What a stage has written; it stands for its path wherever a path is asked for."""

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"{self.summary()} ({self.path})"

    @abstractmethod
    def summary(self) -> str:
        """What it is, in one line."""

    @abstractmethod
    def table(self) -> pa.Table:
        """Its content as an Arrow table, which polars and DuckDB take as it is."""

    def to_pandas(self) -> Any:
        """Its content as a pandas data frame."""
        return self.table().to_pandas()


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class PreparedLog(_Result):
    """A prepared folder.

    Attributes:
        path: path of the folder.
        counts: numbers of events, users, items and sequences, kept and left out.
    """

    counts: Mapping[str, int]

    def summary(self) -> str:
        """One line with the numbers of training sequences, items and test users."""
        shown = {"train_sequences": "training sequences", "items": "items", "test_users": "test"}
        numbers = [f"{self.counts[name]:,} {words}" for name, words in shown.items()]
        return f"prepared log of {', '.join(numbers)} users"

    def table(self) -> pa.Table:
        """A table of the counts: name and number."""
        return pa.table({"count": list(self.counts), "number": list(self.counts.values())})


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class TrainedRun(_Result):
    """A run folder.

    Attributes:
        path: path of the folder.
        end: how training ended.
    """

    end: "EndReport"

    @property
    def metrics(self) -> Mapping[str, float]:
        """The best metrics on the validation users; empty without a validation."""
        return self.end.best_metrics

    def summary(self) -> str:
        """One line with the best validation and how training ended."""
        at = f"{self.end.step:,} steps, {self.end.reason}"
        if not self.metrics:
            return f"run of {at}"
        name = default_metric(self.metrics)
        return f"run of {at}; best {name} {self.metrics[name]:.4f} at step {self.end.best_step:,}"

    def table(self) -> pa.Table:
        """A table with a row for each logged step and each validation."""
        rows = []
        for line in (self.path / "metrics.jsonl").read_text().splitlines():
            event = json.loads(line)
            if event["event"] in ("step", "validation"):
                flat = {name: one for name, one in event.items() if not isinstance(one, dict)}
                rows.append(flat | event.get("metrics", {}) | event.get("statistics", {}))
        names = dict.fromkeys(name for row in rows for name in row)
        return pa.table({name: [row.get(name) for row in rows] for name in names})


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Evaluation(_Result):
    """Metrics of a run and of the baselines that it must beat, on the users of a split.

    Attributes:
        path: path of the report.
        report: content of the report.
    """

    report: Mapping[str, Any]

    @property
    def metrics(self) -> Mapping[str, float]:
        """The metrics of the run, by name."""
        return self.report["metrics"]  # type: ignore[no-any-return]

    @property
    def baselines(self) -> Mapping[str, Mapping[str, float]]:
        """The metrics of popularity and of the baselines of the prepared folder."""
        return self.report["baselines"]  # type: ignore[no-any-return]

    def summary(self) -> str:
        """One line with a metric of the run and of the baselines that it must beat, best first."""
        name = default_metric(self.metrics)
        rows = {"run": self.metrics} | dict(self.baselines)
        order = sorted(rows, key=lambda row: rows[row][name] or 0.0, reverse=True)
        shown = ", ".join(f"{row} {rows[row][name] or 0.0:.4f}" for row in order)
        return f"{name} of {self.metrics['users']:,} users: {shown}"

    def table(self) -> pa.Table:
        """A table with a row for each metric of each model: model, metric, value."""
        rows = {"run": self.metrics} | dict(self.baselines)
        cells = [(row, name, value) for row, found in rows.items() for name, value in found.items()]
        names = ("model", "metric", "value")
        columns = zip(*cells, strict=True)
        return pa.table({name: list(one) for name, one in zip(names, columns, strict=True)})


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Lists(_Result):
    """A folder of lists of items.

    Attributes:
        path: path of the folder.
        counts: numbers of users and items, and of what was unknown.
    """

    counts: Mapping[str, int]

    def summary(self) -> str:
        """One line with the number of users."""
        return f"lists for {self.counts['users']:,} users"

    def table(self) -> pa.Table:
        """A table with a row for each user: user_id, item_ids, scores."""
        return pq.read_table(self.path)


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Export(_Result):
    """An export for serving.

    Attributes:
        path: path of the folder.
        manifest: manifest of the folder.
    """

    manifest: Mapping[str, Any]

    def summary(self) -> str:
        """One line with the number of items and the catalog version."""
        version = self.manifest["catalog_version"]
        return f"export of {self.manifest['num_items']:,} items, catalog {version}"

    def table(self) -> pa.Table:
        """A table with a row for each item: id, number of training events, vector."""
        return pq.read_table(self.path / "items")

    def open(self, **options: Any) -> "Recommender":
        """A ``Recommender`` for this export; options are those of ``Recommender.open``."""
        from shardrec.pipeline.serve import Recommender

        return Recommender.open(self.path, **options)
