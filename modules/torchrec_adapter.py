"""One row-wise sharded TorchRec table with deferred updates.

The only file that touches private names of TorchRec and fbgemm.

TorchRec's fused optimizers update a row inside ``backward``. This look-up runs fbgemm's table (a
"TBE") without autograd, and its backward only records ``(row, gradient)`` pairs; ``update_rows``
later runs forward and backward of the TBE on a range of rows, which is fbgemm's fused update.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torchrec.distributed import collective_utils
from torchrec.distributed.comm_ops import get_gradient_division
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ShardingEnv, ShardingPlan, ShardingType
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

__all__ = ["FUSED_OPTIMIZERS", "ShardedTable", "group_of_one"]

TABLE = "catalog"  # "items" would collide with a method of ModuleDict
FEATURE = "item"
# Bags of a look-up: on a GPU fbgemm sorts the ids of a bag by rank in one thread, which at a
# quarter of a microsecond an id would take 30 ms for 131,072 of them.
BAGS = 1024
FUSED_OPTIMIZERS = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
}

# Attributes from the wrapped model to its only TBE; lists among them have one element.
_WAY_TO_TBE = ("module", "_lookups", "_emb_modules", "emb_module")


class ShardedTable:
    """This rank's rows of one (V, D) float32 table, spread row-wise over the ranks of a group.

    Attributes:
        rows: (R, D) float32 on ``device``; aliases the storage that the look-up reads.
        first_row: global index of ``rows[0]``.
        read: function from (M,) int64 local rows to the (M, D) vectors that the look-up returns;
            None reads ``rows``.
        pairs: local rows (M,) int64 and gradients (M, D), recorded by backward, in order. The
            gradients are sums over all ranks' look-ups, never divided by the number of ranks.
    """

    def __init__(
        self,
        num_rows: int,
        width: int,
        *,
        optimizer: str,
        eps: float,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        """Plans and allocates V = ``num_rows`` rows of D = ``width``, with arbitrary values.

        ``optimizer`` is a key of ``FUSED_OPTIMIZERS``, used by ``update_rows``; ``eps`` is added to
        the square root in both variants of Adagrad.
        """
        self.device = device
        self.num_rows = num_rows
        self.width = width
        self.num_ranks = dist.get_world_size(group)
        self.read: Callable[[Tensor], Tensor] | None = None
        self.pairs: list[tuple[Tensor, Tensor]] = []
        table = EmbeddingConfig(
            name=TABLE, num_embeddings=num_rows, embedding_dim=width, feature_names=[FEATURE]
        )
        collection = EmbeddingCollection(tables=[table], device=torch.device("meta"))
        fused = {"optimizer": FUSED_OPTIMIZERS[optimizer], "learning_rate": 0.0, "eps": eps}
        sharder = EmbeddingCollectionSharder(fused_params=fused)
        self.plan = _plan(collection, sharder, self.num_ranks, device)
        _place(self.plan, group, device)
        _forget_former_groups()
        # TorchRec initializes each shard by the global generator: later draws must not depend on W.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            self._model = DistributedModelParallel(
                collection,
                env=_environment(group, device),
                device=device,
                plan=self.plan,
                sharders=[sharder],
                init_data_parallel=False,
            )
        self._tbe = _find_tbe(self._model)
        self._tbe_forward: Callable[..., Tensor] = self._tbe.forward
        self._tbe.forward = self._deferred_forward
        self._handle = torch.zeros((), device=device, requires_grad=True)
        self.rows: Tensor = self._tbe.split_embedding_weights()[0]
        block = -(-num_rows // self.num_ranks)
        self.first_row = min(block * dist.get_rank(group), num_rows)
        # TorchRec builds its modules lazily in the first look-up; do that before the first step.
        with torch.no_grad(), _quiet("torch.fx._symbolic_trace"):
            self.begin_lookup(torch.empty(0, dtype=torch.int64, device=device))()
        assert self.rows.shape == (min(block, num_rows - self.first_row), width)

    def begin_lookup(self, items: Tensor) -> Callable[[], Tensor]:
        """Sends the ids of ``items`` and returns a function that returns their (M, D) vectors.

        Backward through the vectors appends to ``pairs`` on the ranks that own the rows.

        Args:
            items: (M,) int64 in [0, V); M may be 0 and differ by rank.

        Returns:
            A function to be called once: () -> (M, D) float32, from the rows at the time of the
                call.

        Collectives: an all-to-all of ids in this call, of vectors in the returned function, and of
        gradients in backward. All ranks must run each of the three equally often.
        """
        # The same number of bags on all ranks, for any M.
        num_items = items.numel()
        lengths = torch.full((BAGS,), num_items // BAGS, device=self.device)
        lengths[: num_items % BAGS] += 1
        features = KeyedJaggedTensor(
            keys=[FEATURE], values=items, lengths=lengths, length_per_key=[num_items]
        )
        collection = self._model.module
        context = collection.create_context()
        ids = collection.input_dist(context, features).wait()

        def vectors() -> Tensor:
            found = collection.compute_and_output_dist(context, ids.wait())
            return _ContiguousGradient.apply(found[FEATURE].values())

        return vectors

    def update_rows(self, rows: Tensor, gradients: Tensor) -> None:
        """Updates the given rows in place by fbgemm's fused optimizer, once each.

        Args:
            rows: (M,) int64 local row indices without duplicates.
            gradients: (M, D) float32, contiguous; read only.
        """
        if not rows.numel():
            return
        with torch.enable_grad():
            self._tbe_forward(rows, _one_row_bags(rows)).backward(gradients)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Sets the learning rate of later updates."""
        self._tbe.set_learning_rate(learning_rate)

    def optimizer_states(self) -> dict[str, Tensor]:
        """Optimizer states by name, aliasing the live ones: (R,) or (R, D); empty for sgd."""
        if self._tbe.optimizer == EmbOptimType.EXACT_SGD:
            return {}
        (states,) = self._tbe.split_optimizer_states()
        return {"sum": states[0]}

    def describe(self, optimizer: str, states: Mapping[str, Tensor]) -> str:
        """The sharding plan as text: kernel, rows and bytes of each rank, by the given states."""
        planned = self.plan.plan[""][TABLE]
        shards = [
            (*shard.shard_offsets, *shard.shard_sizes) for shard in planned.sharding_spec.shards
        ]
        row_bytes = sum(value.element_size() * value.shape[1:].numel() for value in states.values())
        lines = [
            f"catalog: {self.num_rows:,} rows x {self.width} float32, {planned.sharding_type} over "
            f"{self.num_ranks} ranks, kernel {planned.compute_kernel} in {self.device.type} memory",
            f"optimizer: {optimizer}, deferred; {row_bytes} bytes a row with its state",
        ]
        for rank, (first, _, count, _) in enumerate(shards):
            megabytes = count * row_bytes / 1e6
            lines.append(f"rank {rank}: {count:,} rows from {first:,}, {megabytes:,.1f} MB")
        return "\n".join(lines)

    def _deferred_forward(self, indices: Tensor, offsets: Tensor) -> Tensor:
        # TorchRec passes the bags of the ids, each of which would be the work of one GPU warp.
        return _DeferredLookup.apply(self._handle, self, indices)

    def _read(self, indices: Tensor) -> Tensor:
        if self.read is not None:
            return self.read(indices)
        if not self.rows.shape[0]:  # fbgemm's CPU kernel fails for a table without rows
            return self.rows.new_empty((0, self.rows.shape[1]))
        return self._tbe_forward(indices, _one_row_bags(indices))

    def _record(self, rows: Tensor, gradients: Tensor) -> None:
        # TorchRec's backward divides by the number of ranks, as if gradients were averaged.
        if self.num_ranks > 1 and get_gradient_division():
            gradients = gradients * self.num_ranks
        self.pairs.append((rows, gradients))


