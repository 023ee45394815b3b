"""Log-sum-exp over a list of blocks of the logit matrix, without its logits in memory."""

from torch import Tensor

from shardrec.kernels.block_logsumexp import cpu
from shardrec.kernels.block_logsumexp.blocks import Blocks, Rounds, RowIds, every_pair
from shardrec.kernels.block_logsumexp.nearby import NearbyChunks
from shardrec.kernels.device.backend import choose_backend

__all__ = ["Blocks", "NearbyChunks", "Rounds", "RowIds", "backward", "every_pair", "forward"]


def forward(
    states: Tensor, rows: Tensor, blocks: Blocks | NearbyChunks, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the candidates of every slot, and the logit of every target.

    The workspace is one tile of logits.

    Args:
        states: (N, D) float32, bfloat16 or float16.
        rows: (R, D) of the same dtype.
        blocks: The (positions x rows) blocks that count.
        backend: "auto", "torch" or "triton"; see ``choose_backend``.

    Returns:
        (num_slots,) float32, -inf for a slot without candidates, and (N,) float32 target logits, 0
        where the target is not among the rows.

    Collectives: none.
    """
    if choose_backend(states, backend) == "triton":
        from shardrec.kernels.block_logsumexp.gpu import dispatch as gpu

        return gpu.forward(states, rows, blocks)
    return cpu.forward(states, rows, blocks)


def backward(
    states: Tensor,
    rows: Tensor,
    blocks: Blocks | NearbyChunks,
    logsumexp: Tensor,
    grad_logsumexp: Tensor,
    grad_target_logits: Tensor,
    grad_rows: Tensor,
    backend: str = "auto",
) -> Tensor:
    """(N, D) float32 gradient of ``states``; adds that of ``rows`` to (R, D) float32 ``grad_rows``.

    ``logsumexp`` may be a total over several shards, of which ``rows`` is one; both gradients are
    then the share of this shard. Tiles are computed again, never kept.

    Args:
        states: (N, D) float.
        rows: (R, D) float.
        blocks: The blocks of the forward.
        logsumexp: (num_slots,) float32 of all candidates.
        grad_logsumexp: (num_slots,) float32.
        grad_target_logits: (N,) float32.
        grad_rows: (R, D) float32 accumulator, contiguous.
        backend: "auto", "torch" or "triton"; see ``choose_backend``.

    Collectives: none.
    """
    if choose_backend(states, backend) == "triton":
        from shardrec.kernels.block_logsumexp.gpu import dispatch as gpu

        return gpu.backward(
            states,
            rows,
            blocks,
            logsumexp,
            grad_logsumexp,
            grad_target_logits,
            grad_rows,
        )
    return cpu.backward(
        states, rows, blocks, logsumexp, grad_logsumexp, grad_target_logits, grad_rows
    )
