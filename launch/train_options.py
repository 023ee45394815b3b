"""The options of ``shardrec train``: its own, and the config of a recipe by dotted names."""

import dataclasses
import textwrap
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shardrec.launch.options import Parser, parser_for, require_set_once

if TYPE_CHECKING:
    from shardrec.pipeline.run.config import TrainConfig

__all__ = ["dotted_names", "read_train"]

# Config fields that `train` sets by an option with another name.
OWN_OPTIONS = {
    "data": "prepared",
    "output": "run",
    "init_from.run": "init_from",
    "profile.steps": "profile",
}


def read_train(arguments: Sequence[str]) -> "tuple[Namespace, TrainConfig]":
    """The options of ``train`` and the config of its recipe with the overrides applied."""
    from shardrec.pipeline.config import override
    from shardrec.pipeline.recipes import recipe_named
    from shardrec.pipeline.run.own_code import with_own_encoder

    parser = parser_for("train")
    add_train_options(parser)
    if {"-h", "--help"} & set(arguments):
        parser.epilog = f"{parser.epilog}\n\n{_explained()}"
    parser.dotted = dotted_names()
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
    overrides = with_own_encoder(options.overrides)
    require_set_once(options.overrides, words)
    recipe = recipe_named(options.recipe)(given.pop("data"), given.pop("output"))
    rest = [f"{name}={value}" for name, value in given.items()]
    return options, override(recipe, [*rest, *overrides])


def dotted_names() -> list[str]:
    """The options that are set by dotted names, with the values of the recipe ``default``."""
    from shardrec.pipeline.config import flatten
    from shardrec.pipeline.recipes import RECIPES

    return [name for name, _ in flatten(RECIPES["default"]("DIR", "DIR"))]


def _explained() -> str:
    """The recipes, and every option by its part, as the recipe ``default`` sets it."""
    from shardrec.launch.described import as_text, first_line, groups
    from shardrec.pipeline.recipes import RECIPES

    recipes = [
        textwrap.fill(f"  {name:<16} {first_line(recipe)}", 100, subsequent_indent=" " * 19)
        for name, recipe in RECIPES.items()
    ]
    config = RECIPES["default"]("DIR", "DIR")
    itself, *parts = groups(type(config), config)
    of_the_run = [one for one in itself.options if one.name not in OWN_OPTIONS]
    itself = dataclasses.replace(itself, options=of_the_run)
    return "\n".join(
        [
            "recipes:",
            *recipes,
            "",
            "options, as the recipe `default` sets them for a middling log",
            "(`shardrec options loss=sce` explains another loss, `shardrec options optimizer` one",
            "part):",
            "",
            as_text([itself, *parts]),
        ]
    )


def add_train_options(parser: Parser) -> None:
    """Add the options of ``train`` itself, and ``name=value`` overrides of its config."""
    parser.add_argument("--prepared", required=True, metavar="DIR", help="folder of `prepare`")
    parser.add_argument(
        "--run",
        required=True,
        metavar="DIR",
        help="folder to write: new or empty, except with --resume and --force",
    )
    parser.add_argument(
        "--recipe", default="default", help="config to start from (default: default)"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="yes",
        default="no",
        choices=("yes", "auto", "no"),
        help="resume the interrupted run in the folder from its last complete checkpoint, on any "
        "number of workers; `--resume=auto` starts a new run if there is none, and does nothing "
        "if the run is finished: for jobs that are retried",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace the run in the folder: the new run is written to .RUN.partial next to it "
        "and replaces the old one only when it has finished. A folder with other files is "
        "refused, and checkpoints.folder, if set, must be a new one. After an interruption, "
        "--force --resume=auto resumes the new run and --force alone restarts it",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=None,
        metavar="SECONDS",
        help="time after SIGTERM to finish the step and write a checkpoint (default: 25; under "
        "torchrun, 5 less than torchrun gives its workers)",
    )
    parser.add_argument(
        "--init-from",
        metavar="RUN",
        help="warm start from the weights of this run, which may have fewer items; "
        "init_from.optimizer, init_from.new_rows and init_from.checkpoint set what is kept and "
        "how new items are initialised",
    )
    parser.add_argument(
        "--profile",
        nargs="?",
        type=int,
        const=5,
        metavar="STEPS",
        help="profile STEPS steps (5) on every worker after a warm-up; writes a trace, and a table "
        "of the time that each part of a step takes, to RUN/profile",
    )
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="options to change")
