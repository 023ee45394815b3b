"""One function for each subcommand: reads its arguments, runs its stage, returns the exit code.

A stage is imported by the command that needs it, so that ``prepare`` does not wait for torch.
"""

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shardrec.launch.options import Parser, add_options, read_options

if TYPE_CHECKING:
    from shardrec.pipeline.measure import MeasureConfig
    from shardrec.pipeline.prepare import PrepareConfig
    from shardrec.pipeline.train import TrainConfig


def synth(arguments: Sequence[str]) -> int:
    """Generate a log and say how well the best possible model would do on it."""
    from shardrec.pipeline.synth import SynthConfig, generate

    parser = Parser(
        "synth",
        "Writes a generated event log to one Parquet file: popularity by Zipf's law, users with\n"
        "drifting tastes, and order that matters. Equal options write equal events, at any size.\n"
        "Prints the NDCG@10 of the true model (ceiling), of Markov baselines, and of popularity.",
        "example: shardrec synth --output log.parquet --users 40000 --items 50000 --events 1000000",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="Parquet file to write")
    add_options(parser, SynthConfig)
    options = parser.parse(arguments)
    print(generate(read_options(SynthConfig, options), options.output))
    print(f"wrote {options.output}")
    return 0


def prepare(arguments: Sequence[str]) -> int:
    """Turn an event log into a prepared folder."""
    from shardrec.pipeline.prepare import prepare as run_prepare

    config = read_prepare(arguments)
    manifest = run_prepare(config)
    for name, count in manifest.counts.items():
        print(f"{name.replace('_', ' '):<40} {count:>14,}")
    print(f"wrote {config.output}")
    return 0


def read_prepare(arguments: Sequence[str]) -> "PrepareConfig":
    """The config that the arguments of ``prepare`` spell; exits when they are wrong."""
    from shardrec.pipeline.prepare import PrepareConfig

    parser = Parser(
        "prepare",
        "Reads an event log (Parquet: user, item, time) and writes what training and evaluation\n"
        "stream: sequences, splits, item counts, and a manifest that is there only when all is.\n"
        "Sorting spills to disk: the log may be larger than memory. Asked again for the same, it\n"
        "does nothing.",
        "example: shardrec prepare --events 'logs/*.parquet' --user-column customer --output data",
    )
    add_options(parser, PrepareConfig)
    return read_options(PrepareConfig, parser.parse(arguments))


def train(arguments: Sequence[str]) -> int:
    """Train on a prepared folder, alone or as one of the launcher's workers."""
    from shardrec.launch.distributed import process_group
    from shardrec.pipeline.train import train as run_train

    config = read_train(arguments)
    with process_group():
        run_train(config)
    return 0


def read_train(arguments: Sequence[str]) -> "TrainConfig":
    """The config that the arguments of ``train`` spell; exits when they are wrong."""
    from shardrec.pipeline.config import describe, override, unknown_name
    from shardrec.pipeline.recipes import RECIPES

    parser = Parser(
        "train",
        "Trains on a prepared folder and writes a run folder: the best and the last weights,\n"
        "metrics.jsonl, TensorBoard events, and the complete config. Alone it uses one process;\n"
        "`shardrec launch train` starts several. Options of the model are set by dotted names:\n"
        "  shardrec train --prepared data --run run --recipe demo loss=cce_minus encoder.width=64",
    )
    parser.add_argument("--prepared", required=True, metavar="DIR", help="folder of `prepare`")
    parser.add_argument("--run", required=True, metavar="DIR", help="folder to write, new or empty")
    parser.add_argument("--recipe", default="demo", help="what to start from (default: demo)")
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="options to change")
    lines = [f"  {name:<16} {first_line(recipe)}" for name, recipe in RECIPES.items()]
    example = describe(RECIPES["demo"]("DIR", "DIR"))
    parser.epilog = "\n".join(
        ["recipes:", *lines, "", "options, as the recipe `demo` sets them:", example]
    )
    options = parser.parse(arguments)
    if options.recipe not in RECIPES:
        raise ValueError(unknown_name("recipe", options.recipe, list(RECIPES)))
    recipe = RECIPES[options.recipe](options.prepared, options.run)
    return override(recipe, options.overrides)


def first_line(documented: object) -> str:
    """First line of a docstring."""
    return (documented.__doc__ or "").strip().partition("\n")[0]


def evaluate(arguments: Sequence[str]) -> int:
    """Rank the whole catalog for the users of a split and write the metrics into the run."""
    from shardrec.launch.distributed import process_group
    from shardrec.pipeline.evaluate import evaluate as run_evaluate
    from shardrec.pipeline.evaluate import evaluate_popularity
    from shardrec.pipeline.group import rank_of

    options, config = read_evaluate(arguments)
    with process_group() as (group, _):
        if options.run is None:
            metrics = evaluate_popularity(options.prepared, config, split=options.split)
        else:
            wanted = {"split": options.split, "checkpoint": options.checkpoint}
            metrics = run_evaluate(options.run, options.prepared, config, **wanted)["metrics"]
        if rank_of(group) == 0:
            print_metrics(metrics)
            if options.run is not None:
                print(f"wrote {Path(options.run) / 'metrics.json'}")
    return 0


