"""The stages as commands: each reads its arguments, calls its function of the pipeline, and prints.

What a stage needs is imported when it runs, so that ``prepare`` does not wait for torch, and help
waits for nothing but the config. Commands that are no stage are in ``tools.py``.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardrec.launch.cli import REFUSED
from shardrec.launch.options import (
    Parser,
    add_options,
    add_timeout,
    read_options,
    require_set_once,
)
from shardrec.launch.signals import exit_on_sigterm
from shardrec.launch.stages import COMMANDS, STAGES, imported

if TYPE_CHECKING:
    from shardrec.pipeline.export import ExportConfig
    from shardrec.pipeline.gate import GateConfig
    from shardrec.pipeline.log.config import PrepareConfig
    from shardrec.pipeline.log.generator import SynthConfig
    from shardrec.pipeline.model.config import MeasureConfig
    from shardrec.pipeline.publish import PublishConfig, RollbackConfig
    from shardrec.pipeline.recipes import Recipe
    from shardrec.pipeline.recommend import RecommendConfig
    from shardrec.pipeline.run.config import TrainConfig

__all__ = ["parser_for", "read", "read_train", "recipe_named", "run"]

# Options of the config that `train` has options of its own for.
OWN_OPTIONS = {
    "data": "prepared",
    "output": "run",
    "init_from.run": "init_from",
    "profile.steps": "profile",
}


def run(name: str, arguments: Sequence[str]) -> int:
    """Run a stage and return its exit code."""
    options, config = read(name, arguments)
    with exit_on_sigterm() if STAGES[name].kind == "single" else nullcontext():
        return FUNCTIONS[name](options, config)


def read(name: str, arguments: Sequence[str]) -> tuple[Namespace, Any]:
    """The options of a stage and the config made from them; exits or raises if one is wrong."""
    special = {"synth": read_synth, "train": read_train, "evaluate": read_evaluate}
    return (
        special[name](arguments)
        if name in special
        else read_with(parser_for(name), name, arguments)
    )


def read_with(parser: Parser, name: str, arguments: Sequence[str]) -> tuple[Namespace, Any]:
    """What ``parser`` reads and the config of the stage, after adding the options of its config."""
    config = imported(STAGES[name].config)
    add_options(parser, config)
    options = parser.parse(arguments)
    return options, read_options(config, options)


def parser_for(name: str) -> Parser:
    """A parser for a command with its help; with ``--timeout`` if several workers may run it."""
    command = COMMANDS[name]
    parser = Parser(name, command.description, command.epilog)
    if command.kind == "distributed":
        add_timeout(parser)
    return parser


def synth(options: Namespace, config: "SynthConfig") -> int:
    """Generate a log and say how well the best possible model would do on it."""
    from shardrec.pipeline.synth import generate

    print(generate(config, options.output, force=options.force))
    print(f"events in {options.output}")
    return 0


def prepare(_: Namespace, config: "PrepareConfig") -> int:
    """Turn an event log into a prepared folder."""
    from shardrec.pipeline.prepare import prepare_once
    from shardrec.pipeline.prepared.balance import describe_loads

    done = prepare_once(config)
    print_counts(done.manifest.counts)
    print("\n".join(describe_loads(done.manifest.load_per_rank)))
    print_end(done.is_new, config.output, "is complete already: nothing was done")
    return 0


def train(options: Namespace, config: "TrainConfig") -> int:
    """Train on a prepared folder, alone or as one of the launcher's workers."""
    from shardrec.launch.signals import grace_seconds, stop_on_sigterm
    from shardrec.launch.workers import check_restarts, workers
    from shardrec.pipeline.train import train as run_train

    resume, force = options.resume, options.force
    check_restarts(resume, os.environ)
    grace_s = grace_seconds(options.grace, os.environ)
    with workers(options.timeout) as found, stop_on_sigterm(grace_s, found.peers) as interrupted:
        run_train(config, resume=resume, force=force, interrupted=interrupted)
    return 0


