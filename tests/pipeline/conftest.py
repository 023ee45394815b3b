"""Prepared folders and a trained run that several files of tests read."""

import pytest
from tests.pipeline.small_data import prepare_small, small_config

from shardrec.modules.catalog_config import CatalogConfig
from shardrec.pipeline.train import train


@pytest.fixture(scope="session")
def plain_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepare_small(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def weighted_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepare_small(tmp_path_factory.mktemp("weighted"), weight_column="weight")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Split by time, all later events as targets: new items, repeated targets, several of each."""
    folder = tmp_path_factory.mktemp("data")
    return prepare_small(folder, split="temporal", test_quantile=0.6, targets="all")


@pytest.fixture(scope="session")
def run(data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run on that data; tests may write reports into it, with ``force`` or under other names."""
    folder = tmp_path_factory.mktemp("run") / "run"
    catalog = CatalogConfig(optimizer="adam", learning_rate=1e-2)
    train(small_config(data, folder, catalog=catalog))
    return str(folder)
