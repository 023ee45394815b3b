"""The arguments that all losses share, as a caller gives them and as an operator takes them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shardrec.kernels.loss.candidates import Candidates, Shape
from shardrec.kernels.loss.inputs import Scaling
from shardrec.kernels.loss.passes import FETCH_NAMES
from shardrec.kernels.ranks.communicator import find_group
from shardrec.kernels.shard import RowShard

__all__ = ["SCHEMA_TYPES", "Common", "OperatorOptions", "autocast_dtype"]

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
class Common:
    """The arguments that all losses have.

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
class OperatorOptions:
    """The arguments of every operator that are not tensors, in the order of its schema."""

    first_row: int
    num_rows: int
    group: str  # name of the process group; "" is a single process
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

    def copies_rows(self, rows: Tensor) -> bool:
        """Whether a copy of the rows in use saves anything.

        Not where the dense gradient of float32 rows takes what is added to it.
        """
        as_they_are = rows.dtype == torch.float32 and self.dtype in (None, torch.float32)
        return bool(self.group) or self.sparse_grad or self.normalize or not as_they_are

    def saved_names(self, candidates: Candidates, rows: Tensor) -> list[str]:
        """Names of the tensors that ``passes.forward`` saves for backward, in the order of outputs.

        "slope" is the derivative of the loss with respect to each position's margin, "winner" the
        slot of each position, "sizes" of the layout, "used" the rows in use, "used_rows" a copy.
        """
        num_choices = len(candidates.choice_shapes(1, 1))
        few = candidates.uses_few_rows and self.copies_rows(rows)
        return [
            "slope",
            "logsumexp",
            *(["winner"] if candidates.has_several_slots else []),
            *(["sizes"] if self.group else []),
            *(f"choice{index}" for index in range(num_choices)),
            *(["used", "used_rows"] if few else []),
            *([*FETCH_NAMES, "fetched_rows"] if few and self.group else []),
        ]

    def fake_saved(self, candidates: Candidates, states: Tensor, rows: Tensor) -> list[Tensor]:
        """What a compiler knows of the saved tensors; a size that it cannot know is dynamic."""
        (num_positions, width), num_rows = states.shape, rows.shape[0]
        unknown = torch.library.get_ctx().new_dynamic_size
        num_slots: int | torch.SymInt = num_positions
        if candidates.has_several_slots:
            num_slots = unknown() if self.group else candidates.num_slots(num_positions, num_rows)
        shapes: dict[str, tuple[Shape, torch.dtype]] = {
            "slope": ((num_positions,), torch.float32),
            "logsumexp": ((num_slots,), torch.float32),
        }
        sizes = (1, 1) if self.group else (num_positions, num_rows)
        for index, (shape, dtype) in enumerate(candidates.choice_shapes(*sizes)):
            known = tuple(unknown() for _ in shape) if self.group else shape
            shapes[f"choice{index}"] = known, dtype
        saved = []
        for name in self.saved_names(candidates, rows):
            if name not in shapes:
                shapes[name] = self._index_shape(name, num_positions, width, rows.dtype)
            shape, dtype = shapes[name]
            device = "cpu" if name in ("sizes", "counts") else states.device
            saved.append(torch.empty(shape, dtype=dtype, device=device))
        return saved

    def _index_shape(
        self, name: str, num_positions: int, width: int, dtype: torch.dtype
    ) -> tuple[Shape, torch.dtype]:
        """Shape and dtype of a saved tensor that is the same for all losses."""
        unknown = torch.library.get_ctx().new_dynamic_size
        if name == "winner":
            return (num_positions,), torch.int64
        if name in ("sizes", "counts"):
            size = find_group(self.group).size()
            return (size, 2) if name == "sizes" else (2, size), torch.int64
        if name in ("used_rows", "fetched_rows"):
            return (unknown(), width), dtype
        return (unknown(),), torch.int64


def autocast_dtype(states: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks products of these states to have; None where it is off."""
    device = states.device.type
    if not torch.is_autocast_enabled(device) or states.dtype is torch.float64:
        return None
    return torch.get_autocast_dtype(device)
