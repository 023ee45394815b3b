"""Buckets of sce and hce: the positions and rows of largest inner product with random centres.

The phases:

1. centres (``bucket_centres``): each rank's random combinations of its states, all-reduced; or
   random signs, the same on every rank without communication;
2. local top-k (``topk_rows``): the best of this rank's positions and rows for each centre;
3. global top-k (``best_of_all_ranks``): all-gather the local lists and merge them, so that every
   rank has the same buckets.

hce has one more step instead of buckets of positions: each position takes the nearest centre.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shardrec.kernels.loss.inputs import Inputs
from shardrec.kernels.negatives import STREAM_MIX, mixed_signs, random_signs
from shardrec.kernels.ranks.communicator import Communicator
from shardrec.kernels.select import merge_topk, topk_rows

__all__ = [
    "Buckets",
    "best_items",
    "bucket_centres",
    "default_num_buckets",
    "fill_buckets",
    "mixed_centres",
]


@dataclass(frozen=True, slots=True)
class Buckets:
    """The positions and items of every bucket, the same on every rank.

    A pair is a (position, bucket); pairs are sorted by position, then by bucket.

    Attributes:
        positions: (n_b, b_x) int64 global positions.
        items: (n_b, b_y) int64 global items.
    """

    positions: Tensor
    items: Tensor

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Global position and bucket of every pair, both (n_b * b_x,) int64, in pair order."""
        buckets = torch.arange(self.positions.shape[0], device=self.positions.device)
        buckets = buckets[:, None].expand_as(self.positions).flatten()
        positions, order = self.positions.flatten().sort(stable=True)
        return positions, buckets[order]


def mixed_centres(
    states: Tensor,
    first_position: int,
    num_buckets: int,
    *,
    seed: int,
    step: int,
    backend: str = "auto",
) -> Tensor:
    """(n_b, D) float32 random-sign combinations of the states of this rank.

    Centre b is ``sum_i omega_ib x_i``, where the sign omega_ib is a function of global position i
    and b. Summed over ranks these are the combinations of all positions. Signs are in memory one
    tile at a time.

    Args:
        states: (N, D); no gradient is taken.
        first_position: Global index of ``states[0]``.
        num_buckets: n_b.
        seed: Key of the generator.
        step: Training step.
        backend: "auto", "torch" or "triton".
    """
    return mixed_signs(
        states,
        first_position,
        num_buckets,
        seed=seed,
        step=step,
        stream=STREAM_MIX,
        backend=backend,
    )


def fill_buckets(
    inputs: Inputs, centres: Tensor, positions_per_bucket: int, items_per_bucket: int
) -> Buckets:
    """The positions and items of largest inner product with each centre, over all ranks.

    Compared at coarse precision (see ``topk_rows``); of equal scores the lower index comes first.

    Args:
        inputs: The batch and the table.
        centres: (n_b, D) float32, the same on every rank.
        positions_per_bucket: b_x.
        items_per_bucket: b_y.

    Collectives: two all-gathers of (n_b, b_x) and two of (n_b, b_y) scores and indices.
    """
    layout = inputs.layout
    positions = _best_of_all_ranks(
        topk_rows(centres, inputs.states, positions_per_bucket, inputs.backend),
        layout.first_position,
        min(positions_per_bucket, layout.num_positions),
        inputs.ranks,
    )
    return Buckets(positions, best_items(inputs, centres, items_per_bucket))


def best_items(inputs: Inputs, centres: Tensor, items_per_bucket: int) -> Tensor:
    """(n_b, b_y) int64 items of largest inner product with each centre, over all ranks.

    Args:
        inputs: The batch and the table.
        centres: (n_b, D) float32, the same on every rank.
        items_per_bucket: b_y; V if that is less.

    Collectives: two all-gathers of (n_b, b_y) scores and items.
    """
    return _best_of_all_ranks(
        topk_rows(centres, inputs.scaled_rows(), items_per_bucket, inputs.backend),
        inputs.row_ids.first,
        min(items_per_bucket, inputs.num_items),
        inputs.ranks,
    )


def _best_of_all_ranks(
    found: tuple[Tensor, Tensor], first: int, k: int, ranks: Communicator
) -> Tensor:
    """(n_b, k) int64 global indices of the k best scores in the lists of all ranks.

    Args:
        found: (n_b, m) float32 scores and int64 local indices of this rank, m at most k.
        first: Global index of local index 0.
        k: Length of the result.
        ranks: The communicator.

    Collectives: two all-gathers of (n_b, k).
    """
    scores, indices = found
    if ranks.group is None:
        return indices
    missing = k - scores.shape[1]
    scores = F.pad(scores, (0, missing), value=-torch.inf)
    # Larger than every index. F.pad takes a double, which holds 2**62 exactly but not 2**63 - 1.
    indices = F.pad(indices + first, (0, missing), value=2**62)
    of_ranks = ranks.all_gather(scores)
    if len(of_ranks) == 1:
        return indices
    stacked_indices = ranks.all_gather(indices).transpose(0, 1).flatten(1)
    return merge_topk(of_ranks.transpose(0, 1).flatten(1), stacked_indices, k)[1]


def bucket_centres(inputs: Inputs, num_buckets: int, mix: bool, seed: int, step: int) -> Tensor:
    """(n_b, D) float32 centres of the buckets, the same on every rank.

    Args:
        inputs: The batch and the table.
        num_buckets: n_b.
        mix: True: random-sign combinations of the states of all ranks; False: random sign vectors.
        seed: Key of the generator.
        step: Training step.

    Collectives: one all-reduce of (n_b, D) for mixed centres.
    """
    if not mix:
        return random_signs(
            0,
            num_buckets,
            inputs.states.shape[1],
            seed=seed,
            step=step,
            stream=STREAM_MIX,
            device=inputs.states.device,
            backend=inputs.backend,
        )
    own = mixed_centres(
        inputs.states,
        inputs.layout.first_position,
        num_buckets,
        seed=seed,
        step=step,
        backend=inputs.backend,
    )
    return inputs.ranks.sum(own)


def default_num_buckets(num_positions: int) -> int:
    """``2 sqrt(N)``, at least 1: the SCE paper's recommendation for both n_b and b_x.

    >>> default_num_buckets(10000)
    200
    """
    return torch.sym_max(1, round(2 * torch.sym_sqrt(num_positions)))
