"""How the ranks of a job are laid out: which share a table, and which hold replicas of it."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shardrec.modules.replicas import Replicas
from shardrec.pipeline.ranks import default_group, on_all_ranks

__all__ = ["Layout", "agreed_node_size", "choose_layout", "layout_for_ranking", "open_layout"]


@dataclass(frozen=True, slots=True)
class Layout:
    """The grid of ranks, replicas x shards; rank r * S + s holds shard s of replica r.

    Attributes:
        num_replicas: R.
        num_shards: S.
        advice: what to set where replicas would be possible; "" otherwise.
    """

    num_replicas: int
    num_shards: int
    advice: str = ""


def choose_layout(
    shards: int | None, accumulate: int, num_ranks: int, node_size: int | None
) -> Layout:
    """The layout of a training job.

    Args:
        shards: ``parallel.shards``: 0 for all ranks, None for those of a node, where that can be.
        accumulate: batches of a step, which replicas take side by side.
        num_ranks: W.
        node_size: ranks of each node; None where unknown or not the same on all nodes.

    Raises:
        ValueError: ``shards`` does not divide W, or the replicas do not divide ``accumulate``.

    >>> choose_layout(None, 4, num_ranks=16, node_size=8)
    Layout(num_replicas=2, num_shards=8, advice='')
    >>> choose_layout(None, 1, num_ranks=16, node_size=8).num_shards
    16
    """
    if shards is None:
        return _by_node(accumulate, num_ranks, node_size)
    size = shards or num_ranks
    if num_ranks % size:
        divisors = [one for one in range(1, num_ranks + 1) if num_ranks % one == 0]
        near = [max(d for d in divisors if d < size), *[d for d in divisors if d > size][:1]]
        raise ValueError(
            f"parallel.shards must divide the {num_ranks} ranks of the job, got {shards}; use "
            f"{' or '.join(map(str, near))}"
        )
    replicas = num_ranks // size
    if accumulate % replicas:
        below = accumulate // replicas * replicas
        near = [one for one in (below, below + replicas) if one]
        raise ValueError(
            f"optimizer.accumulate must be a multiple of the {replicas} replicas ({num_ranks} "
            f"ranks by parallel.shards={shards}), which take its batches side by side, got "
            f"{accumulate}; use {' or '.join(map(str, near))}, or parallel.shards=0"
        )
    return Layout(replicas, size)


def layout_for_ranking(shards: int | None, num_ranks: int) -> Layout:
    """The layout for a trained table: that of its training where it fits, else one group.

    >>> layout_for_ranking(2, 4), layout_for_ranking(2, 3).num_shards
    (Layout(num_replicas=2, num_shards=2, advice=''), 3)
    """
    size = shards if shards and num_ranks % shards == 0 else num_ranks
    return Layout(num_ranks // size, size)


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


def _by_node(accumulate: int, num_ranks: int, node_size: int | None) -> Layout:
    """A replica on each node, or one group of all ranks with advice how to get replicas."""
    if not node_size or node_size >= num_ranks or num_ranks % node_size:
        return Layout(1, num_ranks)
    nodes = num_ranks // node_size
    if accumulate % nodes == 0:
        return Layout(nodes, node_size)
    advice = (
        f"the {nodes} nodes share one table, so the states of each batch go to all {num_ranks} "
        f"ranks; with optimizer.accumulate={nodes} (or a multiple) each node holds a replica, "
        "takes its own batches of a step, and states stay inside the node"
    )
    return Layout(1, num_ranks, advice)


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
