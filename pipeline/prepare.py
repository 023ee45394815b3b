"""The prepare stage: turn an event log into a folder of sequences, in splits, with a manifest.

The phases: sort the log; find the cut times; choose the catalog; find each user's cuts; count the
training events; assign the item indices; join the items' attributes, if there are any; write items
and sequences; write the manifest.

Splits:

* ``temporal`` (default): events from one global time on form the test part. Counts, popularity,
  filters and training sequences come from earlier events only. Validation is by users (the default:
  the last event before the test part of one user in ten, so that training still has the newest
  weeks) or by time (the period just before the test part, for all users, so that training ends
  earlier).
* ``leave_one_out``: a user's last event is for the test and the one before it for validation; users
  with fewer than three events are only trained on. Times only give the order, so filters count the
  whole log.

Targets are the user's ``last`` held-out event, with all events before it as history, or ``all``
held-out events, with the events before the split as history. Items first seen after the split stay
in the catalog with count 0 (unless ``min_item_events`` requires training events). Users without any
history before the split are counted and left out. Events of one user at one time keep the order of
the log, unless ``ties`` says to shuffle them.

Items that occur only in ``item_attributes`` get the next indices after those of the log.

To prepare a newer log, pass the ``items.parquet`` of the earlier folder as ``items``: its items
keep their indices (``log/item_indices.py``).
"""

import contextlib
import dataclasses
import errno
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

import shardrec
from shardrec.pipeline.config import to_json
from shardrec.pipeline.log.config import ATTRIBUTES, PrepareConfig, sort_threads
from shardrec.pipeline.log.item_attributes import ItemAttributes
from shardrec.pipeline.log.item_indices import FormerItems, index_order
from shardrec.pipeline.log.reader import EventLog
from shardrec.pipeline.log.sort import SortedLog, SortOptions, sort_log
from shardrec.pipeline.log.split import Cuts, split_log, training_counts
from shardrec.pipeline.log.write import Written, write_item_map, write_items, write_sequences
from shardrec.pipeline.outputs.files import MANIFEST_NAME
from shardrec.pipeline.outputs.formats import PREPARED
from shardrec.pipeline.outputs.json_files import read_json
from shardrec.pipeline.outputs.stage_output import StageOutput
from shardrec.pipeline.prepared.balance import describe_uneven_load, loads
from shardrec.pipeline.prepared.manifest import Manifest, parse_manifest, write_manifest

__all__ = ["PrepareConfig", "Preparation", "prepare", "prepare_once"]