def read_evaluate(arguments: Sequence[str]) -> "tuple[Namespace, MeasureConfig]":
    """What the arguments of ``evaluate`` spell; exits when they are wrong."""
    from shardrec.pipeline.measure import MeasureConfig

    parser = Parser(
        "evaluate",
        "Ranks the whole catalog for the users of a split and writes metrics.json into the run:\n"
        "NDCG, Recall, HitRate, MRR and Coverage at several list lengths, Surprisal, recall by\n"
        "popularity, and the protocol they follow. Metrics that end in /known leave out targets\n"
        "that training never saw. Any number of workers may evaluate what any number trained.",
        "example: shardrec evaluate --prepared data --run run --filter-seen",
    )
    parser.add_argument("--prepared", required=True, metavar="DIR", help="folder of `prepare`")
    judged = parser.add_mutually_exclusive_group(required=True)
    judged.add_argument("--run", metavar="DIR", help="folder of `train`")
    judged.add_argument(
        "--popularity", action="store_true", help="judge the ranking by training counts instead"
    )
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best")
    add_options(parser, MeasureConfig)
    options = parser.parse(arguments)
    return options, read_options(MeasureConfig, options)


def recommend(arguments: Sequence[str]) -> int:
    """Write the best items of every user of some histories."""
    from shardrec.launch.distributed import process_group
    from shardrec.pipeline.group import rank_of
    from shardrec.pipeline.recommend import RecommendConfig
    from shardrec.pipeline.recommend import recommend as run_recommend

    parser = Parser(
        "recommend",
        "Ranks the whole catalog for users of a Parquet file (or of the prepared folder) and\n"
        "writes user_id, item_ids and scores to Parquet, in the order of the histories. Any\n"
        "number of workers gives the same lists. Asked again for the same, it does nothing.",
        "example: shardrec recommend --run run --prepared data --histories users.parquet "
        "--output lists --k 20",
    )
    add_options(parser, RecommendConfig)
    config = read_options(RecommendConfig, parser.parse(arguments))
    with process_group() as (group, _):
        done = run_recommend(config)
        if rank_of(group) == 0:
            for name, count in done.manifest["counts"].items():
                print(f"{name.replace('_', ' '):<40} {count:>14,}")
            rate = f"wrote {config.output}: {done.users_per_second:,.0f} users/s"
            print(rate if done.is_new else f"{config.output} is there already: nothing to do")
    return 0


def export(arguments: Sequence[str]) -> int:
    """Write item vectors and the encoder for a service."""
    from shardrec.launch.distributed import process_group
    from shardrec.pipeline.export import ExportConfig
    from shardrec.pipeline.export import export as run_export
    from shardrec.pipeline.group import rank_of

    parser = Parser(
        "export",
        "Writes the item vectors with the log's own ids to Parquet, shard by shard, and the\n"
        "encoder as a torch.export program. shardrec.pipeline.serve reads both without TorchRec.\n"
        "Asked again for the same, it does nothing.",
        "example: shardrec export --run run --prepared data --output model",
    )
    add_options(parser, ExportConfig)
    config = read_options(ExportConfig, parser.parse(arguments))
    with process_group() as (group, _):
        done = run_export(config)
        if rank_of(group) == 0:
            manifest = done.manifest
            print(f"{manifest['num_items']:,} items, catalog version {manifest['catalog_version']}")
            told = f"wrote {config.output}"
            print(told if done.is_new else f"{config.output} is there already: nothing to do")
    return 0


def plan(arguments: Sequence[str]) -> int:
    """Say what a run will cost each rank."""
    from shardrec.pipeline.config import override, unknown_name
    from shardrec.pipeline.plan import Machine
    from shardrec.pipeline.plan import plan as run_plan
    from shardrec.pipeline.recipes import RECIPES

    parser = Parser(
        "plan",
        "Says before a machine is rented what a step costs each rank: bytes of memory by term,\n"
        "bytes received from other ranks, FLOP, and the largest catalog that fits. Options of the\n"
        "model are set by dotted names, as in `shardrec train`.",
        "example: shardrec plan --num-items 10_000_000 --ranks 8 --memory-gb 80 --device cuda "
        "--recipe large_catalog encoder.width=128",
    )
    parser.add_argument(
        "--num-items", required=True, metavar="INT", type=int, help="items of the catalog"
    )
    parser.add_argument("--recipe", default="demo", help="what to start from (default: demo)")
    add_options(parser, Machine)
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="options to change")
    options = parser.parse(arguments)
    if options.recipe not in RECIPES:
        raise ValueError(unknown_name("recipe", options.recipe, list(RECIPES)))
    config = override(RECIPES[options.recipe]("none", "none"), options.overrides)
    print(run_plan(config, options.num_items, read_options(Machine, options)).describe())
    return 0


