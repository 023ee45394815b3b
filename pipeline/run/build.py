"""Build a run from its config: data, model, optimizers, and the run folder, new or resumed."""

import contextlib
import dataclasses
import functools
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from shardrec.kernels.ranks.communicator import Communicator
from shardrec.modules.attributes import ItemAttributes
from shardrec.modules.catalog import Catalog
from shardrec.modules.encoder import TransformerEncoder
from shardrec.modules.replicas import Replicas
from shardrec.pipeline.checkpoint.writer import CheckpointWriter, writing_group
from shardrec.pipeline.model.model import Model
from shardrec.pipeline.outputs.lock import RunLock
from shardrec.pipeline.prepared.attribute_rows import PreparedAttributes
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.prepared.loader import TrainingBatches
from shardrec.pipeline.ranks import default_group, on_first_rank, on_this_rank
from shardrec.pipeline.run.agreement import require_same
from shardrec.pipeline.run.config import (
    LimitConfig,
    MemoryConfig,
    ParallelConfig,
    TrainConfig,
    ValidationConfig,
)
from shardrec.pipeline.run.folder import encoder_name, open_checkpoints, run_id, start_run
from shardrec.pipeline.run.layout import Layout, choose_layout
from shardrec.pipeline.run.loop import Run
from shardrec.pipeline.run.mesh import agreed_node_size, open_layout
from shardrec.pipeline.run.progress import Progress
from shardrec.pipeline.run.reasonable import require_reasonable
from shardrec.pipeline.run.resume import Resume, check_folder, restore, rewind, started
from shardrec.pipeline.run.step import Stepper
from shardrec.pipeline.run.warm_start import start_from

__all__ = ["build", "build_model", "check_encoder", "open_attributes", "pick_device"]


def build(
    config: TrainConfig,
    *,
    encoder: nn.Module | None = None,
    resume: Resume = "no",
    node_size: int | None = None,
) -> Run:
    """Build a run, new or resumed, that is ready for its next step.

    Opens the data, checks the run folder, makes the model and its optimizers, and then either
    loads the last checkpoint or creates the run folder. Arguments and errors are those of
    ``train``.

    Collectives: on the default group.
    """
    group, folder, name = default_group(), Path(config.output), encoder_name(encoder)
    layout = _choose_layout(config, node_size)
    if layout.num_replicas > 1:  # stored, so that later stages spread the table alike
        parallel = ParallelConfig(shards=layout.num_shards)
        config = dataclasses.replace(config, parallel=parallel)
    with contextlib.ExitStack() as held:
        lock = RunLock(folder)
        held.callback(lock.release)
        prepared = on_this_rank(lambda: Prepared.open(config.data), group)
        require_same({"fingerprint of the data": prepared.fingerprint}, group)
        is_new = on_first_rank(lambda: check_folder(config, prepared, name, resume, lock), group)
        batches = on_this_rank(lambda: _open_batches(config, prepared, layout), group)
        _check_validation(config.validation, prepared)
        _check_memory(config.memory, prepared)
        on_this_rank(lambda: _require_reasonable(config, prepared, encoder, layout), group)
        stepper = _build_stepper(config, prepared, encoder, len(batches), layout)
        checkpoints = open_checkpoints(folder, config, group)
        found = None if is_new else restore(checkpoints, stepper, batches)
        progress = found or Progress()
        if found is None:
            origin = start_from(config, prepared, stepper, name)
            stepper.start_average()
            start = functools.partial(start_run, config, prepared, name, origin)
            begun = started(config, start, lock, progress, is_new=is_new)
            on_first_rank(lambda: held.enter_context(begun), group)
        if not is_new:
            on_first_rank(lambda: rewind(config, progress.step, Communicator(group).size), group)
        checkpoints.run = on_first_rank(lambda: run_id(folder), group)
        checkpoints.group = held.enter_context(writing_group(group))
        return Run(
            config=config,
            prepared=prepared,
            batches=batches,
            stepper=stepper,
            writer=CheckpointWriter(checkpoints, background=config.checkpoints.background),
            progress=progress,
            is_new=is_new,
            layout=layout,
            # On a CPU the threads of a step have every core already.
            ahead=stepper.model.device.type == "cuda",
            held=held.pop_all(),
        )


def build_model(
    config: TrainConfig,
    num_items: int,
    encoder: nn.Module | None,
    group: dist.ProcessGroup | None,
    attributes: ItemAttributes | None = None,
    replicas: Replicas | None = None,
) -> Model:
    """An untrained model: the same encoder on every rank, and this rank's rows.

    Args:
        config: the config of the run.
        num_items: V.
        encoder: module to use instead of the encoder in the config; rank 0's weights are broadcast.
        group: the ranks that share the catalog; None for one process.
        attributes: of the items, for ``catalog.attributes``.
        replicas: of the catalog; None for one.

    Raises:
        ValueError: the encoder is not a causal module from (B, L, D) to (B, L, D), or a device is
            not available; raised on all ranks.

    Collectives: an all-gather of small objects, a broadcast of the encoder's weights, and the
    collectives of ``Catalog``.
    """
    all_ranks = group if replicas is None else replicas.all_ranks
    device = on_this_rank(lambda: pick_device(config.device), all_ranks)
    own = TransformerEncoder(config.encoder, seed=config.seed) if encoder is None else encoder
    own = own.to(device)
    if encoder is not None:
        on_this_rank(lambda: check_encoder(own, config.encoder.width, device), all_ranks)
    if all_ranks is not None:
        for tensor in own.state_dict().values():
            dist.broadcast(tensor, 0, group=all_ranks)
    catalog = Catalog(
        num_items,
        config.encoder.width,
        config.catalog,
        group=group,
        device=device,
        seed=config.seed,
        attributes=attributes,
        replicas=replicas,
    )
    return Model(own, catalog, config.precision, normalize=config.loss.normalize)


