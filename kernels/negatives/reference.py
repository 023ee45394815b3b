"""The counter-based random number generator Philox4x32-10, in int64 arithmetic.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import torch
from torch import Tensor

__all__ = ["philox"]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(
    seed: int, c0: Tensor, c1: Tensor, c2: int, c3: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four int64 tensors of random 32-bit words, for the broadcast counters (c0, c1, c2, c3).

    >>> zero = torch.zeros(1, dtype=torch.int64)
    >>> [hex(word.item()) for word in philox(0, zero, zero, 0, 0)]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    a, b = torch.broadcast_tensors(c0 & _WORD, c1 & _WORD)
    c, d = torch.full_like(a, c2 & _WORD), torch.full_like(a, c3 & _WORD)
    for _ in range(10):
        high0, low0 = _multiply(a, _MULTIPLIERS[0])
        high1, low1 = _multiply(c, _MULTIPLIERS[1])
        a, b, c, d = high1 ^ b ^ key0, low1, high0 ^ d ^ key1, low0
        key0, key1 = (key0 + _WEYL[0]) & _WORD, (key1 + _WEYL[1]) & _WORD
    return a, b, c, d


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    # The product wraps around in int64 but has the right bits: mask after the arithmetic shift.
    product = word * multiplier
    return (product >> 32) & _WORD, product & _WORD
