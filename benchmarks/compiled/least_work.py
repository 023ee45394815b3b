"""Lower bounds on the work of one iteration of a kernel's loops, from its tile shape."""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["LeastWork", "least_work"]

# Bytes in addition to the row, for each line of a gathering kernel: indices and weights.
_LIST_BYTES = {
    "gathered_forward": 8,
    "gathered_states_backward": 8,
    "gathered_rows_backward": 20,
    "add_rows": 12,
    "score_groups": 0,
}


@dataclass(frozen=True, slots=True)
class LeastWork:
    """Lower bounds for a program in one iteration of each loop.

    Attributes:
        multiply_adds: Products of the tile.
        exponentials: One for each logit of the tile.
        bytes_read: Bytes of the tile's elements that change in every iteration, each read once.
    """

    multiply_adds: int
    exponentials: int
    bytes_read: int

    def instructions(self, num_warps: int, multiply_adds_each: float) -> float:
        """Instructions of one warp: products, one exponential per lane, reads of 16 bytes per lane.

        Args:
            num_warps: Warps of the program.
            multiply_adds_each: Of a program's instructions of products, for each one of a warp.
        """
        lanes = 32 * num_warps
        products = self.multiply_adds / multiply_adds_each
        return products + self.exponentials / lanes + self.bytes_read / (16 * lanes)


def least_work(
    name: str, constants: Mapping[str, int | bool | str | None], element_bytes: int
) -> LeastWork:
    """The lower bounds of a kernel; all 0 for one that only draws from counters.

    Args:
        name: Of a shipped case.
        constants: Its compile-time arguments.
        element_bytes: Of the dtype of states and rows.

    >>> tile = {"POSITIONS": 64, "ITEMS": 32, "WIDTH": 16, "PRECISION": "ieee"}
    >>> least_work("listed_forward", tile, 2)
    LeastWork(multiply_adds=32768, exponentials=2048, bytes_read=3072)
    """
    if "PRECISION" in constants:
        return _of_products(name, constants, element_bytes)
    kind = name.removesuffix("_offsets")
    if kind not in _LIST_BYTES:
        return LeastWork(0, 0, 0)
    lines = int(constants.get("ITEMS") or constants["LINES"] or 0)
    width = int(constants.get("WIDTH") or constants["OUT"] or 0)
    size = 4 if kind == "add_rows" else element_bytes
    in_lists = lines * (_LIST_BYTES[kind] + 4 * bool(constants.get("OFFSETS")))
    query = width * size if kind == "score_groups" else 0
    products = lines * width * (2 if kind == "gathered_states_backward" else 1)
    exponentials = lines if kind in ("gathered_forward", "gathered_states_backward") else 0
    return LeastWork(products, exponentials, lines * width * size + in_lists + query)


def _of_products(
    name: str, constants: Mapping[str, int | bool | str | None], element_bytes: int
) -> LeastWork:
    width, out = int(constants["WIDTH"] or 0), int(constants.get("OUT") or 0)
    positions = int(constants["POSITIONS"] or 0)
    if name == "mixed_signs":
        # Signs, 128 columns of them, are made and not read.
        return LeastWork(positions * 128 * width, 0, positions * width * element_bytes)
    items = int(constants["ITEMS"] or 0)
    if name == "best_sign_direction":
        read = (positions + items) * width * element_bytes
        return LeastWork(positions * items * width, 0, read)
    turning = positions if "rows_backward" in name else items
    elements = (positions + items) * width + turning * out
    if constants.get("HOLD"):
        elements = turning * width
    exponentials = positions * items if name.startswith(("full", "listed")) else 0
    return LeastWork(positions * items * (width + out), exponentials, elements * element_bytes)
