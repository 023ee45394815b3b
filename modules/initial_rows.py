"""Initial values of the item table, which depend on the item and not on the rank."""

import hashlib

import torch
from torch import Tensor

__all__ = ["fill_initial_rows"]

INITIAL_BLOCK = 8_192  # rows per seed; another number would change the rows of every seed


def fill_initial_rows(rows: Tensor, first_row: int, seed: int, std: float) -> None:
    """Fills (R, D) ``rows`` with those from ``first_row`` on of the table that the seed defines."""
    digest = hashlib.blake2b(f"item rows {seed}".encode(), digest_size=4).digest()
    base = int.from_bytes(digest, "little")
    generator = torch.Generator()
    last_row = first_row + rows.shape[0]
    for block in range(first_row // INITIAL_BLOCK, -(-last_row // INITIAL_BLOCK)):
        generator.manual_seed((base + block) % 2**32)  # torch's CPU generator reads 32 bits
        values = torch.empty(INITIAL_BLOCK, rows.shape[1]).normal_(0, std, generator=generator)
        base_row = block * INITIAL_BLOCK
        start, stop = max(first_row, base_row), min(last_row, base_row + INITIAL_BLOCK)
        if start < stop:
            rows[start - first_row : stop - first_row] = values[start - base_row : stop - base_row]
