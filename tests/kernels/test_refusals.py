"""What the losses refuse, all of them alike: wrong tensors, and options that mean nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from shardrec.kernels import (
    cut_cross_entropy,
    reduced_cross_entropy,
    sampled_cross_entropy,
    scalable_cross_entropy,
)
from shardrec.kernels.negatives import InBatch, Mixture, Popularity, Uniform
from shardrec.kernels.shard import RowShard

LOSSES: dict[str, Callable[..., Any]] = {
    "cce": cut_cross_entropy,
    "cce_minus": partial(sampled_cross_entropy, num_negatives=3, seed=0),
    "sce": partial(scalable_cross_entropy, seed=0),
    "rece": partial(reduced_cross_entropy, seed=0),
}
Case = tuple[dict[str, Any], type[Exception], str]

# Two positions with targets 0 and 29 in a table of (30, 4), but for:
BAD: list[Case] = [
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
# What those that draw have in common; the operators of torch refuse what is no 64-bit integer.
DRAWN: list[Case] = [
    ({"seed": value}, RuntimeError, "for argument 'seed'") for value in (1.5, None, 2**63)
]
DRAWN += [({"step": 0.5}, RuntimeError, "for argument 'step'")]
OWN: dict[str, list[Case]] = {
    "cce": [],
    "cce_minus": [
        *[
            ({name: value}, ValueError, "num_negatives and share must be positive")
            for name in ("num_negatives", "share")
            for value in (0, -1)
        ],
        ({"num_negatives": 1.5}, RuntimeError, "for argument 'num_negatives'"),
        ({"share": 1.5}, RuntimeError, "for argument 'share'"),
        *[
            ({"proposal": proposal}, ValueError, "the 30 items of the table, got one over")
            for proposal in (
                Uniform(31),
                Popularity(torch.ones(29).long()),
                InBatch(torch.tensor([0]), torch.ones(31).long()),
                Mixture([(Uniform(30), 2), (Uniform(31), 1)]),
            )
        ],
        *DRAWN,
    ],
    "sce": [
        *[
            ({name: value}, ValueError, "items_per_bucket must be positive, got .*None takes")
            for name in ("num_buckets", "positions_per_bucket", "items_per_bucket")
            for value in (0, -1)
        ],
        ({"items_per_bucket": None}, RuntimeError, "for argument 'items_per_bucket'"),
        ({"num_buckets": 1.5}, RuntimeError, "for argument 'num_buckets'"),
        ({"mix": "no"}, RuntimeError, "for argument 'mix'"),
        *DRAWN,
    ],
    "rece": [
        *[
            ({name: value}, ValueError, "num_rounds must be positive and num_neighbor_chunks not")
            for name, value in (
                ("num_buckets", 0),
                ("num_buckets", -1),
                ("num_chunks", 0),
                ("num_chunks", -1),
                ("num_rounds", 0),
                ("num_rounds", -1),
                ("num_neighbor_chunks", -1),
            )
        ],
        ({"num_rounds": 1.5}, RuntimeError, "for argument 'num_rounds'"),
        ({"align": "row"}, ValueError, "align must be 'bucket' or 'rank', got 'row'"),
        *DRAWN,
    ],
}
CASES = [(name, *case) for name in LOSSES for case in BAD + OWN[name]]


def inputs(change: dict[str, Any]) -> dict[str, Any]:
    right = {"states": torch.zeros(2, 4), "table": torch.zeros(30, 4)}
    return {**right, "targets": torch.tensor([0, 29]), **change}


@pytest.mark.parametrize(("name", "change", "error", "message"), CASES)
def test_bad_input_is_refused(
    name: str, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        LOSSES[name](**inputs(change))


@pytest.mark.parametrize("name", LOSSES)
def test_the_same_without_the_mistake_is_taken(name: str) -> None:
    assert LOSSES[name](**inputs({})).isfinite()
