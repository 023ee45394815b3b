"""The RecTools trainer of peers.py, run with the python of its own environment."""

import argparse
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from pytorch_lightning import Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

sys.path.insert(0, str(Path(__file__).parent))
from lightning_clock import Clock
from record import peak_rss_bytes, rss_bytes


def interactions(sequences: str) -> pd.DataFrame:
    """One row an event, from sequences of items."""
    table = pq.read_table(sequences, columns=["user_id", "item_id"]).to_pandas()
    events = table.explode("item_id", ignore_index=True)
    start = pd.Timestamp("2020-01-01")
    return pd.DataFrame(
        {
            Columns.User: events["user_id"],
            Columns.Item: events["item_id"].astype(np.int64),
            Columns.Weight: 1.0,
            Columns.Datetime: start + pd.to_timedelta(np.arange(len(events)), unit="s"),
        }
    )


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train for warm-up and steps; returns step times, peak memory and losses."""
    imports = rss_bytes()
    torch.set_num_threads(job["threads"])
    seed_everything(1)
    dataset = Dataset.construct(interactions(job["sequences"]))
    model = SASRecModel(
        n_blocks=2,
        n_heads=2,
        n_factors=job["width"],
        dropout_rate=0.2,
        session_max_len=job["length"],
        batch_size=job["batch"],
        loss="softmax" if job["full"] else "sampled_softmax",
        n_negatives=job["negatives"],
        lr=1e-3,
    )
    clock = Clock(lambda batch: int((batch["y"] > 0).sum()))
    model._trainer = Trainer(
        max_steps=job["warmup"] + job["steps"],
        accelerator="cpu",
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model.fit(dataset)
    # The model works on a copy of the trainer.
    (clock,) = (one for one in model.fit_trainer.callbacks if isinstance(one, Clock))
    return clock.answer(job["warmup"]) | {
        "peak_bytes": peak_rss_bytes(),
        "import_bytes": imports,
        "num_items": dataset.item_id_map.size,
        "trainer_version": metadata.version("rectools"),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", type=json.loads, required=True)
    print(json.dumps(run(parser.parse_args().job)))
