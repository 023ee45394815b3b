"""What a service asks of one recommender: other items each time, forks, very long histories."""

import math
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.pipeline.small_data import prepare_small, small_config

from shardrec.pipeline import serve
from shardrec.pipeline.export import ExportConfig, export
from shardrec.pipeline.serve import Recommender
from shardrec.pipeline.train import train


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    data, run = prepare_small(folder), str(folder / "run")
    train(small_config(data, run))
    has_faiss = True
    try:
        import faiss  # noqa: F401
    except ModuleNotFoundError:
        has_faiss = False
    index = "Flat" if has_faiss else None
    export(ExportConfig(run=run, prepared=data, output=str(folder / "model"), faiss=index))
    return folder / "model"


def names(lists: list[list[tuple[int | str, float]]]) -> list[list[int | str]]:
    return [[name for name, _ in one] for one in lists]


@pytest.mark.parametrize("approximate", [False, True], ids=["exact", "index"])
def test_no_request_changes_the_next_one(exported: Path, approximate: bool) -> None:
    if approximate:
        pytest.importorskip("faiss")
    model = Recommender.open(exported, approximate=approximate, trust_code=approximate)
    ids = model.ids.ids.to_pylist()
    histories = [ids[:4], ids[5:6]]
    seen, all_items = (model.recommend(histories, 6, filter_seen=one) for one in (True, False))
    without = model.recommend(histories, 6, deny=names(seen)[0])
    assert not set(names(without)[0]) & set(names(seen)[0])
    only = model.recommend(histories, 6, allow=ids[20:25])
    assert all(set(one) <= set(ids[20:25]) for one in names(only))
    assert names(model.recommend(histories, 6)) == names(seen)
    assert names(model.recommend(histories, 6, filter_seen=False)) == names(all_items)


def test_a_history_longer_than_an_index_should_search_is_searched_exactly(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    model = Recommender.open(exported, approximate=True, trust_code=True)
    ids = model.ids.ids.to_pylist()
    bot, wanted = ids[:8] * 1000, Recommender.open(exported).recommend([ids[:8] * 1000], 4)

    def must_not_be_asked(*_: object) -> None:
        raise AssertionError("8,000 hidden items were asked of the index")

    monkeypatch.setattr(serve, "index_top_items", must_not_be_asked)
    assert names(model.recommend([bot], 4)) == names(wanted)


def test_similar_items_are_the_nearest_by_cosine(exported: Path) -> None:
    model = Recommender.open(exported)
    unit = F.normalize(model.vectors.double())
    ids = model.ids.ids.to_pylist()
    cosines = unit @ unit.T
    for item in (0, 7, 30):
        order = [
            one
            for one in cosines[item].argsort(descending=True).tolist()
            if one != item and model.allowed[one]
        ][:5]
        (found,) = model.similar([ids[item]], k=5)
        assert [name for name, _ in found] == [ids[one] for one in order]
        assert [score for _, score in found] == pytest.approx(cosines[item, order].tolist())
    assert model.similar([10**9, ids[0]], k=2)[0] == []
    assert len(model.similar([ids[0]], k=10**6)[0]) == int(model.allowed.sum()) - 1
    with pytest.raises(TypeError, match="ids of items 0 must be whole numbers"):
        model.similar(["text"])


def test_ids_of_another_type_name_the_list_they_are_in(exported: Path) -> None:
    model = Recommender.open(exported)
    for name in ("allow", "deny"):
        with pytest.raises(TypeError, match=f"ids of {name} 0 must be whole numbers"):
            model.recommend([[1]], **{name: ["text"]})  # type: ignore[arg-type]
    popular = model.recommend([[]], 3)[0]
    assert all(math.isnan(score) for _, score in popular)


def answer(model: Recommender, told: Connection) -> None:
    told.send(names(model.recommend([model.ids.ids.to_pylist()[:3]], 4)))


def test_a_model_that_was_used_answers_after_a_fork(exported: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # with more, OpenMP waits in the child for threads of its parent
    try:
        model = Recommender.open(exported)
        wanted = names(model.recommend([model.ids.ids.to_pylist()[:3]], 4))
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=answer, args=(model, theirs))
        child.start()
        try:
            assert ours.poll(30), "the child hangs"
            assert ours.recv() == wanted
        finally:
            child.kill()
            child.join()
    finally:
        torch.set_num_threads(before)
