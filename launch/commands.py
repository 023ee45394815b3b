"""The stages as commands: parse the arguments, call the pipeline function, print the result.

The modules of a stage are imported only when it runs, so that ``prepare`` does not load torch, and
``--help`` loads only the config. Commands that are not stages are in ``tools.py``.
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
    parser_for,
    read_options,
)
from shardrec.launch.orphans import end_with_launcher
from shardrec.launch.printing import (
    print_beside,
    print_counts,
    print_end,
    print_lists,
    print_metrics,
    print_protocol,
    print_split,
    print_tried,
)
from shardrec.launch.signals import exit_on_sigterm
from shardrec.launch.stages import STAGES, imported
from shardrec.launch.train_options import read_train
from shardrec.launch.tune_options import describe_study, read_tune

if TYPE_CHECKING:
    from shardrec.pipeline.baseline import BaselineConfig
    from shardrec.pipeline.export import ExportConfig
    from shardrec.pipeline.gate import GateConfig
    from shardrec.pipeline.log.config import PrepareConfig
    from shardrec.pipeline.log.generator import SynthConfig
    from shardrec.pipeline.memorize import MemorizeConfig
    from shardrec.pipeline.model.config import MeasureConfig
    from shardrec.pipeline.publish import PublishConfig, RollbackConfig
    from shardrec.pipeline.recommend import RecommendConfig
    from shardrec.pipeline.run.config import TrainConfig
    from shardrec.pipeline.similar import SimilarConfig
    from shardrec.pipeline.tuning.study import TuneConfig

__all__ = ["read", "read_train", "run"]


def run(name: str, arguments: Sequence[str]) -> int:
    """Run a stage and return its exit code."""
    options, config = read(name, arguments)
    cleaning = exit_on_sigterm() if STAGES[name].kind == "single" else nullcontext()
    with end_with_launcher(os.environ), cleaning:
        return FUNCTIONS[name](options, config)


def read(name: str, arguments: Sequence[str]) -> tuple[Namespace, Any]:
    """The options of a stage, and the config made from them; exits or raises if one is wrong."""
    special: dict[str, Callable[[Sequence[str]], tuple[Namespace, Any]]] = {
        **{"synth": read_synth, "train": read_train, "evaluate": read_evaluate},
        "tune": read_tune,
    }
    return (
        special[name](arguments)
        if name in special
        else read_with(parser_for(name), name, arguments)
    )


def read_with(parser: Parser, name: str, arguments: Sequence[str]) -> tuple[Namespace, Any]:
    """Add the options of the stage's config to ``parser``, parse, and build the config."""
    config = imported(STAGES[name].config)
    add_options(parser, config)
    options = parser.parse(arguments)
    return options, read_options(config, options)


def synth(options: Namespace, config: "SynthConfig") -> int:
    """Generate an event log and print the NDCG@10 of the best possible model on it."""
    from shardrec.pipeline.synth import generate

    print(generate(config, options.output, force=options.force))
    print(f"events in {options.output}")
    return 0


def prepare(_: Namespace, config: "PrepareConfig") -> int:
    """Turn an event log into a prepared folder."""
    from shardrec.pipeline.log.repetition import describe_repetition
    from shardrec.pipeline.prepare import prepare_once
    from shardrec.pipeline.prepared.balance import describe_loads

    if config.engine == "spark":
        _make_ready_for_spark(config.master)
    done = prepare_once(config)
    print_counts(done.manifest.counts)
    print_split(done.manifest)
    lines = describe_repetition(done.manifest.counts) + describe_loads(done.manifest.load_per_rank)
    print("\n".join(lines))
    print_end(done.is_new, config.output, "is complete already: nothing was done")
    return 0


def _make_ready_for_spark(master: str | None) -> None:
    """Check that there is Java; on this machine, Spark's Python is the one that runs this."""
    from shardrec.launch.doctor import find_java

    if find_java() is None:
        raise ValueError(
            "engine=spark must have Java 17 or newer on PATH or in JAVA_HOME, got none; install "
            "one, such as the package openjdk-17-jre-headless"
        )
    if master is None or master.startswith("local["):
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)


