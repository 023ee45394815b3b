"""Our losses inside RePlay's SASRec: what one changes, and what it saves.

    pip install "replay-rec[torch]" && pip install --no-deps .
    python examples/replay_loss.py --items 50000

Trains a few steps with RePlay's own full softmax, then with ours, then with sampled negatives, each
in a process of its own, and prints seconds a step and peak memory. The lines that matter are those
of ``ShardrecLoss`` and the one that gives it to the model; ``shardrec.kernels`` needs torch alone.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import lightning
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from replay.data import FeatureHint, FeatureSource, FeatureType
from replay.data.nn import TensorFeatureInfo, TensorFeatureSource, TensorSchema
from replay.data.nn.parquet.parquet_module import ParquetModule
from replay.nn.lightning import LightningModule
from replay.nn.lightning.optimizer import OptimizerFactory
from replay.nn.sequential.sasrec import SasRec
from replay.nn.transform.template import make_default_sasrec_transforms
from torch import Tensor

from shardrec.kernels import cut_cross_entropy, sampled_cross_entropy

LENGTH, WIDTH, BATCH, STEPS = 50, 64, 128, 8


class ShardrecLoss(torch.nn.Module):
    """A loss of RePlay that never makes the (positions, items) logits.

    Args:
        item_weights: Gives the (V, D) table, without the row of padding.
        num_negatives: None is the full softmax.
    """

    def __init__(self, item_weights: Callable[[], Tensor], num_negatives: int | None) -> None:
        """Stores both."""
        super().__init__()
        self._item_weights = item_weights
        self._num_negatives = num_negatives
        self._step = 0

    def forward(
        self,
        model_embeddings: Tensor,
        positive_labels: Tensor,
        target_padding_mask: Tensor,
        **_: Any,
    ) -> Tensor:
        """Mean loss of the real positions; labels and mask are (B, L, 1)."""
        real = target_padding_mask[..., 0]
        states, targets = model_embeddings[real], positive_labels[..., 0][real]
        table = self._item_weights()
        if self._num_negatives is None:
            return cut_cross_entropy(states, table, targets)
        self._step += 1
        return sampled_cross_entropy(
            states, table, targets, num_negatives=self._num_negatives, seed=1, step=self._step
        )


def sasrec(loss: str, num_items: int) -> tuple[SasRec, TensorSchema]:
    """RePlay's model, with its own full softmax or one of ours."""
    item = TensorFeatureInfo(
        "item_id",
        is_seq=True,
        feature_type=FeatureType.CATEGORICAL,
        embedding_dim=WIDTH,
        padding_value=num_items,
        cardinality=num_items,
        feature_hint=FeatureHint.ITEM_ID,
        feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")],
    )
    schema = TensorSchema([item])
    model = SasRec.from_params(
        schema, embedding_dim=WIDTH, num_heads=2, num_blocks=2, max_sequence_length=LENGTH
    )
    if loss != "RePlay":
        num_negatives = 256 if loss == "cce_minus" else None
        model.loss = ShardrecLoss(model.body.embedder.get_item_weights, num_negatives)
    return model, schema


class Clock(lightning.Callback):
    """Ends and losses of the steps."""

    def __init__(self) -> None:
        """Starts empty."""
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        """Notes a step."""
        self.ends.append(time.perf_counter())
        self.losses.append(float(outputs["loss"]))


def train(loss: str, num_items: int) -> dict[str, Any]:
    """Trains a few steps; median seconds, peak memory of this process, first and last loss."""
    lightning.seed_everything(1)
    model, schema = sasrec(loss, num_items)
    length = LENGTH + 1  # the next-token transform takes one off
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sequences.parquet"
        sequences = torch.randint(num_items, (BATCH * STEPS, length))
        pq.write_table(pa.table({"item_id": sequences.tolist()}), path)
        data = ParquetModule(
            batch_size=BATCH,
            metadata={"train": {"item_id": {"shape": length, "padding": num_items}}},
            transforms={"train": make_default_sasrec_transforms(schema)["train"]},
            train_path=str(path),
        )
        trainer = lightning.Trainer(
            max_steps=STEPS,
            accelerator="cpu",
            callbacks=[clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(LightningModule(model, OptimizerFactory(learning_rate=1e-3)), data)
    times = [end - start for start, end in zip(clock.ends[1:], clock.ends[2:], strict=False)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"s": median(times), "GiB": peak, "losses": (clock.losses[0], clock.losses[-1])}


def main() -> None:
    """Prints a line for each loss."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--loss", choices=["RePlay", "cce", "cce_minus"], help="of this process")
    options = parser.parse_args()
    if options.loss:
        print(json.dumps(train(options.loss, options.items)))
        return
    print(f"{options.items} items, {BATCH} sequences of {LENGTH}: s/step, peak GiB, losses")
    for loss in ("RePlay", "cce", "cce_minus"):
        command = [sys.executable, __file__, "--loss", loss, "--items", str(options.items)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        first, last = found["losses"]
        print(f"{loss:9}  {found['s']:.3f}  {found['GiB']:.2f}  {first:.3f} -> {last:.3f}")


if __name__ == "__main__":
    main()
