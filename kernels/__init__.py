"""Losses over huge catalogs on plain tensors; needs torch, and triton only where a kernel runs.

The five functions are custom operators of PyTorch, ``torch.ops.shardrec.<name>``, in forward and in
backward:

- ``torch.compile`` takes each as one node of its graph, with ``fullgraph=True`` too, and compiles
  nothing again when a seed or a step changes. A sparse gradient is no part of a graph: with
  ``sparse_grad=True`` the graph breaks at the loss, and ``fullgraph=True`` is an error. Over a
  ``RowShard``, sizes of ``sampled_cross_entropy`` and ``scalable_cross_entropy`` depend on the
  other ranks: there the graph breaks at the operator, unless
  ``torch._dynamo.config.capture_dynamic_output_shape_ops`` is set.
- Under ``torch.autocast`` products are of its dtype and sums of float32, whatever the dtypes of
  states and table; the loss is float32, and a gradient has the dtype of its parameter and was never
  rounded to that of autocast.
- ``torch.no_grad``, activation checkpoints and DistributedDataParallel work as with any loss.
- Strided inputs and int32 targets are taken; a second derivative is refused by name.
"""

from shardrec.kernels.cce import cut_cross_entropy
from shardrec.kernels.cce_minus import sampled_cross_entropy
from shardrec.kernels.hce import hybrid_cross_entropy
from shardrec.kernels.rece import reduced_cross_entropy
from shardrec.kernels.sce import scalable_cross_entropy
from shardrec.kernels.shard import RowShard

__all__ = [
    "RowShard",
    "cut_cross_entropy",
    "hybrid_cross_entropy",
    "reduced_cross_entropy",
    "sampled_cross_entropy",
    "scalable_cross_entropy",
]