def train(options: Namespace, config: "TrainConfig") -> int:
    """Train on a prepared folder, alone or as one of the launcher's workers."""
    from shardrec.kernels.ranks.communicator import Communicator
    from shardrec.launch.signals import grace_seconds, stop_on_signals
    from shardrec.launch.workers import check_restarts, workers
    from shardrec.pipeline.default_recipe import read_size, said
    from shardrec.pipeline.evaluate import evaluate_baselines
    from shardrec.pipeline.outputs.files import BESIDE
    from shardrec.pipeline.train import train as run_train

    check_restarts(options.resume, os.environ)
    grace_s = grace_seconds(options.grace, os.environ)
    with workers(options.timeout) as found:
        if options.recipe == "default" and Communicator(found.group).rank == 0:
            print(said(read_size(config.data)), file=sys.stderr)
        with stop_on_signals(grace_s, found.peers) as interrupted:
            job: dict[str, Any] = {"interrupted": interrupted, "node_size": found.node_size}
            end = run_train(config, resume=options.resume, force=options.force, **job)
        if end.best_metrics:
            measure, output = config.validation.measure, Path(config.output) / BESIDE
            beside = evaluate_baselines(config.data, measure, "validation", output=output)
            if Communicator(found.group).rank == 0:
                print("on the validation users, beside what a model must beat:")
                label, metric = Path(config.output).name, config.validation.metric
                print_beside(end.best_metrics, beside, label, metric)
    return 0


def tune(options: Namespace, config: "TuneConfig") -> int:
    """Search options of training, alone or as one of the launcher's workers."""
    from shardrec.kernels.ranks.communicator import Communicator
    from shardrec.launch.signals import GRACE_S, stop_on_signals
    from shardrec.launch.workers import workers
    from shardrec.pipeline.tune import tune as run_tune

    with workers(options.timeout) as found:
        with stop_on_signals(GRACE_S, found.peers) as interrupted:
            study = run_tune(config, options.base, options.search, interrupted=interrupted)
        if Communicator(found.group).rank == 0:
            print(describe_study(study, options))
    return 0


def baseline(_: Namespace, config: "BaselineConfig") -> int:
    """Count popularity and item-to-item scores, which a model must beat."""
    from shardrec.pipeline.baseline import baseline as run_baseline

    done = run_baseline(config)
    print_counts(done.manifest["counts"])
    print_end(done.is_new, config.folder)
    return 0


def memorize(options: Namespace, config: "MemorizeConfig") -> int:
    """Count what followed each item, and choose the weight of these counts in ranking."""
    from shardrec.kernels.ranks.communicator import Communicator
    from shardrec.launch.workers import joined
    from shardrec.pipeline.memorize import memorize as run_memorize

    with joined("memorize", options) as group:
        done = run_memorize(config)
        if Communicator(group).rank == 0:
            if done.manifest["tried"]:
                print_tried(done.manifest["tried"], config.metric)
            print_end(done.is_new, Path(config.run) / "memory")
    return 0


def evaluate(options: Namespace, config: "MeasureConfig") -> int:
    """Rank the whole catalog for the users of a split and write the metrics into the run."""
    from shardrec.kernels.ranks.communicator import Communicator
    from shardrec.launch.workers import joined
    from shardrec.pipeline.evaluate import evaluate as run_evaluate
    from shardrec.pipeline.evaluate import evaluate_popularity

    report: dict[str, Any] = {
        "split": options.split,
        "output": options.output,
        "force": options.force,
    }
    with joined("evaluate", options) as group:
        if options.run is None:
            found = evaluate_popularity(options.prepared, config, **report)
        else:
            report["checkpoint"] = options.checkpoint or "best"
            found = run_evaluate(options.run, options.prepared, config, **report)
        if Communicator(group).rank == 0:
            print_metrics(found["metrics"], found["standard_errors"])
            label = Path(options.run).name if options.run else "popularity"
            print_beside(found["metrics"], found["baselines"], label)
            print_lists(found)
            if options.output or options.run:
                print(f"metrics in {options.output or Path(options.run) / 'metrics.json'}")
    return 0


