"""Build hook: writes the tables of the configuration reference from the config dataclasses.

The page marks the places with ``<!-- options: NAME -->``; what stands there follows from the code,
so a new field is documented by its line in the docstring of its dataclass and by nothing else.
"""

import dataclasses
import importlib
from typing import Any

from shardrec.launch.described import Option, first_line, groups, options, typed

PAGE = "configuration.md"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str | None:
    """The page with its marks replaced by tables."""
    if page.file.src_uri != PAGE:
        return None
    for mark, text in sections().items():
        before, found, after = markdown.partition(f"<!-- options: {mark} -->")
        if not found:
            raise ValueError(f"{PAGE} must have a mark for every section, got none for {mark!r}")
        markdown = before + text + after
    return markdown


def sections() -> dict[str, str]:
    """Markdown by mark: the recipes, the options of training, and those of the other stages."""
    return {"recipes": recipes(), "training": training(), "stages": stages()}


def training() -> str:
    """A table for each part of ``TrainConfig``, and one for each loss."""
    train = importlib.import_module("shardrec.pipeline.train").TrainConfig
    itself, *others = groups(train)
    parts = ["### The run itself {#run}", table(itself.options)]
    for group in others:
        parts.append(f"### `{group.name}` {{#{group.name.replace('=', '-')}}}")
        parts += [group.summary, table(group.options)]
    return "\n\n".join(parts)


def stages() -> str:
    """A table for each command that takes its options from one dataclass."""
    from shardrec.launch.stages import COMMANDS, imported

    parts = []
    for name, command in COMMANDS.items():
        if command.config:
            rows = [as_typed(option) for option in options(imported(command.config))]
            parts += [f"### `shardrec {name}` {{#command-{name}}}", table(rows)]
    return "\n\n".join(parts)


def recipes() -> str:
    """What each recipe is for, and what it sets to something else than the defaults."""
    from shardrec.pipeline.config import flatten, snake_case
    from shardrec.pipeline.recipes import RECIPES

    parts = []
    for name, recipe in RECIPES.items():
        config = recipe("DIR", "DIR")
        encoder = type(config.encoder)(width=4, max_length=1)
        plain = type(config)(data="DIR", output="DIR", loss=type(config.loss)(), encoder=encoder)
        before = dict(flatten(plain))
        changed = {key: value for key, value in flatten(config) if value != before[key]}
        loss = f"loss={snake_case(type(config.loss).__name__)}"
        words = [loss, *(f"{key}={typed(value)}" for key, value in changed.items())]
        parts.append(
            f"`{name}`\n:   {first_line(recipe)}\n    " + " ".join(f"`{w}`" for w in words)
        )
    return "\n\n".join(parts)


def as_typed(option: Option) -> Option:
    """The option as a stage's command takes it: ``--user-column``."""
    name = "--" + option.name.replace("_", "-")
    kind = "flag" if option.kind == "bool" else option.kind
    return dataclasses.replace(option, name=name, kind=kind)


def table(rows: list[Option]) -> str:
    """A Markdown table of options."""
    lines = ["| option | type | default | meaning |", "|---|---|---|---|"]
    for row in rows:
        default = row.default if row.default == "required" else f"`{row.default}`"
        cells = (f"`{row.name}`", row.kind, default, row.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
