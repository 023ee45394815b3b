"""Compare two source trees bit by bit: 20 steps of ``tiny_cpu`` per loss on 1 and 2 ranks.

A refactoring must not change a number. Exits with 1 where a loss or a gradient norm differs::

    shardrec synth --output log.parquet && shardrec prepare --events log.parquet --output data
    python benchmarks/same_losses.py data OLD/src NEW/src
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LOSSES = ("CCE", "CCEMinus", "SCE", "RECE", "EagerCE", "BCE", "GBCE")


def main(data: str, old: str, new: str) -> None:
    """Prints, for each loss and number of ranks, whether both trees compute the same."""
    is_same = True
    for num_ranks in (1, 2):
        expected, found = (losses_of(tree, data, num_ranks) for tree in (old, new))
        for name in LOSSES:
            pairs = list(zip(expected[name], found[name], strict=True))
            changed = [step for step, (one, other) in enumerate(pairs, 1) if one != other]
            is_same = is_same and not changed
            outcome = f"differs from step {changed[0]}" if changed else "same"
            print(f"{name:<10}{num_ranks} ranks, {len(pairs)} steps: {outcome}", flush=True)
    raise SystemExit(not is_same)


def losses_of(tree: str, data: str, num_ranks: int) -> dict[str, list[str]]:
    """Losses and norms of rank 0 of ``num_ranks`` processes that import ``tree``, by loss."""
    environment = os.environ | {"PYTHONPATH": tree, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--rank", data, folder, str(num_ranks)]
        ranks = [subprocess.Popen([*command, str(r)], env=environment) for r in range(num_ranks)]
        if any([rank.wait() for rank in ranks]):
            raise SystemExit(f"{tree} must train on {num_ranks} ranks, got an error; see above")
        found: dict[str, list[str]] = json.loads(Path(folder, "losses.json").read_text())
        return found


def train_on_rank(data: str, folder: str, num_ranks: str, rank: str) -> None:
    """Trains with each loss; rank 0 writes every loss and gradient norm in hexadecimal."""
    import torch.distributed as dist

    from shardrec.modules import losses
    from shardrec.pipeline.recipes import tiny_cpu
    from shardrec.pipeline.train import train

    if int(num_ranks) > 1:
        where = f"file://{folder}/rendezvous"
        dist.init_process_group("gloo", where, rank=int(rank), world_size=int(num_ranks))
    found: dict[str, list[str]] = {}
    for name in LOSSES:
        config = tiny_cpu(data, f"{folder}/{name}")
        config = dataclasses.replace(config, loss=getattr(losses, name)(), show_progress=False)
        train(config, callbacks=[recorder(found.setdefault(name, []))])
    if rank == "0":
        Path(folder, "losses.json").write_text(json.dumps(found))


def recorder(steps: list[str]) -> Any:
    """A callback that records each step; finds its base class in old and new trees."""

    def on_step(report: Any) -> None:
        steps.append(f"{report.loss.hex()} {report.gradient_norm.hex()}")

    idle = dict.fromkeys(("on_validation", "on_checkpoint", "on_end"), lambda report: None)
    return SimpleNamespace(on_step=on_step, **idle)


if __name__ == "__main__":
    train_on_rank(*sys.argv[2:]) if sys.argv[1] == "--rank" else main(*sys.argv[1:])