def group_of_one(device: torch.device) -> dist.ProcessGroup:
    """The default process group of one rank, created without a launcher if there is none."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    if dist.get_world_size() != 1:
        raise ValueError(
            f"group must be given where there are several ranks, got None among "
            f"{dist.get_world_size()}; pass torch.distributed.group.WORLD or a subgroup"
        )
    group = dist.group.WORLD
    assert group is not None
    return group


class _DeferredLookup(torch.autograd.Function):
    """The TBE forward without autograd; backward records pairs and does not update the table."""

    @staticmethod
    def forward(ctx: Any, handle: Tensor, table: ShardedTable, indices: Tensor) -> Tensor:
        ctx.table = table
        ctx.save_for_backward(indices)
        return table._read(indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradients: Tensor) -> tuple[None, None, None]:
        (indices,) = ctx.saved_tensors
        ctx.table._record(indices, gradients)
        return None, None, None


def _one_row_bags(rows: Tensor) -> Tensor:
    """(M + 1,) offsets that make a bag of each of M rows."""
    return torch.arange(rows.numel() + 1, device=rows.device)


class _ContiguousGradient(torch.autograd.Function):
    """The identity; TorchRec's backward flattens its gradient with ``view``."""

    @staticmethod
    def forward(ctx: FunctionCtx, vectors: Tensor) -> Tensor:
        return vectors.view_as(vectors)

    @staticmethod
    def backward(ctx: FunctionCtx, gradients: Tensor) -> Tensor:
        return gradients.contiguous()


