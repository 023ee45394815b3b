"""What fails on one rank alone ends all: none is left waiting for it in a collective."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist
from tests.pipeline.small_data import small_config
from tests.ranks import Ranks

from shardrec.pipeline.evaluate import evaluate, evaluate_popularity
from shardrec.pipeline.export import ExportConfig, export
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.recommend import RecommendConfig, recommend
from shardrec.pipeline.run import build as run_module
from shardrec.pipeline.run.config import LimitConfig, ValidationConfig
from shardrec.pipeline.train import train

MESSAGE = "the disk of this node is gone"


@pytest.fixture(scope="module")
def data(plain_data: str) -> str:
    return plain_data


@pytest.fixture(scope="module")
def run(data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(short(data, folder))
    return str(folder)


def short(data: str, output: Path | str) -> Any:
    off = ValidationConfig(every_epochs=None)
    return small_config(data, output, limits=LimitConfig(max_steps=1), validation=off)


def stages(data: str, run: str, output: str) -> dict[str, Callable[[], object]]:
    histories = str(Path(output).parent / "histories.parquet")
    wanted = RecommendConfig(run=run, prepared=data, histories=histories, output=output)
    return {
        "train": lambda: train(short(data, output)),
        "evaluate": lambda: evaluate(run, data, output=output),
        "popularity": lambda: evaluate_popularity(data),
        "recommend": lambda: recommend(wanted),
        "export": lambda: export(ExportConfig(run=run, prepared=data, output=output)),
    }


def fail_on_the_second_rank(stage: str, broken: str, data: str, run: str, output: str) -> str:
    owner: Any = run_module if broken == "pick_device" else Prepared
    is_broken = dist.get_rank() == 1
    work = mock.Mock(side_effect=OSError(MESSAGE)) if is_broken else getattr(owner, broken)
    with mock.patch.object(owner, broken, work):
        try:
            stages(data, run, output)[stage]()
        except OSError as error:
            return f"{error} {error.__notes__}"
    return "no rank noticed"


@pytest.mark.parametrize(
    ("stage", "broken"),
    [
        *[(stage, "open") for stage in ("train", "evaluate", "popularity", "recommend", "export")],
        ("train", "item_counts"),
        ("train", "pick_device"),
        ("evaluate", "item_counts"),
        ("evaluate", "pick_device"),
        ("popularity", "item_counts"),
        ("recommend", "item_ids"),
        ("export", "item_counts"),
    ],
)
def test_an_error_on_one_rank_is_raised_on_all(
    ranks: Ranks, data: str, run: str, tmp_path: Path, stage: str, broken: str
) -> None:
    users = pa.table({"user_id": [1, 2], "items": [[1, 2], [3]]})
    pq.write_table(users, tmp_path / "histories.parquet")
    output = str(tmp_path / "output")
    asked = (stage, broken, data, run, output)
    outcomes = ranks(2).run(fail_on_the_second_rank, *asked, timeout=20)
    assert outcomes == [f"{MESSAGE} ['raised on rank 1 of 2']"] * 2
    assert not Path(output).exists()
