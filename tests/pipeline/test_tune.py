"""Tuning: what is searched, that a study goes on where it stopped, and what is left of it."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.small_data import prepare_small, small_config
from tests.ranks import Ranks

from shardrec.modules.catalog_config import CatalogConfig
from shardrec.modules.losses import CCE
from shardrec.pipeline.evaluate import evaluate
from shardrec.pipeline.model.config import MeasureConfig
from shardrec.pipeline.run.config import LimitConfig, TrainConfig, ValidationConfig
from shardrec.pipeline.run.interruption import Preempted
from shardrec.pipeline.tune import TuneConfig, Tuned, tune
from shardrec.pipeline.tuning.space import read_space
from shardrec.pipeline.tuning.study import BEST, STUDY, TRIALS, Study

SEARCH = (
    "catalog.learning_rate=1e-4:0.1:log",
    "encoder.num_blocks=1:2",
    "encoder.kind=sasrec,modern",
)
MEASURE = MeasureConfig(ks=(10,), batch_size=50)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepare_small(tmp_path_factory.mktemp("log"))


def base(data: str, **options: Any) -> TrainConfig:
    """Ten steps, with three validations."""
    settings: dict[str, Any] = {
        "loss": CCE(),
        "catalog": CatalogConfig(optimizer="adam", learning_rate=1e-2),
        "limits": LimitConfig(max_steps=10),
        "validation": ValidationConfig(every_steps=4, measure=MEASURE),
    }
    return small_config(data, "unused", **(settings | options))


def study(folder: Path, **options: Any) -> TuneConfig:
    """Trials are not ended early unless a test asks for it."""
    return TuneConfig(output=str(folder), **({"trials": 3, "patience": 99} | options))


@pytest.fixture(scope="module")
def whole(data: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tuned]:
    """A study of three trials that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole") / "study"
    return folder, tune(study(folder), base(data), SEARCH)


def values(found: Tuned) -> dict[int, tuple[dict[str, str], float | None]]:
    return {trial.number: (dict(trial.options), trial.value) for trial in found.trials}


def best_validation(run: Path) -> float:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    found = [line["metrics"]["NDCG@10"] for line in lines if line["event"] == "validation"]
    return float(max(found))


def test_trials_stay_in_the_space_and_the_best_one_is_kept(
    data: str, whole: tuple[Path, Tuned]
) -> None:
    folder, found = whole
    assert sorted(values(found)) == [0, 1, 2] and found.num_pruned == 0
    for trial in found.trials:
        assert 1e-4 <= float(trial.options["catalog.learning_rate"]) <= 0.1
        assert trial.options["encoder.num_blocks"] in ("1", "2")
        stored = json.loads((folder / TRIALS / f"{trial.number:04d}" / "config.json").read_text())
        rate = stored["catalog"]["learning_rate"]
        assert rate == float(trial.options["catalog.learning_rate"])
        assert trial.value == best_validation(folder / TRIALS / f"{trial.number:04d}")
    ordered = [trial.value for trial in found.trials]
    assert ordered == sorted(ordered, reverse=True) and len(set(ordered)) > 1  # type: ignore[type-var]
    best = json.loads((folder / BEST).read_text())
    assert found.best is not None
    assert (best["trial"], best["value"]) == (found.best.number, found.best.value)
    assert best["options"] == found.best.options
    kept = [path.parent.name for path in folder.glob(f"{TRIALS}/*/checkpoints")]
    assert kept == [f"{best['trial']:04d}"]
    run = str(folder / TRIALS / kept[0])
    measured = evaluate(run, data, MEASURE, split="validation")["metrics"]
    assert measured["NDCG@10"] == pytest.approx(best["value"], abs=1e-9)


def test_the_first_trial_is_the_recipe_itself(data: str, whole: tuple[Path, Tuned]) -> None:
    first = values(whole[1])[0][0]
    config = base(data)
    assert float(first["catalog.learning_rate"]) == config.catalog.learning_rate
    assert first["encoder.num_blocks"] == str(config.encoder.num_blocks)
    assert first["encoder.kind"] == config.encoder.kind


@pytest.mark.slow
@pytest.mark.parametrize("after", [6, 17], ids=["in the first trial", "in the second trial"])
def test_an_interrupted_study_ends_as_an_undisturbed_one(
    after: int, data: str, whole: tuple[Path, Tuned], tmp_path: Path
) -> None:
    asked = iter(range(1000))
    with pytest.raises(Preempted):
        tune(study(tmp_path), base(data), SEARCH, interrupted=lambda: next(asked) >= after)
    assert values(tune(study(tmp_path), base(data), SEARCH)) == values(whole[1])


@pytest.mark.slow
def test_more_trials_go_on_with_a_finished_study(data: str, tmp_path: Path) -> None:
    two, three = (study(tmp_path, trials=trials) for trials in (2, 3))
    first = tune(two, base(data), SEARCH)
    assert values(tune(two, base(data), SEARCH)) == values(first)
    assert len(tune(three, base(data), SEARCH).trials) == 3


