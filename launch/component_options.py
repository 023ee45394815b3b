"""Options of the components, checked before TorchX answers a wrong one with a page of usage."""

import inspect
import re
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from shardrec.pipeline.config import unknown_name

__all__ = ["check_component_options", "check_layout"]


def check_layout(j: str) -> str:
    """The value of ``-j``, when it is nodes and workers on each.

    Raises:
        ValueError: it is something else, or nobody would work.

    Example:
        >>> check_layout("4x8")
        '4x8'
    """
    if not re.fullmatch(r"0*[1-9]\d*x0*[1-9]\d*", j):
        raise ValueError(
            f"-j must be NODESxWORKERS, both 1 or more, got {j!r}; say 1x2 for two workers here"
        )
    return j


def check_component_options(
    component: Callable[..., Any], words: Sequence[str], before: Collection[str]
) -> None:
    """Refuse options that the component does not have, and values that do not fit.

    Args:
        component: a function of ``shardrec.launch.components``.
        words: what stands between its name and ``--``.
        before: options that stand before its name instead.

    Raises:
        ValueError: with near matches, or with what the value must be.
    """
    known, stage = _annotations(component), component.__name__
    for name, value in _pairs(words, known):
        if name in before and name not in known:
            raise ValueError(f"{name} must stand before {stage}, got it behind; move it")
        if name not in known:
            raise ValueError(_unknown(name, known, stage))
        if value is None or value.startswith("--"):
            raise ValueError(f"{name} must be followed by a value, got none; give one")
        if known[name] is int and not re.fullmatch(r"[+-]?\d+", value):
            raise ValueError(f"{name} must be a whole number, got {value!r}; give one")
        kinds = [typing.get_origin(kind) for kind in typing.get_args(known[name])]
        if dict in kinds and "=" not in value:
            raise ValueError(
                f"{name} must be NAME=VALUE,NAME=VALUE…, got {value!r}; say OMP_NUM_THREADS=4"
            )


def _annotations(component: Callable[..., Any]) -> Mapping[str, Any]:
    """The annotation behind each option, spelt as TorchX spells it."""
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


def _unknown(word: str, known: Mapping[str, Any], stage: str) -> str:
    belongs = f"what `shardrec {stage}` itself takes follows `--`"
    if not word.startswith("-"):
        return f"arguments must follow an option, got {word!r}; {belongs}"
    return f"{unknown_name(f'option of {stage}', word, list(known))} ({belongs})"
