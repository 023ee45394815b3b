"""Our part of recommend.py, run in a process of its own."""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from record import peak_rss_bytes, rss_bytes

from shardrec.pipeline.recommend import RecommendConfig, recommend


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Recommends for all histories; seconds after loading, peak memory."""
    imports = rss_bytes()
    torch.set_num_threads(job["threads"])
    with tempfile.TemporaryDirectory() as output:
        config = RecommendConfig(
            run=str(Path(job["folder"]) / "run"),
            prepared=str(Path(job["folder"]) / "prepared"),
            output=f"{output}/lists",
            histories=job["histories"],
            items_column="item_id",
            k=job["k"],
            min_count=0,
            checkpoint="last",
            batch_size=job["batch"],
        )
        done = recommend(config)
    counts = done.manifest["counts"]
    if counts["short_lists"] or counts["users"] != job["users"]:
        raise RuntimeError(f"every user must have a full list, got {counts}")
    return {
        "seconds": job["users"] / done.users_per_second,
        "peak_bytes": peak_rss_bytes(),
        "import_bytes": imports,
        "num_items": counts["items"],
        "version": "this commit",
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", type=json.loads, required=True)
    print(json.dumps(run(parser.parse_args().job)))
