r"""What a model must beat: build and ranking time, memory and quality of each baseline on a log.

Each baseline is counted and evaluated in a process of its own.

    python benchmarks/what_to_beat.py beauty.parquet --prepare split=leave_one_out
    python benchmarks/what_to_beat.py epinions.parquet --split validation test
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).parent))
from record import RESULTS, Results, call_fresh, peak_rss_bytes

from shardrec.pipeline.baseline import BaselineConfig, Kind, baseline
from shardrec.pipeline.config import override
from shardrec.pipeline.evaluate import evaluate
from shardrec.pipeline.model.config import MeasureConfig
from shardrec.pipeline.prepare import PrepareConfig, prepare

SHOWN = ("NDCG@10", "HitRate@10", "Coverage@10", "NDCG@10/known")


def run_once(job: dict[str, Any]) -> dict[str, Any]:
    """Build one baseline in this process; returns its time, peak memory and metrics."""
    folder = Path(job["data"]) / "measured"
    shutil.rmtree(folder, ignore_errors=True)
    config = BaselineConfig(prepared=job["data"], kind=job["kind"], output=str(folder))
    built = baseline(config)
    answer = {
        "build_s": round(built.seconds, 2),
        "build_peak_bytes": peak_rss_bytes(),
        "pairs": built.manifest["counts"]["pairs"],
    }
    for split in job["splits"]:
        started = time.monotonic()
        report = evaluate(
            str(folder), job["data"], MeasureConfig(ks=(10,)), split=split, force=True
        )
        answer[split] = {name: round(report["metrics"][name], 5) for name in SHOWN}
        answer[split]["error"] = round(report["standard_errors"]["NDCG@10"], 5)
        answer[split] |= {"users": report["metrics"]["users"]}
        answer[split]["seconds"] = round(time.monotonic() - started, 1)
    return answer | {"peak_bytes": peak_rss_bytes()}


def main() -> None:
    """Read the command line and measure what is not in the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=Path, nargs="?", help="event log")
    parser.add_argument("--prepare", nargs="*", default=[], help="options of prepare: name=value")
    parser.add_argument("--kinds", nargs="+", default=list(get_args(Kind)))
    parser.add_argument("--split", nargs="+", default=["validation"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/what_to_beat"))
    parser.add_argument("--output", default=str(RESULTS / "what_to_beat.jsonl"))
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job is not None:
        print(json.dumps(run_once(options.job)))
        return
    data = options.work / "-".join([options.log.stem, *options.prepare])
    config = PrepareConfig(events=str(options.log), output=str(data), threads=options.threads)
    prepare(override(config, options.prepare))
    results = Results(options.output)
    for kind in options.kinds:
        key = {"log": options.log.stem, "prepare": options.prepare, "kind": kind}
        key |= {"splits": options.split}
        if not results.has(key):
            job = {"data": str(data), "kind": kind, "splits": options.split}
            results.append(key, **call_fresh(__file__, job))


if __name__ == "__main__":
    main()
