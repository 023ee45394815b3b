"""The options of ``shardrec tune``: its own, what is searched, and the config of every trial."""

import shlex
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shardrec.launch.options import add_options, parser_for, read_options
from shardrec.launch.stages import STAGES, imported
from shardrec.launch.train_options import dotted_names

if TYPE_CHECKING:
    from shardrec.pipeline.tuning.study import TuneConfig, Tuned

__all__ = ["describe_study", "read_tune"]

_SHOWN = 5  # trials


def read_tune(arguments: Sequence[str]) -> "tuple[Namespace, TuneConfig]":
    """The options of ``tune``, with the config of its trials as ``base``, and its own config."""
    from shardrec.pipeline.config import override
    from shardrec.pipeline.recipes import recipe_named
    from shardrec.pipeline.run.own_code import with_own_encoder
    from shardrec.pipeline.tuning.space import DEFAULT_SPACE

    parser = parser_for("tune")
    parser.add_argument("--prepared", required=True, metavar="DIR", help="folder of `prepare`")
    parser.add_argument(
        "--recipe", default="default", help="config to start from (default: default)"
    )
    parser.add_argument(
        "--search",
        action="append",
        metavar="NAME=VALUES",
        help="an option to search, once for each: name=low:high, name=low:high:log or "
        f"name=a,b,c (default: {' '.join(DEFAULT_SPACE)})",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="name=value", help="options of every trial, as of train"
    )
    parser.dotted = dotted_names()
    config = imported(STAGES["tune"].config)
    add_options(parser, config)
    options = parser.parse(arguments)
    recipe = recipe_named(options.recipe)(options.prepared, options.output)
    options.base = override(recipe, with_own_encoder(options.overrides))
    options.search = options.search or list(DEFAULT_SPACE)
    return options, read_options(config, options)


def describe_study(found: "Tuned", options: Namespace) -> str:
    """The best trials, and the command that trains with the options of the best one."""
    metric = options.base.validation.metric
    ended = len(found.trials)
    lines = [f"{ended} trials, {found.num_pruned} of them ended early", ""]
    for trial in found.trials[:_SHOWN]:
        value = "ended early" if trial.value is None else f"{metric} {trial.value:.4f}"
        said = " ".join(f"{name}={text}" for name, text in trial.options.items())
        lines.append(f"  trial {trial.number:>4}  {value}  {said}")
    if found.best is not None:
        chosen = [f"{name}={text}" for name, text in found.best.options.items()]
        words = ["shardrec", "train", "--prepared", options.prepared, "--run", "run"]
        words += ["--recipe", options.recipe, *options.overrides, *chosen]
        lines += ["", f"the best is {options.output}/trials/{found.best.number:04d}; again, or for"]
        lines += ["longer:", f"  {shlex.join(words)}"]
    return "\n".join(lines)