def open_attributes(
    config: TrainConfig, prepared: Prepared, group: dist.ProcessGroup | None
) -> PreparedAttributes | None:
    """The attributes of the items; None if the config uses none or the data has none.

    Collectives: as ``PreparedAttributes.open``.
    """
    if config.catalog.attributes == "none":
        return None
    return PreparedAttributes.open(prepared, group)


@torch.no_grad()
def check_encoder(encoder: nn.Module, width: int, device: torch.device) -> None:
    """Refuse an encoder that returns the wrong shape or is not causal.

    Raises:
        ValueError: the shape is wrong, or the first state changes with a later vector.
    """
    was_training = encoder.training
    vectors = torch.ones(2, 2, width, device=device)
    vectors[1, 1] = torch.linspace(-2, 2, width, device=device)
    states = encoder.eval()(vectors)
    encoder.train(was_training)
    if states.shape != vectors.shape:
        raise ValueError(
            f"encoder must return shape {tuple(vectors.shape)} for that input, got "
            f"{tuple(states.shape)}; give a module from (B, L, D) to (B, L, D)"
        )
    if not torch.allclose(states[0, 0], states[1, 0], rtol=1e-3, atol=1e-4):
        raise ValueError(
            "encoder must be causal, got one whose first state changes with the second item; "
            "mask the future, or it will be trained on its own targets"
        )


def pick_device(name: str) -> torch.device:
    """This rank's device for "auto", "cpu" or "cuda".

    Raises:
        ValueError: CUDA is requested but not available.
    """
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ValueError(
            "device must be one that is there, got cuda without a GPU; use auto or cpu"
        )
    use_cuda = found and name != "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if use_cuda else torch.device("cpu")


def _choose_layout(config: TrainConfig, node_size: int | None) -> Layout:
    size = Communicator(default_group()).size
    shards, accumulate = config.parallel.shards, config.optimizer.accumulate
    return choose_layout(shards, accumulate, size, agreed_node_size(node_size))


def _require_reasonable(
    config: TrainConfig, prepared: Prepared, encoder: nn.Module | None, layout: Layout
) -> None:
    if encoder is None:  # of another module nothing is known
        require_reasonable(config, prepared, layout.num_shards, pick_device(config.device))


def _open_batches(config: TrainConfig, prepared: Prepared, layout: Layout) -> TrainingBatches:
    replica, rank = divmod(Communicator(default_group()).rank, layout.num_shards)
    batches = TrainingBatches(
        prepared,
        config.batches,
        max_length=config.encoder.max_length,
        rank=rank,
        world_size=layout.num_shards,
        seed=config.seed,
        replica=replica,
        num_replicas=layout.num_replicas,
        accumulate=config.optimizer.accumulate,
    )
    if not prepared.train_files or not len(batches):
        raise ValueError(
            f"data must have training sequences, got none in {prepared.path}; prepare it again"
        )
    return batches


def _build_stepper(
    config: TrainConfig,
    prepared: Prepared,
    encoder: nn.Module | None,
    num_batches: int,
    layout: Layout,
) -> Stepper:
    counts = on_this_rank(prepared.item_counts, default_group())
    attributes = open_attributes(config, prepared, default_group())
    group, replicas = open_layout(layout, pick_device(config.device))
    model = build_model(config, prepared.num_items, encoder, group, attributes, replicas)
    return Stepper(
        model,
        config.loss,
        config.optimizer,
        seed=config.seed,
        total_steps=_total_steps(config.limits, -(-num_batches // config.optimizer.accumulate)),
        item_counts=counts.to(model.device),
    )


def _total_steps(limits: LimitConfig, steps_per_epoch: int) -> int | None:
    """The step at which the run ends, where steps or epochs are limited."""
    by_epochs = None if limits.max_epochs is None else limits.max_epochs * steps_per_epoch
    known = [steps for steps in (limits.max_steps, by_epochs) if steps is not None]
    return min(known, default=None)


def _check_validation(config: ValidationConfig, prepared: Prepared) -> None:
    if config.is_on and not prepared.manifest.counts["validation_users"]:
        raise ValueError(
            "validation must be off where the data has no validation users, got "
            f"every_epochs={config.every_epochs} and every_steps={config.every_steps}; set "
            "validation.every_epochs=none, or prepare with validation users"
        )


def _check_memory(config: MemoryConfig, prepared: Prepared) -> None:
    is_open = config.neighbors and len(config.scales) > 1
    if is_open and not prepared.manifest.counts["validation_users"]:
        raise ValueError(
            "memory.scales must be one value where the data has no validation users, got "
            f"{','.join(f'{scale:g}' for scale in config.scales)}; give the one that another run "
            "chose, or prepare with validation users"
        )
