"""Options of ``shardrec demo``, checked."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from shardrec.pipeline.config import unknown_name

__all__ = ["COLUMNS", "LOSSES", "DemoConfig"]

LOSSES = ("cce", "cce_minus", "sce", "rece")
COLUMNS = ("user_column", "item_column", "time_column")
SIZES = ("users", "items", "size")


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Options of ``demo``.

    Attributes:
        events: your log: Parquet file, folder, glob, or URI that pyarrow opens; none generates one.
        output: folder to write; an earlier demo in it is replaced, anything else is refused.
        user_column, item_column, time_column: names in your log.
        losses: which are trained, in this order.
        steps: optimizer steps of each loss.
        workers: processes that share the catalog.
        recipe: what each run starts from.
        users, items, size: of the generated log; size is its number of events. About a third
            of the items occur in it.
        seed: of the generated log and of the training.
    """

    events: str | None = None
    output: str = "demo"
    user_column: str = "user_id"
    item_column: str = "item_id"
    time_column: str = "timestamp"
    losses: tuple[str, ...] = LOSSES
    steps: int = 400
    workers: int = 2
    recipe: str = "demo"
    users: int = 30_000
    items: int = 150_000
    size: int = 600_000
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what trains nothing, and options that would be ignored."""
        for loss in self.losses:
            if loss not in LOSSES:
                raise ValueError(unknown_name("losses", loss, list(LOSSES)))
        if not self.losses or len(set(self.losses)) < len(self.losses):
            got = ",".join(self.losses) or "none"
            raise ValueError(f"losses must be named once each, got {got}; say {','.join(LOSSES)}")
        for name in ("steps", "workers"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}; raise it")

        of_no_use, why = (COLUMNS, "with") if self.events is None else (SIZES, "without")
        for name in of_no_use:
            if getattr(self, name) != self.default(name):
                raise ValueError(
                    f"{name} must come {why} events, got {getattr(self, name)!r}; drop it"
                )

    def default(self, name: str) -> Any:
        """The value of a field that nobody has set."""
        return next(field.default for field in fields(self) if field.name == name)

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return Path(self.output)
