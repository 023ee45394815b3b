"""Cut cross-entropy: the full softmax over the catalog without its logits in memory.

Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009.
"""

from torch import Tensor

from shardrec.kernels.block_logsumexp import block_logsumexp, every_pair
from shardrec.kernels.reduction import (
    candidate_loss,
    check_inputs,
    reduce_loss,
    scale_rows,
    scale_states,
)

__all__ = ["cut_cross_entropy"]


def cut_cross_entropy(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    temperature: float = 1.0,
) -> Tensor:
    """Cross-entropy of every target among all rows of ``table``.

    ``loss_i = log sum_j exp(s_ij) - s_iy`` with ``s_ij = x_i . w_j / temperature``.

    Args:
        states: (N, D) float32, bfloat16 or float16.
        table: (V, D), same dtype.
        targets: (N,) int64 in [0, V).
        weights: (N,) float factors of the positions' losses; the mean divides by their sum.
        reduction: "mean", "sum" or "none".
        normalize: Take states and rows at unit length.
        temperature: Divides the logits.

    Returns:
        () float32, or (N,) with "none". Gradients flow to ``states`` and ``table``.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape disagrees or a target is out of range.

    Collectives: none.
    """
    check_inputs(states, table, targets, weights, reduction, temperature)
    states = scale_states(states, normalize, temperature)
    table = scale_rows(table, normalize)
    logsumexp, target_logits = block_logsumexp(
        states, table, every_pair(table.shape[0], targets.long())
    )
    return reduce_loss(candidate_loss(logsumexp, target_logits), weights, reduction)
