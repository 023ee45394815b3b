"""The demo's settings fit its recipe, and its table says how far each loss came."""

from io import StringIO

import pytest
from rich.console import Console

from shardrec.launch.demo import (
    CLUSTERS,
    LOSS_SETTINGS,
    LOSSES,
    METRICS,
    SETTINGS,
    DemoConfig,
    Row,
    table,
)
from shardrec.pipeline.config import override, snake_case
from shardrec.pipeline.recipes import RECIPES
from shardrec.pipeline.synth_world import SynthConfig, World, blocks


@pytest.mark.parametrize("loss", LOSSES)
def test_the_settings_of_each_loss_fit_the_recipe(loss: str) -> None:
    start = RECIPES[DemoConfig().recipe](data="data", output="run")
    config = override(
        start, [f"loss={loss}", "limits.max_steps=1", *SETTINGS, *LOSS_SETTINGS[loss]]
    )
    assert snake_case(type(config.loss).__name__) == loss
    assert not config.validation.is_on


def test_the_generated_catalog_has_fifty_thousand_items_or_more() -> None:
    demo = DemoConfig()
    config = SynthConfig(
        users=demo.users, items=demo.items, events=demo.size, clusters=CLUSTERS, seed=demo.seed
    )
    seen = {int(item) for block in blocks(World(config)) for item in block.item}
    assert len(seen) >= 50_500


def test_the_table_shows_the_share_of_the_gap_where_the_true_model_is_known() -> None:
    rows = [Row("popularity", dict.fromkeys(METRICS, 0.05))]
    rows.append(Row("cce", dict.fromkeys(METRICS, 0.15), 0.25, 2**30))
    known, unknown = shown(rows, 0.25), shown(rows, None)
    assert (
        "50 %" in known and "Coverage@10" in known and "true model" in known and "0.2500" in known
    )
    assert "%" not in unknown and "true model" not in unknown


def shown(rows: list[Row], ceiling: float | None) -> str:
    """The table as text."""
    console = Console(file=StringIO(), width=80)
    console.print(table(rows, DemoConfig(), ceiling))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()
