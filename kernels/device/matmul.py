"""Products of matrices, on a CPU by the library that is faster there."""

import torch
from torch import Tensor

__all__ = ["STEP", "times_transposed"]

# Multiples of it are sizes that recur.
STEP = 64


def times_transposed(left: Tensor, right: Tensor, *, recurring: bool = False) -> Tensor:
    """(n, m) ``left @ right.T``; either may be a view of a transposed matrix.

    On a CPU float32 goes to oneDNN, whose kernels use all of a core's vector width on any
    processor. Those behind ``torch.mm`` use half of it on AMD: 205 against 385 to 440 GFLOP/s on
    two cores (Zen 5), same bits. ``torch.backends.mkldnn.flags(enabled=False)`` turns oneDNN off.
    It keeps 0.6 MB for every shape that it has met, so only products of sizes that recur go to it:
    with any sizes a run whose batches differ in length grew by 0.4 GiB.

    Args:
        left: (n, k) float.
        right: (m, k) of the same dtype.
        recurring: Whether few sizes will be asked for. False takes multiples of 64 for such.

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
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise")  # not documented: may be gone one day
    is_available = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return is_float and known and is_available
