"""``precision`` decides the dtype of the products of encoder and loss, and nothing else."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pipeline.small_data import small_config

from shardrec.kernels.loss import operator
from shardrec.kernels.loss.inputs import prepare_inputs
from shardrec.modules.catalog_config import CatalogConfig
from shardrec.modules.losses import CCE, HCE, RECE, SCE, CCEMinus, Loss
from shardrec.pipeline.config import override
from shardrec.pipeline.model.model import in_bfloat16
from shardrec.pipeline.plan import Machine, plan
from shardrec.pipeline.recipes import tiny_cpu
from shardrec.pipeline.run.config import LimitConfig, ValidationConfig
from shardrec.pipeline.train import build, train

SEEN = set[tuple[torch.dtype, torch.dtype]]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> SEEN:
    """Dtypes of states and rows in the products of every loss that is called."""
    seen = SEEN()

    def recorded(*args: Any, **options: Any) -> Any:
        inputs = prepare_inputs(*args, **options)
        seen.add((inputs.states.dtype, inputs.scaled_rows().dtype))
        return inputs

    monkeypatch.setattr(operator, "prepare_inputs", recorded)
    return seen


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)],
)
def test_training_multiplies_in_the_dtype_of_the_option(
    plain_data: str, tmp_path: Path, products: SEEN, precision: str, dtype: torch.dtype
) -> None:
    train(small_config(plain_data, tmp_path / "run", precision=precision))
    assert products == {(dtype, dtype)}


def test_weights_table_and_optimizer_states_stay_in_float32(
    plain_data: str, tmp_path: Path
) -> None:
    catalog = CatalogConfig(optimizer="adam")
    run = build(small_config(plain_data, tmp_path / "run", precision="bfloat16", catalog=catalog))
    run.stepper.take(list(islice(run.batches, 1)), 1)
    moments = [one for state in run.stepper.optimizer.state.values() for one in state.values()]
    table = run.stepper.model.catalog.state_dict()
    held = [*run.stepper.parameters, *moments, table["rows"], table["optimizer.exp_avg"]]
    assert {one.dtype for one in held} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("loss", [CCE(), CCEMinus(), SCE(), RECE(), HCE()], ids=lambda x: x.name)
def test_every_loss_trains_in_bfloat16(
    plain_data: str, tmp_path: Path, products: SEEN, loss: Loss
) -> None:
    options: dict[str, Any] = {
        "loss": loss,
        "catalog": CatalogConfig(optimizer="adam", learning_rate=1e-2),
        "validation": ValidationConfig(metric="NDCG@10", every_epochs=3),
        "limits": LimitConfig(max_epochs=6),
    }
    exact = train(small_config(plain_data, tmp_path / "exact", **options))
    rounded = train(small_config(plain_data, tmp_path / "rounded", precision="bfloat16", **options))
    assert (torch.bfloat16, torch.bfloat16) in products
    assert rounded.num_skipped == 0
    assert rounded.best_metrics["NDCG@10"] > 0.5 * exact.best_metrics["NDCG@10"] > 0.05


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)]
)
def test_auto_is_bfloat16_on_gpus_that_have_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert in_bfloat16("auto", torch.device("cuda", 0)) is expected
    assert in_bfloat16("bfloat16", torch.device("cuda", 0))
    assert not in_bfloat16("float32", torch.device("cuda", 0))
    assert not in_bfloat16("auto", torch.device("cpu"))


def test_a_plan_counts_states_and_a_copy_of_the_rows_in_bfloat16() -> None:
    config = override(tiny_cpu("none", "none"), ["encoder.width=64", "loss=cce"])
    machine = Machine(ranks=2, device="cuda", libraries_gb=0.0)
    exact = plan(override(config, ["precision=float32"]), 1_000_000, machine)
    rounded = plan(config, 1_000_000, machine)
    assert rounded == plan(override(config, ["precision=bfloat16"]), 1_000_000, machine)
    assert rounded.moved["states, twice"] == exact.moved["states, twice"] / 2
    copy = rounded.memory["loss workspace"] - exact.memory["loss workspace"]
    assert copy == pytest.approx(2 * 500_000 * 64, rel=0.1)
    same = ("table", "optimizer state", "gradient", "checkpoint copy")
    assert [rounded.memory[name] for name in same] == [exact.memory[name] for name in same]
