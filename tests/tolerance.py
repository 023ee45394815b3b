"""How far a result may be from float64 truth beyond what eager code in the same dtype is."""

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def assert_as_close_as_eager(
    ours: Tensor, eager: Tensor, truth: Tensor, slack: float = 0.0
) -> None:
    """Our distance to the float64 truth is at most that of eager code plus a tolerance.

    ``slack`` is added to the tolerance of the dtype; both are relative to the largest true value.
    """
    scale = max(1.0, float(truth.abs().max())) if truth.numel() else 1.0
    tolerance = (TOLERANCE[eager.dtype] + slack) * scale
    our_error = (ours.double() - truth).abs()
    eager_error = (eager.double() - truth).abs().max() if truth.numel() else torch.tensor(0.0)
    assert ours.shape == truth.shape
    assert not our_error.isnan().any()
    assert (our_error <= eager_error + tolerance).all(), (
        f"largest error {float(our_error.max()):.3g}, eager {float(eager_error):.3g}, "
        f"tolerance {tolerance:.3g}"
    )
