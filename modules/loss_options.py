"""Options of the losses with the rule that each must keep, declared where the option is."""

import dataclasses
from collections.abc import Callable
from typing import Any

from shardrec.modules.option_checks import (
    require_above_zero,
    require_at_least,
    require_choice,
    require_within,
)

__all__ = ["check_options", "option"]


def option(default: Any, **rule: Any) -> Any:
    """A dataclass field with a default and a rule.

    Args:
        default: The default of the field.
        rule: One of ``above_zero="hint"``, ``at_least=number``, ``one_of=(words)`` and
            ``within=(low, high, "hint")``. Whole numbers have no upper bound: a bucket takes at
            most what there is.
    """
    return dataclasses.field(default=default, metadata=rule)


def check_options(loss: Any) -> None:
    """Refuses a loss whose options no batch could be trained with.

    Args:
        loss: An instance of a dataclass whose fields were made by ``option``.

    Raises:
        ValueError: An option breaks its rule; the message names it as ``train`` does.
    """
    checks: dict[str, Callable[[str, Any, Any], None]] = {
        "above_zero": require_above_zero,
        "at_least": require_at_least,
        "one_of": require_choice,
    }
    for field in dataclasses.fields(loss):
        name, value = f"loss.{field.name}", getattr(loss, field.name)
        for rule, bound in field.metadata.items():
            if rule == "within":
                require_within(name, value, *bound)
            else:
                checks[rule](name, value, bound)
