"""``shardrec demo``: the whole pipeline, from an event log to a table that compares the losses.

generate (or the user's own log) → prepare → baselines, then each loss for the same number of steps
on TorchX workers → evaluate over the whole catalog → a table, and the commands to go on with.
"""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console

from shardrec.launch.commands import read_train
from shardrec.launch.demo_table import Row, table
from shardrec.launch.runner import Job, run_here
from shardrec.modules.losses import LOSSES
from shardrec.modules.option_checks import require_at_least
from shardrec.pipeline.baseline import BaselineConfig, Kind, baseline
from shardrec.pipeline.evaluate import evaluate, evaluate_popularity
from shardrec.pipeline.log.reader import EventLog
from shardrec.pipeline.model.config import MeasureConfig
from shardrec.pipeline.near_names import unknown_name
from shardrec.pipeline.prepare import PrepareConfig, prepare
from shardrec.pipeline.synth import SynthConfig, generate

MEASURE = MeasureConfig(ks=(10,), filter_seen=False, min_count=0)  # as the ceiling is measured
BASELINE: Kind = "knn_next"
MARK, LOG = ".shardrec-demo", "events.parquet"
USUAL_WORKERS = 2
CLUSTERS = 64  # fewer than usual: a model learns them from fewer steps

# A small model and high learning rates, because it trains for only a few hundred steps.
SETTINGS = (
    "encoder.kind=modern",
    "encoder.width=32",
    "encoder.num_blocks=1",
    "encoder.dropout=0",
    "catalog.init_std=0.15",
    "catalog.learning_rate=0.02",
    "optimizer.learning_rate=0.005",
    "optimizer.clip_norm=none",
    "optimizer.warmup_steps=5",
    "optimizer.decay=cosine",
    "batches.batch_size=64",
    "limits.max_epochs=none",
    "validation.every_epochs=none",
    "validation.patience=none",
)

# Fewer negatives or rounds per step than by default: enough to learn from, and fast.
LOSS_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "cce_minus": ("loss.proposal=popularity", "loss.num_negatives=2048"),
    "sce": ("loss.items_per_bucket=512",),
    "rece": ("loss.num_rounds=1", "loss.num_neighbor_chunks=0"),
}

# The lines of rank 0 that are shown.
PROGRESS = re.compile(r"\[[^]]*0\]:((step|validation|stopped) .*)")
COLUMNS = ("user_column", "item_column", "time_column")  # options that need a log
SIZES = ("users", "items", "size")  # options of a generated log


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Options of ``demo``.

    Attributes:
        events: your log: a file, folder, glob, or URI that pyarrow opens; none generates a log.
        output: folder to write; an earlier demo in it is replaced, anything else is refused.
        user_column, item_column, time_column: names in your log.
        losses: which are trained, in this order.
        steps: optimizer steps of each loss.
        workers: processes that share the catalog; none: 2, or 1 on a machine with one GPU.
        recipe: recipe that each run takes its config from.
        users, items, size: numbers of users, items and events of the generated log. About a third
            of the items occur in it.
        seed: seed of the generated log and of the training.
    """

    events: str | None = None
    output: str = "demo"
    user_column: str = "user_id"
    item_column: str = "item_id"
    time_column: str = "timestamp"
    losses: tuple[str, ...] = tuple(name for name in LOSSES if not LOSSES[name].is_baseline)
    steps: int = 400
    workers: int | None = None
    recipe: str = "demo"
    users: int = 30_000
    items: int = 150_000
    size: int = 600_000
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a demo that trains nothing, and options that would be ignored."""
        known = self.default("losses")
        for loss in self.losses:
            if loss not in known:
                raise ValueError(unknown_name("losses", loss, known))
        if not self.losses or len(set(self.losses)) < len(self.losses):
            got = ",".join(self.losses) or "none"
            raise ValueError(f"losses must be named once each, got {got}; use {','.join(known)}")
        require_at_least("steps", self.steps, 1)
        require_at_least("workers", self.num_workers, 1)
        unused, why = (COLUMNS, "with") if self.events is None else (SIZES, "without")
        for name in unused:
            if getattr(self, name) != self.default(name):
                raise ValueError(
                    f"{name} must come {why} events, got {getattr(self, name)!r}; remove it"
                )

    @classmethod
    def default(cls, name: str) -> Any:
        """The default value of a field."""
        return next(field.default for field in fields(cls) if field.name == name)

    @property
    def num_workers(self) -> int:
        """The number of workers, for this machine unless it was chosen."""
        if self.workers is not None:
            return self.workers
        return min(USUAL_WORKERS, _num_gpus() or USUAL_WORKERS)

    @property
    def folder(self) -> Path:
        """The folder that everything is written to."""
        return Path(self.output)


