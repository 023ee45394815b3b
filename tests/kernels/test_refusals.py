"""What the losses refuse, all of them alike: wrong tensors, and options that mean nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.every_loss import loss_of
from tests.loss_entry import Refusal
from tests.losses import LOSSES
from torch import Tensor

from shardrec.kernels.shard import RowShard

# Two positions with targets 0 and 29 in a table of (30, 4), but for:
REFUSED: list[Refusal] = [
    ({"targets": torch.tensor([0, 30])}, ValueError, r"targets must be in \[0, 30\), got 0..30"),
    ({"targets": torch.tensor([-1, 3])}, ValueError, "got -1..3"),
    ({"table": torch.zeros(0, 4)}, ValueError, r"targets must be in \[0, 0\)"),
    ({"targets": torch.zeros(2)}, TypeError, "targets must be int64 or int32, got torch.float32"),
    (
        {"targets": torch.zeros(2).bool()},
        TypeError,
        "targets must be int64 or int32, got torch.bool",
    ),
    (
        {"targets": torch.zeros(2).short()},
        TypeError,
        "targets must be int64 or int32, got torch.int16",
    ),
    ({"targets": torch.zeros(3).long()}, ValueError, r"targets must have shape \(2,\)"),
    ({"targets": torch.zeros(2, 1).long()}, ValueError, r"targets must have shape \(2,\)"),
    ({"states": torch.zeros(2, 5)}, ValueError, r"states and table must be \(N, D\)"),
    ({"states": torch.zeros(4)}, ValueError, r"states and table must be \(N, D\)"),
    ({"states": torch.zeros(1, 2, 4)}, ValueError, r"states and table must be \(N, D\)"),
    ({"table": torch.zeros(4)}, ValueError, r"states and table must be \(N, D\)"),
    ({"states": torch.zeros(2, 4).half()}, TypeError, "must share one float dtype"),
    ({"table": torch.zeros(30, 4).double()}, TypeError, "must share one float dtype"),
    (
        {"states": torch.zeros(2, 4).long(), "table": torch.zeros(30, 4).long()},
        TypeError,
        "must share one float dtype",
    ),
    ({"weights": torch.tensor([1.0, -1.0])}, ValueError, "finite and not negative, got -1.0"),
    ({"weights": torch.tensor([1.0, math.nan])}, ValueError, "finite and not negative, got nan"),
    ({"weights": torch.tensor([1.0, math.inf])}, ValueError, "finite and not negative, got inf"),
    ({"weights": torch.ones(3)}, ValueError, r"weights must have shape \(2,\), got \(3,\)"),
    ({"weights": torch.ones(2, 1)}, ValueError, r"weights must have shape \(2,\), got \(2, 1\)"),
    ({"reduction": "avg"}, ValueError, "reduction must be one of"),
    ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
    ({"temperature": -1.0}, ValueError, "temperature must be positive, got -1.0"),
    ({"temperature": math.nan}, ValueError, "temperature must be positive, got nan"),
    ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ({"table": RowShard(torch.zeros(30, 4), 0, 31)}, ValueError, "hold rows 0:31, got 30 rows"),
    ({"table": RowShard(torch.zeros(20, 4), 10, 30)}, ValueError, "got 20 rows from 10 on"),
]
CASES = [
    (name, *case)
    for name, loss in LOSSES.items()
    for case in [*REFUSED, *loss.refused]
    if loss.is_operator or "backend" not in case[0]
]


def computed(name: str, change: dict[str, Any]) -> Tensor:
    right = {"states": torch.zeros(2, 4), "table": torch.zeros(30, 4)}
    return loss_of(name, **{**right, "targets": torch.tensor([0, 29]), **change})


@pytest.mark.parametrize(("name", "change", "error", "message"), CASES)
def test_bad_input_is_refused(
    name: str, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        computed(name, change)


@pytest.mark.parametrize("name", LOSSES)
def test_the_same_without_the_mistake_is_taken(name: str) -> None:
    assert computed(name, {}).isfinite()
