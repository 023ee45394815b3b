"""The RePlay part of recommend.py, run with the python of its own environment."""

import argparse
import json
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning
import torch
from replay.data.nn.parquet.parquet_module import ParquetModule
from replay.nn.lightning import LightningModule
from replay.nn.lightning.callback import PandasTopItemsCallback
from replay.nn.lightning.postprocessor import SeenItemsFilter
from replay.nn.transform import CopyTransform
from replay.nn.transform.template import make_default_sasrec_transforms

sys.path.insert(0, str(Path(__file__).parent))
from record import peak_rss_bytes, rss_bytes
from replay_sasrec import build


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Recommends for all histories; seconds, peak memory."""
    imports = rss_bytes()
    torch.set_num_threads(job["threads"])
    lightning.seed_everything(1)
    num_items = job["catalog"]
    schema, model = build(job, num_items, dropout=0.0)
    transforms = make_default_sasrec_transforms(schema)["predict"]
    data = ParquetModule(
        batch_size=job["batch"],
        metadata={
            "predict": {
                "user_id": {},
                "item_id": {"shape": job["length"], "padding": num_items},
            }
        },
        transforms={"predict": [CopyTransform({"item_id": "seen_ids"}), *transforms]},
        config={},
        predict_path=job["histories"],
    )
    lists = PandasTopItemsCallback(
        job["k"], "user_id", "item_id", postprocessors=[SeenItemsFilter(num_items)]
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        callbacks=[lists],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=True,
    )
    start = time.perf_counter()
    trainer.predict(LightningModule(model), data, return_predictions=False)
    rows = lists.get_result()
    seconds = time.perf_counter() - start
    if len(rows) != job["users"] * job["k"]:
        raise RuntimeError(f"every user must have a full list, got {len(rows)} rows")
    return {
        "seconds": seconds,
        "peak_bytes": peak_rss_bytes(),
        "import_bytes": imports,
        "num_items": num_items,
        "version": metadata.version("replay-rec"),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", type=json.loads, required=True)
    print(json.dumps(run(parser.parse_args().job)))
