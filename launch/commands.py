"""The stages that make a model, one function each: reads arguments, runs, returns the exit code.

A stage is imported by the command that needs it, so that ``prepare`` does not wait for torch. What
follows training is in ``delivery.py``, what is no stage in ``tools.py``.
"""

import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shardrec.launch.options import Parser, add_options, add_timeout, read_options
from shardrec.launch.unwinding import sigterm_unwinds

if TYPE_CHECKING:
    from shardrec.pipeline.model.config import MeasureConfig
    from shardrec.pipeline.prepare import PrepareConfig
    from shardrec.pipeline.synth import SynthConfig
    from shardrec.pipeline.train import TrainConfig


def synth(arguments: Sequence[str]) -> int:
    """Generate a log and say how well the best possible model would do on it."""
    from shardrec.pipeline.synth import generate

    options, config = read_synth(arguments)
    with sigterm_unwinds():
        report = generate(config, options.output, force=options.force)
    print(report)
    print(f"events in {options.output}")
    return 0


def read_synth(arguments: Sequence[str]) -> "tuple[Namespace, SynthConfig]":
    """What the arguments of ``synth`` spell; exits when they are wrong."""
    from shardrec.pipeline.synth import SynthConfig

    parser = Parser(
        "synth",
        "Writes a generated event log to one Parquet file: popularity by Zipf's law, users with\n"
        "drifting tastes, and order that matters. Equal options write equal events, at any size.\n"
        "Prints the NDCG@10 of the true model (ceiling), of Markov baselines, and of popularity.\n"
        "Asked again for the same, it does nothing.",
        "example: shardrec synth --output log.parquet --users 40000 --items 50000 --events 1000000",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="Parquet file to write")
    parser.add_argument("--force", action="store_true", help="replace a log that is there")
    add_options(parser, SynthConfig)
    options = parser.parse(arguments)
    return options, read_options(SynthConfig, options)


def prepare(arguments: Sequence[str]) -> int:
    """Turn an event log into a prepared folder."""
    from shardrec.pipeline.prepare import prepare_once
    from shardrec.pipeline.prepared.balance import describe_loads

    config = read_prepare(arguments)
    with sigterm_unwinds():
        done = prepare_once(config)
    for name, count in done.manifest.counts.items():
        print(f"{name.replace('_', ' '):<40} {count:>14,}")
    print("\n".join(describe_loads(done.manifest.load_per_rank)))
    told = f"wrote {config.output}"
    print(told if done.is_new else f"{config.output} is complete already: nothing was done")
    return 0


def read_prepare(arguments: Sequence[str]) -> "PrepareConfig":
    """The config that the arguments of ``prepare`` spell; exits when they are wrong."""
    from shardrec.pipeline.prepare import PrepareConfig

    parser = Parser(
        "prepare",
        "Reads an event log (Parquet: user, item, time) and writes what training and evaluation\n"
        "stream: sequences, splits, item counts, and a manifest that is there only when all is.\n"
        "Sorting spills to disk: the log may be larger than memory. Asked again for the same, it\n"
        "does nothing and says so; --force does it again.\n"
        "The day after, --items keeps the index of every item that the last folder had.",
        "example: shardrec prepare --events 'logs/*.parquet' --user-column customer --output data",
    )
    add_options(parser, PrepareConfig)
    return read_options(PrepareConfig, parser.parse(arguments))


def train(arguments: Sequence[str]) -> int:
    """Train on a prepared folder, alone or as one of the launcher's workers."""
    from shardrec.launch.signals import grace_seconds, sigterm_asks
    from shardrec.launch.workers import check_restarts, workers
    from shardrec.pipeline.train import train as run_train

    options, config = read_train(arguments)
    resume, force = options.resume, options.force
    check_restarts(resume, os.environ)
    grace_s = grace_seconds(options.grace, os.environ)
    with workers(options.timeout) as found, sigterm_asks(grace_s, found.peers) as interrupted:
        run_train(config, resume=resume, force=force, interrupted=interrupted)
    return 0


