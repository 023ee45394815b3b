"""Refusals of options that no run can use, in one wording; NaN is in no range."""

import math
from collections.abc import Collection, Sequence

__all__ = [
    "require_above_zero",
    "require_at_least",
    "require_betas",
    "require_choice",
    "require_within",
]


def require_at_least(
    name: str, value: float | None, least: float, remedy: str = "raise it"
) -> None:
    """Refuses a number below ``least``, or one that is not finite; None passes.

    Args:
        name: Dotted name of the option.
        value: As it was given.
        least: The smallest that makes sense.
        remedy: What to do instead.

    Raises:
        ValueError: The number is out of range.

    >>> require_at_least("loss.num_rounds", 0, 1)
    Traceback (most recent call last):
    ...
    ValueError: loss.num_rounds must be at least 1, got 0; raise it
    """
    if value is not None and not least <= value < math.inf:
        rule = "finite" if value == math.inf else f"at least {least}"
        raise ValueError(f"{name} must be {rule}, got {value}; {remedy}")


def require_above_zero(name: str, value: float | None, remedy: str) -> None:
    """Refuses zero, negative numbers and those that are not finite; None passes.

    Raises:
        ValueError: The number is out of range.
    """
    if value is not None and not 0 < value < math.inf:
        rule = "finite" if value == math.inf else "above 0"
        raise ValueError(f"{name} must be {rule}, got {value}; {remedy}")


def require_within(name: str, value: float, low: float, high: float, remedy: str) -> None:
    """Refuses a number outside [low, high].

    Raises:
        ValueError: The number is out of range.
    """
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}; {remedy}")


def require_betas(name: str, betas: Sequence[float]) -> None:
    """Refuses anything but the decays of Adam's two moments.

    Raises:
        ValueError: They are not two, or one is outside [0, 1).
    """
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(
            f"{name} must be two numbers in [0, 1), got {betas}; give e.g. 0.9 and 0.999"
        )


def require_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Refuses a word that is none of ``choices``.

    Raises:
        ValueError: It is none of them.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}; choose one")
