"""What a compiler makes of the Triton kernels, beside what they cannot do without."""

from compiled.builds import (
    ARCHITECTURES,
    MAX_SHARED_BYTES,
    Build,
    Case,
    build,
    shipped_cases,
)
from compiled.least_work import LeastWork, least_work

__all__ = [
    "ARCHITECTURES",
    "MAX_SHARED_BYTES",
    "Build",
    "Case",
    "LeastWork",
    "build",
    "least_work",
    "shipped_cases",
]
