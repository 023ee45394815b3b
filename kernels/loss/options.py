"""The arguments that all losses share, for the public functions and for the custom operators."""

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
        weights: (N,) float weight of each position's loss, or None for ones.
        reduction: "mean", "sum" or "none".
        normalize: Scale states and rows to unit L2 norm.
        temperature: Positive; divides the logits.
        backend: "auto", "torch" or "triton".
        sparse_grad: Give the table a sparse COO gradient.
    """

    weights: Tensor | None
    reduction: str
    normalize: bool
    temperature: float
    backend: str
    sparse_grad: bool = False


@dataclass(frozen=True, slots=True)
class OperatorOptions:
    """The non-tensor arguments that all operators share, in the order of their schema."""

    first_row: int
    num_rows: int
    group: str  # name of the process group; "" for a single process
    reduction: str
    normalize: bool
    temperature: float
    backend: str
    sparse_grad: bool
    dtype: torch.dtype | None  # of matrix products; None: the dtype of the inputs
    gradient: str

    def shard(self, rows: Tensor) -> RowShard:
        """The row shard with these (R, D) rows, in the process group named ``group``."""
        group = find_group(self.group) if self.group else None
        return RowShard(rows, self.first_row, self.num_rows, group)

    @property
    def scaling(self) -> Scaling:
        """How states and rows are scaled before the matrix products."""
        return Scaling(self.normalize, self.temperature, self.dtype)

    def copies_rows(self, rows: Tensor) -> bool:
        """Whether the pass works on a copy of the rows in use.

        False for float32 rows with a dense gradient in one process: that gradient is accumulated in
        place.
        """
        as_they_are = rows.dtype == torch.float32 and self.dtype in (None, torch.float32)
        return bool(self.group) or self.sparse_grad or self.normalize or not as_they_are

    def saved_names(self, candidates: Candidates, rows: Tensor) -> list[str]:
        """Names of the tensors that ``passes.forward`` saves for backward, in output order.

        "slope": (N,) dloss/dmargin; "logsumexp": (num_slots,); "winner": (N,) slot with the largest
        loss; "sizes": those of the layout; "choice0" and so on: the results of ``choose``; "used":
        local indices of the rows in use and "used_rows" a copy of these rows; the rest is the plan
        to fetch rows (``FETCH_NAMES``) and the rows fetched.
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
        """Fake saved tensors for tracing; sizes that depend on data or other ranks are dynamic."""
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
    """The autocast dtype for matrix products of these states; None if autocast is off."""
    device = states.device.type
    if not torch.is_autocast_enabled(device) or states.dtype is torch.float64:
        return None
    return torch.get_autocast_dtype(device)
