"""Build hook: writes the tables of the configuration reference from the config dataclasses.

The page marks the places with ``<!-- options: NAME -->``; what stands there follows from the code,
so a new field is documented by its line in the docstring of its dataclass and by nothing else.
"""

import dataclasses
import importlib
import inspect
import json
import types
import typing
from collections.abc import Iterator
from typing import Any

import docstring_parser

PAGE = "configuration.md"
REQUIRED = dataclasses.MISSING


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One leaf of a config."""

    name: str
    kind: str
    default: str
    meaning: str


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
    plain = [option for option in options(train) if "." not in option.name]
    parts = ["### The run itself {#run}", table(plain)]
    for field, annotation in annotated(train):
        kinds = dataclasses_in(annotation)
        for kind in kinds:
            name = field.name if len(kinds) == 1 else f"{field.name}={snake_case(kind)}"
            parts.append(f"### `{name}` {{#{name.replace('=', '-')}}}")
            parts.append(first_line(kind))
            own = default_of(field) if len(kinds) == 1 else REQUIRED
            parts.append(table(options(kind, f"{field.name}.", own)))
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
    from shardrec.pipeline.config import flatten
    from shardrec.pipeline.recipes import RECIPES

    parts = []
    for name, recipe in RECIPES.items():
        config = recipe("DIR", "DIR")
        encoder = type(config.encoder)(width=4, max_length=1)
        plain = type(config)(data="DIR", output="DIR", loss=type(config.loss)(), encoder=encoder)
        before = dict(flatten(plain))
        changed = {key: value for key, value in flatten(config) if value != before[key]}
        loss = f"loss={snake_case(type(config.loss))}"
        words = [loss, *(f"{key}={typed(value)}" for key, value in changed.items())]
        parts.append(
            f"`{name}`\n:   {first_line(recipe)}\n    " + " ".join(f"`{w}`" for w in words)
        )
    return "\n\n".join(parts)


def options(cls: type, prefix: str = "", values: Any = REQUIRED) -> list[Option]:
    """The leaves of a dataclass, in order; the options of a choice are left to its own table.

    Args:
        cls: the dataclass.
        prefix: of the dotted names.
        values: an instance that holds the defaults; without one the fields say them.
    """
    meanings, found = descriptions(cls), []
    for field, annotation in annotated(cls):
        name, kinds = prefix + field.name, dataclasses_in(annotation)
        default = default_of(field) if values is REQUIRED else getattr(values, field.name)
        if len(kinds) == 1:
            found += options(kinds[0], f"{name}.", default)
        elif not kinds:
            if not meanings.get(field.name):
                raise ValueError(f"{name} must have a line in the docstring of {cls.__name__}")
            shown = "required" if default is REQUIRED else f"`{typed(default)}`"
            found.append(Option(name, describe_type(annotation), shown, meanings[field.name]))
    return found


def annotated(cls: type) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """The fields that are options, with their resolved annotations."""
    annotations = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.init:
            yield field, annotations[field.name]


def dataclasses_in(annotation: Any) -> list[type]:
    """The dataclasses that an annotation allows."""
    return [kind for kind in members(annotation) if dataclasses.is_dataclass(kind)]


def members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; any other annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def descriptions(cls: type) -> dict[str, str]:
    """What the docstrings of a dataclass and its bases say of each field."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        parsed = docstring_parser.parse(base.__doc__ or "", docstring_parser.Style.GOOGLE)
        for entry in parsed.params:
            text = " ".join((entry.description or "").split())
            found |= {name.strip(): text for name in entry.arg_name.split(",")}
    return found


def describe_type(annotation: Any) -> str:
    """A type as a reader types its values.

    Example:
        >>> describe_type(int | None), describe_type(typing.Literal["a", "b"])
        ('int or none', '`a` or `b`')
    """
    return " or ".join(describe_member(kind) for kind in members(annotation))


def describe_member(kind: Any) -> str:
    """One member of a union, in words."""
    if kind is type(None):
        return "none"
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(f"`{value}`" for value in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        words = [describe_type(part) for part in parts if part is not ...]
        return ", ".join([*words, "…"] if ... in parts else words)
    return str(getattr(kind, "__name__", kind))


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field, or ``REQUIRED``."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def typed(value: Any) -> str:
    """A value as it is typed on the command line.

    Example:
        >>> typed(None), typed((0.9, 0.98)), typed(True), typed(1024)
        ('none', '0.9,0.98', 'true', '1024')
    """
    if isinstance(value, tuple | list):
        return ",".join(map(typed, value)) or "none"
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def as_typed(option: Option) -> Option:
    """The option as a stage's command takes it: ``--user-column``."""
    name = "--" + option.name.replace("_", "-")
    kind = "flag" if option.kind == "bool" else option.kind
    return dataclasses.replace(option, name=name, kind=kind)


def table(rows: list[Option]) -> str:
    """A Markdown table of options."""
    lines = ["| option | type | default | meaning |", "|---|---|---|---|"]
    for row in rows:
        cells = (f"`{row.name}`", row.kind, row.default, row.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def first_line(documented: Any) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(documented) or "").partition("\n")[0]


def snake_case(cls: type) -> str:
    """The name that a command line uses for a dataclass."""
    from shardrec.pipeline.config import snake_case as convert

    return convert(cls.__name__)
