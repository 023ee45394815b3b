"""Products of matrices, on a CPU by the library that is faster there."""

import torch
from torch import Tensor

__all__ = ["times_transposed"]

_OPERATOR = "_linear_pointwise"  # not documented, so it may be gone one day


def times_transposed(left: Tensor, right: Tensor) -> Tensor:
    """(n, m) ``left @ right.T``; either may be a view of a transposed matrix.

    On a CPU float32 goes to oneDNN, whose kernels use all of a core's vector width on any
    processor. Those behind ``torch.mm`` use half of it on AMD: 205 against 385 to 440 GFLOP/s on
    two cores (Zen 5), same bits. ``torch.backends.mkldnn.flags(enabled=False)`` turns oneDNN off.

    Args:
        left: (n, k) float.
        right: (m, k) of the same dtype.

    >>> times_transposed(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
    tensor([[11., 17.]])
    """
    if _serves(left) and left.numel() and right.numel():
        return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return left @ right.T


def _serves(matrix: Tensor) -> bool:
    is_float = matrix.device.type == "cpu" and matrix.dtype == torch.float32
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    is_available = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return is_float and known and is_available
