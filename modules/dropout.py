"""Dropout and causal attention, with a mask that is a function of the position on the CPU.

On a CPU torch draws one random number per value, sequentially: at B = 128, L = 50, D = 64 that took
a fifth of a training step, and the mask depended on the order of the values in memory. This
implementation hashes a key of the position (the finaliser of SplitMix64; Steele, Lea and Flood,
OOPSLA 2014) and takes one byte per value. Equal keys give equal masks, wherever the position is in
the batch and however it is padded.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PositionKeys", "causal_attention", "dropout", "pointwise_attention", "random_bytes"]

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


class PositionKeys:
    """Random keys of positions; each call of ``next`` returns new ones, for the next mask."""

    def __init__(self, keys: Tensor) -> None:
        """Stores the keys.

        Args:
            keys: (N,) or (B, L) int64, a different one for each position.
        """
        self._keys = _mixed(keys.clone()) if keys.device.type == "cpu" else keys
        self._uses = 0

    @classmethod
    def drawn(cls, shape: torch.Size, device: torch.device) -> "PositionKeys":
        """Keys for positions of the given shape, drawn from torch's global generator."""
        keys = torch.empty(shape, dtype=torch.int64, device=device)
        return cls(keys.random_(-(2**63), None))

    def next(self) -> Tensor:
        """int64 keys of that shape; on a CPU, the only device to use them, new ones each time."""
        if self._keys.device.type != "cpu":
            return self._keys
        self._uses += 1
        return _mixed(self._keys + self._uses)


def random_bytes(keys: Tensor, number: int) -> Tensor:
    """(..., number) uint8 random bytes; the first bytes of a key do not depend on ``number``.

    Args:
        keys: (...) int64 keys.
        number: number of bytes per key.
    """
    # Hashed twice, so that keys one step apart share no words.
    words = torch.arange(1, -(-number // 8) + 1, device=keys.device).mul_(_GOLDEN)
    return _mixed(keys[..., None] + words).view(torch.uint8)[..., :number]


def dropout(values: Tensor, share: float, keys: Tensor | None) -> Tensor:
    """(..., C) ``values`` with a random share set to 0, the rest scaled to keep the expectation.

    Args:
        values: (..., C) float.
        share: probability of 0, in [0, 1). On a CPU it is rounded to a multiple of 1/256 in
            [1/256, 255/256], and the scale is that of the rounded share.
        keys: (...) int64 keys; None returns ``values`` unchanged. On other devices than a CPU torch
            draws the mask instead.
    """
    if keys is None or share == 0:
        return values
    if values.device.type != "cpu":
        return F.dropout(values, share)
    return _dropped(values, share, random_bytes(keys, values.shape[-1]))


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, share: float, drawn: Tensor | None = None
) -> Tensor:
    """(B, heads, L, D / heads) scaled dot-product attention over earlier and equal positions.

    Args:
        query: (B, heads, L, D / heads).
        key: shape of ``query``.
        value: shape of ``query``.
        share: dropout of the attention weights. Above 0 a CPU stores the (L, L) weights.
        drawn: (B, heads, L, L) uint8 random bytes that a CPU compares with ``share``.
    """
    if share == 0 or query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, dropout_p=share, is_causal=True)
    assert drawn is not None
    length = query.shape[2]
    future = torch.ones(length, length, dtype=torch.bool).triu_(1)
    scores = (query / math.sqrt(query.shape[3])) @ key.transpose(2, 3)
    weights = scores.masked_fill_(future, -torch.inf).softmax(3)
    return _dropped(weights, share, drawn) @ value


def pointwise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    share: float,
    drawn: Tensor | None = None,
) -> Tensor:
    """(B, heads, L, D / heads) sums over earlier and equal positions, without a softmax.

    The weights are silu(q . k + bias), divided by the number of biases. Source: Zhai et al.,
    "Actions Speak Louder than Words", arXiv 2402.17152, section 3.2. Stores the (L, L) weights on
    every device.

    Args:
        query: (B, heads, L, D / heads).
        key: shape of ``query``.
        value: shape of ``query``.
        bias: (n,) added to the products by distance, from 0 on; n is at least L.
        share: as in ``causal_attention``.
        drawn: as in ``causal_attention``.
    """
    places = torch.arange(query.shape[2], device=query.device)
    distance = places[:, None] - places
    # The backward pass of an embedding adds in a fixed order, that of an index does not.
    of_pairs = F.embedding(distance.clamp(min=0), bias[:, None])[..., 0]
    weights = F.silu(query @ key.transpose(2, 3) + of_pairs) / len(bias)
    weights = weights.masked_fill(distance < 0, 0.0)
    if share == 0:
        return weights @ value
    if query.device.type != "cpu":
        return F.dropout(weights, share) @ value
    assert drawn is not None
    return _dropped(weights, share, drawn) @ value


def _dropped(values: Tensor, share: float, drawn: Tensor) -> Tensor:
    least = min(max(round(share * 256), 1), 255)
    # Multiplying by a float mask takes a third of the time of a boolean mask.
    return values * (drawn >= least).to(values.dtype).mul_(256 / (256 - least))


def _mixed(words: Tensor) -> Tensor:
    """The finaliser of SplitMix64, in place; a bijection of int64."""
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        words ^= _shifted(words, shift)
        words *= factor
    words ^= _shifted(words, 31)
    return words


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Shifted right with zeros from the left; ``>>`` would repeat the sign."""
    return (words >> bits).bitwise_and_((1 << (64 - bits)) - 1)
