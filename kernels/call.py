"""How a loss is called: the arguments that all losses have, as given and as operators take them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shardrec.kernels.loss.candidates import Candidates, Shape
from shardrec.kernels.loss.inputs import Scaling
from shardrec.kernels.loss.passes import kept_shapes
from shardrec.kernels.ranks.communicator import find_group
from shardrec.kernels.shard import RowShard

__all__ = ["SCHEMA_TYPES", "Call", "Options", "autocast_dtype"]

SCHEMA_TYPES = {
    int: "SymInt",
    int | None: "SymInt?",
    float: "float",
    bool: "bool",
    str: "str",
    list[int]: "SymInt[]",
    torch.dtype | None: "ScalarType?",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """How a loss is called: the arguments that all of them have.

    Attributes:
        weights: (N,) float factors of the positions' losses, or None.
        reduction: "mean", "sum" or "none".
        normalize: Take states and rows at unit length.
        temperature: Divides the logits.
        backend: "auto", "torch" or "triton".
        sparse_grad: Give the table a sparse gradient.
    """

    weights: Tensor | None
    reduction: str
    normalize: bool
    temperature: float
    backend: str
    sparse_grad: bool = False


@dataclass(frozen=True, slots=True)
class Options:
    """The arguments of every operator that are not tensors."""

    first_row: int
    num_rows: int
    group: str  # "" is one process
    reduction: str
    normalize: bool
    temperature: float
    backend: str
    sparse_grad: bool
    dtype: torch.dtype | None  # of products, where it is not that of the inputs
    gradient: str

    def shard(self, rows: Tensor) -> RowShard:
        """The table of which these are the rows."""
        group = find_group(self.group) if self.group else None
        return RowShard(rows, self.first_row, self.num_rows, group)

    @property
    def scaling(self) -> Scaling:
        """What happens to states and rows before products."""
        return Scaling(self.normalize, self.temperature, self.dtype)

    def kept_shapes(
        self, candidates: Candidates, rows: Tensor
    ) -> dict[str, tuple[Shape, torch.dtype]]:
        """Names, shapes and dtypes of what a forward pass keeps."""
        copies_rows = self.copies_rows(rows)
        return kept_shapes(
            candidates, rows.dtype, has_group=bool(self.group), copies_rows=copies_rows
        )

    def copies_rows(self, rows: Tensor) -> bool:
        """Whether a copy of the touched rows saves anything.

        Not where a dense gradient of rows as they are takes what is added to it.
        """
        as_they_are = rows.dtype == torch.float32 and self.dtype in (None, torch.float32)
        return bool(self.group) or self.sparse_grad or self.normalize or not as_they_are


def autocast_dtype(states: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks products of these states to have; None where it is off."""
    device = states.device.type
    if not torch.is_autocast_enabled(device) or states.dtype is torch.float64:
        return None
    return torch.get_autocast_dtype(device)
