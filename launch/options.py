"""Command-line options made from the config dataclasses of the stages."""

import argparse
import dataclasses
import itertools
import math
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from shardrec.launch.described import descriptions
from shardrec.launch.stages import COMMANDS
from shardrec.pipeline.config import parse, type_names
from shardrec.pipeline.near_names import unknown_name, usual_names

__all__ = [
    "Parser",
    "add_options",
    "add_timeout",
    "parser_for",
    "read_options",
    "require_set_once",
]

Config = TypeVar("Config")

# An option as it is typed; negative numbers and texts with spaces are values.
_OPTION = re.compile(r"--?[A-Za-z][\w.-]*")
# The messages of argparse, and our wording of them.
_OUR_WORDS = (
    (r"(?=\1 )", ""),
    (r"invalid choice: (.+) \(choose from (.*)\)", r"\1 must be one of \3, got \2; choose one"),
    (r"expected one argument", r"\1 must be followed by a value, got none; give one"),
    (r"not allowed with argument (\S+)", r"\1 must come without \2, got both; remove one"),
    (r"invalid int value: (.+)", r"\1 must be a whole number, got \2; give one"),
    (r"invalid float value: (.+)", r"\1 must be a number, got \2; give one"),
)


class Parser(argparse.ArgumentParser):
    """An argument parser that reports wrong input in one line, with similar names; exits with 2."""

    def __init__(self, name: str, description: str, epilog: str = "") -> None:
        """Make a parser for ``shardrec <name>``."""
        super().__init__(
            prog=f"shardrec {name}".strip(),
            description=textwrap.fill(description, 100),
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.dotted: list[str] = []  # names of options that are set as name=value

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The options, before or after positional arguments; exits with 2 if one is wrong."""
        self._refuse_misspelt(arguments)  # else a required option is reported as missing
        namespace, unknown = self.parse_known_intermixed_args(list(arguments))
        if unknown:
            self.refuse(unknown)
        return namespace

    def names(self) -> list[str]:
        """The names of all options, including short ones."""
        return list(self._option_string_actions)

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Report, in one line, arguments that belong to no option, and exit with 2."""
        known = [name for name in self.names() if name.startswith("--")]
        options = [word for word in unknown if word.startswith("-")]
        if not options:
            hint = "put a glob in quotes" if Path(unknown[0]).exists() else "see --help"
            self.error(f"arguments must follow an option, got {unknown[0]!r}; {hint}")
        name = options[0].partition("=")[0]
        if near := usual_names(name.strip("-"), self.dotted):
            ours = " or ".join(f"{one}=VALUE" for one in near)
            self.error(f"option must be a known name, got {name!r}; set {ours}, without dashes")
        self.error(unknown_name("option", name, known))

    def error(self, message: str) -> NoReturn:
        """Print ``message`` in one line and exit with 2."""
        for argparse_words, ours in _OUR_WORDS:
            message = re.sub(rf"^argument (\S+): {argparse_words}", ours, message)
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)

    def _refuse_misspelt(self, arguments: Sequence[str]) -> None:
        words = itertools.takewhile(lambda word: word != "--", arguments)
        names = [word.partition("=")[0] for word in words]
        known = self.names()
        unknown = [name for name in names if _OPTION.fullmatch(name) and name not in known]
        if unknown:
            self.refuse(unknown)


def parser_for(name: str) -> Parser:
    """The argument parser of a command, with ``--timeout`` if several workers may run it."""
    command = COMMANDS[name]
    parser = Parser(name, command.description, command.epilog)
    if command.kind == "distributed":
        add_timeout(parser)
    return parser


def add_options(parser: argparse.ArgumentParser, cls: type[Any], prefix: str = "") -> None:
    """Add one option for each leaf of ``cls``, with its documentation and its default.

    Args:
        parser: gets an option ``--leaf-name``, or ``--part.leaf-name`` for a nested dataclass.
        cls: a dataclass; its docstring's ``Attributes`` (or ``Args``) give the help.
        prefix: prefix of the names, if ``cls`` is a part of another dataclass.
    """
    annotations, meanings = typing.get_type_hints(cls), descriptions(cls)
    for field in (field for field in dataclasses.fields(cls) if field.init):
        name, annotation = prefix + field.name, annotations[field.name]
        if dataclasses.is_dataclass(annotation):
            add_options(parser, typing.cast(type[Any], annotation), f"{name}.")
            continue
        text = meanings.get(field.name, "").replace("%", "%%").replace("``", "")
        described: dict[str, Any] = {"dest": name, "help": text, "required": True}
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is not dataclasses.MISSING:
            text = f"{text} (default: {_shown(default)})".strip()
            described |= {"help": text, "required": False, "default": default}
        option = "--" + name.replace("_", "-")
        if annotation is bool:
            described["action"] = argparse.BooleanOptionalAction
        else:
            described |= {"type": _reader(annotation, option), "metavar": _metavar(annotation)}
        parser.add_argument(option, **described)


def read_options(cls: type[Config], namespace: argparse.Namespace, prefix: str = "") -> Config:
    """Build ``cls`` from the values of the options that ``add_options`` made.

    Raises:
        ValueError: the config refuses its values.
    """
    annotations, values = typing.get_type_hints(cls), vars(namespace)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        name, annotation = prefix + field.name, annotations[field.name]
        if field.init and dataclasses.is_dataclass(annotation):
            part = typing.cast(type[Any], annotation)
            arguments[field.name] = read_options(part, namespace, f"{name}.")
        elif field.init:
            arguments[field.name] = values[name]
    return cls(**arguments)


def add_timeout(parser: argparse.ArgumentParser) -> None:
    """Add ``--timeout``, for stages that several workers run together."""
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=600.0,
        metavar="SECONDS",
        help="how long workers wait for a missing one before they name it and exit (default: 600)",
    )


def require_set_once(overrides: Sequence[str], given: Mapping[str, str]) -> None:
    """Refuse an option that is set twice, because one of its values would be ignored.

    Args:
        overrides: assignments name=value, as typed.
        given: for each dotted name that another option sets, the text of that option.

    Raises:
        ValueError: a name is set twice.
    """
    words = dict(given)
    for assignment in overrides:
        name = assignment.partition("=")[0].strip()
        if name in words:
            raise ValueError(
                f"{name} must be set once, got {words[name]} and {assignment}; remove one of them"
            )
        words[name] = assignment


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


def _reader(annotation: Any, option: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return parse(annotation, text, option)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "nothing"
    return "none" if value is None else str(value)


def _metavar(annotation: Any) -> str:
    """How the help names a value of this type.

    Example:
        >>> _metavar(int | None), _metavar(typing.Literal["a", "b"]), _metavar(tuple[str, ...])
        ('INT', '{a,b}', 'STR,STR,…')
    """
    names = [name for name in type_names(annotation) if name != "none"]
    if all(name.startswith("'") for name in names):
        return "{" + ",".join(name.strip("'") for name in names) + "}"
    return "|".join(names).upper()
