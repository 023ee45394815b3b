"""The registry of losses for tests: one entry in ``LOSSES`` puts a loss into all shared tests.

The definitions are dense and for float64. They choose candidates independently of the package: only
random draws and signs, which have their own tests, come from it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from tests.loss_choices import (
    bucket_centres,
    chunks_in_order,
    negatives,
    ones,
    paired_logits,
    places_by_bucket,
)
from tests.loss_entry import (
    DRAWN,
    LARGE,
    OTHER_CATALOGS,
    REFUSED_DRAWS,
    Choice,
    Compared,
    Entry,
    Workspace,
    each,
)
from torch import Tensor

from shardrec.kernels import (
    cut_cross_entropy,
    hybrid_cross_entropy,
    reduced_cross_entropy,
    sampled_cross_entropy,
    scalable_cross_entropy,
)
from shardrec.kernels.hce import HardAndSampled
from shardrec.kernels.negatives import (
    STREAM_HASH,
    STREAM_MIX,
    random_signs,
)
from shardrec.kernels.rece import HashedChunks, default_num_buckets
from shardrec.kernels.reference import (
    cross_entropy_reference,
    reduced_cross_entropy_reference,
    sampled_cross_entropy_reference,
    scalable_cross_entropy_reference,
)
from shardrec.kernels.sce import HardBuckets
from shardrec.kernels.select.reference import best_direction_reference, topk_rows_reference
from shardrec.modules.baseline_losses import (
    binary_cross_entropy,
    eager_cross_entropy,
    generalized_binary_cross_entropy,
)
from shardrec.modules.losses import BCE, CCE, GBCE, HCE, RECE, SCE, CCEMinus, EagerCE


def cce(states: Tensor, table: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return cross_entropy_reference(states, table, targets), ones(targets)


def cce_minus(
    states: Tensor, table: Tensor, targets: Tensor, *, num_negatives: int, share: int
) -> tuple[Tensor, Tensor]:
    num_items, num_blocks = len(table), -(-len(states) // share)
    drawn = negatives(num_items, torch.arange(len(states)) % num_blocks, num_negatives)
    corrections = torch.full(drawn.shape, num_negatives / num_items).double().log()
    losses = sampled_cross_entropy_reference(states, table, targets, drawn, corrections)
    return losses, ones(targets)


def sce(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    *,
    num_buckets: int,
    positions_per_bucket: int,
    items_per_bucket: int,
) -> tuple[Tensor, Tensor]:
    signs = random_signs(0, len(states), num_buckets, stream=STREAM_MIX, **DRAWN)
    centres = signs.double().T @ states.detach().double()
    positions, items = (
        topk_rows_reference(centres, vectors.detach(), min(size, len(vectors)))[1]
        for vectors, size in ((states, positions_per_bucket), (table, items_per_bucket))
    )
    covered = torch.zeros(len(states), dtype=torch.bool)
    covered[positions.flatten()] = True
    return scalable_cross_entropy_reference(states, table, targets, positions, items), covered


def rece(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    *,
    num_buckets: int,
    num_chunks: int,
    num_rounds: int,
    num_neighbor_chunks: int,
    align: str = "bucket",
) -> tuple[Tensor, Tensor]:
    of_positions, of_items = [], []
    for index in range(num_rounds):
        signs = random_signs(
            0, num_buckets, states.shape[1], stream=STREAM_HASH + index, **DRAWN
        ).double()
        position_buckets, item_buckets = (
            (vectors.detach().double() @ signs.T).argmax(1).tolist() for vectors in (states, table)
        )
        of_items.append(chunks_in_order(item_buckets, num_chunks))
        if align == "rank":
            of_positions.append(chunks_in_order(position_buckets, num_chunks))
        else:
            sizes = [item_buckets.count(bucket) for bucket in range(num_buckets)]
            places = places_by_bucket(position_buckets, sizes)
            of_positions.append([place * num_chunks // len(table) for place in places])
    chunks = torch.tensor(of_positions).T, torch.tensor(of_items).T
    losses = reduced_cross_entropy_reference(states, table, targets, *chunks, num_neighbor_chunks)
    return losses, ones(targets)


def hce(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    *,
    num_buckets: int,
    items_per_bucket: int,
    num_negatives: int,
) -> tuple[Tensor, Tensor]:
    signs = random_signs(0, len(states), num_buckets, stream=STREAM_MIX, **DRAWN)
    centres = signs.double().T @ states.detach().double()
    hard = topk_rows_reference(centres, table.detach(), min(items_per_bucket, len(table)))[1]
    drawn = negatives(len(table), torch.arange(num_buckets), num_negatives)
    is_hard = (drawn[:, :, None] == hard[:, None]).any(2)
    of_drawn = torch.full(drawn.shape, num_negatives / len(table)).double().log()
    corrections = [torch.zeros(hard.shape), of_drawn.masked_fill(is_hard, torch.inf)]
    bucket = best_direction_reference(F.normalize(centres), states.detach())
    candidates, lowered = (torch.cat(both, 1)[bucket] for both in ([hard, drawn], corrections))
    losses = sampled_cross_entropy_reference(states, table, targets, candidates, lowered)
    return losses, ones(targets)


def compared_by_nearest_bucket(
    rule: HardAndSampled, states: Tensor, rows: Tensor
) -> list[Compared]:
    _, ((num_buckets, num_hard), _) = rule.choice_shapes(len(states), len(rows))
    centres = bucket_centres(rule, int(num_buckets), states)
    return [
        Compared(states @ F.normalize(centres).T, 1, is_coarse=False),
        Compared(centres @ rows.T, int(num_hard), is_coarse=True),
    ]


def compared_by_buckets(rule: HardBuckets, states: Tensor, rows: Tensor) -> list[Compared]:
    pairs, _, (items, _) = rule.choice_shapes(len(states), len(rows))
    num_buckets, items_per_bucket = items
    centres = bucket_centres(rule, int(num_buckets), states)
    positions_per_bucket = int(pairs[0][0]) // int(num_buckets)
    return [
        Compared(centres @ states.T, positions_per_bucket, is_coarse=True),
        Compared(centres @ rows.T, int(items_per_bucket), is_coarse=True),
    ]


def compared_by_hashes(rule: HashedChunks, states: Tensor, rows: Tensor) -> list[Compared]:
    vectors, width = torch.cat([states, rows]), states.shape[1]
    draws: dict[str, Any] = {"seed": rule.seed, "step": rule.step}
    num_buckets = rule.num_buckets or default_num_buckets(
        len(states), len(rows), rule.num_neighbor_chunks
    )
    hashes = [
        random_signs(0, num_buckets, width, stream=STREAM_HASH + index, **draws)
        for index in range(rule.num_rounds)
    ]
    return [Compared(vectors @ signs.double().T, 1, is_coarse=False) for signs in hashes]


def bce(
    states: Tensor, table: Tensor, targets: Tensor, *, num_negatives: int
) -> tuple[Tensor, Tensor]:
    positive, negative = paired_logits(states, table, targets, num_negatives)
    return -F.logsigmoid(positive) - F.logsigmoid(-negative).mean(1), ones(targets)


def gbce(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    *,
    num_negatives: int,
    calibration: float = 0.75,
) -> tuple[Tensor, Tensor]:
    """The positive probability to the power ``t (alpha - 1) + 1``."""
    positive, negative = paired_logits(states, table, targets, num_negatives)
    power = calibration * (num_negatives / (len(table) - 1) - 1) + 1
    return -power * F.logsigmoid(positive) - F.logsigmoid(-negative).sum(1), ones(targets)


LOSSES: dict[str, Entry] = {
    "cce": Entry(
        function=cut_cross_entropy,
        config=CCE,
        definition=cce,
        config_variants={"smoothed": {"label_smoothing": 0.2, "normalize": True}},
        has_draws=False,
        in_forward=True,
        refused_options={"label_smoothing": (-0.1, 1.0)},
        workspaces={
            "": Workspace(stored=LARGE[0] * LARGE[1]),
            "streamed": Workspace(stored=LARGE[0] * LARGE[1], reduction="none"),
        },
    ),
    "cce_minus": Entry(
        function=sampled_cross_entropy,
        config=CCEMinus,
        definition=cce_minus,
        options={"num_negatives": 37, "share": 16},
        variants={
            "single": {"num_negatives": 9, "share": 1, "normalize": True},
            "batch": {"num_negatives": 9, "share": None},
        },
        config_variants={
            "popularity": {"num_negatives": 64, "share": 0, "proposal": "popularity"},
            "in_batch": {"num_negatives": 30, "share": 16, "proposal": "in_batch"},
            "mixed": {"num_negatives": 31, "share": 16, "proposal": "mixed"},
            "parity": {"num_negatives": 50, "share": 8, "parity": True},
            "smoothed": {"num_negatives": 40, "share": 8, "label_smoothing": 0.3},
            "mixed_parity": {"num_negatives": 9, "share": 0, "proposal": "mixed", "parity": True},
        },
        has_sparse_grad=True,
        in_forward=True,
        refused=[
            *each("num_negatives share", (0, -1), "num_negatives and share must be positive"),
            *each("num_negatives", (1.5,), "for argument 'num_negatives'", RuntimeError),
            *each("share", (1.5,), "for argument 'share'", RuntimeError),
            *each("proposal", OTHER_CATALOGS, "the 30 items of the table, got one over"),
            *REFUSED_DRAWS,
        ],
        refused_options={
            "num_negatives": (0, -3),
            "label_smoothing": (-0.1, 1.0),
            "share": (-1,),
            "proposal": ("unigram",),
            "popularity_exponent": (float("nan"), -0.5, float("inf"), 11),
        },
        workspaces={
            "": Workspace(
                stored=LARGE[0] * 1024 * LARGE[2], options={"num_negatives": 1024, "share": 128}
            ),
            "single": Workspace(
                stored=LARGE[0] * 1024 * LARGE[2], options={"num_negatives": 1024, "share": 1}
            ),
        },
    ),
    "sce": Entry(
        function=scalable_cross_entropy,
        config=SCE,
        definition=sce,
        options={"num_buckets": 4, "positions_per_bucket": 9, "items_per_bucket": 11},
        variants={
            "plain": {"num_buckets": 9, "items_per_bucket": 23, "mix": False},
            "wide": {"num_buckets": 3, "positions_per_bucket": 99, "items_per_bucket": 500},
        },
        has_sparse_grad=True,
        has_covered=True,
        choice=Choice(rule=HardBuckets, compared=compared_by_buckets, is_own=(False, False, False)),
        padding=0.2,
        refused=[
            *each(
                "num_buckets positions_per_bucket items_per_bucket",
                (0, -1),
                "items_per_bucket must be positive, got .*None takes",
            ),
            *each("items_per_bucket", (None,), "for argument 'items_per_bucket'", RuntimeError),
            *each("num_buckets", (1.5,), "for argument 'num_buckets'", RuntimeError),
            *each("mix", ("no",), "for argument 'mix'", RuntimeError),
            *REFUSED_DRAWS,
        ],
        refused_options={
            "num_buckets": (-1,),
            "positions_per_bucket": (-1,),
            "items_per_bucket": (0,),
        },
        workspaces={
            "": Workspace(
                stored=2000 * LARGE[1],
                options={"num_buckets": 2000, "positions_per_bucket": 8, "items_per_bucket": 16},
            )
        },
    ),
    "rece": Entry(
        function=reduced_cross_entropy,
        config=RECE,
        definition=rece,
        options={"num_buckets": 6, "num_chunks": 6, "num_rounds": 2, "num_neighbor_chunks": 1},
        variants={"rank": {"num_buckets": 16, "num_rounds": 2, "align": "rank"}},
        choice=Choice(rule=HashedChunks, compared=compared_by_hashes, is_own=(True, True)),
        padding=0.3,
        refused=[
            *each(
                "num_buckets num_chunks num_rounds",
                (0, -1),
                "num_rounds must be positive and num_neighbor_chunks not",
            ),
            *each(
                "num_neighbor_chunks",
                (-1,),
                "num_rounds must be positive and num_neighbor_chunks not",
            ),
            *each("num_rounds", (1.5,), "for argument 'num_rounds'", RuntimeError),
            *each("align", ("row",), "align must be 'bucket' or 'rank', got 'row'"),
            *REFUSED_DRAWS,
        ],
        refused_options={
            "num_buckets": (-1,),
            "num_chunks": (-1,),
            "num_rounds": (0,),
            "num_neighbor_chunks": (-1,),
            "align": ("row",),
        },
        workspaces={
            "": Workspace(stored=2000 * LARGE[1], options={"num_buckets": 2000, "num_rounds": 2})
        },
    ),
    "hce": Entry(
        function=hybrid_cross_entropy,
        config=HCE,
        definition=hce,
        options={"num_buckets": 4, "items_per_bucket": 11, "num_negatives": 9},
        variants={
            "plain": {
                "num_buckets": 9,
                "items_per_bucket": 23,
                "num_negatives": 5,
                "mix": False,
            },
            "wide": {"num_buckets": 3, "items_per_bucket": 500, "num_negatives": 2},
        },
        has_sparse_grad=True,
        choice=Choice(
            rule=HardAndSampled, compared=compared_by_nearest_bucket, is_own=(True, False)
        ),
        padding=0.4,  # buckets are as large as positions are near
        refused=[
            *each(
                "num_buckets items_per_bucket num_negatives",
                (0, -1),
                "items_per_bucket and num_negatives must be positive, got .*raise them",
            ),
            *each("items_per_bucket", (None,), "for argument 'items_per_bucket'", RuntimeError),
            *each("num_negatives", (1.5,), "for argument 'num_negatives'", RuntimeError),
            *each("mix", ("no",), "for argument 'mix'", RuntimeError),
            *REFUSED_DRAWS,
        ],
        refused_options={
            "num_buckets": (-1,),
            "items_per_bucket": (0,),
            "num_negatives": (0, -3),
        },
        workspaces={
            "": Workspace(
                stored=2000 * LARGE[1],
                options={"num_buckets": 2000, "items_per_bucket": 16, "num_negatives": 16},
            )
        },
    ),
    "eager_ce": Entry(
        function=eager_cross_entropy,
        config=EagerCE,
        definition=cce,
        has_draws=False,
        refused_options={"label_smoothing": (-0.1, 1.0)},
        is_operator=False,
    ),
    "bce": Entry(
        function=binary_cross_entropy,
        config=BCE,
        definition=bce,
        options={"num_negatives": 3},
        is_operator=False,
        refused=each("num_negatives", (0,), "num_negatives must be at least 1, got 0; raise it"),
        refused_options={"num_negatives": (0, -3)},
    ),
    "gbce": Entry(
        function=generalized_binary_cross_entropy,
        config=GBCE,
        definition=gbce,
        options={"num_negatives": 7},
        is_operator=False,
        refused=each("num_negatives", (0,), "num_negatives must be at least 1, got 0; raise it"),
        refused_options={
            "num_negatives": (0, -3),
            "calibration": (-0.1, 1.1, float("nan")),
        },
    ),
}
