r"""What a memory beside the model is worth: the metrics of a run alone, and with `memorize`.

Runs the public stages, prepare, train, evaluate, memorize and evaluate again, for every seed and
setting. Each row has both reports, for lists without the seen items and for all items.

    python benchmarks/memory.py beauty.parquet --prepare split=leave_one_out --recipe beauty \
        --seeds 1 2

With --refit the scale is chosen by a run that leaves validation users out, and the test users are
ranked, once, by a run of the same options on all of the data.
"""

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from record import RESULTS, SHARDREC, Results, run_logged

METRICS = ("NDCG@10", "HitRate@10", "Coverage@10")
PROTOCOLS = {"unseen": "--filter-seen", "all": "--no-filter-seen"}


class Stages:
    """The stages on one prepared folder and run, each in a fresh process."""

    def __init__(self, options: argparse.Namespace, seed: int, *, on_all: bool = False) -> None:
        """Names the folders; ``on_all`` leaves no users out for validation."""
        self.options = options
        self.prepare_options = [*options.prepare, *(["validation=none"] if on_all else [])]
        self.data = options.work / "-".join(["prepared", options.log.stem, *self.prepare_options])
        settings = hashlib.sha256(json.dumps([options.recipe, options.set]).encode()).hexdigest()
        self.run = options.work / f"{options.log.stem}-{settings[:12]}-{seed}{'-all' * on_all}"
        self.train = ["--recipe", options.recipe, f"seed={seed}", *options.set]
        if on_all:
            self.train = [word for word in self.train if not word.startswith("validation.")]
            self.train += ["validation.every_epochs=none", "validation.every_steps=none"]

    def call(self, stage: str, *arguments: str) -> None:
        """Run one stage."""
        log = self.options.work / f"{self.run.name}.log"
        run_logged([*SHARDREC, stage, *arguments], self.options.threads, log)

    def prepare(self) -> None:
        """Prepare the log, if it is not done yet."""
        pairs = [pair.split("=", 1) for pair in self.prepare_options]
        flags = [word for name, value in pairs for word in (f"--{name.replace('_', '-')}", value)]
        self.call("prepare", "--events", str(self.options.log), "--output", str(self.data), *flags)

    def metrics(self) -> dict[str, dict[str, float]]:
        """Metrics of the run on the test users, by protocol."""
        found = {}
        for name, flag in PROTOCOLS.items():
            self.call("evaluate", *self.folders, "--force", flag)
            report = json.loads((self.run / "metrics.json").read_text())
            found[name] = {metric: round(report["metrics"][metric], 5) for metric in METRICS}
            found[name]["error"] = round(report["standard_errors"]["NDCG@10"], 5)
        return found

    @property
    def folders(self) -> list[str]:
        """The options that name both folders."""
        return ["--prepared", str(self.data), "--run", str(self.run)]

    def fit(self) -> None:
        """Prepare and train, if it is not done yet; a memory of before is removed."""
        self.prepare()
        if not (self.run / "end.json").exists():
            shutil.rmtree(self.run, ignore_errors=True)
            self.call("train", *self.folders, *self.train)
        shutil.rmtree(self.run / "memory", ignore_errors=True)

    def memorize(self, neighbors: int, *more: str) -> dict[str, Any]:
        """Memorize; returns the manifest of the memory."""
        self.call("memorize", *self.folders, "--neighbors", str(neighbors), *more)
        manifest: dict[str, Any] = json.loads((self.run / "memory/manifest.json").read_text())
        return manifest

    def seconds(self) -> float:
        """Wall time of the training run."""
        return round(float(json.loads((self.run / "end.json").read_text())["seconds"]), 1)


def measure(options: argparse.Namespace, seed: int, neighbors: int) -> dict[str, Any]:
    """One row: the test metrics of the model alone and with its memory, and how it was chosen."""
    chooses = Stages(options, seed)
    chooses.fit()
    row: dict[str, Any] = {}
    if not options.refit:
        row["model"] = chooses.metrics()
    memory = chooses.memorize(neighbors)
    row["tried"] = [
        {name: round(value, 5) for name, value in one.items()} for one in memory["tried"]
    ]
    (metric,) = {name for one in memory["tried"] for name in one} - {"scale"}
    scale = max(memory["tried"], key=lambda one: (one[metric], -one["scale"]))["scale"]
    tested = chooses
    if options.refit:
        tested = Stages(options, seed, on_all=True)
        tested.fit()
        row["model"] = tested.metrics()
        memory = tested.memorize(neighbors, "--scales", str(scale))
    row["with_memory"] = tested.metrics()
    (file,) = memory["files"]
    row |= {"scale": scale, "train_seconds": tested.seconds()}
    return row | {"pairs": file["rows"], "file_bytes": file["bytes"]}


def main() -> None:
    """Read the command line and measure what is not in the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=Path, help="event log")
    parser.add_argument("--prepare", nargs="*", default=[], help="options of prepare: name=value")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--set", nargs="*", default=[], help="options of train: dotted.name=value")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--neighbors", nargs="+", type=int, default=[32])
    parser.add_argument("--refit", action="store_true", help="test a run on all of the data")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/memory"))
    parser.add_argument("--output", default=str(RESULTS / "memory.jsonl"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    results = Results(options.output)
    for seed in options.seeds:
        for neighbors in options.neighbors:
            key = {"log": options.log.stem, "prepare": options.prepare, "recipe": options.recipe}
            key |= {"settings": options.set, "seed": seed, "neighbors": neighbors}
            key |= {"refit": options.refit}
            if not results.has(key):
                results.append(key, **measure(options, seed, neighbors))


if __name__ == "__main__":
    main()
