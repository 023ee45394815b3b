"""The model: an encoder over a catalog, from item sequences to states at real positions."""

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from shardrec.kernels.shard import RowShard
from shardrec.modules.catalog import Catalog
from shardrec.modules.dropout import PositionKeys
from shardrec.modules.encoder import TransformerEncoder
from shardrec.modules.length_groups import LengthGroups
from shardrec.modules.memory import Memory
from shardrec.pipeline.model.config import Precision
from shardrec.pipeline.model.profile_ranges import part

__all__ = ["Model", "in_bfloat16", "real_positions"]

# Older GPUs have no bfloat16 matrix units.
_LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True)
class Model:
    """A sequence encoder over a sharded catalog.

    Attributes:
        encoder: (B, L, D) to (B, L, D), causal; the same on every rank.
        catalog: the item vectors, spread over the ranks.
        precision: of the products of encoder and loss (see ``TrainConfig``).
        normalize: whether the loss compares unit-length rows, so that ranking must too.
        memory: adds scores to successors of recent items in ranking; None adds nothing.
    """

    encoder: nn.Module
    catalog: Catalog
    precision: Precision = "auto"
    normalize: bool = False
    memory: Memory | None = None

    @property
    def device(self) -> torch.device:
        """The device of encoder and catalog."""
        return self.catalog.device

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All ranks that work together, of all replicas; None for one process."""
        return self.catalog.all_ranks

    def begin_lookup(self, items: Tensor, lengths: Tensor) -> Callable[[], Tensor]:
        """Start the look-up of item vectors; returns a function that waits for them.

        Pass that function to ``states`` as ``vectors``. Arguments are as in ``states``.

        Collectives: as ``Catalog.begin_lookup``.
        """
        return self.catalog.begin_lookup(items.reshape(-1)[real_positions(lengths, items.shape[1])])

    def states(
        self,
        items: Tensor,
        lengths: Tensor,
        vectors: Callable[[], Tensor] | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """(N, D) states at the real positions of this rank's sequences.

        The encoder works on groups of sequences of similar length (``LengthGroups``); the states
        are in the order of the sequences.

        Args:
            items: (B, L) int64, right padded; B may be 0 and differ by rank.
            lengths: (B,) int64 in [1, L].
            vectors: the function that ``begin_lookup`` returned for these sequences; None starts
                the look-up now.
            keys: (N,) int64 keys that determine the dropout masks on a CPU, independently of groups
                and ranks; None draws them from torch's generator.

        Returns:
            (N, D) float32, sequence by sequence; N is the sum of ``lengths``.

        Collectives: as ``Catalog.lookup``, forward and backward.
        """
        with part("look-up"):
            found = (vectors or self.begin_lookup(items, lengths))()
        if not len(found):
            return found  # still part of the graph: the look-up's backward needs every rank
        with part("encoder"):
            return self._encode(found, lengths, keys)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context in which encoder and loss run, for products in the dtype of ``precision``.

        Weights, rows, sums and gradients stay in float32.
        """
        wanted = in_bfloat16(self.precision, self.device)
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=wanted)

    def scored_shard(self) -> RowShard:
        """This rank's rows to score states against; a copy at unit length if ``normalize``."""
        shard = self.catalog.shard
        rows = shard.rows.detach()
        return dataclasses.replace(shard, rows=F.normalize(rows) if self.normalize else rows)

    def last_states(self, items: Tensor, lengths: Tensor) -> Tensor:
        """(B, D) float32 state after the last item of each sequence; arguments as in ``states``.

        With a memory and ``normalize`` the states have unit length, because the memory's scores are
        added to cosines.

        Collectives: as ``Catalog.lookup``.
        """
        states = self.states(items, lengths)[lengths.cumsum(0) - 1]
        return F.normalize(states) if self.normalize and self.memory is not None else states

    def _encode(self, vectors: Tensor, lengths: Tensor, keys: Tensor | None) -> Tensor:
        groups = LengthGroups.of(lengths)
        ordered = groups.sort(vectors)
        with self.autocast():
            if isinstance(self.encoder, TransformerEncoder):
                own = None if keys is None else PositionKeys(groups.sort(keys))
                states = self.encoder.packed(ordered, groups, own)
            else:
                states = groups.apply(self.encoder, ordered)
        return groups.restore(states.to(vectors.dtype))


def in_bfloat16(precision: Precision, device: torch.device) -> bool:
    """Whether products of encoder and loss are in bfloat16 on a device.

    >>> in_bfloat16("auto", torch.device("cpu")), in_bfloat16("bfloat16", torch.device("cpu"))
    (False, True)
    """
    if precision != "auto" or device.type != "cuda":
        return precision == "bfloat16"
    return torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


def real_positions(lengths: Tensor, max_length: int) -> Tensor:
    """(N,) indices of the real positions in a flattened, right-padded (B, L) tensor.

    Args:
        lengths: (B,) int64.
        max_length: L.

    Returns:
        (N,) int64, ascending.

    Example:
        >>> real_positions(torch.tensor([2, 0, 1]), 3)
        tensor([0, 1, 6])
    """
    is_real = torch.arange(max_length, device=lengths.device) < lengths[:, None]
    return is_real.reshape(-1).nonzero()[:, 0]