@pytest.mark.slow
def test_a_trial_below_the_median_is_ended_early(data: str, tmp_path: Path) -> None:
    search = ["catalog.learning_rate=0.0,0.01"]
    found = tune(study(tmp_path, trials=8, patience=1), base(data), search)
    pruned = [trial for trial in found.trials if trial.value is None]
    assert pruned and found.num_pruned == len(pruned)
    assert {trial.options["catalog.learning_rate"] for trial in pruned} == {"0.0"}
    folders = [tmp_path / TRIALS / f"{trial.number:04d}" for trial in pruned]
    assert not any((folder / "end.json").exists() for folder in folders)
    assert found.best is not None and found.best.options == {"catalog.learning_rate": "0.01"}


@pytest.mark.slow
def test_a_trial_that_diverges_does_not_end_the_study(data: str, tmp_path: Path) -> None:
    search = ["optimizer.learning_rate=0.001,1e29"]
    found = tune(study(tmp_path, trials=6), base(data), search)
    ended = {trial.options["optimizer.learning_rate"]: trial.value for trial in found.trials}
    assert ended["1e29"] is None and ended["0.001"] is not None


def test_time_that_is_over_starts_no_trial(data: str, tmp_path: Path) -> None:
    found = tune(study(tmp_path, minutes=1e-9), base(data), SEARCH)
    assert found.trials == [] and found.best is None
    assert not (tmp_path / BEST).exists()


def test_processes_take_different_trials_and_what_a_lost_one_left(
    data: str, tmp_path: Path
) -> None:
    space, config = read_space(SEARCH), study(tmp_path)

    def open_study() -> Study:
        return Study(config, base(data), space)

    with contextlib.ExitStack() as alive, contextlib.ExitStack() as lost:
        one, other = open_study().claim(alive), open_study().claim(lost)
        assert one is not None and other is not None
        assert (one.folder, other.folder) == ("0000", "0001") and one.options != other.options
        lost.close()  # as the end of a process does
        again = open_study().claim(lost)
        assert again is not None and again.folder == "0001" and again.options == other.options
        third = open_study().claim(lost)
        assert third is not None and third.folder == "0002"


def ranked_study(data: str, folder: str) -> Any:
    found = tune(study(Path(folder)), base(data), SEARCH)
    return [(trial.number, dict(trial.options), trial.value) for trial in found.trials]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_the_number_of_ranks_does_not_change_what_is_found(
    size: int, data: str, whole: tuple[Path, Tuned], ranks: Ranks, tmp_path: Path
) -> None:
    answers = ranks(size).run(ranked_study, data, str(tmp_path))
    assert all(answer == answers[0] for answer in answers)
    expected = values(whole[1])
    for number, options, value in answers[0]:
        assert options == expected[number][0]
        assert value == pytest.approx(expected[number][1], abs=0.03)  # one user is 0.01


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (["encoder.depth=1:3"], "encoder.depth"),
        (["encoder.num_blocks=0:3"], "num_blocks must be at least 1"),
        (["encoder.dropout=0:1.5"], "dropout"),
        (["encoder.kind=sasrec,transformer"], "transformer"),
        (["encoder.dropout"], "search must be name=low:high"),
        (["encoder.dropout=0.5"], "search must be name=low:high"),
        (["encoder.dropout=0.5:0.1"], "search must be name=low:high"),
        (["encoder.dropout=0:0.5:log"], "search must be name=low:high"),
        (["encoder.dropout=0:0.5:linear"], "search must be name=low:high"),
        (["encoder.dropout=a:b"], "search must be name=low:high"),
        (["encoder.dropout=0:inf"], "search must be name=low:high"),
        (["encoder.dropout=0:0.5", "encoder.dropout=0,0.1"], "name each option once"),
        ([], "search must name an option"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_before_anything_is_written(
    search: list[str], message: str, data: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        tune(study(tmp_path / "study"), base(data), search)
    assert not (tmp_path / "study").exists()


def test_a_run_without_validations_cannot_be_tuned(data: str, tmp_path: Path) -> None:
    unmeasured = base(data, validation=ValidationConfig(every_epochs=None))
    with pytest.raises(ValueError, match="validation must be on to tune"):
        tune(study(tmp_path / "study"), unmeasured, SEARCH)


def test_another_request_and_other_files_are_refused(
    data: str, whole: tuple[Path, Tuned], tmp_path: Path
) -> None:
    folder, _ = whole
    others = [
        (base(data), SEARCH[:2]),
        (base(data, loss=CCE(normalize=True)), SEARCH),
    ]
    for config, search in others:
        with pytest.raises(ValueError, match=f"another one .see {STUDY}"):
            tune(study(folder), config, search)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        tune(study(tmp_path), base(data), SEARCH)


@pytest.mark.parametrize("wrong", [{"minutes": 0}, {"trials": 0}, {"patience": 0}])
def test_a_search_without_time_or_trials_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        study(Path("anywhere"), **wrong)
