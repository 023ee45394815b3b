"""Prepared folders that the tests share and leave as they are."""

import pytest
from tests.pipeline.small_data import prepare_small


@pytest.fixture(scope="session")
def plain_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepare_small(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def weighted_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepare_small(tmp_path_factory.mktemp("weighted"), weight_column="weight")
