"""Recipes are complete configs that can be stored, changed and run."""

import json
from pathlib import Path

import pytest
from tests.pipeline.small_data import prepare_small

from shardrec.pipeline.config import describe, from_json, override, to_json
from shardrec.pipeline.recipes import RECIPES
from shardrec.pipeline.run.config import TrainConfig
from shardrec.pipeline.train import train


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_json_and_overrides(name: str) -> None:
    config = RECIPES[name](data="data", output="run")
    assert from_json(TrainConfig, json.loads(json.dumps(to_json(config)))) == config
    changed = override(config, ["loss=sce", "loss.items_per_bucket=64", "encoder.width=32"])
    assert (changed.loss.items_per_bucket, changed.encoder.width) == (64, 32)  # type: ignore[union-attr]
    assert "limits.max_epochs = " in describe(config)
    assert (RECIPES[name].__doc__ or "").endswith(".")


def test_a_misspelt_option_of_a_loss_lists_near_matches() -> None:
    config = RECIPES["demo"](data="data", output="run")
    with pytest.raises(ValueError, match="did you mean loss.num_negatives"):
        override(config, ["loss.num_negativs=3"])
    with pytest.raises(ValueError, match="did you mean cce_minus, cce"):
        override(config, ["loss=cce_minsu"])
    with pytest.raises(ValueError, match="did you mean validation.measure.filter_seen"):
        override(config, ["validation.measure.filter_sen=true"])


@pytest.mark.slow
def test_tiny_cpu_takes_twenty_steps_that_repeat_bit_by_bit(tmp_path: Path) -> None:
    data = prepare_small(tmp_path / "data")
    losses = []
    for name in ("first", "second"):
        config = RECIPES["tiny_cpu"](data=data, output=str(tmp_path / name))
        report = train(override(config, ["log_every=1", "show_progress=no"]))
        assert report.step == 20 and report.best_step is not None
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        losses.append([line["loss"] for line in lines if line["event"] == "step"])
    assert len(losses[0]) == 20 and losses[0] == losses[1]
