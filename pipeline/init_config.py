"""Options of a run that starts from an earlier one."""

from dataclasses import dataclass, fields
from typing import Literal

__all__ = ["InitConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class InitConfig:
    """What a run starts from, and what it takes over from there.

    Attributes:
        run: folder of an earlier run; None: random weights.
        checkpoint: which of its weights.
        prepared: the folder that run was trained on, to match items by their ids; None: as the
            prepared folder of this run says, and by ids from the folder the run names otherwise.
        optimizer: "keep" the memory and the step counters of both optimizers, or "reset" them.
        new_rows: vectors of items that the earlier run did not know: "random" as in a new table, or
            the "mean" of those it did know. Their optimizer memory is that of a new table.
    """

    run: str | None = None
    checkpoint: Literal["best", "last"] = "best"
    prepared: str | None = None
    optimizer: Literal["keep", "reset"] = "keep"
    new_rows: Literal["random", "mean"] = "random"

    def __post_init__(self) -> None:
        """Refuse names that mean nothing, and options that do nothing without a run."""
        choices = {
            "checkpoint": ("best", "last"),
            "optimizer": ("keep", "reset"),
            "new_rows": ("random", "mean"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"init_from.{name} must be {' or '.join(known)}, got {getattr(self, name)!r}; "
                    "choose one"
                )
        changed = [
            field.name for field in fields(self) if getattr(self, field.name) != field.default
        ]
        if changed and self.run is None:
            raise ValueError(
                f"init_from.{changed[0]} must come with init_from.run, got none; "
                "name the run to start from"
            )
