"""What the options of the losses may be; a name means the same in every loss."""

import dataclasses
from typing import Any

from shardrec.modules.option_checks import (
    require_above_zero,
    require_at_least,
    require_choice,
    require_within,
)

__all__ = ["LEAST", "RANGES", "WORDS", "check_options"]

# The smallest of each whole number. There is no largest: a bucket takes at most what there is.
LEAST = {
    "num_negatives": 1,
    "share": 0,
    "num_buckets": 0,
    "positions_per_bucket": 0,
    "items_per_bucket": 1,
    "num_chunks": 0,
    "num_rounds": 1,
    "num_neighbor_chunks": 0,
}
WORDS = {
    "proposal": ("uniform", "popularity", "in_batch", "mixed"),
    "align": ("bucket", "rank"),
}
# Counts of a large log to a higher power than 10 overflow, and leave one item to be drawn anyway.
RANGES = {
    "calibration": (0, 1, "0 is BCE, 1 calibrates the scores fully"),
    "popularity_exponent": (0, 10, "0 is uniform, 1 follows the counts"),
}


def check_options(loss: Any) -> None:
    """Refuses a loss, given as its dataclass, that would fail at its first batch.

    Raises:
        ValueError: An option is out of range; the message names it as ``train`` does.
    """
    for option in dataclasses.fields(loss):
        name, value = f"loss.{option.name}", getattr(loss, option.name)
        if option.name == "temperature":
            require_above_zero(name, value, "1.0 leaves the logits alone")
        elif option.name in LEAST:
            require_at_least(name, value, LEAST[option.name])
        elif option.name in WORDS:
            require_choice(name, value, WORDS[option.name])
        elif option.name in RANGES:
            require_within(name, value, *RANGES[option.name])
