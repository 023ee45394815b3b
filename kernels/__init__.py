"""Cross-entropy losses over large catalogs; imports torch, and triton only to run on a GPU.

The table is a tensor, or one rank's ``RowShard`` of a table that is sharded by rows. The five
functions are custom operators of PyTorch, ``torch.ops.shardrec.<name>``, in forward and in
backward:

- ``torch.compile`` makes each one node of its graph, with ``fullgraph=True`` too, and does not
  recompile when a seed or a step changes. A compiled graph cannot return a sparse gradient: with
  ``sparse_grad=True`` the graph breaks at the loss, and ``fullgraph=True`` is an error. Over a
  ``RowShard``, sizes of ``sampled_cross_entropy`` and ``scalable_cross_entropy`` depend on the
  other ranks: the graph breaks at these operators, unless
  ``torch._dynamo.config.capture_dynamic_output_shape_ops`` is set.
- Under ``torch.autocast`` matrix products run in the autocast dtype and sums in float32, whatever
  the dtypes of states and table. The loss is float32. A gradient has the dtype of its parameter and
  is never rounded to the autocast dtype.
- ``torch.no_grad``, activation checkpoints and DistributedDataParallel work as with any loss.
- Inputs may be strided, and targets may be int32. A second derivative raises a RuntimeError.
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
