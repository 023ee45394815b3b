"""The RecTools part of recommend.py, run with the python of its own environment."""

import argparse
import json
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Trainer, seed_everything
from rectools.dataset import Dataset
from rectools.models import SASRecModel

sys.path.insert(0, str(Path(__file__).parent))
from peer_rectools import interactions
from record import peak_rss_since_reset, reset_peak_rss, rss_bytes


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Recommends for all histories after one step of training; seconds, peak memory."""
    imports = rss_bytes()
    torch.set_num_threads(job["threads"])
    seed_everything(1)
    dataset = Dataset.construct(interactions(job["histories"]))
    model = SASRecModel(
        n_blocks=2,
        n_heads=2,
        n_factors=job["width"],
        session_max_len=job["length"],
        batch_size=8,
        loss="sampled_softmax",
        n_negatives=1,
        recommend_batch_size=job["batch"],
    )
    model._trainer = Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model.fit(dataset)
    reset_peak_rss()  # what the step took does not count
    start = time.perf_counter()
    rows = model.recommend(np.arange(job["users"]), dataset=dataset, k=job["k"], filter_viewed=True)
    seconds = time.perf_counter() - start
    if len(rows) != job["users"] * job["k"]:
        raise RuntimeError(f"every user must have a full list, got {len(rows)} rows")
    return {
        "seconds": seconds,
        "peak_bytes": peak_rss_since_reset(),
        "import_bytes": imports,
        "num_items": dataset.item_id_map.size,
        "version": metadata.version("rectools"),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", type=json.loads, required=True)
    print(json.dumps(run(parser.parse_args().job)))
