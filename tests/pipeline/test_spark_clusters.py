"""Both engines on clusters of several processes; ``SHARDREC_TEST_LOGS`` adds logs to compare on.

It names Parquet files or folders with columns user_id, item_id and timestamp, separated by ":".
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.pipeline.test_spark import needs_spark, on_both, require_equal, write_random_log

from shardrec.pipeline.prepare import PrepareConfig, prepare

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytestmark = [pytest.mark.spark, needs_spark]
LOGS = [path for path in os.environ.get("SHARDREC_TEST_LOGS", "").split(":") if path]
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "by time": {"validation": "time", "targets": "all", "min_item_events": 3},
    "no validation": {"validation": "none", "keep_duplicates": True, "test_quantile": 0.7},
    "few users": {"validation_users": 11, "drop_repeats": True, "seed": 5},
    "leave one out": {"split": "leave_one_out", "ties": "shuffle", "min_user_events": 4},
}


@contextmanager
def standalone() -> Iterator[str]:
    """A master and two workers, each a process of its own."""
    import pyspark

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"spark://127.0.0.1:{port}"
    start = [f"{Path(pyspark.__file__).parent}/bin/spark-class"]
    at = ["--host", "127.0.0.1"]
    master = ["org.apache.spark.deploy.master.Master", *at, "--port", str(port)]
    worker = ["org.apache.spark.deploy.worker.Worker", *at, "--cores", "1", "--memory", "1500m"]
    with ExitStack() as stack:
        for words in ([*master, "--webui-port", "0"], [*worker, url], [*worker, url]):
            process = subprocess.Popen([*start, *words], stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            time.sleep(2)
        yield url


@pytest.fixture(scope="module", params=["local-cluster", "standalone"])
def spark(request: pytest.FixtureRequest) -> Iterator[SparkSession]:
    from pyspark.sql import SparkSession

    with ExitStack() as stack:
        url = "local-cluster[2,1,1500]"
        if request.param == "standalone":
            url = stack.enter_context(standalone())
        settings = {
            "spark.master": url,
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
            "spark.driver.host": "127.0.0.1",
            "spark.executor.memory": "1000m",
            "spark.executorEnv.PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "spark.sql.shuffle.partitions": "4",
        }
        session = SparkSession.builder.config(map=settings).getOrCreate()
        session.sparkContext.setLogLevel("FATAL")
        stack.callback(session.stop)
        yield session


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_every_split_is_the_same_on_a_cluster(
    spark: SparkSession, tmp_path: Path, options: dict[str, Any]
) -> None:
    log = write_random_log(tmp_path / "log", 3)
    require_equal(*on_both(spark, tmp_path, log, **options))


def test_a_rebalance_is_the_same_on_a_cluster(spark: SparkSession, tmp_path: Path) -> None:
    first = write_random_log(tmp_path / "first", 4, users=60)
    prepare(PrepareConfig(events=first, output=str(tmp_path / "before")))
    items = str(tmp_path / "before" / "items.parquet")
    second = write_random_log(tmp_path / "second", 5, users=80)
    found, other = on_both(spark, tmp_path, second, items=items, rebalance=True)
    require_equal(found, other)
    assert any(entry.path == "item_map.parquet" for entry in found.files)


def test_former_items_are_kept_alike_on_a_cluster(spark: SparkSession, tmp_path: Path) -> None:
    first = write_random_log(tmp_path / "first", 1, users=40, text=False)
    prepare(PrepareConfig(events=first, output=str(tmp_path / "before"), min_item_events=20))
    found, other = on_both(
        spark,
        tmp_path / "leave_one_out",
        write_random_log(tmp_path / "second", 2, users=60, text=False),
        items=str(tmp_path / "before" / "items.parquet"),
        split="leave_one_out",
        targets="all",
        min_item_events=12,
        min_user_events=9,
        drop_repeats=True,
    )
    require_equal(found, other)
    assert found.counts["new_items"] and found.counts["items_dropped"]


@pytest.mark.parametrize("log", LOGS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_given_logs_are_the_same_on_a_cluster(
    spark: SparkSession, tmp_path: Path, log: str, options: dict[str, Any]
) -> None:
    require_equal(*on_both(spark, tmp_path, log, **options))


@pytest.mark.parametrize("log", LOGS)
@pytest.mark.parametrize("name", ["by time", "leave one out"])
def test_given_logs_with_former_items_are_the_same_on_a_cluster(
    spark: SparkSession, tmp_path: Path, log: str, name: str
) -> None:
    former = tmp_path / "before"
    prepare(PrepareConfig(events=log, output=str(former), min_item_events=20, validation="none"))
    items = str(former / "items.parquet")
    found, other = on_both(spark, tmp_path, log, items=items, **OPTIONS[name])
    require_equal(found, other)
    assert found.counts["former_items"] and found.counts["new_items"]