def read_train(arguments: Sequence[str]) -> "tuple[Namespace, TrainConfig]":
    """What the arguments of ``train`` spell; exits when they are wrong."""
    from shardrec.pipeline.config import describe, override, unknown_name
    from shardrec.pipeline.recipes import RECIPES
    from shardrec.pipeline.run.replace import check_force

    parser = Parser(
        "train",
        "Trains on a prepared folder and writes a run folder: the best and the last weights,\n"
        "metrics.jsonl, TensorBoard events, and the complete config. Alone it uses one process;\n"
        "`shardrec launch train` starts several. Options of the model are set by dotted names:\n"
        "  shardrec train --prepared data --run run --recipe demo loss=cce_minus encoder.width=64\n"
        "After SIGTERM it ends the step, writes a checkpoint and exits with 75: start it again.",
    )
    parser.add_argument("--prepared", required=True, metavar="DIR", help="folder of `prepare`")
    parser.add_argument(
        "--run",
        required=True,
        metavar="DIR",
        help="folder to write: new or empty, but for --resume and --force",
    )
    parser.add_argument("--recipe", default="demo", help="what to start from (default: demo)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="yes",
        default="no",
        choices=("yes", "auto", "no"),
        help="go on with the interrupted run in the folder from its last whole checkpoint, on any "
        "number of workers; `--resume=auto` also starts a new one where there is none, and does "
        "nothing where it is finished: for jobs that are tried again",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="train anew where the folder holds a run: the new one is written beside it, in "
        ".RUN.partial, and takes its place when it has finished; until then the former run is as "
        "it was. Other files in the folder are refused, and checkpoints elsewhere need a new "
        "folder. After an interruption, --force "
        "--resume=auto goes on with the new run and --force alone begins it again",
    )
    add_timeout(parser)
    parser.add_argument(
        "--grace",
        type=float,
        default=None,
        metavar="SECONDS",
        help="after SIGTERM, time to end the step and write a checkpoint (default: 25, and under "
        "torchrun 5 less than it leaves its workers)",
    )
    parser.add_argument(
        "--init-from",
        metavar="RUN",
        help="start from the weights of this run, whose items may be fewer; what is kept, and "
        "how new items start, say init_from.optimizer, init_from.new_rows, init_from.checkpoint",
    )
    parser.add_argument(
        "--profile",
        nargs="?",
        type=int,
        const=5,
        metavar="STEPS",
        help="write to RUN/profile a trace of some steps (5) of every worker, after a warm-up, "
        "and what share of the time each part of a step takes",
    )
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="options to change")
    lines = [f"  {name:<16} {first_line(recipe)}" for name, recipe in RECIPES.items()]
    example = describe(RECIPES["demo"]("DIR", "DIR"))
    parser.epilog = "\n".join(
        ["recipes:", *lines, "", "options, as the recipe `demo` sets them:", example]
    )
    options = parser.parse(arguments)
    check_force(options.force, options.resume)
    if options.recipe not in RECIPES:
        raise ValueError(unknown_name("recipe", options.recipe, list(RECIPES)))
    recipe = RECIPES[options.recipe](options.prepared, options.run)
    words = {name: getattr(options, word) for name, word in OWN_WORDS.items()}
    said = {
        n: f"--{OWN_WORDS[n].replace('_', '-')} {value}"
        for n, value in words.items()
        if value is not None
    }
    check_said_once(options.overrides, said)
    started = [] if options.init_from is None else [f"init_from.run={options.init_from}"]
    profiled = [] if options.profile is None else [f"profile.steps={options.profile}"]
    return options, override(recipe, [*started, *profiled, *options.overrides])


# Options of the run that the command line has words of its own for.
OWN_WORDS = {
    **{"data": "prepared", "output": "run", "init_from.run": "init_from"},
    "profile.steps": "profile",
}


