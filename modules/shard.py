"""A slice of the item table: what the losses and the ranking need to know about sharding."""

from shardrec.kernels.shard import RowShard

__all__ = ["RowShard"]
