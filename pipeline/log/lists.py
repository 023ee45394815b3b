"""Turn rows of one user, with lists of events, into rows of one event."""

import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["exploded"]


def exploded(batch: pa.RecordBatch, user: str, place: str) -> pa.RecordBatch:
    """A batch with one row per event, in the order of the lists; an empty list gives no row.

    Args:
        batch: a column of users; every other column holds lists.
        user: name of the user column.
        place: where the batch is in the log, for error messages.

    Raises:
        ValueError: two lists of a user have different lengths.
    """
    lists = {name: batch.column(name) for name in batch.schema.names if name != user}
    lengths = {name: pc.fill_null(pc.list_value_length(one), 0) for name, one in lists.items()}
    first = next(iter(lengths))
    for name, found in lengths.items():
        differs = pc.not_equal(pc.cast(found, pa.int64()), pc.cast(lengths[first], pa.int64()))
        if pc.any(differs).as_py():
            row = pc.index(differs, True).as_py()
            raise ValueError(
                f"{place} must have lists of one length in a row, got {lengths[first][row]} in "
                f"{first!r} and {found[row]} in {name!r} of user {batch.column(user)[row]}; "
                "correct that row"
            )
    owners = pc.list_parent_indices(lists[first])
    columns = {name: pc.list_flatten(one) for name, one in lists.items()}
    columns[user] = batch.column(user).take(owners)
    return pa.RecordBatch.from_pydict({name: columns[name] for name in batch.schema.names})
