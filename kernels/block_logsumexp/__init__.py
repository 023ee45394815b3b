"""Log-sum-exp over selected blocks of the (N, R) logit matrix, without the logits in memory.

Terms in this package:

- position: a line of ``states``; row: a line of ``rows``, one item of the shard. A candidate of a
  position is a row that its log-sum-exp includes; the position's target is never a candidate.
- slot: one log-sum-exp of the output; by default one for each position.
- block: a set of pairs times a list of rows. A pair is a (position, slot) of a block; an entry is
  an element of the concatenated row lists ``Blocks.items``.
- full: one block of all positions and rows (``EveryPair``); gathered: every block has one pair and
  a row list of its own; listed: all other blocks.
- part, layer: a subset of the blocks in which no slot, or no position, occurs twice, so that a
  kernel can write without atomics.
- round: blocks of different rounds may repeat a candidate, which then counts once (``Rounds``).
"""

from shardrec.kernels.block_logsumexp.blocks import (
    Blocks,
    EveryPair,
    Rounds,
    RowIds,
    blocks_of_items,
)
from shardrec.kernels.block_logsumexp.dispatch import backward, forward
from shardrec.kernels.block_logsumexp.nearby import NearbyChunks

__all__ = [
    "Blocks",
    "EveryPair",
    "NearbyChunks",
    "Rounds",
    "RowIds",
    "backward",
    "blocks_of_items",
    "forward",
]
