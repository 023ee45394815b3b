"""How the ranks of a job are laid out: which share a table, and which hold replicas of it."""

from dataclasses import dataclass

__all__ = ["Layout", "choose_layout", "layout_for_ranking"]


@dataclass(frozen=True, slots=True)
class Layout:
    """The grid of ranks, replicas x shards; rank r * S + s holds shard s of replica r.

    Attributes:
        num_replicas: R.
        num_shards: S.
        advice: what to set where replicas would be possible, or idle less; "" otherwise.
    """

    num_replicas: int
    num_shards: int
    advice: str = ""

    def turns(self, accumulate: int) -> int:
        """Batches one after another in a step; where R does not divide them, some replicas wait.

        >>> Layout(4, 8).turns(4), Layout(3, 8).turns(4)
        (1, 2)
        """
        return -(-accumulate // self.num_replicas)

    def describe(self, accumulate: int) -> str:
        """Replicas, shards, and the batches of a step that each replica takes.

        >>> Layout(4, 8).describe(4)
        '32 ranks: 4 replicas x 8 shards of the table; each replica takes 1 of 4 batches of a step'
        """
        ranks = self.num_replicas * self.num_shards
        copies = f"{self.num_replicas} replica{'s' * (self.num_replicas > 1)}"
        text = f"{ranks} rank{'s' * (ranks > 1)}: {copies} x {self.num_shards} shard"
        text += f"{'s' * (self.num_shards > 1)} of the table"
        if self.num_replicas > 1:
            most = self.turns(accumulate)
            least = f"{most - 1} or " if accumulate % self.num_replicas else ""
            text += f"; each replica takes {least}{most} of {accumulate} batches of a step"
        return text


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
        ValueError: ``shards`` does not divide W, or there are more replicas than batches.

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
    if accumulate < replicas:
        raise ValueError(
            f"optimizer.accumulate must be at least the {replicas} replicas ({num_ranks} ranks by "
            f"parallel.shards={shards}), which take its batches side by side, got {accumulate}; "
            f"use {replicas} or a multiple, or parallel.shards=0"
        )
    return _with_replicas(replicas, size, accumulate)


def layout_for_ranking(shards: int | None, num_ranks: int) -> Layout:
    """The layout for a trained table: that of its training where it fits, else one group.

    >>> layout_for_ranking(2, 4), layout_for_ranking(2, 3).num_shards
    (Layout(num_replicas=2, num_shards=2, advice=''), 3)
    """
    size = shards if shards and num_ranks % shards == 0 else num_ranks
    return Layout(num_ranks // size, size)


def _by_node(accumulate: int, num_ranks: int, node_size: int | None) -> Layout:
    """A replica on each node, or one group of all ranks with advice how to get replicas."""
    if not node_size or node_size >= num_ranks or num_ranks % node_size:
        return Layout(1, num_ranks)
    nodes = num_ranks // node_size
    if accumulate >= nodes:
        return _with_replicas(nodes, node_size, accumulate)
    advice = (
        f"the {nodes} nodes share one table, so the states of each batch go to all {num_ranks} "
        f"ranks; with optimizer.accumulate={nodes} (or a multiple) each node holds a replica, "
        "takes its own batches of a step, and states stay inside the node"
    )
    return Layout(1, num_ranks, advice)


def _with_replicas(replicas: int, shards: int, accumulate: int) -> Layout:
    """A layout, with advice where some replicas wait for the last batch of the others."""
    layout = Layout(replicas, shards)
    if accumulate % replicas == 0:
        return layout
    full = layout.turns(accumulate) * replicas
    advice = (
        f"{replicas} replicas share {accumulate} batches of a step unevenly, and a step takes as "
        f"long as one of {full}; optimizer.accumulate={full} (another step size) would use them all"
    )
    return Layout(replicas, shards, advice)
