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

import shardrec
from shardrec.pipeline.config import to_json
from shardrec.pipeline.log.config import ATTRIBUTES, PrepareConfig
from shardrec.pipeline.log.engine import Content, Engine, Folders, Source
from shardrec.pipeline.log.item_attributes import ItemAttributes
from shardrec.pipeline.log.item_indices import FormerItems
from shardrec.pipeline.log.on_duckdb import DuckDB
from shardrec.pipeline.log.reader import EventLog
from shardrec.pipeline.outputs.files import MANIFEST_NAME
from shardrec.pipeline.outputs.formats import PREPARED
from shardrec.pipeline.outputs.json_files import read_json
from shardrec.pipeline.outputs.stage_output import StageOutput
from shardrec.pipeline.prepared.manifest import Manifest, parse_manifest, write_manifest

__all__ = ["PrepareConfig", "Preparation", "prepare", "prepare_once", "prepare_with"]

_WITHOUT_EFFECT = (
    *("events", "output", "items", "item_attributes"),
    *("engine", "master", "memory_limit", "threads", "force"),
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
    if config.engine == "spark":
        from shardrec.pipeline.spark.prepare import prepare_in_own_session  # needs pyspark

        return prepare_in_own_session(config)
    return prepare_with(DuckDB(), config)


def prepare_with(engine: Engine, config: PrepareConfig) -> Preparation:
    """The same by a given engine."""
    started = time.monotonic()
    log = engine.open(config.events, config.columns())
    former = None if config.items is None else FormerItems.open(config.items, log.item_type)
    source = Source(log, former, ItemAttributes.open(config, log.item_type))
    output = _stage_output(config, _described(source))
    found = output.find()
    if found is not None:
        logging.getLogger(__name__).info("%s is complete already: nothing to do", config.output)
        manifest = parse_manifest(found, output.path)
        return Preparation(manifest, False, time.monotonic() - started)
    with _explain_full_disk(config.output), output.write() as (folder, work):
        content = engine.write(config, source, Folders(folder, work))
        manifest = _manifest(config, source, content)
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


def _manifest(config: PrepareConfig, source: Source, content: Content) -> Manifest:
    return Manifest(
        shardrec_version=shardrec.__version__,
        config=_stored_config(config),
        source=_described(source),
        columns=_columns(config, source.log),
        split={
            "kind": config.split,
            "targets": config.targets,
            "validation": config.validation,
            "test_time": content.test_time,
            "validation_time": content.validation_time,
        },
        counts={**content.former_counts, **_log_counts(source.log, content), **content.counts},
        quantiles={
            "train_sequence_length": content.lengths.quantiles(),
            "item_count": content.item_counts.quantiles(),
        },
        load_per_rank=content.load_per_rank,
        files=content.files,
    )


def _log_counts(log: EventLog, content: Content) -> dict[str, int]:
    repetition = content.repetition
    dropped = repetition.duplicates_dropped + repetition.repeats_dropped
    return {
        "files_read": len(log.files),
        "files_passed_over": len(log.passed_over),
        "events_read": log.events_read,
        "events_other_type": log.events_read - content.num_events - dropped,
        "duplicates_dropped": repetition.duplicates_dropped,
        **repetition.counts(),
        "events_of_dropped_items": content.num_events - content.events_in_catalog,
    }


def _stored_config(config: PrepareConfig) -> dict[str, Any]:
    data: dict[str, Any] = to_json(config)
    unused = {*ATTRIBUTES, "admit_items"} if config.item_attributes is None else set()
    left_out = {*_WITHOUT_EFFECT, *unused}
    return {name: value for name, value in data.items() if name not in left_out}


def _described(source: Source) -> dict[str, Any]:
    found: dict[str, Any] = {"files": [dataclasses.asdict(file) for file in source.log.files]}
    found |= {} if source.former is None else {"items": source.former.describe()}
    attributes = source.attributes
    return found | ({} if attributes is None else {"item_attributes": attributes.describe()})


def _columns(config: PrepareConfig, log: EventLog) -> dict[str, Any]:
    source = config.weight_column or (config.event_column if config.event_weights else None)
    weight = {"name": source, "type": "float"} if source else None
    return {
        "user": {"name": config.user_column, "type": log.user_type},
        "item": {"name": config.item_column, "type": log.item_type},
        "time": {"name": config.time_column, "type": log.time_type},
        "weight": weight,
    }
