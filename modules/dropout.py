"""Dropout and attention whose masks are bytes on a CPU.

There torch draws a random number for every value, one after the other: at B = 128, L = 50, D = 64
that was a fifth of a training step. A byte is enough to decide, and eight come with each draw.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["causal_attention", "dropout"]


def dropout(values: Tensor, share: float, *, training: bool) -> Tensor:
    """The values with a share of them set to zero and the others scaled to keep the expectation.

    Args:
        values: Any shape.
        share: In [0, 1). On a CPU it is rounded to a multiple of 1/256, at least 1/256 and at most
            255/256; the scale is that of the rounded share.
        training: False gives the values themselves.
    """
    if not training or share == 0:
        return values
    if values.device.type != "cpu":
        return F.dropout(values, share)
    dropped = min(max(round(share * 256), 1), 255)
    words = torch.empty(-(-values.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    kept = words.view(torch.uint8)[: values.numel()].view(values.shape) >= dropped
    # A product with floats, forward and backward, takes a third of the time of one with booleans.
    return values * kept.to(values.dtype).mul_(256 / (256 - dropped))


def causal_attention(query: Tensor, key: Tensor, value: Tensor, share: float) -> Tensor:
    """(B, heads, L, D / heads) values mixed over the positions up to each.

    Args:
        query: (B, heads, L, D / heads).
        key: as query.
        value: as query.
        share: of the attention weights that are dropped. Above 0 the CPU stores (L, L) weights.
    """
    if share == 0 or query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, dropout_p=share, is_causal=True)
    length = query.shape[2]
    future = torch.ones(length, length, dtype=torch.bool).triu_(1)
    scores = (query / math.sqrt(query.shape[3])) @ key.transpose(2, 3)
    weights = scores.masked_fill_(future, -torch.inf).softmax(3)
    return dropout(weights, share, training=True) @ value
