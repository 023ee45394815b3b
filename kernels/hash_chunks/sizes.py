"""How many hashed vectors are sorted at a time on a GPU, and the memory that takes."""

__all__ = ["rounds_at_once", "sort_bytes"]

# Vectors of all rounds that are sorted at a time.
KEYS_AT_ONCE = 1 << 26
# The order is int64, the buckets are narrow and copied to int32, and a radix sort needs both twice.
_KEY_BYTES = 28


def rounds_at_once(num_vectors: int) -> int:
    """Rounds in which the vectors are sorted at a time, at least one."""
    return max(1, KEYS_AT_ONCE // max(1, num_vectors))


def sort_bytes(num_vectors: int, num_rounds: int) -> int:
    """Peak bytes of sorting all vectors by bucket."""
    return _KEY_BYTES * num_vectors * min(num_rounds, rounds_at_once(num_vectors))
