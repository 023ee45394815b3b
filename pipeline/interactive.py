"""The stages for scripts and notebooks: tables and paths in, results with short reprs out.

Every function does what the command of its name does, with the same options, and writes the same
folders. ``from shardrec import prepare, train, evaluate, recommend, export`` loads it.
"""

import contextlib
import dataclasses
import filecmp
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from shardrec.pipeline.model.config import default_metric

if TYPE_CHECKING:
    from torch import nn

    from shardrec.pipeline.run.callbacks import Callback, EndReport
    from shardrec.pipeline.run.resume import Resume
    from shardrec.pipeline.serve import Recommender

__all__ = [
    "Evaluation",
    "Export",
    "Lists",
    "PreparedLog",
    "TrainedRun",
    "evaluate",
    "export",
    "prepare",
    "recommend",
    "train",
]

Place = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class _Result:
    """What a stage has written; it stands for its path wherever a path is asked for."""

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"{self.summary()} ({self.path})"

    def summary(self) -> str:
        """What it is, in one line."""
        raise NotImplementedError

    def table(self) -> pa.Table:
        """Its content as an Arrow table, which polars and DuckDB take as it is."""
        raise NotImplementedError

    def to_pandas(self) -> Any:
        """Its content as a pandas data frame."""
        return self.table().to_pandas()


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class PreparedLog(_Result):
    """A prepared folder.

    Attributes:
        path: of the folder.
        counts: events, users, items and sequences, kept and left out.
    """

    counts: Mapping[str, int]

    def summary(self) -> str:
        """The numbers of users and items, and of what is trained and tested on."""
        shown = {"train_sequences": "training sequences", "items": "items", "test_users": "test"}
        numbers = [f"{self.counts[name]:,} {words}" for name, words in shown.items()]
        return f"prepared log of {', '.join(numbers)} users"

    def table(self) -> pa.Table:
        """The counts: name, number."""
        return pa.table({"count": list(self.counts), "number": list(self.counts.values())})


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class TrainedRun(_Result):
    """A run folder.

    Attributes:
        path: of the folder.
        end: how training ended.
    """

    end: "EndReport"

    @property
    def metrics(self) -> Mapping[str, float]:
        """The best metrics on the validation users; empty without a validation."""
        return self.end.best_metrics

    def summary(self) -> str:
        """The best validation, and how training ended."""
        at = f"{self.end.step:,} steps, {self.end.reason}"
        if not self.metrics:
            return f"run of {at}"
        name = default_metric(self.metrics)
        return f"run of {at}; best {name} {self.metrics[name]:.4f} at step {self.end.best_step:,}"

    def table(self) -> pa.Table:
        """The curves: a row for each step that was logged and each validation."""
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
    """Metrics of a run on the users of a split, and of what it must beat.

    Attributes:
        path: of the report.
        report: its content.
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
        """One metric of the run, and of what it must beat, best first."""
        name = default_metric(self.metrics)
        rows = {"run": self.metrics} | dict(self.baselines)
        order = sorted(rows, key=lambda row: rows[row][name] or 0.0, reverse=True)
        shown = ", ".join(f"{row} {rows[row][name] or 0.0:.4f}" for row in order)
        return f"{name} of {self.metrics['users']:,} users: {shown}"

    def table(self) -> pa.Table:
        """One row for each metric of each model: model, metric, value."""
        rows = {"run": self.metrics} | dict(self.baselines)
        cells = [(row, name, value) for row, found in rows.items() for name, value in found.items()]
        names = ("model", "metric", "value")
        columns = zip(*cells, strict=True)
        return pa.table({name: list(one) for name, one in zip(names, columns, strict=True)})


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Lists(_Result):
    """A folder of lists of items.

    Attributes:
        path: of the folder.
        counts: users, items and what was unknown.
    """

    counts: Mapping[str, int]

    def summary(self) -> str:
        """For how many users."""
        return f"lists for {self.counts['users']:,} users"

    def table(self) -> pa.Table:
        """One row for each user: user_id, item_ids, scores."""
        return pq.read_table(self.path)


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Export(_Result):
    """An export for serving.

    Attributes:
        path: of the folder.
        manifest: of the folder.
    """

    manifest: Mapping[str, Any]

    def summary(self) -> str:
        """The number of items, and the version of the catalog."""
        version = self.manifest["catalog_version"]
        return f"export of {self.manifest['num_items']:,} items, catalog {version}"

    def table(self) -> pa.Table:
        """One row for each item: its id, its training events and its vector."""
        return pq.read_table(self.path / "items")

    def open(self, **options: Any) -> "Recommender":
        """The recommender that serves it; options are those of ``Recommender.open``."""
        from shardrec.pipeline.serve import Recommender

        return Recommender.open(self.path, **options)


def prepare(events: Any, output: Place, **options: Any) -> PreparedLog:
    """Prepare an event log.

    Args:
        events: a path, or a table: pandas, polars, Arrow, or any with ``__arrow_c_stream__``. A
            table is written beside the output first, as ``OUTPUT.events.parquet``.
        output: folder to write.
        options: of ``PrepareConfig``, such as ``user_column="customer"``.

    Raises:
        TypeError: ``events`` is neither, or an option does not exist.
        ValueError: as ``shardrec.pipeline.prepare.prepare_once``.
    """
    from shardrec.pipeline.log.config import PrepareConfig
    from shardrec.pipeline.prepare import prepare_once

    source = _as_path(events, "events", output)
    done = prepare_once(PrepareConfig(events=source, output=os.fspath(output), **options))
    return PreparedLog(Path(output), done.manifest.counts)


def train(
    prepared: Place,
    run: Place,
    *overrides: str,
    recipe: str = "demo",
    encoder: "nn.Module | None" = None,
    callbacks: "Sequence[Callback]" = (),
    resume: "Resume" = "auto",
    force: bool = False,
) -> TrainedRun:
    """Train a recipe on a prepared folder, in this process.

    Args:
        prepared: what ``prepare`` returned, or the folder.
        run: folder to write.
        overrides: such as ``"loss=sce"``, ``"encoder.width=64"``; ``"show_progress=false"`` is
            silent.
        recipe: the config to start from.
        encoder: a causal module from (B, L, D) to (B, L, D), used in place of the recipe's.
        callbacks: called after each step and validation.
        resume: "auto" goes on with an interrupted run, and leaves a finished one as it is; "no"
            wants a new folder.
        force: replace the run in the folder.

    Raises:
        Preempted: it was interrupted (Ctrl-C, or the stop button of a notebook), and the checkpoint
            of its last step is complete: the same call continues. A second interrupt raises
            KeyboardInterrupt at once.
        ValueError: as ``shardrec.pipeline.train.train``, and for names that do not exist.
    """
    from shardrec.pipeline.config import override
    from shardrec.pipeline.recipes import recipe_named
    from shardrec.pipeline.train import train as run_train

    start = recipe_named(recipe)(os.fspath(prepared), os.fspath(run))
    config = override(start, overrides)
    with _interruptible() as interrupted:
        end = run_train(
            config,
            encoder=encoder,
            callbacks=callbacks,
            resume=resume,
            force=force,
            interrupted=interrupted,
        )
    return TrainedRun(Path(run), end)


def evaluate(
    run: Place,
    prepared: Place,
    *,
    split: Literal["validation", "test"] = "test",
    encoder: "nn.Module | None" = None,
    force: bool = False,
    **options: Any,
) -> Evaluation:
    """Rank the catalog for the users of a split and write ``metrics.json`` into the run.

    Args:
        run: what ``train`` returned, or the folder of a run or a baseline.
        prepared: the data that it was trained on.
        split: the users.
        encoder: the module given to ``train``, if any.
        force: replace a report of other options.
        options: of ``MeasureConfig``, such as ``ks=(10, 100)``.

    Raises:
        ValueError: as ``shardrec.pipeline.evaluate.evaluate``.
    """
    from shardrec.pipeline.evaluate import evaluate as run_evaluate
    from shardrec.pipeline.model.config import MeasureConfig

    folder, data = os.fspath(run), os.fspath(prepared)
    config = MeasureConfig(**options)
    found = run_evaluate(folder, data, config, split=split, encoder=encoder, force=force)
    return Evaluation(Path(folder) / "metrics.json", found)


def recommend(
    run: Place,
    prepared: Place,
    output: Place,
    *,
    histories: Any = None,
    events: Any = None,
    encoder: "nn.Module | None" = None,
    **options: Any,
) -> Lists:
    """Write the best items of every user.

    Args:
        run: what ``train`` returned, or the folder of a run or a baseline.
        prepared: the data that it was trained on.
        output: folder to write.
        histories: a table or a path, with user_id and items (lists of item ids, oldest first).
            None: ``events``, or else the test users of the prepared folder.
        events: a table or a path of an event log in place of histories.
        encoder: the module given to ``train``, if any.
        options: of ``RecommendConfig``, such as ``k=20``.

    Raises:
        ValueError: as ``shardrec.pipeline.recommend.recommend``.
    """
    from shardrec.pipeline.recommend import RecommendConfig
    from shardrec.pipeline.recommend import recommend as run_recommend

    given = {"histories": histories, "events": events}
    inputs: dict[str, Any] = {
        name: _as_path(value, name, output) for name, value in given.items() if value is not None
    }
    inputs |= {"run": os.fspath(run), "prepared": os.fspath(prepared), "output": os.fspath(output)}
    done = run_recommend(RecommendConfig(**inputs, **options), encoder=encoder)
    return Lists(Path(output), done.manifest["counts"])


def export(
    run: Place,
    prepared: Place,
    output: Place,
    *,
    encoder: "nn.Module | None" = None,
    **options: Any,
) -> Export:
    """Write item vectors and the encoder for serving.

    Args:
        run: what ``train`` returned, or its folder.
        prepared: the data that it was trained on.
        output: folder to write.
        encoder: the module given to ``train``, if any.
        options: of ``ExportConfig``, such as ``faiss="HNSW32"``.

    Raises:
        ValueError: as ``shardrec.pipeline.export.export``.
    """
    from shardrec.pipeline.export import ExportConfig
    from shardrec.pipeline.export import export as run_export

    places: dict[str, Any] = {
        "run": os.fspath(run),
        "prepared": os.fspath(prepared),
        "output": os.fspath(output),
    }
    done = run_export(ExportConfig(**places, **options), encoder=encoder)
    return Export(Path(output), done.manifest)


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Context manager that gives a function: whether SIGINT has come; a second one raises."""
    came: list[int] = []

    def ask(number: int, _: object) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)
        print("interrupted: a checkpoint is written after this step", file=sys.stderr, flush=True)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    former = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, former)


def _as_path(given: Any, name: str, output: Place) -> str:
    """The path of an input; a table is written beside the output, unless it is there already."""
    if isinstance(given, str | os.PathLike):
        return os.fspath(given)
    table = _as_table(given, name)
    path = Path(f"{os.fspath(output).rstrip('/')}.{name}.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(table, partial)
    # The same file, with its time, is known to the stages as the same input.
    if path.is_file() and filecmp.cmp(partial, path, shallow=False):
        partial.unlink()
    else:
        partial.replace(path)
    return str(path)


def _as_table(given: Any, name: str) -> pa.Table:
    if isinstance(given, pa.Table):
        return given
    if type(given).__module__.startswith("pandas"):
        return pa.Table.from_pandas(given, preserve_index=False)
    if hasattr(given, "__arrow_c_stream__"):
        return pa.table(given)
    raise TypeError(
        f"{name} must be a path or a table (pandas, polars, Arrow), got {type(given).__name__}; "
        "convert it to one"
    )