Array = npt.NDArray[Any]
_QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)
_WITHOUT_EFFECT = (
    *("events", "output", "items", "item_attributes"),
    *("memory_limit", "threads", "force"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Preparation:
    """The result of ``prepare_once``.

    Attributes:
        manifest: manifest of the output folder.
        is_new: False if the output was complete already.
        seconds: wall time.
    """

    manifest: Manifest
    is_new: bool
    seconds: float


def prepare(config: PrepareConfig) -> Manifest:
    """The manifest of ``config.output``, after preparing it if need be; see ``prepare_once``."""
    return prepare_once(config).manifest


def prepare_once(config: PrepareConfig) -> Preparation:
    """Prepare a log for training, unless the output already holds the same result.

    The output is complete or absent: it is written elsewhere and renamed at the end. With ``force``
    the earlier output stays until then.

    Args:
        config: what to read, how to split, where to write.

    Returns:
        The manifest of ``config.output``, whether it is new, and the wall time.

    Raises:
        FileNotFoundError: there is no log, or no file of earlier items or of attributes.
        FileExistsError: the output folder holds something else.
        ValueError: the log, the earlier items or the attributes are invalid; the message names
            file, row group and column.
        MemoryError: ``memory_limit`` is too low.
        OSError: the disk is full.
        PermissionError: the folder above the output is not writable.
    """
    started = time.monotonic()
    log = EventLog.open(config.events, config.columns())
    former = None if config.items is None else FormerItems.open(config.items, log.item_type)
    attributes = ItemAttributes.open(config, log.item_type)
    source = _source(log, former, attributes)
    output = _stage_output(config, source)
    found = output.find()
    if found is not None:
        logging.getLogger(__name__).info("%s is complete already: nothing to do", config.output)
        manifest = parse_manifest(found, output.path)
        return Preparation(manifest, False, time.monotonic() - started)
    with _explain_full_disk(config.output), output.write() as (folder, work):
        events = sort_log(log, work, _sort_options(config), former)
        manifest = _write(config, source, log, events, attributes, folder)
        write_manifest(folder, manifest)
    return Preparation(manifest, True, time.monotonic() - started)


def _stage_output(config: PrepareConfig, source: dict[str, Any]) -> StageOutput:
    return StageOutput(
        path=Path(config.output),
        format=PREPARED,
        request=_request(_stored_config(config), source),
        force=config.force,
        stored=_stored,
    )


def _request(config: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
    parts = {name: source.get(name) for name in ("items", "item_attributes")}
    return config | {"the log's files": source.get("files")} | parts


def _stored(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder, with the request that it was made for."""
    stored = read_json(folder / MANIFEST_NAME)
    parts = [stored.get(name) for name in ("config", "source")]
    config, source = (part if isinstance(part, dict) else {} for part in parts)
    defaults = _stored_config(PrepareConfig(events=".", output="."))
    return stored | {"request": _request(defaults | config, source)}


@contextlib.contextmanager
def _explain_full_disk(output: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            "the disk of the output must have room for a copy of the log, its sorted columns and "
            f"the result, got {error.strerror} at {output!r}; free some space; what was there "
            "before is unchanged",
        ) from error


def _sort_options(config: PrepareConfig) -> SortOptions:
    return SortOptions(
        memory_limit=config.memory_limit,
        threads=sort_threads(config.threads),
        seed=config.seed,
        keep_duplicates=config.keep_duplicates,
        drop_repeats=config.drop_repeats,
        shuffle_ties=config.ties == "shuffle",
    )


def _write(
    config: PrepareConfig,
    source: dict[str, Any],
    log: EventLog,
    events: SortedLog,
    attributes: ItemAttributes | None,
    folder: Path,
) -> Manifest:
    cuts = split_log(events, config, log.time_type)
    counts = training_counts(events, cuts)
    catalog = np.flatnonzero(cuts.item_kept)
    order = index_order(counts, catalog, events.former, config.rebalance)
    item_index = np.zeros(len(counts), np.int64)
    item_index[order] = np.arange(len(order))
    item_ids, catalog_counts = events.item_ids.take(pa.array(order)), counts[order]
    joined = None
    if attributes is not None:
        joined = attributes.write(folder, item_ids, events.item_ids)
        item_ids, new = joined.item_ids, len(joined.item_ids) - len(order)
        catalog_counts = np.append(catalog_counts, np.zeros(new, np.int64))
    files = [write_items(folder, item_ids, catalog_counts), *(joined.files if joined else ())]
    if config.rebalance and events.former is not None:
        files.append(write_item_map(folder, events.former, item_index))
    written = write_sequences(folder, events, cuts, item_index, counts, config)
    _check_written(config, written)
    uneven = describe_uneven_load(catalog_counts)
    if uneven:
        logging.getLogger(__name__).warning(uneven)
    return Manifest(
        shardrec_version=shardrec.__version__,
        config=_stored_config(config),
        source=source,
        columns=_columns(config, log),
        split={
            "kind": config.split,
            "targets": config.targets,
            "validation": config.validation,
            "test_time": cuts.test_time,
            "validation_time": cuts.validation_time,
        },
        counts=_counts(log, events, cuts, counts, catalog_counts)
        | written.counts
        | (joined.counts if joined else {}),
        quantiles={
            "train_sequence_length": _quantiles(written.lengths),
            "item_count": _quantiles(catalog_counts),
        },
        load_per_rank=loads(catalog_counts),
        files=(*files, *written.files),
    )


def _check_written(config: PrepareConfig, written: Written) -> None:
    if written.counts["train_sequences"] == 0:
        raise ValueError(
            "at least one user must have 2 or more training events, got none; check user_column "
            f"(is it a session or a row number?), lower min_user_events={config.min_user_events} "
            "or move the split"
        )


def _counts(
    log: EventLog, events: SortedLog, cuts: Cuts, counts: Array, catalog_counts: Array
) -> dict[str, int]:
    unique, repetition = events.num_events, events.repetition
    dropped = repetition.duplicates_dropped + repetition.repeats_dropped
    in_catalog = int(cuts.total.sum())
    return _former_counts(events, cuts, counts) | {
        "files_read": len(log.files),
        "files_passed_over": len(log.passed_over),
        "events_read": log.events_read,
        "events_other_type": log.events_read - unique - dropped,
        "duplicates_dropped": repetition.duplicates_dropped,
        **repetition.counts(),
        "events_of_dropped_items": unique - in_catalog,
        "events_of_dropped_users": int(cuts.total[~cuts.kept].sum()),
        "users": int(cuts.kept.sum()),
        "users_dropped": int((~cuts.kept).sum()),
        "items": len(catalog_counts),
        "items_dropped": int((~cuts.item_kept).sum()),
        "items_without_training_events": int((catalog_counts == 0).sum()),
        "train_events": int(catalog_counts.sum()),
        "train_users": int((cuts.kept & (cuts.train_end > 0)).sum()),
        "test_users_without_history": int(((cuts.total > 0) & (cuts.test_start == 0)).sum()),
    }


def _former_counts(events: SortedLog, cuts: Cuts, counts: Array) -> dict[str, int]:
    if events.former is None:
        return {}
    is_former = events.former >= 0
    return {
        "former_items": int(is_former.sum()),
        "former_items_without_training_events": int((counts[is_former] == 0).sum()),
        "new_items": int((cuts.item_kept & ~is_former).sum()),
    }


def _quantiles(values: Array) -> dict[str, int]:
    found = np.quantile(values, _QUANTILES, method="inverted_cdf")
    return {f"{q:g}": int(value) for q, value in zip(_QUANTILES, found, strict=True)}


def _stored_config(config: PrepareConfig) -> dict[str, Any]:
    data: dict[str, Any] = to_json(config)
    unused = {*ATTRIBUTES, "admit_items"} if config.item_attributes is None else set()
    left_out = {*_WITHOUT_EFFECT, *unused}
    return {name: value for name, value in data.items() if name not in left_out}


def _source(
    log: EventLog, former: FormerItems | None, attributes: ItemAttributes | None
) -> dict[str, Any]:
    source: dict[str, Any] = {"files": [dataclasses.asdict(file) for file in log.files]}
    source |= {} if former is None else {"items": former.describe()}
    return source | ({} if attributes is None else {"item_attributes": attributes.describe()})


def _columns(config: PrepareConfig, log: EventLog) -> dict[str, Any]:
    source = config.weight_column or (config.event_column if config.event_weights else None)
    weight = {"name": source, "type": "float"} if source else None
    return {
        "user": {"name": config.user_column, "type": log.user_type},
        "item": {"name": config.item_column, "type": log.item_type},
        "time": {"name": config.time_column, "type": log.time_type},
        "weight": weight,
    }