def _plan(
    collection: EmbeddingCollection,
    sharder: EmbeddingCollectionSharder,
    num_ranks: int,
    device: torch.device,
) -> ShardingPlan:
    """TorchRec's plan, constrained to row-wise in the device's own memory."""
    constraints = ParameterConstraints(
        sharding_types=[ShardingType.ROW_WISE.value],
        compute_kernels=[EmbeddingComputeKernel.FUSED.value],
    )
    try:
        with _quiet("torchrec.distributed.planner"):
            planner = EmbeddingShardingPlanner(
                topology=_topology(num_ranks, device),
                constraints={TABLE: constraints},
                storage_reservation=FixedPercentageStorageReservation(percentage=0.1),
            )
            return planner.plan(collection, [sharder])
    except PlannerError as error:
        (table,) = collection.embedding_configs()
        raise ValueError(
            f"catalog must fit in the memory of {num_ranks} ranks, got {table.num_embeddings} rows "
            f"of width {table.embedding_dim}; use more ranks or a smaller width ({error})"
        ) from error


def _place(plan: ShardingPlan, group: dist.ProcessGroup, device: torch.device) -> None:
    """Replaces ranks and devices in the shards' placements by global ranks and actual devices.

    The planner numbers both from 0, which is wrong in a subgroup and on a second node.
    """
    devices = [""] * dist.get_world_size(group)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    dist.all_gather_object(devices, str(device), group)
    planned = plan.plan[""][TABLE]
    planned.ranks = [dist.get_global_rank(group, rank) for rank in planned.ranks]
    shards = planned.sharding_spec.shards
    for shard, rank, name in zip(shards, planned.ranks, devices, strict=True):
        shard.placement = type(shard.placement)(f"rank:{rank}/{name}")


def _environment(group: dist.ProcessGroup, device: torch.device) -> ShardingEnv:
    """A replacement of ``ShardingEnv.from_process_group`` that supports subgroups.

    The original builds its device mesh from the first ranks of the world, not from the group.
    """
    env = ShardingEnv(dist.get_world_size(group), dist.get_rank(group))
    env.process_group = group
    env.device_mesh = DeviceMesh.from_group(group, device.type)
    return env


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Hides warnings of some loggers about choices that the user cannot make."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _topology(num_ranks: int, device: torch.device) -> Topology:
    host_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    device_bytes = None
    if device.type == "cuda":
        device_bytes = torch.cuda.get_device_properties(device).total_memory
    return Topology(
        world_size=num_ranks,
        local_world_size=num_ranks,
        compute_device=device.type,
        ddr_cap=host_bytes,
        hbm_cap=device_bytes,
    )


def _forget_former_groups() -> None:
    """Makes TorchRec repeat its start-up broadcast.

    TorchRec runs it once per process: a process that was in another group before would skip it, and
    the other ranks of the new group would hang.
    """
    if hasattr(collective_utils, "_INITIALIZED"):
        collective_utils._INITIALIZED = False


def _find_tbe(model: object) -> SplitTableBatchedEmbeddingBagsCodegen:
    """The fbgemm table (TBE) inside the sharded collection."""
    found, way = model, type(model).__name__
    for name in _WAY_TO_TBE:
        way += f".{name}"
        found = getattr(found, name, None)
        if isinstance(found, list | torch.nn.ModuleList):
            found = found[0] if len(found) == 1 else None
        if found is None:
            raise RuntimeError(_broken(way, "one object"))
    if not isinstance(found, SplitTableBatchedEmbeddingBagsCodegen):
        raise RuntimeError(_broken(way, SplitTableBatchedEmbeddingBagsCodegen.__name__))
    return found


def _broken(way: str, expected: str) -> str:
    return (
        f"torchrec must have {expected} at {way}, got something else or nothing; "
        "install the versions of torch, torchrec and fbgemm that match"
    )