def print_metrics(metrics: Mapping[str, float]) -> None:
    """One kind of metric a line, one list length a column; then what was measured."""
    table: dict[str, dict[int, float]] = {}
    for name, value in metrics.items():
        kind, at, rest = name.partition("@")
        if at:
            length, slash, suffix = rest.partition("/")
            table.setdefault(kind + slash + suffix, {})[int(length)] = value
    lengths = sorted({length for row in table.values() for length in row})
    print(f"{'':<22}" + "".join(f"{f'@{length}':>10}" for length in lengths))
    for kind, row in table.items():
        print(f"{kind:<22}" + "".join(f"{row[length]:>10.4f}" for length in lengths))
    for name in (name for name in metrics if "@" not in name):
        value = metrics[name]
        print(f"{name:<22}{value:>10,}" if isinstance(value, int) else f"{name:<22}{value:>10.4f}")


def launch(arguments: Sequence[str]) -> int:
    """Run a component through TorchX, on this machine or on a cluster."""
    from shardrec.launch import runner

    parser = Parser(
        "launch",
        "Runs a stage through TorchX: several workers here, or a job for a cluster.\n"
        "The stage's own arguments follow `--`; `shardrec launch train --help` lists the rest.",
        "examples:\n"
        "  shardrec launch train -j 1x2 -- --prepared data --run run --recipe demo\n"
        "  shardrec launch -s slurm -cfg partition=gpu train -j 4x8 --gpu 8 -- "
        "--prepared data --run run\n"
        "  shardrec launch -s kubernetes -cfg queue=default --dryrun train -j 2x8 --gpu 8 "
        "--image me/shardrec:1 -- --prepared /data --run /run",
    )
    parser.add_argument("-s", "--scheduler", default="local_cwd", help="default: local_cwd")
    parser.add_argument(
        "-cfg", "--scheduler-args", default="", metavar="K=V,…", help="the scheduler's own options"
    )
    parser.add_argument(
        "--dryrun", action="store_true", help="print the request instead of submitting it"
    )
    parser.add_argument(
        "--log-dir", type=Path, default=None, help="keep the output of local workers here"
    )
    parser.add_argument("component", choices=runner.COMPONENTS)
    parser.add_argument(
        "arguments", nargs="...", help="component options, then `--`, then the stage's"
    )
    options = parser.parse_args(list(arguments))
    job = runner.Job(
        component=options.component,
        arguments=tuple(options.arguments),
        scheduler=options.scheduler,
        settings=options.scheduler_args,
        log_dir=options.log_dir,
    )
    check_stage_arguments(job.component, runner.split(job.arguments)[1])
    if options.dryrun:
        print(runner.describe(job))
        return 0
    if not job.is_local:
        print(runner.submit(job))
        return 0
    complaints = runner.run_here(job)
    if complaints is None:
        return 0
    reason = complaints or "its workers' last lines are above"
    print(f"shardrec launch: {job.component} failed: {reason}", file=sys.stderr)
    return 1


def check_stage_arguments(stage: str, arguments: Sequence[str]) -> None:
    """Refuse wrong options here, before a job waits in a queue to be told."""
    if stage == "train":
        read_train(arguments)
    elif stage == "evaluate":
        read_evaluate(arguments)
    else:
        read_prepare(arguments)


def doctor(arguments: Sequence[str]) -> int:
    """Say what is installed and whether it fits together."""
    from shardrec.launch.doctor import run

    Parser(
        "doctor",
        "Prints versions, the NVIDIA driver, the communication backends and whether the packages\n"
        "form a matching set; every mismatch comes with its remedy.",
        "exit codes: 0 training can start here, 1 something must be mended first",
    ).parse(arguments)
    return run()


def demo(arguments: Sequence[str]) -> int:
    """The whole job, on generated data or on the user's log."""
    from rich.console import Console

    from shardrec.launch.demo import DemoConfig, run_demo

    parser = Parser(
        "demo",
        "Generates a log (or takes yours), prepares it, trains every loss for the same number of\n"
        "steps on TorchX workers, ranks the whole catalog for the test users, and prints a table,\n"
        "the paths of what was written, and the commands for your own data.",
        "example: shardrec demo --events path/to/log.parquet --user-column customer",
    )
    add_options(parser, DemoConfig)
    run_demo(read_options(DemoConfig, parser.parse(arguments)), Console())
    return 0
