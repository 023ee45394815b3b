"""How far are the losses from the full softmax that they stand for, on a trained model?

For each loss and its draws: the mean of its values, and the relative error of its gradient of the
states, against the exact ones of ``cce`` on the same batches. Every loss compares a position with
as many items.

    python benchmarks/loss_error.py PREPARED RUN --candidates 512
"""

import argparse
from itertools import islice

import torch
from record import RESULTS, Results
from torch import Tensor

from shardrec.modules.losses import CCE, HCE, SCE, CCEMinus, Loss, Step
from shardrec.pipeline.model.model import Model
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.prepared.loader import TrainingBatches
from shardrec.pipeline.run.trained import Source


def batches_of(model: Model, source: Source, prepared: Prepared, num: int) -> list[list[Tensor]]:
    """(N, D) states and (N,) targets of some training batches."""
    length, seed = source.config.encoder.max_length, 12345
    loader = TrainingBatches(prepared, source.config.batches, max_length=length, seed=seed)
    found = []
    for batch in islice(loader, num):
        states = model.states(batch.items, batch.lengths).detach()
        found.append([states, batch.targets.flatten()[batch.real_positions()]])
    return found


def value_and_gradient(
    loss: Loss, states: Tensor, table: Tensor, targets: Tensor, step: int
) -> tuple[float, Tensor]:
    """The mean loss and its (N, D) gradient of the states."""
    states = states.clone().requires_grad_()
    value = loss(states, table, targets, step=Step(seed=7, step=step)).loss
    return float(value.detach()), torch.autograd.grad(value, states)[0]


def main() -> None:
    """Measures each loss that is not in the file of results yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prepared")
    parser.add_argument("run")
    parser.add_argument("--candidates", type=int, default=512)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--output", default=str(RESULTS / "loss_error.jsonl"))
    options = parser.parse_args()
    prepared = Prepared.open(options.prepared)
    source = Source.find(options.run, prepared, "last")
    model = source.load(prepared)
    table = model.scored_shard().rows.clone()
    batches = batches_of(model, source, prepared, options.batches)
    exact = [value_and_gradient(CCE(), x, table, y, 0) for x, y in batches]
    half = options.candidates // 2
    losses: list[Loss] = [
        CCEMinus(num_negatives=options.candidates, share=128),
        CCEMinus(num_negatives=options.candidates, share=1),
        SCE(items_per_bucket=options.candidates),
        HCE(items_per_bucket=half, num_negatives=half),
    ]
    results = Results(options.output)
    for loss in losses:
        key = {"loss": repr(loss), "items": prepared.num_items, "data": prepared.fingerprint}
        if results.has(key):
            continue
        values, errors = [], []
        for (states, targets), (_, truth) in zip(batches, exact, strict=True):
            for draw in range(options.draws):
                value, found = value_and_gradient(loss, states, table, targets, draw)
                values.append(value)
                errors.append(float((found - truth).norm() / truth.norm()))
        results.append(
            key,
            exact_loss=sum(value for value, _ in exact) / len(exact),
            loss=sum(values) / len(values),
            gradient_error=sum(errors) / len(errors),
        )


if __name__ == "__main__":
    main()
