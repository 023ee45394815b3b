"""The example service answers as the recommender does, and follows what is published."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.pipeline.small_data import prepare_small, small_config, write_log

from shardrec.pipeline.export import ExportConfig, export
from shardrec.pipeline.publish import PublishConfig, publish
from shardrec.pipeline.serve import Recommender
from shardrec.pipeline.train import train

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

EXAMPLE = Path(__file__).resolve().parent.parent.parent / "examples" / "serve_fastapi.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    specification = importlib.util.spec_from_file_location("serve_fastapi", EXAMPLE)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["serve_fastapi"] = module  # where pydantic looks up its annotations
    specification.loader.exec_module(module)
    return module


def publish_another(folder: Path, name: str, seed: int) -> Path:
    """Train on a log of another seed, export, and make ``published.json`` name it."""
    log = write_log(folder / f"{name}.parquet", seed=seed)
    data = prepare_small(folder / name, events=str(log))
    run, model = str(folder / f"run-{name}"), str(folder / f"model-{name}")
    train(small_config(data, run))
    export(ExportConfig(run=run, prepared=data, output=model))
    published = folder / "published.json"
    publish(PublishConfig(export=model, published=str(published), force=True))
    return published


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_another(tmp_path_factory.mktemp("service"), "first", 0)


@pytest.fixture(scope="module")
def model(published: Path) -> Recommender:
    return Recommender.open(published)


@pytest.fixture
def client(example: ModuleType, published: Path) -> Iterator[Any]:
    from fastapi.testclient import TestClient

    with TestClient(example.create_app(published)) as client:
        yield client


def pairs(answer: Any, row: int = 0) -> list[tuple[Any, Any]]:
    assert answer.status_code == 200, answer.text
    return [(item["item_id"], item["score"]) for item in answer.json()["lists"][row]]


def test_lists_are_those_of_the_recommender(client: Any, model: Recommender) -> None:
    ids = model.ids.ids.to_pylist()
    histories = [ids[:4], [], [10**9], ids[7:9]]
    asked = {"histories": histories, "k": 5}
    answer, wanted = client.post("/recommend", json=asked), model.recommend(histories, k=5)
    for row in (0, 3):
        assert [name for name, _ in pairs(answer, row)] == [name for name, _ in wanted[row]]
        assert [score for _, score in pairs(answer, row)] == pytest.approx(
            [score for _, score in wanted[row]]
        )
    popular = [(name, None) for name, _ in wanted[1]]
    assert pairs(answer, 1) == pairs(answer, 2) == popular, "unknown users get popular items"
    assert answer.json()["catalog_version"] == model.manifest["catalog_version"]


def test_allow_and_deny_hold_for_one_request(client: Any, model: Recommender) -> None:
    ids = model.ids.ids.to_pylist()
    asked = {"histories": [ids[:3], []], "k": 4}
    before = client.post("/recommend", json=asked)
    denied = [name for name, _ in pairs(before)[:2]]
    without = client.post("/recommend", json=asked | {"deny": denied})
    assert not {name for name, _ in pairs(without)} & set(denied)
    only = ids[10:13]
    allowed = client.post("/recommend", json=asked | {"allow": only, "deny": only[:1]})
    assert {name for name, _ in pairs(allowed)} <= set(only[1:])
    assert {name for name, _ in pairs(allowed, 1)} <= set(only[1:]), "popular ones too"
    assert pairs(client.post("/recommend", json=asked | {"allow": []})) == []
    assert pairs(client.post("/recommend", json=asked)) == pairs(before)


def test_similar_items_leave_out_the_item_itself(client: Any, model: Recommender) -> None:
    (item, *_) = model.ids.ids.to_pylist()
    found = pairs(client.get(f"/similar/{item}", params={"k": 3}))
    wanted = model.similar([item], k=3)[0]
    assert [name for name, _ in found] == [name for name, _ in wanted] and len(found) == 3
    assert [score for _, score in found] == pytest.approx([score for _, score in wanted])
    assert item not in [name for name, _ in found]
    missing = client.get(f"/similar/{10**9}")
    assert missing.status_code == 404 and "item_id must be of the catalog" in missing.text


@pytest.mark.parametrize(
    "wrong",
    [
        {"histories": [["text"]]},
        {"histories": [[1.5]]},
        {"histories": []},
        {"histories": [[1]], "k": 0},
        {"histories": [[1]], "k": 10**9},
        {"histories": [[1]], "deny": ["text"]},
        {},
    ],
    ids=str,
)
def test_a_wrong_request_is_the_client_s_error(client: Any, wrong: dict[str, Any]) -> None:
    assert client.post("/recommend", json=wrong).status_code == 422


def test_the_service_follows_the_pointer_and_keeps_the_old_model_if_it_must(
    client: Any, published: Path
) -> None:
    served = client.app.state.served
    first = client.get("/version").json()
    publish_another(published.parent, "second", 1)
    served.reload()
    second = client.get("/version").json()
    assert second["run"] != first["run"] and client.get("/health").json()["status"] == "ok"
    whole = published.read_text()
    published.write_text("{")
    os.utime(published, ns=(1, 1))
    served.reload()
    health = client.get("/health").json()
    assert health["status"] == "old" and "published.json" in health["problem"]
    assert client.get("/version").json() == second
    published.write_text(whole)
    served.reload()
    assert client.get("/health").json() == {"status": "ok", "problem": None}
