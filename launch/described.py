"""Describe the options of a config from its docstrings, for --help, `options` and the docs."""

import dataclasses
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

import docstring_parser

from shardrec.pipeline.config import snake_case
from shardrec.pipeline.near_names import unknown_name

__all__ = [
    "REQUIRED",
    "Group",
    "Option",
    "annotated",
    "as_text",
    "chosen",
    "dataclasses_in",
    "default_of",
    "descriptions",
    "first_line",
    "groups",
    "options",
    "typed",
]

REQUIRED = dataclasses.MISSING


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One leaf of a config: dotted name, possible values, default and meaning."""

    name: str
    kind: str
    default: str
    meaning: str


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """The options of one part of a config, or of one choice for a part (``loss=sce``)."""

    name: str
    summary: str
    options: list[Option]


def groups(cls: type, values: Any = REQUIRED) -> list[Group]:
    """The options of a config by part; those of the config itself come first, under "".

    Args:
        cls: the dataclass.
        values: an instance that holds the defaults; only the choices made in it are listed. If
            None, the defaults are those of the fields, and all choices are listed.
    """
    plain = [option for option in options(cls, values=values) if "." not in option.name]
    found = [Group("", first_line(cls), plain)]
    for field, annotation in annotated(cls):
        kinds = dataclasses_in(annotation)
        for kind in kinds:
            own = default_of(field) if values is REQUIRED else getattr(values, field.name)
            name = field.name if len(kinds) == 1 else f"{field.name}={snake_case(kind.__name__)}"
            if len(kinds) > 1 and values is REQUIRED:
                own = REQUIRED
            elif len(kinds) > 1 and type(own) is not kind:
                continue
            found.append(Group(name, first_line(kind), options(kind, f"{field.name}.", own)))
    return found


def options(cls: type, prefix: str = "", values: Any = REQUIRED) -> list[Option]:
    """The leaves of a dataclass, in order, without the options of choices (see ``groups``).

    Args:
        cls: the dataclass.
        prefix: prefix of the dotted names.
        values: an instance that holds the defaults; None takes those of the fields.

    Raises:
        ValueError: a leaf has no line in the docstring.
    """
    meanings, found = descriptions(cls), list[Option]()
    for field, annotation in annotated(cls):
        name, kinds = prefix + field.name, dataclasses_in(annotation)
        default = default_of(field) if values is REQUIRED else getattr(values, field.name)
        if len(kinds) == 1:
            found += options(kinds[0], f"{name}.", default)
        elif not kinds:
            if not meanings.get(field.name):
                raise ValueError(f"{name} must have a line in the docstring of {cls.__name__}")
            shown = "required" if default is REQUIRED else typed(default)
            found.append(Option(name, describe_type(annotation), shown, meanings[field.name]))
    return found


def chosen(found: list[Group], name: str) -> list[Group]:
    """The groups, or the one option, of a name such as ``optimizer`` or ``optimizer.eps``.

    Raises:
        ValueError: there is no such name; similar names are listed.
    """
    whole = [group for group in found if group.name and name in group.name.split("=")[:1]]
    whole += [group for group in found if group.name == name and group not in whole]
    single = [
        dataclasses.replace(group, options=[one])
        for group in found
        for one in group.options
        if one.name == name
    ]
    if not whole and not single:
        known = [group.name for group in found if group.name]
        known += [option.name for group in found for option in group.options]
        raise ValueError(unknown_name("option", name, known))
    return whole or single


def as_text(found: list[Group], width: int = 100) -> str:
    """The groups as text: each option with its default, possible values and meaning."""
    lines: list[str] = []
    for group in found:
        heading = f"{group.name or 'the run itself'}: {group.summary}".replace("``", "")
        lines += ["", *textwrap.wrap(heading, width)]
        for option in group.options:
            lines.append(f"  {option.name}={option.default}   ({option.kind})")
            lines += textwrap.wrap(
                option.meaning.replace("``", ""), width, initial_indent=" " * 6,
                subsequent_indent=" " * 6,
            )  # fmt: skip
    return "\n".join(lines[1:])


def annotated(cls: type) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """The fields that are options, with their resolved annotations."""
    annotations = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.init:
            yield field, annotations[field.name]


def dataclasses_in(annotation: Any) -> list[type]:
    """The dataclasses that an annotation allows."""
    kinds = (kind for kind in _members(annotation) if isinstance(kind, type))
    return [kind for kind in kinds if dataclasses.is_dataclass(kind)]


def descriptions(cls: type) -> dict[str, str]:
    """The description of each field in the docstrings of a dataclass and its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        parsed = docstring_parser.parse(base.__doc__ or "", docstring_parser.Style.GOOGLE)
        for entry in parsed.params:
            text = " ".join((entry.description or "").split())
            found |= {name.strip(): text for name in entry.arg_name.split(",")}
    return found


def describe_type(annotation: Any) -> str:
    """A type, described by the values that a user may type.

    Example:
        >>> describe_type(int | None), describe_type(typing.Literal["a", "b"])
        ('int or none', '`a` or `b`')
    """
    return " or ".join(_describe_member(kind) for kind in _members(annotation))


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field, or ``REQUIRED``."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def typed(value: Any) -> str:
    """A value as a user types it on the command line.

    Example:
        >>> typed(None), typed((0.9, 0.98)), typed(True), typed(1024)
        ('none', '0.9,0.98', 'true', '1024')
    """
    if isinstance(value, tuple | list):
        return ",".join(map(typed, value)) or "none"
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def first_line(documented: Any) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(documented) or "").partition("\n")[0]


def _members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; any other annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _describe_member(kind: Any) -> str:
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
