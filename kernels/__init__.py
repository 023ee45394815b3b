"""Losses over huge catalogs on plain tensors; needs torch, and triton only where a kernel runs."""

from shardrec.kernels.cce import cut_cross_entropy
from shardrec.kernels.cce_minus import sampled_cross_entropy
from shardrec.kernels.rece import reduced_cross_entropy
from shardrec.kernels.sce import scalable_cross_entropy
from shardrec.kernels.shard import RowShard

__all__ = [
    "RowShard",
    "cut_cross_entropy",
    "reduced_cross_entropy",
    "sampled_cross_entropy",
    "scalable_cross_entropy",
]
