"""Users per second that the evaluate stage ranks over the whole catalog.

The speed does not depend on the weights: without a run folder a model is trained for one step.

    python benchmarks/evaluate.py PREPARED --recipe epinions --workers 1 2
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from record import RESULTS, SHARDREC, Results, run_logged


def one_step(options: argparse.Namespace) -> Path:
    """A run folder with a checkpoint after one step."""
    run: Path = options.work / f"{Path(options.data).name}-one-step"
    if not (run / "checkpoints").exists():
        settings = [
            "limits.max_steps=1",
            "validation.every_epochs=none",
            "validation.patience=none",
        ]
        stage = ["train", "--prepared", options.data, "--run", str(run), "--recipe", options.recipe]
        log = options.work / "evaluate.log"
        run_logged([*SHARDREC, *stage, *settings], options.threads, log)
    return run


def measure(run: Path, workers: int, options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate once in fresh processes; returns users per second and peak memory."""
    stage = ["evaluate", "--prepared", options.data, "--run", str(run)]
    stage += ["--checkpoint", "last", "--force"]
    if workers > 1:
        threads = f"OMP_NUM_THREADS={options.threads}"
        stage = ["launch", "evaluate", "-j", f"1x{workers}", "--env", threads, "--", *stage[1:]]
    peak = run_logged([*SHARDREC, *stage], options.threads, options.work / "evaluate.log")
    report = json.loads((run / "metrics.json").read_text())
    return {
        "users": report["metrics"]["users"],
        "num_items": report["protocol"]["num_items"],
        "seconds": round(report["seconds"], 3),
        "users_per_second": round(report["users_per_second"], 1),
        "peak_gib": round(peak / 2**30, 3),
    }


def main() -> None:
    """Run the missing measurements and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder of `shardrec prepare`")
    parser.add_argument("--run", type=Path, help="folder of `shardrec train`")
    parser.add_argument("--recipe", default="epinions")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/evaluate"))
    parser.add_argument("--output", default=str(RESULTS / "evaluate_cpu.jsonl"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    run = options.run or one_step(options)
    results = Results(options.output)
    for workers in options.workers:
        for repeat in range(options.repeats):
            key = {"data": Path(options.data).name, "recipe": options.recipe, "repeat": repeat}
            key |= {"workers": workers, "threads": options.threads}
            if not results.has(key):
                results.append(key, **measure(run, workers, options))


if __name__ == "__main__":
    main()
