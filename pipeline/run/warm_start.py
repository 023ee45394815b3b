"""Warm start: start a run from the weights of an earlier run, whose catalog may differ.

Items are matched to rows of the old table without guessing, by the first of these that applies:

* *same data*: the earlier run was trained on this prepared folder, so every item keeps its row;
* *former items*: this folder was prepared with ``items`` of the folder that the earlier run was
  trained on, so the earlier items have kept their rows;
* *item map*: the same with ``rebalance``: ``item_map.parquet`` maps old rows to new ones;
* *item ids*: otherwise the ids of both folders are compared, which needs the earlier run's folder.

Folders are the same if their fingerprints, and thus the checksums of all files, are equal; files
that the matching reads are compared with their checksums first.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from shardrec.kernels.ranks.communicator import Communicator
from shardrec.modules.catalog import Catalog
from shardrec.modules.encoder import EncoderConfig
from shardrec.pipeline.checkpoint.store import CheckpointState, StoredCheckpoint
from shardrec.pipeline.outputs.storage import Folder
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.prepared.item_ids import ItemIds
from shardrec.pipeline.prepared.manifest import ITEM_MAP_NAME, ITEMS_NAME, read_manifest
from shardrec.pipeline.prepared.row_groups import RowGroups
from shardrec.pipeline.ranks import on_first_rank, on_this_rank
from shardrec.pipeline.run.config import TrainConfig
from shardrec.pipeline.run.folder import OWN_ENCODER, open_checkpoints, read_run
from shardrec.pipeline.run.step import Stepper
from shardrec.pipeline.run.warm_attributes import CarriedAttributes

__all__ = ["start_from"]

# Rows in memory at a time, in addition to the shard.
BLOCK_ROWS = 65_536

Match = Literal["same data", "former items", "item map", "item ids"]


def start_from(
    config: TrainConfig, prepared: Prepared, stepper: Stepper, encoder: str = OWN_ENCODER
) -> dict[str, Any] | None:
    """Load the weights that ``config.init_from`` names into a new model.

    Every rank reads the rows that it needs; after ``rebalance`` it may have to read the whole
    table, in pieces of at most ``BLOCK_ROWS`` rows, and keeps only its own.

    Returns:
        JSON for the run folder: the earlier run and step, how items were matched, and how many are
        carried over, new, and left out. None if the run starts from random weights.

    Raises:
        FileNotFoundError: there is no such run or checkpoint, or the folder with its ids is
            missing.
        ValueError: encoder, table optimizer or items do not fit; raised on all ranks before any
            weight changes.

    Collectives: a few all-gathers of small objects and all-reduces of a few numbers.
    """
    if config.init_from.run is None:
        return None
    catalog, group = stepper.model.catalog, stepper.model.group
    origin = on_first_rank(lambda: _find(config, prepared, encoder), group)
    former = on_this_rank(lambda: _former_rows(origin, prepared, catalog.row_range), group)
    carried = torch.tensor(int((former >= 0).sum()), device=catalog.device)
    Communicator(catalog.group).sum_(carried)
    if not carried:
        raise ValueError(
            f"init_from.run must know some of the items, got {config.init_from.run} of "
            f"{origin.num_items} others; is it of another log?"
        )
    keep = config.init_from.optimizer == "keep"
    stored = on_this_rank(lambda: StoredCheckpoint(origin.checkpoint), group)
    first = on_this_rank(lambda: _checked_state(origin, stored, stepper, keep), group)
    attributes = on_this_rank(lambda: _carried_attributes(config, prepared, first), group)
    on_this_rank(lambda: _copy_rows(stored, former, catalog, keep), group)
    if config.init_from.new_rows == "mean":
        _fill_new_rows(catalog, former, int(carried))
    _load_replicated(first, stepper, attributes, keep)
    if keep:
        catalog.num_steps = int(first.table["num_steps"])
    report = _report(config, origin, first, prepared.num_items, int(carried))
    report |= {} if attributes is None else attributes.counts
    if config.show_progress and Communicator(group).rank == 0:
        print(_describe(report), file=sys.stderr, flush=True)
    return report


@dataclasses.dataclass(frozen=True, slots=True)
class _Origin:
    """A checkpoint to start from: its folder, V of its table, and how its items are matched."""

    checkpoint: Folder
    num_items: int
    match: Match
    prepared: Path | None


def _find(config: TrainConfig, prepared: Prepared, encoder: str) -> _Origin:
    run = Path(config.init_from.run or "")
    details, former = read_run(run)
    _check_encoder(config, former, encoder, details["encoder"])
    _check_table(config, former)
    match, folder = _match(config, prepared, details["data"], former.data)
    checkpoint = open_checkpoints(run, former).find(config.init_from.checkpoint)
    return _Origin(checkpoint, details["data"]["num_items"], match, folder)


def _check_encoder(config: TrainConfig, former: TrainConfig, encoder: str, trained: str) -> None:
    if encoder != trained:
        raise ValueError(
            f"the encoder must be of the kind that {config.init_from.run} trained, {trained}, got "
            f"{encoder}; hand in the same module, or none"
        )
    names = [field.name for field in dataclasses.fields(EncoderConfig) if field.name != "dropout"]
    names = names if encoder == OWN_ENCODER else ["width"]
    for name in names:
        ours, wanted = getattr(config.encoder, name), getattr(former.encoder, name)
        if ours != wanted:
            raise ValueError(
                f"encoder.{name} must be {wanted} as in {config.init_from.run}, got {ours}; "
                f"set encoder.{name}={wanted}"
            )


def _check_table(config: TrainConfig, former: TrainConfig) -> None:
    ours, wanted = config.catalog.optimizer, former.catalog.optimizer
    if config.init_from.optimizer == "keep" and ours != wanted:
        raise ValueError(
            f"catalog.optimizer must be {wanted} as in {config.init_from.run}, got {ours}, which "
            "cannot use its memory; set the same, or init_from.optimizer=reset"
        )
    ours, wanted = config.catalog.attributes, former.catalog.attributes
    if ours != wanted:
        raise ValueError(
            f"catalog.attributes must be {wanted} as in {config.init_from.run}, got {ours}; its "
            "vectors mean something else: set the same, or train anew"
        )


def _carried_attributes(
    config: TrainConfig, prepared: Prepared, state: CheckpointState
) -> CarriedAttributes | None:
    if config.catalog.attributes == "none":
        return None
    found = CarriedAttributes.find(Path(config.init_from.run or ""), prepared)
    found.check(state)
    return found


def _match(
    config: TrainConfig, prepared: Prepared, data: dict[str, Any], named: str
) -> tuple[Match, Path | None]:
    """How items are matched, and the folder that ids are compared with."""
    source = prepared.manifest.source.get("items") or {}
    if config.init_from.prepared is None and data["fingerprint"] == prepared.fingerprint:
        return "same data", None
    if config.init_from.prepared is None and data["fingerprint"] == source.get("fingerprint"):
        if not any(file.path == ITEM_MAP_NAME for file in prepared.manifest.files):
            return "former items", None
        read_manifest(prepared.path, verify_checksums=True, only=(ITEM_MAP_NAME,))
        return "item map", None
    folder = Path(config.init_from.prepared or named)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the prepared folder of {config.init_from.run} must be there to match items by their "
            f"ids, got {str(folder)!r}, which is not; set init_from.prepared to where it is, or "
            "prepare this data with the items.parquet that the run was trained on"
        )
    # Its sequences may be gone by now; only the ids are needed.
    manifest = read_manifest(folder, verify_checksums=True, only=(ITEMS_NAME,))
    if manifest.fingerprint != data["fingerprint"]:
        raise ValueError(
            f"init_from.prepared must be the folder that {config.init_from.run} was trained on, "
            f"got {str(folder)!r} with another fingerprint; its items may have other rows"
        )
    read_manifest(prepared.path, verify_checksums=True, only=(ITEMS_NAME,))
    return "item ids", folder


def _former_rows(origin: _Origin, prepared: Prepared, rows: range) -> Tensor:
    """(R,) int64, the old row of each of this rank's items, -1 for items that are new."""
    if origin.match == "item map":
        return _mapped_rows(prepared.path / ITEM_MAP_NAME, rows)
    if origin.match == "item ids":
        assert origin.prepared is not None
        wanted = prepared.item_ids().slice(rows.start, len(rows))
        source = Prepared(origin.prepared, read_manifest(origin.prepared, only=(ITEMS_NAME,)))
        return ItemIds(source.item_ids()).items(wanted)
    former = torch.arange(rows.start, rows.stop)
    return torch.where(former < origin.num_items, former, -1)