def check_said_once(overrides: Sequence[str], said: Mapping[str, str]) -> None:
    """Refuse options that are set twice, of which one would be ignored.

    Args:
        overrides: as typed, name=value.
        said: dotted names that are set already, and by which words.

    Raises:
        ValueError: a name comes again.
    """
    said = dict(said)
    for assignment in overrides:
        name = assignment.partition("=")[0].strip()
        if name in said:
            raise ValueError(
                f"{name} must be set once, got {said[name]} and {assignment}; drop one of them"
            )
        said[name] = assignment


def first_line(documented: object) -> str:
    """First line of a docstring."""
    return (documented.__doc__ or "").strip().partition("\n")[0]


def evaluate(arguments: Sequence[str]) -> int:
    """Rank the whole catalog for the users of a split and write the metrics into the run."""
    from shardrec.launch.workers import process_group
    from shardrec.pipeline.evaluate import evaluate as run_evaluate
    from shardrec.pipeline.evaluate import evaluate_popularity
    from shardrec.pipeline.ranks import rank_of

    options, config = read_evaluate(arguments)
    with process_group(options.timeout) as (group, _):
        if options.run is None:
            metrics = evaluate_popularity(
                options.prepared,
                config,
                split=options.split,
                output=options.output,
                force=options.force,
            )
        else:
            metrics = run_evaluate(
                options.run,
                options.prepared,
                config,
                split=options.split,
                checkpoint=options.checkpoint or "best",
                output=options.output,
                force=options.force,
            )["metrics"]
        if rank_of(group) == 0:
            print_metrics(metrics)
            if options.output or options.run:
                print(f"metrics in {options.output or Path(options.run) / 'metrics.json'}")
    return 0


def read_evaluate(arguments: Sequence[str]) -> "tuple[Namespace, MeasureConfig]":
    """What the arguments of ``evaluate`` spell; exits when they are wrong."""
    from shardrec.pipeline.model.config import MeasureConfig

    parser = Parser(
        "evaluate",
        "Ranks the whole catalog for the users of a split and writes metrics.json into the run:\n"
        "NDCG, Recall, HitRate, MRR and Coverage at several list lengths, Surprisal, recall by\n"
        "popularity, and the protocol they follow. Metrics that end in /known leave out targets\n"
        "that training never saw. Any number of workers may evaluate what any number trained.\n"
        "Asked again for the same, it does nothing.",
        "example: shardrec evaluate --prepared data --run run --filter-seen",
    )
    parser.add_argument("--prepared", required=True, metavar="DIR", help="folder of `prepare`")
    judged = parser.add_mutually_exclusive_group(required=True)
    judged.add_argument("--run", metavar="DIR", help="folder of `train`")
    judged.add_argument(
        "--popularity", action="store_true", help="judge the ranking by training counts instead"
    )
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument(
        "--checkpoint", choices=("best", "last"), help="weights of the run (default: best)"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="report to write (default: metrics.json in the run; none with --popularity)",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace a report of other weights or options"
    )
    add_timeout(parser)
    add_options(parser, MeasureConfig)
    options = parser.parse(arguments)
    if options.popularity and options.checkpoint:
        parser.error(f"--checkpoint must come with --run, got {options.checkpoint}; drop it")
    if options.popularity and options.force and not options.output:
        parser.error("--force must come with --output or --run, got neither; drop it")
    return options, read_options(MeasureConfig, options)


def plan(arguments: Sequence[str]) -> int:
    """Say what a run will cost each rank."""
    from shardrec.pipeline.config import override, unknown_name
    from shardrec.pipeline.plan import Machine
    from shardrec.pipeline.plan import plan as run_plan
    from shardrec.pipeline.recipes import RECIPES

    parser = Parser(
        "plan",
        "Says before a machine is rented what a step costs each rank: bytes of memory by term,\n"
        "bytes received from other ranks, bytes that the loss reads and writes, FLOP, and the\n"
        "largest catalog that fits. Options of the model are set by dotted names, as in `shardrec\n"
        "train`; with checkpoints.background=false no copy for a checkpoint is counted.",
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
    check_said_once(options.overrides, {})
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
