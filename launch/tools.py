"""The commands that are not stages: describe, report, options, plan, launch, doctor, demo."""

import datetime
import inspect
import re
import sys
import typing
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardrec.launch import commands
from shardrec.launch.options import add_options, parser_for, read_options, require_set_once
from shardrec.launch.stages import STAGES
from shardrec.launch.train_options import dotted_names
from shardrec.pipeline.near_names import unknown_name

if TYPE_CHECKING:
    from shardrec.launch.runner import Job

__all__ = ["run"]


def run(name: str, arguments: Sequence[str]) -> int:
    """Run a command that is not a stage and return its exit code."""
    return FUNCTIONS[name](arguments)


def report(arguments: Sequence[str]) -> int:
    """Write one HTML page that shows and compares runs."""
    parser = parser_for("report")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of `train`")
    parser.add_argument("--output", default="report.html", metavar="FILE", help="page to write")
    options = parser.parse(arguments)
    from shardrec.pipeline.report import report as run_report

    print(f"wrote {run_report(options.runs, options.output)}")
    return 0


def describe(arguments: Sequence[str]) -> int:
    """Print what is in an event log, and which options of prepare it needs."""
    from shardrec.pipeline.describe import DescribeConfig
    from shardrec.pipeline.describe import describe as run_describe

    parser = parser_for("describe")
    parser.add_argument("events", metavar="LOG", help="file, folder, glob or URI, as for prepare")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--html", metavar="FILE", help="also write a page with curves")
    add_options(parser, DescribeConfig)
    options = parser.parse(arguments)
    found = run_describe(options.events, read_options(DescribeConfig, options))
    print(found.as_json() if options.json else found.as_text())
    if options.html is not None:
        from shardrec.pipeline.report.log_page import write_log_page  # needs shardrec[report]

        write_log_page(found, options.events, options.html)
    return 0


def options(arguments: Sequence[str]) -> int:
    """Print the meaning of the options of training, of all or of some parts."""
    from shardrec.launch.described import as_text, chosen, groups
    from shardrec.pipeline.config import override
    from shardrec.pipeline.recipes import recipe_named

    parser = parser_for("options")
    parser.add_argument(
        "--recipe", default="default", help="config to start from (default: default)"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="loss=sce, optimizer, loss.share")
    asked = parser.parse(arguments)
    choices = [name for name in asked.names if "=" in name]
    config = override(recipe_named(asked.recipe)("DIR", "DIR"), choices)
    found = groups(type(config), config)
    names = [name.partition("=")[0] for name in asked.names]
    parts = [group for name in names for group in chosen(found, name)]
    print(as_text(parts if names else found))
    return 0


def plan(arguments: Sequence[str]) -> int:
    """Print the cost of a run on each rank: memory, traffic, FLOP."""
    from shardrec.pipeline.config import override
    from shardrec.pipeline.default_recipe import LogSize, options_for
    from shardrec.pipeline.plan import AttributeCounts, Machine
    from shardrec.pipeline.plan import plan as run_plan
    from shardrec.pipeline.recipes import recipe_named
    from shardrec.pipeline.scaling import Cluster, describe_scaling, scaled

    parser = parser_for("plan")
    parser.add_argument(
        "--num-items", required=True, metavar="INT", type=int, help="items of the catalog"
    )
    parser.add_argument(
        "--recipe", default="default", help="config to start from (default: default)"
    )
    parser.add_argument(
        "--measured",
        metavar="RUN",
        help="folder of a run with these options that has taken some steps, here or there: its "
        "times give the time of the whole run",
    )
    for options_of in (Machine, AttributeCounts, Cluster):
        add_options(parser, options_of)
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="options to change")
    parser.dotted = dotted_names()
    options = parser.parse(arguments)
    require_set_once(options.overrides, {})
    if options.recipe == "default":
        start = options_for(LogSize.of_items(options.num_items), "none", "none")
    else:
        start = recipe_named(options.recipe)("none", "none")
    config = override(start, options.overrides)
    parts = read_options(Machine, options), read_options(AttributeCounts, options)
    print(run_plan(config, options.num_items, *parts).describe())
    cluster = read_options(Cluster, options)
    if cluster.node_gbps is not None:
        steps = scaled(config, options.num_items, parts[0], cluster, parts[1])
        print(f"\n{describe_scaling(steps, cluster)}")
    if options.measured is not None:
        from shardrec.pipeline.duration import duration

        found = duration(config, Path(options.measured))
        print(found.describe(datetime.datetime.now()))
    return 0


