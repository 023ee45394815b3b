"""Log-sum-exp over a list of blocks of the logit matrix, without its logits in memory."""

from shardrec.kernels.block_logsumexp.blocks import Blocks, Rounds, RowIds, every_pair
from shardrec.kernels.block_logsumexp.dispatch import backward, forward
from shardrec.kernels.block_logsumexp.nearby import NearbyChunks

__all__ = ["Blocks", "NearbyChunks", "Rounds", "RowIds", "backward", "every_pair", "forward"]
