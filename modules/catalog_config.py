"""Options of the item table, and the size of each optimizer's state; does not import TorchRec."""

import difflib
from dataclasses import dataclass

from shardrec.modules.option_checks import (
    require_above_zero,
    require_at_least,
    require_betas,
    require_choice,
    require_within,
)

__all__ = ["OPTIMIZERS", "CatalogConfig", "check_shape", "rows_at_once", "state_floats"]

OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad", "adam", "sparse_adam")
MIN_RANGE, CPU_RANGE, GPU_RANGE_BYTES = 1_024, 4_096, 256 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class CatalogConfig:
    """Initialization and optimizer of the item table.

    Attributes:
        optimizer: "rowwise_adagrad" (one number of state per row; for more than a million items),
            "adagrad", "sgd", "adam" (exact: every row, every step) or "sparse_adam" (updates rows
            and moments only where there is a gradient).
        learning_rate: learning rate of the table, unless ``Catalog.step`` is given another.
        eps: constant added to the square root of the second moment in the update's denominator.
        betas: decay rates of the two moments of adam and sparse_adam.
        init_std: standard deviation of the normal distribution of the initial rows.
        attributes: "none" learns a vector for each item; "add" adds vectors of the item's
            attributes (`prepare --item-attributes`) to it, and items without training events have
            only these; "only" uses attribute vectors alone. The encoder's optimizer updates the
            attribute vectors.
        id_dropout: with attributes "add", share of the items whose own vector is left out of a
            training step, so that the attributes learn to work alone.
    """

    optimizer: str = "rowwise_adagrad"
    learning_rate: float = 0.01
    eps: float = 1e-8
    betas: tuple[float, float] = (0.9, 0.999)
    init_std: float = 0.02
    attributes: str = "none"
    id_dropout: float = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError for an option that would fail later or have no effect."""
        if self.optimizer not in OPTIMIZERS:
            near = difflib.get_close_matches(self.optimizer, OPTIMIZERS) or OPTIMIZERS
            raise ValueError(
                f"catalog.optimizer must be one of {', '.join(OPTIMIZERS)}, got "
                f"{self.optimizer!r}; did you mean {' or '.join(near)}?"
            )
        for name in ("learning_rate", "init_std"):
            require_at_least(f"catalog.{name}", getattr(self, name), 0, "give e.g. 0.01")
            require_within(f"catalog.{name}", getattr(self, name), 0, 1e30, "give e.g. 0.01")
        # With eps = 0, a gradient of 0 would give 0 / 0.
        require_above_zero("catalog.eps", self.eps, "give e.g. 1e-8")
        require_betas("catalog.betas", self.betas)
        require_choice("catalog.attributes", self.attributes, ("none", "add", "only"))
        if self.id_dropout and self.attributes != "add":
            raise ValueError(
                f"catalog.id_dropout must be 0 with catalog.attributes={self.attributes}, got "
                f"{self.id_dropout}; set catalog.attributes=add"
            )
        require_within("catalog.id_dropout", self.id_dropout, 0, 0.99, "give e.g. 0.1")


def rows_at_once(num_rows: int, width: int, device: str) -> int:
    """Rows that are updated at a time: 1 % of a shard on a CPU, 256 MiB of them on a GPU.

    On a CPU larger ranges do not fit in the cache: 65,536 rows of 64 floats took twice the time per
    row of 2,048 rows. On a GPU every range costs a few dozen calls, whatever its size.

    >>> [rows_at_once(num_rows, 4, "cpu") for num_rows in (10, 200_000, 1_000_000)]
    [1024, 2000, 4096]
    >>> rows_at_once(10_000_000, 256, "cuda")
    262144
    """
    if device == "cuda":
        return max(MIN_RANGE, GPU_RANGE_BYTES // (4 * width))
    return max(MIN_RANGE, min(CPU_RANGE, num_rows // 100))


def state_floats(optimizer: str, width: int) -> int:
    """Number of floats of optimizer state per row.

    >>> [state_floats(name, 64) for name in ("sgd", "rowwise_adagrad", "adagrad", "adam")]
    [0, 1, 64, 128]
    """
    known = {"sgd": 0, "rowwise_adagrad": 1, "adagrad": width}
    return known.get(optimizer, 2 * width)  # adam and sparse_adam have two moments


def check_shape(num_items: int, width: int) -> None:
    """Raise ValueError unless there are items, and ``width`` is a multiple of 4.

    Raises:
        ValueError: one of them is not.
    """
    if num_items < 1:
        raise ValueError(f"num_items must be at least 1, got {num_items}; is the item list empty?")
    if width < 4 or width % 4:
        raise ValueError(
            f"width must be a positive multiple of 4, got {width}; use {-(-max(width, 1) // 4) * 4}"
        )