def recommend(options: Namespace, config: "RecommendConfig") -> int:
    """Write the best items for every user in the histories."""
    from shardrec.kernels.ranks.communicator import Communicator
    from shardrec.launch.workers import joined
    from shardrec.pipeline.recommend import recommend as run_recommend

    with joined("recommend", options) as group:
        done = run_recommend(config)
        if Communicator(group).rank == 0:
            print_counts(done.manifest["counts"])
            print_protocol(done.manifest["protocol"])
            rate = f"{config.output}: {done.users_per_second:,.0f} users/s"
            print_end(done.is_new, rate if done.is_new else config.output)
    return 0


def similar(options: Namespace, config: "SimilarConfig") -> int:
    """Write the nearest items of each item."""
    from shardrec.kernels.ranks.communicator import Communicator
    from shardrec.launch.workers import joined
    from shardrec.pipeline.similar import similar as run_similar

    with joined("similar", options) as group:
        done = run_similar(config)
        if Communicator(group).rank == 0:
            print_counts(done.manifest["counts"])
            print_end(done.is_new, config.output)
    return 0


def export(options: Namespace, config: "ExportConfig") -> int:
    """Write item vectors and the encoder for serving."""
    from shardrec.kernels.ranks.communicator import Communicator
    from shardrec.launch.workers import joined
    from shardrec.pipeline.export import export as run_export

    with joined("export", options) as group:
        done = run_export(config)
        if Communicator(group).rank == 0:
            manifest = done.manifest
            print(f"{manifest['num_items']:,} items, catalog version {manifest['catalog_version']}")
            if index := manifest.get("faiss"):
                print(f"index {index['factory']}: recall@10 {index['recall@10']:.4f}")
            print_end(done.is_new, config.output)
    return 0


def gate(_: Namespace, config: "GateConfig") -> int:
    """Print whether an evaluated run may replace the published model."""
    from shardrec.pipeline.gate import gate as run_gate

    verdict = run_gate(config)
    print_end(verdict.is_new, config.report, "holds this verdict already: nothing to do")
    if verdict.passed:
        print(f"passed: {verdict.reason}")
        return 0
    print(f"shardrec gate: refused: {verdict.reason}", file=sys.stderr)
    return REFUSED


def publish(_: Namespace, config: "PublishConfig") -> int:
    """Publish an export: make the pointer file name it."""
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
    """Return to an earlier publication: make the pointer file name it again."""
    from shardrec.pipeline.publish import rollback as run_rollback

    done = run_rollback(config)
    line = f"{config.published} names {done.publication.export}, number {done.publication.number}"
    print(line if done.is_new else f"{line} already: nothing to do")
    return 0


FUNCTIONS: Mapping[str, Callable[[Namespace, Any], int]] = {
    **{"synth": synth, "prepare": prepare, "baseline": baseline, "train": train},
    **{"memorize": memorize, "evaluate": evaluate, "recommend": recommend},
    **{"similar": similar, "export": export, "tune": tune},
    **{"gate": gate, "publish": publish, "rollback": rollback},
}


def read_synth(arguments: Sequence[str]) -> "tuple[Namespace, SynthConfig]":
    """The options of ``synth`` and its config."""
    parser = parser_for("synth")
    parser.add_argument("--output", required=True, metavar="FILE", help="Parquet file to write")
    parser.add_argument("--force", action="store_true", help="replace an existing log")
    return read_with(parser, "synth", arguments)


def read_evaluate(arguments: Sequence[str]) -> "tuple[Namespace, MeasureConfig]":
    """The options of ``evaluate`` and its config."""
    parser = parser_for("evaluate")
    parser.add_argument("--prepared", required=True, metavar="DIR", help="folder of `prepare`")
    judged = parser.add_mutually_exclusive_group(required=True)
    judged.add_argument("--run", metavar="DIR", help="folder of `train` or `baseline`")
    judged.add_argument(
        "--popularity", action="store_true", help="evaluate the ranking by training counts instead"
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
