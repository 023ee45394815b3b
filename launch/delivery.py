"""Commands that bring a trained model to its users: recommend, export, gate, publish, rollback."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shardrec.launch.options import Parser, add_options, add_timeout, read_options

if TYPE_CHECKING:
    from shardrec.pipeline.export import ExportConfig
    from shardrec.pipeline.gate import GateConfig
    from shardrec.pipeline.publish import PublishConfig, RollbackConfig
    from shardrec.pipeline.recommend import RecommendConfig

REFUSED = 3


def recommend(arguments: Sequence[str]) -> int:
    """Write the best items of every user of some histories."""
    from shardrec.launch.workers import process_group
    from shardrec.pipeline.ranks import rank_of
    from shardrec.pipeline.recommend import recommend as run_recommend

    options, config = read_recommend(arguments)
    with process_group(options.timeout) as (group, _):
        done = run_recommend(config)
        if rank_of(group) == 0:
            for name, count in done.manifest["counts"].items():
                print(f"{name.replace('_', ' '):<40} {count:>14,}")
            rate = f"wrote {config.output}: {done.users_per_second:,.0f} users/s"
            print(rate if done.is_new else f"{config.output} is there already: nothing to do")
    return 0


def read_recommend(arguments: Sequence[str]) -> "tuple[Namespace, RecommendConfig]":
    """What the arguments of ``recommend`` spell; exits when they are wrong."""
    from shardrec.pipeline.recommend import RecommendConfig

    parser = Parser(
        "recommend",
        "Ranks the whole catalog for users of a Parquet file (or of the prepared folder) and\n"
        "writes user_id, item_ids and scores to Parquet, in the order of the histories. Any\n"
        "number of workers gives the same lists. Asked again for the same, it does nothing.",
        "example: shardrec recommend --run run --prepared data --histories users.parquet "
        "--output lists --k 20",
    )
    add_timeout(parser)
    add_options(parser, RecommendConfig)
    options = parser.parse(arguments)
    return options, read_options(RecommendConfig, options)


def export(arguments: Sequence[str]) -> int:
    """Write item vectors and the encoder for a service."""
    from shardrec.launch.workers import process_group
    from shardrec.pipeline.export import export as run_export
    from shardrec.pipeline.ranks import rank_of

    options, config = read_export(arguments)
    with process_group(options.timeout) as (group, _):
        done = run_export(config)
        if rank_of(group) == 0:
            manifest = done.manifest
            print(f"{manifest['num_items']:,} items, catalog version {manifest['catalog_version']}")
            if index := manifest.get("faiss"):
                print(f"index {index['factory']}: recall@10 {index['recall@10']:.4f}")
            told = f"wrote {config.output}"
            print(told if done.is_new else f"{config.output} is there already: nothing to do")
    return 0


def read_export(arguments: Sequence[str]) -> "tuple[Namespace, ExportConfig]":
    """What the arguments of ``export`` spell; exits when they are wrong."""
    from shardrec.pipeline.export import ExportConfig

    parser = Parser(
        "export",
        "Writes the item vectors with the log's own ids to Parquet, shard by shard, and the\n"
        "encoder as a torch.export program. shardrec.pipeline.serve reads both without TorchRec.\n"
        "Asked again for the same, it does nothing.",
        "example: shardrec export --run run --prepared data --output model",
    )
    add_timeout(parser)
    add_options(parser, ExportConfig)
    options = parser.parse(arguments)
    return options, read_options(ExportConfig, options)


def gate(arguments: Sequence[str]) -> int:
    """Say whether an evaluated run may take the place of the published model."""
    from shardrec.pipeline.gate import gate as run_gate

    config = read_gate(arguments)
    verdict = run_gate(config)
    told = f"wrote {config.report}"
    print(told if verdict.is_new else f"{config.report} says so already: nothing to do")
    if verdict.passed:
        print(f"passed: {verdict.reason}")
        return 0
    print(f"shardrec gate: refused: {verdict.reason}", file=sys.stderr)
    return REFUSED


def read_gate(arguments: Sequence[str]) -> "GateConfig":
    """The config that the arguments of ``gate`` spell; exits when they are wrong."""
    from shardrec.pipeline.gate import GateConfig

    parser = Parser(
        "gate",
        "Compares an evaluated run with the published model on the same users and writes a\n"
        "verdict. Where the published model was measured on other data it is measured again, from\n"
        "its export, on the users of the new run: items it does not know count as misses.",
        "example: shardrec gate --run run --prepared data --published published.json "
        "--metric NDCG@10 --tolerance 0.02\n"
        "exit codes: 0 the run may be published, 3 it may not and the report says why",
    )
    add_options(parser, GateConfig)
    return read_options(GateConfig, parser.parse(arguments))


def publish(arguments: Sequence[str]) -> int:
    """Let a pointer name an export."""
    from shardrec.pipeline.publish import Refused
    from shardrec.pipeline.publish import publish as run_publish

    config = read_publish(arguments)
    try:
        done = run_publish(config)
    except Refused as refusal:
        print(f"shardrec publish: {refusal}", file=sys.stderr)
        return REFUSED
    told = f"{config.published} names {config.export}, number {done.publication.number}"
    print(told if done.is_new else f"{told} already: nothing to do")
    return 0


def read_publish(arguments: Sequence[str]) -> "PublishConfig":
    """The config that the arguments of ``publish`` spell; exits when they are wrong."""
    from shardrec.pipeline.publish import PublishConfig

    parser = Parser(
        "publish",
        "Lets a pointer, one small JSON file with its history, name an export that its gate let\n"
        "pass. The file is replaced in one step; shardrec.pipeline.serve opens whatever it names.\n"
        "--force publishes without a gate, never against one that refused.",
        "example: shardrec publish --export model --gate run/gate.json --published published.json\n"
        "exit codes: 0 published, 3 the gate or a rollback stands against it",
    )
    add_options(parser, PublishConfig)
    return read_options(PublishConfig, parser.parse(arguments))


def rollback(arguments: Sequence[str]) -> int:
    """Let a pointer name what it named before."""
    from shardrec.pipeline.publish import rollback as run_rollback

    config = read_rollback(arguments)
    done = run_rollback(config)
    told = f"{config.published} names {done.publication.export}, number {done.publication.number}"
    print(told if done.is_new else f"{told} already: nothing to do")
    return 0


def read_rollback(arguments: Sequence[str]) -> "RollbackConfig":
    """The config that the arguments of ``rollback`` spell; exits when they are wrong."""
    from shardrec.pipeline.publish import RollbackConfig

    parser = Parser(
        "rollback",
        "Lets a pointer name the publication before the present one, or the one of a number, when\n"
        "its files are still there. What was left is not published again unless forced.",
        "example: shardrec rollback --published published.json",
    )
    add_options(parser, RollbackConfig)
    return read_options(RollbackConfig, parser.parse(arguments))
