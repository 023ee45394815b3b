"""The stages for scripts and notebooks: they take tables and paths, and return short results.

Every function does the same as the command of its name, with the same options, and writes the same
folders. ``from shardrec import prepare, train, evaluate, recommend, export`` imports them.
"""

import contextlib
import filecmp
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from shardrec.pipeline.results import Evaluation, Export, Lists, PreparedLog, TrainedRun

if TYPE_CHECKING:
    from torch import nn

    from shardrec.pipeline.run.callbacks import Callback
    from shardrec.pipeline.run.resume import Resume

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


def prepare(events: Any, output: Place, **options: Any) -> PreparedLog:
    """Prepare an event log.

    Args:
        events: a path, or a table: pandas, polars, Arrow, or any with ``__arrow_c_stream__``. A
            table is written beside the output first, as ``OUTPUT.events.parquet``.
        output: folder to write.
        options: options of ``PrepareConfig``, such as ``user_column="customer"``.

    Raises:
        TypeError: ``events`` is neither a path nor a table, or an option does not exist.
        ValueError: as in ``shardrec.pipeline.prepare.prepare_once``.
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
    recipe: str = "default",
    encoder: "nn.Module | None" = None,
    callbacks: "Sequence[Callback]" = (),
    resume: "Resume" = "auto",
    force: bool = False,
) -> TrainedRun:
    """Train a recipe on a prepared folder, in this process.

    Args:
        prepared: what ``prepare`` returned, or the folder.
        run: folder to write.
        overrides: options such as ``"loss=sce"`` and ``"encoder.width=64"``;
            ``"show_progress=false"`` prints nothing.
        recipe: the config to start from.
        encoder: a causal module from (B, L, D) to (B, L, D), used in place of the recipe's.
        callbacks: called after each step and validation.
        resume: "auto" resumes an interrupted run and leaves a finished one unchanged; "no" requires
            a new folder.
        force: replace the run in the folder.

    Raises:
        Preempted: it was interrupted (Ctrl-C, or the stop button of a notebook), and the checkpoint
            of its last step is complete: the same call continues. A second interrupt raises
            KeyboardInterrupt at once.
        ValueError: as in ``shardrec.pipeline.train.train``, or a name does not exist.
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
        force: replace a report with other options.
        options: options of ``MeasureConfig``, such as ``ks=(10, 100)``.

    Raises:
        ValueError: as in ``shardrec.pipeline.evaluate.evaluate``.
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
        options: options of ``ExportConfig``, such as ``faiss="HNSW32"``.

    Raises:
        ValueError: as in ``shardrec.pipeline.export.export``.
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
