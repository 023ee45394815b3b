"""Command-line options made from the stages' own config dataclasses: nothing is said twice."""

import argparse
import dataclasses
import itertools
import math
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import docstring_parser

from shardrec.pipeline.config import parse, unknown_name

Config = TypeVar("Config")

# An option as it is typed; numbers below zero and texts with spaces are values.
_OPTION = re.compile(r"--?[A-Za-z][\w.-]*")
# What argparse says, and how we say it.
_OUR_WORDS = (
    (r"(?=\1 )", ""),
    (r"invalid choice: (.+) \(choose from (.*)\)", r"\1 must be one of \3, got \2; choose one"),
    (r"expected one argument", r"\1 must be followed by a value, got none; give one"),
    (r"not allowed with argument (\S+)", r"\1 must come without \2, got both; drop one"),
    (r"invalid int value: (.+)", r"\1 must be a whole number, got \2; give one"),
    (r"invalid float value: (.+)", r"\1 must be a number, got \2; give one"),
)


class Parser(argparse.ArgumentParser):
    """An argument parser that answers bad input in one line, with near matches, and exit code 2."""

    def __init__(self, name: str, description: str, epilog: str = "") -> None:
        """Make a parser for ``shardrec <name>``."""
        super().__init__(
            prog=f"shardrec {name}".strip(),
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The options, wherever they stand among the positional arguments; exits with 2 if bad."""
        self._refuse_misspelt(arguments)  # before a required option is missed for it
        namespace, unknown = self.parse_known_intermixed_args(list(arguments))
        if unknown:
            self.refuse(unknown)
        return namespace

    def names(self) -> list[str]:
        """The options, short ones included."""
        return list(self._option_string_actions)

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Say in one line what is wrong with words that belong to no option; exits with 2."""
        known = [name for name in self.names() if name.startswith("--")]
        options = [word for word in unknown if word.startswith("-")]
        if not options:
            self.error(f"arguments must follow an option, got {unknown[0]!r}; see --help")
        self.error(unknown_name("option", options[0].partition("=")[0], known))

    def error(self, message: str) -> NoReturn:
        """Say ``message`` in one line and exit with 2."""
        for theirs, ours in _OUR_WORDS:
            message = re.sub(rf"^argument (\S+): {theirs}", ours, message)
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)

    def _refuse_misspelt(self, arguments: Sequence[str]) -> None:
        words = itertools.takewhile(lambda word: word != "--", arguments)
        names = [word.partition("=")[0] for word in words]
        known = self.names()
        unknown = [name for name in names if _OPTION.fullmatch(name) and name not in known]
        if unknown:
            self.refuse(unknown)


def add_options(parser: argparse.ArgumentParser, cls: type[Any]) -> None:
    """One option for each leaf of ``cls``, with its documentation and its default.

    Args:
        parser: gets an option ``--leaf-name``, or ``--part.leaf-name`` for a nested dataclass.
        cls: a dataclass; its docstring's ``Attributes`` (or ``Args``) give the help.
    """
    for leaf in _leaves(cls):
        parser.add_argument(leaf.option, **leaf.keywords())


def add_timeout(parser: argparse.ArgumentParser) -> None:
    """``--timeout``, for stages that several workers run together."""
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=600.0,
        metavar="SECONDS",
        help="how long workers wait for one that does not come, before they say which it is and "
        "end (default: 600)",
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(
            f"--timeout must be a number above 0, got {text!r}; give seconds"
        )
    return seconds


def read_options(cls: type[Config], namespace: argparse.Namespace) -> Config:
    """The ``cls`` that the options spell.

    Raises:
        ValueError: the config refuses its values.
    """
    return _build(cls, vars(namespace), "")


@dataclasses.dataclass(frozen=True, slots=True)
class _Leaf:
    name: str
    annotation: Any
    default: Any
    description: str

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    def keywords(self) -> dict[str, Any]:
        """What ``add_argument`` wants to know."""
        required = self.default is dataclasses.MISSING
        text = self.description.replace("%", "%%")
        if not required:
            text = f"{text} (default: {_spell(self.default)})".strip()
        common = {"dest": self.name, "help": text, "required": required}
        if not required:
            common["default"] = self.default
        if self.annotation is bool:
            return common | {"action": argparse.BooleanOptionalAction}
        return common | {"type": self._read, "metavar": _metavar(self.annotation)}

    def _read(self, text: str) -> Any:
        try:
            return parse(self.annotation, text, self.option)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None


def _leaves(cls: type[Any], prefix: str = "") -> Iterator[_Leaf]:
    annotations = typing.get_type_hints(cls)
    descriptions = _descriptions(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        annotation = annotations[field.name]
        if dataclasses.is_dataclass(annotation):
            yield from _leaves(typing.cast(type[Any], annotation), f"{prefix}{field.name}.")
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        name, description = prefix + field.name, descriptions.get(field.name, "")
        yield _Leaf(name, annotation, default, description)


def _build(cls: type[Config], values: dict[str, Any], prefix: str) -> Config:
    annotations = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        name, annotation = prefix + field.name, annotations[field.name]
        if field.init and dataclasses.is_dataclass(annotation):
            part = typing.cast(type[Any], annotation)
            arguments[field.name] = _build(part, values, f"{name}.")
        elif field.init:
            arguments[field.name] = values[name]
    return cls(**arguments)


def _descriptions(cls: type[Any]) -> dict[str, str]:
    """What the docstring says of each field; one entry may name several, with commas."""
    documented = docstring_parser.parse(cls.__doc__ or "", docstring_parser.Style.GOOGLE)
    return {
        name.strip(): " ".join((parameter.description or "").split()).replace("``", "")
        for parameter in documented.params
        for name in parameter.arg_name.split(",")
    }


def _spell(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "nothing"
    return "none" if value is None else str(value)


def _metavar(annotation: Any) -> str:
    """How the help names a value of this type.

    Example:
        >>> _metavar(int | None), _metavar(typing.Literal["a", "b"]), _metavar(tuple[str, ...])
        ('INT', '{a,b}', 'STR,STR,…')
    """
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        return "|".join(_metavar(kind) for kind in members)
    if typing.get_origin(annotation) is typing.Literal:
        return "{" + ",".join(map(str, typing.get_args(annotation))) + "}"
    if typing.get_origin(annotation) is tuple:
        items = [_metavar(kind) for kind in typing.get_args(annotation) if kind is not Ellipsis]
        return (
            ",".join(items * 2 + ["…"])
            if Ellipsis in typing.get_args(annotation)
            else ",".join(items)
        )
    return str(getattr(annotation, "__name__", annotation)).upper()
