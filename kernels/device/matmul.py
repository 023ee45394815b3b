"""Matrix products, on a CPU by the faster of two libraries."""

import torch
from torch import Tensor

__all__ = ["STEP", "times_transposed"]

# Sizes that are multiples of it are assumed to recur.
STEP = 64


def times_transposed(left: Tensor, right: Tensor, *, recurring: bool = False) -> Tensor:
    """(n, m) ``left @ right.T``; either may be a view of a transposed matrix.

    On a CPU, float32 products of recurring sizes use oneDNN, which uses the full vector width of
    the core on any processor. ``torch.mm`` uses half of it on AMD: 205 against 385 to 440 GFLOP/s
    on two cores (Zen 5), with the same bits. ``torch.backends.mkldnn.flags(enabled=False)`` turns
    oneDNN off. oneDNN caches 0.6 MB for every shape; with sizes that do not recur, the memory of a
    run with batches of varying length grew by 0.4 GiB.

    Args:
        left: (n, k) float.
        right: (m, k) of the same dtype.
        recurring: True if the caller uses few sizes; False assumes so for multiples of 64.

    >>> times_transposed(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
    tensor([[11., 17.]])
    """
    sizes = (*left.shape, right.shape[0])
    recurring = all(sizes) and (recurring or not any(size % STEP for size in sizes))
    if recurring and _serves(left):
        return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return left @ right.T


def _serves(matrix: Tensor) -> bool:
    is_float = matrix.device.type == "cpu" and matrix.dtype == torch.float32
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise")  # undocumented: may be removed
    is_available = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return is_float and known and is_available
