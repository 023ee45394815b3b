"""The table of commands, from which help, parsers and TorchX components are generated.

It imports nothing from the project, so that ``shardrec --help`` is fast.
"""

import importlib
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["COMMANDS", "STAGES", "Command", "imported"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One subcommand of ``shardrec``.

    Attributes:
        kind: "distributed" for a stage that several workers may run, "single" for a stage of one
            process, "tool" for a command that is no stage. Each stage has a TorchX component of the
            same name. SIGTERM ends a single stage with exit code 143; see
            ``shardrec.launch.signals``.
        summary: line of the command in ``shardrec --help``.
        description: paragraph on what it does, for its own help.
        epilog: examples, and exit codes whose meaning differs from ``shardrec --help``.
        config: dotted name, below ``shardrec``, of the dataclass that defines the options; "" if
            the options do not come from one dataclass.
        cpu: CPUs that its component asks for by default; 0: two for each worker, four for each GPU.
        memory_mb: memory that it asks for by default; 0: what the scheduler gives.
    """

    kind: Literal["distributed", "single", "tool"]
    summary: str
    description: str
    epilog: str = ""
    config: str = ""
    cpu: int = 0
    memory_mb: int = 0


COMMANDS = {
    "synth": Command(
        kind="single",
        summary="generate an event log with known best possible metrics",
        description=(
            "Writes a generated event log to one Parquet file: popularity by Zipf's law, users "
            "with drifting tastes, and order that matters. Equal options write equal events, at "
            "any size. Prints the NDCG@10 of the true model (ceiling), of Markov baselines, and "
            "of popularity. Repeated with the same options, it does nothing."
        ),
        epilog=(
            "example: shardrec synth --output log.parquet --users 40000 --items 50000 --events "
            "1000000"
        ),
        config="pipeline.synth.SynthConfig",
        cpu=1,
        memory_mb=4096,
    ),
    "prepare": Command(
        kind="single",
        summary="turn an event log into a prepared folder to train on",
        description=(
            "Reads an event log (Parquet, CSV or JSON lines: user, item, time) and writes what "
            "training and evaluation read: sequences, splits, item counts, and a manifest, written "
            "last. "
            "Sorting spills to disk: the log may be larger than memory. Repeated with the same "
            "options, it does nothing; --force prepares again. For a newer log, --items keeps the "
            "item indices of the earlier folder. --item-attributes reads attributes of the items, "
            "which train uses with catalog.attributes=add."
        ),
        epilog=(
            "example: shardrec prepare --events 'logs/*.parquet' --user-column customer --output "
            "data"
        ),
        config="pipeline.prepare.PrepareConfig",
        cpu=4,
        memory_mb=8192,
    ),
    "describe": Command(
        kind="tool",
        summary="describe an event log before it is prepared",
        description=(
            "Reads an event log as prepare would and prints what is in it: columns and their "
            "roles (guessed by name where no option says), users, items, times, ties, repeats, "
            "duplicates, popularity, sizes of the splits, and warnings, each with the option that "
            "solves it. Writes nothing."
        ),
        epilog="example: shardrec describe 'logs/*.parquet' --user-column customer",
        config="pipeline.describe.DescribeConfig",
    ),
    "baseline": Command(
        kind="single",
        summary="count what a model must beat: popularity and item-to-item scores",
        description=(
            "Counts a baseline from the training sequences: popularity, cosines of items that "
            "occur together (knn), how often one item follows another (next), or knn + 3 next. "
            "evaluate, recommend, report and gate take its folder in place of a run's. Repeated "
            "with the same options, it does nothing."
        ),
        epilog="example: shardrec baseline --prepared data --kind knn_next",
        config="pipeline.baseline.BaselineConfig",
    ),
    "train": Command(
        kind="distributed",
        summary="train on a prepared folder",
        description=(
            "Trains on a prepared folder and writes a run folder: the best and the last weights, "
            "metrics.jsonl, TensorBoard events, and the complete config. Alone it uses one "
            "process; `shardrec launch train` starts several. Options of the model are set by "
            "dotted names. After Ctrl-C or SIGTERM it ends the step and writes a checkpoint (exit "
            "codes 130 and 75): --resume=auto continues from there."
        ),
        epilog=(
            "example: shardrec train --prepared data --run run --recipe demo loss=cce_minus "
            "encoder.width=64"
        ),
    ),
    "tune": Command(
        kind="distributed",
        summary="search options of training by the metric on the validation users",
        description=(
            "Trains with varying options until the time is over, and keeps the run that ranks the "
            "validation users best. The first trial is the recipe itself; later ones are proposed "
            "by Optuna, and ended early if their validations are worse than those of most others. "
            "Started again, it continues the study."
        ),
        epilog=(
            "example: shardrec tune --prepared data --output study --minutes 60 --search "
            "loss.num_negatives=64:4096:log encoder.num_heads=2"
        ),
        config="pipeline.tuning.study.TuneConfig",
    ),
    "memorize": Command(
        kind="distributed",
        summary="add a memory of item pairs to a trained run",
        description=(
            "Counts which items follow each item in the training sequences, and chooses on the "
            "validation users how much these counts add to the scores of the model. It is written "
            "into the run: evaluate, recommend and export of the run then rank by both. A weight "
            "of 0 leaves the model alone. Repeated with the same options, it does nothing."
        ),
        epilog="example: shardrec memorize --prepared data --run run --neighbors 32",
        config="pipeline.memorize.MemorizeConfig",
    ),
    "evaluate": Command(
        kind="distributed",
        summary="rank the whole catalog for the test users and write the metrics",
        description=(
            "Ranks the whole catalog for the users of a split and writes metrics.json into the "
            "run, at several list lengths. Means over users: Recall, the share of a user's targets "
            "in the list; HitRate, whether there is at least one; NDCG, with less credit further "
            "down; MRR, one over the place of the first. Coverage: the share of the catalog that "
            "is in any list. Surprisal: how rare the listed items are, from 0 (all users know them)"
            " to 1. Metrics that end in /known leave out targets that training never saw, those in "
            "/new all others. Any number of workers may evaluate, whatever number trained. "
            "Repeated with the same options, it does nothing."
        ),
        epilog="example: shardrec evaluate --prepared data --run run --ks 10,100",
        config="pipeline.model.config.MeasureConfig",
    ),
    "recommend": Command(
        kind="distributed",
        summary="write the best items of every user to Parquet",
        description=(
            "Ranks the whole catalog for users of a Parquet file (or of the prepared folder) and "
            "writes user_id, item_ids and scores to Parquet, in the order of the histories. Any "
            "number of workers gives the same lists. Repeated with the same options, it does "
            "nothing."
        ),
        epilog=(
            "example: shardrec recommend --run run --prepared data --histories users.parquet "
            "--output lists --k 20"
        ),
        config="pipeline.recommend.RecommendConfig",
    ),
    "similar": Command(
        kind="distributed",
        summary="write the nearest items of each item to Parquet",
        description=(
            "Compares the item vectors of a run, over all shards, and writes item_id, item_ids "
            "and scores to Parquet, in the order of the requested items. Any number of workers "
            "gives the same lists. Repeated with the same options, it does nothing."
        ),
        epilog="example: shardrec similar --run run --prepared data --output similar --k 20",
        config="pipeline.similar.SimilarConfig",
    ),
    "export": Command(
        kind="distributed",
        summary="write item vectors and the encoder for serving",
        description=(
            "Writes the item vectors with the log's own ids to Parquet, shard by shard, and the "
            "encoder's weights as safetensors. shardrec.pipeline.serve reads both without "
            "TorchRec. --items adds vectors of newer items, from their attributes. Repeated with "
            "the same options, it does nothing."
        ),
        epilog="example: shardrec export --run run --prepared data --output model",
        config="pipeline.export.ExportConfig",
    ),
    "gate": Command(
        kind="single",
        summary="compare an evaluated run with the published model on the same users",
        description=(
            "Compares an evaluated run with the published model on the same users and writes a "
            "verdict. If the published model was measured on other data, it is measured again, "
            "from its export, on the users of the new run: items it does not know count as "
            "misses."
        ),
        epilog=(
            "example: shardrec gate --run run --prepared data --published published.json --metric"
            " NDCG@10 --tolerance 0.02\n"
            "exit codes: 0 the run may be published, 3 it may not and the report says why"
        ),
        config="pipeline.gate.GateConfig",
        cpu=2,
        memory_mb=8192,
    ),
    "publish": Command(
        kind="single",
        summary="publish an export: make the pointer file name it",
        description=(
            "Makes the pointer file (JSON, with the history of publications) name an export that "
            "passed its gate. The file is replaced atomically; shardrec.pipeline.serve opens the "
            "export it names. --force publishes without a gate, never against a failed one."
        ),
        epilog=(
            "example: shardrec publish --export model --gate run/gate.json --published "
            "published.json\n"
            "exit codes: 0 published, 3 blocked by a failed gate or an earlier rollback"
        ),
        config="pipeline.publish.PublishConfig",
        cpu=1,
        memory_mb=4096,
    ),
    "rollback": Command(
        kind="single",
        summary="return to an earlier publication",
        description=(
            "Makes the pointer file name the previous publication, or the one with a given number,"
            " if its files still exist. The publication that is left is not published again unless"
            " forced."
        ),
        epilog="example: shardrec rollback --published published.json",
        config="pipeline.publish.RollbackConfig",
        cpu=1,
        memory_mb=4096,
    ),
    "report": Command(
        kind="tool",
        summary="write one HTML page that shows and compares runs",
        description=(
            "Writes one self-contained HTML page about run folders: curves of loss, validation "
            "metric, throughput, memory, padding and gradient norm, a table that compares the "
            "runs, recall by popularity, and every option. Runs may be in progress and need not "
            "be evaluated. An earlier report is replaced."
        ),
        epilog="example: shardrec report runs/cce runs/sce --output report.html",
    ),
    "options": Command(
        kind="tool",
        summary="explain the options of training, all or some",
        description=(
            "Prints what the options of train mean, with their values and the recipe's default: "
            "all of them, those of a part (optimizer), of a choice (loss=sce), or a single one "
            "(loss.num_negatives)."
        ),
        epilog="example: shardrec options loss=sce optimizer.clip_norm",
    ),
    "plan": Command(
        kind="tool",
        summary="estimate what a run costs each rank, and how large a catalog fits",
        description=(
            "Estimates what a step costs each rank, before a machine is rented: bytes of memory by "
            "term, bytes received from other ranks, bytes that the loss reads and writes, FLOP, "
            "and the largest catalog that fits. Options of the model are set by dotted names, as "
            "in `shardrec train`; with checkpoints.background=false no copy for a checkpoint is "
            "counted."
        ),
        epilog=(
            "example: shardrec plan --num-items 10_000_000 --ranks 8 --memory-gb 80 --device cuda"
            " --recipe large_catalog encoder.width=128"
        ),
        config="pipeline.run.machine.Machine",
    ),
    "launch": Command(
        kind="tool",
        summary="run a stage through TorchX, here or on a cluster",
        description=(
            "Runs a stage through TorchX: several workers here, or a job for a cluster. The "
            "stage's own arguments follow `--`; `shardrec launch train --help` lists the rest."
        ),
        epilog=(
            "examples:\n"
            "  shardrec launch train -j 1x2 -- --prepared data --run run --recipe demo\n"
            "  shardrec launch -s slurm -cfg partition=gpu train -j 4x8 --gpu 8 -- --prepared "
            "data --run run\n"
            "  shardrec launch -s kubernetes -cfg queue=default --dryrun train -j 2x8 --gpu 8 "
            "--image me/shardrec:1 -- --prepared /data --run /run\n"
            "exit codes: 2, 3 and 75 as local workers report them, 1 for any other failure of "
            "workers or of an awaited job"
        ),
    ),
    "doctor": Command(
        kind="tool",
        summary="show what is installed, whether it fits together, how to fix it",
        description=(
            "Prints versions, the NVIDIA driver, the communication backends and whether the "
            "packages form a matching set; every mismatch comes with its remedy."
        ),
        epilog="exit codes: 0 training can start here, 1 something must be fixed first",
    ),
    "demo": Command(
        kind="tool",
        summary="run the whole pipeline on generated data or your own log; prints a table",
        description=(
            "Generates a log (or takes yours), prepares it, trains every loss for the same number"
            " of steps on TorchX workers, ranks the whole catalog for the test users, and prints "
            "a table, the paths of what was written, and the commands for your own data."
        ),
        epilog="example: shardrec demo --events path/to/log.parquet --user-column customer",
        config="launch.demo.DemoConfig",
    ),
}
STAGES = {name: command for name, command in COMMANDS.items() if command.kind != "tool"}


def imported(dotted: str) -> Any:
    """Import and return the object at a dotted name below ``shardrec``."""
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(f"shardrec.{module}"), name)