def _mapped_rows(path: Path, rows: range) -> Tensor:
    former = torch.full((len(rows),), -1)
    names = ["former_item", "item"]
    groups = RowGroups([path], names)
    for index in range(len(groups)):
        table = groups.read(index, names)
        old, new = (torch.tensor(table.column(name).to_numpy()) for name in names)
        is_local = (new >= rows.start) & (new < rows.stop)
        former[new[is_local] - rows.start] = old[is_local]
    return former


def _pieces(former: Tensor, num_rows: int) -> Iterator[tuple[range, Tensor]]:
    """Ranges of at most ``num_rows`` old rows, and which of this rank's rows come from them."""
    values, order = former.sort()
    first = int((values < 0).sum())
    while first < len(values):
        start = int(values[first])
        end = int(torch.searchsorted(values, start + num_rows))
        yield range(start, int(values[end - 1]) + 1), order[first:end]
        first = end


def _checked_state(
    origin: _Origin, stored: StoredCheckpoint, stepper: Stepper, keep: bool
) -> CheckpointState:
    """The checkpoint without its rows, after checking that all of it fits."""
    state = stored.load(range(0))
    if stored.num_rows != origin.num_items:
        raise ValueError(
            f"the table of {origin.checkpoint} must have {origin.num_items} rows as its run says, "
            f"got {stored.num_rows}; the run folder is damaged"
        )
    wanted = {name: value.shape[1:] for name, value in _copied(stepper.model.catalog, keep).items()}
    found = {name: state.table[name].shape[1:] for name in wanted if name in state.table}
    if wanted != found:
        raise ValueError(
            f"the table of {origin.checkpoint} must hold {_shapes(wanted)} for each row, got "
            f"{_shapes(found)}; use the table optimizer and the width of that run"
        )
    ours = {name: value.shape for name, value in stepper.model.encoder.state_dict().items()}
    saved = {name: value.shape for name, value in state.encoder.items()}
    if ours != saved:
        names = sorted(ours.keys() | saved.keys())
        differing = [name for name in names if ours.get(name) != saved.get(name)]
        raise ValueError(
            f"the encoder must have the weights of {origin.checkpoint}, got others for "
            f"{', '.join(differing[:3])}; hand in the same module"
        )
    if keep and len(state.optimizer["param_groups"][0]["params"]) != len(stepper.parameters):
        raise ValueError(
            f"the encoder must train the parameters that {origin.checkpoint} trained, got "
            f"{len(stepper.parameters)}; freeze the same, or set init_from.optimizer=reset"
        )
    return state