def run_demo(config: DemoConfig, console: Console) -> list[Row]:
    """Run the whole pipeline and print the table.

    Returns:
        The rows of the table.

    Raises:
        FileNotFoundError, ValueError: the log or an option is wrong; an earlier demo is unchanged.
        FileExistsError: the output folder holds something that is not an earlier demo.
        PermissionError: the earlier demo cannot be replaced.
        RuntimeError: a training run failed.
    """
    command = program()  # before the launcher adds to PATH
    check_log(config)
    check_stages(config)
    start_folder(config.folder)
    if config.num_workers != USUAL_WORKERS and config.workers is None:
        console.print("one GPU here: one worker trains, not two", highlight=False)
    log, ceiling = (config.events, None) if config.events else generate_log(config, console)
    prepared = prepare_log(config, log, console)
    rows = count_baselines(prepared, console)
    for loss in config.losses:
        rows.append(train_and_evaluate(config, prepared, loss, console))
    console.print(table(rows, config.steps, config.num_workers, ceiling))
    text = next_steps(config, log, prepared, command)
    console.print(text, soft_wrap=True, highlight=False, markup=False)
    return rows


def check_log(config: DemoConfig) -> None:
    """Refuse a log that cannot be read, or that would be deleted with an earlier demo."""
    if config.events is None:
        return
    if config.folder.resolve() in Path(config.events).resolve().parents:
        raise ValueError(
            f"events must lie outside the folder that is replaced, got {config.events} in "
            f"{config.folder}; move the log or choose another --output"
        )
    EventLog.open(config.events, prepare_options(config, config.events).columns())


def check_stages(config: DemoConfig) -> None:
    """Check the number of workers and the options of every stage before anything is replaced."""
    if 0 < (gpus := _num_gpus()) < config.num_workers:
        raise ValueError(
            f"workers must be at most the {gpus} GPU(s) of this machine, got {config.num_workers}; "
            "lower --workers, or hide the GPUs with CUDA_VISIBLE_DEVICES="
        )
    if config.events is None:
        log_options(config)
    prepare_options(config, config.events or str(config.folder / LOG))
    for loss in config.losses:
        read_train(train_words(config, config.folder, config.folder, loss))


