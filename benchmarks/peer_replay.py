"""The RePlay trainer of peers.py, run with the python of its own environment."""

import argparse
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning
import torch
from replay.data.nn.parquet.parquet_module import ParquetModule
from replay.nn.lightning import LightningModule
from replay.nn.lightning.optimizer import OptimizerFactory
from replay.nn.loss import CESampled
from replay.nn.transform import UniformNegativeSamplingTransform
from replay.nn.transform.template import make_default_sasrec_transforms

sys.path.insert(0, str(Path(__file__).parent))
from lightning_clock import Clock
from record import peak_rss_bytes, rss_bytes
from replay_sasrec import build


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train for warm-up and steps; returns step times, peak memory and losses."""
    imports = rss_bytes()
    torch.set_num_threads(job["threads"])
    lightning.seed_everything(1)
    num_items = job["num_items"]
    schema, model = build(job, num_items, dropout=0.2)
    transforms = make_default_sasrec_transforms(schema)
    if not job["full"]:
        model.loss = CESampled(ignore_index=num_items)
        model.loss.logits_callback = model.get_logits
        transforms["train"].append(UniformNegativeSamplingTransform(num_items, job["negatives"]))
    data = ParquetModule(
        batch_size=job["batch"],
        # One more than the length: the next-token transform takes it off again.
        metadata={"train": {"item_id": {"shape": job["length"] + 1, "padding": num_items}}},
        transforms={"train": transforms["train"]},
        train_path=job["sequences"],
    )
    clock = Clock(lambda batch: int(batch["target_padding_mask"].sum()))
    lightning.Trainer(
        max_steps=job["warmup"] + job["steps"],
        accelerator="cpu",
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    ).fit(LightningModule(model, OptimizerFactory(learning_rate=1e-3)), data)
    return clock.answer(job["warmup"]) | {
        "peak_bytes": peak_rss_bytes(),
        "import_bytes": imports,
        "num_items": num_items,
        "trainer_version": metadata.version("replay-rec"),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", type=json.loads, required=True)
    print(json.dumps(run(parser.parse_args().job)))
