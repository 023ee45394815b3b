"""Rows of equal time and of equal steps stand in one file and in tables of their own."""

import json
from pathlib import Path
from typing import Any

import record
import which_loss


def row(loss: str, limit: str, score: float) -> dict[str, Any]:
    metrics = {"NDCG@10": score, "Coverage@10": 0.5}
    key = {"case": "A log", "loss": loss, "seed": 1, "settings": [f"limits.{limit}"]}
    measured = {"step": 9, "seconds_per_step": 0.1, "peak_gib": 0.5, "test": metrics}
    return {"key": key, "num_items": 1000, "judge": "test", "run": {}, **measured}


def test_the_page_has_a_table_for_equal_time_and_one_for_equal_steps(
    tmp_path: Path,
) -> None:
    shared = "cce_minus:num_negatives=8,share=128"
    rows = [row("cce", "max_minutes=2", 0.1), row(shared, "max_minutes=2", 0.2)]
    rows += [row(shared, "max_steps=1750", 0.3)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    results = record.Results(file)
    _, of_time, of_steps = which_loss.page(results).split("\n## ")
    assert of_time.startswith("A log, 1,000 items, 2 minutes each")
    assert "| cce | 0.1000" in of_time and "share 128 | 0.2000" in of_time
    assert of_steps.startswith("A log, 1,000 items, 1,750 steps each")
    assert "share 128 | 0.3000" in of_steps and "| cce |" not in of_steps
    which_loss.draw(results, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000
