"""Commands that are no stage: launch, report, doctor, demo."""

import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shardrec.launch import commands, delivery
from shardrec.launch.options import Parser, add_options, read_options
from shardrec.pipeline.config import unknown_name

if TYPE_CHECKING:
    from shardrec.launch.runner import Job

# Each reads the arguments of a stage and exits or raises when they are wrong.
READERS: Mapping[str, Callable[[Sequence[str]], object]] = {
    "synth": commands.read_synth,
    "prepare": commands.read_prepare,
    "train": commands.read_train,
    "evaluate": commands.read_evaluate,
    "recommend": delivery.read_recommend,
    "export": delivery.read_export,
    "gate": delivery.read_gate,
    "publish": delivery.read_publish,
    "rollback": delivery.read_rollback,
}


def launch(arguments: Sequence[str]) -> int:
    """Run a component through TorchX, on this machine or on a cluster."""
    from shardrec.launch import runner

    options, job = read_launch(arguments)
    component_options, stage_arguments = runner.split(job.arguments)
    is_question = "--help" in component_options  # TorchX answers it when it makes the request
    if not is_question:
        check_stage_arguments(job.component, stage_arguments)
    if options.dryrun or is_question:
        print(runner.describe(job))
        return 0
    if not job.is_local:
        return submit(job, wait=options.wait)
    failure = runner.run_here(job)
    if failure is None:
        return 0
    reason = failure.complaint or "its workers' last lines are above"
    print(f"shardrec launch: {job.component} failed: {reason}", file=sys.stderr)
    return failure.exit_code


def read_launch(arguments: Sequence[str]) -> "tuple[Namespace, Job]":
    """What the arguments of ``launch`` spell; exits or raises when they are wrong."""
    from shardrec.launch import components, runner
    from shardrec.launch.component_options import check_component_options

    parser = Parser(
        "launch",
        "Runs a stage through TorchX: several workers here, or a job for a cluster.\n"
        "The stage's own arguments follow `--`; `shardrec launch train --help` lists the rest.",
        "examples:\n"
        "  shardrec launch train -j 1x2 -- --prepared data --run run --recipe demo\n"
        "  shardrec launch -s slurm -cfg partition=gpu train -j 4x8 --gpu 8 -- "
        "--prepared data --run run\n"
        "  shardrec launch -s kubernetes -cfg queue=default --dryrun train -j 2x8 --gpu 8 "
        "--image me/shardrec:1 -- --prepared /data --run /run\n"
        "exit codes: 2, 3 and 75 as those of workers here, 1 where they or an awaited job failed\n"
        "otherwise",
    )
    parser.add_argument("-s", "--scheduler", default="local_cwd", help="default: local_cwd")
    parser.add_argument(
        "-cfg", "--scheduler-args", default="", metavar="K=V,…", help="the scheduler's own options"
    )
    parser.add_argument(
        "--dryrun", action="store_true", help="print the request instead of submitting it"
    )
    parser.add_argument(
        "--wait", action="store_true", help="wait until a submitted job has ended, and say how"
    )
    parser.add_argument(
        "--log-dir", type=Path, default=None, help="keep the output of local workers here"
    )
    parser.add_argument("component", help=", ".join(runner.COMPONENTS))
    parser.add_argument(
        "arguments", nargs="...", help="component options, then `--`, then the stage's"
    )
    # Cut here: argparse takes a `--` for its own in some releases and places, and not in others.
    words, stage_arguments = runner.split(arguments)
    options, unknown = parser.parse_known_args(words)
    if unknown:
        parser.refuse(unknown)
    if options.component not in runner.COMPONENTS:
        parser.error(unknown_name("component", options.component, list(runner.COMPONENTS)))
    if "--help" not in options.arguments:
        component = getattr(components, options.component)
        check_component_options(component, options.arguments, parser.names())
    job = runner.Job(
        component=options.component,
        arguments=(*options.arguments, "--", *stage_arguments),
        scheduler=options.scheduler,
        settings=options.scheduler_args,
        log_dir=options.log_dir,
    )
    if job.log_dir and not job.is_local:
        parser.error(f"--log-dir must come with local workers, got -s {job.scheduler}; drop it")
    return options, job


def submit(job: "Job", *, wait: bool) -> int:
    """Submit a job and print its handle; the exit code tells how it ended where it is awaited."""
    from shardrec.launch import runner

    handle = runner.submit(job)
    print(handle, flush=True)
    if not wait:
        return 0
    state = runner.wait(handle)
    if state == "SUCCEEDED":
        return 0
    print(f"shardrec launch: {job.component} ended as {state}; see its logs", file=sys.stderr)
    return 1


def check_stage_arguments(stage: str, arguments: Sequence[str]) -> None:
    """Refuse wrong options here, before a job waits in a queue to be told."""
    READERS[stage](arguments)


def report(arguments: Sequence[str]) -> int:
    """Write one HTML page that shows and compares runs."""
    parser = Parser(
        "report",
        "Writes one self-contained HTML page about run folders: curves of loss, validation\n"
        "metric, throughput, memory, padding and gradient norm, a table that compares the runs,\n"
        "recall by popularity, and every option. Runs may be in progress and need not be\n"
        "evaluated. A former report is replaced.",
        "example: shardrec report runs/cce runs/sce --output report.html",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of `train`")
    parser.add_argument("--output", default="report.html", metavar="FILE", help="page to write")
    options = parser.parse(arguments)
    from shardrec.pipeline.report import report as run_report

    print(f"wrote {run_report(options.runs, options.output)}")
    return 0


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

    from shardrec.launch.demo import run_demo
    from shardrec.launch.demo_config import DemoConfig

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
