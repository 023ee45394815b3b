"""Refuse a run that this machine cannot hold or finish, before anything is allocated.

The estimates are those of ``plan``, which are upper bounds. Only a run whose estimate exceeds the
memory of the whole machine is refused, so that no run that would have worked is.
"""

import dataclasses
import os

import torch

from shardrec.modules.losses import CCE
from shardrec.pipeline.plan import Machine, count_parameters, plan, readable_bytes
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.run.config import TrainConfig

__all__ = ["require_reasonable"]

# A sampled loss should take less work than the exact one; on small catalogs both are cheap.
_MOST_TIMES_EXACT, _SMALL_FLOPS = 20, 1e10


def require_reasonable(
    config: TrainConfig, prepared: Prepared, num_ranks: int, device: torch.device
) -> None:
    """Refuse a run that needs more memory than there is, or a loss dearer than the exact one.

    Memory is that of this rank's GPU, or of the whole machine on a CPU. A loss is refused if it
    takes over 10**10 FLOP a step and over 20 times those of ``cce``.

    Args:
        config: the config of the run.
        prepared: the data; number and length of its sequences bound those of a batch.
        num_ranks: W.
        device: device of this rank.

    Raises:
        ValueError: the run is refused; the message names the largest term of its memory.

    Collectives: none.
    """
    room = _memory_bytes(device)
    _require_room(20 * count_parameters(config.encoder), room, "encoder", "encoder.width")
    num_items = prepared.num_items
    machine = Machine(ranks=num_ranks, device=device.type, libraries_gb=0.0)
    real = _as_the_data_allows(config, prepared)
    found = plan(real, num_items, machine)
    lower = "batches.batch_size"
    if config.parallel.shards:
        lower += ", the number of replicas (parallel.shards=0)"
    _require_room(found.peak_bytes, room, found.dominant, lower)
    exact = plan(dataclasses.replace(real, loss=CCE()), num_items, machine).flops["loss"]
    own = found.flops["loss"]
    if own > _SMALL_FLOPS and own > _MOST_TIMES_EXACT * exact:
        raise ValueError(
            f"loss must cost less than the exact cce, got {config.loss.name} with {own:.2g} FLOP a "
            f"step where cce needs {exact:.2g} for {num_items:,} items; lower its numbers of "
            "negatives, buckets or rounds, or use cce"
        )


def _require_room(needed: int, room: int, term: str, option: str) -> None:
    if needed > room:
        raise ValueError(
            f"the run must fit into the {readable_bytes(room)} of memory here, got "
            f"{readable_bytes(needed)}, most of it for {term}; lower {option} or what else "
            "`shardrec plan` shows to be large"
        )


def _as_the_data_allows(config: TrainConfig, prepared: Prepared) -> TrainConfig:
    """The config with batch size and length limited to the sequences that the data has."""
    lengths = prepared.manifest.quantiles.get("train_sequence_length", {})
    longest = lengths.get("1", config.encoder.max_length)
    encoder = dataclasses.replace(
        config.encoder, max_length=max(1, min(config.encoder.max_length, longest))
    )
    size = max(1, min(config.batches.batch_size, prepared.manifest.counts["train_sequences"]))
    batches = dataclasses.replace(config.batches, batch_size=size)
    # The vectors of attributes are few beside the rows that they compose.
    catalog = dataclasses.replace(config.catalog, attributes="none", id_dropout=0.0)
    return dataclasses.replace(config, encoder=encoder, batches=batches, catalog=catalog)


def _memory_bytes(device: torch.device) -> int:
    """Bytes of memory of this rank's GPU, or of the whole machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
