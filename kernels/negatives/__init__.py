"""Counter-based random negatives and signs, the same on every device and rank."""

from shardrec.kernels.negatives.draws import (
    STREAM_HASH,
    STREAM_MIX,
    STREAM_NEGATIVES,
    STREAM_SMOOTHING,
    draw_below,
    mixed_signs,
    random_signs,
)
from shardrec.kernels.negatives.proposals import (
    InBatch,
    Mixture,
    Popularity,
    Proposal,
    Uniform,
    pack,
    require_catalog,
    unpack,
)

__all__ = [
    "STREAM_HASH",
    "STREAM_MIX",
    "STREAM_NEGATIVES",
    "STREAM_SMOOTHING",
    "InBatch",
    "Mixture",
    "Popularity",
    "Proposal",
    "Uniform",
    "draw_below",
    "mixed_signs",
    "pack",
    "random_signs",
    "require_catalog",
    "unpack",
]