def launch(arguments: Sequence[str]) -> int:
    """Run a component through TorchX, on this machine or on a cluster."""
    from shardrec.launch import runner

    options, job = read_launch(arguments)
    component_options, stage_arguments = runner.split(job.arguments)
    is_question = "--help" in component_options  # TorchX prints the help when it makes the request
    if not is_question:  # wrong options are refused before a job waits in a queue
        commands.read(job.component, stage_arguments)
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
    """The options of ``launch`` and the job they describe; exits or raises if one is wrong."""
    from shardrec.launch import components, runner

    parser = parser_for("launch")
    parser.add_argument("-s", "--scheduler", default="local_cwd", help="default: local_cwd")
    parser.add_argument(
        "-cfg", "--scheduler-args", default="", metavar="K=V,…", help="the scheduler's own options"
    )
    parser.add_argument(
        "--dryrun", action="store_true", help="print the request instead of submitting it"
    )
    parser.add_argument(
        "--wait", action="store_true", help="wait until a submitted job has ended, and report how"
    )
    parser.add_argument(
        "--log-dir", type=Path, default=None, help="keep the output of local workers here"
    )
    parser.add_argument("component", help=", ".join(STAGES))
    parser.add_argument(
        "arguments", nargs="...", help="component options, then `--`, then the stage's"
    )
    # Split at `--` first: some releases of argparse remove it, others do not.
    words, stage_arguments = runner.split(arguments)
    options, unknown = parser.parse_known_args(words)
    if unknown:
        parser.refuse(unknown)
    if options.component not in STAGES:
        parser.error(unknown_name("component", options.component, list(STAGES)))
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
        parser.error(f"--log-dir must come with local workers, got -s {job.scheduler}; remove it")
    return options, job


def check_component_options(
    component: Callable[..., Any], words: Sequence[str], before: Collection[str]
) -> None:
    """Refuse options that a component does not have, before TorchX prints a page of usage.

    Args:
        component: a function of ``shardrec.launch.components``.
        words: the arguments between its name and ``--``.
        before: options that must come before its name.

    Raises:
        ValueError: an option is unknown (similar names are listed) or has a wrong value.
    """
    known, stage = _annotations(component), component.__name__
    belongs = f"what `shardrec {stage}` itself takes follows `--`"
    for name, value in _pairs(words, known):
        if name in before and name not in known:
            raise ValueError(f"{name} must stand before {stage}, got it behind; move it")
        if not name.startswith("-"):
            raise ValueError(f"arguments must follow an option, got {name!r}; {belongs}")
        if name not in known:
            message = unknown_name(f"option of {stage}", name, list(known))
            raise ValueError(f"{message} ({belongs})")
        _check_value(name, value, known[name])


def _check_value(name: str, value: str | None, annotation: Any) -> None:
    if value is None or value.startswith("--"):
        raise ValueError(f"{name} must be followed by a value, got none; give one")
    if annotation is int and not re.fullmatch(r"[+-]?\d+", value):
        raise ValueError(f"{name} must be a whole number, got {value!r}; give one")
    kinds = [typing.get_origin(kind) for kind in typing.get_args(annotation)]
    if dict in kinds and "=" not in value:
        raise ValueError(
            f"{name} must be NAME=VALUE,NAME=VALUE…, got {value!r}; use OMP_NUM_THREADS=4"
        )


def _annotations(component: Callable[..., Any]) -> Mapping[str, Any]:
    """The annotation behind each option, under the names that TorchX gives them."""
    options: dict[str, Any] = {}
    for name, parameter in inspect.signature(component).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            options[f"--{name}"] = parameter.annotation
            if len(name) == 1:
                options[f"-{name}"] = parameter.annotation
    return options


def _pairs(words: Sequence[str], known: Collection[str]) -> Iterator[tuple[str, str | None]]:
    """Each option with its value, None where nothing follows."""
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name not in known and word[:2] in known:  # -j1x2
            name, equals, value = word[:2], "=", word[2:]
        yield name, value if equals else next(rest, None)


def submit(job: "Job", *, wait: bool) -> int:
    """Submit a job and print its handle; with ``wait``, 0 only if the job succeeds."""
    from shardrec.launch import runner

    handle = runner.submit(job)
    print(handle, flush=True)
    if not wait:
        return 0
    failure = runner.wait(handle)
    if failure:
        print(f"shardrec launch: {job.component} ended as {failure}; see its logs", file=sys.stderr)
    return 1 if failure else 0


def doctor(arguments: Sequence[str]) -> int:
    """Print what is installed and whether it fits together."""
    from shardrec.launch.doctor import run as run_doctor

    parser_for("doctor").parse(arguments)
    return run_doctor()


def demo(arguments: Sequence[str]) -> int:
    """Run the whole pipeline, on generated data or on the user's log."""
    from rich.console import Console

    from shardrec.launch.demo import DemoConfig, run_demo

    parser = parser_for("demo")
    add_options(parser, DemoConfig)
    run_demo(read_options(DemoConfig, parser.parse(arguments)), Console())
    return 0


FUNCTIONS: Mapping[str, Callable[[Sequence[str]], int]] = {
    function.__name__: function
    for function in (report, describe, options, plan, launch, doctor, demo)
}
