"""MLflow gets the config, the steps and the validations of a real run, from rank 0 alone."""

import dataclasses
import json
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from tests.pipeline.small_data import small_config
from tests.pipeline.test_callbacks import CHECKPOINT, END, STEP, VALIDATION, play
from tests.ranks import Ranks

from shardrec.launch.cli import main
from shardrec.pipeline.run.config import LimitConfig, MLflowConfig, TrainConfig
from shardrec.pipeline.run.mlflow_logging import open_mlflow
from shardrec.pipeline.train import train

# Runs of several processes: seconds each.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(plain_data: str) -> str:
    return plain_data


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow counts its users unless it is told not to."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store of its own; making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def runs_of(uri: str, experiment: str) -> list[Run]:
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return list(client.search_runs([found.experiment_id]))


def logged(data: str, output: Path, uri: str, experiment: str) -> TrainConfig:
    return small_config(
        data,
        output,
        log_every=2,
        limits=LimitConfig(max_epochs=None, max_steps=5),
        mlflow=MLflowConfig(uri=uri, experiment=experiment),
    )


def test_a_run_can_be_read_back(data: str, uri: str, tmp_path: Path) -> None:
    config = logged(data, tmp_path / "my-run", uri, "alone")
    end = train(config)
    (run,) = runs_of(uri, "alone")
    assert (run.info.status, run.info.run_name) == ("FINISHED", "my-run")
    assert run.data.params["encoder.width"] == "16"
    assert run.data.params["loss.type"] == "cce"
    assert run.data.tags["stopped"] == "max_steps reached"
    assert run.data.tags["checkpoint.best"].startswith(str(tmp_path))
    assert run.data.metrics["run/seconds_per_step"] == pytest.approx(end.seconds_per_step)
    client = MlflowClient(tracking_uri=uri)
    lines = [json.loads(line) for line in (tmp_path / "my-run" / "metrics.jsonl").open()]
    for event, key, name in (
        ("step", "loss", "train/loss"),
        ("validation", "metrics", "validation/NDCG_at_10"),
    ):
        written = {
            line["step"]: line[key]["NDCG@10"] if key == "metrics" else line[key]
            for line in lines
            if line["event"] == event and (event != "step" or line["step"] % 2 == 0)
        }
        history = client.get_metric_history(run.info.run_id, name)
        assert {metric.step: metric.value for metric in history} == pytest.approx(written)


def train_on_ranks(config: TrainConfig) -> int:
    return train(config).step


def test_only_rank_0_logs(ranks: Ranks, data: str, uri: str, tmp_path: Path) -> None:
    config = logged(data, tmp_path / "run", uri, "ranks")
    assert ranks(2).run(train_on_ranks, config) == [5, 5]
    (run,) = runs_of(uri, "ranks")
    history = MlflowClient(tracking_uri=uri).get_metric_history(run.info.run_id, "train/loss")
    assert [metric.step for metric in history] == [2, 4]


def test_a_restarted_run_goes_on_in_the_same_mlflow_run(uri: str, tmp_path: Path) -> None:
    config = MLflowConfig(uri=uri, experiment="restarted", run_name="named")
    parameters = {f"option.{number}": number for number in range(250)}
    open_mlflow(config, tmp_path, parameters).on_step(STEP)
    (run,) = runs_of(uri, "restarted")
    assert (run.info.status, run.info.run_name) == ("RUNNING", "named")
    again = open_mlflow(config, tmp_path, parameters | {"option.0": "changed", "new": "yes"})
    again.on_step(dataclasses.replace(STEP, step=2, loss=float("nan")))
    again.on_validation(VALIDATION)
    again.on_checkpoint(CHECKPOINT)
    again.on_checkpoint(dataclasses.replace(CHECKPOINT, folder="broken", error="disk full"))
    again.on_end(END)
    (run,) = runs_of(uri, "restarted")
    assert run.info.status == "FINISHED"
    assert len(run.data.params) == 251 and run.data.params["option.0"] == "0"
    assert run.data.metrics["train/loss"] == STEP.loss
    assert run.data.tags["checkpoint.last"] == CHECKPOINT.folder
    assert run.data.metrics["validation/ndcg_at_10"] == 0.25


def test_a_store_that_fails_on_the_way_stops_the_logging_and_not_the_training(
    uri: str, tmp_path: Path
) -> None:
    callback = open_mlflow(MLflowConfig(uri=uri, experiment="failing"), tmp_path, {})
    callback.on_step(STEP)
    assert callback.run_id is not None
    MlflowClient(tracking_uri=uri).delete_run(callback.run_id)
    with pytest.warns(UserWarning, match="MLflow is not logged to any more") as caught:
        play(callback)
    assert len(caught) == 1


def test_a_store_that_does_not_answer_is_refused_before_the_run_begins(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--prepared", data, "--run", str(tmp_path / "run"), "--recipe", "tiny_cpu"]
    assert main([*words, "mlflow.uri=gopher://nowhere"]) == 2
    assert "mlflow.uri must be a tracking store that answers" in capsys.readouterr().err
    assert main([*words, "mlflow.uri=https://me:secret@somewhere"]) == 2
    told = capsys.readouterr().err
    assert "must be without a password" in told and "secret" not in told
    assert not (tmp_path / "run").exists()