def _copied(catalog: Catalog, keep: bool) -> dict[str, Tensor]:
    """The tensors of the new table that are copied from the old one, row by row."""
    state = catalog.state_dict()
    return {name: state[name] for name in state if name == "rows" or (keep and state[name].ndim)}


def _shapes(shapes: Mapping[str, torch.Size]) -> str:
    return ", ".join(f"{name} {tuple(shape)}" for name, shape in sorted(shapes.items()))


@torch.no_grad()
def _copy_rows(stored: StoredCheckpoint, former: Tensor, catalog: Catalog, keep: bool) -> None:
    """Copy the old rows of this rank's items, whatever rank held them."""
    targets = _copied(catalog, keep)
    for piece, local in _pieces(former, BLOCK_ROWS):
        table = stored.load_rows(piece, targets)
        wanted = former[local] - piece.start
        for name, target in targets.items():
            target[local.to(target.device)] = table[name][wanted].to(target)


@torch.no_grad()
def _fill_new_rows(catalog: Catalog, former: Tensor, num_carried: int) -> None:
    """Give new items the mean of all rows that were carried over, the same bits everywhere."""
    rows = catalog.state_dict()["rows"]
    is_new = (former < 0).to(rows.device)
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for start in range(0, rows.shape[0], BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        total += rows[part][~is_new[part]].sum(0, dtype=torch.float64)
    Communicator(catalog.all_ranks).sum_(total)
    num_copies = 1 if catalog.replicas is None else catalog.replicas.count
    rows[is_new] = (total / (num_carried * num_copies)).to(rows)


def _load_replicated(
    state: CheckpointState, stepper: Stepper, attributes: CarriedAttributes | None, keep: bool
) -> None:
    """Load encoder and vectors of attributes, and the state of their optimizer."""
    model, memory = stepper.model, state.optimizer["state"]
    model.encoder.load_state_dict(dict(state.encoder))
    if attributes is not None:
        vectors = model.catalog.attributes
        attributes.load(vectors, state)
        first = len(stepper.parameters) - len(list(vectors.parameters()))
        memory = attributes.memory(state, vectors, first)
    if keep:
        # Learning rate, betas and decay come from the new run.
        groups = stepper.optimizer.state_dict()["param_groups"]
        stepper.optimizer.load_state_dict({"state": memory, "param_groups": groups})


def _report(
    config: TrainConfig, origin: _Origin, state: CheckpointState, num_items: int, carried: int
) -> dict[str, Any]:
    return {
        "run": config.init_from.run,
        "checkpoint": origin.checkpoint.name,
        "step": state.progress.get("step"),
        "matched_by": origin.match,
        "items_carried_over": carried,
        "items_new": num_items - carried,
        "items_left_out": origin.num_items - carried,
        "new_rows": config.init_from.new_rows,
        "optimizer": config.init_from.optimizer,
    }


def _describe(report: dict[str, Any]) -> str:
    return (
        f"starts from {report['run']}, step {report['step']}: {report['items_carried_over']:,} "
        f"items carried over (matched by {report['matched_by']}), {report['items_new']:,} new "
        f"({report['new_rows']} rows), {report['items_left_out']:,} left out; optimizer memory "
        + ("kept" if report["optimizer"] == "keep" else "reset")
    )
