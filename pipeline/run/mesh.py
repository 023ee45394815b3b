"""The process groups of a layout: of the ranks that share a table, and of those with equal rows."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shardrec.modules.replicas import Replicas
from shardrec.pipeline.ranks import default_group, on_all_ranks
from shardrec.pipeline.run.layout import Layout

__all__ = ["agreed_node_size", "open_layout"]


def agreed_node_size(own: int | None) -> int | None:
    """The ranks of each node, if it is the same number on all nodes; ``own`` is of this one.

    Collectives: one all-gather of small objects on the default group.
    """
    sizes = set(on_all_ranks(lambda: own, default_group()))
    return sizes.pop() if len(sizes) == 1 else None


def open_layout(
    layout: Layout, device: torch.device
) -> tuple[dist.ProcessGroup | None, Replicas | None]:
    """The sharding group of this rank (None for one process), and its replicas, if there are any.

    Collectives: two ``new_group`` of all ranks if there are replicas.
    """
    world = default_group()
    if layout.num_replicas == 1 or world is None:
        return world, None
    mesh = _device_mesh(layout, device, world)
    shard, replica = mesh.get_group("shard"), mesh.get_group("replica")
    return shard, Replicas(group=replica, all_ranks=world)


def _device_mesh(layout: Layout, device: torch.device, world: dist.ProcessGroup) -> DeviceMesh:
    """The ranks as a mesh ("replica", "shard"), whose groups time out as the default group does.

    ``init_device_mesh`` would leave them torch's default, half an hour.
    """
    timeout = world._get_backend(torch.device("cpu")).options._timeout
    ranks = torch.arange(dist.get_world_size()).view(layout.num_replicas, layout.num_shards)
    names = ("replica", "shard")
    groups = [
        dist.new_subgroups_by_enumeration(lists.tolist(), timeout=timeout)[0]
        for lists in (ranks.T, ranks)
    ]
    return DeviceMesh.from_group(groups, device.type, mesh=ranks, mesh_dim_names=names)
