r"""Generate event logs of any size for benchmarks; equal arguments give equal logs.

``integers`` and ``strings`` are the same draws with the two kinds of ids: a million users and
200,000 items for 20 million events, both skewed, in no order of time. In ``one-user`` one of
100,000 users has three fifths of the events, in ``skew`` one user and one item have a tenth each,
and in ``text-users`` most users have one event.
``synth`` is the log of ``shardrec synth``, which lies in order of time.

    python benchmarks/logs.py strings log.parquet --events 20_000_000
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from shardrec.pipeline.synth import SynthConfig
from shardrec.pipeline.synth import generate as write_synth

__all__ = ["KINDS", "write_log"]

BLOCK_EVENTS = 1_000_000
FIRST_TIME, LAST_TIME = 1_500_000_000, 1_600_000_000
Ints = npt.NDArray[np.int64]
Draw = Callable[[np.random.Generator, int, int], tuple[Ints, Ints]]


def skewed(draw: np.random.Generator, count: int, total: int) -> tuple[Ints, Ints]:
    """Users and items of ``count`` of ``total`` events: a few of each have most events."""
    users, items = max(2, total // 20), max(2, total // 100)
    user = (users * draw.random(count) ** 3).astype(np.int64)
    return user, (items * draw.random(count) ** 4).astype(np.int64)


def one_user(draw: np.random.Generator, count: int, total: int) -> tuple[Ints, Ints]:
    """Users and items of ``count`` events, three in five of them of user 0."""
    users = items = max(2, total // 60)
    user = np.where(draw.random(count) < 0.6, 0, draw.integers(1, users, count))
    return user, draw.integers(0, items, count)


def one_user_and_item(draw: np.random.Generator, count: int, total: int) -> tuple[Ints, Ints]:
    """Users and items of ``count`` events, a tenth of them of user 0 and a tenth of item 0."""
    users = items = max(2, total // 60)
    user = np.where(draw.random(count) < 0.1, 0, draw.integers(1, users, count))
    return user, np.where(draw.random(count) < 0.1, 0, draw.integers(1, items, count))


def many_users(draw: np.random.Generator, count: int, _: int) -> tuple[Ints, Ints]:
    """Users and items of ``count`` events, nearly all of them of a user of their own."""
    user = draw.integers(0, 1 << 40, count)
    user[: count // 1000] = np.arange(count // 1000) % 100  # some have enough to train on
    return user, draw.integers(0, 100_000, count)


DRAWS: dict[str, Draw] = {
    **{"integers": skewed, "strings": skewed},
    **{"one-user": one_user, "skew": one_user_and_item, "text-users": many_users},
}
KINDS = ("synth", *DRAWS)


def write_log(
    kind: str, path: Path, num_events: int, seed: int = 0, like: int | None = None
) -> None:
    """Write a log of one of the KINDS; memory is that of one block, whatever the size.

    Args:
        kind: one of KINDS.
        path: file to write.
        num_events: how many events.
        seed: of the draws.
        like: draw from the users and items of a log of so many events; ``synth`` cannot.
    """
    if kind == "synth":
        users, items = num_events // 20, num_events // 100
        write_synth(SynthConfig(users=users, items=items, events=num_events, seed=seed), path)
        return
    text = kind in ("strings", "text-users")
    ids = pa.string() if text else pa.int64()
    columns = [("user_id", ids), ("item_id", ids), ("timestamp", pa.int64())]
    draw = np.random.default_rng(seed)
    with pq.ParquetWriter(path, pa.schema(columns), compression="zstd") as writer:
        for start in range(0, num_events, BLOCK_EVENTS):
            count = min(BLOCK_EVENTS, num_events - start)
            user, item = DRAWS[kind](draw, count, like or num_events)
            time = draw.integers(FIRST_TIME, LAST_TIME, count)
            values: list[Any] = [user, item]
            if text:
                values = [[f"user-{k:09d}-abcdef" for k in user], [f"item/{k:08d}" for k in item]]
            arrays = [pa.array(column) for column in (*values, time)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=writer.schema))


def main() -> None:
    """Read the command line and write the log."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("path", type=Path)
    parser.add_argument("--events", type=int, default=20_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_log(options.kind, options.path, options.events, options.seed)


if __name__ == "__main__":
    main()
