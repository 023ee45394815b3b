"""Check that all ranks were started with the same options, data and code.

Ranks that differ would otherwise train together silently, and the run could not be reproduced.
"""

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

import shardrec
from shardrec.pipeline.checkpoint.state import versions
from shardrec.pipeline.outputs.addresses import without_keys
from shardrec.pipeline.ranks import on_all_ranks

__all__ = ["code_facts", "require_same"]


def require_same(facts: Mapping[str, Any], group: dist.ProcessGroup | None) -> None:
    """Raise on all ranks if the facts of one differ from those of rank 0.

    Args:
        facts: facts of this rank by name; small values that can be compared.
        group: the ranks.

    Raises:
        ValueError: a rank differs; the message names the first one and the facts that differ.

    Collectives: one all-gather of small objects.
    """
    first, *others = found = on_all_ranks(lambda: dict(facts), group)
    if not all(isinstance(one, dict) for one in found):  # they are at another collective
        raise ValueError(
            "all ranks must be started with the same command, got another on one of them; start "
            "all of them again with one"
        )
    for rank, theirs in enumerate(others, start=1):
        differing = [
            f"{name}={_shown(theirs, name)} for {_shown(first, name)}"
            for name in sorted(
                first.keys() | theirs.keys(), key=lambda name: (name != "stage", name)
            )
            if first.get(name) != theirs.get(name)
        ]
        if differing:
            shown = differing[:5] + [f"{len(differing) - 5} more"] * (len(differing) > 5)
            raise ValueError(
                "all ranks must be started with the same options, data and code as rank 0, got "
                f"{', '.join(shown)} on rank {rank}; start them with the same command"
            )


def code_facts() -> dict[str, str]:
    """Versions that affect the results of this process, and a digest of this package's code."""
    return {f"version of {name}": version for name, version in versions().items()} | {
        "code": _code_digest()
    }


@functools.cache
def _code_digest() -> str:
    found, folder = hashlib.sha256(), Path(shardrec.__file__).parent
    for part in ("kernels", "modules", "pipeline", "launch"):
        for path in sorted((folder / part).rglob("*.py")):
            found.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:12]


def _shown(facts: Mapping[str, Any], name: str) -> str:
    return without_keys(str(facts[name])) if name in facts else "nothing"