def start_folder(folder: Path) -> None:
    """Create an empty output folder, replacing an earlier demo."""
    found = [path for path in folder.iterdir() if path.name != MARK] if folder.exists() else []
    if found and not (folder / MARK).is_file():
        raise FileExistsError(
            f"output must be new or an earlier demo, got {folder} with other files; choose another "
            "with --output"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text("Made by `shardrec demo`, which may replace this folder.\n")
    try:
        for path in found:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    except OSError as error:
        raise PermissionError(
            f"output must be an earlier demo that can be replaced, got {folder} "
            f"({error.strerror}); choose another with --output or fix its permissions"
        ) from error


def generate_log(config: DemoConfig, console: Console) -> tuple[str, float]:
    """Write a generated log; returns its path and the best possible NDCG@10 on it."""
    console.rule("generate")
    path = config.folder / LOG
    report = generate(log_options(config), path)
    console.print(str(report), highlight=False)
    return str(path), report.ceiling


def log_options(config: DemoConfig) -> SynthConfig:
    """The config of the generated log."""
    return SynthConfig(
        users=config.users,
        items=config.items,
        events=config.size,
        clusters=min(CLUSTERS, config.items),
        seed=config.seed,
    )


def prepare_log(config: DemoConfig, log: str, console: Console) -> Path:
    """Turn the log into a prepared folder."""
    console.rule("prepare")
    options = prepare_options(config, log)
    counts = prepare(options).counts
    console.print(
        f"{counts['train_sequences']:,} training sequences, {counts['items']:,} items, "
        f"{counts['test_users']:,} test users",
        highlight=False,
    )
    return Path(options.output)


def prepare_options(config: DemoConfig, log: str) -> PrepareConfig:
    """The config of the prepared folder."""
    return PrepareConfig(
        events=log,
        output=str(config.folder / "prepared"),
        user_column=config.user_column,
        item_column=config.item_column,
        time_column=config.time_column,
    )


def count_baselines(prepared: Path, console: Console) -> list[Row]:
    """Rows of the baselines: popularity, and items that occur together or in sequence."""
    console.rule("baselines")
    config = BaselineConfig(prepared=str(prepared), kind=BASELINE)
    console.print(f"{BASELINE}: {baseline(config).manifest['counts']['pairs']:,} pairs of items")
    popular = evaluate_popularity(str(prepared), MEASURE)["metrics"]
    neighbors = evaluate(str(config.folder), str(prepared), MEASURE)["metrics"]
    return [Row("popularity", popular), Row(BASELINE, neighbors)]


def train_and_evaluate(config: DemoConfig, prepared: Path, loss: str, console: Console) -> Row:
    """The row of a loss: train on the workers, then rank the catalog for the test users."""
    console.rule(f"train: {loss}")
    run = config.folder / "runs" / loss
    train(config, prepared, run, loss, console)
    end = read_end(run)
    metrics = evaluate(str(run), str(prepared), MEASURE)["metrics"]
    return Row(loss, metrics, end["seconds_per_step"], end["memory_bytes"])


def train(config: DemoConfig, prepared: Path, run: Path, loss: str, console: Console) -> None:
    """Train on TorchX workers, with their output in a log and their progress on the screen."""
    words = train_words(config, prepared, run, loss)
    job = Job(component="train", arguments=("-j", f"1x{config.num_workers}", "--", *words))
    path = config.folder / "logs" / f"{loss}.log"
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as log:
        failure = run_here(job, lambda line: pass_on(line, log, console))
    if failure is not None:
        reason = failure.complaint or "no reason given"
        raise RuntimeError(f"training with {loss} failed: {reason}; see {path}")


def train_words(config: DemoConfig, prepared: Path, run: Path, loss: str) -> list[str]:
    """The arguments of ``shardrec train``."""
    stage = ["--prepared", str(prepared), "--run", str(run), "--recipe", config.recipe]
    options = [f"loss={loss}", f"limits.max_steps={config.steps}", f"seed={config.seed}"]
    return [*stage, *options, *SETTINGS, *LOSS_SETTINGS.get(loss, ())]


def pass_on(line: str, log: TextIO, console: Console) -> None:
    """Write a worker's line to the log, and show it if it is progress."""
    print(line, file=log)
    if progress := PROGRESS.match(line):
        console.print(progress[1], highlight=False, markup=False)


def read_end(run: Path) -> dict[str, Any]:
    """The end event of a run: the last line of ``metrics.jsonl``."""
    last = (run / "metrics.jsonl").read_text().splitlines()[-1]
    return dict(json.loads(last))


def next_steps(config: DemoConfig, log: str, prepared: Path, command: str) -> str:
    """Text that lists the files written, and the commands to continue with your own log.

    ``command`` starts ``shardrec`` from the current folder.
    """
    folder = config.folder
    lines = [
        "",
        f"events     {log}",
        f"prepared   {prepared}",
        *(f"run        {folder / 'runs' / loss}" for loss in config.losses),
        f"logs       {folder / 'logs'}",
        "",
    ]
    if config.events is None:
        columns, log = "", "path/to/log.parquet"
        lines += [
            "Your own log (Parquet with user_id, item_id and timestamp; other names by "
            "--user-column, --item-column, --time-column):",
            f"  {command} demo --events {log}",
            "or stage by stage, with the recipe's own model, for as long as it takes:",
        ]
    else:
        columns = "".join(
            f" --{name.replace('_', '-')} {shlex.quote(getattr(config, name))}"
            for name in COLUMNS
            if getattr(config, name) != config.default(name)
        )
        lines += ["Stage by stage, with the recipe's own model, for as long as it takes:"]
    lines += [
        f"  {command} prepare --events {shlex.quote(log)}{columns} --output data",
        f"  {command} launch train -j 1x{config.num_workers} -- --prepared data --run run "
        f"--recipe {config.recipe} loss={config.losses[0]}",
        f"  {command} evaluate --prepared data --run run",
    ]
    return "\n".join(lines)


def _num_gpus() -> int:
    """GPUs that workers of this machine would take."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def program() -> str:
    """The running ``shardrec`` as a shell command: its name if PATH finds it, else its path."""
    ours = Path(sys.executable).parent / "shardrec"
    found = shutil.which("shardrec")
    if not ours.is_file() or (found and Path(found).samefile(ours)):
        return "shardrec"
    return shlex.quote(os.path.relpath(ours) if ours.is_relative_to(Path.cwd()) else str(ours))
