"""The engine for one machine: DuckDB sorts the log, numpy does the rest in blocks of users."""

import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shardrec.pipeline.log.columns import EventColumns
from shardrec.pipeline.log.config import PrepareConfig, sort_threads
from shardrec.pipeline.log.engine import (
    Content,
    Folders,
    Histogram,
    Source,
    require_training_users,
)
from shardrec.pipeline.log.item_indices import index_order
from shardrec.pipeline.log.reader import EventLog
from shardrec.pipeline.log.sort import SortedLog, SortOptions, sort_log
from shardrec.pipeline.log.split import Cuts, split_log, training_counts
from shardrec.pipeline.log.write import write_item_map, write_items, write_sequences
from shardrec.pipeline.prepared.balance import describe_uneven_load, loads

__all__ = ["DuckDB"]

Array = npt.NDArray[Any]


class DuckDB:
    """See ``Engine``; what it keeps in memory is numbers of each user and item."""

    def open(self, source: str, columns: EventColumns) -> EventLog:
        """The log; see ``EventLog.open``."""
        return EventLog.open(source, columns)

    def write(self, config: PrepareConfig, source: Source, folders: Folders) -> Content:
        """Write everything but the manifest; see ``Engine``."""
        events = sort_log(source.log, folders.work, _sort_options(config), source.former)
        folder = folders.output
        cuts = split_log(events, config, source.log.time_type)
        counts = training_counts(events, cuts)
        catalog = np.flatnonzero(cuts.item_kept)
        order = index_order(counts, catalog, events.former, config.rebalance)
        item_index = np.zeros(len(counts), np.int64)
        item_index[order] = np.arange(len(order))
        item_ids, catalog_counts = events.item_ids.take(pa.array(order)), counts[order]
        joined = None
        if source.attributes is not None:
            joined = source.attributes.write(folder, item_ids, events.item_ids)
            item_ids, new = joined.item_ids, len(joined.item_ids) - len(order)
            catalog_counts = np.append(catalog_counts, np.zeros(new, np.int64))
        files = [write_items(folder, item_ids, catalog_counts), *(joined.files if joined else ())]
        if config.rebalance and events.former is not None:
            files.append(write_item_map(folder, events.former, item_index))
        written = write_sequences(folder, events, cuts, item_index, counts, config)
        require_training_users(len(written.lengths), config)
        uneven = describe_uneven_load(catalog_counts)
        if uneven:
            logging.getLogger(__name__).warning(uneven)
        return Content(
            test_time=cuts.test_time,
            validation_time=cuts.validation_time,
            num_events=events.num_events,
            repetition=events.repetition,
            events_in_catalog=int(cuts.total.sum()),
            former_counts=_former_counts(events, cuts, counts),
            counts=_counts(cuts, catalog_counts)
            | written.counts
            | (joined.counts if joined else {}),
            lengths=Histogram.of(written.lengths),
            item_counts=Histogram.of(catalog_counts),
            load_per_rank=loads(catalog_counts),
            files=(*files, *written.files),
        )


def _sort_options(config: PrepareConfig) -> SortOptions:
    return SortOptions(
        memory_limit=config.memory_limit,
        threads=sort_threads(config.threads),
        seed=config.seed,
        keep_duplicates=config.keep_duplicates,
        drop_repeats=config.drop_repeats,
        shuffle_ties=config.ties == "shuffle",
    )


def _counts(cuts: Cuts, catalog_counts: Array) -> dict[str, int]:
    return {
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
