"""The options that ``tune`` searches, and the values that each may take."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shardrec.pipeline.config import flatten, override
from shardrec.pipeline.run.config import TrainConfig

if TYPE_CHECKING:
    from optuna.trial import Trial

__all__ = ["DEFAULT_SPACE", "Searched", "check_space", "read_space", "starting_point"]

DEFAULT_SPACE = (
    "catalog.learning_rate=3e-4:3e-2:log",
    "optimizer.learning_rate=3e-4:1e-2:log",
    "encoder.width=32,64,128",
    "encoder.dropout=0:0.5",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Searched:
    """One option and its values: a list of choices, or all numbers of a range.

    Attributes:
        name: dotted name of an option of training, such as "encoder.dropout".
        choices: values as they are typed; empty for a range.
        low, high: ends of the range, both included.
        is_log: whether values are drawn evenly on a logarithmic scale.
        is_whole: whether values are whole numbers.
    """

    name: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    is_log: bool = False
    is_whole: bool = False

    def suggest(self, trial: "Trial") -> str:
        """The value that Optuna proposes for a trial, as it is typed."""
        if self.choices:
            return str(trial.suggest_categorical(self.name, self.choices))
        if self.is_whole:
            low, high = int(self.low), int(self.high)
            return str(trial.suggest_int(self.name, low, high, log=self.is_log))
        return self.typed(trial.suggest_float(self.name, self.low, self.high, log=self.is_log))

    def extremes(self) -> tuple[str, ...]:
        """The choices, or both ends of the range, as they are typed."""
        return self.choices or (self.typed(self.low), self.typed(self.high))

    def typed(self, value: float) -> str:
        """A number of the range as text, with six digits."""
        return str(int(value)) if self.is_whole else f"{value:.6g}"

    def holds(self, value: Any) -> bool:
        """Whether ``value``, of a config, is one of the choices or in the range."""
        if self.choices:
            return str(value).lower() in self.choices
        return isinstance(value, (int, float)) and self.low <= value <= self.high


def read_space(words: Sequence[str]) -> list[Searched]:
    """The space written as ``name=low:high``, ``name=low:high:log`` or ``name=a,b,c``.

    A range with whole ends has whole values.

    Raises:
        ValueError: one is written otherwise, or a name is there twice.

    Example:
        >>> read_space(["encoder.num_blocks=1:4", "loss=cce,sce"])[0].is_whole
        True
    """
    space = [_read(word) for word in words]
    names = [searched.name for searched in space]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"search must name each option once, got {name} twice; remove one")
    if not space:
        raise ValueError("search must name an option, got none; add encoder.dropout=0:0.5")
    return space


def check_space(space: Sequence[Searched], base: TrainConfig) -> None:
    """Refuse an option that does not exist, and values that a run could not take.

    Raises:
        ValueError: the message of the config for the first such value.
    """
    for searched in space:
        for value in searched.extremes():
            override(base, [f"{searched.name}={value}"])


def starting_point(space: Sequence[Searched], base: TrainConfig) -> dict[str, Any]:
    """The values of ``base`` that lie in the space: the first trial is the recipe itself."""
    found = {}
    values = dict(flatten(base))
    for searched in space:
        value = values.get(searched.name)
        if searched.holds(value):
            found[searched.name] = str(value).lower() if searched.choices else value
    return found


def _read(word: str) -> Searched:
    name, equals, text = word.partition("=")
    if not (name and equals and text):
        raise _misspelt(word)
    if ":" not in text:
        choices = tuple(choice.strip() for choice in text.split(","))
        if len(set(choices)) < 2 or not all(choices):
            raise _misspelt(word)
        return Searched(name=name, choices=choices)
    low_text, high_text, *rest = text.split(":")
    try:
        low, high = float(low_text), float(high_text)
    except ValueError:
        raise _misspelt(word) from None
    is_log = rest == ["log"]
    if (rest and not is_log) or not -math.inf < low < high < math.inf or (is_log and low <= 0):
        raise _misspelt(word)
    is_whole = low_text.strip("-").isdigit() and high_text.isdigit()
    return Searched(name=name, low=low, high=high, is_log=is_log, is_whole=is_whole)


def _misspelt(word: str) -> ValueError:
    return ValueError(
        "search must be name=low:high, name=low:high:log with low above 0, or name=a,b,c, got "
        f"{word!r}; write for example encoder.dropout=0:0.5"
    )
