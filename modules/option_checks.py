"""Check options and raise ValueError in a uniform wording; NaN is never in range."""

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
    """Raises ValueError if ``value`` is below ``least`` or not finite; None passes.

    Args:
        name: Dotted name of the option.
        value: Value of the option.
        least: Lower limit.
        remedy: What to do, for the end of the message.

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
    """Raises ValueError if ``value`` is not positive or not finite; None passes.

    Raises:
        ValueError: The number is out of range.
    """
    if value is not None and not 0 < value < math.inf:
        rule = "finite" if value == math.inf else "above 0"
        raise ValueError(f"{name} must be {rule}, got {value}; {remedy}")


def require_within(name: str, value: float, low: float, high: float, remedy: str) -> None:
    """Raises ValueError if ``value`` is outside [low, high].

    Raises:
        ValueError: The number is out of range.
    """
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}; {remedy}")


def require_betas(name: str, betas: Sequence[float]) -> None:
    """Raises ValueError unless ``betas`` are two numbers in [0, 1), as Adam requires.

    Raises:
        ValueError: There are not two numbers, or one is outside [0, 1).
    """
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(
            f"{name} must be two numbers in [0, 1), got {betas}; give e.g. 0.9 and 0.999"
        )


def require_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raises ValueError if ``value`` is not in ``choices``.

    Raises:
        ValueError: The value is not a choice; the message lists them.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}; choose one")
