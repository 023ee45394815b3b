"""What a plan is made for: the ranks and their memory, and the attributes of the items."""

from dataclasses import dataclass

from shardrec.modules.catalog_config import CatalogConfig
from shardrec.modules.option_checks import require_at_least

__all__ = ["AttributeCounts", "Machine"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The ranks that share a run, and the memory of each.

    Attributes:
        ranks: W, workers of the job; ``parallel.shards`` of the config divides them into replicas.
        memory_gb: of each rank, in 10**9 bytes; none: no largest catalog is computed.
        device: "cpu" or "cuda".
        filled: mean length of the sequences of a batch, as a share of ``encoder.max_length``.
        libraries_gb: memory of a process or a CUDA context before the model is built, in 10**9
            bytes.
        neighbors: option of `memorize`, if its memory is used in ranking; 0: no memory.
    """

    ranks: int = 1
    memory_gb: float | None = None
    device: str = "cpu"
    filled: float = 1.0
    libraries_gb: float = 0.6
    neighbors: int = 0

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.ranks < 1:
            raise ValueError(f"ranks must be at least 1, got {self.ranks}; count the workers")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {self.device!r}; choose one")
        if not 0 < self.filled <= 1:
            raise ValueError(f"filled must be in (0, 1], got {self.filled}; 1 is full length")
        if self.memory_gb is not None and not self.memory_gb > 0:
            raise ValueError(f"memory_gb must be above 0, got {self.memory_gb}; or none")
        if self.neighbors < 0:
            raise ValueError(f"neighbors must be at least 0, got {self.neighbors}; 0 is none")


@dataclass(frozen=True, kw_only=True, slots=True)
class AttributeCounts:
    """The attributes of the items, for catalog.attributes=add or only.

    Attributes:
        attribute_values: number of distinct values in all columns; `prepare` prints it.
        attribute_codes: average number of values of an item: one per column of single values, plus
            the lengths of its lists.
        attribute_numbers: total length of an item's vectors.
    """

    attribute_values: int = 0
    attribute_codes: float = 0.0
    attribute_numbers: int = 0

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name in ("attribute_values", "attribute_codes", "attribute_numbers"):
            require_at_least(name, getattr(self, name), 0)

    def check(self, config: CatalogConfig) -> None:
        """Raise ValueError unless attributes are given exactly if the config uses them.

        Raises:
            ValueError: they are needed but not given, or given but not used.
        """
        there = bool(self.attribute_values or self.attribute_numbers)
        if there != (config.attributes != "none"):
            raise ValueError(
                "attribute_values or attribute_numbers must be above 0 where attributes are used, "
                f"and only there, got {self.attribute_values} and {self.attribute_numbers} with "
                f"catalog.attributes={config.attributes}; give the sizes, or change that option"
            )