def evaluate(options: Namespace, config: "MeasureConfig") -> int:
    """Rank the whole catalog for the users of a split and write the metrics into the run."""
    from shardrec.kernels.ranks.communicator import Communicator
    from shardrec.launch.workers import process_group
    from shardrec.pipeline.evaluate import evaluate as run_evaluate
    from shardrec.pipeline.evaluate import evaluate_popularity

    report: dict[str, Any] = {
        "split": options.split,
        "output": options.output,
        "force": options.force,
    }
    with process_group(options.timeout) as (group, _):
        if options.run is None:
            metrics = evaluate_popularity(options.prepared, config, **report)
        else:
            report["checkpoint"] = options.checkpoint or "best"
            metrics = run_evaluate(options.run, options.prepared, config, **report)["metrics"]
        if Communicator(group).rank == 0:
            print_metrics(metrics)
            if options.output or options.run:
                print(f"metrics in {options.output or Path(options.run) / 'metrics.json'}")
    return 0


def recommend(options: Namespace, config: "RecommendConfig") -> int:
    """Write the best items of every user of some histories."""
    from shardrec.kernels.ranks.communicator import Communicator
    from shardrec.launch.workers import process_group
    from shardrec.pipeline.recommend import recommend as run_recommend

    with process_group(options.timeout) as (group, _):
        done = run_recommend(config)
        if Communicator(group).rank == 0:
            print_counts(done.manifest["counts"])
            rate = f"{config.output}: {done.users_per_second:,.0f} users/s"
            print_end(done.is_new, rate if done.is_new else config.output)
    return 0


def export(options: Namespace, config: "ExportConfig") -> int:
    """Write item vectors and the encoder for a service."""
    from shardrec.kernels.ranks.communicator import Communicator
    from shardrec.launch.workers import process_group
    from shardrec.pipeline.export import export as run_export

    with process_group(options.timeout) as (group, _):
        done = run_export(config)
        if Communicator(group).rank == 0:
            manifest = done.manifest
            print(f"{manifest['num_items']:,} items, catalog version {manifest['catalog_version']}")
            if index := manifest.get("faiss"):
                print(f"index {index['factory']}: recall@10 {index['recall@10']:.4f}")
            print_end(done.is_new, config.output)
    return 0


def gate(_: Namespace, config: "GateConfig") -> int:
    """Say whether an evaluated run may take the place of the published model."""
    from shardrec.pipeline.gate import gate as run_gate

    verdict = run_gate(config)
    print_end(verdict.is_new, config.report, "says so already: nothing to do")
    if verdict.passed:
        print(f"passed: {verdict.reason}")
        return 0
    print(f"shardrec gate: refused: {verdict.reason}", file=sys.stderr)
    return REFUSED


def publish(_: Namespace, config: "PublishConfig") -> int:
    """Make a pointer name an export."""
    from shardrec.pipeline.publish import Refused
    from shardrec.pipeline.publish import publish as run_publish

    try:
        done = run_publish(config)
    except Refused as refusal:
        print(f"shardrec publish: {refusal}", file=sys.stderr)
        return REFUSED
    line = f"{config.published} names {config.export}, number {done.publication.number}"
    print(line if done.is_new else f"{line} already: nothing to do")
    return 0


def rollback(_: Namespace, config: "RollbackConfig") -> int:
    """Make a pointer name what it named before."""
    from shardrec.pipeline.publish import rollback as run_rollback

    done = run_rollback(config)
    line = f"{config.published} names {done.publication.export}, number {done.publication.number}"
    print(line if done.is_new else f"{line} already: nothing to do")
    return 0


FUNCTIONS: Mapping[str, Callable[[Namespace, Any], int]] = {
    **{"synth": synth, "prepare": prepare, "train": train, "evaluate": evaluate},
    **{"recommend": recommend, "export": export},
    **{"gate": gate, "publish": publish, "rollback": rollback},
}


def read_synth(arguments: Sequence[str]) -> "tuple[Namespace, SynthConfig]":
    """The options of ``synth`` and what to generate."""
    parser = parser_for("synth")
    parser.add_argument("--output", required=True, metavar="FILE", help="Parquet file to write")
    parser.add_argument("--force", action="store_true", help="replace a log that is there")
    return read_with(parser, "synth", arguments)


def read_train(arguments: Sequence[str]) -> "tuple[Namespace, TrainConfig]":
    """The options of ``train`` and the config of its recipe with the overrides applied."""
    from shardrec.pipeline.config import override

    parser = parser_for("train")
    add_train_options(parser)
    parser.epilog = f"{parser.epilog}\n\n{describe_recipes()}"
    options = parser.parse(arguments)
    if options.force:
        from shardrec.pipeline.run.replace import check_force

        check_force(options.force, options.resume)
    given = {
        name: value
        for name, option in OWN_OPTIONS.items()
        if (value := getattr(options, option)) is not None
    }
    words = {name: f"--{OWN_OPTIONS[name].replace('_', '-')} {given[name]}" for name in given}
    require_set_once(options.overrides, words)
    recipe = recipe_named(options.recipe)(given.pop("data"), given.pop("output"))
    rest = [f"{name}={value}" for name, value in given.items()]
    return options, override(recipe, [*rest, *options.overrides])


def describe_recipes() -> str:
    """The recipes by name, and all options as the recipe ``demo`` sets them."""
    from shardrec.pipeline.config import describe
    from shardrec.pipeline.recipes import RECIPES

    lines = [
        f"  {name:<16} {(recipe.__doc__ or '').splitlines()[0]}" for name, recipe in RECIPES.items()
    ]
    heading = "options, as the recipe `demo` sets them:"
    return "\n".join(["recipes:", *lines, "", heading, describe(RECIPES["demo"]("DIR", "DIR"))])


def recipe_named(name: str) -> "Recipe":
    """The recipe that a user asked for.

    Raises:
        ValueError: there is none of that name.
    """
    from shardrec.pipeline.config import unknown_name
    from shardrec.pipeline.recipes import RECIPES

    if name not in RECIPES:
        raise ValueError(unknown_name("recipe", name, list(RECIPES)))
    return RECIPES[name]


def add_train_options(parser: Parser) -> None:
    """Add the options of ``train`` that are not in its config, and the overrides that are."""
    parser.add_argument("--prepared", required=True, metavar="DIR", help="folder of `prepare`")
    parser.add_argument(
        "--run",
        required=True,
        metavar="DIR",
        help="folder to write: new or empty, except with --resume and --force",
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
        help="train again where the folder holds a run: the new run is written to .RUN.partial "
        "next to it and replaces it only when it has finished. Other files in the folder are "
        "refused, and checkpoints elsewhere need a new folder. After an interruption, --force "
        "--resume=auto goes on with the new run and --force alone begins it again",
    )
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
        help="start from the weights of this run, which may have fewer items; init_from.optimizer, "
        "init_from.new_rows and init_from.checkpoint say what is kept and how new items start",
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


def read_evaluate(arguments: Sequence[str]) -> "tuple[Namespace, MeasureConfig]":
    """The options of ``evaluate`` and how the users are ranked."""
    parser = parser_for("evaluate")
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
    options, config = read_with(parser, "evaluate", arguments)
    if options.popularity and options.checkpoint:
        parser.error(f"--checkpoint must come with --run, got {options.checkpoint}; remove it")
    if options.popularity and options.force and not options.output:
        parser.error("--force must come with --output or --run, got neither; remove it")
    return options, config


def print_counts(counts: Mapping[str, int]) -> None:
    """One count a line."""
    for name, count in counts.items():
        print(f"{name.replace('_', ' '):<40} {count:>14,}")


def print_end(
    is_new: bool, output: object, otherwise: str = "is there already: nothing to do"
) -> None:
    """Say that an output was written, or that it was complete before."""
    print(f"wrote {output}" if is_new else f"{output} {otherwise}")


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
